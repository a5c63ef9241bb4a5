"""What the file of a model may hold: a schema of its JSON, and the tensors that belong to it."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import AllowInfNan, BaseModel, ConfigDict, Field, JsonValue, ValidationError
from pydantic_core import from_json

from histosge._embedding import EmbeddingConfig
from histosge._heads import HEADS
from histosge._model._projection import N_COLUMNS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    Shape = tuple[int | None, ...]
    """``None`` for any length"""

SCORES = {
    "highly_variable": torch.bool,
    "held_out_pcc": torch.float32,
    "held_out_mse": torch.float32,
    "predictable": torch.bool,
}
"""Columns of :attr:`Model.scores`"""
OF_SOME_SECTIONS = {"n_sections": torch.int64}
"""The column that is there as well where some sections do not measure some genes"""
_BEFORE_QUANTILES = 4
"""Columns of the intervals that are no quantile"""

Name = Annotated[str, Field(min_length=1)]
Positive = Annotated[float, Field(gt=0)]
FromOne = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    """No other fields, no conversion of types, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class _Head(_Strict):
    name: Name
    weight: Annotated[float, Field(gt=0, le=1)]
    config: dict[str, JsonValue]


class _HeldOut(_Strict):
    pcc: Annotated[float, Field(ge=-1.001, le=1.001)]
    mse: Annotated[float, Field(ge=0)]


class _Info(_Strict, extra="allow"):
    split: str
    n_folds: Annotated[int, Field(ge=2)]
    n_spots: FromOne
    n_sections: FromOne
    pitch_um: Positive
    spot_um: Positive
    unit: Name
    __pydantic_extra__: dict[str, JsonValue]


class _Losses(_Strict):
    head: Name
    fold: Annotated[int, Field(ge=0)]
    losses: list[Annotated[float, AllowInfNan()]]
    """After each epoch; NaN where training diverged for a while"""


class Config(_Strict):
    """All of a model but its tensors."""

    head: Name
    heads: Annotated[list[_Head], Field(min_length=1)]
    genes: Annotated[list[str], Field(min_length=1)]
    context_genes: list[str]
    held_out: dict[Name, _HeldOut]
    embedding: dict[str, JsonValue]
    pitch_um: Positive
    info: _Info
    training: list[_Losses]

    def text(self) -> str:
        """JSON, the same for the same model."""
        return json.dumps(self.model_dump())

    def encoders(self) -> EmbeddingConfig:
        """How locations are embedded."""
        try:
            config = EmbeddingConfig.from_dict(dict(self.embedding))
            again = config.to_dict()
        except Exception as error:
            msg = f"embedding={_short(self.embedding)}: {type(error).__name__}: {error}"
            raise ValueError(msg) from error
        _need(again == self.embedding, "embedding", self.embedding, f"as in {_short(again)}")
        _need(isinstance(config.dense, bool), "embedding.dense", config.dense, "true or false")
        n_splits = len(config.encoders) - 1
        _need(len(config.splits) == n_splits, "embedding.splits", config.splits, f"{n_splits} numbers")
        for i, one in enumerate(config.encoders):
            ok = isinstance(one.mpp, float | int) and 0.001 <= one.mpp <= 10_000
            _need(ok, f"embedding.encoders.{i}.mpp", one.mpp, "µm per pixel")
        return config


def config_of(values: dict[str, Any] | str) -> Config:
    """Make a config from values or JSON; raise ValueError with the field and its value where they are wrong."""
    try:
        # values by way of JSON too: heads may hold tuples and numbers of numpy
        text = values if isinstance(values, str) else json.dumps(values, default=_plain)
        config = Config.model_validate(from_json(text))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where, value = ".".join(map(str, first["loc"])) or "JSON", first["input"]
        msg = f"{where}={_short(value)}: {first['msg']}."
        raise ValueError(msg) from error
    for field in ("genes", "context_genes"):
        twice = [name for name, n in Counter(getattr(config, field)).items() if n > 1]
        _need(not twice, field, twice[:3], "each name once")
    others = sorted(set(config.genes) - set(config.context_genes))
    _need(not others, "genes", others[:3], "names among context_genes")
    names = list(dict.fromkeys(head.name for head in config.heads))
    _need(names == [part.strip() for part in config.head.split("+")], "heads", names, f"those of head={config.head!r}")
    total = sum(head.weight for head in config.heads)
    _need(abs(total - 1) < 1e-6, "heads", total, "weights whose sum is 1")
    scored = sorted(config.held_out)
    _need({config.head, *names} <= {*scored}, "held_out", scored, f"scores of {[config.head, *names]}")
    _need(config.info.pitch_um == config.pitch_um, "info.pitch_um", config.info.pitch_um, f"{config.pitch_um}")
    for i, one in enumerate(config.training):
        _need(one.head in names, f"training.{i}.head", one.head, f"one of {names}")
        _need(one.fold < config.info.n_folds, f"training.{i}.fold", one.fold, f"below {config.info.n_folds}")
    return config


