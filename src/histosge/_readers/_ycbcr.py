"""Which TIFFs hold YCbCr after decoding: by their tags, and by the markers of their JPEGs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from histosge._image import JPEG_LUMA

if TYPE_CHECKING:
    from tifffile import TiffPage

_JPEG = {6, 7, 33007, 34892}
_JPEG2000 = {33003, 33004, 33005, 34712}
_APERIO_YCBCR = 33003
_OWN_COLOURS = {22610, 34934, 34933, 50001, 50002, 52546}
"""JPEG XR, PNG, WebP and JPEG XL, which are decoded to RGB"""


def decodes_to_rgb(page: TiffPage) -> bool:
    """Whether decoders of this compression convert YCbCr themselves."""
    return page.compression in _JPEG | _JPEG2000 | _OWN_COLOURS


def luma(page: TiffPage) -> tuple[float, ...]:
    """Coefficients to convert YCbCr that the decoder does not convert; empty where it gives RGB."""
    from tifffile import PHOTOMETRIC

    states_ycbcr = page.photometric == PHOTOMETRIC.YCBCR
    if page.compression in _JPEG | _OWN_COLOURS:
        return ()
    if page.compression in _JPEG2000:
        ycbcr = states_ycbcr or (page.compression == _APERIO_YCBCR and page.photometric == PHOTOMETRIC.RGB)
        return JPEG_LUMA if ycbcr and _is_untransformed(_first_piece(page)) else ()
    if not states_ycbcr:
        return ()
    shares = _rationals(page, 529) or JPEG_LUMA[:3]
    return (*shares, *(_rationals(page, 532) or JPEG_LUMA[3:]))


def _rationals(page: TiffPage, code: int) -> tuple[float, ...]:
    tag = page.tags.get(code)
    if tag is None:
        return ()
    value = tuple(float(part) for part in tag.value)
    return tuple(a / b for a, b in zip(value[::2], value[1::2], strict=True)) if tag.dtype in (5, 10) else value


def _first_piece(page: TiffPage) -> bytes:
    file = page.parent.filehandle
    for offset, size in zip(page.dataoffsets, page.databytecounts, strict=True):
        if size:
            file.seek(offset)
            return bytes(file.read(min(size, 1 << 16)))
    return b""


def _is_untransformed(stream: bytes) -> bool:
    """Whether a JPEG 2000 codestream has three equally sampled components without a transform, which are not changed.

    The decoder undoes a transform of components, and converts subsampled ones, which are always YCbCr.
    """
    if not stream.startswith(b"\xff\x4f\xff\x51"):
        return False  # a complete JP2 file, which describes its colours
    n = int.from_bytes(stream[40:42], "big")
    steps = {stream[43 + 3 * i : 45 + 3 * i] for i in range(n)}
    style = stream.find(b"\xff\x52", 42 + 3 * n)
    return len(steps) == 1 and style > 0 and stream[style + 8] == 0


def is_jpeg_of_ycbcr(page: TiffPage) -> bool:
    """Whether the first JPEG of a page holds YCbCr: by its marker, or because its colours are subsampled."""
    stream = _first_piece(page) if page.compression in _JPEG else b""
    at, jfif = 2, False
    while at + 4 <= len(stream) and stream[at] == 0xFF:
        marker, size = stream[at + 1], int.from_bytes(stream[at + 2 : at + 4], "big")
        body = stream[at + 4 : at + 2 + size]
        if marker == 0xEE and body.startswith(b"Adobe") and len(body) > 11:
            return body[11] == 1
        jfif |= marker == 0xE0 and body.startswith(b"JFIF")
        if marker in (0xC0, 0xC1, 0xC2):  # start of frame
            return body[5] == 3 and (jfif or len({body[7 + 3 * i] for i in range(3)}) > 1)
        at += 2 + size
    return False
