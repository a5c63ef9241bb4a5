"""Places → blocks or tiles → encoder on the device → one embedding per place.

A place is embedded as the centre of a tile or, densely, as the area it stands for: the mean of the tokens under its
footprint, beside the surroundings of its centre. Dense embeddings of a spot and of its bins go together: the spot's
tokens are the mean of its bins' (but for their surroundings).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import sparse

from histosge._coverage import Footprints, Grid, coverage
from histosge._settings import logger, progress_bar, settings
from histosge._tiles import LazyImage, blocks, prefetch, settle, tile_batches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray
    from torch import Tensor

STACKS = ("pilm", "rgb")
"""Maps that can be stacked into one embedding; the third one of the paper, position, every head takes by itself."""
_RGB_WINDOW_UM = 55.0
_TILE_STEP = 0.55
"""Step from tile to tile, in tiles, of dense embeddings: neighbours overlap by the rest."""
DENSE_BLOCK_PX = 4096
"""Edge, at the encoder's scale, of the blocks that tiles are laid over for dense embeddings."""


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Choose where to compute: as asked, else as ``settings.device``, else a GPU if there is one, else the CPU."""
    wanted = device if device is not None else settings.device
    if wanted is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.device(wanted)
    except RuntimeError as err:
        msg = f"device={wanted!r} is not a device torch knows. Use 'cpu', 'cuda', 'cuda:1' or 'mps', or None to choose."
        raise ValueError(msg) from err
    usable = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not usable.get(found.type, False) or (found.index or 0) >= max(torch.cuda.device_count(), 1):
        have = [name for name, there in usable.items() if there]
        msg = (
            f"device={str(wanted)!r} is not available here (usable: {', '.join(have)}; "
            f"{torch.cuda.device_count()} CUDA devices). Pass device={have[-1]!r}, or None to choose."
        )
        raise ValueError(msg)
    return found


def embed(
    image: LazyImage,
    xy_px: NDArray[np.float64],
    *,
    mpp: float,
    encoder: Any,
    footprints: Footprints | None = None,
    tile_um: float | None = None,
    stack: tuple[str, ...] = ("pilm",),
    device: torch.device,
    batch_size: int = 32,
    progress: bool | None = None,
) -> NDArray[np.float32]:
    """Embed places of an image.

    Parameters
    ----------
    image
        The image.
    xy_px
        (n, 2) places in pixels of the image.
    mpp
        µm per pixel of the image.
    encoder
        A tile encoder or a block encoder.
    footprints
        Areas that the places stand for, to embed them densely. ``None`` embeds the tile around each centre.
    tile_um
        Edge of the tile the encoder sees; by default the one it was trained with.
    stack
        Maps to stack: ``"pilm"``, ``"rgb"`` or both.
    device
        Where to compute.
    batch_size
        Tiles per forward pass.
    progress
        Whether to show a progress bar.

    Returns
    -------
    (n, d) float32.
    """
    spec, n = encoder.spec, len(xy_px)
    parts = []
    with progress_bar(desc=f"embedding with {spec.name}", total=n, unit="place", show=progress) as bar:
        if "pilm" in stack:
            out: NDArray[np.float32] | None = None
            encoder = encoder.to(device)
            scale = (spec.mpp if tile_um is None else tile_um / spec.tile_px) / mpp
            run = _WAYS[footprints is not None, hasattr(encoder, "embed_block")]
            where = xy_px if footprints is None else footprints
            for rows, values in run(image, where, encoder=encoder, scale=scale, device=device, batch_size=batch_size):
                out = np.zeros((n, values.shape[1]), np.float32) if out is None else out
                out[rows] = values
                bar.update(len(rows))
            parts.append(np.zeros((0, spec.embed_dim), np.float32) if out is None else out)
        if "rgb" in stack:
            parts.append(_mean_colour(image, xy_px, mpp=mpp))
    joined = np.concatenate(parts, axis=1)
    if not np.isfinite(joined).all():
        msg = (
            f"encoder {spec.name!r} gave {(~np.isfinite(joined)).any(1).sum()} embeddings that are not finite, "
            "so that nothing can be learnt from them. Check its weights, or use another encoder."
        )
        raise RuntimeError(msg)
    return joined


def block_edge_px(encoder: Any, *, mpp: float, tile_um: float | None) -> float:
    """Edge, in pixels of the image, of the blocks that places are embedded by."""
    scale = settle((encoder.spec.mpp if tile_um is None else tile_um / encoder.spec.tile_px) / mpp)
    return (1024 if hasattr(encoder, "embed_block") else DENSE_BLOCK_PX) * scale


def _embed_blocks(image, xy_px, *, encoder, scale, device, batch_size):  # type: ignore[no-untyped-def]
    for block in prefetch(blocks(image, xy_px, scale=scale, halo_px=encoder.halo_px, align_px=encoder.align_px)):
        values = encoder.embed_block(_on_device(block, device), torch.from_numpy(block.xy_px))
        yield block.rows, values.float().cpu().numpy()


def _embed_tiles(image, xy_px, *, encoder, scale, device, batch_size):  # type: ignore[no-untyped-def]
    tile_px = encoder.spec.tile_px
    batches = tile_batches(image, xy_px, scale=scale, tile_px=tile_px, batch_size=batch_size)
    forward = _Forward(encoder, encoder.embed, device=device, batch_size=batch_size)
    for tiles, rows in prefetch(batches):
        yield rows, np.concatenate([values.float().cpu().numpy() for values in forward(tiles)])


def _embed_blocks_densely(image, places, *, encoder, scale, device, batch_size):  # type: ignore[no-untyped-def]
    on_grid = places.scaled(1 / settle(scale))  # in pixels of the encoder
    halo_px = encoder.halo_px + _reach(on_grid)
    token_px = encoder.spec.token_px
    for block in prefetch(blocks(image, places.xy_px, scale=scale, halo_px=halo_px, align_px=encoder.align_px)):
        tokens, around = encoder.embed_block_dense(_on_device(block, device), torch.from_numpy(block.xy_px))
        x0, y0 = block.origin_px
        grid = Grid(x0, y0, token_px, *tokens.shape[:2])
        yield block.rows, _under(on_grid.take(block.rows), grid, tokens, around.float().cpu().numpy())


def _embed_tiles_densely(image, places, *, encoder, scale, device, batch_size):  # type: ignore[no-untyped-def]
    spec = encoder.spec
    on_grid = places.scaled(1 / settle(scale))
    step_px = _step(spec.tile_px // spec.token_px) * spec.token_px
    found = blocks(
        image,
        places.xy_px,
        scale=scale,
        halo_px=spec.tile_px + _reach(on_grid),
        block_px=DENSE_BLOCK_PX,
        align_px=step_px,
    )
    forward = _Forward(encoder, encoder.embed_tokens, device=device, batch_size=batch_size)
    for block in prefetch(found):
        some = on_grid.take(block.rows)
        tiles = _tiles_over(block.pixels.shape[:2], some.bounds() - (*block.origin_px, *block.origin_px), spec, step_px)
        tokens, summary = _token_grid(block.pixels, tiles, spec, step_px=step_px, forward=forward)
        x0, y0 = block.origin_px
        grid = Grid(x0, y0, spec.token_px, *tokens.shape[:2])
        around = _share_of_tiles(block.xy_px, tiles, spec, step_px=step_px) @ summary
        yield block.rows, _under(some, grid, tokens, around)


_WAYS = {  # dense, block encoder
    (False, True): _embed_blocks,
    (False, False): _embed_tiles,
    (True, True): _embed_blocks_densely,
    (True, False): _embed_tiles_densely,
}


def _on_device(block: Any, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(block.pixels.transpose(2, 0, 1))).to(device)  # (3, h, w)


def _reach(places: Footprints) -> int:
    """Farthest that any place reaches from its centre, in whole pixels."""
    bounds = places.bounds()
    return int(np.ceil(max((places.xy_px - bounds[:, :2]).max(), (bounds[:, 2:] - places.xy_px).max())))


def _under(places: Footprints, grid: Grid, tokens: Tensor, around: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean of the tokens (rows, cols, c) under each place, beside its surroundings: (n, c + d)."""
    flat = tokens.reshape(-1, tokens.shape[-1]).float().cpu().numpy()
    share = coverage(places, grid).astype(np.float32)
    return np.concatenate([share @ flat, around], axis=1)


