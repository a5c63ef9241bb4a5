"""TIFFs as lazy RGB arrays: what a file says of its channels, colours, depth and orientation is taken at its word."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import numpy as np

from histosge._image import (
    ImageError,
    Samples,
    bits,
    largest,
    order_by_name,
    sample,
    seems_fluorescent,
    spread,
    white_value,
)
from histosge._readers._orientation import Turn
from histosge._readers._ycbcr import decodes_to_rgb, is_jpeg_of_ycbcr, luma
from histosge._settings import logger

if TYPE_CHECKING:
    from pathlib import Path

    import dask.array as da
    from tifffile import TiffFile, TiffPage, TiffPageSeries

_CHUNK_PX = 1024
_LARGEST_PIECE = 2**28
"""Bytes. TIFFs compressed in larger pieces are read as a whole, once."""
_SAME_SIZE = 0.5
"""Of the area: a level of a pyramid has a quarter, a label or a macro image less."""


def tiff_size(path: Path) -> tuple[int, int]:
    """Width and height as stored."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        series = file.series[_slide(file, path)]
        return _side(series, "X"), _side(series, "Y")


def tiff_orientation(path: Path) -> int:
    import tifffile

    with tifffile.TiffFile(path) as file:
        return _orientation(file.series[_slide(file, path)].keyframe)


