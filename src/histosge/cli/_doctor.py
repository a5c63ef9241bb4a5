"""The command ``histosge doctor``: runs the checks in ``_doctor_checks.py`` and ``_doctor_hub.py``, and prints them."""

from __future__ import annotations

import platform
import textwrap
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import click

from histosge._settings import settings
from histosge.cli._doctor_checks import (
    Check,
    check_gpus,
    check_imports,
    check_packages,
    check_python,
    cores,
    dependency_versions,
    disks,
    first_line,
    memory,
    required_python,
)
from histosge.cli._doctor_hub import hub
from histosge.cli._shared import JSON, Command, as_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

_ACCESS = {True: "access granted", False: "no access", None: "access not known"}


@click.command(cls=Command)
@JSON
def doctor(*, as_json_: bool) -> tuple[str, int]:
    """Check Python, packages, GPU, memory, hub, access to gated encoders and disk, with remedies.

    One line for each check: ok, a note, or a problem with its remedy. The exit code is 1 only if histosge cannot run.
    -v lists the version of each package, and each gated encoder with the page to request access. Prints no token.

    \b
    Examples:
      histosge doctor
      histosge doctor -v
      histosge doctor --json > machine.json
    """  # noqa: D301
    from histosge.datasets import data_folder

    checks = examine(folders={"data sets": (data_folder(), "HISTOSGE_DATA")})
    text = machine_report(checks) if as_json_ else text_report(checks, in_full=settings.verbosity > 2)
    return text, 0 if can_run(checks) else 1


def examine(*, folders: Mapping[str, tuple[Path, str]]) -> list[Check]:
    """Check Python, packages, GPU, cores, memory, hub, encoders, disk, in this order.

    Parameters
    ----------
    folders
        Further folders to check, by their use, with the environment variable that sets them.
    """
    return collect(
        {
            "python": lambda: [check_python(platform.python_version(), wanted=required_python())],
            "packages": lambda: [check_packages(dependency_versions())],
            "imports": check_imports,
            "gpu": check_gpus,
            "cores": cores,
            "memory": memory,
            "hub": hub,
            "disk": lambda: disks(folders),
        }
    )


def collect(steps: Mapping[str, Callable[[], Iterable[Check]]]) -> list[Check]:
    """Run checks; a failing check must not stop the others."""
    checks: list[Check] = []
    for name, step in steps.items():
        try:
            checks += step()
        except Exception as err:  # noqa: BLE001  any error is reported
            message = f"could not be checked ({type(err).__name__}: {first_line(err)})"
            remedy = "See the checks above first; if nothing there explains it, report it as a bug of histosge."
            checks.append(Check(name, "problem", message, remedy))
    return checks


def can_run(checks: list[Check]) -> bool:
    """Whether histosge can run here."""
    return not any(check.fatal for check in checks)


def machine_report(checks: list[Check]) -> str:
    """All checks, as JSON."""
    return as_json({"can_run": can_run(checks), "checks": [asdict(check) for check in checks]})


def text_report(checks: list[Check], *, in_full: bool) -> str:
    """All checks, as lines."""
    shown = checks if in_full else _shortened(checks)
    ending = "histosge can run here." if can_run(checks) else "histosge cannot run here: see the problems above."
    return "\n".join([*_lines(shown), ending])


def _shortened(checks: list[Check]) -> list[Check]:
    """Shorten packages to their number, and gated encoders to one check for each kind of access."""
    each = [check for check in checks if check.name.startswith("encoder ")]
    groups = []
    for access, words in _ACCESS.items():
        names = [check.name.removeprefix("encoder ") for check in each if check.details["access"] is access]
        if names:
            remedy = None if access else "Each has a page to ask for access at: `histosge doctor -v` lists them."
            message = f"{words}: {', '.join(names)}"
            groups.append(Check("gated encoders", "ok" if access else "note", message, remedy))
    short: list[Check] = []
    for check in checks:
        if check in each:
            short += groups
            groups = []
        elif check.name == "packages" and check.status == "ok":
            n = len(check.details["versions"])
            short.append(replace(check, message=f"{n} installed; `histosge doctor -v` lists their versions"))
        else:
            short.append(check)
    return short


def _lines(checks: list[Check]) -> list[str]:
    width = max(len(check.name) for check in checks)
    indent = " " * (11 + width)
    lines = []
    for check in checks:
        for first, text in (
            (f"{check.status:<9}{check.name:<{width}}  ", check.message),
            (f"{indent}→ ", check.remedy),
        ):
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
