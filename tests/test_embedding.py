"""From image and places to embeddings, with encoders that say what they saw."""

from __future__ import annotations

import logging
import threading

import numpy as np
import pytest
import torch
from tests import rounding

from histosge import settings
from histosge._embedding import embed, resolve_device
from histosge._encoders import EncoderSpec, load_encoder
from histosge._encoders.stain_texture import StainTexture
from histosge._geometry import Footprints
from histosge._image import LazyImage

CPU = torch.device("cpu")
TILE = 8


class Sees:
    """A tile encoder that answers with the mean of red and green, and how many tiles it got at once."""

    def __init__(self, *, mpp=1.0, fits=10**9, value=None, name="fake"):
        self.spec = EncoderSpec(name=name, mpp=mpp, tile_px=TILE, embed_dim=3)
        self.fits, self.value, self.batches = fits, value, []

    def to(self, device):
        self.device = torch.device(device)
        return self

    def embed(self, tiles):
        assert tiles.dtype == torch.uint8
        assert tiles.shape[1:] == (3, TILE, TILE)
        self.batches.append(len(tiles))
        if len(tiles) > self.fits:
            msg = "CUDA out of memory. Tried to allocate 20.00 GiB"
            raise torch.OutOfMemoryError(msg)
        mean = tiles.float().mean((2, 3))
        mean[:, 2] = len(tiles)
        return mean if self.value is None else torch.full_like(mean, self.value)


@pytest.fixture
def gradient():
    """Red is x, green is y: (3, 200, 240)."""
    y, x = np.indices((200, 240))
    return LazyImage(np.stack([x, y, 0 * x]).astype(np.uint8))


def places(n, seed=0):
    return np.random.default_rng(seed).random((n, 2)) * [200, 160] + 20


def reading():
    """Threads that read ahead."""
    return [t for t in threading.enumerate() if t.name == "histosge-prefetch"]


# ------------------------------------------------------------------------------------------------------- device


@pytest.fixture
def n_gpus(request, monkeypatch):
    """A machine with so many CUDA devices, and none of Apple's."""
    n = request.param
    cuda, mps = torch.cuda, torch.backends.mps
    for owner, name, found in ((cuda, "is_available", n > 0), (cuda, "device_count", n), (mps, "is_available", False)):
        monkeypatch.setattr(owner, name, lambda found=found: found)
    return n


@pytest.mark.parametrize("n_gpus", [0], indirect=True)
def test_device_without_a_gpu(n_gpus):
    assert resolve_device(None) == CPU
    assert resolve_device("cpu") == CPU
    assert resolve_device(CPU) == CPU
    for wanted in ("cuda", "cuda:1", "mps", "cpu:3", torch.device("cuda")):
        with pytest.raises(ValueError, match=r"not available here \(usable: cpu; 0 CUDA devices\).*device='cpu'"):
            resolve_device(wanted)


@pytest.mark.parametrize("wanted", ["gpu", "", "cuda:x", "tpu9"])
def test_device_that_torch_does_not_know(wanted):
    with pytest.raises(ValueError, match=rf"device='{wanted}' is not a device torch knows\. Use 'cpu', 'cuda'"):
        resolve_device(wanted)


@pytest.mark.parametrize("n_gpus", [2], indirect=True)
def test_device_with_two_gpus(n_gpus):
    assert resolve_device(None) == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match=r"device='cuda:2' is not available here .*2 CUDA devices"):
        resolve_device("cuda:2")
    with settings.override(device="cpu"):
        assert resolve_device(None) == CPU
        assert resolve_device("cuda") == torch.device("cuda")  # the argument wins


# -------------------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_embeddings_come_in_the_order_of_the_places(gradient, scale):
    """The mean of a tile is the place itself: red is x, green is y (a pixel's value is that of its left edge)."""
    xy = places(101)
    values = embed(gradient, xy, mpp=1.0, encoder=Sees(mpp=scale), device=CPU, batch_size=16)
    assert values.dtype == np.float32
    assert values.shape == (101, 3)
    assert np.abs(values[:, :2] - (xy - 0.5)).max() <= 0.5 * scale + 0.6


def test_batches_have_the_size_that_was_asked_for(gradient):
    encoder = Sees()
    embed(gradient, places(70), mpp=1.0, encoder=encoder, device=CPU, batch_size=32)
    assert encoder.batches == [32, 32, 6]


