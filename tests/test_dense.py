"""Dense embeddings: areas from tokens, with encoders whose tokens are known."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
import torch
from tests import rounding

from histosge._embedding import embed, step_tokens, tile_weight
from histosge._encoders import EncoderSpec
from histosge._encoders.stain_texture import CELL_PX, MPP, StainTexture
from histosge._geometry import Footprints, Grid, area_fractions
from histosge._image import LazyImage
from histosge._settings import logger

CPU = torch.device("cpu")
TOKEN, SIDE = 4, 6
TILE = TOKEN * SIDE


class SeesTokens:
    """A tile encoder whose tokens are the mean colour of their patch, and whose summary is that of the tile.

    ``bias`` is added to the tokens at a tile's border, as position codes of real networks do.
    """

    def __init__(self, *, mpp=1.0, bias=0.0, fits=10**9):
        self.spec = EncoderSpec(name="tokens", mpp=mpp, tile_px=TILE, embed_dim=3, token_px=TOKEN)
        self.bias, self.fits, self.n_tiles = bias, fits, 0

    def to(self, device):
        return self

    def embed_tokens(self, tiles):
        assert tiles.dtype == torch.uint8
        assert tiles.shape[1:] == (3, TILE, TILE)
        if len(tiles) > self.fits:
            msg = "CUDA out of memory. Tried to allocate 20.00 GiB"
            raise torch.OutOfMemoryError(msg)
        self.n_tiles += len(tiles)
        grid = tiles.float().view(-1, 3, SIDE, TOKEN, SIDE, TOKEN).mean((3, 5)).permute(0, 2, 3, 1)
        border = torch.zeros(SIDE, SIDE, 1)
        border[[0, -1]] = border[:, [0, -1]] = self.bias
        return grid + border, tiles.float().mean((2, 3))


@pytest.fixture(scope="module")
def noise():
    """(3, 300, 340) of colour noise: every token differs from its neighbours."""
    return np.random.default_rng(0).integers(0, 256, (3, 300, 340)).astype(np.uint8)


def tokens_of(data):
    """Mean colour of every patch: (rows, cols, 3)."""
    c, h, w = data.shape
    h, w = h // TOKEN, w // TOKEN
    return data[:, : h * TOKEN, : w * TOKEN].reshape(c, h, TOKEN, w, TOKEN).mean((2, 4)).transpose(1, 2, 0)


def some(kind, n=40, seed=1):
    random = np.random.default_rng(seed)
    xy = random.uniform(40, 250, (n, 2))
    if kind == "disc":
        return Footprints.discs(xy, diameter_px=random.uniform(3, 25, n))
    if kind == "square":
        return Footprints.squares(xy, edge_px=random.uniform(3, 25, n))
    return Footprints.of_polygons(
        [shapely.Point(x, y).buffer(r, quad_segs=3) for (x, y), r in zip(xy, random.uniform(3, 12, n), strict=True)]
    )


@pytest.mark.parametrize("kind", ["disc", "square", "polygon"])
def test_an_area_is_the_mean_of_the_tokens_under_it(noise, kind):
    areas = some(kind)
    values = embed(
        LazyImage(noise), areas.xy_px, mpp=1.0, encoder=SeesTokens(), footprints=areas, device=CPU, batch_size=7
    )
    truth = tokens_of(noise)
    grid = Grid(0, 0, TOKEN, *truth.shape[:2])
    np.testing.assert_allclose(values[:, :3], area_fractions(areas, grid) @ truth.reshape(-1, 3), rtol=1e-5)


def test_a_token_is_where_its_pixels_are(noise):
    """One token wide, right on the grid: the mean of these pixels and of no others, up to the image's corner."""
    col, row = (a.ravel() for a in np.meshgrid([0, 1, 20, 83], [0, 3, 40, 74]))
    areas = Footprints.squares(np.column_stack([col + 0.5, row + 0.5]) * TOKEN, edge_px=TOKEN)
    values = embed(LazyImage(noise), areas.xy_px, mpp=1.0, encoder=SeesTokens(), footprints=areas, device=CPU)
    np.testing.assert_allclose(values[:, :3], tokens_of(noise)[row, col], rtol=1e-5)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_scale(scale):
    """Red is x, green is y: the mean over an area is its centre, at any scale of the encoder."""
    y, x = np.indices((240, 250))
    image = LazyImage(np.stack([x, y, 0 * x]).astype(np.uint8))
    xy = np.random.default_rng(2).uniform(60, 170, (30, 2))
    areas = Footprints.squares(xy, edge_px=16.0)
    values = embed(image, xy, mpp=1.0, encoder=SeesTokens(mpp=scale), footprints=areas, device=CPU)
    np.testing.assert_allclose(values[:, :2], xy - 0.5, atol=0.6)


