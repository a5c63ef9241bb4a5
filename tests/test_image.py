"""Images whose every pixel is known, read by regions."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from histosge._image import ChunkReader, LazyImage, thumbnail, underlying_zarr, with_zarrs

properties = settings(deadline=None, max_examples=25)


def noise(height, width, *, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (channels, height, width), dtype=np.uint8)


def padded(image, margin):
    """The image on white, (3, h, w): what any window of it must look like."""
    white = ((0, 0), (margin, margin), (margin, margin))
    return np.pad(image, white, constant_values=255)


class Chunks:
    """An image in memory that says it is chunked, and remembers what was read of it."""

    def __init__(self, data, chunk_px):
        self.data, self.shape, self.dtype, self.ndim = data, data.shape, data.dtype, 3
        self.chunks = (len(data), *chunk_px)
        self.seen = np.zeros(data.shape[1:], int)
        self.n_read = 0

    def __getitem__(self, key):
        self.seen[key[1:]] += 1
        self.n_read += 1
        return self.data[key]


# --------------------------------------------------------------------------------------------------------- read


@properties
@given(st.integers(-9, 30), st.integers(-9, 24), st.integers(1, 40), st.integers(1, 40))
def test_read_is_a_window_of_the_image_on_white(x0, y0, width, height):
    data = noise(17, 23)
    found = LazyImage(data).read(x0, y0, x0 + width, y0 + height)
    expected = padded(data, 60)[:, y0 + 60 : y0 + 60 + height, x0 + 60 : x0 + 60 + width]
    assert found.dtype == np.uint8
    assert (found == expected).all()


def test_white_at_all_four_borders():
    found = LazyImage(np.zeros((3, 4, 6), np.uint8)).read(-1, -2, 7, 5)
    assert found.shape == (3, 7, 8)
    assert (found[:, 2:6, 1:7] == 0).all()
    for border in (found[:, :2], found[:, 6:], found[:, :, :1], found[:, :, 7:]):
        assert (border == 255).all()


def test_size():
    image = LazyImage(np.zeros((3, 4, 6), np.uint8))
    assert (image.height_px, image.width_px) == (4, 6)


def test_rgba_is_laid_on_white():
    data = np.zeros((4, 1, 3), np.uint8)
    data[:3] = np.array([200, 100, 0])[:, None, None]
    data[3] = [255, 0, 128]
    solid, empty, half = LazyImage(data).read(0, 0, 3, 1)[:, 0].T
    assert solid.tolist() == [200, 100, 0]
    assert empty.tolist() == [255, 255, 255]
    assert np.abs(half - np.array([227, 177, 127])).max() <= 1


@pytest.mark.parametrize(("dtype", "white"), [(np.uint16, 65535.0), (np.float32, 1.0), (np.float64, 255.0)])
@pytest.mark.parametrize("channels", [3, 4])
def test_other_dtypes_become_the_same_uint8(dtype, white, channels):
    eight = noise(9, 11, channels=channels)
    other = eight * (white / 255)
    other = np.rint(other).astype(dtype) if dtype == np.uint16 else other.astype(dtype)
    expected, found = LazyImage(eight).read(-2, -2, 13, 11), LazyImage(other, white=white).read(-2, -2, 13, 11)
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected).max() <= (1 if channels == 4 else 0)


def test_values_beyond_white_do_not_wrap_around():
    data = np.array([-0.1, 0.5, 1.2], np.float32).reshape(3, 1, 1)
    assert LazyImage(data, white=1.0).read(0, 0, 1, 1)[:, 0, 0].tolist() == [0, 128, 255]


def test_dask_and_zarr_read_like_numpy(tmp_path):
    data = noise(50, 70)
    stored = zarr.create_array(tmp_path / "image.zarr", data=data, chunks=(3, 16, 16))
    for lazy in (da.from_array(data, chunks=(3, 16, 16)), stored):
        assert (LazyImage(lazy).read(-3, 10, 60, 55) == LazyImage(data).read(-3, 10, 60, 55)).all()


# ------------------------------------------------------------------------------------------------------ regions


def boxes_over(height, width, *, step, halo):
    """Boxes by rows, each reaching ``halo`` into its neighbours and beyond the image."""
    return [
        (x - halo, y - halo, x + step + halo, y + step + halo)
        for y in range(0, height, step)
        for x in range(0, width, step)
    ]


@properties
@given(st.integers(1, 40), st.integers(1, 40), st.integers(5, 40), st.integers(0, 25), st.booleans())
def test_regions_are_windows_and_every_chunk_is_read_once(chunk_h, chunk_w, step, halo, shuffled):
    data = noise(73, 91)
    image = Chunks(data, (chunk_h, chunk_w))
    boxes = boxes_over(73, 91, step=step, halo=halo)
    if shuffled:
        np.random.default_rng(0).shuffle(boxes)
        boxes = [tuple(map(int, box)) for box in boxes]
    regions, white = ChunkReader(LazyImage(image), boxes), padded(data, 100)
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        assert (regions.read(i) == white[:, y0 + 100 : y1 + 100, x0 + 100 : x1 + 100]).all()
    assert (image.seen == 1).all()
    assert not regions._kept  # nothing is held when all is read


def test_boxes_beside_and_beyond_the_image_are_white():
    image = Chunks(noise(40, 40), (16, 16))
    boxes = [(-30, -30, -5, -5), (40, 0, 60, 20), (0, 0, 16, 16), (5, 50, 20, 60)]
    regions = ChunkReader(LazyImage(image), boxes)
    found = [regions.read(i) for i in range(4)]
    assert all((found[i] == 255).all() for i in (0, 1, 3))
    assert (found[2] == image.data[:, :16, :16]).all()
    assert image.seen.sum() == 256  # of all chunks, the one


def test_regions_far_apart_read_only_their_chunks():
    image = Chunks(noise(300, 300), (32, 32))
    regions = ChunkReader(LazyImage(image), [(0, 0, 40, 40), (200, 200, 230, 230)])
    for i in range(2):
        regions.read(i)
    assert image.seen.max() == 1
    assert image.seen.sum() == 64**2 + (256 - 192) ** 2


def test_what_is_kept_is_bounded():
    """Chunks beyond the bound are read twice, and the pixels are the same."""
    data = noise(64, 64)
    boxes = boxes_over(64, 64, step=24, halo=6)
    n_read = []
    for most_kept in (0, 3 * 16 * 16, 2**20):
        image = Chunks(data, (16, 16))
        reader = ChunkReader(LazyImage(image), boxes, most_kept=most_kept)
        for i, (x0, y0, x1, y1) in enumerate(boxes):
            assert (reader.read(i) == padded(data, 80)[:, y0 + 80 : y1 + 80, x0 + 80 : x1 + 80]).all()
        n_read.append(image.seen.sum())
    assert n_read[0] > n_read[1] > n_read[2] == 64**2


def test_chunks_too_large_for_memory_are_read_in_pieces():
    image = Chunks(noise(80, 80), (40, 40))
    regions = ChunkReader(LazyImage(image), [(0, 0, 10, 10)], largest_chunk=3 * 40 * 40 - 1)
    regions.read(0)
    assert image.seen.sum() == 100


def test_other_types_are_converted_once_and_kept_as_rgb():
    data = noise(50, 60, channels=4)
    image = Chunks((data.astype(np.uint16) * 257), (16, 16))
    boxes = boxes_over(50, 60, step=20, halo=4)
    regions = ChunkReader(LazyImage(image, white=65535.0), boxes)
    whole = padded(LazyImage(data).read(0, 0, 60, 50), 30)
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        found = regions.read(i).astype(int)
        assert np.abs(found - whole[:, y0 + 30 : y1 + 30, x0 + 30 : x1 + 30]).max() <= 1
    assert image.seen.max() == 1


@pytest.mark.parametrize("irregular", [False, True])
def test_dask_chunks_are_read_once(irregular):
    data, n_made = noise(60, 70), []

    def made(block_info=None):
        ((_, (y0, y1), (x0, x1)),) = (block_info[None]["array-location"],)
        n_made.append((y0, x0))
        return data[:, y0:y1, x0:x1]

    chunks = ((3,), (10, 25, 25), (40, 30)) if irregular else ((3,), (20,) * 3, (35,) * 2)
    lazy = da.map_blocks(made, chunks=chunks, dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8))
    n_made.clear()
    boxes = boxes_over(60, 70, step=22, halo=5)
    regions = ChunkReader(LazyImage(lazy), boxes)
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        assert (regions.read(i) == padded(data, 40)[:, y0 + 40 : y1 + 40, x0 + 40 : x1 + 40]).all()
    assert len(n_made) == len(set(n_made)) == 6


# ------------------------------------------------------------------------------------------------ what is behind


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("shards", [None, (3, 32, 32)])
def test_the_zarr_array_behind_dask_is_found(tmp_path, zarr_format, shards):
    if zarr_format == 2 and shards:
        pytest.skip("zarr 2 has no shards")
    data = noise(70, 50)
    stored = zarr.create_array(
        tmp_path / "image.zarr", data=data, chunks=(3, 16, 16), shards=shards, zarr_format=zarr_format
    )
    lazy = da.from_zarr(stored)
    found = underlying_zarr(lazy)
    assert isinstance(found, zarr.Array)
    assert (found[:] == data).all()
    boxes = boxes_over(70, 50, step=30, halo=9)
    regions = ChunkReader(LazyImage(lazy), boxes)
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        assert (regions.read(i) == padded(data, 50)[:, y0 + 50 : y1 + 50, x0 + 50 : x1 + 50]).all()


def test_zarrs_decodes(tmp_path):
    """The fast decoder is in use; the array that was given and zarr's own settings are as before."""
    stored = zarr.create_array(tmp_path / "image.zarr", data=noise(40, 40), chunks=(3, 16, 16))
    before = zarr.config.get("codec_pipeline.path")
    assert type(underlying_zarr(stored)._async_array.codec_pipeline).__name__ == "ZarrsCodecPipeline"
    assert zarr.config.get("codec_pipeline.path") == before
    assert type(stored._async_array.codec_pipeline).__name__ != "ZarrsCodecPipeline"


