"""Boxes of a lazy image, read so that each chunk on disk is decoded once; and its thumbnail."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image as PILImage

from histosge._image._lazy import WHITE, Box, LazyImage, UInt8
from histosge._settings import logger

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class ChunkReader:
    """Reads boxes of an image in a given order, and each chunk on disk once.

    Boxes overlap, since a tile at the border of one reaches into the next. The part of a chunk that later boxes need is
    kept until the last of them is read. With boxes ordered by rows that is a strip of the image.

    Parameters
    ----------
    image
        The image.
    boxes
        All boxes, in the order in which they will be read.
    largest_chunk
        Bytes. Larger chunks are read in pieces: several whole ones would not fit into memory.
    most_kept
        Bytes of chunks that are kept for later boxes; beyond that, chunks are read again.
    """

    def __init__(
        self, image: LazyImage, boxes: Sequence[Box], *, largest_chunk: int = 2**28, most_kept: int = 2**29
    ) -> None:
        self._image = replace(image, data=underlying_zarr(image.data))
        self._boxes = boxes
        self._most_kept = most_kept
        self._edges = _chunk_edges(self._image.data, largest_chunk)
        self._users: dict[tuple[int, int], list[int]] = {}
        self._kept: dict[tuple[int, int], tuple[UInt8, int, int]] = {}  # pixels, and where they begin: x, y
        self._kept_bytes = 0
        for i, box in enumerate(boxes if self._edges is not None else []):
            for chunk in self._chunks(box):
                self._users.setdefault(chunk, []).append(i)

    def read(self, i: int) -> UInt8:
        """Read box ``i``: (3, height, width) uint8."""
        box = self._boxes[i]
        if self._edges is None:
            return self._image.read(*box)
        y_edges, x_edges = self._edges
        chunks = list(self._chunks(box))
        out = self._blank(box)
        for chunk in chunks:
            if chunk in self._kept:
                _paste(out, box, *self._kept[chunk])
        for rows, cols in _rectangles([chunk for chunk in chunks if chunk not in self._kept]):
            x0, y0 = x_edges[cols.start], y_edges[rows.start]
            part = self._image.read(x0, y0, x_edges[cols.stop], y_edges[rows.stop])
            _paste(out, box, part, x0, y0)
            for row in range(rows.start, rows.stop):
                for col in range(cols.start, cols.stop):
                    self._keep((row, col), part, x0, y0, after=i)
        for chunk in chunks:
            if self._users[chunk][-1] <= i and chunk in self._kept:
                self._kept_bytes -= self._kept.pop(chunk)[0].nbytes
        return out

    def _keep(self, chunk: tuple[int, int], part: UInt8, x0: int, y0: int, *, after: int) -> None:
        """Keep the part of a chunk that later boxes need; ``part``, which holds the chunk, begins at ``(x0, y0)``."""
        later = [self._boxes[i] for i in self._users[chunk] if i > after]
        if not later or self._edges is None:
            return
        (y_edges, x_edges), (row, col) = self._edges, chunk
        left = max(x_edges[col], min(box[0] for box in later))
        top = max(y_edges[row], min(box[1] for box in later))
        right = min(x_edges[col + 1], max(box[2] for box in later))
        bottom = min(y_edges[row + 1], max(box[3] for box in later))
        size = 3 * (bottom - top) * (right - left)
        if self._kept_bytes + size <= self._most_kept:
            self._kept[chunk] = part[:, top - y0 : bottom - y0, left - x0 : right - x0].copy(), left, top
            self._kept_bytes += size

    def _blank(self, box: Box) -> UInt8:
        """Pixels of a box, white where it reaches beyond the image."""
        x0, y0, x1, y1 = box
        out = np.empty((3, y1 - y0, x1 - x0), np.uint8)
        if x0 < 0 or y0 < 0 or x1 > self._image.width_px or y1 > self._image.height_px:
            out.fill(WHITE)
        return out

    def _chunks(self, box: Box) -> Iterator[tuple[int, int]]:
        """Chunks (row, col) that a box touches."""
        y_edges, x_edges = self._edges or ([], [])
        x0, y0, x1, y1 = box
        for row in range(max(bisect_right(y_edges, y0) - 1, 0), min(bisect_left(y_edges, y1), len(y_edges) - 1)):
            for col in range(max(bisect_right(x_edges, x0) - 1, 0), min(bisect_left(x_edges, x1), len(x_edges) - 1)):
                yield row, col


def _paste(out: UInt8, box: Box, part: UInt8, x0: int, y0: int) -> None:
    """Copy the pixels of ``part``, which begins at ``(x0, y0)``, that lie in ``box`` to its pixels ``out``."""
    left, top = max(box[0], x0), max(box[1], y0)
    right, bottom = min(box[2], x0 + part.shape[2]), min(box[3], y0 + part.shape[1])
    if left < right and top < bottom:
        inside = part[:, top - y0 : bottom - y0, left - x0 : right - x0]
        out[:, top - box[1] : bottom - box[1], left - box[0] : right - box[0]] = inside


def _rectangles(chunks: Sequence[tuple[int, int]]) -> list[tuple[slice, slice]]:
    """Cover sorted chunks (row, col) by few rectangles: runs along rows, joined with equal runs of the next row."""
    runs: dict[int, list[tuple[int, int]]] = {}
    for row, col in chunks:
        mine = runs.setdefault(row, [])
        if mine and mine[-1][1] == col:
            mine[-1] = (mine[-1][0], col + 1)
        else:
            mine.append((col, col + 1))
    found: list[tuple[slice, slice]] = []
    grown: dict[tuple[int, int], int] = {}  # number of the rectangle of each run
    for row, mine in runs.items():
        for run in mine:
            k = grown.get(run)
            if k is not None and found[k][0].stop == row:
                found[k] = (slice(found[k][0].start, row + 1), found[k][1])
            else:
                grown[run] = len(found)
                found.append((slice(row, row + 1), slice(*run)))
    return found


def _chunk_edges(data: Any, largest_chunk: int) -> tuple[list[int], list[int]] | None:
    """Where chunks begin and end along y and x; ``None`` where reading whole chunks does not pay."""
    chunks = getattr(data, "chunks", None)
    if chunks is None or data.ndim != 3:
        return None
    if isinstance(chunks[0], tuple):  # dask: all sizes
        sizes = [list(sizes) for sizes in chunks]
    else:  # zarr: the size of all but the last, and a shard of chunks is one file
        step = getattr(data, "shards", None) or chunks
        sizes = [[min(k, n - at) for at in range(0, n, k)] for n, k in zip(data.shape, step, strict=True)]
    largest = max(sizes[1], default=0) * max(sizes[2], default=0) * data.shape[0] * data.dtype.itemsize
    if largest > largest_chunk or 0 in data.shape:
        return None
    y_edges, x_edges = (np.cumsum([0, *each]).tolist() for each in sizes[1:])
    return y_edges, x_edges


def underlying_zarr(data: Any) -> Any:
    """Return the zarr array under a dask array that only reads it, or ``data`` itself.

    dask reads one chunk a task, and zarr decodes it in Python. Reading a region at once with ``zarrs`` is several times
    as fast (docs/benchmarks.md).
    """
    import zarr

    layers = getattr(getattr(data, "dask", None), "layers", None)
    if layers is not None and set(layers) == {data.name, f"original-{data.name}"}:  # as dask.array.from_zarr makes it
        (found,) = dict(layers[f"original-{data.name}"]).values()
        if isinstance(found, zarr.Array) and found.shape == data.shape and found.dtype == data.dtype:
            data = found
    return with_zarrs(data) if isinstance(data, zarr.Array) else data


def with_zarrs(array: Any, **config: Any) -> Any:
    """Return a zarr array of a local folder that ``zarrs`` decodes and encodes; others stay as they are.

    Parameters
    ----------
    array
        The array; it is not changed.
    config
        Settings of zarr for the array that is returned, such as ``write_empty_chunks``.
    """
    import zarr

    array = array.with_config(config) if config else array
    if not isinstance(array.store, zarr.storage.LocalStore):
        return array
    try:
        from zarrs import ZarrsCodecPipeline

        fast = array.with_config({})  # a copy
        pipeline = ZarrsCodecPipeline.from_array_metadata_and_store(array_metadata=fast.metadata, store=fast.store)
        # zarr offers a setting of the whole process only: threads that set it at once would leave it set.
        object.__setattr__(fast._async_array, "codec_pipeline", pipeline)
    except Exception as err:  # noqa: BLE001  zarr itself gives the same values, only slower
        logger.debug("zarr arrays are used without zarrs: %s", err)
        return array
    return fast


def thumbnail(image: LazyImage, *, max_px: int) -> tuple[UInt8, int]:
    """Shrink the image by a whole factor to at most ``max_px``, block by block: (h, w, 3) and the factor."""
    factor = max(1, -(-max(image.height_px, image.width_px) // max_px))
    level, per_px = image.level(factor)
    if per_px.is_integer():
        rest = -(-factor // int(per_px))  # shrink the level by a whole factor as well
        image, factor = level, rest * int(per_px)
    else:
        rest = factor
    step = max(1, 2048 // rest) * rest  # whole cells, of one size for all images
    boxes = [
        (x, y, min(x + step, image.width_px), min(y + step, image.height_px))
        for y in range(0, image.height_px, step)
        for x in range(0, image.width_px, step)
    ]
    out = np.empty((-(-image.height_px // rest), -(-image.width_px // rest), 3), np.uint8)
    reader = ChunkReader(image, boxes)
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        part = PILImage.fromarray(np.ascontiguousarray(np.moveaxis(reader.read(i), 0, -1)))
        small = np.asarray(part.reduce(rest) if rest > 1 else part)
        out[y0 // rest : -(-y1 // rest), x0 // rest : -(-x1 // rest)] = small
    return out, factor
