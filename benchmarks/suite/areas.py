"""Shares of footprints in the cells of a grid."""

from __future__ import annotations

import numpy as np

from . import skip_if_slow


class Coverage:
    """Squares of 8 µm, or the discs of spots, over tokens of 7 µm."""

    params = ([10_000, 100_000, 1_000_000], ["square", "disc"])
    param_names = ("n", "kind")
    timeout = 300

    def setup(self, n: int, kind: str) -> None:
        from histosge._geometry import Footprints, Grid

        skip_if_slow(n > 100_000)
        side = int(np.ceil(np.sqrt(n)))
        row, col = np.divmod(np.arange(n), side)
        xy = np.column_stack([col, row]) * 16.0 + 64
        make = {"square": Footprints.squares, "disc": Footprints.discs}[kind]
        self.footprints = make(xy, **{"square": {"edge_px": 16.0}, "disc": {"diameter_px": 40.0}}[kind])
        cells = int(np.ceil((side * 16 + 128) / 14))
        self.grid = Grid(0.0, 0.0, 14.0, cells, cells)

    def time_coverage(self, n: int, kind: str) -> None:
        from histosge._geometry import area_fractions

        area_fractions(self.footprints, self.grid)

    def peakmem_coverage(self, n: int, kind: str) -> None:
        self.time_coverage(n, kind)
