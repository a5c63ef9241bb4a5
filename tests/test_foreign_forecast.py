"""How long it will take is said before it is waited for: what is timed, what is counted, and in which words."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import histosge as sge
from histosge._embedding import Forecast, embed, in_words, name_device
from histosge._encoders import load_encoder
from histosge._encoders.stain_texture import StainTexture
from histosge._geometry import Footprints
from histosge._image import LazyImage

CPU = torch.device("cpu")
TILE = 16
CONVERT = [
    (20, "less than a minute"),
    (60, "about 1 min"),
    (125, "about 2 min"),
    (9 * 60, "about 9 min"),
    (12 * 60, "about 10 min"),
    (38 * 60, "about 40 min"),
    (95 * 60, "about 95 min"),
    (98 * 60, "about 1.5 h"),
    (4.9 * 3600, "about 5 h"),
    (7.4 * 3600, "about 7.5 h"),
    (16.3 * 3600, "about 16 h"),
    (35.4 * 3600, "about 35 h"),
    (35.6 * 3600, "about 1.5 days"),
    (71 * 3600, "about 3 days"),
    (12.2 * 86400, "about 12 days"),
]


@pytest.mark.parametrize(("seconds", "words"), CONVERT)
def test_durations_are_said_roughly(seconds, words):
    assert in_words(seconds) == words


def test_no_duration_is_said_more_than_a_third_off():
    """A minute and a half is the worst."""
    unit = {"min": 60, "h": 3600, "days": 86400}
    for seconds in np.geomspace(90, 30 * 86400, 3000):
        _, number, name = in_words(seconds).split()
        assert float(number) * unit[name] == pytest.approx(seconds, rel=0.34)


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when an encoder says so."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(Forecast, "clock", lambda _: Clock.now)
    return Clock


class Slow(torch.nn.Module):
    """Mean colours, a fixed time for each tile, and a longer one for the first batch."""

    def __init__(self, clock, *, seconds, first=0.0, n_parameters=1):
        super().__init__()
        self.clock, self.seconds, self.first, self.batches = clock, seconds, first, []
        self.weight = torch.nn.Parameter(torch.ones(1).expand(n_parameters))  # they share the memory of one

    def forward(self, x):
        self.clock.now += len(x) * self.seconds + (self.first if not self.batches else 0)
        self.batches.append(len(x))
        return x.mean((2, 3)) * self.weight[:1]


def slow(clock, **times):
    spec = sge.EncoderSpec(name="slow", mpp=2.0, tile_px=TILE, embed_dim=3, revision="1")
    return load_encoder(Slow(clock, **times), spec=spec)


@pytest.fixture
def image():
    return LazyImage(np.random.default_rng(0).integers(0, 255, (3, 600, 600)).astype(np.uint8))


def places(n):
    return np.random.default_rng(1).random((n, 2)) * 400 + 100


def lines(log):
    return [text.strip() for text in log.messages if re.match(r" +[\d,]+ locations with ", text)]


def run(image, encoder, n=200, **options):
    return embed(image, places(n), mpp=2.0, encoder=encoder, device=CPU, batch_size=10, **options)


def test_one_line_from_the_second_batch(image, clock, log):
    """200 places of 4 s; the first batch takes 15 s more, of which nothing is seen. Nothing but the clock is a fake."""
    with sge.settings.override(cache_gb=0):
        run(image, slow(clock, seconds=4, first=15))
    (said,) = lines(log)
    assert said.startswith("200 locations with slow on this processor: about 15 min; encoder='stain-texture' takes ")
    assert said.endswith("less than a minute")


def test_it_comes_before_the_work(image, clock, log):
    encoder = slow(clock, seconds=4)
    seen = {}

    def embedded(tiles, original=encoder.embed):
        seen[len(encoder.module.batches)] = len(lines(log))  # before the batch of this number
        return original(tiles)

    encoder.embed = embedded
    run(image, encoder)
    assert [seen[i] for i in (0, 1, 2, 19)] == [0, 0, 1, 1]


def test_a_first_batch_of_a_minute_is_enough(image, clock, log):
    encoder = slow(clock, seconds=6)
    run(image, encoder, n=110, progress=False)
    assert "110 locations with slow on this processor: about 10 min" in lines(log)[0]
    log.clear()
    encoder = slow(clock, seconds=6000)
    run(image, encoder, n=10)
    assert "10 locations with slow on this processor: about 16 h" in lines(log)[0] or "about 17 h" in lines(log)[0]


def test_a_large_network_on_a_processor_is_known_after_a_few_tiles(image, clock, log):
    """A batch of midnight takes minutes there: the first one is begun in small steps, with the same embeddings."""
    with sge.settings.override(cache_gb=0):
        wanted = run(image, slow(clock, seconds=0))
        encoder = slow(clock, seconds=50, n_parameters=300_000_000)
        values = run(image, encoder)
    assert encoder.module.batches == [4, 4, 2, *[10] * 19]
    assert lines(log)[0].startswith(f"200 locations with slow on this processor: {in_words(50 * 200)}")
    np.testing.assert_array_equal(values, wanted)


@pytest.mark.parametrize("seconds", [2.9, 0.0])
def test_below_ten_minutes_nothing_is_said(image, clock, log, seconds):
    run(image, slow(clock, seconds=seconds, first=30))  # the first batch alone would say more
    assert lines(log) == []


def test_what_is_in_the_cache_is_not_counted(clock, log):
    """A run that goes on: blocks that were embedded before cost nothing."""
    image = LazyImage(np.random.default_rng(0).integers(0, 255, (3, 300, 7000)).astype(np.uint8))
    xy = np.random.default_rng(1).random((400, 2)) * [6800, 200] + [100, 50]
    left = xy[:, 0] < 2048  # a block of tiles is 2048 px wide
    some = {"mpp": 2.0, "device": CPU, "batch_size": 10}
    embed(image, xy[left], encoder=slow(clock, seconds=0), **some)
    encoder = slow(clock, seconds=5)
    embed(image, xy, encoder=encoder, **some)
    (said,) = lines(log)
    n = int((~left).sum())
    assert sum(encoder.module.batches) == n
    assert said.startswith(f"{n} locations with slow on this processor: {in_words(5 * n)}")
    log.clear()
    embed(image, xy, encoder=slow(clock, seconds=100), **some)
    assert lines(log) == []


class DenseSlow:
    """A tile encoder with tokens, fast or slow."""

    def __init__(self, clock, seconds):
        self.spec = sge.EncoderSpec(name="dense", mpp=2.0, tile_px=TILE, embed_dim=3, token_px=4)
        self.clock, self.seconds, self.n_tiles = clock, seconds, 0

    def to(self, _):
        return self

    def embed_tokens(self, tiles):
        self.clock.now += len(tiles) * self.seconds
        self.n_tiles += len(tiles)
        mean = tiles.float().mean((2, 3))
        return torch.zeros(len(tiles), 4, 4, 3) + mean[:, None, None], mean


def test_dense_blocks_are_timed_by_their_batches(image, clock, log):
    """All tiles of this section lie in one block: it is not waited for."""
    encoder = DenseSlow(clock, 3)
    xy = places(300)
    areas = Footprints.squares(xy, edge_px=8)
    seen = []

    def embedded(tiles, original=encoder.embed_tokens):
        seen.append((encoder.n_tiles, len(lines(log))))  # before each batch
        return original(tiles)

    encoder.embed_tokens = embedded
    values = embed(image, xy, mpp=2.0, encoder=encoder, footprints=areas, device=CPU, batch_size=10)
    assert values.shape == (300, 6)
    (said,) = lines(log)
    assert next(n_tiles for n_tiles, n_lines in seen if n_lines) == 20  # two batches of ten tiles
    assert said.startswith(f"300 locations with dense on this processor: {in_words(3 * encoder.n_tiles)}; encoder=")


def test_block_encoders_are_timed_by_their_blocks(clock, log):
    """The built-in one is its own alternative: nothing else is offered."""
    image = LazyImage(np.random.default_rng(0).integers(0, 255, (3, 400, 5000)).astype(np.uint8))
    encoder = load_encoder("stain-texture")

    def embed_block(block, centres, original=encoder.embed_block):
        clock.now += 50 * len(centres)
        return original(block, centres)

    encoder.embed_block = embed_block
    xy = np.stack([np.linspace(200, 4800, 40), np.full(40, 200.0)], 1)
    embed(image, xy, mpp=2.0, encoder=encoder, device=CPU)
    assert lines(log) == ["40 locations with stain-texture on this processor: about 35 min"]


@pytest.fixture
def takes_a_minute(clock, monkeypatch):
    """Blocks that the built-in encoder was given, each of which takes a minute, the first one two."""
    blocks = []

    def slowed(original):
        def of_block(self, block, centres):
            clock.now += 60 if blocks else 120
            blocks.append(len(centres))
            return original(self, block, centres)

        return of_block

    for name in ("embed_block", "embed_block_dense"):
        monkeypatch.setattr(StainTexture, name, slowed(getattr(StainTexture, name)))
    return blocks


@pytest.mark.parametrize("dense", [False, True])
def test_the_alternative_is_timed_on_this_image(clock, log, takes_a_minute, dense):
    """Five blocks of a minute each, the first time another one: five minutes."""
    image = LazyImage(np.random.default_rng(0).integers(0, 255, (3, 400, 5000)).astype(np.uint8))
    xy = np.stack([np.linspace(200, 4900, 100), np.full(100, 200.0)], 1)
    areas = Footprints.squares(xy, edge_px=20) if dense else None
    encoder = DenseSlow(clock, 100) if dense else slow(clock, seconds=100)
    embed(image, xy, mpp=2.0, encoder=encoder, footprints=areas, device=CPU, batch_size=10)
    assert len(set(takes_a_minute)) == 1
    assert len(takes_a_minute) == 2  # once to warm up, once timed
    assert lines(log)[0].endswith("; encoder='stain-texture' takes about 5 min")


class ReadOnce:
    """An image on a disk that fails after the first block."""

    def __init__(self, pixels):
        self.pixels, self.shape, self.n_read = pixels, pixels.shape, 0

    def __getitem__(self, where):
        self.n_read += 1
        if self.n_read > 1:
            msg = "the disk is gone"
            raise OSError(msg)
        return self.pixels[where]


def test_an_alternative_that_fails_costs_half_a_line(image, clock, log):
    disk = ReadOnce(image.data)
    run(LazyImage(disk), slow(clock, seconds=4))
    assert disk.n_read == 2
    assert lines(log) == ["200 locations with slow on this processor: about 15 min"]


def test_gpus_have_a_number():
    devices = ("cuda", "cuda:1", "mps", "cpu")
    assert [name_device(torch.device(device)) for device in devices] == ["cuda:0", "cuda:1", "mps", "this processor"]


# ------------------------------------------------------------------------------------------- through the doors


@pytest.fixture(scope="module")
def _section_once():
    """As the one of conftest, but fine enough for an encoder of tiles."""
    return sge.datasets.synthetic(n_rows=9, n_cols=9, n_genes=10, mpp=1.5)


FAST = {"head": "mean", "genes": 5, "n_folds": 2, "batch_size": 10}


def test_embed_says_it(sdata, clock, log):
    sge.tl.embed(sdata, encoder=slow(clock, seconds=20), batch_size=10)
    n = len(sdata.shapes["spots"])
    assert lines(log)[0].startswith(f"{n} locations with slow on this processor: {in_words(20 * n)}; encoder=")


def test_fit_and_evaluate_count_all_sections_and_say_it_once(sdata, clock, log):
    other = sge.datasets.synthetic(n_rows=9, n_cols=9, n_genes=10, mpp=1.5, rng=1)
    n = len(sdata.shapes["spots"]) + len(other.shapes["spots"])
    sge.tl.fit([sdata, other], encoder=slow(clock, seconds=5), **FAST)
    (said,) = lines(log)
    assert said.startswith(f"{n} locations with slow on this processor: {in_words(5 * n)}; encoder='stain-texture'")
    log.clear()
    options = {"heads": ["mean"], "genes": 5, "n_folds": 2, "batch_size": 10, "split": "sections"}
    with sge.settings.override(cache_gb=0):
        sge.tl.evaluate([sdata, other], encoder=slow(clock, seconds=5), **options)
    (said,) = lines(log)
    assert said.startswith(f"{n} locations with slow on this processor: {in_words(5 * n)}")


def test_predict_says_it(sdata, clock, log):
    sge.tl.predict(sdata, encoder=slow(clock, seconds=20), **FAST)
    n = sdata.tables["histosge"].n_obs
    (said,) = lines(log)
    assert said.startswith(f"{n:,} locations with slow on this processor: {in_words(20 * n)}; encoder='stain-texture'")


def test_a_fitted_model_has_no_other_encoder(sdata, clock, log):
    encoder = slow(clock, seconds=20)
    model = sge.tl.fit(sdata, encoder=encoder, **FAST)
    log.clear()
    with sge.settings.override(cache_gb=0):
        sge.tl.predict(sdata, model=model, encoder=encoder, batch_size=10, upsample=2)
    (said,) = lines(log)
    n = sdata.tables["histosge"].n_obs
    assert said == f"{n} locations with slow on this processor: {in_words(20 * n)}"


def test_a_store_says_it_once_for_all_its_parts(sdata, clock, log, tmp_path):
    with sge.settings.override(cache_gb=0, part_rows=128):
        sge.tl.predict(sdata, encoder=slow(clock, seconds=20), store=tmp_path / "out.zarr", upsample=2, **FAST)
    (said,) = lines(log)
    n = len(sdata.shapes["spots"])
    n_all = int(said.split()[0].replace(",", ""))
    assert n_all > 2.5 * n  # the spots, and twice as many places
    assert said.startswith(f"{n_all:,} locations with slow on this processor: {in_words(20 * n_all)}")
