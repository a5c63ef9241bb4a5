"""What the channels of an image hold: which is which colour, how bright white is, and whether it looks like H&E."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from histosge._image._lazy import computed

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

_COLOURS = {"r": 0, "g": 1, "b": 2, "a": 3, "red": 0, "green": 1, "blue": 2, "alpha": 3}
_UNNAMED = re.compile(r"(channel|ch|c|band|sample|plane|image|none)?[\s_:#.-]*[\d:]*", re.IGNORECASE)
"""Default names of channels: 0, ch1, Channel:0:2"""
_MOST_OVERSHOOT = 2.0
_LEAST_OF_255 = 64.0
"""Largest values of float images: below the first for 0 to 1, interpolation included; above the second for 0 to 255."""
_NEARLY_ALL = 0.999
_SAMPLED = 4
"""Chunks along each side"""
_LARGEST_CHUNK = 2**28
_LEAST_LIT = 0.01
_BLACK, _FAINT, _DARK = 20, 15, 70
"""Grey levels, of 255. Stain absorbs light: where an H&E image is not black, its darkest channel is above the second,
and its brightest above the third, in at least half of the pixels."""
_OPAQUE_OR_NOT = 0.9
_NO_COLOUR = 6


class ImageError(ValueError):
    """An image that cannot be read; the message names it."""


@dataclass(frozen=True)
class Samples:
    """How the channels of a file become red, green and blue of 8 bits."""

    colours: tuple[int, ...] = (0, 1, 2)
    """Which channels are red, green and blue, or Y, Cb and Cr"""
    white: float = 255.0
    """The value of a white pixel"""
    alpha: int | None = None
    """Which channel is the opacity, if any; behind transparent pixels is the white of the slide"""
    opaque: float = 255.0
    """The value of an opaque pixel"""
    premultiplied: bool = False
    """Whether colours were multiplied by the opacity"""
    luma: tuple[float, ...] = ()
    """For YCbCr: shares of red, green and blue in Y, then black and white of Y, Cb and Cr"""

    def rgb8(self, raw: NDArray[Any]) -> NDArray[np.uint8]:
        """Convert (channels, height, width) to (3, height, width)."""
        inside = raw if self.colours == tuple(range(len(raw))) else raw[list(self.colours)]
        if not self.luma and self.alpha is None and self.white == 255 and raw.dtype == np.uint8:
            return inside
        value = ycbcr_to_rgb(inside, self.luma) if self.luma else inside.astype(np.float32)
        value *= np.float32(255.0 / self.white)
        if self.alpha is not None:
            share = np.minimum(raw[self.alpha].astype(np.float32) * np.float32(1 / self.opaque), 1)
            value = (value if self.premultiplied else value * share) + 255 * (1 - share)
        return np.clip(np.rint(value), 0, 255).astype(np.uint8)


JPEG_LUMA = (0.299, 0.587, 0.114, 0.0, 255.0, 128.0, 255.0, 128.0, 255.0)
"""YCbCr as in JPEG files"""


def ycbcr_to_rgb(ycc: NDArray[Any], luma: tuple[float, ...]) -> NDArray[np.float32]:
    """TIFF 6.0, section 21: with coefficients and reference values of the file, which no library accepts."""
    red, green, blue, y0, y1, b0, b1, r0, r1 = luma
    y, cb, cr = ycc.astype(np.float32)
    y = (y - y0) * np.float32(255 / (y1 - y0))
    cb = (cb - b0) * np.float32(127 / (b1 - b0))
    cr = (cr - r0) * np.float32(127 / (r1 - r0))
    r, b = y + np.float32(2 - 2 * red) * cr, y + np.float32(2 - 2 * blue) * cb
    return np.stack([r, (y - np.float32(red) * r - np.float32(blue) * b) / np.float32(green), b])


def order_by_name(names: Iterable[object]) -> list[int] | None:
    """Indices of red, green, blue (and opacity); ``None`` for default names, ``ValueError`` for names of no colour."""
    words = [str(name).strip().lower() for name in names]
    if all(_UNNAMED.fullmatch(word) and word not in _COLOURS for word in words):
        numbers = [int(found[-1]) for word in words if (found := re.findall(r"\d+", word))]
        if len(numbers) in (0, len(words)) and all(a < b for a, b in zip(numbers, numbers[1:], strict=False)):
            return None
    if sorted(_COLOURS.get(word, -1) for word in words) != list(range(len(words))):
        msg = f"{words} are not red, green and blue. Name them r, g and b."
        raise ValueError(msg)
    return [int(i) for i in np.argsort([_COLOURS[word] for word in words])]


def white_value(what: str, dtype: np.dtype[Any], values: NDArray[Any]) -> float:
    """Value of white, from the values alone: the largest, rounded up to a power of two minus one."""
    if dtype.kind != "f":
        return float(2 ** max(8, int(largest(values)).bit_length()) - 1)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if low < 0 or high > 255 or not np.isfinite(values).all() or _MOST_OVERSHOOT < high < _LEAST_OF_255:
        msg = (
            f"{what} has values from {low:.4g} to {high:.4g}; a float image goes from 0 to 1 or from 0 to 255: rescale "
            "it."
        )
        raise ImageError(msg)
    return 1.0 if high <= _MOST_OVERSHOOT else 255.0


def largest(values: NDArray[Any]) -> float:
    """The 99.9th percentile: above it are scale bars, broken pixels and overshoots of resampling."""
    return float(np.quantile(values, _NEARLY_ALL, method="lower"))


def bits(white: float) -> int:
    return int(white + 1).bit_length() - 1


def sample(data: Any, white: float = 255.0) -> NDArray[Any]:
    """Pixels (c, n) of some chunks all over an image (c, y, x): enough to recognise the kind of image.

    Where nearly all of them are black, as around a scan, pixels at regular steps of all chunks.
    """
    chunks = getattr(data, "chunks", None)
    if chunks is None:
        return spread(data, range(len(data)))
    starts = [np.cumsum([0, *sizes]) for sizes in chunks[1:]]
    rows, columns = (np.unique(np.linspace(0, len(sizes) - 1, _SAMPLED).round().astype(int)) for sizes in chunks[1:])
    parts = []
    for row in rows:
        for column in columns:
            high, wide = chunks[1][row], chunks[2][column]
            if high * wide * len(data) * data.dtype.itemsize <= _LARGEST_CHUNK:
                part = computed(data.blocks[:, row, column])  # one chunk, read once
                step = max(1, max(high, wide) // 128)
                part = part[:, ::step, ::step]
            else:
                y, x = starts[0][row] + high // 2, starts[1][column] + wide // 2
                part = computed(data[:, max(y - 128, 0) : y + 128 : 2, max(x - 128, 0) : x + 128 : 2])
            parts.append(part.reshape(len(part), -1))
    seen = np.concatenate(parts, axis=1)
    lit = (seen[:3].max(0) > _BLACK * white / 255).mean()
    return seen if lit > _LEAST_LIT else spread(data, range(len(data))).reshape(len(data), -1)


def seems_fluorescent(rgb: NDArray[np.uint8]) -> bool:
    """Whether pixels (3, n) are light on black and not stain on white.

    Black pixels do not count: they may lie around a scan.
    """
    lit = rgb[:, rgb.max(0) > _BLACK]
    if lit.shape[1] <= _LEAST_LIT * rgb.shape[1]:
        return True
    return bool(np.median(lit.min(0)) < _FAINT or np.median(lit.max(0)) < _DARK)


def background(rgb: NDArray[np.uint8]) -> tuple[int, int, int]:
    """Colour of the brightest tenth of pixels (3, n): in brightfield it is nearly white."""
    light = rgb.sum(axis=0, dtype=int)
    red, green, blue = np.median(rgb[:, light >= np.quantile(light, 0.9)], axis=1).astype(int).tolist()
    return red, green, blue


def seems_ycbcr(colour: tuple[int, int, int]) -> bool:
    """Whether a background is (Y, 128, 128), which is white in Y, Cb and Cr."""
    luma, *chroma = colour
    return luma > 128 + _DARK and all(abs(value - 128) <= _NO_COLOUR for value in chroma)


def is_grey(rgb: NDArray[np.uint8]) -> bool:
    """Whether the channels of pixels (3, n) are equal."""
    return bool(np.ptp(rgb, axis=0).max(initial=0) <= 1)


def is_opacity(values: NDArray[Any], opaque: float) -> bool:
    """Whether a channel without a name is opacity: nearly all pixels are fully opaque or fully transparent."""
    return bool(np.isin(values, (0, opaque)).mean() >= _OPAQUE_OR_NOT)


def spread(data: Any, channels: Sequence[int]) -> NDArray[Any]:
    """Pixels (c, n) of some channels at regular steps over the whole image, which is read once."""
    step = max(1, max(data.shape[1:]) // 1000)
    part = computed(data[:, ::step, ::step])[list(channels)]
    return part.reshape(len(part), -1)
