"""Heads by name: built in, from other packages, and passed by the user."""

from __future__ import annotations

import copy
import difflib
import inspect
from importlib.metadata import entry_points
from pickle import PicklingError
from typing import TYPE_CHECKING, Any

import joblib

from histosge._heads._protocol import Head, Queries
from histosge._heads.aggregate import Aggregate
from histosge._heads.coordinates import Coordinates
from histosge._heads.in_context import InContext
from histosge._heads.kriging import Kriging
from histosge._heads.published import Published
from histosge._heads.simple import Mean, Nearest, Ridge
from histosge._settings import is_number, is_whole

if TYPE_CHECKING:
    from torch import Tensor

    from histosge._heads._protocol import Spots

AnyHead = str | type[Head] | Head
"""Names joined by ``+``, or a class or an object of the protocol"""
_ALL: tuple[type[Head], ...] = (InContext, Aggregate, Kriging, Published, Ridge, Coordinates, Nearest, Mean)
HEADS: dict[str, type[Head]] = {head.name: head for head in _ALL}
DEFAULT_HEAD, DEFAULT_DENSE_HEAD = "in-context+kriging", "aggregate+kriging"
"""Mean of the two strongest heads, for tiles and for areas: docs/benchmarks.md."""

POSITION_ONLY = ("nearest", "coordinates")
"""Heads that know positions only: they cannot predict where nothing is measured."""

ENTRY_POINTS = "histosge.heads"
"""Group of entry points through which packages provide heads."""
_MEMBERS = ("name", "ensembles_folds", "learns_sub_spots", "losses", "fit", "predict", "state", "from_state", "to")
_FROM_0 = ("n_exact", "n_steps")
"""Options that may be 0; all other whole numbers begin at 1."""
_MOST = {"n_neighbours": 10_000}
"""Options that memory grows with, whatever the number of spots"""
_TRIED = 64
"""Spots that a restored head is tried on"""
_PASSED: dict[str, type[Head]] = {}
"""Heads of the user, by name, so that a model of this process can be saved and loaded"""


def default_head(*, dense: bool) -> str:
    """Choose the head where the user names none."""
    return DEFAULT_DENSE_HEAD if dense else DEFAULT_HEAD


