"""The built-in encoder on images of known stain, texture and orientation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests import rounding

from histosge._encoders.stain_texture import CELL_PX, DISC_UM, MPP, StainTexture
from histosge._image import LazyImage, blocks

HAEMATOXYLIN = np.array([0.65, 0.70, 0.29]) / np.linalg.norm([0.65, 0.70, 0.29])
EOSIN = np.array([0.07, 0.99, 0.11]) / np.linalg.norm([0.07, 0.99, 0.11])
SIDE = 320  # 640 µm
HALO = StainTexture.halo_px
N_SUMMED = 16 + 805
"""Pixels of a cell and cells of the widest disc: numbers that a feature is the mean of, one mean after the other."""


def stained(haematoxylin=0.0, eosin=0.0):
    """Light through amounts (h, w) of two stains, by Beer and Lambert's law: (3, h, w) uint8."""
    haematoxylin, eosin = np.broadcast_arrays(haematoxylin, eosin)
    amount = np.multiply.outer(HAEMATOXYLIN, haematoxylin) + np.multiply.outer(EOSIN, eosin)
    return np.clip(np.rint(255 * 10**-amount), 1, 255).astype(np.uint8)


def tissue(n_nuclei=1500, *, sigma_px=1.5, side=SIDE, seed=0):
    """Nuclei strewn over stroma of slowly changing pink."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    dots = np.zeros((side, side))
    np.add.at(dots, tuple(rng.integers(0, side, (2, n_nuclei))), 1.0)
    dots = np.minimum(gaussian_filter(dots, sigma_px) * 2 * np.pi * sigma_px**2, 1.2)
    pink = gaussian_filter(rng.standard_normal((side, side)), 20) * 20 * 0.04 + 0.25
    return stained(0.6 * dots, np.clip(pink, 0, None))


def embed(image, xy, *, block_px=1024):
    """Through the same blocks as the embedding itself."""
    encoder = StainTexture()
    out = np.full((len(xy), encoder.spec.embed_dim), np.nan, np.float32)
    for block in blocks(
        LazyImage(np.ascontiguousarray(image)),
        np.asarray(xy, float),
        scale=1.0,
        halo_px=encoder.halo_px,
        align_px=encoder.align_px,
        block_px=block_px,
    ):
        pixels = torch.from_numpy(np.ascontiguousarray(block.pixels))
        out[block.rows] = encoder.embed_block(pixels, torch.from_numpy(block.xy_px)).numpy()
    return out


def agree(found, expected, *, spread, tolerance=1e-3):
    """Whether embeddings agree to a part of every feature's spread, or to the last digit of a float32."""
    return bool((np.abs(found - expected) <= tolerance * spread + 1e-5).all())


def feature(values, name):
    return values[:, StainTexture().names.index(name)]


@pytest.fixture(scope="module")
def image():
    return tissue()


@pytest.fixture(scope="module")
def xy():
    return np.random.default_rng(1).random((60, 2)) * (SIDE - 40) + 20


@pytest.fixture(scope="module")
def reference(image, xy):
    return embed(image, xy)


def test_spec_and_names_agree(reference):
    encoder = StainTexture()
    assert encoder.spec.name == "stain-texture"
    assert encoder.spec.embed_dim == len(encoder.names) == reference.shape[1] == 120
    assert len(set(encoder.names)) == 120
    assert encoder.spec.mpp == MPP == 2.0
    assert encoder.spec.tile_um == max(DISC_UM) == 256
    assert (encoder.spec.licence, encoder.spec.gated, encoder.spec.source) == ("BSD-3-Clause", False, "built-in")
    assert {n.rsplit("_", 1)[1] for n in encoder.names} == {"56um", "112um", "256um"}
    assert reference.dtype == np.float32


