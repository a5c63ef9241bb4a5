"""Locations → blocks or tiles → encoder on the device → one embedding per location.

A location is embedded as the centre of a tile or, densely, as an area: the mean of the tokens under its footprint,
joined with the surroundings of its centre. Dense embeddings of a spot and of its bins are consistent: the tokens of the
spot are the mean of those of its bins (except for the surroundings).
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from histosge._embedding._block_cache import BlockCache
from histosge._embedding._cache import cache_folder
from histosge._embedding._dense import share_of_tiles, step_tokens, tiles_over, token_grid
from histosge._embedding._device import _buffers, _Forward, _on_device
from histosge._embedding._forecast import Forecast, in_words, name_device
from histosge._encoders import QUICK_ENCODER, load_encoder
from histosge._geometry import Footprints, Grid, area_fractions
from histosge._image import LazyImage, batches, blocks, prefetch, snap_scale, tile_blocks
from histosge._settings import logger, progress_bar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    RowsAndValues = tuple[NDArray[np.int64], NDArray[np.float32]]


_TIMED_PLACES = 20_000
"""The built-in encoder is timed on at most so many locations of a block: a second or two."""
DENSE_BLOCK_PX = 4096
"""Edge, at the encoder's scale, of blocks of tiles for dense embeddings."""


def embed(
    image: LazyImage,
    xy_px: NDArray[np.float64],
    *,
    mpp: float,
    encoder: Any,
    encoder_mpp: float | None = None,
    footprints: Footprints | None = None,
    device: torch.device,
    batch_size: int = 32,
    progress: bool | None = None,
    report: bool = True,
    forecast: Forecast | None = None,
) -> NDArray[np.float32]:
    """Embed locations of an image with one encoder.

    Parameters
    ----------
    image
        The image.
    xy_px
        (n, 2) locations in pixels of the image.
    mpp
        µm per pixel of the image.
    encoder
        An encoder of tiles or of whole blocks.
    encoder_mpp
        µm per pixel of its tiles or blocks; by default the scale that it was trained at.
    footprints
        Areas of the locations, to embed them densely. ``None`` embeds the tile around each centre.
    device
        Where to compute.
    batch_size
        Tiles per forward pass.
    progress
        Whether to show a progress bar.
    report
        Whether to log how many embeddings were in the cache.
    forecast
        Forecast of the run, where these locations are only a part of it.

    Returns
    -------
    (n, d) float32.
    """
    spec, n = encoder.spec, len(xy_px)
    encoder_mpp = spec.mpp if encoder_mpp is None else encoder_mpp
    forecast = Forecast(n) if forecast is None else forecast
    encoder = encoder.to(device)
    run = _WAYS[footprints is not None, spec.whole_blocks]
    locations = xy_px if footprints is None else footprints
    cached = BlockCache.open(encoder, device, tile_um=encoder_mpp * spec.tile_px, on_found=forecast.existing)
    report_seconds = partial(
        _log_forecast, forecast, image, xy_px, mpp=mpp, spec=spec, footprints=footprints, device=device
    )
    forward = _Forward(encoder, device=device, batch_size=batch_size, forecast=forecast, report=report_seconds)
    out: NDArray[np.float32] | None = None
    with progress_bar(desc=f"embedding with {spec.name}", total=n, unit="location", show=progress) as bar:
        for rows, values in run(image, locations, scale=encoder_mpp / mpp, forward=forward, cached=cached):
            out = np.zeros((n, values.shape[1]), np.float32) if out is None else out
            out[rows] = values
            bar.update(len(rows))
    forecast.pause()
    if cached.n_found:
        log = logger.info if report else logger.debug
        log("    %d of %d embeddings were in the cache (%s)", cached.n_found, n, cache_folder())
    if out is None:
        return np.zeros((0, spec.embed_dim), np.float32)
    finite = np.isfinite(out).all(axis=1)
    if not finite.all():
        msg = (
            f"encoder {spec.name!r} gave {(~finite).sum()} embeddings that are not finite, "
            "which heads cannot learn from. Check its weights, or use another encoder."
        )
        raise RuntimeError(msg)
    return out


