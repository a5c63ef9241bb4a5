"""A head from outside the package: given as a class or an object, saved, loaded, brought by an installed package."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import histosge as sge
from histosge._heads import HEADS, get_head, head_name, learns_sub_spots, parts_of
from histosge._model import contents, write_file


class Median(sge.Head):
    """Median of each gene, scaled."""

    name = "median"

    def __init__(self, scale=1.0):
        self.scale, self.median = scale, None

    def fit(self, spots, *, rng, progress=None):
        self.median = self.scale * spots.expression.median(dim=0).values
        return self

    def predict(self, queries, *, context):
        assert isinstance(queries, sge.Queries)
        assert isinstance(context, sge.Spots)
        return self.median.expand(len(queries), -1)

    def state(self):
        return {"scale": self.scale}, {"median": self.median}

    @classmethod
    def from_state(cls, config, weights):
        head = cls(**config)
        head.median = weights["median"]
        return head


RUN = {"encoder": "stain-texture", "genes": 5, "n_folds": 2, "rng": 0, "progress": False}


@pytest.fixture
def model(sdata):
    return sge.tl.fit(sdata, head=Median, **RUN)


def test_expression_is_never_below_zero(sdata):
    """Whatever a head says."""
    model = sge.tl.fit(sdata, head=Median(scale=-1.0), **RUN)
    assert (model.heads[0][1].median < 0).any()
    table = sge.tl.predict(sdata, model=model, inplace=False, progress=False)
    assert (table.X == 0).all()


def test_fit_predict_save_load(sdata, model, tmp_path):
    assert model.head == "median"
    assert model.held_out["median"]["mse"] > 0
    assert [(weight, type(head)) for weight, head in model.heads] == [(1.0, Median)]  # fitted once more, on all spots
    table = sge.tl.predict(sdata, model=model, inplace=False, progress=False)
    counts = sdata["table"][:, model.genes].X.toarray()
    total = sdata["table"].X.toarray().sum(1, keepdims=True)
    np.testing.assert_allclose(table.X[0], np.median(np.log1p(1e4 * counts / total), axis=0), atol=0.05)
    model.save(tmp_path)
    loaded = sge.Model.load(tmp_path)
    assert (sge.tl.predict(sdata, model=loaded, inplace=False, progress=False).X == table.X).all()
    assert loaded.fingerprint() == model.fingerprint()


def test_predict_fits_it_too(sdata, model):
    table = sge.tl.predict(sdata, head=Median, inplace=False, **RUN)
    assert table.uns["histosge"]["head"] == "median"
    assert (table.X == sge.tl.predict(sdata, model=model, inplace=False, progress=False).X).all()


def test_an_object_has_its_options_and_stays_as_it_was(sdata, model):
    half = Median(scale=0.5)
    found = sge.tl.fit(sdata, head=half, **RUN)
    assert half.median is None
    assert torch.allclose(found.heads[0][1].median, model.heads[0][1].median / 2)
    same = sge.tl.fit(sdata, head=Median, head_options={"scale": 0.5}, **RUN)
    assert torch.equal(same.heads[0][1].median, found.heads[0][1].median)
    with pytest.raises(ValueError, match=r"is an object that has its options\. Leave head_options= out"):
        sge.tl.fit(sdata, head=half, head_options={"scale": 0.5}, **RUN)
    with pytest.raises(ValueError, match=r"head 'median' has no option 'size'.*\['scale'\]"):
        sge.tl.fit(sdata, head=Median, head_options={"size": 2}, **RUN)


def test_defaults_of_the_protocol():
    assert get_head(Median) is get_head(Median()) is get_head("median") is Median
    assert head_name(Median()) == "median"
    assert parts_of("median+ridge") == ("median", "ridge")
    assert not learns_sub_spots(Median)
    assert get_head(HEADS["ridge"]) is HEADS["ridge"]


def test_what_is_no_head_is_refused(sdata):
    class Nothing:
        name = "nothing"

        def fit(self):
            """Fit nothing."""

    with pytest.raises(TypeError, match=r"is no head: it lacks \['ensembles_folds', .*subclass of histosge\.Head"):
        sge.tl.fit(sdata, head=Nothing, **RUN)
    with pytest.raises(TypeError, match="head=3 is no head"):
        sge.tl.fit(sdata, head=3, **RUN)
    for name in ("ridge", "a+b"):
        with pytest.raises(ValueError, match="Give it another name"):
            get_head(type("Mine", (Median,), {"name": name}))


def save_as(model, name, folder):
    """Save a model as if its head had another name."""
    text, tensors = contents(model)
    write_file(folder / "histosge.safetensors", text.replace('"median"', f'"{name}"'), tensors)


def test_a_model_whose_head_nobody_knows(model, tmp_path):
    save_as(model, "stranger", tmp_path)
    with pytest.raises(
        ValueError, match=r"has the head 'stranger', which is none of histosge's\. Pass its class: Model\."
    ):
        sge.Model.load(tmp_path)
    loaded = sge.Model.load(tmp_path, head=type("Stranger", (Median,), {"name": "stranger"}))
    assert torch.equal(loaded.heads[0][1].median, model.heads[0][1].median)


def test_a_head_of_an_installed_package(model, tmp_path, monkeypatch):
    (tmp_path / "brought.py").write_text(
        "from tests.test_own_head import Median\nclass Brought(Median):\n    name = 'brought'\n"
    )
    (tmp_path / "brought-1.dist-info").mkdir()
    (tmp_path / "brought-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: brought\nVersion: 1\n")
    points = "[histosge.heads]\nbrought = brought:Brought\nmisnamed = brought:Brought\n"
    (tmp_path / "brought-1.dist-info" / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(tmp_path)
    assert get_head("brought").name == "brought"
    with pytest.raises(ValueError, match=r"Did you mean 'brought'\?"):
        get_head("brougth")
    with pytest.raises(ValueError, match="The entry point and the head must have the same name"):
        get_head("misnamed")
    save_as(model, "brought", tmp_path / "model")
    assert sge.Model.load(tmp_path / "model").heads[0][1].name == "brought"
