"""Encoders are known by their content: other weights of the same name, and files that are not their weights."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import histosge as sge
from histosge._encoders import encoder_digest
from histosge._section import read_section

FAST = {"head": "ridge", "genes": 5, "progress": False}


def own(seed, *, name="mine", revision="1"):
    """An encoder of a user: one name, random weights."""
    torch.manual_seed(seed)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 8, stride=8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )
    spec = sge.EncoderSpec(name=name, mpp=2.0, tile_px=32, embed_dim=6, coarsest_mpp=4.0, revision=revision)
    return sge.load_encoder(module, spec=spec)


def values(sdata, key, encoder="mine"):
    return sdata.tables[key].obsm[f"X_{encoder}"]


def test_other_weights_of_one_name(sdata, tmp_path, tally, log):
    found = tally("other weights of the same name")
    one, other = own(0), own(1)

    # in the cache and in a table: embedded anew
    sge.tl.embed(sdata, encoder=one, progress=False)
    first = values(sdata, "spots_mine")
    table = sge.tl.embed(sdata, encoder=other, inplace=False, progress=False)
    assert "was made with other encoder: embedding again" in log.text
    assert np.abs(table.obsm["X_mine"] - first).max() > 0.01
    found["cache and table: embedded again"] += 1

    # in fit: the table of the first is not used
    model = sge.tl.fit(sdata, encoder=other, **FAST)
    rows = read_section(sdata, report=False).rows
    np.testing.assert_allclose(model.spots.embedding.numpy(), table.obsm["X_mine"][rows], atol=1e-6)
    found["fit: embedded again"] += 1

    # in predict(model=), in memory and from disk: refused
    model.save(tmp_path / "model")
    for each in (model, sge.Model.load(tmp_path / "model")):
        with pytest.raises(ValueError, match=r"'mine' is not the one the model was trained with: other weights, class"):
            sge.tl.predict(sdata, model=each, encoder=one, inplace=False, progress=False)
        found["model: refused"] += 1
        sge.tl.predict(sdata, model=each, encoder=other, inplace=False, progress=False)
    before = encoder_digest(other)
    other.module[0].weight.data.mul_(2)  # after the fit
    assert encoder_digest(other) != before
    with pytest.raises(ValueError, match=r"other weights, class or revision \(digest [0-9a-f]{12} instead of"):
        sge.tl.predict(sdata, model=model, encoder=other, inplace=False, progress=False)
    found["model: refused"] += 1

    # joined with another
    joined = sge.tl.fit(sdata, encoder=[own(0), "rgb"], **FAST)
    with pytest.raises(ValueError, match="'mine' is not the one the model was trained with"):
        sge.tl.predict(sdata, model=joined, encoder=[own(1), "rgb"], inplace=False, progress=False)
    found["joined: refused"] += 1


@pytest.mark.parametrize("joined", [False, True], ids=["alone", "joined"])
def test_a_store_does_not_go_on_with_other_weights(sdata, tmp_path, tally, joined, monkeypatch):
    from histosge._section import TableStore

    def encoder(seed):
        return [own(seed), "rgb"] if joined else own(seed)

    class Killed(BaseException):
        pass

    def write(store, part, matrices):
        raise Killed

    path = tmp_path / "out.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(TableStore, "write", write)
        with pytest.raises(Killed):
            sge.tl.predict(sdata, encoder=encoder(0), store=path, **FAST)
    with pytest.raises(ValueError, match=r"unfinished run with other arguments.*encoder\.mine\.digest is .*, was "):
        sge.tl.predict(sdata, encoder=encoder(1), store=path, **FAST)
    sge.tl.predict(sdata, encoder=encoder(0), store=path, **FAST)
    assert path.exists()
    tally("a store and other weights")["store: refused"] += 1


def test_embeddings_of_another_precision(sdata, log):
    """A table of a GPU is used on a processor, except where a precision is asked for; a model says it."""
    encoder = own(0)
    sge.tl.embed(sdata, encoder=encoder, progress=False)
    sdata.tables["spots_mine"].uns["histosge"]["precision"] = "bfloat16"
    model = sge.tl.fit(sdata, encoder=encoder, **FAST)
    assert "using the embeddings of sdata.tables['spots_mine'], computed in bfloat16" in log.text
    with sge.settings.override(precision="float32"):
        sge.tl.fit(sdata, encoder=encoder, **FAST)
    assert "was made with other precision: embedding again" in log.text
    with sge.settings.override(precision="bfloat16"):
        sge.tl.predict(sdata, model=model, encoder=encoder, inplace=False, progress=False)
    assert "trained on embeddings in float32, and cpu computes them in bfloat16" in log.text


# ------------------------------------------------------------------------------------------- files of other networks


def mutations(name, random):
    """Ways to make weights of ``name`` wrong: what is done, and the tensors."""
    state = {k: v.clone() for k, v in timm.create_model(name, num_classes=0).state_dict().items()}
    real = [k for k, v in state.items() if v.is_floating_point()]
    some = real[random.integers(len(real))]
    wide = [k for k in real if state[k].ndim > 1 and state[k].shape[0] != state[k].shape[1]]
    turned = wide[random.integers(len(wide))]
    bad = state[some].clone()
    bad.reshape(-1)[random.integers(bad.numel())] = float("nan") if random.random() < 0.5 else float("inf")
    return {
        "renamed key": {(f"{k}_" if k == some else k): v for k, v in state.items()},
        "renamed keys": {f"backbone.{k}": v for k, v in state.items()},
        "missing key": {k: v for k, v in state.items() if k != some},
        "extra key": state | {"blocks.99.weight": torch.zeros(3)},
        "permuted shape": state | {turned: state[turned].transpose(0, 1).contiguous()},
        "not finite": state | {some: bad},
        "another network": timm.create_model("test_resnet" if name == "test_vit" else "test_vit").state_dict(),
        "empty": {},
        "cut off": state,
    }


def test_files_that_are_not_the_weights(tmp_path, tries, tally):
    found = tally("weights of other networks, damaged weights")
    path = tmp_path / "w.safetensors"
    for case in range(tries(3, 60)):
        random = np.random.default_rng(case)
        name = ["test_vit", "test_resnet", "test_efficientnet"][case % 3]
        for kind, state in mutations(name, random).items():
            save_file({k: v.contiguous() for k, v in state.items()}, path)
            if kind == "cut off":
                content = path.read_bytes()
                path.write_bytes(content[: random.integers(len(content))])
            with pytest.raises(
                ValueError, match=rf"'{name}'.*(not those of|damaged|could not be read)|of encoder '{name}'"
            ):
                sge.load_encoder(name, weights=path)
            found["refused with a message"] += 1
        head = timm.create_model(name).state_dict()
        save_file(head, path)
        assert sge.load_encoder(name, weights=path).module.state_dict().keys() <= head.keys()
        found["right"] += 1
