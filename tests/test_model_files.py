"""Files of models: written in one step, and read only if they are whole and agree with themselves."""

from __future__ import annotations

import dataclasses
import json
import os

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from tests.test_model import FILE, embed_by_hand, fit

import histosge as sge
from histosge._model import Model, contents, write_file
from histosge._section import read_section


@pytest.fixture(scope="module")
def section(_section_once):
    return read_section(_section_once)


@pytest.fixture(scope="module")
def embedding(_section_once, section):
    return embed_by_hand(sge.datasets.synthetic_truth(_section_once).loc[section.instances].to_numpy())


@pytest.fixture(scope="module")
def ridge(section, embedding):
    return fit(section, embedding)


def test_loading_what_is_no_model(tmp_path):
    """Also a folder of the hub, which has a config.json of its own."""
    (tmp_path / "config.json").write_text('{"architecture": "vit"}')
    for folder in (tmp_path, tmp_path / "not-there"):
        with pytest.raises(
            FileNotFoundError, match=r"holds no model: there is no histosge\.safetensors\. Pass a folder"
        ):
            Model.load(folder)


@pytest.mark.parametrize("version", [1, 4, 5, None, "five"])
def test_loading_an_older_format(tmp_path, version):
    """They were folders of several files."""
    (tmp_path / "config.json").write_text(json.dumps({"format": version}))
    with pytest.raises(
        sge.ModelError, match=rf"has model format {version!r}; this version of histosge reads 6\. Fit it again"
    ):
        Model.load(tmp_path)


def test_loading_a_newer_format(tmp_path):
    save_file({}, tmp_path / FILE, {"histosge_format": "7"})
    with pytest.raises(sge.ModelError, match=r"has model format '7'; this version of histosge reads 6\. Fit it again"):
        Model.load(tmp_path)


def edited(model, folder, change):
    """Save a model whose text and tensors were changed on purpose, with the sha256 that belongs to them."""
    text, tensors = contents(model)
    values = json.loads(text)
    change(values, tensors)
    write_file(folder / FILE, json.dumps(values), tensors)
    return folder


def put(path, value):
    """Change one field of the text."""

    def change(values, tensors):
        *above, last = path
        for key in above:
            values = values[key]
        if value is None:
            del values[last]
        else:
            values[last] = value

    return change


