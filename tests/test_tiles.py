"""Tiles of images whose every pixel is known."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from histosge._image import Block, LazyImage, batches, blocks, cut, prefetch, tile_blocks

properties = settings(deadline=None, max_examples=25)


def noise(height, width, *, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (channels, height, width), dtype=np.uint8)


class Counting:
    """An image that is computed when it is read, and remembers what was."""

    def __init__(self, height, width):
        self.shape = (3, height, width)
        self.dtype = np.dtype(np.uint8)
        self.read = []

    def __getitem__(self, key):
        _, rows, cols = key
        y, x = np.arange(self.shape[1])[rows], np.arange(self.shape[2])[cols]
        self.read.append((len(y), len(x)))
        return np.stack([np.broadcast_to(v, (len(y), len(x))) for v in (x % 251, y[:, None] % 241, y[:, None] // 256)])

    def __array__(self, *args, **kwargs):
        msg = "the whole image was read"
        raise AssertionError(msg)


# ------------------------------------------------------------------------------------------------------- blocks


def windows(image, xy, *, scale, block_px, tile_px=6, align_px=1, halo_px=None):
    """The pixels around every place, by blocks: (n, 3, tile, tile)."""
    out = np.zeros((len(xy), 3, tile_px, tile_px), np.uint8)
    seen = np.zeros(len(xy), int)
    halo_px = tile_px // 2 + 1 if halo_px is None else halo_px
    for block in blocks(image, xy, scale=scale, halo_px=halo_px, block_px=block_px, align_px=align_px):
        out[block.rows] = cut(block, tile_px=tile_px)
        seen[block.rows] += 1
    assert (seen == 1).all()  # every place in exactly one block
    return out


def places(n, height, width, *, seed=0):
    return np.random.default_rng(seed).random((n, 2)) * [width, height]


@properties
@given(st.integers(8, 200), st.integers(1, 9), st.integers(0, 99))
def test_a_place_sees_the_same_pixels_in_any_block(block_px, align_px, seed):
    image, xy = LazyImage(noise(120, 150)), places(40, 120, 150, seed=seed)
    one = windows(image, xy, scale=1.0, block_px=10_000)
    assert (windows(image, xy, scale=1.0, block_px=block_px, align_px=align_px) == one).all()


@pytest.mark.parametrize("scale", [0.37, 0.8, 1.7, 3.3])
def test_a_place_sees_the_same_pixels_in_any_block_when_resampled(scale):
    image, xy = LazyImage(noise(120, 150)), places(60, 120, 150)
    one = windows(image, xy, scale=scale, block_px=10_000)
    assert one.std() > 10
    for block_px in (7, 40, 64):
        assert (windows(image, xy, scale=scale, block_px=block_px, align_px=4) == one).all()


@pytest.mark.parametrize(("tile_px", "half"), [(6, 0.5), (5, 0.0)])
def test_a_place_on_half_a_pixel_sees_the_same_pixels_in_any_block(tile_px, half):
    """An odd tile around a whole pixel, or an even one around half a pixel, begins on half a pixel."""
    image, xy = LazyImage(noise(90, 90)), np.stack(np.meshgrid(*[np.arange(5, 85, 3) + half] * 2), -1).reshape(-1, 2)
    one = windows(image, xy, scale=1.0, block_px=10_000, tile_px=tile_px)
    assert (windows(image, xy, scale=1.0, block_px=17, tile_px=tile_px) == one).all()


@pytest.mark.parametrize("scale", [0.41, 0.75, 1.0, 1.3, 2.0, 3.7])
@pytest.mark.parametrize("shift", [0.0, 0.29])
def test_a_ramp_stays_the_same_ramp(scale, shift):
    """Resampling moves nothing: a place has the value of the ramp at that place, within one grey level."""
    height, width = 180, 240
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5  # centres of pixels
    ramp = np.stack(np.broadcast_arrays(x[None], y[:, None], (x[None] + y[:, None]) / 2)).round().astype(np.uint8)
    xy = places(30, height - 80, width - 80, seed=1) + 40 + shift
    for block in blocks(LazyImage(ramp), xy, scale=scale, halo_px=5, block_px=48):
        _, h, w = block.pixels.shape
        # pixel j of the block covers [j, j + 1): its centre, in pixels of the image, from the first place
        at_x = (np.arange(w) + 0.5 - block.xy_px[0, 0]) * scale + xy[block.rows[0], 0]
        at_y = (np.arange(h) + 0.5 - block.xy_px[0, 1]) * scale + xy[block.rows[0], 1]
        expected = np.stack(np.broadcast_arrays(at_x[None], at_y[:, None], (at_x[None] + at_y[:, None]) / 2))
        assert np.abs(block.pixels - expected).max() <= 1.01


def test_positions_in_a_block_are_those_in_the_image():
    image, xy = LazyImage(noise(100, 100)), places(20, 100, 100)
    for block in blocks(image, xy, scale=2.0, halo_px=7, block_px=20, align_px=4):
        offset = xy[block.rows] / 2 - block.xy_px
        assert np.allclose(offset, offset[0])
        assert np.allclose(offset[0] % 4, 0)  # blocks begin on the grid
        far = block.pixels.shape[:0:-1] - block.xy_px
        assert block.xy_px.min() >= 7
        assert far.min() >= 7


def test_half_a_percent_of_scale_is_not_resampled():
    image, xy = LazyImage(noise(60, 60)), np.array([[30.0, 30.0]])
    (exact,) = blocks(image, xy, scale=1.0, halo_px=10)
    (nearly,) = blocks(image, xy, scale=1.004, halo_px=10)
    (other,) = blocks(image, xy, scale=1.006, halo_px=10)
    assert (nearly.pixels == exact.pixels).all()
    assert other.pixels.shape != exact.pixels.shape or (other.pixels != exact.pixels).any()


def test_shrinking_is_antialiased():
    """A checkerboard of single pixels shrinks to grey, not to black or white."""
    board = np.broadcast_to(255 * (np.indices((80, 80)).sum(0) % 2), (3, 80, 80)).astype(np.uint8)
    (block,) = blocks(LazyImage(board), np.array([[40.0, 40.0]]), scale=4.0, halo_px=4)
    assert np.abs(block.pixels.astype(int) - 127).max() <= 4


def test_no_places_no_blocks():
    image = LazyImage(noise(20, 20))
    assert list(blocks(image, np.zeros((0, 2)), scale=1.0, halo_px=4)) == []
    assert list(tile_batches(image, np.zeros((0, 2)), scale=1.0, tile_px=4, batch_size=8)) == []


def test_blocks_are_read_lazily_and_once():
    """A slide of 4 gigapixels with spots in two corners: little more than their surroundings is read."""
    slide = Counting(65_536, 65_536)
    xy = np.vstack([places(50, 900, 900), places(50, 900, 900, seed=1) + 64_000])
    for i, block in enumerate(blocks(LazyImage(slide), xy, scale=1.0, halo_px=96, block_px=1024)):
        assert len(slide.read) == i + 1  # one read a block, when it is asked for
        x, y = np.floor(xy[block.rows[0]]).astype(int)
        col, row = np.floor(block.xy_px[0]).astype(int)
        assert block.pixels[:, row, col].tolist() == [x % 251, y % 241, y // 256]
    assert sum(h * w for h, w in slide.read) < 6 * 1224**2
    assert max(max(side) for side in slide.read) <= 1024 + 2 * 96 + 1


# -------------------------------------------------------------------------------------------------------- tiles


def tile_batches(image, xy, *, scale, tile_px, batch_size):
    return batches(tile_blocks(image, xy, scale=scale, tile_px=tile_px), tile_px=tile_px, batch_size=batch_size)


@pytest.mark.parametrize("tile_px", [4, 5, 16])
def test_a_tile_is_centred_on_its_place(tile_px):
    """A single dark pixel with the place in its middle is the middle of the tile."""
    data = np.full((3, 40, 50), 255, np.uint8)
    data[:, 21, 33] = 0
    xy = np.array([[33.5, 21.5]]) if tile_px % 2 else np.array([[33.4, 21.4]])
    ((tiles, _),) = tile_batches(LazyImage(data), xy, scale=1.0, tile_px=tile_px, batch_size=4)
    row, col = np.argwhere(tiles[0, 0] == 0)[0]
    assert (row, col) == (tile_px // 2, tile_px // 2)


@properties
@given(st.integers(1, 12), st.integers(0, 99), st.sampled_from([0.6, 1.0, 2.4]))
def test_tiles_at_borders_and_beyond_are_white_there(tile_px, seed, scale):
    data = np.zeros((3, 31, 37), np.uint8)
    xy = np.random.default_rng(seed).random((12, 2)) * [77, 71] - 20
    for tiles, rows in tile_batches(LazyImage(data), xy, scale=scale, tile_px=tile_px, batch_size=5):
        for tile, (x, y) in zip(tiles, xy[rows], strict=True):
            half = tile_px * scale / 2
            # area of the tile inside the image, as a share
            inside_x = np.clip(min(x + half, 37) - max(x - half, 0), 0, None) / (2 * half)
            inside_y = np.clip(min(y + half, 31) - max(y - half, 0), 0, None) / (2 * half)
            white = tile.mean() / 255
            assert white == pytest.approx(1 - inside_x * inside_y, abs=2.2 / tile_px)
            if inside_x * inside_y == 0 and min(abs(x), abs(x - 37), abs(y), abs(y - 31)) > half + 2 * scale + 1:
                assert (tile == 255).all()


@properties
@given(st.integers(1, 70), st.integers(1, 17), st.integers(0, 99))
def test_tile_batches_cover_every_place_once(n, batch_size, seed):
    rng = np.random.default_rng(seed)
    xy = rng.random((n, 2)) * [9000, 90]  # several blocks
    image = LazyImage(Counting(90, 9000))
    found = [(t.copy(), rows) for t, rows in tile_batches(image, xy, scale=1.0, tile_px=2, batch_size=batch_size)]
    sizes = [len(rows) for _, rows in found]
    assert sizes == [batch_size] * (n // batch_size) + [n % batch_size] * (n % batch_size > 0)
    assert sorted(np.concatenate([rows for _, rows in found])) == list(range(n))
    for tiles, rows in found:
        assert tiles.shape == (len(rows), 3, 2, 2)
        assert tiles.dtype == np.uint8
        corner = np.rint(xy[rows] - 1).astype(int)
        known = ((corner >= 0) & (corner < [9000, 90])).all(1)  # the others are white there
        assert (tiles[known, 0, 0, 0] == corner[known, 0] % 251).all()
        assert (tiles[known, 1, 0, 0] == corner[known, 1] % 241).all()


def test_a_dense_block_is_not_cut_all_at_once():
    """A thousand bins in one block: only a few batches of tiles are in memory."""
    buffers = []

    def empty(shape):
        buffers.append(np.empty(shape, np.uint8))
        return buffers[-1]

    image, xy = LazyImage(noise(64, 64)), places(1000, 64, 64)
    found = batches(tile_blocks(image, xy, scale=1.0, tile_px=8), tile_px=8, batch_size=32, empty=empty)
    assert sum(len(rows) for _, rows in found) == 1000
    assert sum(len(buffer) for buffer in buffers) <= 4 * 32


def test_a_batch_holds_until_the_next_one_is_asked_for():
    """Buffers are few and used again, but never under the eyes of the one who computes."""
    image, xy = LazyImage(noise(300, 300)), places(700, 300, 300)
    (one,) = blocks(image, xy, scale=1.0, halo_px=5, block_px=10_000)
    expected = np.empty((700, 3, 8, 8), np.uint8)
    expected[one.rows] = cut(one, tile_px=8)
    made = []

    def empty(shape):
        made.append(np.zeros(shape, np.uint8))
        return made[-1]

    found = blocks(image, xy, scale=1.0, halo_px=5, block_px=60)
    for tiles, rows in batches(found, tile_px=8, batch_size=16, empty=empty):
        time.sleep(0.002)  # the other thread works on meanwhile
        assert (tiles == expected[rows]).all()
    assert len(made) == 4


@pytest.mark.parametrize(("scale", "level"), [(1.0, 1), (2.0, 2), (3.0, 2), (4.0, 4), (6.0, 4)])
def test_a_pyramid_is_read_at_the_level_that_is_fine_enough(scale, level):
    """A ramp is a ramp on every level, so that places stay where they are; levels are told apart by the blue."""
    x, y = np.arange(240) + 0.5, np.arange(200) + 0.5

    def ramp(f):
        xs, ys = (v.reshape(-1, f).mean(1) for v in (x, y))
        return np.stack(np.broadcast_arrays(xs[None], ys[:, None], 40.0 * f)).round().astype(np.uint8)

    image = LazyImage(ramp(1), coarser=tuple((ramp(f), float(f)) for f in (2, 4)))
    xy = places(30, 120, 160, seed=1) + 40
    for block in blocks(image, xy, scale=scale, halo_px=5, block_px=48):
        assert (block.pixels[2] == 40 * level).all()
        _, h, w = block.pixels.shape
        at_x = (np.arange(w) + 0.5 - block.xy_px[0, 0]) * scale + xy[block.rows[0], 0]
        at_y = (np.arange(h) + 0.5 - block.xy_px[0, 1]) * scale + xy[block.rows[0], 1]
        inside = np.ix_((at_y > 8) & (at_y < 192), (at_x > 8) & (at_x < 232))
        assert np.abs(block.pixels[0] - at_x[None])[inside].max() <= 1.01
        assert np.abs(block.pixels[1] - at_y[:, None])[inside].max() <= 1.01


def test_prefetch_closes_what_it_reads_ahead():
    """Behind one thread that reads ahead may stand another."""
    inner = prefetch(iter(range(1000)))
    outer = prefetch(i for i in inner)
    assert next(outer) == 0
    outer.close()
    inner.close()
    assert not workers()


def test_cut_takes_the_pixels_themselves():
    pixels = noise(20, 30)
    block = Block(pixels, np.array([5, 2]), np.array([[10.0, 8.0], [20.2, 11.8]]))
    tiles = cut(block, tile_px=6)
    assert (tiles[0] == pixels[:, 5:11, 7:13]).all()
    assert (tiles[1] == pixels[:, 9:15, 17:23]).all()


# ----------------------------------------------------------------------------------------------------- prefetch


def workers():
    return [t for t in threading.enumerate() if t.name == "histosge-prefetch"]


def test_prefetch_keeps_the_order():
    assert list(prefetch(iter(range(100)), depth=3)) == list(range(100))
    assert list(prefetch(iter([]))) == []
    assert list(prefetch(iter([None, 0, False]))) == [None, 0, False]  # nothing is mistaken for the end
    assert not workers()


def test_prefetch_raises_the_error_where_it_belongs():
    def items():
        yield from range(3)
        msg = "the disk is gone"
        raise OSError(msg)

    stream = prefetch(items())
    assert [next(stream) for _ in range(3)] == [0, 1, 2]  # what came before it is not lost
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
    assert not workers()


def test_prefetch_works_ahead_but_not_far():
    made = []

    def items():
        for i in range(50):
            made.append(i)
            yield i

    stream = prefetch(items(), depth=2)
    assert next(stream) == 0
    deadline = time.monotonic() + 120
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    # one was taken, two wait in the queue, one is in the thread's hand
    assert len(made) == 4
    stream.close()


@pytest.mark.parametrize("how", ["close", "error"])
def test_prefetch_stopped_early_leaves_no_thread(how):
    def endless():
        i = 0
        while True:
            yield i
            i += 1

    stream = prefetch(endless())
    assert next(stream) == 0
    assert len(workers()) == 1
    if how == "close":
        stream.close()
    else:
        with pytest.raises(KeyError):
            stream.throw(KeyError("the consumer failed"))
    assert not workers()
