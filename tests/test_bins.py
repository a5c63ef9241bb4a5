"""Places smaller than a spot, from dense tokens: what they are worth, stores, conservation, what is refused."""

from __future__ import annotations

import dataclasses
import logging
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
import spatialdata as sd
import torch
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import ShapesModel
from spatialdata.transformations import Affine, get_transformation
from torch import nn
from torch.nn.functional import avg_pool2d, grid_sample

import histosge as sge
from histosge._geometry import Footprints, Grid, area_fractions, spot_by_bin
from histosge._heads import get_head
from histosge._model import check_memory
from histosge._section import read_section, read_targets, smaller_than_spot
from histosge._statistics import noise_variance, shrinkage

KEY, NAME = "histosge", "histosge_targets"
CELL = 4
MPP = 1.5
AXES = ("x", "y")


class Colours:
    """A block encoder whose tokens are known: the mean colour of each 6 µm cell; around a place, what lies between them."""

    align_px, halo_px = CELL, 2 * CELL

    def __init__(self, **changes):
        known = {
            "name": "colours",
            "mpp": MPP,
            "tile_px": 4 * CELL,
            "token_px": CELL,
            "embed_dim": 3,
            "whole_blocks": True,
        }
        self.spec = sge.EncoderSpec(**known | changes)

    def to(self, device):
        return self

    def embed_block(self, block, centres):
        cells = avg_pool2d(block.float()[None], CELL)  # (1, 3, h, w)
        at = 2 * centres.float() / CELL / torch.tensor([cells.shape[3], cells.shape[2]]) - 1
        return grid_sample(cells, at[None, None], align_corners=False)[0, :, 0].T  # (n, 3)

    def embed_block_dense(self, block, centres):
        cells = avg_pool2d(block.float()[None], CELL)[0]
        return cells.permute(1, 2, 0), self.embed_block(block, centres)


FAST = {"encoder": Colours(), "head": "ridge", "genes": 10, "n_folds": 2}
"""For all that does not depend on how good the prediction is."""
ALIKE = 2e-4
"""Of what is predicted in parts and at once. ``Colours`` looks up at positions from -1 to 1 in float32, differently rounded
for each block: with 150 cells across that is 150 x 2^-23 of a cell, some 50 grey levels from cell to cell and a spread of
10 or more, which a unit of expression goes with: 1e-4, and an interval is wider by less than a half of that."""


@pytest.fixture(autouse=True)
def _one_thread():
    """scanpy's neighbours set torch's threads to all cores, which other tests run on."""
    torch.set_num_threads(1)


def told(log, level=logging.WARNING):
    return [r.getMessage() for r in log.records if r.levelno >= level]


def copy_of(sdata):
    """Holders and tables of its own; elements are shared."""
    tables = {name: table.copy() for name, table in sdata.tables.items()}
    return SpatialData(images=dict(sdata.images), shapes=dict(sdata.shapes), tables=tables)


def elements(sdata):
    return {f"{kind}/{name}": id(element) for kind, name, element in sdata.gen_elements()}


def refuses(sdata, match, *, error=ValueError, call=None, **kwargs):
    """Refused, and nothing is changed."""
    before = elements(sdata)
    with pytest.raises(error, match=match) as found:
        (call or sge.tl.predict)(sdata, **{**FAST, **kwargs})
    assert elements(sdata) == before
    return str(found.value)


@pytest.fixture(scope="module")
def _small_once():
    """64 spots."""
    return sge.datasets.synthetic(n_rows=8, n_cols=8, n_genes=20, mpp=MPP)


@pytest.fixture
def small(_small_once):
    return copy_of(_small_once)


@pytest.fixture(scope="module")
def model(_small_once):
    """A dense model of the known tokens."""
    return sge.tl.fit(copy_of(_small_once), dense=True, **FAST)


@pytest.fixture(scope="module")
def _texture_once(_small_once):
    """A section predicted at bins, conserved as well."""
    sdata = copy_of(_small_once)
    sge.tl.predict(sdata, encoder="stain-texture", head="ridge", genes=10, n_folds=2, bin_um=16, conserve=True)
    return sdata


@pytest.fixture
def predicted(_texture_once):
    return copy_of(_texture_once)


@pytest.fixture
def in_parts():
    """Few places a part: bins of 16 µm make three parts."""
    with sge.settings.override(part_rows=900):
        yield


@pytest.fixture
def small_parts():
    """Several parts of 40 shapes."""
    with sge.settings.override(part_rows=16):
        yield


# ----------------------------------------------------------------------------------------------------- what is written


def test_bins_are_dense_and_places_between_spots_are_not(predicted, small):
    made = predicted.tables[KEY].uns["histosge"]
    assert made["dense"] is True
    assert made["encoder"]["token_px"] == 4
    for what in ({"upsample": 2}, {}, {"target_key": "spots"}):
        assert sge.tl.predict(small, inplace=False, **what, **FAST).uns["histosge"]["dense"] is False
    assert sge.tl.predict(small, inplace=False, upsample=2, dense=True, **FAST).uns["histosge"]["dense"] is True
    assert sge.tl.predict(small, inplace=False, bin_um=40, dense=False, **FAST).uns["histosge"]["dense"] is False


@pytest.mark.parametrize("bin_um", [8, 16])
def test_squares_and_obs(small, model, bin_um):
    sge.tl.predict(small, model=model, encoder=Colours(), bin_um=bin_um)
    table, frame = small.tables[KEY], small.shapes[NAME]
    obs, px = table.obs, table.obsm["spatial"]
    assert list(obs["instance_id"]) == list(frame.index)
    matrix = get_transformation(frame, to_coordinate_system="synthetic").to_affine_matrix(AXES, AXES)
    um = shapely.transform(frame.geometry.to_numpy(), lambda xy: xy @ matrix[:2, :2].T + matrix[:2, 2])
    np.testing.assert_allclose(shapely.area(um), bin_um**2, rtol=1e-6)
    bounds = shapely.bounds(um)
    np.testing.assert_allclose(bounds[:, 2:] - bounds[:, :2], bin_um, rtol=1e-6)  # along the image's axes
    np.testing.assert_allclose((bounds[:, :2] + bounds[:, 2:]) / 2, px * MPP, atol=1e-6)
    # one step of row or column is one bin
    corner = px * MPP / bin_um - obs[["array_col", "array_row"]].to_numpy()
    np.testing.assert_allclose(corner, np.broadcast_to(corner[0], corner.shape), atol=1e-6)
    assert not obs[["array_row", "array_col"]].duplicated().any()
    spots = small.tables["table"].obsm["spatial"]
    distance = np.sqrt(((px[:, None] - spots[None]) ** 2).sum(-1)).min(1) * MPP
    np.testing.assert_allclose(obs["distance_to_spot_um"], distance, atol=1e-3)
    assert (obs["in_spot"].to_numpy() == (distance <= 27.5)).all()
    assert not obs["is_spot"].any()
    # a disc of 55 µm in a hexagon of the pitch
    assert obs["in_spot"].mean() == pytest.approx(np.pi * 27.5**2 / (100**2 * np.sqrt(0.75)), abs=0.06)


