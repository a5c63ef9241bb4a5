"""Time and peak memory of the maps at 10,000, 660,000 and a million places, each in a process of its own.

    python benchmarks/plots.py [--places 10000 660000 1000000] [--cases expression lazy hd domains] [--genes 1]

A square section of 8 µm bins at 0.5 µm per pixel is built once under benchmarks/out/work: image in chunks of 2048 px without a pyramid,
Visium spots over it, a table of 20 predicted genes with numbers of prediction intervals as ``predict(store=)`` writes it, and for "hd" a measured
table of the same bins, 1000 genes. Timed are the call and the drawing of a PNG at 100 dpi; peak memory is that of the whole process,
libraries and reading included. The case "rival" draws one panel by spatialdata-plot, if it is installed, for comparison.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import warnings
from pathlib import Path
from time import time

import numpy as np
from slides import built, tissue_px

WORK = Path(__file__).resolve().parent / "out" / "work"
BIN_PX, MPP = 16, 0.5
CASES = {
    "expression": "one predicted table in memory, spots of Visium: H&E, measured, predicted, width",
    "lazy": "the same, X and layers left on disk",
    "hd": "the same, measured on the bins themselves",
    "domains": "domains beside H&E",
}


def build(n: int) -> Path:
    """Section and predictions on disk."""
    import anndata as ad
    import geopandas as gpd
    import pandas as pd
    import shapely
    from scipy import sparse
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel, ShapesModel, TableModel

    from histosge._section import TableStore, make_table

    side = round(np.sqrt(n))
    edge = side * BIN_PX
    rng = np.random.default_rng(0)
    row, col = np.divmod(np.arange(side**2), side)
    xy = np.column_stack([col + 0.5, row + 0.5]) * BIN_PX
    names = pd.Index([f"bin{i}" for i in range(len(xy))])
    corner = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]]) * BIN_PX
    squares = gpd.GeoDataFrame({"array_row": row, "array_col": col}, geometry=shapely.polygons(xy[:, None] + corner))

    def linked(adata, region: str):
        adata.obs["region"] = pd.Categorical([region] * adata.n_obs)
        adata.obs["instance_id"] = np.arange(adata.n_obs)
        return TableModel.parse(adata, region=region, region_key="region", instance_key="instance_id")

    def section(path: Path) -> None:
        step = round(100 / MPP)
        x, y = np.meshgrid(np.arange(step // 2, edge, step), np.arange(step // 2, edge, round(step * np.sqrt(0.75))))
        x = x + (np.arange(len(x)) % 2 * step / 4)[:, None]
        places = np.column_stack([x.ravel(), y.ravel()]).astype(float)
        circles = gpd.GeoDataFrame({"radius": np.full(len(places), 27.5 / MPP)}, geometry=shapely.points(places))
        counts = sparse.csr_matrix(rng.poisson(2, (len(places), 1000)).astype(np.float32))
        spots = ad.AnnData(counts, var=pd.DataFrame(index=[f"g{i}" for i in range(1000)]))
        spots.obs_names = [f"s{i}" for i in range(len(places))]
        bins = sparse.random(len(xy), 1000, density=0.05, format="csr", dtype=np.float32, rng=0)
        bins.data = np.ceil(3 * bins.data)
        measured = ad.AnnData(bins, obs=pd.DataFrame(index=names), var=spots.var.copy())
        SpatialData(
            images={"he": Image2DModel.parse(tissue_px(edge), c_coords=["r", "g", "b"], chunks=(3, 2048, 2048))},
            shapes={"spots": ShapesModel.parse(circles), "square_008um": ShapesModel.parse(squares)},
            tables={"table": linked(spots, "spots"), "bins": linked(measured, "square_008um")},
        ).write(path)

    def predicted(path: Path) -> None:
        """As ``predict(store=)`` writes it, in parts."""
        wave = np.sin(xy[:, :1] / 900 + np.arange(20)) + np.cos(xy[:, 1:] / 700)
        values = (wave + rng.normal(0, 0.2, wave.shape)).astype(np.float32)
        made = {
            "encoder": {"name": "stain-texture"},
            "head": "ridge",
            "image": "he",
            "mpp": MPP,
            "spots": "spots",
            "table": "table",
        }
        made |= {"coordinate_system": "global", "technology": "visium", "n_spots": 4992}
        numbers = np.zeros((20, 5), np.float32) + np.array([0.1, 0.1, 0.05, 9, 1.6], np.float32)
        made["intervals"] = {"levels": np.array([0.9])}
        domain = pd.Categorical(np.digitize(wave[:, 0], [-1, -0.5, 0, 0.5, 1]).astype(str))
        table = ad.AnnData(
            obs=pd.DataFrame({"domain": domain}, index=names),
            var=pd.DataFrame({"held_out_pcc": np.full(20, 0.5, np.float32)}, index=[f"g{i}" for i in range(20)]),
            varm={"histosge_intervals": numbers},
            obsm={"spatial": xy},
            uns={"histosge": made},
        )
        table = make_table(table, region="places", instances=np.arange(len(xy)))
        store = TableStore.open(path, name="histosge", params={"n": n}, n_rows=len(xy), part_rows=32_768)
        store.begin(table, shapes={"places": ShapesModel.parse(squares)}, matrices=["X"])
        for part in range(store.n_parts):
            store.write(part, {"X": values[store.rows(part)]})
        store.finish()

    folder = WORK / f"plots_{n}"
    built(folder / "section.zarr", section)
    built(folder / "predicted.zarr", predicted)
    return folder


def read(folder: Path, case: str):
    """Put the store's places and table into the section."""
    import spatialdata as sd

    from histosge._section import open_table

    section = sd.read_zarr(
        folder / "section.zarr", selection=("images", "shapes", "tables") if case == "hd" else ("images", "shapes")
    )
    if case != "hd":
        section.tables["table"] = sd.read_zarr(folder / "section.zarr", selection=("tables",)).tables["table"]
        del section.shapes["square_008um"]
    store = sd.read_zarr(folder / "predicted.zarr", selection=("shapes",) if case == "lazy" else ("shapes", "tables"))
    section.shapes["places"] = store.shapes["places"]
    section.tables["histosge"] = (
        open_table(folder / "predicted.zarr", "histosge") if case == "lazy" else store["histosge"]
    )
    if case == "hd":
        made = section["histosge"].uns["histosge"]
        made |= {"spots": "square_008um", "table": "bins", "technology": "visium-hd"}
    return section