def check_tensors(config: Config, tensors: Mapping[str, Tensor], *, embedding: EmbeddingConfig) -> None:
    """Raise ValueError where tensors do not agree with the config; shapes of heads are left to the heads."""
    wanted = _wanted(config, tensors, n_joined=len(embedding.splits) and len(embedding.encoders))
    heads = {str(i): head.name for i, head in enumerate(config.heads)}
    head_of = {name: heads.get(name.partition(".")[0]) for name in tensors if name not in wanted}
    unknown = sorted(name for name, head in head_of.items() if head is None)
    _need(not unknown, "tensors", unknown[:3], "no others than those of a model")
    missing = sorted(set(wanted) - set(tensors))
    _need(not missing, "tensors", sorted(tensors)[:3], f"{missing[:3]} as well")
    for name, (dtype, shape) in wanted.items():
        found = tensors[name]
        if name == "spots.expression" and "scores.n_sections" in tensors:
            found = _without_absent(found, section=tensors["spots.section"])
        check_tensor(name, found, dtype=dtype, shape=shape)
    for name, head in head_of.items():
        if head in HEADS:  # those of others may hold what they like
            check_tensor(name, tensors[name], dtype=torch.float32)
    if embedding.splits:
        ends = np.cumsum([len(tensors[f"projection.{i}.mean"]) for i in range(len(embedding.encoders) - 1)]).tolist()
        _need(ends == list(embedding.splits), "embedding.splits", embedding.splits, f"{ends}")
    levels, numbers = tensors["intervals.levels"].numpy(), tensors["intervals.numbers"]
    rising = len(levels) > 0 and bool((np.diff(levels) > 0).all()) and levels[0] > 0 and levels[-1] < 1
    _need(rising, "intervals.levels", levels[:3].tolist(), "increasing numbers between 0 and 1")
    n_columns = _BEFORE_QUANTILES + len(levels)
    _need(numbers.shape[1] == n_columns, "intervals.numbers", tuple(numbers.shape), f"{n_columns} columns")
    n_spots, n_sections = int(tensors["intervals.n_spots"]), config.info.n_sections
    _need(n_spots == config.info.n_spots, "intervals.n_spots", n_spots, f"{config.info.n_spots}")
    sections = tensors["spots.section"].unique().tolist()
    _need(
        sections == [*range(min(n_sections, len(sections) + 1))],
        "spots.section",
        sections[:9],
        f"0 to {n_sections - 1}",
    )


def _without_absent(expression: Tensor, *, section: Tensor) -> Tensor:
    """Put 0 for genes that a whole section does not measure (NaN); other NaN stay, and are refused."""
    if expression.ndim != 2 or section.shape != expression.shape[:1]:
        return expression  # refused for its shape
    found = expression.clone()
    for one in section.unique():
        rows = (section == one).nonzero()
        absent = expression[rows[:, 0]].isnan().all(0).nonzero()[:, 0]
        found[rows, absent] = 0.0
    return found


def check_tensor(name: str, tensor: Tensor, *, dtype: torch.dtype, shape: Shape | None = None) -> None:
    """Raise ValueError where a tensor has another dtype or shape, or a number that is not finite."""
    fits = shape is None or (
        tensor.ndim == len(shape) and all(w in (None, n) for n, w in zip(tensor.shape, shape, strict=True))
    )
    if tensor.dtype != dtype or not fits:
        msg = f"{name} is {_type(tensor.dtype, tuple(tensor.shape))}: it must be {_type(dtype, shape)}."
        raise ValueError(msg)
    n_wrong = int((~tensor.isfinite()).sum())
    if n_wrong:
        msg = f"{name} has {n_wrong} of {tensor.numel()} numbers that are NaN or infinite: all must be finite."
        raise ValueError(msg)


def _type(dtype: torch.dtype, shape: Shape | None) -> str:
    lengths = "" if shape is None else f" ({', '.join('any' if n is None else str(n) for n in shape)})"
    return f"{str(dtype).removeprefix('torch.')}{lengths}"


def _wanted(config: Config, tensors: Mapping[str, Tensor], *, n_joined: int) -> dict[str, tuple[torch.dtype, Shape]]:
    """Return dtype and shape of each tensor that is no head's; ``n_joined`` encoders have a projection."""
    n, n_genes, n_context = config.info.n_spots, len(config.genes), len(config.context_genes)
    float32 = torch.float32
    wanted: dict[str, tuple[torch.dtype, Shape]] = {
        "spots.embedding": (float32, (n, n_joined * N_COLUMNS or None)),
        "spots.expression": (float32, (n, n_context)),
        "spots.xy_um": (float32, (n, 2)),
        "spots.section": (torch.int64, (n,)),
        "intervals.numbers": (float32, (n_genes, None)),
        "intervals.levels": (torch.float64, (None,)),
        "intervals.n_spots": (torch.int64, ()),
    }
    scores = SCORES | (OF_SOME_SECTIONS if "scores.n_sections" in tensors else {})
    wanted |= {f"scores.{name}": (dtype, (n_genes,)) for name, dtype in scores.items()}
    for i in range(n_joined):
        mean = tensors.get(f"projection.{i}.mean")
        d = mean.numel() if mean is not None else None
        shapes: dict[str, Shape] = {"mean": (d,), "spread": (d,), "matrix": (d, N_COLUMNS), "offset": (N_COLUMNS,)}
        wanted |= {f"projection.{i}.{name}": (float32, shape) for name, shape in shapes.items()}
    return wanted


def _need(ok: bool, field: str, value: Any, want: str) -> None:  # noqa: FBT001 a condition
    if not ok:
        msg = f"{field}={_short(value)}: it must be {want}."
        raise ValueError(msg)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return repr(text) if isinstance(value, str) and len(text) <= 60 else text if len(text) <= 60 else f"{text[:57]}..."


def _plain(value: Any) -> Any:
    """Turn what JSON does not know into what it knows."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    msg = f"heads: {value!r} is a {type(value).__name__}, and a head's state() has numbers, strings, lists and dicts."
    raise ValueError(msg)
