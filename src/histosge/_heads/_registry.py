"""Names of the heads."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from histosge._heads.aggregate import Aggregate
from histosge._heads.coordinates import Coordinates
from histosge._heads.in_context import InContext
from histosge._heads.kriging import Kriging
from histosge._heads.published import Published
from histosge._heads.simple import Mean, Nearest, Ridge

if TYPE_CHECKING:
    from histosge._heads._protocol import Head

_ALL: tuple[type[Head], ...] = (InContext, Aggregate, Kriging, Published, Ridge, Coordinates, Nearest, Mean)
HEADS: dict[str, type[Head]] = {head.name: head for head in _ALL}
DEFAULT_HEAD, DEFAULT_DENSE_HEAD = "in-context+kriging", "aggregate+kriging"
"""Mean of the two strongest, for tiles and for areas: docs/benchmarks.md."""

POSITION_ONLY = ("nearest", "coordinates")
"""Know positions only: where nothing is measured they have nothing to say."""


def default_head(*, dense: bool) -> str:
    """Choose the head where none was named."""
    return DEFAULT_DENSE_HEAD if dense else DEFAULT_HEAD


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


def divides(name: str) -> bool:
    """Whether a head, or one of those joined, learns from the parts of spots."""
    return any(get_head(part).divides for part in parts_of(name))
