"""Tiles out of an image."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np


class Tiles:
    """Tiles of 224 px at Visium's pitch, of an image with chunks of 256 px."""

    params = ([2048, 4096], ["numpy", "zarr", "dask"], [1.0, 0.72])
    param_names = ("edge_px", "container", "scale")
    timeout = 120
    pitch_px = 144

    def setup(self, edge_px: int, container: str, scale: float) -> None:
        import dask.array as da
        import zarr

        rng = np.random.default_rng(0)
        pixels = rng.integers(160, 176, (3, edge_px, edge_px), dtype=np.uint8)
        self.folder = Path(tempfile.mkdtemp())
        self.data: Any = pixels
        if container != "numpy":
            array = zarr.create_array(
                self.folder / "image.zarr", shape=pixels.shape, chunks=(3, 256, 256), dtype="uint8"
            )
            array[:] = pixels
            self.data = array if container == "zarr" else da.from_zarr(array)
        side = np.arange(112, edge_px - 112, self.pitch_px, dtype=float)
        self.xy_px = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)

    def teardown(self, *_: Any) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def time_tiles(self, edge_px: int, container: str, scale: float) -> None:
        self._read(scale)

    def track_tiles_per_second(self, edge_px: int, container: str, scale: float) -> float:
        from time import perf_counter

        start = perf_counter()
        return self._read(scale) / (perf_counter() - start)

    track_tiles_per_second.unit = "tiles/s"  # type: ignore[attr-defined]

    def _read(self, scale: float) -> int:
        from histosge._image import LazyImage, batches, tile_blocks

        found = tile_blocks(LazyImage(self.data), self.xy_px, scale=scale, tile_px=224)
        return sum(len(tiles) for tiles, _ in batches(found, tile_px=224, batch_size=64))
