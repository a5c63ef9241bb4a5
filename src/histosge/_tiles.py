"""Lazy image → blocks → tiles. Each block of the image is read and resampled once, then every tile is cut from it.

Nothing here knows of torch or of SpatialData: an image is anything that can be sliced as ``(channel, y, x)``.
"""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

if TYPE_CHECKING:
    from collections.abc import Iterator

UInt8 = NDArray[np.uint8]
T = TypeVar("T")

_WHITE = 255


@dataclass(frozen=True)
class LazyImage:
    """An RGB image on disk or in memory, read by regions as uint8."""

    data: Any
    """Sliceable, shape (3 or 4, height, width): a dask, zarr or numpy array."""
    white: float = 255.0
    """The value of a white pixel: 255 for uint8, 65535 for uint16, 1 for most floats."""

    @property
    def height_px(self) -> int:
        return int(self.data.shape[1])

    @property
    def width_px(self) -> int:
        return int(self.data.shape[2])

    def read(self, x0: int, y0: int, x1: int, y1: int) -> UInt8:
        """Read ``[y0, y1) x [x0, x1)`` as (height, width, 3) uint8; what lies outside the image is white."""
        left, top = max(x0, 0), max(y0, 0)
        right, bottom = min(x1, self.width_px), min(y1, self.height_px)
        if right <= left or bottom <= top:
            return np.full((y1 - y0, x1 - x0, 3), _WHITE, np.uint8)
        inside = self._to_rgb8(np.asarray(self.data[:, top:bottom, left:right]))
        if inside.shape[:2] == (y1 - y0, x1 - x0):
            return inside
        out = np.full((y1 - y0, x1 - x0, 3), _WHITE, np.uint8)
        out[top - y0 : bottom - y0, left - x0 : right - x0] = inside
        return out

    def _to_rgb8(self, part: NDArray[Any]) -> UInt8:
        rgb = np.moveaxis(part, 0, -1)  # (h, w, 3 or 4)
        if rgb.dtype == np.uint8 and self.white == 255 and rgb.shape[-1] == 3:
            return np.ascontiguousarray(rgb)
        value = rgb.astype(np.float32) * np.float32(255.0 / self.white)
        if value.shape[-1] == 4:  # what shines through is the white of the slide
            alpha = value[..., 3:] / 255.0
            value = value[..., :3] * alpha + _WHITE * (1 - alpha)
        return np.clip(np.rint(value), 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Block:
    """A part of the image at the encoder's scale and the places that lie in it."""

    pixels: UInt8
    """(height, width, 3)"""
    rows: NDArray[np.int64]
    """(m,) which places these are."""
    xy_px: NDArray[np.float64]
    """(m, 2) where they lie in ``pixels``."""
    origin_px: tuple[int, int] = (0, 0)
    """Where ``pixels`` begin in the whole resampled image, (x, y)"""


def settle(scale: float) -> float:
    """Leave an image as it is where its scale is right to half a percent: no mpp is known better."""
    return 1.0 if abs(scale - 1) < 0.005 else scale


def blocks(
    image: LazyImage,
    xy_px: NDArray[np.float64],
    *,
    scale: float,
    halo_px: int,
    block_px: int = 1024,
    align_px: int = 1,
) -> Iterator[Block]:
    """Read the image block by block, resampled, with the places of each block.

    All positions refer to one resampled image whose pixel ``j`` covers ``[j * scale, (j + 1) * scale)`` of the
    source, so that a place sees the same pixels whichever block it falls into.

    Parameters
    ----------
    image
        The image.
    xy_px
        (n, 2), places in pixels of the image.
    scale
        Image pixels per pixel of the block: the encoder's mpp over the image's.
    halo_px
        Pixels needed around a place, at the block's scale.
    block_px
        Edge of the blocks that places are grouped by, at the block's scale.
    align_px
        Blocks begin at multiples of this, for encoders that work on a grid of their own.
    """
    scale = settle(scale)
    place = np.asarray(xy_px, float) / scale
    cell = np.floor(place / block_px).astype(np.int64)
    order = np.lexsort((cell[:, 0], cell[:, 1]))
    edges = np.flatnonzero(np.any(np.diff(cell[order], axis=0), axis=1)) + 1
    for rows in np.split(order, edges):
        if len(rows) == 0:
            continue
        x0, y0 = (np.floor(place[rows].min(axis=0)).astype(int) - halo_px).tolist()
        x1, y1 = (np.floor(place[rows].max(axis=0)).astype(int) + halo_px + 1).tolist()
        x0, y0 = x0 - x0 % align_px, y0 - y0 % align_px
        pixels = _read_resampled(image, x0, y0, x1, y1, scale=scale)
        yield Block(pixels, rows, place[rows] - (x0, y0), (x0, y0))


def _read_resampled(image: LazyImage, x0: int, y0: int, x1: int, y1: int, *, scale: float) -> UInt8:
    """Read ``[y0, y1) x [x0, x1)`` of the resampled image."""
    if scale == 1:
        return image.read(x0, y0, x1, y1)
    # the triangle filter of an antialiased shrink reaches `scale` pixels to either side
    margin = int(np.ceil(max(scale, 1))) + 1
    sx0, sy0 = int(np.floor(x0 * scale)) - margin, int(np.floor(y0 * scale)) - margin
    sx1, sy1 = int(np.ceil(x1 * scale)) + margin, int(np.ceil(y1 * scale)) + margin
    source = PILImage.fromarray(image.read(sx0, sy0, sx1, sy1))
    # one direction at a time: Pillow rounds between the two and takes the cheaper one first, so that a pixel would
    # depend on the shape of its block
    bilinear, height = PILImage.Resampling.BILINEAR, sy1 - sy0
    narrow = source.resize((x1 - x0, height), bilinear, box=(x0 * scale - sx0, 0, x1 * scale - sx0, height))
    box = (0, y0 * scale - sy0, x1 - x0, y1 * scale - sy0)
    return np.asarray(narrow.resize((x1 - x0, y1 - y0), bilinear, box=box))


def cut(block: Block, *, tile_px: int) -> UInt8:
    """Cut the tile around each place of a block: (m, tile_px, tile_px, 3)."""
    # halves always round up: rint would round them by the block's own offset
    start = np.floor(block.xy_px - tile_px / 2 + 0.5).astype(np.int64)  # (m, 2), (x, y)
    windows = np.lib.stride_tricks.sliding_window_view(block.pixels, (tile_px, tile_px), axis=(0, 1))
    # (rows, cols, 3, tile, tile) → only the wanted ones are copied
    return np.moveaxis(windows[start[:, 1], start[:, 0]], 1, -1)


def tile_batches(
    image: LazyImage, xy_px: NDArray[np.float64], *, scale: float, tile_px: int, batch_size: int
) -> Iterator[tuple[UInt8, NDArray[np.int64]]]:
    """Cut a tile around each place, in batches of ``batch_size`` (the last may be smaller).

    Yields
    ------
    tiles
        (b, tile_px, tile_px, 3) uint8.
    rows
        (b,) which places these are.
    """
    tiles: list[UInt8] = []
    rows: list[NDArray[np.int64]] = []
    waiting = 0
    # a block holds some hundred tiles at Visium pitch and 30 MB of pixels
    for block in blocks(image, xy_px, scale=scale, halo_px=tile_px // 2 + 1, block_px=max(2048, 4 * tile_px)):
        for part in range(0, len(block.rows), batch_size):  # a dense block is never cut all at once
            some = slice(part, part + batch_size)
            piece = Block(block.pixels, block.rows[some], block.xy_px[some])
            tiles.append(cut(piece, tile_px=tile_px))
            rows.append(piece.rows)
            waiting += len(piece.rows)
            if waiting >= batch_size:
                all_tiles, all_rows = np.concatenate(tiles), np.concatenate(rows)
                yield all_tiles[:batch_size], all_rows[:batch_size]
                tiles, rows = [all_tiles[batch_size:]], [all_rows[batch_size:]]
                waiting -= batch_size
    if waiting:
        yield np.concatenate(tiles), np.concatenate(rows)


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
        except BaseException as err:  # noqa: BLE001  handed over and raised in the caller's thread
            put((False, err))
            return
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


def thumbnail(image: LazyImage, *, max_px: int) -> tuple[UInt8, int]:
    """Shrink the image by a whole factor to at most ``max_px``, strip by strip: (h, w, 3) and the factor."""
    factor = max(1, -(-max(image.height_px, image.width_px) // max_px))
    strips = []
    step = max(1, 1024 // factor) * factor
    for top in range(0, image.height_px, step):
        bottom = min(top + step, image.height_px)
        strip = PILImage.fromarray(image.read(0, top, image.width_px, bottom))
        strips.append(np.asarray(strip.reduce(factor) if factor > 1 else strip))
    return np.concatenate(strips), factor
