"""Arguments and provenance of a call, as they are stored in ``uns``."""

from __future__ import annotations

import numbers
import re
from collections.abc import Collection, Mapping
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from histosge import _keys
from histosge._remote import Remote, is_url, located
from histosge._section import refuse_read_only

if TYPE_CHECKING:
    from histosge._embedding import Embedder
    from histosge._geometry import Targets
    from histosge._model import Model

_ELSEWHERE = ("sdata", "options", "store", "inplace", "progress")
"""Arguments that are not recorded: the input, the destination of the result, and what is shown."""


def recorded(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call as plain values for any file: ``door(sdata, **recorded)`` repeats the call.

    Arguments that are ``None`` are left out, since files lose them; ``None`` is their default. An object, such as a
    model, an encoder of the user or a generator, is named in angle brackets. To repeat the call, pass the object
    itself.

    Parameters
    ----------
    arguments
        ``locals()`` at the start of a door. Those in ``options`` count as arguments of their own.

    Raises
    ------
    ValueError
        Where an argument is such a name of an object.
    """
    given = {**arguments, **arguments.get("options", {})}
    named = [name for name, value in given.items() if isinstance(value, str) and re.fullmatch("<.*>", value)]
    if named:
        first = f"{named[0]}={given[named[0]]!r}"
        msg = f"{first} names an object that was passed in an earlier call: pass the object itself."
        raise ValueError(msg)
    found = {name: _plain(value) for name, value in given.items() if value is not None and name not in _ELSEWHERE}
    if not isinstance(found.get("encoder", ""), str):  # joined encoders have one name
        found["encoder"] = "+".join(found["encoder"])
    return found


def check_call(arguments: dict[str, Any]) -> None:
    """Raise where arguments of :func:`histosge.tl.predict` are wrong or contradict each other, whatever the section."""
    sdata, model, dense = arguments["sdata"], arguments["model"], arguments["dense"]
    if isinstance(sdata, str | PathLike):
        msg = (
            f"sdata={str(sdata)!r} is a path: open it with `sge.io.read`, or pass a list of paths with store=, the "
            "folder of the results."
        )
        raise TypeError(msg)
    if model is not None and not hasattr(model, "fingerprint"):
        msg = f"model={model!r} is no fitted model: pass that of `sge.tl.fit`, or `sge.Model.load(path)`."
        raise TypeError(msg)
    if model is not None and dense not in (None, model.config.dense):
        msg = f"dense={dense!r}, but the model was trained with dense={model.config.dense!r}. Leave dense= out."
        raise ValueError(msg)
    if is_url(arguments["store"]) and isinstance(place := located(arguments["store"]), Remote):
        refuse_read_only(place)
    _keys.check("key_added", arguments["key_added"])
    given = {k: arguments[k] for k in ("upsample", "bin_um", "target_key") if arguments[k] is not None}
    if len(given) > 1:
        several = " and ".join(f"{k}={v!r}" for k, v in given.items())
        msg = f"{several} are ways to say where to predict: pass one of them."
        raise ValueError(msg)
    if arguments["target_key"] is None and arguments["on_invalid"] != "raise":
        msg = (
            f"on_invalid={arguments['on_invalid']!r} is for the shapes of target_key=: pass that as well, or leave "
            "on_invalid= out."
        )
        raise ValueError(msg)


def provenance(
    embedder: Embedder, targets: Targets, model: Model, *, seed: int | str, layer: str | None
) -> dict[str, Any]:
    """Provenance of a predicted table, for ``uns``."""
    section = embedder.section
    return {
        **embedder.provenance,
        "head": model.head,
        "held_out": cast("dict[str, Any]", model.held_out),
        **model.info,
        "seed": seed,
        **({"spots": section.spots_key, "table": section.table_key} if section.measured else {}),
        **({"training": {c: v.to_numpy() for c, v in model.training.items()}} if len(model.training) else {}),
        **({} if layer is None else {"layer": layer}),
        "coordinate_system": section.coordinate_system,
        "technology": section.technology,
        "mpp_source": section.mpp_source,
        "input": section.values.input,
        "tissue": targets.tissue,
        "unit": model.info.get("unit", section.values.unit),
        "versions": {name: version(name) for name in ("histosge", "torch", "spatialdata", "anndata")},
    }


def _plain(value: Any) -> Any:
    """Convert to numbers, strings, arrays and dicts; lists to arrays, since files return them as arrays."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, str | Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items() if item is not None}
    if isinstance(value, Collection):
        items = [_plain(item) for item in value]
        return np.array(items, object if any(isinstance(item, str) for item in items) else None)
    if isinstance(value, np.random.Generator):
        return "<generator>"
    if hasattr(value, "fingerprint"):
        return f"<Model {value.fingerprint()}>"
    name = getattr(value, "name", None) or getattr(getattr(value, "spec", None), "name", None)
    return f"<{name or type(value).__name__}>"
