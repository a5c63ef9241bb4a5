"""``histosge doctor``."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from histosge._settings import settings
from histosge.cli._shared import JSON, Command, as_json

if TYPE_CHECKING:
    from histosge.cli._checks import Check

_ACCESS = {True: "access granted", False: "no access", None: "access not known"}


@click.command(cls=Command)
@JSON
def doctor(*, as_json_: bool) -> tuple[str, int]:
    """Check Python, packages, GPU, memory, hub, access to gated encoders and disk, and say what to do.

    A line a check: ok, a note that is worth knowing, or a problem, with its remedy. The exit code is 1 only where
    histosge cannot run at all. -v lists each gated encoder with the page to ask for access at. Prints no token.

    \b
    Examples:
      histosge doctor
      histosge doctor -v
      histosge doctor --json > machine.json
    """  # noqa: D301
    from histosge.cli._checks import examine
    from histosge.datasets._download import data_folder

    checks = examine(folders={"data sets": (data_folder(), "HISTOSGE_DATA")})
    can_run = not any(check.fatal for check in checks)
    if as_json_:
        told = as_json({"can_run": can_run, "checks": [asdict(check) for check in checks]})
    else:
        shown = checks if settings.verbosity > 2 else _grouped(checks)
        ending = "histosge can run here." if can_run else "histosge cannot run here: see the problems above."
        told = "\n".join([*_lines(shown), ending])
    return told, 0 if can_run else 1


def _grouped(checks: list[Check]) -> list[Check]:
    """Gated encoders by access, a check for each answer instead of one for each encoder."""
    from histosge.cli._checks import Check

    each = [check for check in checks if check.name.startswith("encoder ")]
    groups = []
    for access, words in _ACCESS.items():
        names = [check.name.removeprefix("encoder ") for check in each if check.details["access"] is access]
        if names:
            remedy = None if access else "Each has a page to ask for access at: `histosge doctor -v` lists them."
            told = f"{words}: {', '.join(names)}"
            groups.append(Check("gated encoders", "ok" if access else "note", told, remedy))
    at = next((i for i, check in enumerate(checks) if check in each), len(checks))
    rest = [check for check in checks if check not in each]
    return [*rest[:at], *groups, *rest[at:]]


def _lines(checks: list[Check]) -> list[str]:
    width = max(len(check.name) for check in checks)
    indent = " " * (11 + width)
    lines = []
    for check in checks:
        for first, text in ((f"{check.status:<9}{check.name:<{width}}  ", check.told), (f"{indent}→ ", check.remedy)):
            if text is not None:
                wrapper = textwrap.TextWrapper(
                    120,
                    initial_indent=first,
                    subsequent_indent=indent,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
                lines.append(wrapper.fill(text))
    return lines