def test_rasterize_bins(predicted):
    """Every value lands in the pixel of its row and column, and that pixel lies where the bin lies."""
    table = predicted.tables[KEY]
    raster = sd.rasterize_bins(
        predicted,
        bins=NAME,
        table_name=KEY,
        col_key="array_col",
        row_key="array_row",
        value_key=list(table.var_names[:2]),
    )
    values = np.asarray(raster.transpose("y", "x", "c"))
    row, col = (table.obs[c].to_numpy() - table.obs[c].min() for c in ("array_row", "array_col"))
    np.testing.assert_allclose(values[row, col], table.X[:, :2], rtol=1e-6)
    matrix = get_transformation(raster, to_coordinate_system="synthetic").to_affine_matrix(AXES, AXES)
    found = np.column_stack([col, row]) @ matrix[:2, :2].T + matrix[:2, 2]
    np.testing.assert_allclose(found, table.obsm["spatial"] * MPP, atol=0.5)


@pytest.mark.slow
def test_scanpy_goes_on_from_here(predicted):
    import scanpy as sc

    table = predicted.tables[KEY]
    table = table[np.random.default_rng(0).permutation(table.n_obs)[:600]].copy()
    sc.pp.pca(table, n_comps=5)
    sc.pp.neighbors(table)
    sc.tl.leiden(table, flavor="igraph", n_iterations=2)
    assert 2 <= table.obs["leiden"].nunique() <= 60


def test_round_trip(predicted, tmp_path):
    predicted.write(tmp_path / "s.zarr")
    back = sd.read_zarr(tmp_path / "s.zarr")
    same_table(back.tables[KEY], predicted.tables[KEY])
    same_shapes(back.shapes[NAME], predicted.shapes[NAME])


@pytest.mark.slow
def test_dense_bins_are_nearer_to_the_truth():
    """Glands of 40 µm: a tile around each bin blurs them, tokens do not."""
    sdata = sge.datasets.synthetic(n_rows=8, n_cols=8, n_genes=30, mpp=1.0, gland_um=40)
    sge.pp.targets(sdata, bin_um=8)
    truth = sge.datasets.synthetic_truth(sdata, target_key=NAME)
    pcc = {}
    for dense in (True, False):
        ask = {"encoder": "stain-texture", "head": "kriging", "genes": "all", "n_folds": 2}
        table = sge.tl.predict(sdata, bin_um=8, dense=dense, inplace=False, **ask)
        wanted = truth.loc[table.obs["instance_id"], table.var_names].to_numpy()
        pcc[dense] = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(table.X.T, wanted.T, strict=True)])
    assert pcc[True] > pcc[False] + 0.03  # measured: 0.856 and 0.805
    assert pcc[True] > 0.8


# ------------------------------------------------------------------------------------------------ places of the user

TURN = np.array([[0.3, -0.4, 11.0], [0.4, 0.3, -7.0], [0, 0, 1]])
"""From own coordinates to µm of ``"synthetic"``: turned, half as large, moved."""


def add_shapes(sdata, name, px, *, index=None, **columns):
    """Add shapes that lie at ``px``, in pixels of the image, in turned and scaled coordinates of their own."""
    back = np.linalg.inv(TURN)
    own = shapely.transform(
        np.asarray(px, dtype=object), lambda xy: (xy * MPP) @ back[:2, :2].T + back[:2, 2] if len(xy) else xy
    )
    frame = gpd.GeoDataFrame(columns, geometry=own, index=index)
    frame.attrs["transform"] = {"synthetic": Affine(TURN, input_axes=AXES, output_axes=AXES)}
    sdata.shapes[name] = frame
    return frame


def cells_of(sdata, n=40, seed=0):
    """Outlines of about 12 µm around places on the section, in pixels of the image."""
    random = np.random.default_rng(seed)
    spots = sdata.tables["table"].obsm["spatial"]
    centre = spots[random.integers(0, len(spots), n)] + random.uniform(-20, 20, (n, 2))
    corners = np.linspace(0, 2 * np.pi, 9)[:-1]
    ring = np.stack([np.cos(corners), np.sin(corners)], 1) * random.uniform(2, 5, (n, 8, 1))
    return list(shapely.polygons(centre[:, None] + ring))


