"""Tokens of a whole block, from overlapping tiles. A tile lacks context at its border, its neighbours not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import sparse

from histosge._image import Block, cut

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_TILE_STEP = 0.55
"""Step from tile to tile, as a share of a tile: neighbours overlap by the rest."""


def step_tokens(side: int) -> int:
    """Tokens from one tile to the next, of tiles ``side`` tokens wide."""
    return max(1, round(_TILE_STEP * side))


def tile_weight(u: NDArray[np.floating]) -> NDArray[np.floating]:
    """Weight at a share ``u`` of a tile's edge (Hann window): 0 at its border, where it lacks context."""
    return np.where((u > 0) & (u < 1), np.sin(np.pi * u) ** 2, 0.0)


def tiles_over(shape: tuple[int, int], bounds: NDArray[np.float64], spec: Any, step_px: int) -> NDArray[np.int64]:
    """Number the tiles that some location lies in, -1 for others: (rows, cols) of the tiles of a block."""
    n_rows, n_cols = ((side - spec.tile_px) // step_px + 1 for side in shape)
    low = np.floor((bounds[:, :2] - spec.tile_px) / step_px).astype(np.int64) + 1
    high = np.ceil(bounds[:, 2:] / step_px).astype(np.int64)  # the first tile beyond
    low, high = np.clip(low, 0, [n_cols, n_rows]), np.clip(high, 0, [n_cols, n_rows])
    edges = np.zeros((n_rows + 1, n_cols + 1), np.int64)  # corners of rectangles; cumulative sums fill them
    for sign, x, y in ((1, low, low), (-1, high, low), (-1, low, high), (1, high, high)):
        np.add.at(edges, (y[:, 1], x[:, 0]), sign)
    wanted = edges.cumsum(0).cumsum(1)[:-1, :-1] > 0
    number = np.full(wanted.shape, -1, np.int64)
    number[wanted] = np.arange(wanted.sum())
    return number


def token_grid(
    block: Block, number: NDArray[np.int64], spec: Any, *, step_px: int, forward: Any
) -> tuple[Tensor, NDArray[np.float32]]:
    """Compute tokens over a block, averaged where tiles overlap, and the summary of each tile.

    Returns
    -------
    tokens
        (rows, cols, c) float32.
    summary
        (n_tiles, d) float32.
    """
    side = spec.tile_px // spec.token_px
    step = step_px // spec.token_px
    row, col = np.nonzero(number >= 0)
    centre = np.stack([col, row], 1) * step_px + spec.tile_px / 2  # (n_tiles, 2), (x, y)
    edge = tile_weight((np.arange(side) + 0.5) / side)
    weight = torch.as_tensor(edge[:, None] * edge, dtype=torch.float32)[..., None]  # (side, side, 1)
    shape = [n // spec.token_px for n in block.pixels.shape[1:]]
    total: Any = None
    weights, summaries = torch.zeros(*shape, 1), []
    done, size = 0, forward.batch_size  # the forward pass may halve it
    for start in range(0, len(row), size):
        some = slice(start, start + size)
        tiles = cut(Block(block.pixels, number, centre[some]), tile_px=spec.tile_px)  # (b, 3, tile, tile)
        for tokens, summary in forward(tiles, forward.encoder.embed_tokens):  # (b, side, side, c), (b, d)
            if total is None:
                total = torch.zeros(*shape, tokens.shape[-1], device=tokens.device)
                weight, weights = weight.to(tokens.device), weights.to(tokens.device)
            for one in tokens:
                r, c = int(row[done]) * step, int(col[done]) * step
                total[r : r + side, c : c + side].addcmul_(one.float(), weight)
                weights[r : r + side, c : c + side] += weight
                done += 1
            summaries.append(summary.float().cpu().numpy())
            forward.fetched(len(tokens))
    return total.div_(weights.clamp_min(1e-12)), np.concatenate(summaries)


def share_of_tiles(
    xy_px: NDArray[np.float64], number: NDArray[np.int64], spec: Any, *, step_px: int
) -> sparse.csr_matrix:
    """Weight (n, n_tiles) of each tile's summary at locations, with the window of tokens, so that it is continuous."""
    per_edge = -(-spec.tile_px // step_px)  # tiles over a location along one edge
    last = np.floor(xy_px / step_px).astype(np.int64)  # (n, 2), (x, y)
    back = np.arange(per_edge)
    tile = last[:, None] - back[None, :, None]  # (n, per_edge, 2)
    weight = tile_weight((xy_px[:, None] - tile * step_px) / spec.tile_px)
    inside = (tile >= 0) & (tile < number.shape[::-1])
    weight = np.where(inside, weight, 0.0)
    tile = np.where(inside, tile, 0)
    both = weight[:, :, None, 1] * weight[:, None, :, 0]  # (n, rows, cols)
    which = number[tile[:, :, None, 1], tile[:, None, :, 0]]
    both = np.where(which >= 0, both, 0.0).reshape(len(xy_px), -1)
    both /= both.sum(1, keepdims=True)
    row = np.repeat(np.arange(len(xy_px)), both.shape[1])
    shape = (len(xy_px), int(number.max()) + 1)
    made = sparse.csr_matrix((both.ravel(), (row, which.clip(0).ravel())), shape=shape, dtype=np.float32)
    made.eliminate_zeros()
    return made
