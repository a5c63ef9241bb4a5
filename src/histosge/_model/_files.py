"""Models on disk: one file of safetensors, with all that is no tensor as JSON in its header, and a sha256 of both.

One file has one commit point: it is written under another name, and renamed. Its sha256 is the fingerprint of the
model, and is compared with the content before that is used.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import pandas as pd
import torch

from histosge._atomic import naming, replacing
from histosge._heads import Spots, get_head, restore_head
from histosge._model._completion import complete
from histosge._model._projection import Projection
from histosge._model._schema import OF_SOME_SECTIONS, SCORES, check_tensors, config_of
from histosge._statistics import PredictionIntervals

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from typing import Any

    from torch import Tensor

    from histosge._heads import Head
    from histosge._model._model import Model
    from histosge._model._schema import Config

MODEL_FILE = "histosge.safetensors"
"""The file of a model in its folder: a name that no other program uses, so that no file of the user's is replaced"""
FORMAT = "6"
_SPOTS = ("embedding", "expression", "xy_um", "section")
_TRAINING = {"head": object, "fold": int, "epoch": int, "loss": float}
_REMEDY = "The file is damaged, or was changed. Copy it again from where it is whole, or fit the model again."


class ModelError(ValueError):
    """A saved model that cannot be used: it is damaged, was changed, or has another format.

    The message names the file, what is wrong in it, and what to do.

    Examples
    --------
    >>> import tempfile
    >>> import histosge as sge
    >>> folder = tempfile.mkdtemp()
    >>> with open(folder + "/histosge.safetensors", "wb") as file:
    ...     _ = file.write(b"half of a model")
    >>> try:
    ...     sge.Model.load(folder)
    ... except sge.ModelError:
    ...     print("fit it again")
    fit it again
    """


