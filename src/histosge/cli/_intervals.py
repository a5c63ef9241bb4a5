"""``histosge intervals``: prediction intervals of a predicted table on disk."""

from __future__ import annotations

from time import time
from typing import TYPE_CHECKING

import click

from histosge._settings import logger
from histosge._statistics import LEVEL
from histosge.cli._shared import JSON, SOURCE_PATH, Command, Names, as_json, taking

if TYPE_CHECKING:
    from pathlib import Path


@click.command(cls=Command)
@click.argument("path", type=SOURCE_PATH, metavar="PREDICTED")
@taking(
    click.option("--level", type=float, default=LEVEL, show_default=True, help="Target coverage."),
    click.option("--genes", type=Names(), help="Names with commas. By default all genes."),
    click.option("--key", default="histosge", show_default=True, help="Table of a SpatialData store."),
    click.option(
        "--progress/--no-progress", default=None, help="Progress bars. By default where a terminal shows them."
    ),
    JSON,
)
def intervals(
    *, path: Path, level: float, genes: tuple[str, ...] | None, key: str, progress: bool | None, as_json_: bool
) -> str | None:
    """Write prediction intervals into PREDICTED, which `histosge predict` wrote, at any level.

    PREDICTED is a store (.zarr) or a table (.h5ad). It gets the layers sd, lower and upper, with the shape of X; other
    genes are NaN. Layers of an earlier run are replaced. Few rows are in memory at a time, and an interrupted run
    leaves PREDICTED unchanged.

    \b
    Examples:
      histosge intervals predicted.zarr
      histosge intervals predicted.h5ad --level 0.95 --genes EPCAM,VIM
    """  # noqa: D301
    from histosge._section import write_interval_layers

    start = time()
    used, n_genes = write_interval_layers(path, key=key, level=level, genes=genes, progress=progress)
    logger.info("wrote layers 'sd', 'lower', 'upper' to %s: intervals at level %g of %d genes", path, used, n_genes)
    if not as_json_:
        return None
    return as_json({"out": path, "table": key, "level": used, "n_genes": n_genes, "seconds": round(time() - start, 1)})