def tensor(name, change):
    return lambda values, tensors: tensors.update({name: change(tensors[name]).contiguous()})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (put(["head"], "kriging"), r"heads=\['ridge'\]: it must be those of head='kriging'"),
        (put(["head"], 3), r"head=3: Input should be a valid string"),
        (put(["heads"], []), r"heads=\[\]: List should have at least 1 item"),
        (put(["heads", 0, "weight"], 0.5), r"heads=0\.5: it must be weights whose sum is 1"),
        (put(["heads", 0, "weight"], -1.0), r"heads\.0\.weight=-1\.0: Input should be greater than 0"),
        (put(["heads", 0, "config"], {"width": 3}), r"heads\.0 cannot be a fitted head 'ridge' \(.*config\.width"),
        (put(["genes"], None), r"genes=.*: Field required"),
        (put(["genes", 0], "of no spot"), r"genes=\['of no spot'\]: it must be names among context_genes"),
        (lambda v, t: put(["genes", 0], v["genes"][1])(v, t), r"genes=\['.*'\]: it must be each name once"),
        (
            lambda v, t: v["context_genes"].append("one more"),
            r"spots\.expression is float32 \(138, \d+\): it must be float32",
        ),
        (put(["held_out"], {}), r"held_out=\[\]: it must be scores of \['ridge', 'ridge'\]"),
        (put(["held_out", "ridge", "pcc"], float("nan")), r"held_out\.ridge\.pcc=nan: Input should be a finite number"),
        (put(["embedding", "encoders"], []), r"embedding\.splits=\(\): it must be -1 numbers"),
        (put(["embedding", "dense"], "no"), r"embedding\.dense='no': it must be true or false"),
        (put(["embedding", "encoders", 0, "mpp"], -1), r"embedding\.encoders\.0\.mpp=-1: it must be µm per pixel"),
        (put(["embedding", "encoders", 0, "spec"], {}), r"embedding=.*TypeError"),
        (put(["embedding", "splits"], [3]), r"embedding\.splits=\(3,\): it must be 0 numbers"),
        (put(["pitch_um"], 99.0), r"info\.pitch_um=100\.\d*: it must be 99\.0"),
        (put(["info", "n_spots"], 137), r"spots\.embedding is float32 \(138, 10\): it must be float32 \(137, any\)"),
        (put(["info", "n_sections"], 2), r"spots\.section=\[0\]: it must be 0 to 1"),
        (put(["info", "unit"], None), r"info\.unit=.*: Field required"),
        (put(["training"], [{"head": "mean", "fold": 0, "losses": []}]), r"training\.0\.head='mean'"),
        (put(["training"], [{"head": "ridge", "fold": 3, "losses": []}]), r"training\.0\.fold=3: it must be below 3"),
        (put(["more"], 1), r"more=1: Extra inputs are not permitted"),
        (lambda v, t: t.update(more=torch.ones(2)), r"tensors=\['more'\]: it must be no others than those of a model"),
        (lambda v, t: t.pop("scores.predictable"), r"tensors=.*: it must be \['scores\.predictable'\] as well"),
        (lambda v, t: t.pop("0.slope"), r"heads\.0 cannot be a fitted head 'ridge' \(KeyError: 'slope'\)"),
        (tensor("0.slope", lambda t: t.double()), r"0\.slope is float64 \(10, \d+\): it must be float32\."),
        (tensor("0.slope", lambda t: t[1:]), r"heads\.0 cannot be a fitted head 'ridge'"),
        (
            tensor("0.offset", lambda t: t * torch.nan),
            r"0\.offset has (\d+) of \1 numbers that are NaN or infinite: all must",
        ),
        (
            tensor("scores.held_out_pcc", lambda t: t[:3]),
            r"scores\.held_out_pcc is float32 \(3\): it must be float32 \(8\)",
        ),
        (tensor("intervals.levels", lambda t: t.flip(0)), r"intervals\.levels=\[0\.999, .*: it must be increasing"),
        (tensor("intervals.numbers", lambda t: t[:, 1:]), r"intervals\.numbers=.*: it must be 105 columns"),
        (tensor("intervals.n_spots", lambda t: t + 1), r"intervals\.n_spots=139: it must be 138"),
    ],
)
def test_what_does_not_agree_is_refused(ridge, tmp_path, change, match):
    """By file, field and value, even where the sha256 is right."""
    with pytest.raises(sge.ModelError, match=rf"(?s)histosge\.safetensors: {match}.*or fit the model again\."):
        Model.load(edited(ridge, tmp_path, change))


def test_text_that_is_no_json(ridge, tmp_path):
    _, tensors = contents(ridge)
    for text, match in (("", "EOF while parsing"), ("[" * 10_000, "recursion limit"), ("[]", "should be a valid dict")):
        write_file(tmp_path / FILE, text, tensors)
        with pytest.raises(sge.ModelError, match=rf"histosge\.safetensors: .*{match}"):
            Model.load(tmp_path)


def test_a_wide_network_takes_no_memory(section, embedding, tmp_path):
    """A width that does not belong to the weights is refused before a network of it is made (terabytes, here)."""
    model = fit(section, embedding, head="coordinates", n_folds=2)
    with pytest.raises(sge.ModelError, match=r"heads\.0 cannot be a fitted head 'coordinates' \(.*size mismatch"):
        Model.load(edited(model, tmp_path, put(["heads", 0, "config", "width"], 2**20)))


