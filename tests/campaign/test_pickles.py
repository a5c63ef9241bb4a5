"""A pickle in every place that reads files is refused, and not run."""

from __future__ import annotations

import json
import pickle
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import histosge as sge

FAST = {"encoder": "stain-texture", "head": "ridge", "genes": 5, "progress": False}


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return Path.touch, (Path(self.mark),)


@pytest.fixture
def evil(tmp_path):
    """What makes a file when it is unpickled, which must not be there at the end."""
    mark = tmp_path / "ran"
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists()  # it works
    mark.unlink()
    yield Evil(mark)
    assert not mark.exists(), "a pickle was run"


def write(path, evil, *, kind):
    if kind == "torch":
        torch.save({"state_dict": {"weight": torch.zeros(3)}, "extra": evil}, path)
    elif kind == "legacy":
        torch.save({"weight": evil}, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(evil, protocol=2))


KINDS = ("torch", "legacy", "plain")


def test_files_of_weights(evil, tmp_path, tries, tally):
    names = ["bin", "pt", "pth", "ckpt", "safetensors"]
    cases = [("test_vit", f"w.{name}", kind) for name in names for kind in KINDS]
    cases += [("gigapath-flash", "w.bin", "torch"), ("crown", "w.pth", "legacy"), ("uni", "w.bin", "torch")]
    more = [(encoder, f"w.{name}", kind) for encoder in ("uni", "crown") for name in names for kind in KINDS]
    for encoder, file, kind in cases + more[: tries(0, len(more))]:
        write(tmp_path / file, evil, kind=kind)
        with pytest.raises(ValueError, match="are not weights alone|could not be read"):
            sge.load_encoder(encoder, weights=tmp_path / file)
        tally("pickles as files of weights")["refused"] += 1


def test_folders_of_weights(evil, tmp_path, tally):
    folder = tmp_path / "folder"
    folder.mkdir()
    configs = {
        "test_vit": {"architecture": "test_vit", "num_classes": 0, "pretrained_cfg": {"num_classes": 0}},
        "phikon": {"model_type": "vit", "num_hidden_layers": 1},
        "midnight": {"model_type": "dinov2", "num_hidden_layers": 1},
        "plip": {"model_type": "clip"},
    }
    for name, kind in product(configs, KINDS):
        (folder / "config.json").write_text(json.dumps(configs[name]))
        write(folder / "pytorch_model.bin", evil, kind=kind)
        with pytest.raises((ValueError, RuntimeError)):
            sge.load_encoder(name, weights=folder)
        tally("pickles in folders of weights")["refused"] += 1


@pytest.mark.parametrize("name", ["omiclip", "rudolfv2-s", "hibou-b", "mascaret"])
def test_code_of_a_folder_does_not_run(name, evil, tmp_path, tally):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}})
    )
    (tmp_path / "own.py").write_text(f"from pathlib import Path\nPath({evil.mark!r}).touch()\nclass Own: pass\n")
    for file in ("model.safetensors", "checkpoint.pt"):
        write(tmp_path / file, evil, kind="torch")
    with pytest.raises(ValueError, match="runs code of others when it is loaded"):
        sge.load_encoder(name, weights=tmp_path)
    tally("code in folders of weights")["refused"] += 1


def test_files_of_a_model(sdata, evil, tmp_path, tally):
    model = sge.tl.fit(sdata, **FAST)
    model.save(tmp_path / "model")
    for file in sorted(p.name for p in (tmp_path / "model").iterdir()):
        folder = tmp_path / f"with {file}"
        shutil.copytree(tmp_path / "model", folder)
        (folder / file).write_bytes(pickle.dumps(evil))
        with pytest.raises(Exception):  # noqa: B017, PT011  its messages are tested with the model
            sge.Model.load(folder)
        tally("pickles as files of a model")["refused"] += 1


def test_blocks_of_the_cache(sdata, evil, cache_folder, tally):
    spec = sge.EncoderSpec(name="mine", mpp=2.0, tile_px=8, embed_dim=3, coarsest_mpp=4.0, revision="1")
    module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    encoder = sge.load_encoder(module, spec=spec)
    first = sge.tl.embed(sdata, encoder=encoder, inplace=False, progress=False)
    blocks = sorted(cache_folder.rglob("*.npy"))
    assert blocks
    for content in (pickle.dumps(evil), None):
        for block in blocks:
            if content is None:
                np.save(block, np.array([evil], dtype=object), allow_pickle=True)
            else:
                block.write_bytes(content)
        again = sge.tl.embed(sdata, encoder=encoder, inplace=False, progress=False)
        np.testing.assert_array_equal(again.obsm["X_mine"], first.obsm["X_mine"])
        tally("pickles as blocks of the cache")["computed again"] += 1


@pytest.mark.parametrize("file", ["a.h5ad", "a.tif", "a.png", "a.csv", "a.tsv", "a.npz", "a.pkl", "a.zarr/zarr.json"])
def test_sections(file, evil, tmp_path, tally):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(evil))
    with pytest.raises((ValueError, OSError, KeyError, RuntimeError)):
        sge.io.read(tmp_path / file.split("/", maxsplit=1)[0])
    tally("pickles as sections")["refused"] += 1


@pytest.mark.parametrize("where", ["filters", "compressor", "v3"])
def test_codecs_of_zarr(where, evil, sdata, tmp_path, tally):
    """zarr finds the codec of an array by name, and one of the names is pickle."""
    import zarr

    sdata.write(tmp_path / "s.zarr")
    array = tmp_path / "s.zarr" / "tables" / "table" / "X"
    shutil.rmtree(array, ignore_errors=True)
    array.mkdir(parents=True)
    codec = {"id": "pickle", "protocol": 5}
    if where == "v3":
        meta = {
            "zarr_format": 3, "node_type": "array", "shape": [1], "data_type": "float32", "fill_value": 0.0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1]}}, "attributes": {},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": [{"name": "numcodecs.pickle", "configuration": {"protocol": 5}}, {"name": "bytes"}],
        }  # fmt: skip
        (array / "zarr.json").write_text(json.dumps(meta))
        chunk = array / "c" / "0"
    else:
        utf8 = {"id": "vlen-utf8"}
        meta = {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "fill_value": None, "order": "C"}
        filters = [utf8, codec] if where == "filters" else [utf8]
        meta |= {"filters": filters, "compressor": codec if where == "compressor" else None}
        (array / ".zarray").write_text(json.dumps(meta))
        chunk = array / "0"
    chunk.parent.mkdir(exist_ok=True)
    chunk.write_bytes(pickle.dumps(evil))
    with pytest.raises(Exception):  # noqa: B017, PT011  of numcodecs or zarr
        zarr.open_array(array, mode="r")[:]
    with pytest.raises((ValueError, OSError, KeyError, RuntimeError)):
        sge.pp.targets(sge.io.read(tmp_path / "s.zarr"), upsample=4)
    tally("pickles as codecs of zarr")["refused"] += 1