# ------------------------------------------------------------------------------------------- tokens from overlapping tiles


def _step(side: int) -> int:
    """Tokens from one tile to the next, of tiles ``side`` tokens wide."""
    return max(1, round(_TILE_STEP * side))


def _window(u: NDArray[np.floating]) -> NDArray[np.floating]:
    """Weight of what lies at a share ``u`` of a tile's edge (Hann): none at its border, where it lacks context."""
    return np.where((u > 0) & (u < 1), np.sin(np.pi * u) ** 2, 0.0)


def _tiles_over(shape: tuple[int, int], bounds: NDArray[np.float64], spec: Any, step_px: int) -> NDArray[np.int64]:
    """Number of each tile that some place is under, -1 for others: (rows, cols) of tiles that fit into a block."""
    n_rows, n_cols = ((side - spec.tile_px) // step_px + 1 for side in shape)
    low = np.floor((bounds[:, :2] - spec.tile_px) / step_px).astype(np.int64) + 1
    high = np.ceil(bounds[:, 2:] / step_px).astype(np.int64)  # the first tile beyond
    low, high = np.clip(low, 0, [n_cols, n_rows]), np.clip(high, 0, [n_cols, n_rows])
    edges = np.zeros((n_rows + 1, n_cols + 1), np.int64)  # corners of rectangles; their sums fill them
    for sign, x, y in ((1, low, low), (-1, high, low), (-1, low, high), (1, high, high)):
        np.add.at(edges, (y[:, 1], x[:, 0]), sign)
    wanted = edges.cumsum(0).cumsum(1)[:-1, :-1] > 0
    number = np.full(wanted.shape, -1, np.int64)
    number[wanted] = np.arange(wanted.sum())
    return number


def _token_grid(pixels: Any, number: NDArray[np.int64], spec: Any, *, step_px: int, forward: Any) -> tuple[Tensor, Any]:
    """Tokens over a block, where tiles overlap the mean of theirs, and each tile's summary.

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
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (spec.tile_px, spec.tile_px), axis=(0, 1))
    edge = _window((np.arange(side) + 0.5) / side)
    weight = torch.as_tensor(edge[:, None] * edge, dtype=torch.float32)[..., None]  # (side, side, 1)
    shape = [n // spec.token_px for n in pixels.shape[:2]]
    total: Any = None
    weights, summaries = torch.zeros(*shape, 1), []
    done, size = 0, forward.batch_size  # which may be halved on the way
    for start in range(0, len(row), size):
        some = slice(start, start + size)
        tiles = np.moveaxis(windows[row[some] * step_px, col[some] * step_px], 1, -1)  # (b, tile, tile, 3)
        for tokens, summary in forward(tiles):  # (b, side, side, c), (b, d)
            if total is None:
                total = torch.zeros(*shape, tokens.shape[-1], device=tokens.device)
                weight, weights = weight.to(tokens.device), weights.to(tokens.device)
            for one in tokens:
                r, c = int(row[done]) * step, int(col[done]) * step
                total[r : r + side, c : c + side].addcmul_(one.float(), weight)
                weights[r : r + side, c : c + side] += weight
                done += 1
            summaries.append(summary.float().cpu().numpy())
    return total.div_(weights.clamp_min(1e-12)), np.concatenate(summaries)


def _share_of_tiles(
    xy_px: NDArray[np.float64], number: NDArray[np.int64], spec: Any, *, step_px: int
) -> sparse.csr_matrix:
    """Weight (n, n_tiles) of each tile's summary at places; the same window as for tokens, so nothing jumps."""
    per_edge = -(-spec.tile_px // step_px)  # tiles over a place along one edge
    last = np.floor(xy_px / step_px).astype(np.int64)  # (n, 2), (x, y)
    back = np.arange(per_edge)
    tile = last[:, None] - back[None, :, None]  # (n, per_edge, 2)
    weight = _window((xy_px[:, None] - tile * step_px) / spec.tile_px)
    inside = (tile >= 0) & (tile < number.shape[::-1])
    weight = np.where(inside, weight, 0.0)
    tile = np.where(inside, tile, 0)
    both = weight[:, :, None, 1] * weight[:, None, :, 0]  # (n, rows, cols)
    which = number[tile[:, :, None, 1], tile[:, None, :, 0]]
    both = np.where(which >= 0, both, 0.0).reshape(len(xy_px), -1)
    both /= both.sum(1, keepdims=True)
    where = np.repeat(np.arange(len(xy_px)), both.shape[1])
    shape = (len(xy_px), int(number.max()) + 1)
    made = sparse.csr_matrix((both.ravel(), (where, which.clip(0).ravel())), shape=shape, dtype=np.float32)
    made.eliminate_zeros()
    return made


class _Forward:
    """Run tiles through an encoder in batches, halved once if memory runs out."""

    def __init__(self, encoder: Any, call: Callable[[Tensor], Any], *, device: torch.device, batch_size: int) -> None:
        self.encoder, self.call, self.device, self.asked = encoder, call, device, batch_size
        self.batch_size, self.halved = batch_size, False

    def __call__(self, tiles: NDArray[np.uint8]) -> Iterator[Any]:
        """Yield what the encoder says of (b, tile, tile, 3) uint8, batch after batch."""
        start = 0
        while start < len(tiles):
            some = torch.from_numpy(np.ascontiguousarray(tiles[start : start + self.batch_size]))
            try:
                on_device = some.to(self.device, non_blocking=True).permute(0, 3, 1, 2)  # (b, 3, tile, tile) uint8
                values = self.call(on_device)
            except torch.OutOfMemoryError as err:
                if self.halved or self.batch_size == 1:
                    spec = self.encoder.spec
                    msg = (
                        f"{self.device} ran out of memory with {self.batch_size} tiles of {spec.tile_px} px for encoder "
                        f"{spec.name!r}. Pass a smaller batch_size= (it was {self.asked}), "
                        "a smaller encoder, or device='cpu'."
                    )
                    raise RuntimeError(msg) from err
                self.batch_size, self.halved = max(1, len(some) // 2), True
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                logger.warning(
                    "out of memory with batch_size=%d: going on with %d. Pass batch_size= to choose.",
                    self.asked, self.batch_size,
                )  # fmt: skip
                continue
            yield values
            start += len(some)


def _mean_colour(image: LazyImage, xy_px: NDArray[np.float64], *, mpp: float) -> NDArray[np.float32]:
    """Mean red, green and blue (0 to 1) in a window of a spot's size: the paper's RGB map."""
    out = np.zeros((len(xy_px), 3), np.float32)
    side = max(1, round(_RGB_WINDOW_UM / mpp))
    for tiles, rows in prefetch(tile_batches(image, xy_px, scale=1.0, tile_px=side, batch_size=256)):
        out[rows] = tiles.mean(axis=(1, 2), dtype=np.float32) / 255
    return out
