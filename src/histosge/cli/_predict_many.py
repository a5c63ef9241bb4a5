"""``histosge predict IN... --out FOLDER``: many sections, and what this has in common with one."""

from __future__ import annotations

from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Any, cast

import click
from click.core import ParameterSource

from histosge.cli._shared import SOURCE_PATH, as_json, as_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from histosge._remote import Remote

_OF_THE_MODEL = ("head", "genes", "n_folds", "max_spots", "merge_um", "head_options", "tile_um")
"""Options that are not allowed with a fitted model"""
_OF_ONE_SECTION = (
    "images", "bin_size", "dataset_id", "store", "layers", "domains", "resolution", "n_domains", "plot", "report",
    "overwrite",
)  # fmt: skip
"""Options that are not allowed with --out"""
_SHOWN = ("section", "n_targets", "scores", "held_out_pcc", "seconds", "error")


def given_options(*names: str) -> list[str]:
    """Options among ``names`` that the user typed, as typed."""
    context = click.get_current_context()
    flags = {param.name: param.opts[0] for param in context.command.params}
    typed = [name for name in names if context.get_parameter_source(name) == ParameterSource.COMMANDLINE]
    return [flags[name] for name in typed]


def as_sources(
    first: Path | Remote, second: Path | Remote | None, more: Sequence[Path | Remote]
) -> list[Path | Remote]:
    """All paths as sections: the second was read as OUT, which need not exist."""
    context = click.get_current_context()
    param = next(p for p in context.command.params if p.name == "more")
    if isinstance(second, Path):
        second = SOURCE_PATH.convert(str(second), param, context)
    found = [] if second is None else [second]
    return [first, *found, *more]


def check_two(target: Path | Remote | None, more: Sequence[Path | Remote]) -> Path | Remote:
    """Return OUT; raise where there are not two paths."""
    if target is None:
        msg = "Missing argument 'OUT'. Name where to write: IN OUT for one section, IN... --out FOLDER for several."
        raise click.UsageError(msg)
    if more:
        msg = (
            f"{2 + len(more)} paths, but without --out there are two, IN and OUT. To predict several sections, name the "
            "folder of the results: --out FOLDER."
        )
        raise click.UsageError(msg)
    return target


def refuse_of_the_model(model: Path | None) -> None:
    """Raise where an option is given that a fitted model has its own value of."""
    if model is not None and (given := given_options(*_OF_THE_MODEL)):
        msg = f"{', '.join(given)}: the model in {model} has its own. Leave it out, or leave --model out."
        raise click.UsageError(msg)


def refuse_for_many(model: Path | None) -> None:
    """Raise where an option is given that is for one section."""
    if given := given_options(*_OF_ONE_SECTION):
        msg = (
            f"{', '.join(given)}: for one section, IN OUT. With --out, sections are written part by part as they are: "
            "leave it out, or predict one by one."
        )
        raise click.UsageError(msg)
    if given_options("on_invalid") and not given_options("target_key"):
        msg = "--on-invalid: for the shapes of --target-key. Pass that as well, or leave it out."
        raise click.UsageError(msg)
    refuse_of_the_model(model)


def model_options(model: Path | None, encoder: str, *, weights: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """Load the model, and the encoder where its name is not enough; arguments of ``tl.predict``."""
    import histosge as sge

    options: dict[str, Any] = {}
    by_name = True
    if model is not None:
        options["model"] = sge.Model.load(model)
        config = options["model"].config
        by_name = config.by_name
        if not given_options("encoder"):
            encoder = config.name
    options["encoder"] = encoder
    if weights is not None or trust_remote_code or not by_name:  # the model cannot load it by name
        options["encoder"] = sge.load_encoder(encoder, weights=weights, trust_remote_code=trust_remote_code)
    return options


def predict_many(
    sources: Sequence[Path | Remote], out: Path | Remote, *, json: bool, **options: Any
) -> tuple[str, int]:
    """Predict sections to a folder; what is printed, and the exit code."""
    import histosge as sge

    start = time()
    summary = cast("pd.DataFrame", sge.tl.predict(sources, store=cast("Any", out), **options))
    rows = summary.astype(object).where(summary.notna(), None).to_dict(orient="records")
    failed = [row["section"] for row in rows if row["error"] is not None]
    if json:
        text = as_json({"out": out, "sections": rows, "n_failed": len(failed), "seconds": round(time() - start, 1)})
    else:
        text = as_table(_SHOWN, [[row[name] for name in _SHOWN] for row in rows], decimals=3)
    return text, int(bool(failed))
