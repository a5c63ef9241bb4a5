"""Names of the heads."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from histosge._heads.in_context import InContext
from histosge._heads.published import Published
from histosge._heads.simple import Mean, Nearest, Ridge

if TYPE_CHECKING:
    from histosge._heads._protocol import Head

HEADS: dict[str, type[Head]] = {h.name: h for h in (InContext, Published, Ridge, Nearest, Mean)}


def get_head(name: str) -> type[Head]:
    """Find a head by its name."""
    if name not in HEADS:
        close = difflib.get_close_matches(str(name), HEADS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        msg = f"head={name!r} is unknown.{hint} Choose one of {sorted(HEADS)}."
        raise ValueError(msg)
    return HEADS[name]
