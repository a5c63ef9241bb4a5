"""``histosge predict``: from a section on disk to a predicted table, its domains, a map and a report."""

from __future__ import annotations

import math
from contextlib import contextmanager
from time import time
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from histosge._settings import logger
from histosge.cli._shared import (
    COMPUTE,
    ENCODER,
    JSON,
    KEYS,
    LEARN,
    OUT_FIGURE,
    OUT_PATH,
    OVERWRITE,
    RAW,
    SOURCE_PATH,
    Command,
    Names,
    OutPath,
    as_json,
    cache_setting,
    heads_option,
    read_sections,
    refuse_input_as_output,
    taking,
    written,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from spatialdata import SpatialData

_OF_THE_MODEL = ("head", "genes", "n_folds", "max_spots", "merge_um", "head_options", "tile_um")
"""Options that are not allowed with a fitted model"""
_MOST_DRAWN = 4
_PROVENANCE = ("head", "mpp", "tile_um", "dense", "seed")


class _Resolution(click.FloatRange):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        return self.fail(f"{value} is no number.", param, ctx) if math.isnan(found) else found


@click.command(cls=Command)
@click.argument("source", type=SOURCE_PATH, metavar="IN")
@click.argument("target", type=OUT_PATH, metavar="OUT")
@taking(
    *RAW,
    click.option("--dataset-id", help="Name of the section, which its elements begin with. By default the folder's."),
    *ENCODER,
    click.option("--dense/--no-dense", default=None, help="Embed areas. By default for bins and small shapes."),
    click.option("--head", help="Head; by default in-context+kriging, or aggregate+kriging for bins."),
    *LEARN,
    *heads_option("Arguments of the head, as JSON."),
    click.option("--model", type=SOURCE_PATH, metavar="FOLDER", help="Use the model that `histosge fit` saved."),
    click.option("--upsample", type=int, help="Targets per spot: 2, 4, 8 or 16 (the default is 4)."),
    click.option("--bin-um", type=float, help="Edge of square bins in µm."),
    click.option("--target-key", help="Shapes to predict at."),
    click.option("--tissue", default="auto", show_default=True, help="Where targets lie: auto, or spots."),
    click.option(
        "--on-invalid", default="raise", show_default=True, help="With --target-key: raise, or skip invalid shapes."
    ),
    click.option("--conserve", is_flag=True, help="Also bins that average to their spot, without noise."),
    click.option("--store", is_flag=True, help="Write OUT.zarr part by part, targets and table only; resumes."),
    click.option("--layers", type=Names(), default="", help="With OUT.h5ad: layers to keep as well as X: conserved."),
    click.option("--domains", is_flag=True, help="Find spatial domains in the prediction (leiden)."),
    click.option(
        "--resolution",
        type=_Resolution(min=0, max=1000, min_open=True),
        default=1.0,
        show_default=True,
        help="With --domains: larger gives more.",
    ),
    click.option("--n-domains", type=click.IntRange(min=2), help="With --domains: number of domains."),
    click.option(
        "--plot", type=OUT_FIGURE, metavar="FILE", help="Draw image, measured, predicted: .png, .pdf or .svg."
    ),
    click.option("--report", type=OutPath(".html"), metavar="FILE", help="Write a page about the run: .html."),
    click.option("--key-added", default="histosge", show_default=True, help="Name of the table."),
    *KEYS,
    *COMPUTE,
    OVERWRITE,
    JSON,
)
def predict(
    *,
    source: Path,
    target: Path,
    images: tuple[Path, ...],
    bin_size: int | None,
    dataset_id: str | None,
    model: Path | None,
    weights: str | None,
    trust_remote_code: bool,
    no_cache: bool,
    store: bool,
    layers: tuple[str, ...],
    domains: bool,
    resolution: float,
    n_domains: int | None,
    plot: Path | None,
    report: Path | None,
    overwrite: bool,
    as_json_: bool,
    **options: Any,
) -> str | None:
    """Predict expression for the section IN and write it to OUT.

    IN is a SpatialData store (.zarr), a folder of Space Ranger, or a table (.h5ad); --image adds the microscope's
    image. With --model and --mpp it may be an image alone. OUT.zarr gets everything, as SpatialData; with --store only
    targets and table. OUT.h5ad gets the table only. Outputs get their names when they are complete.

    --plot draws the genes of --genes (four at most), else the two that are predicted best, and with --domains the
    domains. --domains, --plot and --report need the table in memory, so they do not go with --store.

    \b
    Examples:
      histosge predict section.zarr predicted.zarr
      histosge predict outs predicted.zarr --image he.tif --domains --plot map.png
      histosge predict outs predicted.h5ad --image he.tif --encoder stain-texture --genes EPCAM,VIM
      histosge predict section.zarr fine.zarr --encoder uni2 --bin-um 8 --store
      histosge predict section.zarr predicted.zarr --model model --report report.html
    """  # noqa: D301
    import histosge as sge

    start = time()
    _check_usage(
        target, store=store, overwrite=overwrite, model=model, plot=plot, report=report, domains=domains,
        layers=layers, conserve=options["conserve"],
    )  # fmt: skip
    refuse_input_as_output([source], target, name=f"OUT{target.suffix}")
    for path in filter(None, (plot, report)):
        refuse_input_as_output([source], path, name=str(path))
    key = options["key_added"]
    with written(plot, report, overwrite=overwrite) as (fresh_plot, fresh_report):
        with written(None if store else target, overwrite=overwrite) as (fresh,):
            found = True
            if model is not None:
                options["model"] = sge.Model.load(model)
                config = options["model"].config
                found = config.by_name
                if not _given("encoder"):
                    options["encoder"] = config.name
            [sdata] = read_sections([source], images=images, bin_size=bin_size, dataset_id=dataset_id)
            if weights is not None or trust_remote_code or not found:  # the model cannot load it by name
                encoder = options["encoder"]
                options["encoder"] = sge.load_encoder(encoder, weights=weights, trust_remote_code=trust_remote_code)
            with sge.settings.override(**cache_setting(no_cache=no_cache)):
                made = sge.tl.predict(sdata, store=target if store else None, inplace=not store, **options)
            table = sdata.tables[key] if made is None else made
            if domains:
                sge.tl.domains(sdata, key=key, resolution=resolution, n_domains=n_domains, rng=options["rng"])
            if target.suffix == ".h5ad":
                with _quiet():
                    sge.io.write_h5ad(sdata, fresh, key=key, layers=layers)
            elif not store:
                sdata.write(fresh)
        logger.info("wrote %s", target)  # the table stays if a picture fails
        genes = options["genes"] if isinstance(options["genes"], list) else []
        genes = [gene for gene in genes if gene in table.var_names][:_MOST_DRAWN]
        if plot is not None:
            best = genes or list(table.var["held_out_pcc"].sort_values(ascending=False).index[:2])
            _draw(sdata, fresh_plot, key=key, genes=best, obs="domain" if domains else None)
        if report is not None:
            with _quiet():
                sge.pl.report(sdata, fresh_report, key=key, genes=genes or None)
    for path in filter(None, (plot, report)):
        logger.info("wrote %s", path)
    if not as_json_:
        return None
    provenance = table.uns["histosge"]
    summary = {
        "source": source,
        "out": target,
        "plot": plot,
        "report": report,
        "table": key,
        "n_places": table.n_obs,
        "n_genes": table.n_vars,
        "n_predictable": int(table.var["predictable"].sum()),
        **({"n_domains": table.obs["domain"].nunique()} if domains else {}),
        "encoder": provenance["encoder"]["name"],
        **{name: provenance[name] for name in _PROVENANCE if name in provenance},
        "held_out": provenance["held_out"],
        "seconds": round(time() - start, 1),
    }
    return as_json(summary)


def _check_usage(
    target: Path,
    *,
    store: bool,
    overwrite: bool,
    model: Path | None,
    domains: bool,
    plot: Path | None,
    report: Path | None,
    layers: tuple[str, ...],
    conserve: bool,
) -> None:
    if target.suffix not in ("", ".zarr", ".h5ad"):
        msg = f"OUT is {target}: choose a name that ends in .zarr (everything) or .h5ad (the predicted table alone)."
        raise click.UsageError(msg)
    if store:
        if target.suffix == ".h5ad":
            msg = f"OUT is {target}, but --store writes a SpatialData store: choose a name that ends in .zarr."
            raise click.UsageError(msg)
        if overwrite:
            msg = "--store continues where an earlier run stopped and replaces nothing: leave --overwrite out."
            raise click.UsageError(msg)
        if domains or plot is not None or report is not None:
            msg = "--domains, --plot and --report need the whole table in memory: leave --store out, or them."
            raise click.UsageError(msg)
    if target.suffix != ".h5ad" and (given := _given("layers")):
        msg = f"{given[0]}: OUT.zarr holds all layers. Leave it out, or write OUT.h5ad."
        raise click.UsageError(msg)
    if set(layers) - ({"conserved"} if conserve else set()):
        msg = f"--layers {','.join(layers)}: the only layer is conserved, with --conserve. Pass that, or leave it out."
        raise click.UsageError(msg)
    if _given("on_invalid") and not _given("target_key"):
        msg = "--on-invalid: for the shapes of --target-key. Pass that as well, or leave it out."
        raise click.UsageError(msg)
    if not domains and (given := _given("resolution", "n_domains")):
        msg = f"{', '.join(given)}: for --domains. Pass that as well, or leave it out."
        raise click.UsageError(msg)
    if model is not None and (given := _given(*_OF_THE_MODEL)):
        msg = f"{', '.join(given)}: the model in {model} has its own. Leave it out, or leave --model out."
        raise click.UsageError(msg)


def _given(*names: str) -> list[str]:
    """Options among ``names`` that the user typed."""
    context = click.get_current_context()
    typed = [name for name in names if context.get_parameter_source(name) == ParameterSource.COMMANDLINE]
    return [f"--{name.replace('_', '-')}" for name in typed]


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop log lines "wrote" with the temporary name of a file."""
    import histosge as sge

    with sge.settings.override(verbosity=min(sge.settings.verbosity, 1)):
        yield


def _draw(sdata: SpatialData, path: Path, *, key: str, genes: list[str], obs: str | None) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    import histosge as sge

    figure = sge.pl.expression(sdata, genes, key=key, obs=obs)[0, 0].figure
    figure.savefig(path, dpi=110)
    plt.close(figure)