@pytest.mark.parametrize("amount", [0.1, 0.35])
def test_amounts_of_stain_are_unmixed(amount):
    """A field of known haematoxylin holds that much haematoxylin and no eosin; and the other way round."""
    at = [[SIDE / 2, SIDE / 2]]
    flat = np.full((SIDE, SIDE), amount)
    for given, image in (("haematoxylin", stained(flat)), ("eosin", stained(0 * flat, flat))):
        values = embed(image, at)
        for stain in ("haematoxylin", "eosin", "residual"):
            expected = amount if stain == given else 0.0
            assert feature(values, f"mean_{stain}_56um") == pytest.approx(expected, abs=0.005)
            if stain != "residual":
                # the histogram's own mean: bins from 0 to 0.5
                histogram = np.array([feature(values, f"{stain}_{i}_56um")[0] for i in range(6)])
                assert histogram.sum() == pytest.approx(1, abs=rounding.of_sum(N_SUMMED))
                assert histogram @ np.linspace(0, 0.5, 6) == pytest.approx(expected, abs=0.005)
        for i, colour in enumerate(("red", "green", "blue")):
            assert feature(values, f"mean_{colour}_56um") == pytest.approx(
                image[i, 0, 0] / 255, abs=rounding.of_sum(N_SUMMED)
            )
        # a flat field has no texture and no edges
        for name in ("spread_density", "energy_1-2_density", "energy_4-8_density", "nuclei_2-4", "edge_2", "edge_4"):
            assert feature(values, f"{name}_112um") == pytest.approx(0, abs=rounding.of_root(N_SUMMED, amount))


def test_spread_is_the_standard_deviation():
    rng = np.random.default_rng(0)
    amount = rng.choice([0.1, 0.4], (SIDE, SIDE), p=[0.75, 0.25])
    values = embed(stained(amount), [[SIDE / 2, SIDE / 2]])
    assert feature(values, "mean_haematoxylin_256um") == pytest.approx(0.175, abs=0.01)
    assert feature(values, "spread_haematoxylin_256um") == pytest.approx(0.3 * np.sqrt(0.75 * 0.25), abs=0.01)


def test_coherence_tells_stripes_from_dots(image):
    period = np.sin(2 * np.pi * np.arange(SIDE) / 24) * 0.2 + 0.3
    at = [[SIDE / 2, SIDE / 2]]
    for stripes in (np.broadcast_to(period, (SIDE, SIDE)), np.broadcast_to(period[:, None], (SIDE, SIDE))):
        assert feature(embed(stained(stripes), at), "coherence_2_112um") > 0.95
    assert feature(embed(image, at), "coherence_2_112um") < 0.4


def test_discs_have_their_size():
    """A dark disc of 60 µm radius fills the smallest window, more than a quarter of the next, little of the last."""
    y, x = np.indices((SIDE, SIDE)) + 0.5
    inside = np.hypot(x - SIDE / 2, y - SIDE / 2) * MPP < 60
    values = embed(stained(0.4 * inside), [[SIDE / 2, SIDE / 2]])
    for diameter in DISC_UM:
        share = min(1.0, (60 / (diameter / 2)) ** 2)
        assert feature(values, f"mean_haematoxylin_{diameter:.0f}um") == pytest.approx(0.4 * share, abs=0.012)


def test_the_place_is_the_middle_of_the_disc():
    """Half of the image is dark: a place on the edge sees half of it, wherever the edge lies on the grid of cells."""
    for edge in (160, 161, 162, 163):
        dark = np.broadcast_to(np.arange(SIDE) < edge, (SIDE, SIDE))
        for image, place in ((dark, (edge, 150.3)), (dark.T, (150.3, edge))):
            found = feature(embed(stained(0.4 * image), [place]), "mean_haematoxylin_56um")
            assert found == pytest.approx(0.2, abs=0.004)


def test_more_nuclei_more_signal():
    at = [[SIDE / 2, SIDE / 2]]
    values = np.vstack([embed(tissue(n, seed=3), at) for n in (0, 400, 1200, 3000)])
    for name in ("mean_haematoxylin", "nuclei_1-2", "nuclei_2-4", "energy_1-2_haematoxylin"):
        for disc in ("112um", "256um"):
            assert (np.diff(feature(values, f"{name}_{disc}")) > 0).all(), name
    assert (np.diff(feature(values, "mean_red_256um")) < 0).all()
    assert np.ptp(feature(values, "mean_eosin_256um")) < 0.1 * np.ptp(feature(values, "mean_haematoxylin_256um"))


