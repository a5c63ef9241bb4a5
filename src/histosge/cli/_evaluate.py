"""``histosge evaluate``: scores of heads on held-out spots."""

from __future__ import annotations

from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Any

import click

from histosge._settings import logger
from histosge.cli._shared import (
    COMPUTE,
    ENCODER,
    JSON,
    KEYS,
    LEARN,
    OUT_FIGURE,
    OVERWRITE,
    RAW,
    SOURCE_PATH,
    Command,
    Names,
    OutPath,
    as_json,
    as_table,
    cache_setting,
    heads_option,
    loaded_encoder,
    read_sections,
    refuse_input_as_output,
    taking,
    written,
)

if TYPE_CHECKING:
    import pandas as pd

    from histosge._remote import Remote

_MEANS = ("pcc", "spearman", "mse", "skill", "ceiling", "coverage", "ari", "nmi")
_STDOUT = Path("-")


@click.command(cls=Command)
@click.argument("sources", nargs=-1, required=True, type=SOURCE_PATH, metavar="IN...")
@taking(
    click.option(
        "-o",
        "--out",
        type=OutPath(".csv", ".parquet", "-"),
        metavar="FILE",
        help="Scores, one row for each gene, head and split: .csv or .parquet, or '-' for CSV on standard output.",
    ),
    click.option("--plot", type=OUT_FIGURE, metavar="FILE", help="Draw the scores: .png, .pdf or .svg."),
    click.option("--heads", type=Names(), help="Heads, with commas. By default the default head and its baselines."),
    click.option(
        "--split",
        default="blocks",
        show_default=True,
        help="What is held out: blocks, random, lattice, sections or pseudo-spots.",
    ),
    click.option("--n-splits", type=int, default=5, show_default=True, help="Number of splits."),
    click.option("--n-repeats", type=int, default=1, show_default=True, help="Number of repeats."),
    click.option("--buffer-um", type=float, help="Width of the buffer around blocks in µm. By default 2.5 pitches."),
    click.option("--block-um", type=float, help="Edge of the blocks in µm. By default four buffers."),
    click.option(
        "--keep", type=int, default=4, show_default=True, help="With --split lattice: learn from 1 in so many."
    ),
    click.option("--protocol", default="held-out", show_default=True, help="held-out, or published: the paper's."),
    click.option("--labels", help="Column of the table that annotates domains, to compare domains with."),
    *RAW,
    *ENCODER,
    click.option("--dense/--no-dense", default=False, help="Embed the areas of spots, as for bins and cells."),
    *LEARN,
    *heads_option("Arguments of heads by name, as JSON."),
    *KEYS,
    *COMPUTE,
    OVERWRITE,
    JSON,
)
def evaluate(
    *,
    sources: tuple[Path | Remote, ...],
    out: Path | None,
    plot: Path | None,
    images: tuple[Path, ...],
    bin_size: int | None,
    weights: str | None,
    trust_remote_code: bool,
    no_cache: bool,
    overwrite: bool,
    as_json_: bool,
    encoder: str,
    **options: Any,
) -> str:
    """Score heads on held-out spots of the sections IN, and print their means.

    IN is as for `histosge predict`. Several sections are scored one by one; with --split sections, heads learn from the
    others.

    \b
    Examples:
      histosge evaluate section.zarr --encoder uni2
      histosge evaluate section.zarr -o scores.csv --plot scores.png --heads in-context,ridge
      histosge evaluate a.zarr b.zarr c.zarr --split sections -o scores.parquet
      histosge evaluate outs --image he.tif --encoder stain-texture --json
    """  # noqa: D301
    import histosge as sge

    start = time()
    file = None if out == _STDOUT else out
    if out == _STDOUT and as_json_:
        msg = "--out - and --json both write to standard output: name a file, or leave one of them out."
        raise click.UsageError(msg)
    for path in filter(None, (file, plot)):
        refuse_input_as_output(sources, path, name=str(path))
    with written(file, plot, overwrite=overwrite, marks=()) as (fresh_file, fresh_plot):
        sections = read_sections(sources, images=images, bin_size=bin_size)
        how = loaded_encoder(encoder, weights=weights, trust_remote_code=trust_remote_code)
        with sge.settings.override(**cache_setting(no_cache=no_cache)):
            scores = sge.tl.evaluate(sections, encoder=how, **options)
        if file is not None:
            _write(scores, fresh_file)
        if plot is not None:
            _draw(scores, fresh_plot)
    for path in filter(None, (file, plot)):
        logger.info("wrote %s", path)
    if out == _STDOUT:
        return str(scores.to_csv(index=False)).rstrip("\n")
    means = scores.groupby("head", sort=False)[[name for name in _MEANS if name in scores]].mean()
    means = means.sort_values("pcc", ascending=False)
    if as_json_:
        summary = {
            "sources": list(sources),
            "split": options["split"],
            "protocol": options["protocol"],
            "n_genes": scores["gene"].nunique(),
            "n_rows": len(scores),
            "heads": means.to_dict(orient="index"),
            "out": file,
            "plot": plot,
            "seconds": round(time() - start, 1),
        }
        return as_json(summary)
    shown = means.reset_index()
    return as_table(shown, shown.astype(object).to_numpy().tolist(), decimals=3)


def _write(scores: pd.DataFrame, path: Path) -> None:
    if path.suffix == ".csv":
        scores.to_csv(path, index=False)
    else:
        scores.to_parquet(path, index=False)


def _draw(scores: pd.DataFrame, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    import histosge as sge

    figure = sge.pl.evaluation(scores)[0].figure
    figure.savefig(path, dpi=150)
    plt.close(figure)