def contents(model: Model) -> tuple[str, dict[str, Tensor]]:
    """Return all of a model, as the text and the tensors of its file; raise where it cannot be read back."""
    if list(model.scores.drop(columns=list(OF_SOME_SECTIONS), errors="ignore")) != list(SCORES):
        msg = f"the model has scores {list(model.scores)}, but a file holds {list(SCORES)}. Leave others out."
        raise ModelError(msg)
    states = [head.state() for _, head in model.heads]
    tensors = {f"{i}.{name}": tensor for i, (_, weights) in enumerate(states) for name, tensor in weights.items()}
    tensors |= {f"spots.{name}": getattr(model.spots, name) for name in _SPOTS}
    tensors |= {f"projection.{name}": tensor for name, tensor in model.projection.state().items()}
    tensors |= {f"intervals.{name}": torch.as_tensor(array) for name, array in model.intervals.to_arrays().items()}
    tensors |= {f"scores.{name}": torch.as_tensor(column.to_numpy(copy=True)) for name, column in model.scores.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    values = {
        "head": model.head,
        "heads": [
            {"name": head.name, "weight": weight, "config": config}
            for (weight, head), (config, _) in zip(model.heads, states, strict=True)
        ],
        "genes": list(model.genes),
        "context_genes": list(model.context_genes),
        "held_out": model.held_out,
        "embedding": model.config.to_dict(),
        "pitch_um": model.spots.pitch_um,
        "info": model.info,
        "training": [
            {"head": head, "fold": fold, "losses": rows["loss"].tolist()}
            for (head, fold), rows in model.training.groupby(["head", "fold"], sort=False)
        ],
    }
    try:
        config = config_of(values)
        check_tensors(config, tensors, embedding=config.encoders())
    except ValueError as error:
        msg = f"the model could not be read back from a file, since {error} Fit it again, without changing it."
        raise ModelError(msg) from error
    return config.text(), tensors


def save_model(model: Model, folder: Path, *, overwrite: bool) -> None:
    """Write a model into a folder, in one step."""
    if (folder / MODEL_FILE).exists() and not overwrite:
        msg = f"{folder} holds a model already. Pass overwrite=True to replace it, or choose another folder."
        raise FileExistsError(msg)
    write_file(folder / MODEL_FILE, *contents(model))


def load_model(folder: Path) -> dict[str, Any]:
    """Read and check the fields of a model."""
    refuse_without_model(folder)
    path = folder / MODEL_FILE
    text, tensors = read_file(path)
    try:
        config = config_of(text)
        encoders = config.encoders()
        check_tensors(config, tensors, embedding=encoders)
    except ValueError as error:
        msg = f"{path}: {error} {_REMEDY}"
        raise ModelError(msg) from error
    of = {group: _group(tensors, group) for group in ("spots", "scores", "projection", "intervals")}
    embedding, expression, xy_um, section = (of["spots"][name] for name in _SPOTS)
    spots = Spots(embedding, expression, xy_um, section, config.pitch_um)
    genes = pd.Index(config.genes)
    values = config.model_dump()
    return {
        "head": config.head,
        "genes": genes,
        "context_genes": pd.Index(config.context_genes),
        "heads": _restore(config, tensors, spots=complete(spots), path=path),
        "scores": _scores(of["scores"], genes),
        "held_out": values["held_out"],
        "config": encoders,
        "spots": spots,
        "intervals": PredictionIntervals.from_arrays({name: t.numpy() for name, t in of["intervals"].items()}),
        "info": values["info"],
        "training": training_table({(one.head, one.fold): one.losses for one in config.training}),
        "projection": Projection.from_state(of["projection"]),
    }


def _scores(tensors: Mapping[str, Tensor], genes: pd.Index) -> pd.DataFrame:
    names = [name for name in (*SCORES, *OF_SOME_SECTIONS) if name in tensors]
    return pd.DataFrame({name: tensors[name].numpy() for name in names}, index=genes)


def training_table(losses: Mapping[tuple[str, int], Sequence[float]]) -> pd.DataFrame:
    """One row for each epoch."""
    rows = [(head, fold, i + 1, loss) for (head, fold), each in losses.items() for i, loss in enumerate(each)]
    return pd.DataFrame(rows, columns=list(_TRAINING)).astype(_TRAINING)


def _restore(config: Config, tensors: Mapping[str, Tensor], *, spots: Spots, path: Path) -> list[tuple[float, Head]]:
    heads = []
    for i, one in enumerate(config.heads):
        kind = _stored_head(path, one.name)
        try:
            head = restore_head(kind, dict(one.config), _group(tensors, str(i)), spots=spots)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            msg = f"{path}: heads.{i} cannot be a fitted head {one.name!r} ({reason[:300]}). {_REMEDY}"
            raise ModelError(msg) from error
        heads.append((one.weight, head))
    return heads


def _stored_head(path: Path, name: str) -> type[Head]:
    try:
        return get_head(name)
    except ValueError as error:
        msg = (
            f"{path.parent} has the head {name!r}, which is none of histosge's. Pass its class: "
            f"Model.load(path, head=...), or install the package that brings it (entry point {name!r} in the group "
            "'histosge.heads')."
        )
        raise ModelError(msg) from error


def _group(tensors: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    """Tensors whose names begin with a group and a dot, without these."""
    return {name.removeprefix(f"{group}."): t for name, t in tensors.items() if name.startswith(f"{group}.")}


# ------------------------------------------------------------------------------------------------------------- files


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """sha256 of a text and of tensors on the processor: names, dtypes, shapes and values."""
    found = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def write_file(path: Path, text: str, tensors: Mapping[str, Tensor]) -> None:
    """Write a file in one step: after an error, a full disk or a kill, what was there before is there still."""
    from safetensors.torch import save

    content = save(dict(tensors), {"histosge_format": FORMAT, "text": text, "sha256": digest(text, tensors)})
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft:
        draft.write_bytes(content)


def read_file(path: Path) -> tuple[str, dict[str, Tensor]]:
    """Read the text and the tensors of a file that :func:`write_file` wrote, and check its sha256."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            # copies, in memory of their own: the file may be replaced or cut off while the model is used
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 it is no dict
    except PermissionError as error:
        raise PermissionError(error.errno, error.strerror, str(path)) from error
    except Exception as error:
        msg = f"{path} cannot be read as safetensors ({error}). {_REMEDY}"
        raise ModelError(msg) from error
    if "histosge_format" not in about:
        msg = f"{path} was not written by histosge: its header has no format. Pass a folder that Model.save() wrote."
        raise ModelError(msg)
    if about["histosge_format"] != FORMAT:
        raise ModelError(other_format(path, about["histosge_format"]))
    text = about.get("text", "")
    if about.get("sha256") != (found := digest(text, tensors)):
        msg = f"{path}: its sha256 is {found}, but its header says {about.get('sha256')!r}. {_REMEDY}"
        raise ModelError(msg)
    return text, tensors


def other_format(path: Path, found: Any) -> str:
    """Say that a model has a format that this version does not read."""
    return f"{path} has model format {found!r}; this version of histosge reads {FORMAT}. Fit it again."


def refuse_without_model(folder: Path) -> None:
    """Raise where a folder holds no model, or one in the format of several files that came before."""
    if (folder / MODEL_FILE).exists():
        return
    try:
        found = json.loads((folder / "config.json").read_bytes())["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        msg = f"{folder} holds no model: there is no {MODEL_FILE}. Pass a folder that Model.save() wrote."
        raise FileNotFoundError(msg) from None
    raise ModelError(other_format(folder, found))
