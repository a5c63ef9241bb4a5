"""The main job on real sections: predict → leiden → write → read back, and held-out scores of every head.

    python benchmarks/real_sections.py [--sections mouse_colon_visium her2st/C2] [--seeds 3] [--skip-heads]

Reads ../shared/data; prints wall time and peak memory; writes pictures to benchmarks/out/.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
from pathlib import Path
from time import time

import numpy as np
from sections import load, require_data, split

OUT = Path(__file__).parent / "out"
GENES = {"mouse_colon_visium": ["Mptx1", "Myh11", "Cd74"], "her2st/C2": ["ERBB2", "CD74", "COL1A1"]}


def whole_path(name: str) -> None:
    """Run predict through leiden, write, read back, draw; in a process of its own, for its peak memory."""
    import matplotlib as mpl

    mpl.use("agg")
    import scanpy as sc
    import spatialdata as sd
    from spatialdata.testing import assert_spatial_data_objects_are_identical

    import histosge as sge

    start = time()
    sdata = load(name)
    loaded, base = time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    extra = [g for g in GENES.get(name, []) if g in sdata["table"].var_names]
    sge.tl.predict(sdata, encoder="stain-texture")
    predicted = time()
    table = sdata["histosge"]
    sc.pp.pca(table, n_comps=30)
    sc.pp.neighbors(table)
    sc.tl.leiden(table, flavor="igraph", n_iterations=2, resolution=0.5)
    clustered, peak = time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with tempfile.TemporaryDirectory() as folder:
        sdata.write(Path(folder) / "section.zarr")
        back = sd.read_zarr(Path(folder) / "section.zarr")
        assert_spatial_data_objects_are_identical(sdata, back)
        written = time()
    shown = [g for g in extra if g in table.var_names] or list(table.var["held_out_pcc"].nlargest(3).index)
    OUT.mkdir(exist_ok=True)
    axes = sge.pl.expression(sdata, shown, obs="leiden")
    picture = OUT / f"{name.replace('/', '_')}.png"
    axes[0, 0].figure.savefig(picture, dpi=90)
    made = table.uns["histosge"]
    print(f"\n{name}: {table.n_obs} targets x {table.n_vars} genes, {table.obs['leiden'].nunique()} domains")
    print(f"  predict {predicted - loaded:.1f} s, pca to leiden {clustered - predicted:.1f} s, ", end="")
    print(f"write and read back identical {written - clustered:.1f} s, all {time() - start:.1f} s")
    print(f"  peak memory {peak:.2f} GiB, of which {base:.2f} GiB before predict (libraries and the image)")
    print("  held-out PCC:", ", ".join(f"{h} {s['pcc']:.3f}" for h, s in made["held_out"].items()), end="")
    print(f"; {int(table.var['predictable'].sum())} genes predictable; picture {picture.relative_to(OUT.parent)}")


def seurat_genes(table, n_top: int = 1000) -> list[str]:
    """The genes of ../shared/METHOD.md §3: seen in a tenth of the (training) spots, then by dispersion."""
    import scanpy as sc

    known = table.copy()
    sc.pp.filter_genes(known, min_cells=int(0.1 * known.n_obs))
    sc.pp.normalize_total(known, target_sum=1e4)
    sc.pp.log1p(known)
    sc.pp.highly_variable_genes(known, flavor="seurat", n_top_genes=min(n_top, known.n_vars))
    return list(known.var_names[known.var["highly_variable"]])


def heads(name: str, seeds: int, which: list[str], choices: list[str]) -> None:
    """Train on a random half of the spots, score on the other half; genes chosen in the training half."""
    import histosge as sge
    from histosge._statistics import correlation

    full = load(name)
    rows: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    with sge.settings.override(verbosity=1):
        for seed in range(seeds):
            sdata, held = split(full, rng=seed)
            for target in (None, "held_out"):
                sge.tl.embed(sdata, target_key=target, encoder="stain-texture")
            counts = np.asarray(held.X.todense() if hasattr(held.X, "todense") else held.X, dtype=float)
            measured = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))
            for choice in choices:
                genes = seurat_genes(sdata["table"]) if choice == "dispersion" else 1000
                for head in which:
                    start = time()
                    model = sge.tl.fit(sdata, encoder="stain-texture", head=head, genes=genes, rng=seed)
                    table = sge.tl.predict(sdata, model=model, target_key="held_out", inplace=False)
                    truth = measured[:, held.var_names.get_indexer(table.var_names)]
                    pcc, mse = correlation(table.X, truth).mean(), ((table.X - truth) ** 2).mean()
                    rows.setdefault((choice, head), []).append((float(pcc), float(mse), time() - start))
    print(f"\n{name}: random half held out, {seeds} seeds, mean over genes (genes chosen in the training half)")
    print("| genes | head | PCC | MSE | fit + predict, s |\n|---|---|---|---|---|")
    for (choice, head), scores in rows.items():
        pcc, mse, seconds = np.mean(scores, axis=0)
        print(f"| {choice} | {head} | {pcc:.3f} ± {np.std([s[0] for s in scores]):.3f} | {mse:.3f} | {seconds:.1f} |")


def main() -> None:
    require_data()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", default=["mouse_colon_visium", "her2st/C2"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--heads", nargs="+", default=["in-context", "published", "ridge", "nearest", "mean"])
    parser.add_argument("--genes", nargs="+", default=["dispersion", "default"], choices=["dispersion", "default"])
    parser.add_argument("--skip-heads", action="store_true")
    parser.add_argument("--skip-path", action="store_true")
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    for name in options.sections:
        jobs = [] if options.skip_path else [(whole_path, (name,))]
        jobs += [] if options.skip_heads else [(heads, (name, options.seeds, options.heads, options.genes))]
        for job, arguments in jobs:
            process = spawn.Process(target=job, args=arguments)
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()