def open_tiff(path: Path, *, oriented: bool) -> da.Array:
    """Open the slide of a TIFF as RGB of 8 bits, (3, y, x), read in pieces when they are asked for."""
    import tifffile
    import zarr

    with tifffile.TiffFile(path) as file:
        number = _slide(file, path)
        series = file.series[number]
        page, shape = series.keyframe, series.shape
        order = _axes(series, path)
        _check_whole(series, path)
        _check_colours(series, shape[order[0]], path)
        jpeg_of_ycbcr = page.photometric == tifffile.PHOTOMETRIC.RGB and is_jpeg_of_ycbcr(page)
        if jpeg_of_ycbcr:
            page.photometric = tifffile.PHOTOMETRIC.YCBCR
        mapped = bool(page.is_memmappable and series.dataoffset is not None)
        stored: Any = zarr.open_array(series.aszarr(level=0), mode="r").chunks
        high, wide = (stored[axis] for axis in order[1:])  # tiles, or strips
        names, said_bits = _names(file, number), _said_bits(file, number)
        turn = Turn(_orientation(page) if oriented else 1)
        raw = _Tiff(
            path=path.resolve(),
            series=number,
            stored=tuple(shape[axis] for axis in order),  # type: ignore[arg-type]
            order=order,
            kind=series.dtype,
            mapped=mapped,
            jpeg_of_ycbcr=jpeg_of_ycbcr,
        )
        samples, unnamed = _samples(page, names, raw.stored[0], path)
        if not mapped and high * wide * raw.stored[0] * series.dtype.itemsize > _LARGEST_PIECE:
            raw = replace(raw, whole=series.asarray(level=0).transpose(order))
    if mapped or raw.whole is not None:
        high, wide = _CHUNK_PX, _CHUNK_PX
    else:
        _ = raw[:, :1, :1]  # a compression that cannot be decoded is found now, and not in the midst of the work
    wide *= max(1, _CHUNK_PX // wide)
    high *= max(1, _CHUNK_PX**2 // (high * wide))
    samples = replace(samples, white=_white(raw, samples, (high, wide), said_bits, path))
    if unnamed and seems_fluorescent(samples.rgb8(sample(raw.lazy((high, wide)), samples.white)[..., None])[..., 0]):
        what = (
            f"has three channels without a colour (photometric {_photometric(page)}) that are dark, as of fluorescence"
        )
        raise _not_rgb(path, what)
    if unnamed:
        logger.info("%s: three channels without names, bright as stained tissue: taken as red, green and blue", path)
    whole = raw.whole
    if whole is not None:
        lazy = _in_memory(whole, samples)
        return _chunked(turn.apply(lazy))
    return replace(raw, samples=samples, turn=turn).lazy(turn.swapped((high, wide)))


def _in_memory(whole: np.ndarray[Any, Any], samples: Samples) -> np.ndarray[Any, Any]:
    out = np.empty((3, *whole.shape[1:]), np.uint8)
    for y in range(0, out.shape[1], _CHUNK_PX):  # strip by strip: copies of it all would not fit
        out[:, y : y + _CHUNK_PX] = samples.rgb8(whole[:, y : y + _CHUNK_PX])
    return out


def _chunked(pixels: np.ndarray[Any, Any]) -> da.Array:
    import dask.array as da

    return da.from_array(pixels, chunks=(-1, _CHUNK_PX, _CHUNK_PX), name=False)


@dataclass(frozen=True, eq=False)
class _Tiff:
    """An image of a TIFF as an array (c, y, x), opened for each piece: it can be pickled and leaves no file open.

    Without ``samples`` it has the channels of the file, as they are.
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
    """Whether pixels lie in the file as they do in memory"""
    jpeg_of_ycbcr: bool
    """Whether JPEGs hold YCbCr though the file calls it RGB"""
    samples: Samples | None = None
    turn: Turn = Turn(1)
    whole: Any = None
    """All pixels, where pieces are too large to be decoded again and again"""
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
            fill = (
                0 if self.samples is None or self.samples.luma else self.samples.white
            )  # tiles left out are background
            array: Any = zarr.open_array(series.aszarr(level=0, fillvalue=fill), mode="r")
            return np.asarray(array[there]).transpose(self.order)


# -- what the file says


def _side(series: TiffPageSeries, axis: str) -> int:
    return int(series.shape[series.axes.index(axis)])


def _photometric(page: TiffPage) -> str:
    return str(getattr(page.photometric, "name", page.photometric))


def _channel_axis(series: TiffPageSeries) -> str:
    """The axis of channels of an image that has nothing else beside height and width."""
    axis = next((axis for axis in "SC" if axis in series.axes), "")
    fits = axis and sorted(series.axes) == sorted(f"{axis}YX") and _side(series, axis) in (3, 4)
    return axis if fits else ""


def _slide(file: TiffFile, path: Path) -> int:
    """Number of the slide among labels, overviews and masks: the largest image with colours."""
    if file.is_bif or file.is_scn:
        msg = (
            f"{str(path)!r} is a slide of {'Ventana' if file.is_bif else 'Leica'}, of which tiles overlap or lie apart, and is not "
            "read. Convert it to OME-TIFF, as QuPath or Bio-Formats (`bfconvert IN OUT.ome.tif`) does."
        )
        raise ImageError(msg)
    flat = [i for i, series in enumerate(file.series) if {"X", "Y"} <= set(series.axes)]
    if not flat:
        what = f"has axes {file.series[0].axes} of {file.series[0].shape}" if file.series else "holds no image"
        raise _not_rgb(path, what)
    coloured = [i for i in flat if _channel_axis(file.series[i])] or flat
    area = {i: _side(file.series[i], "X") * _side(file.series[i], "Y") for i in coloured}
    largest = max(coloured, key=lambda i: area[i])  # of several, the first
    sizes = {i: f"{_side(file.series[i], 'X')} x {_side(file.series[i], 'Y')}" for i in coloured}
    rivals = [i for i in coloured if area[i] > _SAME_SIZE * area[largest]]
    if len(rivals) > 1:
        msg = (
            f"{str(path)!r} holds {len(rivals)} images of about one size ({', '.join(sizes[i] for i in rivals)} px): which is "
            "the slide is not known. Pass the one that the spots lie on, exported to a file of its own."
        )
        raise ImageError(msg)
    if largest:
        logger.info("%s holds %d images: the largest is read, %s px", path, len(file.series), sizes[largest])
    return largest


def _axes(series: TiffPageSeries, path: Path) -> tuple[int, int, int]:
    channel, page = _channel_axis(series), series.keyframe
    if not channel:
        several = set(series.axes) - set("SCYX")
        more = "several pages, as of planes or times" if several else f"photometric {_photometric(page)}"
        raise _not_rgb(path, f"has axes {series.axes} of {series.shape} ({more})")
    return tuple(series.axes.index(axis) for axis in f"{channel}YX")  # type: ignore[return-value]


def _check_whole(series: TiffPageSeries, path: Path) -> None:
    ends = [
        o + n
        for part in series.pages
        if part is not None
        for o, n in zip(part.dataoffsets, part.databytecounts, strict=True)
    ]
    if max(ends, default=0) > path.stat().st_size:  # else pieces would turn out to be missing at any time later
        msg = (
            f"{str(path)!r} cannot be read as an image (it has {path.stat().st_size} bytes, and pixels up to byte {max(ends)}). "
            "Is the file whole? Copy it again, or export it as an RGB TIFF."
        )
        raise ImageError(msg)


def _check_colours(series: TiffPageSeries, n_channels: int, path: Path) -> None:
    from tifffile import PHOTOMETRIC

    page = series.keyframe
    plain = {PHOTOMETRIC.RGB, PHOTOMETRIC.YCBCR} | ({PHOTOMETRIC.MINISBLACK} if n_channels == 3 else set())
    if page.photometric not in plain or series.dtype.name not in ("uint8", "uint16", "float16", "float32", "float64"):
        raise _not_rgb(path, f"has {n_channels} channels of {_photometric(page)}, {series.dtype}")
    if page.photometric != PHOTOMETRIC.YCBCR:
        return
    if page.planarconfig == 2:
        raise _not_rgb(path, "has planes of Y, Cb and Cr")
    plain_ycbcr = n_channels == 3 and series.dtype == np.uint8 and not page.is_subsampled
    if not plain_ycbcr and not decodes_to_rgb(page):
        sub = "x".join(map(str, page.subsampling or (2, 2)))
        raise _not_rgb(
            path, f"has YCbCr of {series.dtype}, subsampled by {sub}: without JPEG only uint8 of 1x1 is read"
        )


def _samples(page: TiffPage, names: list[str], n_channels: int, path: Path) -> tuple[Samples, bool]:
    """Meaning of the channels, and whether the file leaves open that they are colours at all."""
    from tifffile import EXTRASAMPLE, PHOTOMETRIC

    try:
        order = order_by_name(names) if len(names) == n_channels else None
    except ValueError:
        raise _not_rgb(path, f"has channels {names}, which are not red, green and blue") from None
    unnamed = order is None and page.photometric == PHOTOMETRIC.MINISBLACK
    where = tuple(order or range(n_channels))
    extra = page.extrasamples[0] if page.extrasamples else None
    named = order is not None and n_channels == 4
    if n_channels == 4 and extra not in (EXTRASAMPLE.ASSOCALPHA, EXTRASAMPLE.UNASSALPHA) and not named:
        logger.info("%s: the fourth channel, of which the file does not say that it is opacity, is left out", path)
        where = where[:3]
    top = float(np.iinfo(page.dtype).max) if page.dtype is not None and page.dtype.kind == "u" else 1.0
    samples = Samples(
        colours=where[:3],
        alpha=where[3] if len(where) == 4 else None,
        opaque=float(2**page.bitspersample - 1) if top > 1 else 1.0,
        premultiplied=extra == EXTRASAMPLE.ASSOCALPHA,
        luma=luma(page),
    )
    return samples, unnamed


def _orientation(page: TiffPage) -> int:
    tag = page.tags.get(274)
    return int(tag.value) if tag is not None and tag.value in range(1, 9) else 1


def _names(file: TiffFile, number: int) -> list[str]:
    """Names of channels by OME-XML, ImageJ or tifffile; none where there are none."""
    if (pixels := _ome(file, number)) is not None:
        return [_ome_name(child) for child in pixels if child.tag.endswith("}Channel")]
    if file.imagej_metadata:
        return [_label(str(label)) for label in file.imagej_metadata.get("Labels") or []]
    said = file.shaped_metadata or ()
    channel = said[number].get("Channel") if number < len(said) else None
    found = channel.get("Name") if isinstance(channel, dict) else None
    return [str(name) for name in found] if isinstance(found, list) else []


def _ome(file: TiffFile, number: int) -> ET.Element | None:
    """The description of an image in OME-XML."""
    if not file.is_ome or not file.ome_metadata:
        return None
    try:
        root = ET.fromstring(file.ome_metadata)
    except ET.ParseError:
        return None
    found = [
        child for image in root if image.tag.endswith("}Image") for child in image if child.tag.endswith("}Pixels")
    ]
    return found[number] if number < len(found) else None


def _ome_name(channel: ET.Element) -> str:
    """A channel's name, or its colour where that is red, green or blue."""
    colour = {0xFF0000: "red", 0x00FF00: "green", 0x0000FF: "blue"}
    code = channel.get("Color", "")
    said = colour.get((int(code) >> 8) & 0xFFFFFF, "") if code.lstrip("-").isdigit() else ""
    return channel.get("Name") or said


def _label(text: str) -> str:
    """ImageJ writes the file's name where a channel has no name, and counts: ``c:1/3 - slide.tif``."""
    name = text.strip().removeprefix("c:").partition(" - ")[2] if text.startswith("c:") else text.strip()
    return "" if name.lower().endswith((".tif", ".tiff", ".jpg", ".jpeg", ".png")) else name


def _said_bits(file: TiffFile, number: int) -> dict[str, int]:
    """Bits in use by the file's own words, of which the type of its values says nothing."""
    page, pixels, found = file.series[number].keyframe, _ome(file, number), {}
    if isinstance(page.bitspersample, int):
        found["BitsPerSample"] = page.bitspersample
    if pixels is not None and pixels.get("SignificantBits", "").isdigit():
        found["SignificantBits"] = int(pixels.get("SignificantBits", ""))
    tag = page.tags.get(281)
    if tag is not None:
        largest = max(tag.value) if isinstance(tag.value, tuple) else tag.value
        found["MaxSampleValue"] = int(largest).bit_length()
    return found


def _white(raw: _Tiff, samples: Samples, chunk_px: tuple[int, int], said: dict[str, int], path: Path) -> float:
    """The value of white: by the file, where it says less than the type of its values holds, else by the largest value."""
    kind, packed = raw.kind, said.get("BitsPerSample", 8)
    if kind == np.uint8:
        return float(2 ** min(packed, 8) - 1)
    lazy = raw.lazy(chunk_px)
    if kind.kind == "u":
        word, fewest = min(said.items(), key=lambda one: one[1], default=("", 16))
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


def _not_rgb(path: Path, what: str) -> ImageError:
    msg = (
        f"{str(path)!r} {what}; an H&E image has red, green and blue, of 8 or 16 bits. Pass the brightfield image, or save "
        "this one as an RGB TIFF of 8 bits, for example in QuPath or ImageJ."
    )
    return ImageError(msg)
