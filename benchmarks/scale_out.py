"""Two workers of dask against this process on two cores: embedding, fitting, predicting to a store.

    python benchmarks/scale_out.py embed [--tiles 400] [--repeats 3]      # a ViT-S/16 with random weights
    python benchmarks/scale_out.py predict [--repeats 3] [--bin-um 8]     # reads ../shared/data
    python benchmarks/scale_out.py fit [--repeats 3]                      # reads ../shared/data
    python benchmarks/scale_out.py overhead [--parts 200]

Both ways are run in turn on the same machine, after one run that starts the workers. docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import numpy as np

N_GENES = 1000


@contextmanager
def two_workers():
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        yield client


def on_disk(sdata, folder: Path):
    """Write a section, and read it with its image on disk."""
    import spatialdata

    path = folder / "section.zarr"
    sdata.write(path)
    return spatialdata.read_zarr(path)


def compare(call, *, repeats: int, what: str, amount: float, unit: str) -> None:
    """Time ``call(name)`` here and on the workers in turn; it returns an array, and may return its own seconds."""
    import histosge as sge

    seconds: dict[str, list[float]] = {"here": [], "dask": []}
    found: dict[str, np.ndarray] = {}
    with two_workers():
        for turn in range(repeats + 1):
            for way in seconds:
                with sge.settings.override(dask=way == "dask"):
                    start = perf_counter()
                    found[way] = call(f"{way}-{turn}")
                    if turn:  # the first starts the workers and fills caches of files
                        seconds[way].append(perf_counter() - start)
    here, dask = (statistics.median(values) for values in seconds.values())
    print(
        f"{what}: here {here:.1f} s ({amount / here:,.0f} {unit}/s), dask {dask:.1f} s ({amount / dask:,.0f} {unit}/s)"
    )
    print(f"  dask / here: {here / dask:.2f} of the throughput; all: {seconds}")
    print(f"  largest difference: {np.abs(found['here'] - found['dask']).max():.2g}")


def embed(options) -> None:
    import timm
    import torch

    import histosge as sge

    torch.manual_seed(0)
    module = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=0)
    spec = sge.EncoderSpec(name="vit", mpp=0.5, tile_px=224, embed_dim=384)
    encoder = sge.load_encoder(module, spec=spec)
    n = round(options.tiles**0.5)
    with tempfile.TemporaryDirectory() as folder:
        sdata = on_disk(sge.datasets.synthetic(n_rows=n, n_cols=n, n_genes=20, mpp=0.5), Path(folder))
        n_spots = len(sdata.shapes["spots"])
        compare(
            lambda _name: sge.tl.embed(sdata, encoder=encoder, inplace=False).obsm["X_vit"],
            repeats=options.repeats, what="embed, ViT-S/16", amount=n_spots, unit="tiles",
        )  # fmt: skip


def predict(options) -> None:
    import spatialdata
    from sections import load, require_data

    import histosge as sge

    require_data()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sdata = on_disk(load("mouse_colon_visium"), folder)
        with sge.settings.override(dask=False):
            model = sge.tl.fit(sdata, encoder="stain-texture", genes=N_GENES, dense=True)

        def run(turn: str) -> np.ndarray:
            path = folder / f"{turn}.zarr"
            sge.tl.predict(sdata, model=model, bin_um=options.bin_um, store=path)
            some = np.asarray(spatialdata.read_zarr(path)["histosge"].X[::97])
            shutil.rmtree(path)
            return some

        table = sge.pp.targets(sdata, bin_um=options.bin_um, inplace=False)
        compare(run, repeats=options.repeats, what="predict to a store", amount=len(table), unit="bins")


def fit(options) -> None:
    from sections import load, require_data

    import histosge as sge

    require_data()
    with tempfile.TemporaryDirectory() as folder:
        sdata = on_disk(load("mouse_colon_visium"), Path(folder))
        compare(
            lambda _name: sge.tl.fit(sdata, encoder="stain-texture", genes=N_GENES).scores["held_out_pcc"].to_numpy(),
            repeats=options.repeats, what="fit", amount=1, unit="fits",
        )  # fmt: skip


def nothing(_plan: int, _item: int) -> None:
    """Do nothing, on a worker."""


def overhead(options) -> None:
    from histosge._cluster import on_workers

    with two_workers() as client:
        for _ in range(2):  # the first starts the workers
            start = perf_counter()
            items = range(options.parts)
            for _done in on_workers(nothing, items, client=client, plan=0, opens=int, name="nothing"):
                pass
            seconds = perf_counter() - start
        print(f"overhead: {1000 * seconds / options.parts:.1f} ms a part ({options.parts} parts, two workers)")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["embed", "predict", "fit", "overhead"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiles", type=int, default=400)
    parser.add_argument("--bin-um", type=float, default=8)
    parser.add_argument("--parts", type=int, default=200)
    given = parser.parse_args()
    {"embed": embed, "predict": predict, "fit": fit, "overhead": overhead}[given.what](given)
