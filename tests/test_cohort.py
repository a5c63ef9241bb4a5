"""Many sections in the memory of one: paths, sections that differ, what stays."""

from __future__ import annotations

import numpy as np
import pytest
from spatialdata import SpatialData, read_zarr

import histosge as sge
from histosge.tl._sections import Sections

QUICK = {"encoder": "stain-texture", "head": "ridge", "genes": 5, "n_folds": 2, "progress": False}
SCORED = {name: QUICK[name] for name in ("encoder", "genes", "n_folds", "progress")}


def make(rng, **how):
    return sge.datasets.synthetic(
        **{"n_rows": 7, "n_cols": 7, "n_genes": 12, "mpp": 2.0, "genes_rng": 0, "rng": rng} | how
    )


@pytest.fixture(scope="module")
def sections():
    return [make(rng) for rng in range(3)]


@pytest.fixture(scope="module")
def paths(sections, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort")
    for i, sdata in enumerate(sections):
        sdata.write(folder / f"section{i}.zarr")
    return [folder / f"section{i}.zarr" for i in range(3)]


def test_paths_and_sections_give_the_same_model(sections, paths):
    model = sge.tl.fit(sections, **QUICK)
    assert sge.tl.fit(paths, **QUICK).fingerprint() == model.fingerprint()
    assert sge.tl.fit([str(paths[0]), sections[1], read_zarr(paths[2])], **QUICK).fingerprint() == model.fingerprint()
    assert sge.tl.fit(dict(zip("abc", paths, strict=True)), **QUICK).fingerprint() == model.fingerprint()


def test_one_path(sections, paths):
    assert sge.tl.fit(str(paths[0]), **QUICK).fingerprint() == sge.tl.fit(sections[0], **QUICK).fingerprint()


def test_sections_that_are_opened_twice_are_the_same(sections, paths, monkeypatch):
    """With more spots than stay, sections are read again; the same blocks are drawn."""
    n = [len(sdata.shapes["spots"]) for sdata in sections]
    few = sge.tl.fit(sections, **QUICK, max_spots=sum(n) // 2)
    assert few.info["n_measured"] == sum(n)
    of_each = np.bincount(few.spots.section)
    assert np.ptp(of_each) <= 1
    assert of_each.sum() <= sum(n) // 2
    assert sge.tl.fit(paths, **QUICK, max_spots=sum(n) // 2).fingerprint() == few.fingerprint()


def test_only_drawn_spots_stay(paths):
    """At no time are there more spots in memory than max_spots, and one section."""
    options = {"max_spots": 60, "merge_um": None} | dict.fromkeys(
        ("image_key", "spots_key", "table_key", "layer", "coordinate_system", "mpp")
    )
    known = Sections(paths, options)
    known.survey()
    assert sum(len(each.kept.xy_px) for each in known._found if each.kept is not None) <= 60
    assert all(len(each.section.xy_px) == 0 and each.section.image.width_px == 1 for each in known._found)
    drawn = [len(section.xy_px) for section, _ in known.drawn(known.known[0].genes, rng=np.random.default_rng(0))]
    assert drawn == [20, 20, 20]
    assert all(each.kept is None for each in known._found)


def test_a_section_is_read_twice_with_one_message(paths, log):
    with sge.settings.override(verbosity=2):
        sge.tl.fit(paths, **QUICK, max_spots=60)
    assert log.text.count("spots x 12 genes, 2 µm per pixel") == 3
    assert "learning from 60 of" in log.text
    assert "at most 20 of a section" in log.text


def test_genes_are_those_that_all_sections_have(sections, tmp_path):
    table = sections[1].tables["table"][:, 3:].copy()
    fewer = SpatialData(images=dict(sections[1].images), shapes=dict(sections[1].shapes), tables={"table": table})
    fewer.write(tmp_path / "fewer.zarr")
    model = sge.tl.fit([sections[0], tmp_path / "fewer.zarr"], **QUICK | {"genes": "all"})
    assert list(model.genes) == list(table.var_names)
    table.var_names = [f"OTHER{i}" for i in range(table.n_vars)]
    apart = SpatialData(images=dict(fewer.images), shapes=dict(fewer.shapes), tables={"table": table})
    with pytest.raises(ValueError, match="the sections have no gene in common"):
        sge.tl.fit([sections[0], apart], **QUICK)


def test_sections_of_other_kinds_are_recorded(sections, log):
    hd = make(4, n_rows=4, n_cols=4, bin_um=16)
    with sge.settings.override(verbosity=2):
        model = sge.tl.fit([sections[0], hd, sections[1]], **QUICK)
    kinds = "2 visium, pitch 100 µm, 2 µm per pixel; 1 visium-hd, pitch 16 µm, 2 µm per pixel"
    assert model.info["kinds_of_sections"] == kinds
    assert f"sections differ: {kinds}" in log.text
    assert "kinds_of_sections" not in sge.tl.fit(sections, **QUICK).info
    assert sge.tl.predict(sections[0], model=model, inplace=False).uns["histosge"]["kinds_of_sections"] == kinds


def test_evaluate_takes_paths_and_names_them(sections, paths):
    how = SCORED | {"heads": ["ridge"], "split": "sections"}
    ours, theirs = sge.tl.evaluate(paths, **how), sge.tl.evaluate(sections, **how)
    assert ours["section"].unique().tolist() == ["section0", "section1", "section2"]
    assert theirs["section"].unique().tolist() == ["0: spots", "1: spots", "2: spots"]
    assert ours.drop(columns="section").equals(theirs.drop(columns="section"))
    named = sge.tl.evaluate(dict(zip("abc", paths, strict=True)), **how, max_spots=60)
    assert named["section"].unique().tolist() == ["a", "b", "c"]
    assert (named["n_train"] + named["n_test"] == 60).all()


def test_an_error_names_the_path(paths, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.zarr.*does not exist"):
        sge.tl.fit([paths[0], tmp_path / "nowhere.zarr"], **QUICK)
    with pytest.raises(KeyError, match=r"section '.*section0.zarr': layer='no' is not among the layers"):
        sge.tl.fit(paths, **QUICK, layer="no")
    with pytest.raises(TypeError, match="sdata holds a int: pass SpatialData objects, or paths or URLs of sections"):
        sge.tl.fit([paths[0], 3], **QUICK)
    with pytest.raises(ValueError, match="sdata is an empty list: pass at least one section"):
        sge.tl.evaluate([])


def test_folds_may_hold_whole_sections(sections):
    """With more sections than blocks there are no neighbours, so that `nearest` has no score; it ended the fit before."""
    model = sge.tl.fit([*sections] * 6, **QUICK)
    assert sorted(model.held_out) == ["ridge"]
    assert sorted(sge.tl.fit(sections[0], **QUICK).held_out) == ["nearest", "ridge"]
