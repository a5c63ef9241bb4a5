"""Places → blocks or tiles → encoder on the device → one embedding per place.

A place is embedded as the centre of a tile or, densely, as the area it stands for: the mean of the tokens under its
footprint, beside the surroundings of its centre. Dense embeddings of a spot and of its bins go together: the spot's
tokens are the mean of its bins' (but for their surroundings).
"""

from __future__ import annotations

from collections import deque
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from histosge._embedding._block_cache import BlockCache
from histosge._embedding._cache import cache_folder
from histosge._embedding._dense import share_of_tiles, step_tokens, tiles_over, token_grid
from histosge._embedding._device import _buffers, _Forward, _on_device
from histosge._embedding._forecast import Forecast, in_words
from histosge._encoders import BUILT_IN, load_encoder
from histosge._geometry import Footprints, Grid, area_fractions
from histosge._image import LazyImage, batches, blocks, prefetch, snap_scale, tile_batches, tile_blocks
from histosge._settings import logger, progress_bar

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


STACKS = ("pilm", "rgb")
"""Maps that can be stacked into one embedding; the third one of the paper, position, every head takes by itself."""
_RGB_WINDOW_UM = 55.0
_TIMED_PLACES = 20_000
"""Places of a block that the built-in encoder is timed on, at most: a second or two."""
DENSE_BLOCK_PX = 4096
"""Edge, at the encoder's scale, of the blocks that tiles are laid over for dense embeddings."""


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
    report: bool = True,
    forecast: Forecast | None = None,
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
    report
        Whether to say what was in the cache.
    forecast
        Of the run that these places are a part of; by default they are all of it.

    Returns
    -------
    (n, d) float32.
    """
    spec, n = encoder.spec, len(xy_px)
    forecast = Forecast(n) if forecast is None else forecast
    parts = []
    with progress_bar(desc=f"embedding with {spec.name}", total=n, unit="place", show=progress) as bar:
        if "pilm" in stack:
            out: NDArray[np.float32] | None = None
            encoder = encoder.to(device)
            scale = (spec.mpp if tile_um is None else tile_um / spec.tile_px) / mpp
            run = _WAYS[footprints is not None, hasattr(encoder, "embed_block")]
            where = xy_px if footprints is None else footprints
            ledger = BlockCache.open(
                encoder, device, tile_um=float(tile_um or spec.tile_um), on_found=forecast.existing
            )
            say = partial(_say, forecast, image, xy_px, mpp=mpp, spec=spec, footprints=footprints, device=device)
            forward = _Forward(encoder, device=device, batch_size=batch_size, forecast=forecast, say=say)
            for rows, values in run(image, where, scale=scale, forward=forward, ledger=ledger):
                out = np.zeros((n, values.shape[1]), np.float32) if out is None else out
                out[rows] = values
                bar.update(len(rows))
            forecast.pause()
            parts.append(np.zeros((0, spec.embed_dim), np.float32) if out is None else out)
            if ledger.n_found:
                log = logger.info if report else logger.debug
                log("    %d of %d embeddings were in the cache (%s)", ledger.n_found, n, cache_folder())
        if "rgb" in stack:
            parts.append(_mean_colour(image, xy_px, mpp=mpp))
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
    if not np.isfinite(joined).all():
        msg = (
            f"encoder {spec.name!r} gave {(~np.isfinite(joined)).any(1).sum()} embeddings that are not finite, "
            "so that nothing can be learnt from them. Check its weights, or use another encoder."
        )
        raise RuntimeError(msg)
    return joined


def _say(
    forecast: Forecast,
    image: LazyImage,
    xy_px: NDArray[np.float64],
    seconds: float,
    *,
    mpp: float,
    spec: Any,
    footprints: Footprints | None,
    device: torch.device,
) -> None:
    """Say how long the run will take, and how long the built-in encoder would."""
    where = {"cpu": "this processor", "cuda": f"cuda:{device.index or 0}"}.get(device.type, str(device))
    instead = ""
    if forecast.alternative and spec.name != BUILT_IN:
        try:
            per_place = _seconds_per_place(image, xy_px, mpp=mpp, footprints=footprints, device=device)
            instead = f"; encoder={BUILT_IN!r} takes {in_words(per_place * forecast.n_to_compute)}"
        except Exception:  # noqa: BLE001  half a log line must not end the run
            logger.debug("%s could not be timed", BUILT_IN, exc_info=True)
    logger.info(
        "    %s places with %s on %s: %s%s", f"{forecast.n_to_compute:,}", spec.name, where, in_words(seconds), instead
    )


def _seconds_per_place(
    image: LazyImage,
    xy_px: NDArray[np.float64],
    *,
    mpp: float,
    footprints: Footprints | None,
    device: torch.device,
) -> float:
    """Time the built-in encoder on its fullest block; the other blocks take as long, though they hold fewer places."""
    encoder = load_encoder(BUILT_IN)
    cell = np.floor(xy_px / block_edge_px(encoder, mpp=mpp, tile_um=None)).astype(np.int64)
    _, which, sizes = np.unique(cell, axis=0, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(which.ravel() == sizes.argmax())[:_TIMED_PLACES]
    some = None if footprints is None else footprints.take(rows)
    quiet: dict[str, Any] = {"progress": False, "report": False, "forecast": Forecast(0)}
    took = 0.0
    for _ in range(2):  # the first time includes what happens only once
        start = monotonic()
        embed(image, xy_px[rows], mpp=mpp, encoder=encoder, footprints=some, device=device, **quiet)
        took = monotonic() - start
    return took * sizes.max() / len(rows) * len(sizes) / len(xy_px)


def block_edge_px(encoder: Any, *, mpp: float, tile_um: float | None) -> float:
    """Edge, in pixels of the image, of the blocks that places are embedded by."""
    scale = snap_scale((encoder.spec.mpp if tile_um is None else tile_um / encoder.spec.tile_px) / mpp)
    return (1024 if hasattr(encoder, "embed_block") else DENSE_BLOCK_PX) * scale


def _embed_blocks(image, xy_px, *, scale, forward, ledger):  # type: ignore[no-untyped-def]
    encoder, device = forward.encoder, forward.device
    for block in prefetch(blocks(image, xy_px, scale=scale, halo_px=encoder.halo_px, align_px=encoder.align_px)):
        forward.begin()
        values = encoder.embed_block(_on_device(block, device), torch.from_numpy(block.xy_px)).float().cpu().numpy()
        forward.computed(len(block.rows))
        yield block.rows, values


def _embed_tiles(image, xy_px, *, scale, forward, ledger):  # type: ignore[no-untyped-def]
    tile_px, on_gpu = forward.encoder.spec.tile_px, forward.device.type == "cuda"
    todo = ledger.todo(tile_blocks(image, xy_px, scale=scale, tile_px=tile_px), way="tile")
    running: deque[tuple[NDArray[np.int64], list[Tensor]]] = deque()
    for tiles, rows in batches(todo, tile_px=tile_px, batch_size=forward.batch_size, empty=_buffers(pinned=on_gpu)):
        running.append((rows, list(forward(tiles, forward.encoder.embed))))
        # a GPU is handed the next batch before the answer to the last one is asked for
        if len(running) > on_gpu:
            yield from ledger.done(*_fetched(running.popleft(), forward))
        yield from ledger.found()
    for answer in running:
        yield from ledger.done(*_fetched(answer, forward))
    yield from ledger.found()


def _fetched(
    answer: tuple[NDArray[np.int64], list[Tensor]], forward: _Forward
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    rows, values = answer
    on_host = np.concatenate([v.float().cpu().numpy() for v in values])
    forward.fetched(len(rows))
    return rows, on_host


def _embed_blocks_densely(image, places, *, scale, forward, ledger):  # type: ignore[no-untyped-def]
    encoder, device = forward.encoder, forward.device
    on_grid = places.scaled(1 / snap_scale(scale))  # in pixels of the encoder
    halo_px = encoder.halo_px + _reach(on_grid)
    token_px = encoder.spec.token_px
    for block in prefetch(blocks(image, places.xy_px, scale=scale, halo_px=halo_px, align_px=encoder.align_px)):
        forward.begin()
        tokens, around = encoder.embed_block_dense(_on_device(block, device), torch.from_numpy(block.xy_px))
        x0, y0 = block.origin_px
        grid = Grid(x0, y0, token_px, *tokens.shape[:2])
        values = _under(on_grid.take(block.rows), grid, tokens, around.float().cpu().numpy())
        forward.computed(len(block.rows))
        yield block.rows, values


def _embed_tiles_densely(image, places, *, scale, forward, ledger):  # type: ignore[no-untyped-def]
    spec = forward.encoder.spec
    on_grid = places.scaled(1 / snap_scale(scale))
    step_px = step_tokens(spec.tile_px // spec.token_px) * spec.token_px
    found = blocks(
        image,
        places.xy_px,
        scale=scale,
        halo_px=spec.tile_px + _reach(on_grid),
        block_px=DENSE_BLOCK_PX,
        align_px=step_px,
    )
    for block in prefetch(ledger.todo(found, way=f"dense, {step_px} px from tile to tile", areas=on_grid)):
        some = on_grid.take(block.rows)
        tiles = tiles_over(block.pixels.shape[1:], some.bounds() - (*block.origin_px, *block.origin_px), spec, step_px)
        forward.places_per_tile = len(block.rows) / max((tiles >= 0).sum(), 1)
        tokens, summary = token_grid(block, tiles, spec, step_px=step_px, forward=forward)
        x0, y0 = block.origin_px
        grid = Grid(x0, y0, spec.token_px, *tokens.shape[:2])
        around = share_of_tiles(block.xy_px, tiles, spec, step_px=step_px) @ summary
        yield from ledger.done(block.rows, _under(some, grid, tokens, around))
        yield from ledger.found()
    yield from ledger.found()


_WAYS = {  # dense, block encoder
    (False, True): _embed_blocks,
    (False, False): _embed_tiles,
    (True, True): _embed_blocks_densely,
    (True, False): _embed_tiles_densely,
}


def _reach(places: Footprints) -> int:
    """Farthest that any place reaches from its centre, in whole pixels."""
    bounds = places.bounds()
    return int(np.ceil(max((places.xy_px - bounds[:, :2]).max(), (bounds[:, 2:] - places.xy_px).max())))


def _under(places: Footprints, grid: Grid, tokens: Tensor, around: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean of the tokens (rows, cols, c) under each place, beside its surroundings: (n, c + d)."""
    flat = tokens.reshape(-1, tokens.shape[-1]).float().cpu().numpy()
    share = area_fractions(places, grid).astype(np.float32)
    return np.concatenate([share @ flat, around], axis=1)


# -------------------------------------------------------------------------------------------------- kept from run to run


# ------------------------------------------------------------------------------------------------------- on the device


def _mean_colour(image: LazyImage, xy_px: NDArray[np.float64], *, mpp: float) -> NDArray[np.float32]:
    """Mean red, green and blue (0 to 1) in a window of a spot's size: the paper's RGB map."""
    out = np.zeros((len(xy_px), 3), np.float32)
    side = max(1, round(_RGB_WINDOW_UM / mpp))
    for tiles, rows in tile_batches(image, xy_px, scale=1.0, tile_px=side, batch_size=256):
        out[rows] = tiles.mean(axis=(2, 3), dtype=np.float32) / 255
    return out