def test_places_do_not_depend_on_their_company(noise):
    areas = some("square", n=60)
    image = LazyImage(noise)
    for encoder, mpp in ((SeesTokens(bias=50.0), 1.0), (StainTexture(), 1.0)):
        whole = embed(image, areas.xy_px, mpp=mpp, encoder=encoder, footprints=areas, device=CPU)
        for rows in (np.arange(7), np.arange(30, 60), np.array([59, 0])):
            few = areas.take(rows)
            alone = embed(image, few.xy_px, mpp=mpp, encoder=encoder, footprints=few, device=CPU)
            np.testing.assert_allclose(alone, whole[rows], rtol=1e-4, atol=1e-4)


def test_a_spot_is_the_mean_of_its_bins(noise):
    """What lets a head that was trained on spots be asked about bins."""
    encoders = (SeesTokens(bias=50.0), 1.0), (StainTexture(), MPP)
    for encoder, mpp in encoders:
        centre = np.array([[150.3, 141.7]])
        big = Footprints.squares(centre, edge_px=30.0)
        offset = (np.arange(5) - 2) * 6.0
        xy = (centre + np.stack(np.meshgrid(offset, offset), -1).reshape(-1, 2)).astype(float)
        bins = Footprints.squares(xy, edge_px=6.0)
        spot = embed(LazyImage(noise), centre, mpp=mpp, encoder=encoder, footprints=big, device=CPU)
        parts = embed(LazyImage(noise), xy, mpp=mpp, encoder=encoder, footprints=bins, device=CPU)
        n_tokens = 3 if isinstance(encoder, SeesTokens) else 40
        np.testing.assert_allclose(parts[:, :n_tokens].mean(0), spot[0, :n_tokens], rtol=1e-4, atol=1e-4)
        assert parts[:, :n_tokens].std(0).max() > 0.01  # and the bins differ


def test_tiles_overlap_without_a_seam():
    """On an even image, a bias at the border of every tile leaves a fraction of itself, and no jump."""
    image = LazyImage(np.full((3, 300, 300), 100, np.uint8))
    x = np.arange(60, 240, 1.0)
    xy = np.column_stack([x, np.full(len(x), 150.0)])
    areas = Footprints.squares(xy, edge_px=TOKEN)
    values = embed(image, xy, mpp=1.0, encoder=SeesTokens(bias=50.0), footprints=areas, device=CPU)
    assert values[:, 0].min() >= 100 * (1 - rounding.of_sum(TOKEN**2 + 9))  # pixels of a token, tiles over it
    assert values[:, 0].max() <= 100 + 0.2 * 50
    assert np.abs(np.diff(values[:, 0])).max() < 2.5  # one pixel on


def test_windows_leave_no_token_without_weight():
    for side in range(1, 40):
        step, edge = step_tokens(side), tile_weight((np.arange(side) + 0.5) / side)
        assert 1 <= step <= side
        covered = np.zeros(4 * side)
        for start in range(-side, 4 * side, step):
            inside = (np.arange(side) + start >= 0) & (np.arange(side) + start < 4 * side)
            covered[(np.arange(side) + start)[inside]] += edge[inside]
        assert covered.min() > 0.15


def test_context_is_the_mean_of_the_tiles_around(noise):
    """Summaries of an even image are its colour; on a gradient they change evenly."""
    y, x = np.indices((300, 250))
    image = LazyImage(np.stack([x, 0 * x + 7, 0 * x]).astype(np.uint8))
    xy = np.column_stack([np.linspace(60, 180, 121), np.full(121, 150.0)])
    areas = Footprints.squares(xy, edge_px=2.0)
    values = embed(image, xy, mpp=1.0, encoder=SeesTokens(), footprints=areas, device=CPU)
    np.testing.assert_allclose(values[:, 4], 7, rtol=rounding.of_sum(TILE**2 + 9))  # pixels of a tile, tiles around
    steps = np.diff(values[:, 3])
    assert steps.min() >= -rounding.of_sum(TILE**2 + 9, scale=200)
    assert steps.max() < 3.0  # red rises by 1 a pixel, and the tiles' means by no more than a few
    np.testing.assert_allclose(values[:, 3], xy[:, 0], atol=TILE / 2)


