"""TIFFs as lazy RGB arrays: channels, colours, depth and orientation are as the file states them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from histosge._image import Samples, bits, largest, sample, seems_fluorescent, spread, white_value
from histosge._readers._orientation import Turn
from histosge._readers._parts import not_rgb
from histosge._readers._tiff_tags import (
    axes_of,
    channel_names,
    check_colours,
    check_complete,
    orientation_of,
    photometric,
    samples_of,
    side,
    slide_number,
    stated_bits,
)
from histosge._readers._ycbcr import is_jpeg_of_ycbcr
from histosge._settings import logger

if TYPE_CHECKING:
    from pathlib import Path

    import dask.array as da

_CHUNK_PX = 1024
LARGEST_PIECE = 2**28
"""Bytes. TIFFs compressed in larger pieces are read once, whole."""


def tiff_size(path: Path) -> tuple[int, int]:
    """Width and height as stored."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        series = file.series[slide_number(file, path)]
        return side(series, "X"), side(series, "Y")


def tiff_orientation(path: Path) -> int:
    import tifffile

    with tifffile.TiffFile(path) as file:
        return orientation_of(file.series[slide_number(file, path)].keyframe)


def open_tiff(path: Path, *, oriented: bool, largest_piece: int) -> da.Array:
    """Open the slide of a TIFF as RGB of 8 bits, (3, y, x), read in pieces on demand."""
    import tifffile
    import zarr

    with tifffile.TiffFile(path) as file:
        number = slide_number(file, path)
        series = file.series[number]
        page, shape = series.keyframe, series.shape
        order = axes_of(series, path)
        check_complete(series, path)
        check_colours(series, shape[order[0]], path)
        jpeg_of_ycbcr = page.photometric == tifffile.PHOTOMETRIC.RGB and is_jpeg_of_ycbcr(page)
        if jpeg_of_ycbcr:
            page.photometric = tifffile.PHOTOMETRIC.YCBCR
        mapped = bool(page.is_memmappable and series.dataoffset is not None)
        stored: Any = zarr.open_array(series.aszarr(level=0), mode="r").chunks
        high, wide = (stored[axis] for axis in order[1:])  # tiles, or strips
        names, depths = channel_names(file, number), stated_bits(file, number)
        turn = Turn(orientation_of(page) if oriented else 1)
        raw = _Tiff(
            path=path.resolve(),
            series=number,
            stored=tuple(shape[axis] for axis in order),  # type: ignore[arg-type]
            order=order,
            kind=series.dtype,
            mapped=mapped,
            jpeg_of_ycbcr=jpeg_of_ycbcr,
        )
        samples, unnamed = samples_of(page, names, raw.stored[0], path)
        if not mapped and high * wide * raw.stored[0] * series.dtype.itemsize > largest_piece:
            raw = replace(raw, whole=series.asarray(level=0).transpose(order))
    if mapped or raw.whole is not None:
        high, wide = _CHUNK_PX, _CHUNK_PX
    else:
        _ = raw[:, :1, :1]  # a compression that cannot be decoded is found now, not during the work
    wide *= max(1, _CHUNK_PX // wide)
    high *= max(1, _CHUNK_PX**2 // (high * wide))
    samples = replace(samples, white=_white(raw, samples, (high, wide), depths, path))
    if unnamed and seems_fluorescent(samples.rgb8(sample(raw.lazy((high, wide)), samples.white)[..., None])[..., 0]):
        what = (
            f"has three channels without a colour (photometric {photometric(page)}) that are dark, as of fluorescence"
        )
        raise not_rgb(path, what)
    if unnamed:
        logger.info("%s: three channels without names, bright as stained tissue: taken as red, green and blue", path)
    whole = raw.whole
    if whole is not None:
        lazy = _in_memory(whole, samples)
        return _chunked(turn.apply(lazy))
    return replace(raw, samples=samples, turn=turn).lazy(turn.swapped((high, wide)))


def _in_memory(whole: np.ndarray[Any, Any], samples: Samples) -> np.ndarray[Any, Any]:
    out = np.empty((3, *whole.shape[1:]), np.uint8)
    for y in range(0, out.shape[1], _CHUNK_PX):  # strip by strip: copies of the whole image would not fit
        out[:, y : y + _CHUNK_PX] = samples.rgb8(whole[:, y : y + _CHUNK_PX])
    return out


def _chunked(pixels: np.ndarray[Any, Any]) -> da.Array:
    import dask.array as da

    return da.from_array(pixels, chunks=(-1, _CHUNK_PX, _CHUNK_PX), name=False)


@dataclass(frozen=True, eq=False)
class _Tiff:
    """An image of a TIFF as an array (c, y, x), opened for each piece: it can be pickled and leaves no file open.

    Without ``samples`` it has the channels of the file as they are stored.
    """

    path: Path
    series: int
    stored: tuple[int, int, int]
    """Channels, height and width as stored"""
    order: tuple[int, int, int]
    """Which axes of the file are c, y and x"""
    kind: np.dtype[Any]
    """Type of the values in the file"""
    mapped: bool
    """Whether the file can be mapped into memory"""
    jpeg_of_ycbcr: bool
    """Whether JPEGs hold YCbCr although the file states RGB"""
    samples: Samples | None = None
    turn: Turn = Turn(1)
    whole: Any = None
    """All pixels, where pieces are too large to be decoded more than once"""
    ndim = 3

    @property
    def shape(self) -> tuple[int, int, int]:
        height, width = self.turn.swapped(self.stored[1:])
        return self.stored[0] if self.samples is None else 3, height, width

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.kind if self.samples is None else np.dtype(np.uint8)

    def lazy(self, chunk_px: tuple[int, int]) -> da.Array:
        import dask.array as da

        stat = self.path.stat()
        token = da.core.tokenize(str(self.path), stat.st_mtime_ns, stat.st_size, self.series, self.samples, self.turn)
        height, width = (min(most, n) for most, n in zip(chunk_px, self.shape[1:], strict=True))
        meta = np.empty((0, 0, 0), self.dtype)
        return da.from_array(self, chunks=(self.shape[0], height, width), name=f"tiff-{token}", meta=meta)

    def __getitem__(self, key: tuple[slice, slice, slice]) -> Any:
        rows, columns = self.turn.source(key[1:], self.shape[1:])
        raw = self._read(rows, columns)
        return (raw if self.samples is None else self.turn.apply(self.samples.rgb8(raw)))[key[0]]

    def _read(self, rows: slice, columns: slice) -> Any:
        import tifffile
        import zarr

        if self.whole is not None:
            return self.whole[:, rows, columns]
        key = (slice(None), rows, columns)
        there: Any = tuple(key[self.order.index(axis)] for axis in range(3))
        if self.mapped:
            return np.array(tifffile.memmap(self.path, series=self.series, mode="r")[there].transpose(self.order))
        with tifffile.TiffFile(self.path) as file:
            series = file.series[self.series]
            if self.jpeg_of_ycbcr:
                series.keyframe.photometric = tifffile.PHOTOMETRIC.YCBCR
            # missing tiles are background
            fill = 0 if self.samples is None or self.samples.luma else self.samples.white
            array: Any = zarr.open_array(series.aszarr(level=0, fillvalue=fill), mode="r")
            return np.asarray(array[there]).transpose(self.order)


def _white(raw: _Tiff, samples: Samples, chunk_px: tuple[int, int], depths: dict[str, int], path: Path) -> float:
    """The value of white: from the file, where it states fewer bits than its type has, else from the largest value."""
    kind, packed = raw.kind, depths.get("BitsPerSample", 8)
    if kind == np.uint8:
        return float(2 ** min(packed, 8) - 1)
    lazy = raw.lazy(chunk_px)
    if kind.kind == "u":
        word, fewest = min(depths.items(), key=lambda one: one[1], default=("", 16))
        if 8 <= fewest < 16 and largest(sample(lazy, 2**fewest)[list(samples.colours)]) < 2**fewest:
            logger.info("%s: taken as %d bit, by %s of the file", path, fewest, word)
            return float(2**fewest - 1)
    values = spread(lazy, samples.colours)
    white = white_value(repr(str(path)), kind, values)
    if kind.kind == "u":
        logger.info("%s: taken as %d bit: its largest values are %d", path, bits(white), largest(values))
    else:
        logger.info("%s: %s taken as 0 to %g: its largest values are %.4g", path, kind, white, largest(values))
    return white
