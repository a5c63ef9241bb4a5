"""Names of the heads."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from histosge._heads.coordinates import Coordinates
from histosge._heads.in_context import InContext
from histosge._heads.kriging import Kriging
from histosge._heads.published import Published
from histosge._heads.simple import Mean, Nearest, Ridge

if TYPE_CHECKING:
    from histosge._heads._protocol import Head

HEADS: dict[str, type[Head]] = {h.name: h for h in (InContext, Kriging, Published, Ridge, Coordinates, Nearest, Mean)}
DEFAULT_HEAD = "in-context+kriging"
"""Mean of the two strongest: docs/benchmarks.md."""


def get_head(name: str) -> type[Head]:
    """Find a head by its name."""
    if name not in HEADS:
        close = difflib.get_close_matches(str(name), HEADS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        msg = f"head={name!r} is unknown.{hint} Choose one of {sorted(HEADS)}, or several with '+' for their mean."
        raise ValueError(msg)
    return HEADS[name]


def parts_of(name: str) -> tuple[str, ...]:
    """Names of the heads whose mean ``name`` is: ``"in-context+kriging"`` is the mean of two."""
    parts = tuple(part.strip() for part in str(name).split("+"))
    for part in parts:
        get_head(part)
    if len(set(parts)) < len(parts):
        msg = f"head={name!r} names a head twice. Name each once."
        raise ValueError(msg)
    return parts
