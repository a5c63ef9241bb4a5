"""``rgb``: the mean colour around a location, as in the paper's figure. No weights, no download.

Alone it has little information: join it with another encoder, as in ``"uni+rgb"``. Tokens, for targets smaller than a
spot, are the colours of small squares.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F

from histosge._encoders._spec import EncoderSpec

if TYPE_CHECKING:
    from torch import Tensor

WINDOW_UM = 55.0
"""Edge of the window: the size of a Visium spot."""
MPP = 1.0
CELL_PX = 5
"""Colours are first averaged over cells of this edge. The cells are the tokens, and whole cells fill the window."""


class MeanColour:
    """Mean red, green and blue, from 0 to 1."""

    version = 1
    """Increased when the same pixels give other embeddings"""
    align_px = CELL_PX
    halo_px = int(WINDOW_UM / MPP / 2) + 2 * CELL_PX  # half a window, and cells for interpolation

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.spec = EncoderSpec(
            name="rgb",
            mpp=MPP,
            tile_px=int(WINDOW_UM / MPP),
            embed_dim=3,
            licence="BSD-3-Clause",
            commercial=True,
            source="built-in",
            token_px=CELL_PX,
            coarsest_mpp=100.0,
            fixed_tile=True,
            whole_blocks=True,
        )

    def to(self, device: torch.device | str) -> Self:
        """Compute on ``device``."""
        self.device = torch.device(device)
        return self

    @torch.inference_mode()
    def embed_block(self, block: Tensor, centres: Tensor) -> Tensor:
        """Embed locations of a block.

        Parameters
        ----------
        block
            (3, height, width) uint8, red, green, blue, at 1 µm per pixel.
        centres
            (n, 2) locations (x, y) in pixels of the block, at least ``halo_px`` away from its border.

        Returns
        -------
        (n, 3) float32.
        """
        return self._around(self._cells(block), centres)

    @torch.inference_mode()
    def embed_block_dense(self, block: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
        """Embed every cell of a block, (height / 5, width / 5, 3), and windows around locations, (n, 3), float32."""
        cells = self._cells(block)
        return cells.permute(1, 2, 0), self._around(cells, centres)

    def _cells(self, block: Tensor) -> Tensor:
        return F.avg_pool2d(block.to(self.device, torch.float32) / 255, CELL_PX)  # (3, h / cell, w / cell)

    def _around(self, cells: Tensor, centres: Tensor) -> Tensor:
        n_cells = int(WINDOW_UM / MPP) // CELL_PX
        mean = F.avg_pool2d(cells[None], n_cells, stride=1, padding=n_cells // 2)  # (1, 3, h, w)
        grid = (centres.to(self.device, torch.float32) / CELL_PX) * 2  # grid_sample wants [-1, 1] over the map
        grid = grid / grid.new_tensor([cells.shape[2], cells.shape[1]]) - 1
        return F.grid_sample(mean, grid[None, None], align_corners=False, padding_mode="border")[0, :, 0].T