def mean_colours(sdata, areas):
    """Area means of the colours of 6 µm cells, by shapely's own hand."""
    pixels = np.asarray(sd.get_pyramid_levels(sdata.images["he"], n=0).data)
    height, width = (s // CELL for s in pixels.shape[1:])
    cells = pixels[:, : height * CELL, : width * CELL].reshape(3, height, CELL, width, CELL).mean((2, 4))
    row, col = (a.ravel() for a in np.indices((height, width)))
    boxes = shapely.box(col * CELL, row * CELL, (col + 1) * CELL, (row + 1) * CELL)
    tree = shapely.STRtree(boxes)
    found = np.empty((len(areas), 3))
    for i, area in enumerate(areas):
        near = tree.query(area)
        share = shapely.area(shapely.intersection(boxes[near], area))
        found[i] = share @ cells[:, row[near], col[near]].T / share.sum()
    return found


def embedded(sdata, key, **kwargs):
    table = sge.tl.embed(sdata, target_key=key, encoder=Colours(), dense=True, inplace=False, **kwargs)
    return table.obsm["X_colours"]


def test_outlines_of_cells(small, model):
    """Turned and scaled coordinates of their own, names, another order than by place."""
    px = cells_of(small)
    names = [f"cell-{i:02d}" for i in np.random.default_rng(1).permutation(len(px))]
    add_shapes(small, "cells", px, index=names)
    np.testing.assert_allclose(embedded(small, "cells")[:, :3], mean_colours(small, px), rtol=1e-4)
    sge.tl.predict(small, model=model, encoder=Colours(), target_key="cells")
    table = small.tables[KEY]
    assert list(table.obs["instance_id"]) == names
    assert list(table.obs["region"].unique()) == ["cells"]
    assert "array_row" not in table.obs
    np.testing.assert_allclose(
        table.obsm["spatial"], shapely.get_coordinates(shapely.centroid(np.array(px))), atol=1e-6
    )
    # smaller than a spot: dense without being asked
    assert sge.tl.predict(small, target_key="cells", inplace=False, **FAST).uns["histosge"]["dense"] is True


def test_multipolygons(small):
    a, b = cells_of(small, n=2)
    add_shapes(small, "cells", [shapely.MultiPolygon([a, shapely.affinity.translate(a, 15, 4)]), b])
    both = shapely.union(a, shapely.affinity.translate(a, 15, 4))
    np.testing.assert_allclose(embedded(small, "cells")[:, :3], mean_colours(small, [both, b]), rtol=1e-4)


def test_circles_have_their_own_size(small):
    centres = np.array(shapely.get_coordinates(shapely.centroid(np.array(cells_of(small)))))
    add_shapes(small, "round", list(shapely.points(centres)), radius=np.full(40, 12.0))  # of a half µm
    wanted = [shapely.Point(c).buffer(6 / MPP, quad_segs=64) for c in centres]
    np.testing.assert_allclose(embedded(small, "round")[:, :3], mean_colours(small, wanted), rtol=2e-3)


def test_spots_drawn_too_large_are_physical_spots(small):
    """The circles are 65 µm wide, as readers draw them; 55 µm are measured."""
    spots = small.shapes["spots"]
    copied = gpd.GeoDataFrame({"radius": spots["radius"].to_numpy()}, geometry=spots.geometry.to_numpy())
    small.shapes["others"] = ShapesModel.parse(copied, transformations=get_transformation(spots, get_all=True))
    section = read_section(small, spots_key="spots")
    found = read_targets(small, section, "others")
    np.testing.assert_allclose(found.footprints.size_px * section.mpp, 55, rtol=1e-6)
    assert (found.spot_index >= 0).all()
    assert not smaller_than_spot(section, found)
    others, own = (
        sge.tl.embed(small, target_key=k, encoder=Colours(), dense=True, spots_key="spots", inplace=False)
        for k in ("others", "spots")
    )
    rows = pd.Index(spots.index).get_indexer(own.obs["instance_id"])
    np.testing.assert_allclose(others.obsm["X_colours"][rows], own.obsm["X_colours"], rtol=1e-5)


def test_what_lies_at_a_spot_is_the_spot_only_if_as_large(small):
    """A cell in the middle of a spot was not measured there: nothing is hidden from it."""
    px = small.tables["table"].obsm["spatial"][:20]
    add_shapes(small, "cells", [shapely.Point(p).buffer(4) for p in px])
    add_shapes(small, "round", list(shapely.points(px)), radius=np.full(20, 12.0))
    add_shapes(small, "wide", list(shapely.points(px)), radius=np.full(20, 60.0))  # 30 µm
    section = read_section(small, spots_key="spots")
    for key, spot in (("cells", False), ("round", False), ("wide", True)):
        found = read_targets(small, section, key)
        assert (found.spot_index >= 0).all() == (found.spot_index >= 0).any() == spot
        assert smaller_than_spot(section, found) is not spot


@pytest.mark.parametrize("upsample", [2, 8])
def test_laid_places_stand_for_spots(small, upsample):
    """They are drawn as wide as their step, and are the same places whether laid before or at once."""
    at_once = sge.tl.predict(small, upsample=upsample, inplace=False, **FAST)
    sge.pp.targets(small, upsample=upsample)
    by_step = sge.tl.predict(small, target_key=NAME, inplace=False, **FAST)
    assert by_step.uns["histosge"]["dense"] is False
    np.testing.assert_allclose(by_step.X, at_once.X, atol=ALIKE)
    dense = sge.tl.predict(small, upsample=upsample, dense=True, inplace=False, **FAST)
    by_step = sge.tl.predict(small, target_key=NAME, dense=True, inplace=False, **FAST)
    np.testing.assert_allclose(by_step.X, dense.X, atol=ALIKE)


def test_bins_of_another_table(small, model):
    """Squares that are there already are the same as squares that are laid."""
    sge.pp.targets(small, bin_um=16, key_added="hd")
    ask = {"model": model, "encoder": Colours(), "inplace": False}
    theirs = sge.tl.predict(small, target_key="hd_targets", **ask)
    laid = sge.tl.predict(small, bin_um=16, **ask)
    np.testing.assert_allclose(theirs.X, laid.X, atol=ALIKE)
    pd.testing.assert_frame_equal(
        theirs.obs.drop(columns="region"), laid.obs.drop(columns="region").set_axis(theirs.obs_names)
    )


def spoil(px):
    """A bow tie, nothing, one off the image, among good ones."""
    x, y = px[2].centroid.coords[0]
    px[2] = shapely.Polygon([(x, y), (x + 5, y + 5), (x + 5, y), (x, y + 4)])
    px[5] = shapely.Polygon()
    px[7] = shapely.affinity.translate(px[7], -2000, 0)
    return px


def test_invalid_outlines_are_listed(small):
    add_shapes(small, "cells", spoil(cells_of(small)), index=[f"c{i}" for i in range(40)])
    said = refuses(small, "target_key='cells': 2 of 40 shapes are not valid", target_key="cells")
    assert "and 1 of 40 shapes lie outside the image 'he' (for example ['c2', 'c5', 'c7'])" in said
    assert "shapely.make_valid" in said
    assert "on_invalid='skip'" in said


@pytest.mark.parametrize("to_store", [False, True])
def test_invalid_outlines_are_left_out(small, model, log, tmp_path, to_store):
    px = cells_of(small)
    add_shapes(small, "cells", px, index=[f"c{i}" for i in range(40)])
    ask = {"model": model, "encoder": Colours(), "target_key": "cells", "inplace": False}
    whole = sge.tl.predict(small, **ask)
    del small.shapes["cells"]
    add_shapes(small, "cells", spoil(px), index=[f"c{i}" for i in range(40)])
    log.clear()
    store = {"store": tmp_path / "s.zarr"} if to_store else {}
    rest = sge.tl.predict(small, on_invalid="skip", **ask, **store)
    warned = [m for m in told(log) if "leaving them out" in m]
    assert len(warned) == 1
    assert "['c2', 'c5', 'c7']" in warned[0]
    kept = [f"c{i}" for i in range(40) if i not in (2, 5, 7)]
    assert sorted(rest.obs["instance_id"]) == sorted(kept)
    rows = pd.Index(whole.obs["instance_id"]).get_indexer(rest.obs["instance_id"])
    np.testing.assert_allclose(np.asarray(rest.X), whole.X[rows], atol=ALIKE)
    if to_store:
        assert sorted(sd.read_zarr(tmp_path / "s.zarr").shapes["cells"].index) == sorted(kept)


def test_nothing_but_invalid_outlines(small):
    add_shapes(small, "cells", [shapely.affinity.translate(p, 9000, 0) for p in cells_of(small)])
    for on_invalid in ("raise", "skip"):
        refuses(small, "40 of 40 shapes lie outside", target_key="cells", on_invalid=on_invalid)


def test_unknown_way_with_invalid_outlines(small):
    refuses(small, "on_invalid='x': choose 'raise', or 'skip'", target_key="spots", on_invalid="x")


# ------------------------------------------------------------------------------------------------------ what is refused


def test_bins_below_the_token_are_told(small, model, log, tmp_path):
    said = "bins of 2 µm are smaller than the tokens of 'colours' (6 µm): the tokens limit the resolution"
    ask = {"model": model, "encoder": Colours(), "inplace": False}
    few = copy_of(small)
    table = few.tables.pop("table")
    few.tables["table"] = table[np.argsort(table.obsm["spatial"][:, 1])[:30]].copy()
    sge.tl.predict(few, bin_um=2, **ask)
    assert told(log) == [said]
    log.clear()
    sge.tl.predict(few, bin_um=2, store=tmp_path / "s.zarr", **ask)
    assert told(log) == [said]
    log.clear()
    sge.tl.predict(small, bin_um=8, **ask)
    sge.tl.predict(small, bin_um=16, **ask)
    assert told(log) == []
    add_shapes(small, "cells", [p.centroid.buffer(1) for p in cells_of(small)])
    sge.tl.embed(small, target_key="cells", encoder=Colours(), dense=True)
    assert told(log) == [
        "targets of 3 µm are smaller than the tokens of 'colours' (6 µm): the tokens limit the resolution"
    ]
    log.clear()
    sge.tl.embed(small, target_key="cells", encoder=Colours(), dense=False)
    assert not any("token" in m for m in told(log))


@pytest.mark.parametrize("bin_um", [0.5, 0.99, 0, -8, 55.1, 100, float("nan")])
def test_sizes_of_bins(small, bin_um):
    said = refuses(small, "bins must be at least 1 µm wide and no wider than a measured spot", bin_um=bin_um)
    assert f"bin_um={bin_um!r}" in said
    assert "(55 µm)" in said
    assert "pass upsample=" in said


class Mean(nn.Module):
    """A user's own module: no tokens."""

    def forward(self, x):
        return x.mean((2, 3))


def test_an_encoder_without_tokens(small):
    spec = sge.EncoderSpec(name="mean", mpp=1.0, tile_px=48, embed_dim=3)
    ask = FAST | {"encoder": sge.load_encoder(Mean(), spec=spec)}
    for call, what in (
        (sge.tl.predict, {"bin_um": 16}),
        (sge.tl.predict, {"upsample": 2, "dense": True}),
        (sge.tl.fit, {"dense": True}),
    ):
        # at 1 µm per pixel the image need not be fine, so the scale is given
        with pytest.raises(ValueError, match=r"encoder 'mean' gives no tokens below its tile") as found:
            call(sge.datasets.synthetic(n_rows=7, n_cols=7, n_genes=5, mpp=1.5), **ask, **what)
        assert "'stain-texture'" in str(found.value)
        assert "dense=False" in str(found.value)


def test_bins_from_tiles_where_that_is_asked(small):
    """dense=False is the way of an encoder without tokens."""
    spec = sge.EncoderSpec(name="mean", mpp=1.0, tile_px=48, embed_dim=3)
    fine = sge.datasets.synthetic(n_rows=7, n_cols=7, n_genes=5, mpp=1.5)
    ask = FAST | {"encoder": sge.load_encoder(Mean(), spec=spec), "genes": 5}
    table = sge.tl.predict(fine, bin_um=30, dense=False, inplace=False, **ask)
    assert table.uns["histosge"]["dense"] is False
    assert table.X.std(0).min() > 0


def test_a_model_keeps_its_way(small, model):
    """Dense or not is the model's; to contradict it is an error."""
    tiles = sge.tl.fit(small, **FAST)
    assert tiles.config.dense is False
    assert model.config.dense is True
    for one in (tiles, model):
        ask = {"model": one, "encoder": Colours(), "inplace": False}
        for what in ({"bin_um": 16}, {"upsample": 2}):
            assert sge.tl.predict(small, **ask, **what).uns["histosge"]["dense"] is one.config.dense
        same = sge.tl.predict(small, bin_um=16, dense=one.config.dense, **ask)
        assert same.uns["histosge"]["dense"] is one.config.dense
        other = not one.config.dense
        said = refuses(small, f"dense={other}, but the model", bin_um=16, dense=other, **ask)
        assert f"trained with dense={one.config.dense}" in said


def test_dense_survives_saving(model, tmp_path):
    model.save(tmp_path)
    loaded = sge.Model.load(tmp_path)
    assert loaded.config == model.config
    assert loaded.config.token_um == 6.0
    assert loaded.fingerprint() == model.fingerprint()


def test_dense_embeddings_are_not_taken_for_others(small, log):
    """What was embedded as tiles is not used for areas."""
    sge.tl.embed(small, encoder=Colours())
    log.clear()
    with sge.settings.override(verbosity=2):
        sge.tl.fit(small, dense=True, **FAST)
    assert "table 'spots_colours' was made with other dense: embedding again" in told(log, logging.INFO)
    sge.tl.embed(small, encoder=Colours(), dense=True)
    log.clear()
    with sge.settings.override(verbosity=2):
        sge.tl.fit(small, dense=True, **FAST)
    assert "using the embeddings of sdata.tables['spots_colours']" in told(log, logging.INFO)


def test_evaluation_is_dense_as_well(small):
    ask = FAST | {"genes": 5}
    ask |= {"heads": [ask.pop("head")], "n_splits": 2, "buffer_um": 50}
    dense, tiles = (sge.tl.evaluate(small, dense=dense, **ask) for dense in (True, False))
    assert len(dense) == len(tiles) > 0
    assert not dense.equals(tiles)


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ({"upsample": 4}, r"conserve=True lays bins of at most half a spot \(27\.5 µm\): pass bin_um="),
        ({}, "conserve=True lays bins of at most half a spot"),
        ({"target_key": "spots"}, "conserve=True lays bins of at most half a spot"),
        ({"bin_um": 28}, "conserve=True lays bins of at most half a spot"),
    ],
)
def test_conservation_is_for_small_bins(small, what, why):
    assert refuses(small, why, conserve=True, **what).endswith("or leave conserve= out.")


