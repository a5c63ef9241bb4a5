"""The order of rows, shapes and genes, and the place and unit of coordinates, change no prediction."""

from __future__ import annotations

import os
import subprocess
import sys

import anndata as ad
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
import torch
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Affine

import histosge as sge
from histosge._section import read_section

AXES = ("x", "y")
EQUAL = 1e-4
"""Largest difference of log1p values where nothing should change."""
FEW = {"in-context": {"n_steps": 60}, "kriging": {"n_steps": 5}}
HEADS = {
    "in-context+kriging": FEW,
    "aggregate+kriging": {"aggregate": {"n_steps": 30}, "kriging": {"n_steps": 5}},
    "published": {"n_steps": 10},
    "ridge": None,
}


@pytest.fixture(scope="module")
def plain():
    """Pixels, spots, targets and counts in plain arrays."""
    section = read_section(sge.datasets.synthetic(n_rows=9, n_cols=9, n_genes=20, mpp=2.0), report=False)
    image = section.image
    random = np.random.default_rng(0)
    near = section.xy_px[:40] + random.uniform(-20, 20, (40, 2))
    return {
        "pixels": np.asarray(image.read(0, 0, image.width_px, image.height_px)),
        "xy": section.xy_px,
        "targets": np.clip(np.vstack([section.xy_px, near]), 1, [image.width_px - 1, image.height_px - 1]),
        "counts": section.counts.toarray(),
        "genes": section.genes.to_numpy(),
    }


def section_of(plain, *, rows=None, shapes=None, columns=None, system="here", world=None, own=None, dtype=np.float32,
               chunks=512):  # fmt: skip
    """Make the section; ``world`` (3, 3) leads from pixels to the coordinate system, ``own`` to those of the shapes."""
    n = len(plain["xy"])
    world, own = (np.eye(3) if matrix is None else matrix for matrix in (world, own))
    names, every = np.arange(n), slice(None)
    rows, shapes, columns = (every if order is None else order for order in (rows, shapes, columns))

    def circles(xy, diameter_px, index):
        frame = gpd.GeoDataFrame(
            {"radius": diameter_px / 2 * np.sqrt(abs(np.linalg.det(own[:2, :2])))},
            geometry=shapely.points(xy @ own[:2, :2].T + own[:2, 2]),
            index=index,
        )
        return ShapesModel.parse(frame, transformations={system: Affine(world @ np.linalg.inv(own), AXES, AXES)})

    image = Image2DModel.parse(
        plain["pixels"],
        dims=("c", "y", "x"),
        c_coords=["r", "g", "b"],
        chunks=(3, chunks, chunks),
        transformations={system: Affine(world, AXES, AXES)},
    )
    table = ad.AnnData(plain["counts"][rows][:, columns].astype(dtype), var=pd.DataFrame(index=plain["genes"][columns]))
    table.obs["region"], table.obs["name"] = pd.Categorical(["spots"] * n), names[rows]
    table.obs_names = [f"s{i}" for i in names[rows]]
    return SpatialData(
        images={"he": image},
        shapes={
            "spots": circles(plain["xy"][shapes], 27.5, names[shapes]),
            "targets": circles(plain["targets"], 8.0, np.arange(len(plain["targets"]))),
        },
        tables={"table": TableModel.parse(table, region="spots", region_key="region", instance_key="name")},
    )


def ask(sdata, head, *, rng=0):
    """Predict and score; genes in the order of their names."""
    table = sge.tl.predict(
        sdata, target_key="targets", encoder="stain-texture", head=head, head_options=HEADS[head], genes=12, n_folds=2,
        dense="aggregate" in head, rng=rng, inplace=False, progress=False,
    )  # fmt: skip
    values = pd.DataFrame(table.X, index=table.obs["instance_id"].to_numpy(), columns=table.var_names).sort_index(
        axis=1
    )
    return values, table.uns["histosge"]["held_out"][head]["pcc"], table.var["held_out_pcc"].sort_index()


