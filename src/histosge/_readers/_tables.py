"""Tables with positions of their spots → shapes and table: ``.h5ad`` files, and counts of ST arrays."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from histosge._geometry import NotALattice, lattice_of_array, nearest_spots
from histosge._readers._parts import Found, free_name, quiet, valid_name
from histosge._section import check_single_section, library_of, read_declared, scale_factors
from histosge._settings import logger

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData
    from numpy.typing import NDArray

_SPOT_PER_PITCH = 0.55
"""Of Visium; it only matters that spots do not touch."""
_MOST_NOWHERE = 0.05
"""Largest share of the spots that may have no position, and are left out."""
_SECTION_COLUMNS = ("library_id", "library", "sample_id", "sample", "section", "slide", "batch", "dataset")
"""Columns of ``obs`` that often name the section of a spot."""


def is_h5ad(path: Path) -> bool:
    return path.suffix == ".h5ad"


def is_st(path: Path) -> bool:
    return path.name.endswith((".tsv", ".tsv.gz"))


def read_h5ad(path: Path, *, dataset_id: str | None = None) -> Found:
    import anndata as ad

    try:
        with quiet():
            table = ad.read_h5ad(path)
    except OSError as err:  # of h5py, which does not name the file
        msg = f"{str(path)!r} cannot be read as .h5ad: {err}. Copy or download it again, or write it anew."
        raise ValueError(msg) from err
    xy_px = np.asarray(table.obsm["spatial"], float) if "spatial" in table.obsm else np.empty((0, 0))
    if xy_px.shape[1] == 3 and len(xy_px) and np.ptp(xy_px[:, 2]) == 0:
        logger.info('obsm["spatial"] has a third column that is %g everywhere: left out', xy_px[0, 2])
        xy_px = xy_px[:, :2]
    nowhere = ~np.isfinite(xy_px).all(axis=1)
    if xy_px.shape[1] != 2 or len(xy_px) < 2 or nowhere.mean() > _MOST_NOWHERE:
        lost = f", {nowhere.sum()} of them NaN or infinite" if nowhere.any() else ""
        msg = (
            f'{str(path)!r} needs obsm["spatial"], (n, 2): x and y of each spot in pixels of the image, of two '
            f"spots or more; it has {list(table.obsm)}, of shape {xy_px.shape}{lost}. Write it there first."
        )
        raise ValueError(msg)
    if nowhere.any():
        logger.warning("leaving out %d of %d spots of %s without a position", nowhere.sum(), len(nowhere), path.name)
        table, xy_px = table[~nowhere].copy(), xy_px[~nowhere]
    rows = _rows_of_section(table, path, dataset_id)
    if len(rows) < table.n_obs:
        table, xy_px = table[rows].copy(), xy_px[rows]
    return _of_table(table, xy_px, path, dataset_id)


def read_st(path: Path, *, dataset_id: str | None = None) -> Found:
    """Counts and positions as the ST pipeline and spot detector write them, with rows named ``XxY``."""
    import anndata as ad
    from scipy import sparse

    files = [p for p in sorted(path.parent.iterdir()) if is_st(p) and p.name != path.name]
    tables = {file.name: pd.read_csv(file, sep="\t", dtype=str) for file in files if _is_selection(file)}
    if len(tables) != 1:
        msg = (
            f"{str(path)!r} needs one file of spots in its folder, a .tsv with columns x, y, pixel_x and pixel_y; "
            f"there are {list(tables) or [file.name for file in files]}."
        )
        raise ValueError(msg)
    (name, spots), counts = tables.popitem(), pd.read_csv(path, sep="\t", index_col=0)
    for x, y in (("x", "y"), ("new_x", "new_y")):  # rows are named by either
        known = spots.set_index(spots[x] + "x" + spots[y]) if x in spots else spots.iloc[:0]
        rows = counts.index.isin(known.index)
        if rows.any():
            break
    else:
        msg = (
            f"no row of {str(path)!r} (for example {list(counts.index[:2])}) is a spot XxY of {name!r}. Use the spots "
            "of the same section."
        )
        raise ValueError(msg)
    if not rows.all():
        logger.warning(
            "leaving out %d of %d rows of %s that have no position in %s", (~rows).sum(), len(rows), path.name, name
        )
    counts, known = counts[rows], known.loc[counts.index[rows]]
    if "selected" in known:  # on the tissue
        selected = (known["selected"] == "1").to_numpy()
        counts, known = counts[selected], known[selected]
    table = ad.AnnData(sparse.csr_matrix(counts.to_numpy(np.float32)), obs=known[[]].copy(), var=counts.T[[]])
    for field, axis in (("array_row", y), ("array_col", x)):
        table.obs[field] = known[axis].astype(float).round().astype(int)
    xy_px = known[["pixel_x", "pixel_y"]].astype(float).to_numpy()
    table.obsm["spatial"] = xy_px
    return _of_table(table, xy_px, path, dataset_id, attrs={"histosge_reader": "st"})


def _is_selection(path: Path) -> bool:
    with contextlib.suppress(pd.errors.EmptyDataError):
        return {"x", "y", "pixel_x", "pixel_y"} <= set(pd.read_csv(path, sep="\t", nrows=0).columns)
    return False


def _of_table(
    table: AnnData,
    xy_px: NDArray[np.float64],
    path: Path,
    dataset_id: str | None,
    *,
    attrs: dict[str, Any] | None = None,
) -> Found:
    """Shapes for a table: circles that do not touch, or squares for barcodes of Visium HD."""
    import geopandas as gpd
    import shapely
    from spatialdata.models import ShapesModel, TableModel

    name = dataset_id or valid_name(path.name.partition(".")[0])
    pitch_px = float(np.median(nearest_spots(xy_px, xy_px, k=1, exclude=np.arange(len(xy_px)))[1]))
    if pitch_px <= 0:
        msg = f"most spots of {str(path)!r} have the same position: are their x and y pixels of the image?"
        raise ValueError(msg)
    rows = np.arange(table.n_obs)
    factors = scale_factors(table, spots_key=name, rows=rows)
    declared = read_declared(
        table, rows=rows, instances=table.obs_names, keys="", attrs=attrs or {}, xy_px=xy_px, scale_factors=factors
    )
    key = name
    diameter_px = declared.spot_px or _SPOT_PER_PITCH * pitch_px
    shapes = gpd.GeoDataFrame({"radius": diameter_px / 2}, geometry=shapely.points(xy_px), index=range(len(xy_px)))
    if declared.technology is not None and declared.technology.name == "visium-hd":
        key = f"{name}_square_{round(declared.technology.pitch_um):03d}um"
        if declared.row is not None and declared.col is not None:
            with contextlib.suppress(NotALattice):
                pitch_px = lattice_of_array(xy_px, declared.row, declared.col).pitch_px
        shapes = gpd.GeoDataFrame(geometry=shapely.points(xy_px), index=range(len(xy_px)))
        shapes = gpd.GeoDataFrame(geometry=shapes.buffer(pitch_px / 2, cap_style="square"))
    table.uns.pop("spatialdata_attrs", None)
    # the user's columns may have these names
    instance_key = free_name("spot_id", table.obs.columns)
    region_key = free_name("region", table.obs.columns)
    table.obs[instance_key], table.obs[region_key] = np.arange(len(xy_px)), key
    table.obs[region_key] = table.obs[region_key].astype("category")
    table.var_names_make_unique()
    small, size_px = _thumbnail(library_of(table, spots_key=name, rows=rows))
    return Found(
        name=name,
        shapes_key=key,
        shapes=ShapesModel.parse(shapes),
        table_key="table",
        table=TableModel.parse(table, region=key, region_key=region_key, instance_key=instance_key),
        folders=(path.parent,),
        small=small,
        size_px=size_px,
        size_source='uns["spatial"] holds a thumbnail and the scale of one',
        attrs=attrs or {},
    )


def _thumbnail(library: Any) -> tuple[NDArray[Any] | None, tuple[float, float] | None]:
    """The thumbnail in an entry of ``uns["spatial"]``, and (width, height) of the image that it was made of."""
    images, factors = library.get("images", {}), library.get("scalefactors", {})
    for kind in ("hires", "lowres"):
        small = np.asarray(images.get(kind, 0))
        factor = pd.to_numeric(factors.get(f"tissue_{kind}_scalef", np.nan), errors="coerce")
        if small.ndim == 3 and small.shape[2] in (3, 4) and np.isfinite(factor) and factor > 0:
            return small, (small.shape[1] / factor, small.shape[0] / factor)
    return None, None


# --------------------------------------------------------------------------------------- several sections in one table


def _rows_of_section(table: AnnData, path: Path, dataset_id: str | None) -> NDArray[np.int64]:
    """Rows of the section to read: all, or where there are several sections, those of ``dataset_id``."""
    everything = np.arange(table.n_obs)
    libraries = table.uns.get("spatial", {})
    names = [str(k) for k, v in libraries.items() if hasattr(v, "get")] if hasattr(libraries, "items") else []
    column = _section_column(table, names)
    if column is None:
        if len(names) > 1:
            msg = (
                f'uns["spatial"] of {str(path)!r} holds {len(names)} sections, {names}, and no column of obs states '
                "the "
                'section of each spot. Write it to obs["library_id"], or remove the others from uns["spatial"].'
            )
            raise ValueError(msg)
        check_single_section(
            table,
            everything,
            path.name,
            remedy="write the section of each spot to obs['library_id'], then pass dataset_id=.",
        )
        return everything
    of_spot = table.obs[column].astype(str).to_numpy()
    sections = list(dict.fromkeys(of_spot))
    chosen = next((s for s in sections if dataset_id in (s, valid_name(s))), None)
    if len(sections) > 1 and chosen is None:
        options = [valid_name(s) for s in sections]
        got = "" if dataset_id is None else f"dataset_id={dataset_id!r} is none of them: "
        msg = (
            f"{str(path)!r} holds the spots of {len(sections)} sections, {sections} (obs[{column!r}]), each with its "
            f"own image. {got}Read one of them: pass dataset_id= one of {options}, with image= of that section."
        )
        raise ValueError(msg)
    chosen = sections[0] if chosen is None else chosen
    if chosen in names:
        table.uns["spatial"] = {key: value for key, value in libraries.items() if str(key) == chosen}
    rows = np.flatnonzero(of_spot == chosen)
    if len(sections) > 1:
        logger.info("read %d of %d spots: those with obs[%r] = %r", len(rows), table.n_obs, column, chosen)
    return rows


def _section_column(table: AnnData, names: list[str]) -> str | None:
    """Column of ``obs`` with the section of each spot; ``None`` where there is one section, or no such column."""
    columns = [c for c in (*_SECTION_COLUMNS, *table.obs.columns) if c in table.obs]
    if len(names) > 1:
        for column in columns:
            if set(table.obs[column].astype(str)) <= set(names):
                return column
    if "library_id" in table.obs and table.obs["library_id"].nunique() > 1:
        return "library_id"
    if {"array_row", "array_col"} <= set(table.obs.columns):
        array = table.obs[["array_row", "array_col"]]
        if array.duplicated().mean() > 0.05:
            for column in columns:
                several = 1 < table.obs[column].nunique() <= len(array) // 2
                if several and not array.assign(section=table.obs[column].astype(str)).duplicated().any():
                    return column
    return None