def test_conservation_needs_counts(small):
    table = small.tables["table"]
    table.layers["counts"] = table.X.copy()
    table.X = sparse.csr_matrix(table.X).log1p()
    refuses(small, "conserve=True needs raw counts, whose noise is known: name them, layer=", conserve=True, bin_um=16)
    found = sge.tl.predict(small, conserve=True, bin_um=16, layer="counts", inplace=False, **FAST)
    assert "conserved" in found.layers


# ----------------------------------------------------------------------------------------------------------- memory


def test_memory_is_checked_by_its_size():
    assert check_memory(1000, 1000, n_layers=3, available=24_000_000) is None
    with pytest.raises(MemoryError) as found:
        check_memory(4_194_304, 1024, n_layers=3, available=2**35)
    said = str(found.value)
    assert "the table of 4,194,304 targets x 1,024 genes takes 64.0 GiB" in said
    assert "to predict it 96.0 GiB, but 32.0 GiB of memory are free" in said
    assert "store='NAME.zarr'" in said
    assert "fewer genes=, larger bins." in said


def memory(n, genes, *, n_layers=0):
    """Gigabytes that a table and its prediction take."""
    return 1.5e-9 * 4 * n * genes * (1 + n_layers)


def test_memory_is_checked_before_the_work(small, model, log, tmp_path):
    ask = {"model": model, "encoder": Colours(), "bin_um": 16}
    with sge.settings.override(memory_gb=1e-5):
        refuses(small, "GiB of memory are free", error=MemoryError, bin_um=16)
        refuses(small, "GiB of memory are free", error=MemoryError, bin_um=16, model=model)
        assert "embedding" not in log.text
        # a store needs none
        assert sge.tl.predict(small, store=tmp_path / "s.zarr", **ask) is None


