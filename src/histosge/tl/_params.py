"""Arguments of a call, as they are stored in ``uns``."""

from __future__ import annotations

import numbers
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

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
