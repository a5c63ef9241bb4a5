"""The lazy image: regions, each chunk read once, resampled blocks and tiles; never torch."""

from __future__ import annotations

from histosge._image._chunks import Regions, behind, thumbnail
from histosge._image._colour import (
    JPEG_LUMA,
    ImageError,
    Samples,
    background,
    bits,
    is_grey,
    is_opacity,
    largest,
    order_by_name,
    sample,
    seems_fluorescent,
    seems_ycbcr,
    spread,
    white_value,
    ycbcr_to_rgb,
)
from histosge._image._lazy import LazyImage, UInt8, settle
from histosge._image._tiles import Block, batches, blocks, cut, prefetch, tile_batches, tile_blocks

__all__ = [
    "JPEG_LUMA",
    "Block",
    "ImageError",
    "LazyImage",
    "Regions",
    "Samples",
    "UInt8",
    "background",
    "batches",
    "behind",
    "bits",
    "blocks",
    "cut",
    "is_grey",
    "is_opacity",
    "largest",
    "order_by_name",
    "prefetch",
    "sample",
    "seems_fluorescent",
    "seems_ycbcr",
    "settle",
    "spread",
    "thumbnail",
    "tile_batches",
    "tile_blocks",
    "white_value",
    "ycbcr_to_rgb",
]
