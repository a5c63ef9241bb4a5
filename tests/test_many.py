"""A list of sections: a store each, a summary of all, and nothing done twice."""

from __future__ import annotations

import json
import logging
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import zarr
from click.testing import CliRunner

import histosge as sge
from histosge._heads import get_head
from histosge.cli import main

HOW = {"upsample": 2, "encoder": "stain-texture"}
FIT = HOW | {"head": "ridge", "genes": 5, "n_folds": 2}


def small(rng=0, **options):
    return sge.datasets.synthetic(n_rows=7, n_cols=7, n_genes=8, mpp=2.0, rng=rng, genes_rng=0, **options)


@pytest.fixture(scope="module")
def model():
    return sge.tl.fit(small(), encoder="stain-texture", head="ridge", genes=5, n_folds=2)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two sections on disk, the second without spots."""
    folder = tmp_path_factory.mktemp("sections")
    small(1).write(folder / "a.zarr")
    sd.SpatialData(images={"he": small(2)["he"]}).write(folder / "b.zarr")
    return folder


@pytest.fixture
def ab(written):
    return [written / "a.zarr", str(written / "b.zarr")]


@pytest.fixture(scope="module")
def finished(written, model, tmp_path_factory):
    """Results of both sections, and the summary that the call returned."""
    folder = tmp_path_factory.mktemp("results")
    return folder, sge.tl.predict([written / "a.zarr", written / "b.zarr"], model=model, mpp=2.0, store=folder, **HOW)


@pytest.fixture
def results(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "results")


def read(path):
    return sd.read_zarr(path).tables["histosge"]


def touched(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_each_section_is_predicted_as_alone(finished, written, model):
    folder, summary = finished
    for name in "ab":
        alone = sge.tl.predict(sd.read_zarr(written / f"{name}.zarr"), model=model, mpp=2.0, inplace=False, **HOW)
        table = read(folder / f"{name}.zarr")
        at = {instance: row for row, instance in enumerate(table.obs["instance_id"])}
        # a store is embedded in other blocks: sums in another order, rounded to half precision
        np.testing.assert_allclose(table.X[[at[i] for i in alone.obs["instance_id"]]], alone.X, atol=0.01)
        assert table.uns["histosge"]["params"].keys() == alone.uns["histosge"]["params"].keys()
        assert table.uns["histosge"]["params"]["encoder"] == "stain-texture"
        row = summary.set_index("section").loc[name]
        assert (row["n_targets"], row["n_genes"]) == table.shape
        assert row["store"] == str(folder / f"{name}.zarr")
        assert row["source"] == str(written / f"{name}.zarr")
    assert list(summary["scores"]) == ["held-out", "image only"]
    assert summary["held_out_pcc"].round(6).tolist()[:1] == [round(model.held_out["ridge"]["pcc"], 6)]
    assert np.isnan(summary["held_out_pcc"][1])
    assert list(summary["error"]) == [None, None]
    assert (summary["seconds"] > 0).all()


def test_the_file_is_the_summary(finished):
    folder, summary = finished
    file = pd.read_csv(folder / "summary.csv")
    pd.testing.assert_frame_equal(file.drop(columns="error"), summary.drop(columns="error"), check_dtype=False)
    assert file["error"].isna().all()
    assert sorted(path.name for path in folder.iterdir()) == ["a.zarr", "b.zarr", "summary.csv"]


def test_what_is_finished_is_left(results, ab, model, log):
    before, row = touched(results), pd.read_csv(results / "summary.csv")
    summary = sge.tl.predict(ab, model=model, mpp=2.0, store=results, **HOW)
    after = touched(results)
    assert {path for path in after if after[path] != before.get(path)} == {results / "summary.csv"}
    assert log.text.count("finished by an earlier run") == 2
    assert summary["seconds"].tolist() == row["seconds"].tolist()
    (results / "summary.csv").unlink()  # what the stores say is enough
    again = sge.tl.predict(ab, model=model, mpp=2.0, store=results, device="cpu", batch_size=7, **HOW)
    columns = ["section", "store", "n_targets", "n_genes", "scores", "held_out_pcc", "error"]
    pd.testing.assert_frame_equal(again[columns], summary[columns])


def test_what_is_missing_is_made(results, ab, model):
    shutil.rmtree(results / "b.zarr")
    before = touched(results / "a.zarr")
    summary = sge.tl.predict(ab, model=model, mpp=2.0, store=results, **HOW)
    assert list(summary["error"]) == [None, None]
    assert read(results / "b.zarr").n_obs == summary["n_targets"][1]
    assert touched(results / "a.zarr") == before


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"upsample": 4}, r"upsample is 4, was 2"),
        ({"conserve": True, "bin_um": 20, "upsample": None}, r"bin_um is 20.*conserve is True, was False"),
        ({"mpp": 2.1}, r"mpp is 2.1, was 2.0"),
    ],
)
def test_a_store_of_other_arguments_is_no_result(results, ab, model, change, match):
    before = touched(results)
    summary = sge.tl.predict(ab[:1], model=model, store=results, **HOW | {"mpp": 2.0} | change)
    assert pd.Series(summary["error"]).str.contains(match).all(), summary["error"].tolist()
    assert "was made by another run" in summary["error"][0]
    assert touched(results) == before  # nor is its row replaced


def test_a_store_of_another_model_or_section(results, ab, model, tmp_path, written):
    other = sge.tl.fit(small(3), encoder="stain-texture", head="ridge", genes=5, n_folds=2)
    found = sge.tl.predict(ab, model=other, mpp=2.0, store=results, **HOW)
    assert found["error"].str.contains(f"model is '<Model {other.fingerprint()}>', was '<Model").all()
    moved = shutil.copytree(written / "a.zarr", tmp_path / "other" / "a.zarr")
    for _ in range(2):  # the row of the summary stays that of the store
        found = sge.tl.predict([moved], model=model, mpp=2.0, store=results, **HOW)
        assert re.search(r"source is '.*/other/a.zarr', was '.*/sections0/a.zarr'", found["error"][0])
    own = sge.tl.predict(ab[:1], store=results, **FIT)
    assert "n_folds is 2, was 5" in own["error"][0]


def test_an_encoder_of_other_weights(results, ab, model):
    group = zarr.open_group(results / "a.zarr" / "tables" / "histosge" / "uns" / "histosge" / "encoder", mode="r+")
    attributes = group["digest"].attrs.asdict()
    group.create_array("digest", data=np.array("f" * 64), overwrite=True, attributes=attributes)
    found = sge.tl.predict(ab[:1], model=model, mpp=2.0, store=results, **HOW)
    assert "encoder is 'stain-texture" in found["error"][0]
    assert f"was 'stain-texture {'f' * 12}'" in found["error"][0]


def test_foreign_things_in_the_folder(results, ab, model):
    shutil.rmtree(results / "a.zarr")
    (results / "a.zarr").mkdir()
    (results / "a.zarr" / "thesis.txt").write_text("precious")
    found = sge.tl.predict(ab, model=model, mpp=2.0, store=results, **HOW)
    assert "exists, and is no store of an earlier run with key_added='histosge'" in found["error"][0]
    assert found["error"][1] is None
    assert (results / "a.zarr" / "thesis.txt").read_text() == "precious"
    (results / "summary.csv").write_text("patient,age\n1,60\n")
    with pytest.raises(ValueError, match=r"summary.csv' is no summary of histosge. Move it away"):
        sge.tl.predict(ab, model=model, mpp=2.0, store=results, **HOW)
    (results / "summary.csv").write_bytes(b"\xff\x00")
    with pytest.raises(ValueError, match="is no summary of histosge"):
        sge.tl.predict(ab, model=model, mpp=2.0, store=results, **HOW)


def test_a_failure_does_not_stop_the_others(written, model, tmp_path, log):
    """A section that is broken, one that is missing, and one whose image has no scale."""
    broken = shutil.copytree(written / "a.zarr", tmp_path / "broken.zarr")
    (broken / "zarr.json").write_text("{")
    named = {"NA": small(4), "broken": broken, "gone": tmp_path / "gone.zarr", "b": written / "b.zarr"}
    store = tmp_path / "deep" / "results"
    found = sge.tl.predict(named, model=model, store=store, **HOW).set_index("section")
    assert list(found.index) == ["NA", "broken", "gone", "b"]
    assert found["error"].isna().tolist() == [True, False, False, False]
    assert "cannot be read as a SpatialData" in found.loc["broken", "error"]
    assert "does not exist" in found.loc["gone", "error"]
    assert "mpp=" in found.loc["b", "error"]
    assert found["n_targets"].isna().tolist() == [False, True, True, True]
    warned = [record.getMessage() for record in log.records if record.levelno == logging.WARNING]
    assert [text.split(" failed: ")[0] for text in warned if " failed: " in text] == [
        "section broken",
        "section gone",
        "section b",
        "3 of 4 sections",
    ]
    shutil.copytree(written / "a.zarr", named["gone"])
    again = sge.tl.predict({k: v for k, v in named.items() if k in ("NA", "gone")}, model=model, store=store, **HOW)
    assert again["error"].tolist() == [None, None]
    file = pd.read_csv(store / "summary.csv", keep_default_na=False)
    assert file["section"].tolist() == ["NA", "broken", "gone", "b"]  # rows of both runs
    assert (file["error"] == "").tolist() == [True, False, True, False]


def test_each_section_fits_its_own_without_a_model(written, tmp_path):
    found = sge.tl.predict({"x": small(1), "y": small(2)}, store=tmp_path / "r", **FIT)
    alone = sge.tl.predict(small(2), inplace=False, **FIT)
    assert found["held_out_pcc"][1] == pytest.approx(alone.uns["histosge"]["held_out"]["ridge"]["pcc"], abs=0.01)
    assert found["held_out_pcc"][0] != found["held_out_pcc"][1]
    assert found["source"].tolist() == [None, None]


def test_one_encoder_and_one_progress_bar(ab, model, tmp_path, monkeypatch, capfd):
    from histosge._encoders import _load

    loaded = []
    built_in = _load.built_in
    monkeypatch.setattr(_load, "built_in", lambda name: loaded.append(name) or built_in(name))
    sge.tl.predict((path for path in ab), model=model, mpp=2.0, store=tmp_path / "r", progress=True, **HOW)
    assert loaded == ["stain-texture"]
    shown = capfd.readouterr().err
    assert "sections: 100%" in shown
    assert "2/2" in shown
    assert "predicting:" not in shown


def test_an_unfinished_store_is_continued(written, model, tmp_path, monkeypatch, log):
    with sge.settings.override(part_rows=20):
        from histosge._section import PartWriter

        write = PartWriter.write

        def interrupted(self, part, matrices):
            if part == 2:
                raise KeyboardInterrupt
            write(self, part, matrices)

        monkeypatch.setattr(PartWriter, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sge.tl.predict([written / "a.zarr"], model=model, store=tmp_path / "r", **HOW)
        monkeypatch.undo()
        assert (tmp_path / "r" / "a.zarr.partial").is_dir()
        other = sge.tl.predict([written / "a.zarr"], model=model, store=tmp_path / "r", **HOW | {"upsample": 4})
        assert "holds an unfinished run with other arguments" in other["error"][0]
        found = sge.tl.predict([written / "a.zarr"], model=model, store=tmp_path / "r", **HOW)
    assert found["error"][0] is None
    assert "resuming a.zarr: 2 of" in log.text


def test_a_head_that_is_an_object(tmp_path):
    made = {"store": tmp_path / "r", "genes": 5, "n_folds": 2} | HOW
    first = sge.tl.predict({"x": small(1)}, head=get_head("ridge")(), **made)
    assert first["error"].tolist() == [None]
    assert sge.tl.predict({"x": small(1)}, head=get_head("ridge")(), **made)["error"].tolist() == [None]
    head = get_head("ridge")()
    head.note = 1
    changed = sge.tl.predict({"x": small(1)}, head=head, **made)
    assert "head_digest is 'ridge " in changed["error"][0]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"store": None}, ValueError, "store=None, but a list of sections is written to a folder"),
        ({"inplace": False}, ValueError, "inplace=False is for one section"),
        ({"rng": np.random.default_rng()}, ValueError, "rng= is a generator: .* Pass a seed"),
        ({"store": "x.zarr"}, ValueError, r"store='x.zarr' is the folder of the stores of a list"),
        ({"store": " "}, ValueError, "store=' ' is no name of a file"),
        ({"modle": 1}, TypeError, r"Did you mean model=\?"),
        ({"model": "path"}, TypeError, r"model='path' is no fitted model: .*Model.load"),
        ({"encoder": "rgb"}, ValueError, "the model was trained on embeddings of 'stain-texture'"),
        ({"dense": True}, ValueError, "dense=True, but the model was trained with dense=False"),
        ({"upsample": 2, "bin_um": 8}, ValueError, "pass one of them"),
        ({"device": "toaster"}, ValueError, "device='toaster'"),
        ({"model": None, "head": "ouija"}, ValueError, "'ouija'"),
        ({"model": None, "head": "ridge", "head_options": {"x": 1}}, ValueError, "has no option 'x'"),
        ({"model": None, "n_folds": 1}, ValueError, "n_folds=1: choose"),
        ({"model": None, "genes": 0}, ValueError, "genes=0: pass"),
        ({"model": None, "encoder": "uni9"}, ValueError, "encoder='uni9' is unknown"),
    ],
)
def test_errors_of_all_sections_come_first(ab, model, tmp_path, monkeypatch, change, error, match):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=match):
        sge.tl.predict(ab, **{"model": model, "store": tmp_path / "r"} | change)
    assert list(tmp_path.iterdir()) == []


def test_names(ab, model, tmp_path, written, sdata):
    def refused(sections, match, **more):
        with pytest.raises(ValueError, match=match):
            sge.tl.predict(sections, **{"model": model, "store": tmp_path / "r"} | more)

    refused([], "sdata is an empty list")
    refused([*ab, sdata], r"sdata\[2\] is only in memory and has no name for its store: pass \{name: section\}")
    refused([ab[0], tmp_path / "A.zarr"], r"two sections of the name 'A': .*a.zarr and .*A.zarr. Name them")
    refused({"a/b": ab[0]}, "the name of a section='a/b' is not a valid name")
    refused({"../b": ab[0]}, "is not a valid name")
    refused(ab[:1], "would be overwritten by its own result", store=written)
    with pytest.raises(TypeError, match=r"is a path: open it with `sge.io.read`, or pass a list"):
        sge.tl.predict(str(ab[0]), model=model, store=tmp_path / "r")
    with pytest.raises(TypeError, match="sdata holds a int"):
        sge.tl.predict({"a": 3}, model=model, store=tmp_path / "r")
    with pytest.raises(TypeError, match="sdata holds a int"):
        sge.tl.predict([3], model=model, store=tmp_path / "r")


# ---------------------------------------------------------------------------------------------------------- shell


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in ("-q", *words)])


@pytest.fixture(autouse=True)
def _quiet_again():
    yield
    sge.settings.verbosity = 2


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    model.save(folder)
    return folder


def test_the_shell_predicts_many(written, saved, tmp_path, results):
    how = ["--model", saved, "--upsample", "2", "--mpp", "2"]
    done = run("predict", written / "a.zarr", tmp_path / "gone.zarr", "--out", tmp_path / "r", *how)
    assert done.exit_code == 2
    assert "gone.zarr' does not exist" in done.output
    broken = shutil.copytree(written / "a.zarr", tmp_path / "broken.zarr")
    (broken / "zarr.json").write_text("{")
    done = run("predict", written / "a.zarr", broken, written / "b.zarr", "--out", results, *how)
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["section", "n_targets", "scores", "held_out_pcc", "seconds", "error"]
    assert [line.split()[0] for line in lines[1:]] == ["a", "broken", "b"]
    assert "cannot be read as a SpatialData" in lines[2]
    assert "1 of 3 sections failed: broken" in done.stderr
    done = run("predict", written / "a.zarr", written / "b.zarr", "--out", results, *how, "--json")
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert (found["out"], found["n_failed"]) == (str(results), 0)
    assert [row["section"] for row in found["sections"]] == ["a", "b"]
    assert found["sections"][1]["held_out_pcc"] is None
    assert found["sections"][1]["n_targets"] == read(results / "b.zarr").n_obs


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["IN"], "Missing argument 'OUT'. Name where to write: IN OUT"),
        (["IN", "IN", "IN"], "3 paths, but without --out there are two, IN and OUT"),
        (["IN", "IN", "--out", "r", "--domains"], "--domains: for one section, IN OUT"),
        (["IN", "--out", "r", "--store"], "--store: for one section"),
        (["IN", "--out", "r", "--overwrite", "--plot", "x.png"], "--plot, --overwrite: for one section"),
        (["IN", "--out", "r", "--image", "IN"], "--image: for one section"),
        (["IN", "--out", "r", "--on-invalid", "skip"], "--on-invalid: for the shapes of --target-key"),
        (["IN", "--out", "r", "--model", "MODEL", "--head", "ridge"], "--head: the model in .* has its own"),
        (["IN", "nowhere", "--out", "r"], "nowhere' does not exist"),
        (["IN", "--out", " "], "is no name of a file"),
    ],
)
def test_wrong_usage_of_the_shell(written, saved, tmp_path, monkeypatch, words, match):
    monkeypatch.chdir(tmp_path)
    place = {"IN": written / "a.zarr", "MODEL": saved}
    done = run("predict", *(place.get(word, word) for word in words))
    assert done.exit_code == 2
    assert re.search(match, " ".join(done.output.split())), done.output
    assert list(tmp_path.iterdir()) == []


def test_two_sections_of_one_name_in_the_shell(written, saved, tmp_path):
    twin = shutil.copytree(written / "a.zarr", tmp_path / "twin" / "a.zarr")
    done = run("predict", written / "a.zarr", twin, "--model", saved, "--out", tmp_path / "r")
    assert done.exit_code == 1
    assert "sdata has two sections of the name 'a'" in done.stderr
    assert "or rename one" in done.stderr
