"""Tables written part by part."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np


class Write:
    """Random expression of bins, written to a store."""

    params = ([5_000, 50_000],)
    param_names = ("n",)
    timeout = 120
    n_genes, part_rows = 200, 8192
    number, repeat = 1, 5  # a store is written once

    def setup(self, n: int) -> None:
        import anndata as ad
        import geopandas as gpd
        import pandas as pd
        import shapely
        from spatialdata.models import ShapesModel, TableModel

        rng = np.random.default_rng(0)
        side = int(np.ceil(np.sqrt(n)))
        row, col = np.divmod(np.arange(n), side)
        x, y = col * 8.0, row * 8.0
        self.shapes = ShapesModel.parse(gpd.GeoDataFrame(geometry=shapely.box(x, y, x + 8, y + 8)))
        obs = pd.DataFrame({"array_row": row, "array_col": col}, index=[f"b{i}" for i in range(n)])
        obs["region"], obs["instance_id"] = pd.Categorical(["bins"] * n), np.arange(n)
        var = pd.DataFrame(index=[f"g{i}" for i in range(self.n_genes)])
        self.table = TableModel.parse(
            ad.AnnData(obs=obs, var=var), region="bins", region_key="region", instance_key="instance_id"
        )
        self.matrices = {
            "X": np.log1p(rng.gamma(1.0, size=(n, self.n_genes))).astype(np.float32),
            "conserved": rng.random((n, self.n_genes), np.float32),
        }
        self.folder = Path(tempfile.mkdtemp())
        self.written = 0

    def teardown(self, *_: Any) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def time_write(self, n: int) -> None:
        from histosge._section import TableStore

        self.written += 1
        path = self.folder / f"{self.written}.zarr"
        store = TableStore.open(path, name="table", params={"n": n}, n_rows=n, part_rows=self.part_rows)
        store.begin(self.table, shapes={"bins": self.shapes}, matrices=list(self.matrices))
        for part in range(store.n_parts):
            store.write(part, {key: values[store.rows(part)] for key, values in self.matrices.items()})
        store.finish()


class Predict:
    """`tl.predict` of a ridge at bins of a synthetic section, to a store."""

    params = ([32.0, 8.0],)
    param_names = ("bin_um",)
    timeout = 300
    rows = 10

    def setup(self, bin_um: float) -> None:
        import histosge as sge

        sge.settings.verbosity = 0
        if hasattr(sge.settings, "cache_gb"):
            sge.settings.cache_gb = 0
        self.sdata = sge.datasets.synthetic(n_rows=self.rows, n_cols=self.rows, n_genes=20)
        self.folder = Path(tempfile.mkdtemp())

    def teardown(self, *_: Any) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def peakmem_predict(self, bin_um: float) -> None:
        import histosge as sge

        options: dict[str, Any] = {"bin_um": bin_um, "head": "ridge", "genes": 10, "progress": False}
        path = self.folder / "predicted.zarr"
        sge.tl.predict(self.sdata, encoder="stain-texture", dense=True, store=path, device="cpu", **options)
