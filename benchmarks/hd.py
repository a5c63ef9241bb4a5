"""Visium HD: whole capture areas to cells in a store, and what heads lose by learning from some of the bins. docs/benchmarks.md.

    python benchmarks/hd.py area [--bins 20000 100000 500000] [--genes 1000] [--folder FOLDER]
    python benchmarks/hd.py learn [--bins 20000] [--genes 300] [--seeds 1] [--heads in-context+kriging aggregate+kriging]

Counts and image are made (`sge.datasets.synthetic`: bins of 8 µm with about 215 counts, glands of 24 µm), so the truth is
known. `area` predicts polygons of about 10 µm on the whole section, in a process of its own; FOLDER keeps the sections.
`learn` compares bins that are merged with bins that are not, and blocks of bins with scattered ones and with all.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from time import process_time, time

import numpy as np

SPOTS = "synthetic_square_008um"


def make(n_bins: int, n_genes: int, *, rng: int = 0):
    """A section of about ``n_bins`` bins."""
    import histosge as sge

    side = np.sqrt(n_bins / 0.9 * 64)  # tissue covers about nine tenths
    return sge.datasets.synthetic(
        n_rows=round(side / 86.6), n_cols=round(side / 100), n_genes=n_genes, mpp=2.0, rng=rng, bin_um=8, gland_um=24,
        detail_um=30,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- whole area


def area(options) -> None:
    folder = Path(options.folder or tempfile.mkdtemp())
    for n_bins in options.bins:
        source, target = folder / f"{n_bins}x{options.genes}.zarr", folder / "predicted.zarr"
        if not source.exists():
            ask = [sys.executable, __file__, "one", "make", str(source), str(n_bins), str(options.genes)]
            subprocess.run(ask, check=True)
        if target.exists():
            shutil.rmtree(target)
        subprocess.run([sys.executable, __file__, "one", "predict", str(source), str(target), "0"], check=True)
        shutil.rmtree(target)
    if options.folder is None:
        shutil.rmtree(folder)


def one(options) -> None:
    if options.what == "make":
        make(options.bins, options.genes).write(options.source)
    else:
        predict(options.source, options.target)


def predict(source: str, target: str) -> None:
    """Predict cells into a store; time, processor time, peak memory, accuracy at some of the cells."""
    import spatialdata

    import histosge as sge
    from histosge._statistics import correlation

    sge.settings.progress = False
    sdata = spatialdata.read_zarr(source)
    sdata.shapes["cells"] = cells(sdata)
    print(f"{len(sdata.shapes[SPOTS]):,} bins, {len(sdata.shapes['cells']):,} cells", flush=True)
    start, busy = time(), process_time()
    table = sge.tl.predict(
        sdata, encoder="stain-texture", target_key="cells", on_invalid="skip", store=target, inplace=False
    )
    took, busy = time() - start, process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    some = np.sort(np.random.default_rng(0).choice(table.n_obs, min(4000, table.n_obs), replace=False))
    sdata.shapes["some"] = sdata.shapes["cells"].loc[table.obs["instance_id"].to_numpy()[some]]
    truth = sge.datasets.synthetic_truth(sdata, target_key="some")[table.var_names].to_numpy()
    known = np.array([name < f"GENE{table.n_vars - table.n_vars // 5:03d}" for name in table.var_names])
    found = np.asarray(table.X[some] if not hasattr(table.X, "compute") else table.X[some].compute())
    print(
        f"RESULT {table.n_obs:,} cells x {table.n_vars} genes: {took:.0f} s, {busy:.0f} s of processor time, peak "
        f"{peak:.2f} GiB, PCC with the truth {correlation(found, truth)[known].mean():.4f}",
        flush=True,
    )


def cells(sdata):
    """Hexagons of about 10 µm, 12 µm apart, on the tissue."""
    import geopandas as gpd
    import shapely
    from spatialdata.models import ShapesModel
    from spatialdata.transformations import Identity

    xy_um = sdata.tables["square_008um"].obsm["spatial"] * 2.0
    (x0, y0), (x1, y1) = xy_um.min(0) + 12, xy_um.max(0) - 12
    x, y = (a.ravel() for a in np.meshgrid(np.arange(x0, x1, 12.0), np.arange(y0, y1, 12.0)))
    on_tissue = np.zeros((int(x1 // 16) + 3, int(y1 // 16) + 3), bool)
    on_tissue[tuple((xy_um // 16).astype(int).T)] = True
    there = on_tissue[(x // 16).astype(int), (y // 16).astype(int)]
    angle = np.arange(6) * np.pi / 3
    corner = 5.5 * np.column_stack([np.cos(angle), np.sin(angle)])
    outline = shapely.polygons(np.column_stack([x, y])[there][:, None] + corner[None])
    return ShapesModel.parse(gpd.GeoDataFrame(geometry=outline), transformations={"synthetic": Identity()})


# ---------------------------------------------------------------------------------------------------------------- learn


def learn(options) -> None:
    """Learn from all and from some of the bins, merged and not; all are the context; truth at all bins of 8 µm."""
    import torch

    import histosge as sge
    from histosge._embedding import Embedder
    from histosge._model import fit_model
    from histosge._section import merge_bins, read_section
    from histosge._statistics import correlation, draw_evenly

    sge.settings.verbosity, sge.settings.progress = 1, False
    cpu = torch.device("cpu")
    for seed in range(options.seeds):
        sdata = make(options.bins, options.genes, rng=seed)
        section = read_section(sdata, report=False)
        truth = sge.datasets.synthetic_truth(sdata, target_key=SPOTS).loc[section.instances]
        genes = truth.columns[: -(options.genes // 5)]
        truth = truth[genes].to_numpy()
        at_bins = Embedder.open(section, "stain-texture", dense=True, device="cpu", progress=False).embed_spots()
        print(f"seed {seed}: {len(truth):,} bins of {np.median(section.counts.sum(1)):.0f} counts", flush=True)
        for merge_um in options.merge_um:
            context = merge_bins(section, merge_um)
            embedder = Embedder.open(context, "stain-texture", dense=True, device="cpu", progress=False)
            at_context, n = embedder.embed_spots(), len(context.xy_px)
            for how in ("all", *(f"{kind} {n // k}" for k in options.shares for kind in ("blocks", "scattered"))):
                rng = np.random.default_rng(seed)
                kind, _, m = how.partition(" ")
                rows = np.arange(n)
                if kind == "blocks":
                    rows = draw_evenly(context.xy_um, int(m), pitch_um=context.pitch_um, rng=rng)
                elif kind == "scattered":
                    rows = np.sort(rng.choice(n, int(m), replace=False))
                some = replace(embedder, section=context.take(rows))
                for head in options.heads:
                    busy = process_time()
                    model = fit_model(
                        [some.section], [at_context[rows]], config=some.config, head=head, genes="all", n_folds=5,
                        sub_spots=[some.embed_parts()] if "aggregate" in head else None, device=cpu,
                        rng=np.random.default_rng(seed), baselines=(), progress=False,
                    )  # fmt: skip
                    hidden = np.arange(n) if len(truth) == n else np.full(len(truth), -1)
                    found = model.predict_from(
                        model.context(context, at_context, device=cpu), embedding=at_bins, xy_um=section.xy_um,
                        spot_index=hidden,
                    )[:, model.genes.get_indexer(genes)]  # fmt: skip
                    print(
                        f"{context.spot_um:g} µm, {head}, {how} of {n:,}: PCC {correlation(found, truth).mean():.4f}, "
                        f"MSE {((found - truth) ** 2).mean():.4f}, held-out PCC {model.held_out[head]['pcc']:.4f}, "
                        f"{process_time() - busy:.0f} s of processor time",
                        flush=True,
                    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(required=True)
    command = jobs.add_parser("area")
    command.set_defaults(job=area)
    command.add_argument("--bins", type=int, nargs="+", default=[20_000, 100_000, 500_000])
    command.add_argument("--genes", type=int, default=1000)
    command.add_argument("--folder", help="where sections are kept: a few GB")
    command = jobs.add_parser("learn")
    command.set_defaults(job=learn)
    command.add_argument("--bins", type=int, default=20_000)
    command.add_argument("--genes", type=int, default=300)
    command.add_argument("--seeds", type=int, default=1)
    command.add_argument("--merge-um", type=float, nargs="+", default=[16, 32, 8])
    command.add_argument("--shares", type=int, nargs="*", default=[2, 4], help="one in so many bins is learnt from")
    command.add_argument("--heads", nargs="+", default=["in-context+kriging", "aggregate+kriging"])
    command = jobs.add_parser("one")
    command.set_defaults(job=one)
    command.add_argument("what", choices=["make", "predict"])
    command.add_argument("source")
    for name in ("target", "genes") if "predict" in sys.argv else ("bins", "genes"):
        command.add_argument(name, type=str if name == "target" else int)
    options = parser.parse_args()
    options.job(options)


if __name__ == "__main__":
    main()