def test_memory_is_that_of_the_layers_and_genes_asked_for(small, model):
    """A hundredth less is too little, a hundredth more is enough; conserved bins take twice as much."""
    n = len(sge.pp.targets(small, bin_um=16, inplace=False))
    for genes, n_genes in (("all", 20), (np.int64(5), 5), (1000, 20), (["GENE000", "GENE001"], 2)):
        with sge.settings.override(memory_gb=0.99 * memory(n, n_genes)):
            refuses(small, f"table of {n:,} targets x {n_genes} genes", error=MemoryError, bin_um=16, genes=genes)
        with sge.settings.override(memory_gb=1.01 * memory(n, n_genes)):
            sge.tl.predict(small, bin_um=16, inplace=False, **FAST | {"genes": genes})
    ask = {"model": model, "encoder": Colours(), "bin_um": 16, "conserve": True, "inplace": False}
    with sge.settings.override(memory_gb=0.99 * memory(n, 10, n_layers=1)):
        refuses(small, f"table of {n:,} targets x 10 genes", error=MemoryError, **ask)
    with sge.settings.override(memory_gb=1.01 * memory(n, 10, n_layers=1)):
        sge.tl.predict(small, **ask)


# ------------------------------------------------------------------------------------------------------------ stores


def plain(value):
    """What ``uns`` holds, alike before and after a disk."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (np.ndarray, list, tuple)):
        return [plain(v) for v in np.asarray(value).tolist()]
    return value.item() if isinstance(value, np.generic) else value


def same_table(found, wanted, *, atol=0.0):
    """Equal in all, after aligning by instance."""
    found = found[pd.Index(found.obs["instance_id"]).get_indexer(wanted.obs["instance_id"])]
    assert found.n_obs == wanted.n_obs
    pd.testing.assert_frame_equal(found.obs, wanted.obs, atol=1e-3)
    pd.testing.assert_frame_equal(found.var, wanted.var, rtol=1e-3 if atol else 1e-12)
    assert found.layers.keys() == wanted.layers.keys()
    for name in wanted.layers:
        a, b = (np.asarray(t.layers[name]) for t in (found, wanted))
        np.testing.assert_allclose(a, b, atol=atol, rtol=0, err_msg=str(name))
    np.testing.assert_allclose(np.asarray(found.X), wanted.X, atol=atol, rtol=0)
    np.testing.assert_allclose(found.obsm["spatial"], wanted.obsm["spatial"], atol=1e-9)
    assert found.obsm.keys() == wanted.obsm.keys()
    held = [plain(dict(t.uns)) for t in (found, wanted)]
    scores = [one["histosge"].pop("held_out") for one in held]
    assert scores[0].keys() == scores[1].keys()
    for head, score in scores[0].items():
        assert score == pytest.approx(scores[1][head], abs=atol)
    assert held[0] == held[1]


def same_shapes(found, wanted):
    found = found.loc[wanted.index]
    assert set(found.columns) == set(wanted.columns)
    assert found.geometry.geom_equals_exact(wanted.geometry, 1e-9).all()
    pd.testing.assert_frame_equal(
        pd.DataFrame(found.drop(columns="geometry")),
        pd.DataFrame(wanted.drop(columns="geometry"))[[c for c in found.columns if c != "geometry"]],
    )
    assert set(get_transformation(found, get_all=True)) == set(get_transformation(wanted, get_all=True))


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("what", [{"bin_um": 16, "conserve": True}, {"upsample": 16}])
def test_a_store_is_what_memory_would_be(small, tmp_path, what):
    sge.tl.predict(small, **what, **FAST)
    before = elements(small)
    path = tmp_path / "out.zarr"
    assert sge.tl.predict(small, store=path, **what, **FAST) is None
    assert elements(small) == before
    back = sd.read_zarr(path)
    assert (set(back.shapes), set(back.tables), set(back.images)) == ({NAME}, {KEY}, set())
    same_table(back.tables[KEY], small.tables[KEY], atol=ALIKE)
    same_shapes(back.shapes[NAME], small.shapes[NAME])
    assert list(back.shapes[NAME].index) == list(back.tables[KEY].obs["instance_id"])
    assert [p.name for p in tmp_path.iterdir()] == ["out.zarr"]


def test_a_store_of_a_model_gives_a_lazy_table(small, model, tmp_path):
    import dask.array as da

    ask = {"model": model, "encoder": Colours(), "bin_um": 16, "inplace": False}
    table = sge.tl.predict(small, store=tmp_path / "out.zarr", key_added="mine", **ask)
    assert isinstance(table.X, da.Array)
    assert set(table.layers) - {None} == set()
    assert set(sd.read_zarr(tmp_path / "out.zarr").shapes) == {"mine_targets"}
    wanted = sge.tl.predict(small, key_added="mine", **ask)
    same_table(table.to_memory(), wanted, atol=ALIKE)
    assert set(small.tables) == {"table"}
    assert set(small.shapes) == {"spots"}


@pytest.mark.usefixtures("small_parts")
def test_a_store_of_the_users_shapes(small, model, tmp_path):
    """They are written in their own coordinates, under their own name."""
    frame = add_shapes(small, "cells", cells_of(small), index=[f"c{i}" for i in range(40)], kind=["a", "b"] * 20)
    ask = {"model": model, "encoder": Colours(), "target_key": "cells"}
    sge.tl.predict(small, store=tmp_path / "out.zarr", **ask)
    wanted = sge.tl.predict(small, inplace=False, **ask)
    back = sd.read_zarr(tmp_path / "out.zarr")
    same_table(back.tables[KEY], wanted, atol=ALIKE)
    same_shapes(back.shapes["cells"], frame)
    matrix = get_transformation(back.shapes["cells"], to_coordinate_system="synthetic").to_affine_matrix(AXES, AXES)
    np.testing.assert_allclose(matrix, TURN)


def test_a_store_that_is_there_is_refused_before_the_work(small, tmp_path, log):
    (tmp_path / "out.zarr").mkdir()
    said = refuses(small, "exists already", error=FileExistsError, bin_um=16, store=tmp_path / "out.zarr")
    assert "choose another store=, or remove it first" in said
    (tmp_path / "b.zarr.partial").mkdir()
    (tmp_path / "b.zarr.partial" / "mine.txt").write_text("x")
    refuses(small, "is not histosge's", error=FileExistsError, bin_um=16, store=tmp_path / "b.zarr")
    assert "embedding" not in log.text


@contextmanager
def interrupt(part):
    """Stop a run, as Ctrl-C does, when it begins a given part: the log has a line for each that is embedded."""
    logger, left = logging.getLogger("histosge"), [part]

    def stop(record):
        if record.levelno == logging.DEBUG and record.getMessage().startswith("embedding "):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
        return True

    logger.addFilter(stop)
    with sge.settings.override(verbosity=3):
        try:
            yield
        finally:
            logger.removeFilter(stop)


def n_fits(log):
    return sum(message.startswith("fitting ") for message in told(log, logging.INFO))


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("with_model", [False, True])
def test_an_interrupted_run_continues(small, model, tmp_path, log, with_model):
    ask = {"bin_um": 16, "conserve": True} | ({"model": model, "encoder": Colours()} if with_model else FAST)
    sge.tl.predict(small, store=tmp_path / "whole.zarr", **ask)
    assert n_fits(log) == (not with_model)
    assert "predicted 3 of 3 parts" in log.text
    with interrupt(1), pytest.raises(KeyboardInterrupt):
        sge.tl.predict(small, store=tmp_path / "out.zarr", **ask)
    assert not (tmp_path / "out.zarr").exists()
    log.clear()
    sge.tl.predict(small, store=tmp_path / "out.zarr", **ask)
    assert n_fits(log) == 0
    assert "predicted 2 of 3 parts" in log.text
    assert "resuming out.zarr: 1 of 3 parts are there" in told(log, logging.INFO)
    assert "using the model that was fitted before the interruption" in told(log, logging.INFO)
    a, b = (sd.read_zarr(tmp_path / f"{name}.zarr") for name in ("out", "whole"))
    same_table(a.tables[KEY], b.tables[KEY])
    same_shapes(a.shapes[NAME], b.shapes[NAME])
    assert list(a.tables[KEY].obs_names) == list(b.tables[KEY].obs_names)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.zarr", "whole.zarr"]


@pytest.mark.usefixtures("in_parts")
def test_another_run_does_not_continue_its_parts(small, model, tmp_path):
    """Other arguments and other data are refused, and what is there stays."""
    path = tmp_path / "out.zarr"
    ask = FAST | {"bin_um": 16, "store": path}
    with interrupt(1), pytest.raises(KeyboardInterrupt):
        sge.tl.predict(small, **ask)
    there = sorted(p.name for p in (tmp_path / "out.zarr.partial").rglob("*.done"))
    other_counts = copy_of(small)
    other_counts.tables["table"].X[0] = 1
    for sdata, change in (
        (small, {"rng": 1}),
        (small, {"head": "nearest"}),
        (small, {"genes": 9}),
        (small, {"n_folds": 3}),
        (small, {"conserve": True}),
        (small, {"bin_um": 16.5}),
        (small, {"dense": False}),
        (small, {"key_added": "b"}),
        (small, {"encoder": [Colours(), "rgb"]}),
        (small, {"mpp": 1.45}),
        (small, {"encoder": Colours(name="other")}),
        (small, {"model": model}),
        (other_counts, {}),
    ):
        with pytest.raises((ValueError, FileExistsError), match=r"out\.zarr"):
            sge.tl.predict(sdata, **ask | change)
    assert sorted(p.name for p in (tmp_path / "out.zarr.partial").rglob("*.done")) == there
    # what changes nothing of the result is no other run
    sge.tl.predict(small, **ask | {"batch_size": 7, "device": "cpu", "inplace": False})


@pytest.mark.usefixtures("in_parts")
def test_a_head_object_of_other_options_is_another_run(small, tmp_path, log):
    """The same name, but other neighbours; and a head of which nobody can tell."""
    nearest = get_head("nearest")
    ask = FAST | {"bin_um": 16, "store": tmp_path / "out.zarr"}
    with interrupt(1), pytest.raises(KeyboardInterrupt):
        sge.tl.predict(small, **ask | {"head": nearest(n_neighbours=4)})
    with pytest.raises(ValueError, match=r"head is \"nearest [0-9a-f]+.*, was \"nearest [0-9a-f]+"):
        sge.tl.predict(small, **ask | {"head": nearest(n_neighbours=5)})
    log.clear()
    sge.tl.predict(small, **ask | {"head": nearest(n_neighbours=4)})
    assert n_fits(log) == 0
    odd = nearest()
    odd.rule = lambda distance: distance
    with pytest.raises(TypeError, match=r"head=.* cannot be pickled .*With store=, pass its class, with head_options="):
        sge.tl.predict(small, **ask | {"head": odd, "store": tmp_path / "odd.zarr"})
    assert not list(tmp_path.glob("odd*"))


@pytest.mark.usefixtures("small_parts")
def test_outlines_that_changed_are_another_run(small, model, tmp_path):
    """The same names and centres, but wider; and the same shapes at another scale."""
    px = [p.centroid.buffer(3) for p in cells_of(small)]
    add_shapes(small, "cells", px)
    ask = {"model": model, "encoder": Colours(), "target_key": "cells", "store": tmp_path / "out.zarr"}
    with interrupt(1), pytest.raises(KeyboardInterrupt):
        sge.tl.predict(small, **ask)
    with pytest.raises((ValueError, FileExistsError), match=r"out\.zarr"):
        sge.tl.predict(small, mpp=1.45, **ask)
    del small.shapes["cells"]
    add_shapes(small, "cells", [p.centroid.buffer(4) for p in px])
    with pytest.raises((ValueError, FileExistsError), match=r"out\.zarr"):
        sge.tl.predict(small, **ask)


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
import test_bins as t
from histosge._section import TableStore
t.sge.settings.part_rows = 900
real = TableStore.write
def write(self, part, matrices):
    if part == 1:  # the second part is not written
        time.sleep(60)
    return real(self, part, matrices)
TableStore.write = write
sdata = t.sge.datasets.synthetic(n_rows=8, n_cols=8, n_genes=20, mpp=t.MPP)
t.sge.tl.predict(sdata, store={store!r}, bin_um=16, **t.FAST)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("in_parts")
def test_a_killed_run_continues(small, tmp_path, log):
    store = tmp_path / "out.zarr"
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), store=str(store)))
    with subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL) as run:
        try:
            until = time.monotonic() + 600
            while not list(store.with_name("out.zarr.partial").glob("*/parts/*.done")):
                assert run.poll() is None, "it ended by itself"
                assert time.monotonic() < until, "it never wrote a part"
                time.sleep(0.05)
        finally:
            run.kill()
        assert run.wait() == -signal.SIGKILL
    assert not store.exists()
    ask = {"bin_um": 16} | FAST
    sge.tl.predict(small, store=store, **ask)
    assert n_fits(log) == 0
    assert "predicted 2 of 3 parts" in log.text
    sge.tl.predict(small, store=tmp_path / "whole.zarr", **ask)
    a, b = (sd.read_zarr(p) for p in (store, tmp_path / "whole.zarr"))
    same_table(a.tables[KEY], b.tables[KEY])
    same_shapes(a.shapes[NAME], b.shapes[NAME])


def test_a_model_that_was_half_saved_is_fitted_again(small, tmp_path, log):
    ask = {"bin_um": 16, "store": tmp_path / "out.zarr"} | FAST
    with interrupt(0), pytest.raises(KeyboardInterrupt):
        sge.tl.predict(small, **ask)
    next((tmp_path / "out.zarr.partial").rglob("histosge.safetensors")).unlink()
    sge.tl.predict(small, **ask)
    assert n_fits(log) == 2


@pytest.mark.parametrize("name", ["model/histosge.safetensors", "spots.safetensors"])
def test_a_damaged_model_of_an_interrupted_run_is_refused(small, tmp_path, name):
    ask = {"bin_um": 16, "store": tmp_path / "out.zarr"} | FAST
    with interrupt(0), pytest.raises(KeyboardInterrupt):
        sge.tl.predict(small, **ask)
    path = next((tmp_path / "out.zarr.partial").glob("run-*")) / "work" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        sge.ModelError, match=rf"{name}: its sha256 is .* remove '.*out\.zarr\.partial.run-\w+' and start again"
    ):
        sge.tl.predict(small, **ask)


# ------------------------------------------------------------------------------------------------------ conservation


def conserved_and_target(sdata, table, *, model=None):
    """Mean over each spot of what was conserved, of what was predicted, and of what was measured: rates (n, genes)."""
    section = read_section(sdata, report=False, table_key="table")
    edge_px = 16 / section.mpp
    row, col = (table.obs[c].to_numpy() for c in ("array_row", "array_col"))
    share = spot_by_bin(section.footprints, table.obsm["spatial"], bin_px=edge_px, row=row, col=col)
    rates = [np.expm1(np.asarray(values, np.float64)) for values in (table.layers["conserved"], table.X)]
    return section, share, *(share @ r for r in rates)


def test_bins_average_to_their_shrunken_spot(small):
    """The target is what the package says it is: recomputed from its own parts, then met by the bins."""
    table = sge.tl.predict(small, bin_um=16, conserve=True, inplace=False, **FAST)
    section, share, after, before = conserved_and_target(small, table)
    at_spots = sge.tl.predict(small, target_key="spots", dense=True, inplace=False, **FAST)
    assert list(at_spots.var_names) == list(table.var_names)
    rows = pd.Index(at_spots.obs["instance_id"]).get_indexer(section.instances)
    measured, said = section.dense(table.var_names), at_spots.X[rows]
    counts = section.counts[:, section.genes.get_indexer(table.var_names)]
    noise = noise_variance(counts, total=np.asarray(section.counts.sum(axis=1)).ravel())
    shrunken = shrinkage(measured, said, noise=noise)
    assert (np.asarray(share.sum(1)).ravel() > 0.999).all()  # every spot has bins
    target = np.expm1(shrunken.mean)
    np.testing.assert_allclose(after, target, rtol=1e-5, atol=1e-5)
    assert np.abs(before - target).max() > 0.1  # there was something to do
    # between prediction and measurement, gene by gene
    low, high = np.minimum(measured, said), np.maximum(measured, said)
    assert ((shrunken.mean >= low - 1e-6) & (shrunken.mean <= high + 1e-6)).all()
    weight = table.var["shrinkage"].to_numpy()
    assert weight.dtype == np.float32
    assert ((weight >= 0) & (weight <= 1)).all()
    np.testing.assert_allclose(weight, shrunken.weight.mean(0), rtol=1e-5)


def test_conserved_bins(predicted):
    table = predicted.tables[KEY]
    conserved = table.layers["conserved"]
    assert conserved.dtype == np.float32
    assert np.isfinite(conserved).all()
    assert (conserved >= 0).all()
    far = table.obs["distance_to_spot_um"].to_numpy() > 50  # half the pitch
    assert 20 < far.sum() < table.n_obs / 2
    np.testing.assert_allclose(conserved[far], table.X[far], atol=1e-6)
    near = table.obs["in_spot"].to_numpy()
    assert np.abs(conserved[near] - table.X[near]).max() > 0.01
    assert set(table.layers) - {None} == {"conserved"}
    assert table.var["shrinkage"].between(0, 1).all()


def test_one_factor_for_the_bins_of_a_spot(predicted):
    """Under a spot the pattern of bins stays what it was: all are scaled alike."""
    table = predicted.tables[KEY]
    before, after = (np.expm1(np.float64(v)) for v in (table.X, table.layers["conserved"]))
    px = table.obsm["spatial"]
    spot = predicted.tables["table"].obsm["spatial"][11]
    under = np.flatnonzero(np.sqrt(((px - spot) ** 2).sum(1)) * MPP <= 27.5)
    gene = np.argmax(table.X.mean(0))
    factor = after[under, gene] / before[under, gene]
    assert len(under) >= 6
    np.testing.assert_allclose(factor, factor[0], rtol=1e-3)


@pytest.mark.usefixtures("in_parts")
def test_conservation_of_spots_that_overlap(small, tmp_path):
    """Spots that lie anywhere: a bin may be under two, and parts give what the whole gives."""
    frame = small.shapes["spots"]
    xy = np.column_stack([frame.geometry.x, frame.geometry.y])
    xy += np.random.default_rng(3).uniform(-70, 70, xy.shape)  # half µm
    circles = gpd.GeoDataFrame({"radius": 55.0}, geometry=shapely.points(xy), index=frame.index)
    where = get_transformation(frame, get_all=True)
    del small.shapes["spots"]
    small.shapes["spots"] = ShapesModel.parse(circles, transformations=where)
    ask = FAST | {"bin_um": 16, "conserve": True, "mpp": MPP}
    whole = sge.tl.predict(small, inplace=False, **ask)
    parts = sge.tl.predict(small, inplace=False, store=tmp_path / "s.zarr", **ask)
    same_table(parts.to_memory(), whole, atol=ALIKE)


# -------------------------------------------------------------------------------------------------------- Visium HD


@pytest.fixture(scope="module")
def _hd_once():
    return sge.datasets.synthetic(bin_um=16, n_rows=4, n_cols=4, n_genes=10, mpp=MPP)


@pytest.fixture
def hd(_hd_once):
    return copy_of(_hd_once)


BINS, COUNTS = "synthetic_square_016um", "square_016um"


def test_bins_of_visium_hd_as_input(hd):
    assert (set(hd.shapes), set(hd.tables)) == ({BINS}, {COUNTS})
    section = read_section(hd)
    assert (section.technology, section.contiguous, section.spot_um, section.mpp) == (
        "visium-hd",
        True,
        16,
        pytest.approx(MPP),
    )
    # the measured areas are the squares themselves, turned or not
    own = read_targets(hd, section, BINS)
    areas = section.footprints
    assert (
        own.spot_index == np.arange(len(own)) if (own.instances == section.instances).all() else own.spot_index >= 0
    ).all()
    np.testing.assert_allclose(areas.xy_px, section.xy_px, atol=1e-6)
    of_shapes = own.footprints.polygons[np.argsort(own.spot_index)]
    for mine, theirs in zip(areas.polygons, of_shapes, strict=True):
        assert mine.intersection(theirs).area == pytest.approx(theirs.area, rel=1e-3)
    table = sge.tl.predict(hd, bin_um=8, inplace=False, **FAST)
    assert table.uns["histosge"]["technology"] == "visium-hd"
    assert table.uns["histosge"]["dense"] is True
    assert table.obs["in_spot"][table.obs["distance_to_spot_um"] < 8].all()
    assert table.obs["in_spot"].mean() > 0.8  # those at the rim lie beyond the bins
    # four bins to one that was measured
    assert 3.2 < len(table) / len(section.xy_px) < 5.5


def test_every_bin_on_measured_tissue_is_in_a_spot(hd):
    """A bin inside a measured square, at its corner too."""
    section = read_section(hd)
    corners = section.xy_px[:, None] + np.array([[1, 1], [-1, 1], [1, -1], [-1, -1]]) * 0.49 * 16 / MPP
    px = [shapely.Point(p).buffer(1.0) for p in corners.reshape(-1, 2)[:200]]
    add_shapes(hd, "cells", px)
    table = sge.tl.predict(hd, target_key="cells", inplace=False, **FAST)
    assert table.obs["in_spot"].all()
    assert table.uns["histosge"]["dense"] is True


def test_a_turned_square_covers_itself():
    """Bins of a scanner that stood askew: footprints turn with their lattice."""
    angle = np.deg2rad(30)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    grid = np.stack(np.meshgrid(np.arange(12), np.arange(12)), -1).reshape(-1, 2).astype(float)
    sdata = sge.datasets.synthetic(bin_um=16, n_rows=4, n_cols=4, n_genes=3, mpp=MPP)
    section = read_section(sdata)
    xy = 150 + (grid - 6) @ turn.T * 8.0
    from histosge._geometry import estimate_lattice

    turned = dataclasses.replace(section, xy_px=xy, lattice=estimate_lattice(xy))
    areas = turned.footprints
    np.testing.assert_allclose(shapely.area(areas.polygons), 64, rtol=1e-3)
    corner = np.array([[-4, -4], [4, -4], [4, 4], [-4, 4]]) @ turn.T
    for area, centre in zip(areas.polygons, xy, strict=True):
        assert area.intersection(shapely.Polygon(centre + corner)).area == pytest.approx(64, rel=1e-3)
    # they leave no gap and do not overlap: all of the array is covered once
    assert shapely.union_all(areas.polygons).area == pytest.approx(144 * 64, rel=2e-3)
    share = area_fractions(areas, Grid(0, 0, 8.0, 40, 40))
    assert isinstance(areas, Footprints)
    np.testing.assert_allclose(share.sum(1), 1)


def test_conservation_is_not_for_visium_hd(hd):
    refuses(hd, "conserve=True is for spots with gaps between them, not for measured bins", bin_um=8, conserve=True)


def test_bins_wider_than_those_of_visium_hd(hd):
    refuses(hd, r"bin_um=20: .* no wider than a measured spot \(16 µm\)", bin_um=20)
