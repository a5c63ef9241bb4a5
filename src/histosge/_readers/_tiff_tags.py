"""What a TIFF states of itself: which of its images is the slide, its axes, channels, bit depth and orientation."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import numpy as np

from histosge._image import ImageError, Samples, order_by_name
from histosge._readers._parts import not_rgb
from histosge._readers._ycbcr import decodes_to_rgb, luma
from histosge._settings import logger

if TYPE_CHECKING:
    from pathlib import Path

    from tifffile import TiffFile, TiffPage, TiffPageSeries

_SAME_SIZE = 0.5
"""Share of the largest area: a level of a pyramid has a quarter, a label or a macro image less."""


def side(series: TiffPageSeries, axis: str) -> int:
    return int(series.shape[series.axes.index(axis)])


def photometric(page: TiffPage) -> str:
    return str(getattr(page.photometric, "name", page.photometric))


def _channel_axis(series: TiffPageSeries) -> str:
    """The axis of channels of an image that has no other axes than height and width; else empty."""
    axis = next((axis for axis in "SC" if axis in series.axes), "")
    fits = axis and sorted(series.axes) == sorted(f"{axis}YX") and side(series, axis) in (3, 4)
    return axis if fits else ""


def slide_number(file: TiffFile, path: Path) -> int:
    """Number of the slide among labels, overviews and masks: the largest image with colours."""
    if file.is_bif or file.is_scn:
        msg = (
            f"{str(path)!r} is a slide of {'Ventana' if file.is_bif else 'Leica'}, in which tiles overlap or have "
            "gaps, and is not read. Convert it to OME-TIFF, as QuPath or Bio-Formats (`bfconvert IN OUT.ome.tif`) does."
        )
        raise ImageError(msg)
    flat = [i for i, series in enumerate(file.series) if {"X", "Y"} <= set(series.axes)]
    if not flat:
        what = f"has axes {file.series[0].axes} of {file.series[0].shape}" if file.series else "holds no image"
        raise not_rgb(path, what)
    coloured = [i for i in flat if _channel_axis(file.series[i])] or flat
    area = {i: side(file.series[i], "X") * side(file.series[i], "Y") for i in coloured}
    largest = max(coloured, key=lambda i: area[i])  # of several, the first
    sizes = {i: f"{side(file.series[i], 'X')} x {side(file.series[i], 'Y')}" for i in coloured}
    candidates = [i for i in coloured if area[i] > _SAME_SIZE * area[largest]]
    if len(candidates) > 1:
        msg = (
            f"{str(path)!r} holds {len(candidates)} images of about one size "
            f"({', '.join(sizes[i] for i in candidates)} px): it is not clear which "
            "is the slide. Export the one that the spots were aligned to, and pass that file."
        )
        raise ImageError(msg)
    if largest:
        logger.info("%s holds %d images: the largest is read, %s px", path, len(file.series), sizes[largest])
    return largest


def axes_of(series: TiffPageSeries, path: Path) -> tuple[int, int, int]:
    channel, page = _channel_axis(series), series.keyframe
    if not channel:
        several = set(series.axes) - set("SCYX")
        more = "several pages, as of planes or times" if several else f"photometric {photometric(page)}"
        raise not_rgb(path, f"has axes {series.axes} of {series.shape} ({more})")
    return tuple(series.axes.index(axis) for axis in f"{channel}YX")  # type: ignore[return-value]


def check_complete(series: TiffPageSeries, path: Path) -> None:
    ends = [
        o + n
        for part in series.pages
        if part is not None
        for o, n in zip(part.dataoffsets, part.databytecounts, strict=True)
    ]
    if max(ends, default=0) > path.stat().st_size:  # otherwise pieces turn out to be missing during the work
        msg = (
            f"{str(path)!r} cannot be read as an image (it has {path.stat().st_size} bytes, and pixels up to byte "
            f"{max(ends)}). Is the file complete? Copy it again, or export it as an RGB TIFF."
        )
        raise ImageError(msg)


def check_colours(series: TiffPageSeries, n_channels: int, path: Path) -> None:
    from tifffile import PHOTOMETRIC

    page = series.keyframe
    plain = {PHOTOMETRIC.RGB, PHOTOMETRIC.YCBCR} | ({PHOTOMETRIC.MINISBLACK} if n_channels == 3 else set())
    if page.photometric not in plain or series.dtype.name not in ("uint8", "uint16", "float16", "float32", "float64"):
        raise not_rgb(path, f"has {n_channels} channels of {photometric(page)}, {series.dtype}")
    if page.photometric != PHOTOMETRIC.YCBCR:
        return
    if page.planarconfig == 2:
        raise not_rgb(path, "has planes of Y, Cb and Cr")
    plain_ycbcr = n_channels == 3 and series.dtype == np.uint8 and not page.is_subsampled
    if not plain_ycbcr and not decodes_to_rgb(page):
        sub = "x".join(map(str, page.subsampling or (2, 2)))
        raise not_rgb(path, f"has YCbCr of {series.dtype}, subsampled by {sub}: without JPEG only uint8 of 1x1 is read")


def samples_of(page: TiffPage, names: list[str], n_channels: int, path: Path) -> tuple[Samples, bool]:
    """Meaning of the channels, and whether the file does not state that they are colours."""
    from tifffile import EXTRASAMPLE, PHOTOMETRIC

    try:
        order = order_by_name(names) if len(names) == n_channels else None
    except ValueError:
        raise not_rgb(path, f"has channels {names}, which are not red, green and blue") from None
    unnamed = order is None and page.photometric == PHOTOMETRIC.MINISBLACK
    where = tuple(order or range(n_channels))
    extra = page.extrasamples[0] if page.extrasamples else None
    named = order is not None and n_channels == 4
    if n_channels == 4 and extra not in (EXTRASAMPLE.ASSOCALPHA, EXTRASAMPLE.UNASSALPHA) and not named:
        logger.info("%s: the fourth channel is left out, since the file does not state that it is opacity", path)
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


def orientation_of(page: TiffPage) -> int:
    tag = page.tags.get(274)
    return int(tag.value) if tag is not None and tag.value in range(1, 9) else 1


def channel_names(file: TiffFile, number: int) -> list[str]:
    """Names of channels from OME-XML, ImageJ or tifffile; empty where there are none."""
    if (pixels := _ome(file, number)) is not None:
        return [_ome_name(child) for child in pixels if child.tag.endswith("}Channel")]
    if file.imagej_metadata:
        return [_label(str(label)) for label in file.imagej_metadata.get("Labels") or []]
    shaped = file.shaped_metadata or ()
    channel = shaped[number].get("Channel") if number < len(shaped) else None
    found = channel.get("Name") if isinstance(channel, dict) else None
    return [str(name) for name in found] if isinstance(found, list) else []


def _ome(file: TiffFile, number: int) -> ET.Element | None:
    """The pixels element of an image in OME-XML."""
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
    of_colour = colour.get((int(code) >> 8) & 0xFFFFFF, "") if code.lstrip("-").isdigit() else ""
    return channel.get("Name") or of_colour


def _label(text: str) -> str:
    """The name in a label of ImageJ, which for unnamed channels is a number and the file: ``c:1/3 - slide.tif``."""
    name = text.strip().removeprefix("c:").partition(" - ")[2] if text.startswith("c:") else text.strip()
    return "" if name.lower().endswith((".tif", ".tiff", ".jpg", ".jpeg", ".png")) else name


def stated_bits(file: TiffFile, number: int) -> dict[str, int]:
    """Bits in use, by the tags and the metadata that state them."""
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
