"""Arguments of a call, as they are kept in ``uns``."""

from __future__ import annotations

import numbers
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

_ELSEWHERE = ("sdata", "options", "store", "inplace", "progress")
"""What a table does not depend on: the input, where the result goes, what is shown."""


def recorded(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call as plain values that any file holds: ``door(sdata, **recorded)`` repeats the call.

    Arguments that are ``None`` are left out, since files lose them; ``None`` is their default. An object, such as a model,
    an encoder of the user or a generator, is named in angle brackets: to repeat the call, it must be passed itself.

    Parameters
    ----------
    arguments
        ``locals()`` at the start of a door. Those in ``options`` count as arguments of their own.

    Raises
    ------
    ValueError
        Where an argument is the name of an object that was recorded.
    """
    given = {**arguments, **arguments.get("options", {})}
    named = [name for name, value in given.items() if isinstance(value, str) and re.fullmatch("<.*>", value)]
    if named:
        msg = f"{named[0]}={given[named[0]]!r} names an object that was passed in an earlier call: pass the object itself."
        raise ValueError(msg)
    found = {name: _plain(value) for name, value in given.items() if value is not None and name not in _ELSEWHERE}
    if not isinstance(found.get("encoder", ""), str):  # joined encoders have one name
        found["encoder"] = "+".join(found["encoder"])
    return found


def _plain(value: Any) -> Any:
    """Numbers, strings, arrays and dicts; arrays, since lists come back from files as arrays."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, str | Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items() if one is not None}
    if isinstance(value, Collection):
        each = [_plain(one) for one in value]
        return np.array(each, object if any(isinstance(one, str) for one in each) else None)
    if isinstance(value, np.random.Generator):
        return "<generator>"
    if hasattr(value, "fingerprint"):
        return f"<Model {value.fingerprint()}>"
    name = getattr(value, "name", None) or getattr(getattr(value, "spec", None), "name", None)
    return f"<{name or type(value).__name__}>"