def test_size_of_nuclei_moves_energy_between_bands():
    at = [[SIDE / 2, SIDE / 2]]
    small, large = (embed(tissue(n, sigma_px=s, seed=4), at) for n, s in ((1500, 0.8), (170, 2.4)))

    def ratio(v):
        return feature(v, "nuclei_4-8_256um") / feature(v, "nuclei_1-2_256um")

    assert ratio(large) > 2 * ratio(small)


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("mirror", [False, True])
def test_turning_and_mirroring_change_nothing(image, xy, reference, turns, mirror):
    """Cells stay whole, so that only the order of sums differs: a thousandth of a feature's spread at most."""
    turned, at = (image[:, :, ::-1], np.column_stack([SIDE - xy[:, 0], xy[:, 1]])) if mirror else (image, xy)
    for _ in range(turns):
        turned, at = np.rot90(turned, axes=(1, 2)), np.column_stack([at[:, 1], SIDE - at[:, 0]])
    found = embed(turned, at)
    assert agree(found, reference, spread=reference.std(0))


@pytest.mark.parametrize("block_px", [70, 128])
def test_blocks_change_nothing(image, xy, reference, block_px):
    """Blocks begin on the grid of cells and reach as far as the widest window."""
    found = embed(image, xy, block_px=block_px)
    assert agree(found, reference, spread=reference.std(0))


def test_far_away_changes_nothing(image, xy, reference):
    """What lies beyond the halo of a place does not reach it."""
    place = np.array([[100.0, 100.0]])
    other = image.copy()
    other[:, :, 100 + HALO :] = 0
    other[:, 100 + HALO :] = 200
    before, after = embed(image, place), embed(other, place)
    assert agree(after, before, spread=reference.std(0), tolerance=1e-2)
    other[:, :, 140:] = 0  # within it, it does
    assert not agree(embed(other, place), before, spread=reference.std(0), tolerance=0.1)


def test_deterministic(image, xy, reference):
    assert (embed(image, xy) == reference).all()


@pytest.mark.parametrize("level", [0, 255])
def test_blank_images_are_finite_and_alike_everywhere(level):
    values = embed(np.full((3, 200, 200), level, np.uint8), [[100, 100], [96.2, 103.7], [0, 0]])
    assert np.isfinite(values).all()
    spreads = np.char.startswith(StainTexture().names, "spread")
    most = np.abs(values).max()  # a stain's amount, up to 3 where all is black
    tolerance = np.where(spreads, rounding.of_root(N_SUMMED, most), rounding.of_sum(N_SUMMED, most))
    assert (np.abs(values[0] - values[1]) <= tolerance).all()
    if level == 255:
        assert (np.abs(values[0] - values[2]) <= tolerance).all()  # white goes on beyond the border
        assert feature(values, "lumen_56um") == pytest.approx(1, abs=0.01)


def test_neighbouring_places_have_similar_embeddings(image, reference):
    """The cells do not show: a pixel aside changes little."""
    at = np.array([[150.0 + i, 150.0] for i in range(9)])
    varies = reference.std(0) > 1e-4
    steps = np.abs(np.diff(embed(image, at), axis=0))[:, varies] / reference.std(0)[varies]
    assert np.median(steps) < 0.1
    assert steps.max() < 1.0


def test_blocks_with_ragged_borders(image):
    """A block whose sides are no multiples of the cell is read up to its last whole cell."""
    encoder, at = StainTexture(), torch.tensor([[150.0, 150.0]])
    block = torch.from_numpy(image)
    whole = encoder.embed_block(block, at)
    ragged = encoder.embed_block(block[:, : SIDE - CELL_PX + 1, : SIDE - CELL_PX + 3], at)
    assert torch.allclose(whole, ragged, atol=1e-4)
