"""The lazy image: regions, each chunk read once, resampled blocks and tiles; never torch."""

from __future__ import annotations

from histosge._image._chunks import ChunkReader, thumbnail, underlying_zarr, with_zarrs
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
from histosge._image._lazy import LazyImage, UInt8, computed, snap_scale
from histosge._image._tiles import RESAMPLING, Block, batches, blocks, cut, prefetch, tile_blocks
