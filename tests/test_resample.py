"""Blocks are parts of one resampled image: Pillow's and an exact one as oracles, no dependence on the block."""

import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from histosge._image import LazyImage, blocks
from histosge._image._resample import _compiled, resampled, source_box

properties = settings(max_examples=60, deadline=None)
scales = st.floats(0.15, 6.0, allow_nan=False).filter(lambda s: s != 1)


def noise(height, width, *, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)


def made(image, box, *, scale):
    """A box of the resampled image; ``image`` is large enough on all sides."""
    x0, y0, x1, y1 = source_box(box, scale=scale)
    assert min(x0, y0) >= 0
    assert (y1, x1) <= image.shape[1:]
    return resampled(image[:, y0:y1, x0:x1], box, scale=scale)


def triangle(low, high, n, *, scale):
    """Share (high - low, n) of the source's pixels, by the definition of the filter."""
    centre, reach = (np.arange(low, high) + 0.5) * scale, max(scale, 1.0)
    share = np.clip(1 - np.abs(np.arange(n) + 0.5 - centre[:, None]) / reach, 0, None)
    return share / share.sum(axis=1, keepdims=True)


def near_half(values):
    return np.abs(values - np.floor(values) - 0.5) < 1e-3


@properties
@given(scales, st.integers(1, 90), st.integers(1, 90), st.integers(8, 40), st.integers(8, 40))
def test_known_truth(scale, height, width, left, top):
    """Rounded after rows and after columns. Weights are whole numbers of 2**-22, which matters within 1e-3 of a half."""
    box = (left, top, left + width, top + height)
    (_, _, far_x, far_y), reach = source_box(box, scale=scale), int(max(scale, 1)) + 1
    image = noise(far_y + reach, far_x + reach)
    rows = triangle(left, left + width, image.shape[2], scale=scale)
    columns = triangle(top, top + height, image.shape[1], scale=scale)
    across = np.einsum("cyx,jx->cyj", image, rows)
    down = np.einsum("cyj,iy->cij", np.floor(across + 0.5), columns)
    found = made(image, box, scale=scale)
    assert np.abs(found - down).max() <= 1.501
    sure = ~near_half(down) & (np.einsum("cyj,iy->cij", near_half(across), columns > 0) == 0)
    assert sure.any() or width * height < 100
    assert (found == np.floor(down + 0.5))[sure].all()


@pytest.mark.parametrize("scale", [0.25, 0.5, 0.75, 1.25, 2.0, 3.5])
def test_as_pillow(scale):
    """Pillow holds boxes in 32 bits: these scales are exact in them, others are not."""
    image, bilinear = noise(240, 320), PILImage.Resampling.BILINEAR
    width, height = int(320 / scale) // 4 * 4, int(240 / scale) // 4 * 4
    margin = 6  # Pillow ends its filter at the border
    ours = made(image, (margin, margin, width - margin, height - margin), scale=scale)
    for plane, found in zip(image, ours, strict=True):
        wide = PILImage.fromarray(plane).resize((width, 240), bilinear, box=(0, 0, width * scale, 240))
        whole = np.asarray(wide.resize((width, height), bilinear, box=(0, 0, width, height * scale)))
        difference = np.abs(whole[margin:-margin, margin:-margin] - found.astype(int))
        assert difference.max() <= 1  # where a weight is on the border of two whole numbers
        assert (difference > 0).mean() < 1e-3


@properties
@given(scales, st.integers(0, 99))
def test_a_pixel_does_not_depend_on_its_block(scale, seed):
    """Not one grey level, wherever a block begins and ends."""
    rng = np.random.default_rng(seed)
    whole_box = (10, 10, *(10 + rng.integers(20, 400, 2)).tolist())
    _, _, far_x, far_y = source_box(whole_box, scale=scale)
    image = noise(far_y, far_x, seed=seed)
    whole = made(image, whole_box, scale=scale)
    for _ in range(4):
        x0, y0 = (int(rng.integers(10, end)) for end in whole_box[2:])
        x1, y1 = (int(rng.integers(start, end)) + 1 for start, end in zip((x0, y0), whole_box[2:], strict=True))
        part = made(image, (x0, y0, x1, y1), scale=scale)
        assert (part == whole[:, y0 - 10 : y1 - 10, x0 - 10 : x1 - 10]).all()


@properties
@given(scales, st.integers(0, 255))
def test_a_plain_image_stays_as_it_is(scale, value):
    """White stays white: weights sum to one."""
    image = np.full((3, 700, 700), value, np.uint8)
    assert (made(image, (8, 8, 100, 70), scale=scale) == value).all()


def test_far_away_it_is_the_same():
    """A slide of a million pixels: positions are exact there."""
    scale, box, far = 0.75, (400, 800, 500, 850), 4 * 250_000
    near = source_box(box, scale=scale)
    shifted = (box[0] + far, box[1] + far, box[2] + far, box[3] + far)
    assert source_box(shifted, scale=scale) == tuple(side + int(far * scale) for side in near)
    source = noise(near[3] - near[1], near[2] - near[0])
    assert (resampled(source, shifted, scale=scale) == resampled(source, box, scale=scale)).all()


def test_blocks_that_are_not_used_leave_no_thread():
    """The next block is read while one is resampled."""
    found = blocks(LazyImage(noise(100, 1000)), np.array([[50.0, 50.0], [900.0, 50.0]]), scale=0.7, halo_px=4)
    next(found)
    found.close()
    assert not [t for t in threading.enumerate() if t.name == "histosge-prefetch"]


def test_without_a_folder_to_keep_it_a_function_is_compiled_all_the_same():
    """numba finds no place beside a file that does not exist, as in a container that is read-only."""
    scope = {}
    exec(compile("def plus_one(x):\n    return x + 1\n", "<no file>", "exec"), scope)
    assert _compiled(scope["plus_one"])(1) == 2


def test_the_scale_of_the_image_needs_no_compiler():
    code = (
        "import sys, numpy as np; from histosge._image import LazyImage, blocks; "
        "image = LazyImage(np.zeros((3, 40, 40), np.uint8)); "
        "[block] = blocks(image, np.array([[20.0, 20.0]]), scale=1.0, halo_px=4); print('numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