def one(folder: Path, case: str, n_genes: int) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    import histosge as sge

    warnings.simplefilter("ignore")  # spatialdata's, of tables that are read without their shapes
    start = time()
    sdata = read(folder, case)
    there, before = time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if case == "domains":
        axes = sge.pl.domains(sdata)
    elif case == "rival":
        import matplotlib.pyplot as plt
        import spatialdata_plot  # noqa: F401

        axes = np.array([plt.subplots(figsize=(4, 4))[1]])
        drawn = sdata.pl.render_shapes("places", color="g0", table_name="histosge", method="datashader")
        drawn.pl.show(ax=axes[0], coordinate_systems="global")
    else:
        genes = [f"g{i}" for i in range(n_genes)]
        axes = sge.pl.expression(sdata, genes, panels=("image", "measured", "predicted", "width"))
    made = time()
    axes.flat[0].figure.savefig(folder / f"{case}.png", dpi=100)
    end, peak = time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"| {len(sdata.shapes['places']):,} | {case} | {there - start:.1f} | {made - there:.1f} | {end - made:.1f} | "
        f"{end - there:.1f} | {before:.2f} | {peak:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", type=int, nargs="+", default=[10_000, 660_000, 1_000_000])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=[*CASES, "rival"])
    parser.add_argument("--genes", type=int, default=1)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(Path(options.one[0]), options.one[1], options.genes)
        return
    for case, what in CASES.items():
        print(f"{case}: {what}")
    print(
        "| places | case | read, s | call, s | PNG, s | call + PNG, s | GiB after reading | GiB peak |\n|---|---|---|---|---|---|---|---|"
    )
    for n in options.places:
        if not (WORK / f"plots_{n}" / "predicted.zarr").exists():  # in a process of its own, too
            subprocess.run(
                [sys.executable, "-c", f"import plots; plots.build({n})"], check=True, cwd=Path(__file__).parent
            )
        for case in options.cases:
            arguments = ["--one", str(WORK / f"plots_{n}"), case, "--genes", str(options.genes)]
            subprocess.run([sys.executable, __file__, *arguments], check=True)


if __name__ == "__main__":
    main()