def test_only_tiles_over_places_are_computed(noise):
    encoder = SeesTokens()
    two = Footprints.squares(np.array([[60.0, 60.0], [280.0, 250.0]]), edge_px=4.0)
    embed(LazyImage(noise), two.xy_px, mpp=1.0, encoder=encoder, footprints=two, device=CPU)
    assert encoder.n_tiles <= 2 * 3**2


def test_memory_runs_out_once(noise, caplog):
    areas = some("square")
    whole = embed(
        LazyImage(noise), areas.xy_px, mpp=1.0, encoder=SeesTokens(), footprints=areas, device=CPU, batch_size=16
    )
    logger.addHandler(caplog.handler)
    again = embed(
        LazyImage(noise), areas.xy_px, mpp=1.0, encoder=SeesTokens(fits=8), footprints=areas, device=CPU, batch_size=16
    )
    logger.removeHandler(caplog.handler)
    np.testing.assert_allclose(again, whole, rtol=rounding.of_sum(TILE**2))
    assert "continuing with 8" in caplog.text
    with pytest.raises(RuntimeError, match=r"ran out of memory with 8 tiles.*Pass a smaller batch_size= \(it was 16\)"):
        embed(
            LazyImage(noise),
            areas.xy_px,
            mpp=1.0,
            encoder=SeesTokens(fits=3),
            footprints=areas,
            device=CPU,
            batch_size=16,
        )


# ------------------------------------------------------------------------------------------------------ stain-texture


def test_stain_texture_tokens_are_those_of_its_discs():
    """Away from borders, the token of a cell is what a disc of that size around the cell's centre says."""
    from histosge._encoders import stain_texture

    block = torch.as_tensor(np.random.default_rng(3).integers(60, 255, (3, 480, 480)), dtype=torch.uint8)
    encoder = StainTexture()
    centres = torch.tensor([[(c + 0.5) * CELL_PX, (r + 0.5) * CELL_PX] for r, c in ((50, 60), (61, 47), (58, 70))])
    tokens, context = encoder.embed_block_dense(block, centres)
    assert tokens.shape == (120, 120, 40)
    assert tokens.dtype == torch.float32
    around = stain_texture._around(encoder._cells(block), centres, (stain_texture.TOKEN_DISC_UM,))
    torch.testing.assert_close(tokens[[50, 61, 58], [60, 47, 70]], around, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(context, encoder.embed_block(block, centres)[:, 40:], rtol=1e-5, atol=1e-5)


def test_stain_texture_is_the_same_in_the_middle_and_at_the_border_of_a_block():
    data = np.random.default_rng(4).integers(60, 255, (3, 900, 2500)).astype(np.uint8)
    xy = np.column_stack([np.linspace(1024 - 60, 1024 + 60, 31), np.full(31, 450.0)])
    areas = Footprints.squares(xy, edge_px=4.0)
    across = embed(LazyImage(data), xy, mpp=MPP, encoder=StainTexture(), footprints=areas, device=CPU)
    shifted = LazyImage(data[:, :, 400:])  # the block's border lies elsewhere
    moved = Footprints.squares(xy - [400, 0], edge_px=4.0)
    inside = embed(shifted, moved.xy_px, mpp=MPP, encoder=StainTexture(), footprints=moved, device=CPU)
    assert (np.abs(across - inside).max(0) <= 1e-3 * across.std(0) + 1e-5).all()


def test_dense_embeddings_are_kept_by_their_areas(noise):
    """The same areas are read; areas of another size at the same places are not."""

    class Kept(SeesTokens):
        def identity(self, device):
            return {"name": "tokens"}

    areas = some("square")
    values = []
    for footprints, computed in ((areas, True), (areas, False), (areas.scaled(1.0), False), (some("disc"), True)):
        encoder = Kept()
        values.append(
            embed(LazyImage(noise), footprints.xy_px, mpp=1.0, encoder=encoder, footprints=footprints, device=CPU)
        )
        assert (encoder.n_tiles > 0) == computed
    assert (values[0] == values[1]).all()