def _log_forecast(
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
    """Log how long the run takes, and how long it takes with the built-in encoder."""
    instead = ""
    if forecast.alternative and spec.name != QUICK_ENCODER:
        try:
            per_location = _seconds_per_location(image, xy_px, mpp=mpp, footprints=footprints, device=device)
            instead = f"; encoder={QUICK_ENCODER!r} takes {in_words(per_location * forecast.n_to_compute)}"
        except Exception:  # noqa: BLE001  an incomplete log line must not end the run
            logger.debug("%s could not be timed", QUICK_ENCODER, exc_info=True)
    n = f"{forecast.n_to_compute:,}"
    logger.info("    %s locations with %s on %s: %s%s", n, spec.name, name_device(device), in_words(seconds), instead)


def _seconds_per_location(
    image: LazyImage,
    xy_px: NDArray[np.float64],
    *,
    mpp: float,
    footprints: Footprints | None,
    device: torch.device,
) -> float:
    """Time the built-in encoder on its fullest block; blocks with fewer locations take as long."""
    encoder = load_encoder(QUICK_ENCODER)
    cell = np.floor(xy_px / block_edge_px(encoder, mpp=mpp, encoder_mpp=encoder.spec.mpp)).astype(np.int64)
    _, which, sizes = np.unique(cell, axis=0, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(which.ravel() == sizes.argmax())[:_TIMED_PLACES]
    some = None if footprints is None else footprints.take(rows)
    none = Forecast(0)
    took = 0.0
    for _ in range(2):  # the first time includes one-time work
        start = none.clock()
        embed(
            image,
            xy_px[rows],
            mpp=mpp,
            encoder=encoder,
            footprints=some,
            device=device,
            progress=False,
            report=False,
            forecast=none,
        )
        took = none.clock() - start
    return took * sizes.max() / len(rows) * len(sizes) / len(xy_px)


def block_edge_px(encoder: Any, *, mpp: float, encoder_mpp: float) -> float:
    """Edge, in pixels of the image, of the blocks in which locations are embedded."""
    return (1024 if encoder.spec.whole_blocks else DENSE_BLOCK_PX) * snap_scale(encoder_mpp / mpp)


def _embed_blocks(
    image: LazyImage, xy_px: NDArray[np.float64], *, scale: float, forward: _Forward, cached: BlockCache
) -> Iterator[RowsAndValues]:
    encoder, device = forward.encoder, forward.device
    for block in prefetch(blocks(image, xy_px, scale=scale, halo_px=encoder.halo_px, align_px=encoder.align_px)):
        forward.begin()
        values = encoder.embed_block(_on_device(block, device), torch.from_numpy(block.xy_px)).float().cpu().numpy()
        forward.computed(len(block.rows))
        yield block.rows, values


def _embed_tiles(
    image: LazyImage, xy_px: NDArray[np.float64], *, scale: float, forward: _Forward, cached: BlockCache
) -> Iterator[RowsAndValues]:
    tile_px, on_gpu = forward.encoder.spec.tile_px, forward.device.type == "cuda"
    todo = cached.todo(tile_blocks(image, xy_px, scale=scale, tile_px=tile_px), way="tile")
    running: deque[tuple[NDArray[np.int64], list[Tensor]]] = deque()
    for tiles, rows in batches(todo, tile_px=tile_px, batch_size=forward.batch_size, empty=_buffers(pinned=on_gpu)):
        running.append((rows, list(forward(tiles, forward.encoder.embed))))
        # send the next batch to a GPU before fetching the embeddings of the last one
        if len(running) > on_gpu:
            yield from cached.done(*_fetched(running.popleft(), forward))
        yield from cached.found()
    for batch in running:
        yield from cached.done(*_fetched(batch, forward))
    yield from cached.found()


def _fetched(batch: tuple[NDArray[np.int64], list[Tensor]], forward: _Forward) -> RowsAndValues:
    rows, values = batch
    on_host = np.concatenate([v.float().cpu().numpy() for v in values])
    forward.fetched(len(rows))
    return rows, on_host


def _embed_blocks_densely(
    image: LazyImage, locations: Footprints, *, scale: float, forward: _Forward, cached: BlockCache
) -> Iterator[RowsAndValues]:
    encoder, device = forward.encoder, forward.device
    on_grid = locations.scaled(1 / snap_scale(scale))  # in pixels of the encoder
    halo_px = encoder.halo_px + _reach(on_grid)
    token_px = encoder.spec.token_px
    for block in prefetch(blocks(image, locations.xy_px, scale=scale, halo_px=halo_px, align_px=encoder.align_px)):
        forward.begin()
        tokens, around = encoder.embed_block_dense(_on_device(block, device), torch.from_numpy(block.xy_px))
        x0, y0 = block.origin_px
        grid = Grid(x0, y0, token_px, *tokens.shape[:2])
        values = _under(on_grid.take(block.rows), grid, tokens, around.float().cpu().numpy())
        forward.computed(len(block.rows))
        yield block.rows, values


def _embed_tiles_densely(
    image: LazyImage, locations: Footprints, *, scale: float, forward: _Forward, cached: BlockCache
) -> Iterator[RowsAndValues]:
    spec = forward.encoder.spec
    on_grid = locations.scaled(1 / snap_scale(scale))
    step_px = step_tokens(spec.tile_px // spec.token_px) * spec.token_px
    found = blocks(
        image,
        locations.xy_px,
        scale=scale,
        halo_px=spec.tile_px + _reach(on_grid),
        block_px=DENSE_BLOCK_PX,
        align_px=step_px,
    )
    for block in prefetch(cached.todo(found, way=f"dense, {step_px} px from tile to tile", areas=on_grid)):
        some = on_grid.take(block.rows)
        tiles = tiles_over(block.pixels.shape[1:], some.bounds() - (*block.origin_px, *block.origin_px), spec, step_px)
        forward.locations_per_tile = len(block.rows) / max((tiles >= 0).sum(), 1)
        tokens, summary = token_grid(block, tiles, spec, step_px=step_px, forward=forward)
        x0, y0 = block.origin_px
        grid = Grid(x0, y0, spec.token_px, *tokens.shape[:2])
        around = share_of_tiles(block.xy_px, tiles, spec, step_px=step_px) @ summary
        yield from cached.done(block.rows, _under(some, grid, tokens, around))
        yield from cached.found()
    yield from cached.found()


_WAYS: dict[tuple[bool, bool], Callable[..., Iterator[RowsAndValues]]] = {  # dense, whole blocks
    (False, True): _embed_blocks,
    (False, False): _embed_tiles,
    (True, True): _embed_blocks_densely,
    (True, False): _embed_tiles_densely,
}


def _reach(locations: Footprints) -> int:
    """Largest distance of any footprint's edge from its centre, in whole pixels; 0 without any."""
    if len(locations) == 0:
        return 0
    bounds = locations.bounds()
    return int(np.ceil(max((locations.xy_px - bounds[:, :2]).max(), (bounds[:, 2:] - locations.xy_px).max())))


def _under(locations: Footprints, grid: Grid, tokens: Tensor, around: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean of the tokens (rows, cols, c) under each footprint, joined with its surroundings: (n, c + d)."""
    flat = tokens.reshape(-1, tokens.shape[-1]).float().cpu().numpy()
    share = area_fractions(locations, grid).astype(np.float32)
    return np.concatenate([share @ flat, around], axis=1)