@pytest.mark.parametrize(
    ("mpp", "encoder_mpp", "edge_px"), [(1.0, None, 8), (0.5, None, 16), (1.0, 3.0, 24), (0.5, 2.0, 32)]
)
def test_a_tile_has_its_physical_size(mpp, encoder_mpp, edge_px):
    """A dark square of known size covers a known share of the tile, whatever the scale of the image."""
    data = np.full((3, 100, 100), 255, np.uint8)
    data[:, 48:52, 48:52] = 0
    encoder = Sees(mpp=1.0)
    values = embed(
        LazyImage(data), np.array([[50.0, 50.0]]), mpp=mpp, encoder=encoder, encoder_mpp=encoder_mpp, device=CPU
    )
    assert 255 - values[0, 0] == pytest.approx(255 * 16 / edge_px**2, rel=0.15)


def test_places_of_a_block_encoder_come_in_order():
    """The built-in encoder, on an image whose red falls from left to right."""
    x = np.linspace(250, 5, 300)
    image = LazyImage(np.broadcast_to(x, (3, 250, 300)).astype(np.uint8))
    xy = np.random.default_rng(0).random((40, 2)) * [200, 150] + 50
    values = embed(image, xy, mpp=2.0, encoder=StainTexture(), device=CPU)
    red = StainTexture().names.index("mean_red_56um")
    assert values.shape == (40, 120)
    assert np.abs(values[:, red] * 255 - np.interp(xy[:, 0] - 0.5, np.arange(300), x)).max() < 1.5


def test_no_places(gradient):
    assert embed(gradient, np.zeros((0, 2)), mpp=1.0, encoder=Sees(), device=CPU).shape == (0, 3)


def test_progress_bar_counts_places(gradient, capsys):
    embed(gradient, places(20), mpp=1.0, encoder=Sees(), device=CPU, progress=True)
    assert "embedding with fake" in capsys.readouterr().err
    embed(gradient, places(20), mpp=1.0, encoder=Sees(), device=CPU, progress=False)
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------------------------------- rgb


def test_rgb_is_the_mean_colour_of_a_spot():
    """55 µm around the place, 0 to 1, red green blue; left and right of an edge, and half on each side."""
    data = np.zeros((3, 200, 200), np.uint8)
    data[:, :, :100] = np.array([255, 51, 0])[:, None, None]
    data[:, :, 100:] = np.array([0, 51, 102])[:, None, None]
    xy = np.array([[150.0, 100.0], [50.0, 100.0], [100.0, 60.0], [111.0, 60.0]])
    values = embed(LazyImage(data), xy, mpp=1.25, encoder=load_encoder("rgb"), device=CPU)
    left, right = np.array([1.0, 0.2, 0.0]), np.array([0.0, 0.2, 0.4])
    assert values.shape == (4, 3)
    # a window of 44 px: at 111 it begins at 89, a quarter of it lies left of the edge
    for got, part in zip(values, (0.0, 1.0, 0.5, 0.25), strict=True):
        assert np.allclose(got, part * left + (1 - part) * right, atol=1e-2)


def test_rgb_tokens_are_the_colours_of_squares():
    """Squares of 5 µm on the image's own grid; beside them the window around each place."""
    data = np.random.default_rng(0).integers(0, 256, (3, 200, 240)).astype(np.uint8)
    centres = np.array([[102.5, 97.5], [62.5, 112.5]])  # of squares
    areas = Footprints.squares(centres, edge_px=5.0)
    run = {"mpp": 1.0, "encoder": load_encoder("rgb"), "device": CPU}
    values = embed(LazyImage(data), centres, footprints=areas, **run)
    squares = data.reshape(3, 40, 5, 48, 5).mean((2, 4)) / 255
    wanted = np.stack([squares[:, 19, 20], squares[:, 22, 12]])
    np.testing.assert_allclose(values[:, :3], wanted, atol=rounding.of_sum(25))
    windows = np.stack([data[:, y - 27 : y + 28, x - 27 : x + 28].mean((1, 2)) / 255 for x, y in centres.astype(int)])
    np.testing.assert_allclose(values[:, 3:], windows, atol=rounding.of_sum(55**2))
    np.testing.assert_array_equal(values[:, 3:], embed(LazyImage(data), centres, **run))


# ------------------------------------------------------------------------------------------------------- memory