def test_zarrs_encodes(tmp_path):
    data = noise(40, 40)
    stored = zarr.create_array(tmp_path / "image.zarr", data=np.ones_like(data), chunks=(3, 16, 16))
    fast = with_zarrs(stored, write_empty_chunks=True)
    assert type(fast._async_array.codec_pipeline).__name__ == "ZarrsCodecPipeline"
    assert fast._async_array.config.write_empty_chunks
    fast[:] = data
    assert (stored[:] == data).all()


def test_the_setting_of_zarr_is_never_touched(tmp_path, monkeypatch):
    """It is one for all threads: two that set it at once would leave it set for good."""
    stored = zarr.create_array(tmp_path / "image.zarr", data=noise(40, 40), chunks=(3, 16, 16))
    monkeypatch.setattr(zarr.config, "set", lambda *_, **__: pytest.fail("zarr.config.set was called"))
    assert (underlying_zarr(stored)[:] == noise(40, 40)).all()


def test_without_zarrs_zarr_reads_itself(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "zarrs", None)
    data = noise(40, 40)
    stored = zarr.create_array(tmp_path / "image.zarr", data=data, chunks=(3, 16, 16))
    assert (underlying_zarr(stored)[:] == data).all()


def test_what_was_changed_on_the_way_is_not_skipped(tmp_path):
    """A dask array that does anything to what zarr holds is read through dask."""
    data = noise(40, 40)
    stored = zarr.create_array(tmp_path / "image.zarr", data=data, chunks=(3, 16, 16))
    for changed in (da.from_zarr(stored)[::-1], da.from_zarr(stored) + 1, da.from_zarr(stored)[:, 3:]):
        assert underlying_zarr(changed) is changed
        height, width = changed.shape[1:]
        expected = np.asarray(changed)
        assert (ChunkReader(LazyImage(changed), [(0, 0, width, height)]).read(0) == expected).all()


