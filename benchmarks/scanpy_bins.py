"""What scanpy and `sge.tl.domains` cost on the bins of a whole slide: seconds of each step, and peak memory.

    python benchmarks/scanpy_bins.py [--n 60000 200000 600000] [--genes 50] [--only scanpy domains carried] [--seconds 900]

Each size and way runs in a process of its own. The table is of the synthetic tissue: the log-normalised truth at 8 µm bins
side by side, of which no image is drawn, and noise of a tenth of a unit for what a prediction adds. docs/benchmarks.md.

`scanpy` is pca → neighbors → leiden, all on the table; `domains` is `sge.tl.domains`; `carried` clusters a tenth of the bins,
drawn at random, and gives each other bin the majority of the 15 clustered bins nearest in principal components.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from time import perf_counter

import numpy as np

BIN_UM = 8.0
NOISE = 0.1
SHARE = 0.1
"""Of all bins, those that `carried` clusters."""
N_PCS, N_NEIGHBOURS = 30, 15
WARM_UP = 10_000


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def bins(n: int, n_genes: int):
    """Return log-normalised expression of ``n`` bins, nearly square, on the synthetic tissue: an AnnData."""
    import anndata as ad
    import pandas as pd

    from histosge.datasets._simulation import MARGIN_UM, PITCH_UM, expected_rates, hidden_fields, parts

    side = int(np.ceil(np.sqrt(n)))
    row, col = np.divmod(np.arange(n), side)
    xy_um = MARGIN_UM + BIN_UM * (np.column_stack([col, row]) + 0.5)
    spots = int(np.ceil(side * BIN_UM / (PITCH_UM * np.sqrt(0.75))))
    params = {"n_rows": spots, "n_cols": spots, "n_genes": n_genes, "seed": 0, "genes_seed": 0}
    fields, _ = hidden_fields(params)
    rng = np.random.default_rng(0)
    X = np.empty((n, n_genes), np.float32)
    for part in parts(n, n_genes):
        rate = expected_rates(fields, params, xy_um[part])
        X[part] = np.log1p(1e4 * rate / rate.sum(1, keepdims=True))
        X[part] += NOISE * rng.standard_normal(X[part].shape, np.float32)
    adata = ad.AnnData(
        np.maximum(X, 0), obs=pd.DataFrame({"array_row": row, "array_col": col}, index=np.arange(n).astype(str))
    )
    adata.obsm["spatial"] = xy_um
    adata.uns["log1p"] = {}
    return adata


def with_scanpy(adata) -> dict[str, float]:
    import scanpy as sc

    times = [perf_counter()]
    sc.pp.pca(adata, n_comps=N_PCS)
    times.append(perf_counter())
    sc.pp.neighbors(adata, n_neighbors=N_NEIGHBOURS)
    times.append(perf_counter())
    sc.tl.leiden(adata, flavor="igraph", n_iterations=2)
    times.append(perf_counter())
    return dict(zip(("pca", "neighbors", "leiden"), np.diff(times), strict=True)) | {
        "groups": adata.obs["leiden"].nunique()
    }


def with_domains(adata) -> dict[str, float]:
    import histosge as sge

    start = perf_counter()
    sge.tl.domains(adata, n_pcs=N_PCS, n_neighbours=N_NEIGHBOURS)
    return {"domains": perf_counter() - start, "groups": adata.obs["domain"].nunique()}


def with_carried(adata) -> dict[str, float]:
    import pandas as pd
    import scanpy as sc
    from sklearn.neighbors import KNeighborsClassifier

    times = [perf_counter()]
    sc.pp.pca(adata, n_comps=N_PCS)
    times.append(perf_counter())
    some = np.sort(np.random.default_rng(0).choice(adata.n_obs, int(SHARE * adata.n_obs), replace=False))
    few = adata[some].copy()
    sc.pp.neighbors(few, n_neighbors=N_NEIGHBOURS)
    sc.tl.leiden(few, flavor="igraph", n_iterations=2)
    times.append(perf_counter())
    nearest = KNeighborsClassifier(N_NEIGHBOURS).fit(few.obsm["X_pca"], few.obs["leiden"])
    adata.obs["leiden"] = pd.Categorical(nearest.predict(adata.obsm["X_pca"]))
    times.append(perf_counter())
    return dict(zip(("pca", "a tenth", "carry"), np.diff(times), strict=True)) | {
        "groups": adata.obs["leiden"].nunique()
    }


WAYS = {"scanpy": with_scanpy, "domains": with_domains, "carried": with_carried}


def one(way: str, n: int, n_genes: int) -> None:
    """Run one way once; a line of JSON. Numba compiles first, which is not timed; below 8192 rows scanpy uses another search."""
    with_scanpy(bins(WARM_UP, n_genes))
    WAYS[way](bins(WARM_UP, n_genes))
    adata = bins(n, n_genes)
    data = peak_gib()
    found = WAYS[way](adata)
    print(json.dumps({k: float(v) for k, v in found.items()} | {"peak": peak_gib(), "data": data}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[60_000, 200_000, 600_000])
    parser.add_argument("--genes", type=int, default=50)
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--seconds", type=int, default=900, help="limit of one size")
    parser.add_argument("--one", choices=list(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.one, options.n[0], options.genes)
        return
    for way in options.only:
        for n in options.n:
            ask = [sys.executable, __file__, "--one", way, "--n", str(n), "--genes", str(options.genes)]
            try:
                done = subprocess.run(ask, capture_output=True, text=True, timeout=options.seconds, check=False)
            except subprocess.TimeoutExpired:
                print(f"{way:8} {n:>8,} bins: not finished in {options.seconds} s", flush=True)
                break
            if done.returncode:
                print(f"{way:8} {n:>8,} bins: failed, {done.stderr.strip().splitlines()[-1]}", flush=True)
                break
            found = json.loads(done.stdout.strip().splitlines()[-1])
            groups, peak, data = int(found.pop("groups")), found.pop("peak"), found.pop("data")
            steps = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found.items())
            print(
                f"{way:8} {n:>8,} bins x {options.genes} genes: {steps}; together {sum(found.values()):.1f} s, {groups} groups, "
                f"peak {peak:.2f} GiB (data {data:.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