def test_out_of_memory_tries_half_the_batch_once(gradient, log):
    encoder, xy = Sees(fits=16), places(75)
    values = embed(gradient, xy, mpp=1.0, encoder=encoder, device=CPU, batch_size=32)
    assert encoder.batches == [32, 16, 16, 16, 16, 11]  # the smaller size is kept
    assert np.abs(values[:, :2] - (xy - 0.5)).max() <= 1.1  # and no place is lost, doubled or moved
    warnings = [r for r in log.records if r.levelno == logging.WARNING]
    assert [r.getMessage() for r in warnings] == [
        "out of memory with batch_size=32: continuing with 16. Pass batch_size= to choose."
    ]


def test_out_of_memory_for_good(gradient):
    encoder = Sees(fits=0, name="giant")
    with pytest.raises(RuntimeError, match=r"ran out of memory .*'giant'.*smaller batch_size= \(it was 32\)") as err:
        embed(gradient, places(75), mpp=1.0, encoder=encoder, device=CPU, batch_size=32)
    assert isinstance(err.value.__cause__, torch.OutOfMemoryError)
    assert encoder.batches == [32, 16]
    assert not reading()


def test_out_of_memory_with_a_single_tile(gradient):
    with pytest.raises(RuntimeError, match="batch_size="):
        embed(gradient, places(2), mpp=1.0, encoder=Sees(fits=0), device=CPU, batch_size=1)


