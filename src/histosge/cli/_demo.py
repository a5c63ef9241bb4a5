"""``histosge demo``: the whole method, on a synthetic section with known truth."""

from __future__ import annotations

from pathlib import Path
from time import time

import click

from histosge.cli._shared import JSON, OUT_PATH, Command, as_json, held_out_lines, written


@click.command(cls=Command)
@click.option("-o", "--out", type=OUT_PATH, default=Path("demo"), show_default=True, help="Folder.")
@click.option("--rng", "--seed", "rng", type=int, default=0, show_default=True, help="Seed of section and training.")
@JSON
def demo(*, out: Path, rng: int, as_json_: bool) -> str:
    """Run everything on a synthetic section with known truth: offline, in about a minute.

    Writes OUT/section.zarr (SpatialData), OUT/predicted.h5ad and OUT/expression.png; replaces an OUT of an earlier
    demo.

    \b
    Examples:
      histosge demo
      histosge demo --out /tmp/demo --seed 1
    """  # noqa: D301
    import matplotlib as mpl

    mpl.use("agg")
    import numpy as np
    import scanpy as sc

    import histosge as sge
    from histosge._statistics import correlation

    start = time()
    with written(out, overwrite=True, marks=("section.zarr", "expression.png")) as (fresh,):
        sdata = sge.datasets.synthetic(rng=rng)
        click.echo(
            "1. a synthetic section: H&E image, Visium-like spots, Poisson counts, truth known everywhere", err=True
        )
        click.echo("2. sge.tl.predict(sdata, encoder='stain-texture')", err=True)
        sge.tl.predict(sdata, encoder="stain-texture", rng=rng)
        table = sdata.tables["histosge"]
        click.echo("3. sc.pp.pca → sc.pp.neighbors → sc.tl.leiden", err=True)
        sc.pp.pca(table, n_comps=min(15, table.n_vars - 1))
        sc.pp.neighbors(table)
        sc.tl.leiden(table, flavor="igraph", n_iterations=2, resolution=0.5, random_state=rng)
        fresh.mkdir()
        sdata.write(fresh / "section.zarr")
        table.write_h5ad(fresh / "predicted.h5ad")
        best = table.var["held_out_pcc"].sort_values(ascending=False).index[:2]
        axes = sge.pl.expression(sdata, list(best), obs="leiden")
        axes[0, 0].figure.savefig(fresh / "expression.png", dpi=110)

    held_out = table.uns["histosge"]["held_out"]
    between = ~table.obs["is_spot"].to_numpy()
    truth = sge.datasets.synthetic_truth(sdata, target_key="histosge_targets")[table.var_names].to_numpy()
    against_truth = float(correlation(np.asarray(table.X)[between], truth[between]).mean())
    n_domains = table.obs["leiden"].nunique()
    if as_json_:
        summary = {
            "out": out,
            "n_places": table.n_obs,
            "n_between_spots": int(between.sum()),
            "n_genes": table.n_vars,
            "n_domains": n_domains,
            "held_out": held_out,
            "pcc_with_truth_between_spots": against_truth,
            "seconds": round(time() - start, 1),
        }
        return as_json(summary)
    return "\n".join(
        [
            f"{table.n_obs} targets ({int(between.sum())} between spots) x {table.n_vars} genes, "
            f"{n_domains} domains, {time() - start:.0f} s",
            "Correlation with the measurement on held-out spots, mean over genes:",
            *held_out_lines(held_out),
            f"Correlation with the known truth between the spots: {against_truth:.3f}",
            f"Wrote {out}/section.zarr, {out}/predicted.h5ad and {out}/expression.png",
        ]
    )