def test_one_byte_is_enough(ridge, tmp_path):
    """A weight, a number in the text, or a name: the sha256 is no longer right."""
    ridge.save(tmp_path / "whole")
    content = (tmp_path / "whole" / FILE).read_bytes()
    for at in (len(content) - 1, content.index(b"n_spots") + 11, content.index(b"spots.xy_um") + 8, len(content) // 2):
        (tmp_path / FILE).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(sge.ModelError, match=r"histosge\.safetensors.*or fit the model again\."):
            Model.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x08", b"\xff" * 100, b"PK\x03\x04" * 30])
def test_what_is_no_safetensors(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(sge.ModelError, match=r"histosge\.safetensors cannot be read as safetensors \("):
        Model.load(tmp_path)


def test_safetensors_of_another_program(tmp_path):
    save_file({"weight": torch.ones(3)}, tmp_path / FILE)
    with pytest.raises(sge.ModelError, match=r"was not written by histosge: its header has no format\. Pass a folder"):
        Model.load(tmp_path)


def test_the_fingerprint_is_of_all(ridge, tmp_path):
    """What is not part of the heads changes it too."""
    found = {ridge.fingerprint()}
    for change in (
        {"intervals": dataclasses.replace(ridge.intervals, numbers=ridge.intervals.numbers * 2)},
        {"held_out": {**ridge.held_out, "mean": {"pcc": 0.0, "mse": 1.0}}},
        {"scores": ridge.scores.assign(predictable=False)},
        {"info": ridge.info | {"split": "another"}},
        {"training": pd.DataFrame({"head": ["ridge"], "fold": [0], "epoch": [1], "loss": [0.5]})},
        {"spots": dataclasses.replace(ridge.spots, xy_um=ridge.spots.xy_um + 1)},
    ):
        found.add(dataclasses.replace(ridge, **change).fingerprint())
    assert len(found) == 7


def test_a_model_that_could_not_be_loaded_is_not_saved(ridge, tmp_path):
    odd = dataclasses.replace(ridge, scores=ridge.scores.assign(symbol="A"))
    with pytest.raises(sge.ModelError, match=r"has scores \[.*'symbol'\], but a file holds"):
        odd.save(tmp_path / "odd")
    broken = dataclasses.replace(ridge, spots=dataclasses.replace(ridge.spots, xy_um=ridge.spots.xy_um * torch.nan))
    with pytest.raises(sge.ModelError, match=r"could not be read back from a file, since spots\.xy_um has 276 of 276"):
        broken.save(tmp_path / "odd")
    assert not (tmp_path / "odd").exists()


def test_diverging_losses_survive(ridge, tmp_path):
    training = pd.DataFrame({"head": "ridge", "fold": 1, "epoch": [1, 2, 3], "loss": [1.0, np.nan, np.inf]})
    dataclasses.replace(ridge, training=training.astype({"head": object})).save(tmp_path)
    pd.testing.assert_frame_equal(Model.load(tmp_path).training, training)


def test_files_of_others_stay(ridge, tmp_path):
    """A folder that holds other things is no model, and none of them is touched; it may be a link."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for name in ("config.json", "model.safetensors", f"{FILE}.of-mine"):
        (tmp_path / "real" / name).write_text("mine")
    ridge.save(tmp_path / "link")
    ridge.save(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert Model.load(tmp_path / "real").fingerprint() == ridge.fingerprint()
    others = sorted(p.name for p in (tmp_path / "real").iterdir() if p.name != FILE)
    assert others == ["config.json", f"{FILE}.of-mine", "model.safetensors"]
    assert {(tmp_path / "real" / name).read_text() for name in others} == {"mine"}


def test_mode_of_the_file(ridge, tmp_path):
    for mask in (0o022, 0o077, 0o002):
        before = os.umask(mask)
        try:
            ridge.save(tmp_path, overwrite=True)
        finally:
            os.umask(before)
        assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o666 & ~mask


def test_drafts_of_the_dead_are_removed(ridge, tmp_path):
    """Those of an hour ago: a younger one may be written now."""
    old, new = (tmp_path / f"{FILE}.{pid}-0a.tmp" for pid in (11, 12))
    for draft in (old, new):
        draft.write_bytes(b"half")
    os.utime(old, (0, 0))
    ridge.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [FILE, new.name]


def test_a_folder_that_cannot_be_written(ridge, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"/file'$"):
        ridge.save(tmp_path / "file")
