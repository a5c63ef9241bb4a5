"""Arguments that several doors share: one type, default and text, and a signature that looks as if written by hand."""

from __future__ import annotations

import inspect
from typing import Unpack

import pytest

import histosge as sge
from histosge._options import Embedding, FitOptions, Learning, Reading, Running, arguments, expand, pick

DOORS = {
    "pp.targets": (sge.pp.targets, [Reading]),
    "tl.embed": (sge.tl.embed, [Reading, Embedding, Running]),
    "tl.fit": (sge.tl.fit, [Reading, Embedding, Learning, Running]),
    "tl.predict": (sge.tl.predict, [Reading, Embedding, Learning, Running]),
    "tl.evaluate": (sge.tl.evaluate, [Reading, Embedding, Learning, Running]),
}
doors = pytest.mark.parametrize("door", DOORS)


@expand(Reading)
def door(sdata: str, *, own: int = 1, **reading: Unpack[Reading]) -> tuple[str, int, dict[str, object]]:
    """Read.

    Parameters
    ----------
    sdata
        What to read,
        on two lines.
    image_key, spots_key, table_key
    own
        Its own.
    layer, coordinate_system
    mpp
        A text of its own.

    Returns
    -------
    What it got.
    """
    return sdata, own, dict(reading)


def test_docstring_and_signature_are_written_out():
    lines = (door.__doc__ or "").splitlines()
    at = lines.index("image_key")
    assert lines[at - 2 : at + 3] == [
        "    What to read,",
        "    on two lines.",
        "image_key",
        "    H&E image in ``sdata.images``. ``None`` takes the only one.",
        "spots_key",
    ]
    assert lines[lines.index("mpp") + 1 :] == ["    A text of its own.", "", "Returns", "-------", "What it got."]
    assert str(inspect.signature(door)).replace("'", "") == (
        "(sdata: str, *, image_key: str | None = None, spots_key: str | None = None, table_key: str | None = None, "
        "own: int = 1, layer: str | None = None, coordinate_system: str | None = None, mpp: float | None = None) "
        "-> tuple[str, int, dict[str, object]]"
    )
    assert inspect.signature(inspect.unwrap(door)) == inspect.signature(door)  # Sphinx looks there


def test_function_gets_every_option():
    nothing = dict.fromkeys(arguments(Reading))
    assert door("a") == ("a", 1, nothing)
    assert door("a", own=2, layer="raw", mpp=0.5) == ("a", 2, nothing | {"layer": "raw", "mpp": 0.5})
    everything = {name: argument.default for name, (_, argument) in arguments(FitOptions).items()}
    assert pick(everything, Learning) == {"genes": 1000, "n_folds": 5, "max_spots": 100_000, "merge_um": None, "rng": 0}


def test_unknown_arguments():
    with pytest.raises(TypeError, match=r"^door\(\) has no argument imagekey=\. Did you mean image_key=\?$"):
        door("a", imagekey="he")
    with pytest.raises(TypeError, match=r"^door\(\) has no argument foo=\. Choose from sdata, image_key, .*, mpp\.$"):
        door("a", foo=1)
    for function, _ in DOORS.values():
        with pytest.raises(TypeError, match=r"has no argument cordinate_system=\. Did you mean coordinate_system=\?"):
            function(None, cordinate_system="global")
    with pytest.raises(TypeError, match="positional"):
        door("a", "he")


def test_without_docstrings():
    """As ``python -OO`` leaves them."""

    def bare(sdata, **reading):
        return reading

    assert list(inspect.signature(expand(Reading)(bare)).parameters) == ["sdata", *arguments(Reading)]


def test_docstring_that_forgets_an_argument():
    def forgetful(sdata, *, own=1, **reading):
        """Read.

        Parameters
        ----------
        sdata
            What to read.
        image_key, spots_key, table_key, layer, coordinate_system, mpp
        """

    with pytest.raises(TypeError, match=r"forgetful: the docstring has .* the signature .*'own'"):
        expand(Reading)(forgetful)


@doors
def test_doors_share_types_and_defaults(door):
    function, groups = DOORS[door]
    signature = inspect.signature(function)
    assert all(p.kind is p.KEYWORD_ONLY for name, p in signature.parameters.items() if name != "sdata")
    for group in groups:
        for name, (_, argument) in arguments(group).items():
            assert signature.parameters[name].default == argument.default
            assert (function.__doc__ or "").count(f"\n{name}\n") == 1


@doors
def test_types_of_doors_can_be_looked_up(door):
    """By Sphinx and by editors: each type is an object, or a name that the module of the door knows."""
    function, groups = DOORS[door]
    names = {name for group in groups for name in arguments(group)}
    strings = {n: a for n, a in function.__annotations__.items() if n in names and isinstance(a, str)}
    for annotation in strings.values():
        eval(annotation, inspect.unwrap(function).__globals__)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        *[
            ("memory_gb", wrong, "choose a number of gigabytes above 0, or None for what is free")
            for wrong in (0, -1, "8")
        ],
        *[("part_rows", wrong, "choose a whole number of rows from 1") for wrong in (0, 2.5, None, True)],
    ],
)
def test_impossible_settings_are_refused_where_they_are_made(name, value, why):
    before = getattr(sge.settings, name)
    with pytest.raises(ValueError, match=rf"^settings\.{name}={value!r}: {why}\.$"):
        setattr(sge.settings, name, value)
    assert getattr(sge.settings, name) == before