def get_head(head: AnyHead) -> type[Head]:
    """Find the class of a single head, given as a name, a class or an object."""
    if not isinstance(head, str):
        return _passed(head)
    if head in HEADS:
        return HEADS[head]
    if head in _PASSED:
        return _PASSED[head]
    provided = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if head in provided:
        origin = f"head={head!r}, entry point {provided[head].value!r},"
        kind = _checked(provided[head].load(), origin=origin)
        if kind.name != head:
            msg = f"{origin} has the name {kind.name!r}. The entry point and the head must have the same name."
            raise ValueError(msg)
        return kind
    names = sorted({*HEADS, *_PASSED, *provided})
    close = difflib.get_close_matches(head, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    msg = (
        f"head={head!r} is unknown.{hint} Choose one of {names}, or several with '+' for their mean. A head of your "
        "own is passed as a class or an object, see histosge.Head."
    )
    raise ValueError(msg)


def head_name(head: AnyHead) -> str:
    """Name of a head, or the names of several joined by ``+``."""
    return head if isinstance(head, str) else get_head(head).name


def head_digest(head: AnyHead) -> str:
    """Identify a head: by name, and an object also by what it holds, such as its options."""
    if isinstance(head, (str, type)):
        return head_name(head)
    try:
        return f"{head_name(head)} {joblib.hash(head)}"
    except (PicklingError, TypeError, AttributeError) as error:
        msg = (
            f"head={head!r} cannot be compared with that of an earlier run, since it cannot be pickled ({error}). "
            "With store=, pass its class, with head_options=, or hold in it what can be pickled."
        )
        raise TypeError(msg) from error


def parts_of(head: AnyHead) -> tuple[str, ...]:
    """Names of the heads whose mean ``head`` is: ``"in-context+kriging"`` is the mean of two."""
    parts = tuple(part.strip() for part in head_name(head).split("+"))
    for part in parts:
        get_head(part)
    if len(set(parts)) < len(parts):
        msg = f"head={head!r} names a head twice. Name each once."
        raise ValueError(msg)
    return parts


def new_head(head: AnyHead, options: dict[str, Any]) -> Head:
    """Make a head that is not fitted: from a name or a class with options, or as a copy of an object."""
    if isinstance(head, (str, type)):
        return get_head(head)(**options)
    return copy.deepcopy(head)


def wrong_option(kind: type[Head], option: str, value: Any) -> str | None:
    """Say what an option of one of our heads must be, where ``value`` is something else."""
    if HEADS.get(kind.name) is not kind:
        return None
    default = inspect.signature(kind).parameters[option].default
    if isinstance(default, float):
        return None if is_number(value) and 0 <= value <= 1 else "a number from 0 to 1"
    least, most = 0 if option in _FROM_0 else 1, _MOST.get(option)
    if (value is None and default is None) or (is_whole(value) and least <= value <= (most or value)):
        return None
    return f"a whole number from {least}{f' to {most}' if most else ''}{', or None' if default is None else ''}"


def restore_head(kind: type[Head], config: dict[str, Any], weights: dict[str, Tensor], *, spots: Spots) -> Head:
    """Restore a fitted head of unknown origin; raise where its state does not belong to it.

    One of ours also predicts at a few of the ``spots`` that it learnt from.
    """
    ours = HEADS.get(kind.name) is kind
    for option, value in config.items() if ours else ():
        if option in inspect.signature(kind).parameters and (wrong := wrong_option(kind, option, value)):
            msg = f"config.{option}={value!r} must be {wrong}."
            raise ValueError(msg)
    head = kind.from_state(config, weights)
    again, tensors = head.state()
    differs = sorted(n for n in {*weights, *tensors} if _shape(weights, n) != _shape(tensors, n))
    if ours:
        differs = [
            f"config.{n}" for n in sorted({*config, *again}) if config.get(n, ...) != again.get(n, ...)
        ] + differs
    if differs:
        msg = f"{differs[:3]} are not those of a head {kind.name!r}."
        raise ValueError(msg)
    if ours:
        some = slice(0, _TRIED)
        known = spots.take(spots.section.new_tensor(range(len(spots))[some]))
        # a prime number of places, which hardly is the length of anything else
        found = head.predict(Queries.of(known, hidden=False).take(slice(0, 11)), context=known)
        if found.shape[1:] != spots.expression.shape[1:] or not bool(found.isfinite().all()):
            msg = f"its predictions are {tuple(found.shape)}, or not finite, for {spots.expression.shape[1]} genes."
            raise ValueError(msg)
    return head


def _shape(tensors: dict[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None


def learns_sub_spots(head: AnyHead) -> bool:
    """Whether a head, or one of several joined heads, learns from sub-spots."""
    return any(get_head(part).learns_sub_spots for part in parts_of(head))


def _passed(head: Any) -> type[Head]:
    kind = _checked(head if isinstance(head, type) else type(head), origin=f"head={head!r}")
    if HEADS.get(kind.name) is kind:
        return kind
    if kind.name in HEADS or "+" in kind.name:
        msg = f"head={head!r} has the name {kind.name!r}, which histosge uses. Give it another name, without '+'."
        raise ValueError(msg)
    _PASSED[kind.name] = kind
    return kind


def _checked(kind: Any, *, origin: str) -> type[Head]:
    missing = [name for name in _MEMBERS if not hasattr(kind, name)]
    if missing or not isinstance(kind, type):
        msg = (
            f"{origin} is no head: it lacks {missing}. Pass the name of a head (one of {sorted(HEADS)}), or a class or "
            "an object of the protocol: a subclass of histosge.Head with its methods and a name."
        )
        raise TypeError(msg)
    return kind