def test_out_of_memory_with_fewer_places_than_a_batch(gradient):
    """10 places and batch_size=32: half of 32 are the same 10 tiles again."""
    encoder = Sees(fits=5)
    assert embed(gradient, places(10), mpp=1.0, encoder=encoder, device=CPU, batch_size=32).shape == (10, 3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_embeddings_that_are_not_finite_are_refused(gradient, value):
    with pytest.raises(RuntimeError, match=r"encoder 'fake' gave 20 embeddings that are not finite"):
        embed(gradient, places(20), mpp=1.0, encoder=Sees(value=value), device=CPU)


def test_an_error_of_the_encoder_is_not_hidden(gradient):
    class Broken(Sees):
        def embed(self, tiles):
            msg = "mat1 and mat2 shapes cannot be multiplied"
            raise RuntimeError(msg)

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        embed(gradient, places(20), mpp=1.0, encoder=Broken(), device=CPU)
    assert not reading()


def test_an_error_amid_many_blocks_ends_all_threads_that_read_ahead():
    """Blocks have been read that nobody takes any more, and the traceback still holds what reads them."""
    xy = np.column_stack([np.arange(60.0, 11_900, 100), np.full(119, 30.0)])
    with pytest.raises(RuntimeError, match="batch_size=") as err:
        embed(wide_gradient(), xy, mpp=1.0, encoder=Sees(fits=0), device=CPU, batch_size=8)
    assert err.traceback
    assert not reading()


# ------------------------------------------------------------------------------------------------------- cache


class Kept(Sees):
    """A tile encoder that is known by what it answers."""

    def __init__(self, *, times=1.0, **kwargs):
        super().__init__(**kwargs)
        self.times = times

    def identity(self, device):
        return {"name": self.spec.name, "times": self.times}

    def embed(self, tiles):
        self.batches.append(len(tiles))
        return tiles.float().mean((2, 3)) * self.times


def test_a_second_run_reads_what_the_first_one_kept(gradient, log):
    xy, first, second = places(75), Kept(), Kept()
    values = embed(gradient, xy, mpp=1.0, encoder=first, device=CPU, batch_size=32)
    assert sum(first.batches) == 75
    log.clear()
    again = embed(gradient, xy, mpp=1.0, encoder=second, device=CPU, batch_size=32)
    assert second.batches == []
    assert (again == values).all()
    assert "75 of 75 embeddings were in the cache" in log.text


@pytest.mark.parametrize("change", ["encoder", "image", "place", "scale", "tile", "way", "precision"])
def test_nothing_is_read_for_another_recipe(gradient, change):
    """A pixel, a hundredth of a pixel, half a percent of scale: what the answer depends on is computed again."""
    xy = places(20)
    run = {"mpp": 1.0, "encoder": Kept(), "device": CPU}
    embed(gradient, xy, **run)
    other = Kept(times=2.0) if change == "encoder" else Kept()
    run["encoder"] = other
    image = gradient
    if change == "image":
        data = gradient.data.copy()
        data[2, 100, 100] += 1
        image = LazyImage(data)
    elif change == "place":
        xy = xy + np.eye(20, 2) * 0.01
    elif change == "scale":
        run["mpp"] = 1.006
    elif change == "tile":
        run["encoder_mpp"] = 1.125
    elif change == "precision":
        run["encoder"] = other = KeptByPrecision()
        embed(image, xy, **run)
        assert len(other.batches) == 1
        with settings.override(precision="float32"):
            embed(image, xy, **run)
        assert len(other.batches) == 2
        return
    elif change == "way":
        xy = xy[::-1]  # the same places in another order are other rows
    values = embed(image, xy, **run)
    assert sum(other.batches) == 20
    with settings.override(cache_gb=0):
        assert (values == embed(image, xy, **run)).all()


class KeptByPrecision(Kept):
    def identity(self, device):
        return super().identity(device) | {"precision": settings.precision or "default"}


def wide_gradient():
    """Several blocks wide: red is x / 64, green is y."""
    y, x = np.indices((64, 12_000))
    return LazyImage(np.stack([x // 64, y, 0 * x]).astype(np.uint8))


def test_a_run_that_was_stopped_goes_on_where_it_was():
    """It fails in its 5th batch; blocks that were done by then are not done again."""

    class Fails(Kept):
        def embed(self, tiles):
            if len(self.batches) == 4:
                raise KeyboardInterrupt
            return super().embed(tiles)

    image = wide_gradient()
    rng = np.random.default_rng(0)
    xy = rng.random((100, 2)) * [11_900, 50]
    with settings.override(cache_gb=0):
        expected = embed(image, xy, mpp=1.0, encoder=Kept(), device=CPU, batch_size=10)
    with pytest.raises(KeyboardInterrupt):
        embed(image, xy, mpp=1.0, encoder=Fails(), device=CPU, batch_size=10)
    went_on = Kept()
    values = embed(image, xy, mpp=1.0, encoder=went_on, device=CPU, batch_size=10)
    assert (values == expected).all()
    assert 60 <= sum(went_on.batches) < 90  # 40 were answered, those of the block at work are lost


def test_blocks_that_are_kept_and_blocks_that_are_not_mix():
    """One block of the image changes: the others are read, and every place gets its own."""
    image = wide_gradient()
    xy = np.random.default_rng(0).random((100, 2)) * [11_900, 50]
    embed(image, xy, mpp=1.0, encoder=Kept(), device=CPU, batch_size=7)
    data = image.data.copy()
    data[:, :, 4000] = 255
    some = Kept()
    values = embed(LazyImage(data), xy, mpp=1.0, encoder=some, device=CPU, batch_size=7)
    assert 0 < sum(some.batches) < 50
    with settings.override(cache_gb=0):
        assert (values == embed(LazyImage(data), xy, mpp=1.0, encoder=Kept(), device=CPU, batch_size=7)).all()


def test_embeddings_are_rounded_alike_whether_kept_or_not(gradient):
    xy = places(30)
    values = {}
    for gb in (0, 20):
        with settings.override(cache_gb=gb):
            values[gb] = embed(gradient, xy, mpp=1.0, encoder=Kept(times=0.1), device=CPU)
    assert (values[0] == values[20]).all()
    assert (values[0] == values[0].astype(np.float16)).all()
    with settings.override(precision="float32"):
        exact = embed(gradient, xy, mpp=1.0, encoder=Kept(times=0.3), device=CPU)
    assert (exact != exact.astype(np.float16)).any()


def test_numbers_too_large_for_half_precision_stay(gradient):
    values = embed(gradient, places(5), mpp=1.0, encoder=Kept(times=1e4), device=CPU)
    assert np.isfinite(values).all()
    assert values.max() > 1e5


def test_what_is_refused_is_not_kept(gradient, cache_folder):
    class Broken(Kept):
        def embed(self, tiles):
            return super().embed(tiles) * torch.nan

    with pytest.raises(RuntimeError, match="not finite"):
        embed(gradient, places(20), mpp=1.0, encoder=Broken(), device=CPU)
    assert not list(cache_folder.rglob("*.npy"))


def test_an_encoder_that_nobody_knows_is_not_kept(gradient, cache_folder):
    for _ in range(2):
        encoder = Sees()
        embed(gradient, places(20), mpp=1.0, encoder=encoder, device=CPU)
        assert sum(encoder.batches) == 20
    assert not cache_folder.exists()