def turned(plain, turns, *, mirror):
    """Turn image, spots and targets by 90 degrees, and mirror them."""
    pixels, points = plain["pixels"], [plain["xy"], plain["targets"]]
    for _ in range(turns):
        points = [np.column_stack([xy[:, 1], pixels.shape[2] - xy[:, 0]]) for xy in points]
        pixels = np.rot90(pixels, axes=(1, 2))
    if mirror:
        pixels, points = (
            pixels[:, :, ::-1],
            [np.column_stack([pixels.shape[2] - x, y]) for x, y in (p.T for p in points)],
        )
    return plain | {"pixels": np.ascontiguousarray(pixels), "xy": points[0], "targets": points[1]}


def changed(plain):
    """What changes nothing, by name."""
    random = np.random.default_rng(1)
    n, g = plain["counts"].shape
    angle = np.deg2rad(33.0)
    around = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1.0]])
    away = np.array([[1, 0, 1234.567], [0, 1, -891.01], [0, 0, 1]])
    return {
        "rows": {"rows": random.permutation(n)},
        "shapes": {"shapes": random.permutation(n)},
        "genes": {"columns": random.permutation(g)},
        "name and unit": {"system": "µm", "world": np.diag([2.0, 2.0, 1.0])},
        "unit of shapes": {"own": np.diag([0.02, 0.02, 1.0]) @ around},
        "translation": {"world": away, "own": away},
        "turned system": {"world": around},
        "integers": {"dtype": np.int64},
        "float64": {"dtype": np.float64},
        "chunks": {"chunks": 100},
    }


def check(count, what, found, wanted):
    apart = float(np.abs(found[0].loc[wanted[0].index] - wanted[0]).to_numpy().max())
    same = list(found[0].columns) == list(wanted[0].columns) and apart <= EQUAL and abs(found[1] - wanted[1]) <= EQUAL
    same = same and np.allclose(found[2], wanted[2], atol=EQUAL)
    count["right" if same else "wrong"] += 1
    assert same, f"{what}: values differ by up to {apart:.2g}, scores by {abs(found[1] - wanted[1]):.2g}"


@pytest.mark.parametrize("head", HEADS)
def test_nothing_changes(plain, head, tries, tally):
    count = tally("order and place")
    wanted = ask(section_of(plain), head)
    cases = changed(plain)
    some = list(cases)[: tries(2, None)] if head != "in-context+kriging" else list(cases)
    for name in some:
        check(count, f"{head}, {name}", ask(section_of(plain, **cases[name]), head), wanted)


def test_turns_and_flips_are_less_than_a_seed(plain, tries, tally):
    """Other spots are drawn, as by another seed: predictions differ by no more than those of any two seeds."""
    head, count = "in-context+kriging", tally("turns and flips")
    seeds = [ask(section_of(plain), head, rng=seed) for seed in range(4)]

    def apart(a, b):
        return float(np.abs(a[0] - b[0]).to_numpy().mean())

    most = max(apart(a, b) for i, a in enumerate(seeds) for b in seeds[:i])
    ways = [(1, False), (0, True), (2, False), (3, False), (1, True), (2, True), (3, True)]
    for turns, mirror in ways[: tries(3, 7)]:
        found = apart(ask(section_of(turned(plain, turns, mirror=mirror)), head), seeds[0])
        count["right" if found <= most else "wrong"] += 1
        assert found <= most, f"{turns} turns, mirror={mirror}: {found:.3g}, of seeds at most {most:.3g}"


def test_threads_change_nothing(plain, tally):
    head = "in-context+kriging"
    n = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = ask(section_of(plain), head)
        torch.set_num_threads(2)
        check(tally("order and place"), "threads", ask(section_of(plain), head), wanted)
    finally:
        torch.set_num_threads(n)


ALONE = """
import sys, histosge as sge, numpy as np
table = sge.tl.predict(sge.datasets.synthetic(n_rows=8, n_cols=8, n_genes=8), encoder="stain-texture", n_folds=2,
    head_options={"in-context": {"n_steps": 20}}, inplace=False, progress=False)
np.save(sys.argv[1], table.X)
"""


def test_a_new_process_gives_the_same_digits(tmp_path, tally, monkeypatch):
    here, there = tmp_path / "here.npy", tmp_path / "there.npy"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALONE, str(there)],
        check=True, env=os.environ | {"PYTHONHASHSEED": "1"}, capture_output=True,
    )  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["alone", str(here)])
    exec(ALONE, {})
    same = np.array_equal(np.load(here), np.load(there))
    tally("order and place")["right" if same else "wrong"] += 1
    assert same
