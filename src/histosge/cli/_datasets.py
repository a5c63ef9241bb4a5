"""``histosge datasets``: published and synthetic sections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from histosge._settings import logger
from histosge.cli._shared import JSON, OUT_STORE, OVERWRITE, Command, as_json, as_table, written


@click.group()
def datasets() -> None:
    """List and fetch published sections, or make a synthetic one with known truth.

    \b
    Examples:
      histosge datasets list
      histosge datasets fetch mouse_brain
      histosge datasets synthetic section.zarr
    """  # noqa: D301


@datasets.command("list", cls=Command)
@JSON
def datasets_list(*, as_json_: bool) -> str:
    """List the published sections: technology, tissue, size, licence, and whether they are on disk.

    \b
    Examples:
      histosge datasets list
      histosge datasets list --json
    """  # noqa: D301
    import histosge as sge

    frame = sge.datasets.published()
    if as_json_:
        return as_json(frame.reset_index(names="name").to_dict(orient="records"))
    shown = frame[["technology", "size_gb", "on_disk", "tissue", "licence"]].reset_index(names="name")
    return as_table(shown, shown.astype(object).to_numpy().tolist())


@datasets.command("fetch", cls=Command)
@click.argument("name")
@click.argument("target", type=OUT_STORE, metavar="[OUT.zarr]", required=False)
@OVERWRITE
@JSON
def datasets_fetch(*, name: str, target: Path | None, overwrite: bool, as_json_: bool) -> str:
    """Download the missing files of a published section, and print its folder.

    With OUT.zarr the section is read as well and written there, as SpatialData.

    \b
    Examples:
      histosge datasets fetch mouse_brain
      histosge datasets fetch mouse_brain section.zarr
    """  # noqa: D301
    import histosge as sge

    with written(target, overwrite=overwrite) as (fresh,):
        folder = Path(sge.datasets.fetch(name))
        if target is not None:
            sge.datasets.load(name).write(fresh)
    return as_json({"name": name, "folder": folder, "out": target}) if as_json_ else str(target or folder)


@datasets.command("synthetic", cls=Command)
@click.argument("target", type=OUT_STORE, metavar="OUT.zarr")
@click.option("--n-rows", type=int, default=20, show_default=True, help="Rows of the array of spots.")
@click.option("--n-cols", type=int, default=20, show_default=True, help="Spots in a row.")
@click.option("--n-genes", type=int, default=60, show_default=True, help="Genes.")
@click.option("--mpp", type=float, default=1.0, show_default=True, help="µm per pixel of the image.")
@click.option("--rng", "--seed", "rng", type=int, default=0, show_default=True, help="Seed.")
@click.option("--detail-um", type=float, default=70.0, show_default=True, help="Width of the finest structures in µm.")
@click.option("--gland-um", type=float, help="Width of glands in µm. By default there are none.")
@click.option("--bin-um", type=float, help="Measure in square bins of this edge in µm, as Visium HD does.")
@click.option("--genes-rng", type=int, help="Seed of which gene follows what. By default --rng.")
@OVERWRITE
def datasets_synthetic(*, target: Path, overwrite: bool, **options: Any) -> None:
    """Make a section whose truth is known everywhere: image, spots, counts.

    \b
    Examples:
      histosge datasets synthetic section.zarr
      histosge datasets synthetic hd.zarr --bin-um 8 --gland-um 40
    """  # noqa: D301
    import histosge as sge

    with written(target, overwrite=overwrite) as (fresh,):
        sge.datasets.synthetic(**options).write(fresh)
    logger.info("wrote %s", target)
