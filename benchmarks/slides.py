"""Slides to measure on: real pixels (or the synthetic tissue's) mirrored to any size, in several containers on disk.

Built once under a work folder and found again. Nothing here is timed.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sections import DATA

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from spatialdata import SpatialData

WORK = Path(__file__).parent / "out" / "work"
EDGE_PX, CHUNK_PX, TILE_PX, PITCH_PX = 12_288, 256, 224, 144
PITCH_UM = 100.0
MPP = PITCH_UM / PITCH_PX
FEWEST = 40
"""Spots of the smallest section: histosge refuses fewer than 30."""


def tissue_px(edge_px: int) -> NDArray[np.uint8]:
    """(3, edge, edge) uint8: the colon section mirrored at its borders; the synthetic tissue where it is not here."""
    found = sorted((DATA / "mouse_colon_visium").glob("image.*"))
    if found:
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = None
        one = np.asarray(Image.open(found[0]).convert("RGB"))  # (h, w, 3)
    else:
        import histosge as sge

        print("the real sections are not here: pixels of the synthetic tissue, which compress otherwise")
        drawn = sge.datasets.synthetic(n_rows=30, n_cols=26, mpp=MPP)["he"]["scale0"]["image"]
        one = np.moveaxis(np.asarray(drawn), 0, -1)
    inner = np.ascontiguousarray(np.moveaxis(one[128:-128, 128:-128], -1, 0))  # without the glass around it
    pad = [(0, 0), *((0, max(0, edge_px - side)) for side in inner.shape[1:])]
    whole = np.pad(inner, pad, mode="symmetric")
    y, x = ((side - edge_px) // 2 for side in whole.shape[1:])  # of a small image the middle
    return np.ascontiguousarray(whole[:, y : y + edge_px, x : x + edge_px])


def hexagonal_px(edge_px: int, *, margin_px: int = TILE_PX // 2, pitch_px: float = PITCH_PX) -> NDArray[np.float64]:
    """(n, 2) places (x, y) of a hexagonal array, row by row, whole pixels: tiles begin at whole pixels everywhere."""
    rows = np.arange(margin_px, edge_px - margin_px, pitch_px * np.sqrt(0.75))
    places = []
    for i, y in enumerate(rows):
        x = np.arange(margin_px + (i % 2) * pitch_px / 2, edge_px - margin_px, pitch_px)
        places.append(np.column_stack([x, np.full(len(x), y)]))
    return np.rint(np.concatenate(places))


def section(image: Any, xy_px: NDArray[np.float64], *, chunk_px: int | None = None) -> SpatialData:
    """Section of an image (3, h, w; numpy or dask) with spots everywhere and counts of three genes."""
    import anndata as ad
    import geopandas as gpd
    import pandas as pd
    import shapely
    from scipy import sparse
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel, ShapesModel, TableModel

    chunks = {} if chunk_px is None else {"chunks": (3, chunk_px, chunk_px)}
    element = Image2DModel.parse(image, dims=("c", "y", "x"), c_coords=["r", "g", "b"], **chunks)
    spots = gpd.GeoDataFrame({"radius": 0.275 * PITCH_PX}, geometry=shapely.points(xy_px), index=np.arange(len(xy_px)))
    counts = np.random.default_rng(0).poisson(100.0, (len(xy_px), 3)).astype(np.float32)
    adata = ad.AnnData(sparse.csr_matrix(counts), obs=pd.DataFrame(index=[f"s{i}" for i in range(len(xy_px))]))
    adata.obs["region"] = pd.Categorical(["spots"] * adata.n_obs)
    adata.obs["instance_id"] = np.arange(adata.n_obs)
    table = TableModel.parse(adata, region="spots", region_key="region", instance_key="instance_id")
    return SpatialData(images={"he": element}, shapes={"spots": ShapesModel.parse(spots)}, tables={"table": table})


def edge_for(n: int) -> int:
    """Edge of an image, in pixels, that holds about ``n`` spots, or as many as a section has at least."""
    return round(TILE_PX + np.sqrt(max(n, FEWEST) * np.sqrt(0.75)) * PITCH_PX)


def first_spots(sdata: SpatialData, n: int | None) -> Any:
    """Take the first ``n`` spots, by rows, or all, as shapes of their own."""
    from spatialdata.models import ShapesModel

    return ShapesModel.parse(sdata["spots"].iloc[:n].copy())


def no_cache() -> None:
    """Nothing that is timed may be read from a run before it."""
    import histosge as sge

    if hasattr(sge.settings, "cache_gb"):  # versions without a cache are measured as well
        sge.settings.cache_gb = 0


# ---------------------------------------------------------------------------------------------------------- on disk


def built(path: Path, make: Callable[[Path], None]) -> Path:
    """Build what is not there yet; what was interrupted is built again."""
    if not path.exists():
        draft = path.with_name(f"{path.name}.draft")
        if draft.is_dir():
            shutil.rmtree(draft)
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"building {path.name} ...", flush=True)
        make(draft)
        draft.rename(path)
    return path


def store(work: Path, *, edge_px: int = EDGE_PX) -> Path:
    """A ``SpatialData`` store with the image in 256-px chunks, compressed as spatialdata does by default."""

    def make(path: Path) -> None:
        section(tissue_px(edge_px), hexagonal_px(edge_px), chunk_px=CHUNK_PX).write(path)

    return built(work / f"section_{edge_px}.zarr", make)


def image_array(path: Path) -> Any:
    """The zarr array that holds the finest scale of the image of a store."""
    import zarr

    group = zarr.open_group(path / "images" / "he", mode="r")
    return next(group[name] for name in ("0", "s0") if name in group)


def bare_zarr(work: Path, *, edge_px: int = EDGE_PX) -> Path:
    """A zarr array alone, of the same chunks, without compression."""
    import zarr

    def make(path: Path) -> None:
        shape, chunks = (3, edge_px, edge_px), (3, CHUNK_PX, CHUNK_PX)
        array = zarr.create_array(path, shape=shape, chunks=chunks, dtype="uint8", compressors=None, filters=None)
        array[:] = tissue_px(edge_px)

    return built(work / f"bare_{edge_px}.zarr", make)


def jpeg_tiff(work: Path, *, edge_px: int = EDGE_PX, chunk_px: int = 512) -> Path:
    """A tiled TIFF compressed by JPEG (quality 90, YCbCr), as slides are."""
    import tifffile

    def make(path: Path) -> None:
        pixels = np.ascontiguousarray(np.moveaxis(tissue_px(edge_px), 0, -1))
        options: dict[str, Any] = {"compression": "jpeg", "compressionargs": {"level": 90}, "photometric": "ycbcr"}
        # tifffile takes RGB and lets the codec turn it into YCbCr
        tifffile.imwrite(path, pixels, tile=(chunk_px, chunk_px), **options)

    return built(work / f"slide_{edge_px}.tif", make)


def cheap_store(path: Path, *, edge_px: int, chunk_px: int = 512) -> None:
    """Write a section of any size chunk by chunk, never in memory as a whole; half a byte a pixel on disk."""
    import dask
    import dask.array as da

    def block(block_info: Any = None) -> NDArray[np.uint8]:
        where = block_info[None]
        rng = np.random.default_rng(list(where["chunk-location"]))
        return rng.integers(160, 176, where["chunk-shape"], dtype=np.uint8)

    n = edge_px // chunk_px
    image = da.map_blocks(block, chunks=((3,), (chunk_px,) * n, (chunk_px,) * n), dtype=np.uint8)
    with dask.config.set(scheduler="threads"):
        section(image, hexagonal_px(edge_px)).write(path)
