"""Real sections for the benchmarks, as SpatialData. They are read from ``../shared/data`` and never copied."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def require_data() -> None:
    """Stop cleanly where the sections are not there."""
    if not DATA.is_dir():
        print(f"the real sections are not here ({DATA.name}/ beside the project is missing): nothing to measure")
        sys.exit(0)


def load(name: str):
    """Build the SpatialData of one section: image "he", circles "spots", table "table", coordinate system = name."""
    import anndata as ad
    import geopandas as gpd
    import pandas as pd
    import shapely
    from PIL import Image
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Identity

    Image.MAX_IMAGE_PIXELS = None
    folder = DATA / name
    adata = ad.read_h5ad(folder / "counts.h5ad")
    adata.var_names_make_unique()
    meta = adata.uns["meta"]
    pixels = np.asarray(Image.open(next(folder.glob("image.*"))).convert("RGB"))
    system = name.replace("/", "_")
    image = Image2DModel.parse(
        np.moveaxis(pixels, -1, 0),
        dims=("c", "y", "x"),
        c_coords=["r", "g", "b"],
        chunks=(3, 1024, 1024),
        transformations={system: Identity()},
    )
    xy = np.asarray(adata.obsm["spatial"], float)
    circles = gpd.GeoDataFrame(
        {"radius": float(meta["spot_diameter_px"]) / 2}, geometry=shapely.points(xy), index=np.arange(len(xy))
    )
    spots = ShapesModel.parse(circles, transformations={system: Identity()})
    adata = ad.AnnData(adata.X, obs=adata.obs.copy(), var=pd.DataFrame(index=adata.var_names))
    adata.obsm["spatial"] = xy
    adata.obs["region"] = pd.Categorical(["spots"] * adata.n_obs)
    adata.obs["instance_id"] = np.arange(adata.n_obs)
    table = TableModel.parse(adata, region="spots", region_key="region", instance_key="instance_id")
    return SpatialData(images={"he": image}, shapes={"spots": spots}, tables={"table": table})


def split(sdata, *, rng: int):
    """Hold out half of the spots at random: a SpatialData whose table knows only the other half, and the held-out.

    Returns
    -------
    The SpatialData, with the held-out spots as shapes "held_out"; their table.
    """
    from spatialdata import SpatialData
    from spatialdata.models import TableModel

    table = sdata.tables["table"]
    order = np.random.default_rng(rng).permutation(table.n_obs)
    train, test = np.sort(order[: table.n_obs // 2]), np.sort(order[table.n_obs // 2 :])
    known = table[train].copy()
    known.uns.pop("spatialdata_attrs")
    shapes = sdata.shapes["spots"]
    held = shapes.loc[table.obs["instance_id"].to_numpy()[test]].copy()
    half = SpatialData(
        images={"he": sdata.images["he"]},
        shapes={"spots": shapes, "held_out": held},
        tables={"table": TableModel.parse(known, region="spots", region_key="region", instance_key="instance_id")},
    )
    return half, table[test].copy()