def test_arrays_in_memory_stay_as_they_are():
    data = noise(10, 10)
    assert underlying_zarr(data) is data
    lazy = da.from_array(data, chunks=(3, 5, 5))
    assert underlying_zarr(lazy) is lazy
    held = zarr.create_array(zarr.storage.MemoryStore(), data=data)
    assert underlying_zarr(held) is held


# ------------------------------------------------------------------------------------------------------- levels


def pyramid(height, width, *, factors=(2, 4), seed=0):
    data = noise(height, width, seed=seed)
    levels = tuple((data[:, ::f, ::f].copy(), float(f)) for f in factors)
    return LazyImage(data, coarser=levels)


@pytest.mark.parametrize(
    ("scale", "factor"), [(0.5, 1), (1.0, 1), (1.9, 1), (1.995, 2), (2.0, 2), (3.9, 2), (4.0, 4), (50.0, 4)]
)
def test_the_level_is_the_coarsest_that_is_fine_enough(scale, factor):
    image = pyramid(64, 64)
    level, per_px = image.level(scale)
    assert per_px == factor
    assert level.coarser == ()
    assert level.data.shape == (3, 64 // factor, 64 // factor)


# ---------------------------------------------------------------------------------------------------- thumbnail


@pytest.mark.parametrize(
    ("height", "width", "max_px"), [(400, 600, 100), (4100, 300, 512), (64, 64, 64), (50, 80, 200)]
)
def test_thumbnail_keeps_the_mean(height, width, max_px):
    data = noise(height, width)
    data[0] //= 2
    small, factor = thumbnail(LazyImage(data), max_px=max_px)
    assert factor == max(1, -(-max(height, width) // max_px))
    assert small.shape == (-(-height // factor), -(-width // factor), 3)
    assert max(small.shape) <= max_px
    assert small.mean((0, 1)) == pytest.approx(data.mean((1, 2)), abs=1.0)


def test_thumbnail_is_the_mean_of_each_square():
    """1100 rows at a factor of 7 are read in two strips: no cell mixes them or is moved."""
    data = noise(1106, 70)
    small, factor = thumbnail(LazyImage(data), max_px=158)
    assert factor == 7
    expected = data.reshape(3, 158, 7, 10, 7).mean((2, 4))
    assert np.abs(np.moveaxis(small, -1, 0) - expected).max() <= 0.52


def test_thumbnail_is_read_by_parts():
    slide = Chunks(noise(5000, 4400), (512, 300))
    thumbnail(LazyImage(slide), max_px=500)
    assert slide.n_read >= 9
    assert (slide.seen == 1).all()


@pytest.mark.parametrize(
    ("max_px", "factor", "level"), [(400, 1, 1), (200, 2, 2), (150, 4, 2), (100, 4, 4), (60, 8, 4)]
)
def test_thumbnail_of_a_pyramid_is_made_of_its_levels(max_px, factor, level):
    """Levels are marked by their colour: the finest is black."""
    levels = tuple((np.full((3, 400 // f, 300 // f), 10 * f, np.uint8), float(f)) for f in (2, 4))
    image = LazyImage(np.zeros((3, 400, 300), np.uint8), coarser=levels)
    small, found = thumbnail(image, max_px=max_px)
    assert found == factor
    assert small.shape[:2] == (-(-400 // factor), -(-300 // factor))
    assert (small == (0 if level == 1 else 10 * level)).all()
