"""``histosge`` in a shell, with the names and defaults of Python; one file for each command or group of commands."""

from __future__ import annotations

import warnings

import click

from histosge import __version__
from histosge._settings import settings
from histosge.cli._cache import cache
from histosge.cli._datasets import datasets
from histosge.cli._demo import demo
from histosge.cli._doctor import collect, doctor, machine_report, text_report
from histosge.cli._doctor_checks import (
    Check,
    check_cores,
    check_folder,
    check_gpus,
    check_imports,
    check_memory,
    check_packages,
    check_python,
    dependency_versions,
)
from histosge.cli._doctor_hub import check_hub
from histosge.cli._encoders import encoders
from histosge.cli._evaluate import evaluate
from histosge.cli._fit import fit
from histosge.cli._intervals import intervals
from histosge.cli._predict import predict
from histosge.cli._shared import as_table, readable_size

__all__ = [
    "Check",
    "as_table",
    "check_cores",
    "check_folder",
    "check_gpus",
    "check_hub",
    "check_imports",
    "check_memory",
    "check_packages",
    "check_python",
    "collect",
    "dependency_versions",
    "machine_report",
    "main",
    "readable_size",
    "text_report",
]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="histosge")
@click.option("-q", "--quiet", is_flag=True, help="Show warnings and errors only.")
@click.option("-v", "--verbose", is_flag=True, help="Show details, and where an error comes from.")
def main(*, quiet: bool, verbose: bool) -> None:
    """Super-resolved spatial transcriptomics from H&E images and Visium-like spots.

    Names and defaults are those of Python: `tile_um=` is --tile-um. Results go to standard output, log and progress to
    standard error.

    \b
    Examples:
      histosge doctor
      histosge demo
      histosge predict outs predicted.zarr --image he.tif --domains --plot map.png
      histosge COMMAND --help

    \b
    Exit codes:
      0  done
      1  an error; the last line is its message, with the remedy
      2  wrong usage
    """  # noqa: D301  click's mark for a paragraph without wrapping
    settings.verbosity = 1 if quiet else 3 if verbose else 2
    # about a future default of zarr, for every array: users of the shell cannot change it
    warnings.filterwarnings("ignore", message="zarr v3 autosharding")


for _command in (demo, predict, intervals, fit, evaluate, encoders, datasets, cache, doctor):
    main.add_command(_command)
