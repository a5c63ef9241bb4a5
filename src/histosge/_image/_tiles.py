"""Blocks of the image → tiles. Each block is read and resampled once, then its tiles are cut from it."""

from __future__ import annotations

import queue
import threading
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from histosge._image._chunks import ChunkReader
from histosge._image._lazy import LazyImage, UInt8, snap_scale

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

T = TypeVar("T")
RESAMPLING = 2
"""Version of the resampling: increased when it gives other pixels. 1 was Pillow, block by block."""
_AHEAD = 2
"""Batches, or blocks, that are made while one is in use."""


@dataclass(frozen=True)
class Block:
    """A part of the image at the encoder's scale, and the positions that lie in it."""

    pixels: UInt8
    """(3, height, width)"""
    rows: NDArray[np.int64]
    """(m,) which positions these are"""
    xy_px: NDArray[np.float64]
    """(m, 2) in ``pixels``"""
    origin_px: tuple[int, int] = (0, 0)
    """Where ``pixels`` begin in the whole resampled image, (x, y)"""


def blocks(
    image: LazyImage,
    xy_px: NDArray[np.float64],
    *,
    scale: float,
    halo_px: int,
    block_px: int = 1024,
    align_px: int = 1,
) -> Iterator[Block]:
    """Read the image block by block, resampled, with the positions of each block.

    All blocks are parts of one resampled image, whose pixel ``j`` covers ``[j * scale, (j + 1) * scale)`` of the
    source: the pixels around a position do not depend on its block. The source is the coarsest pyramid level that is
    fine enough, and each of its chunks is read once.

    Parameters
    ----------
    image
        The image.
    xy_px
        (n, 2), in pixels of the image.
    scale
        Image pixels per pixel of the block: the encoder's mpp over the image's.
    halo_px
        Pixels needed around a position, at the block's scale.
    block_px
        Edge of the blocks that positions are grouped by, at the block's scale.
    align_px
        Blocks begin at multiples of this, for encoders that work on a grid of their own.
    """
    scale = snap_scale(scale)
    xy = np.asarray(xy_px, float) / scale
    image, level_px = image.level(scale)
    scale = snap_scale(scale / level_px)  # from here on relative to the level
    cell = np.floor(xy / block_px).astype(np.int64)
    order = np.lexsort((cell[:, 0], cell[:, 1]))
    edges = np.flatnonzero(np.any(np.diff(cell[order], axis=0), axis=1)) + 1
    groups = [rows for rows in np.split(order, edges) if len(rows)]
    boxes = []
    for rows in groups:
        x0, y0 = (np.floor(xy[rows].min(axis=0)).astype(int) - halo_px).tolist()
        x1, y1 = (np.floor(xy[rows].max(axis=0)).astype(int) + halo_px + 1).tolist()
        boxes.append((x0 - x0 % align_px, y0 - y0 % align_px, x1, y1))
    sources = boxes
    if scale != 1:
        from histosge._image._resample import resampled, source_box  # not above: it imports numba

        sources = [source_box(box, scale=scale) for box in boxes]
    reader = ChunkReader(image, sources)
    read: Iterator[UInt8] = (reader.read(i) for i in range(len(boxes)))
    if scale != 1:
        read = prefetch(read, depth=1)  # one block is resampled while the next is read
    with closing(read):  # type: ignore[type-var]
        for rows, box, source in zip(groups, boxes, read, strict=True):
            pixels = source if scale == 1 else resampled(source, box, scale=scale)
            del source
            yield Block(pixels, rows, xy[rows] - box[:2], box[:2])


def cut(block: Block, *, tile_px: int, out: UInt8 | None = None) -> UInt8:
    """Cut the tile around each position of a block: (m, 3, tile_px, tile_px), into ``out`` where that is given."""
    # halves always round up: rint would round them by the block's own offset
    start = np.floor(block.xy_px - tile_px / 2 + 0.5).astype(np.int64)  # (m, 2), (x, y)
    out = np.empty((len(start), 3, tile_px, tile_px), np.uint8) if out is None else out
    # one by one: a fancy index over windows takes two and a half times as long
    for tile, (x, y) in zip(out, start.tolist(), strict=True):
        tile[:] = block.pixels[:, y : y + tile_px, x : x + tile_px]
    return out


def _fresh(shape: tuple[int, ...]) -> UInt8:
    return np.empty(shape, np.uint8)


def batches(
    found: Iterator[Block], *, tile_px: int, batch_size: int, empty: Callable[[tuple[int, ...]], UInt8] = _fresh
) -> Iterator[tuple[UInt8, NDArray[np.int64]]]:
    """Cut a tile around each position of blocks, in batches of ``batch_size`` (the last may be smaller), ahead of time.

    Tiles lie in a few buffers that are reused: new memory costs more than the copy. A batch is valid until the next one
    is requested.

    Parameters
    ----------
    found
        The blocks.
    tile_px
        Edge of a tile.
    batch_size
        Tiles of a batch.
    empty
        Makes a buffer of a shape: pinned memory, for a GPU.

    Yields
    ------
    tiles
        (b, 3, tile_px, tile_px) uint8.
    rows
        (b,) which positions these are.
    """

    def filled() -> Iterator[tuple[UInt8, NDArray[np.int64]]]:
        buffers: list[UInt8] = []
        rows: list[NDArray[np.int64]] = []
        turn, waiting = 0, 0
        try:
            for block in found:
                start = 0
                while start < len(block.rows):
                    if len(buffers) <= turn:
                        buffers.append(empty((batch_size, 3, tile_px, tile_px)))
                    some = slice(start, start + batch_size - waiting)
                    piece = Block(block.pixels, block.rows[some], block.xy_px[some])
                    size = len(piece.rows)
                    cut(piece, tile_px=tile_px, out=buffers[turn][waiting : waiting + size])
                    rows.append(piece.rows)
                    start, waiting = start + size, waiting + size
                    if waiting == batch_size:
                        yield buffers[turn], np.concatenate(rows)
                        rows, waiting = [], 0
                        turn = (turn + 1) % (_AHEAD + 2)  # those ahead, the one in use and the one being filled
            if waiting:
                yield buffers[turn][:waiting], np.concatenate(rows)
        finally:
            # a traceback may keep the caller's frame alive, and with it `found` and its reading thread
            if hasattr(found, "close"):
                found.close()

    return prefetch(filled(), depth=_AHEAD)


def tile_blocks(image: LazyImage, xy_px: NDArray[np.float64], *, scale: float, tile_px: int) -> Iterator[Block]:
    """Read the blocks that tiles are cut from."""
    # a block holds some hundred tiles at Visium pitch and 15 MB of pixels
    found = blocks(image, xy_px, scale=scale, halo_px=tile_px // 2 + 1, block_px=max(2048, 4 * tile_px))
    return prefetch(found, depth=1)


def prefetch(items: Iterator[T], *, depth: int = 2) -> Iterator[T]:
    """Produce ``items`` in a thread, at most ``depth`` ahead, so that reading overlaps with computing."""
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(entry: tuple[bool, Any]) -> bool:
        while not stop.is_set():
            try:
                ready.put(entry, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((True, item)):
                    return
                del item  # otherwise it stays in memory until the next one is made
        except BaseException as err:  # noqa: BLE001  handed over and raised in the caller's thread
            put((False, err))
            return
        finally:
            if hasattr(items, "close"):  # they may come from another thread
                items.close()
        put((False, None))

    thread = threading.Thread(target=work, name="histosge-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            more, item = ready.get()
            if not more:
                if item is not None:
                    raise item
                return
            yield item
    finally:
        stop.set()
        thread.join()
