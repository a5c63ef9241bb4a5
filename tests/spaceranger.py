"""Write synthetic sections as instruments do: tiny folders in the real formats, with the places and counts of a section.

``from tests.spaceranger import write_visium``. What each function mimics:

``write_visium``
    ``outs`` of Space Ranger with the version ``"1.3.1"`` (``spatial/tissue_positions_list.csv`` without header, whole
    pixels), ``"2.1.0"``, ``"3.1.3"`` or ``"4.0.1"`` (``spatial/tissue_positions.csv`` with header); all spots of the array
    are listed, counts are those of the spots on the tissue. ``cytassist``: fractional pixels,
    ``spatial/cytassist_image.tiff`` and a protein beside the genes, as with ``--cytaimage``. ``prefix``: the same as downloaded from
    10x Genomics' page of datasets: no ``outs``, ``NAME_filtered_feature_bc_matrix.h5``, ``spatial/`` unpacked beside. ``mtx``: counts
    as the folder ``filtered_feature_bc_matrix`` only, as often in GEO.
``write_visium_hd``
    ``outs`` of Space Ranger ``"3.1.3"`` (``binned_outputs/square_008um`` and ``square_016um``, each with
    ``spatial/tissue_positions.parquet``; ``feature_slice.h5``) or ``"4.0.1"`` (``segmented_outputs`` and ``barcode_mappings.parquet``
    too). The section has to be one of ``synthetic(bin_um=8)``.
``write_h5ad``
    What people hand on: counts, ``obsm["spatial"]`` in pixels of an image that lies beside, nothing else.
``write_st``
    Legacy Spatial Transcriptomics: counts as a packed table, rows called ``XxY``, and the spot detector's table
    (``x``, ``y``, ``new_x``, ``new_y``, ``pixel_x``, ``pixel_y``, ``selected``), as on spatialresearch.org and of HER2ST.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import tifffile
from PIL import Image
from scipy import sparse
from scipy.io import mmwrite
from spatialdata import get_pyramid_levels

if TYPE_CHECKING:
    from pathlib import Path

    from spatialdata import SpatialData

POSITIONS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
HIRES_PX, LOWRES_PX = 400, 120  # 2000 and 600 of Space Ranger
DRAWN_UM = 65.0  # what Space Ranger calls the diameter of a spot


@dataclass(frozen=True)
class Written:
    """Where a section was written."""

    source: Path
    """What a user would name: ``outs``, the folder of a download, or the h5ad"""
    image: Path
    """The full-resolution image"""


def write_visium(
    folder: Path,
    sdata: SpatialData,
    *,
    version: str = "3.1.3",
    cytassist: bool = False,
    prefix: str = "",
    mtx: bool = False,
    image: str = "tissue.tif",
) -> Written:
    """Write ``folder/outs`` and ``folder/image``; with a prefix all of it into ``folder``."""
    table = next(iter(sdata.tables.values()))
    outs = folder if prefix else folder / "outs"
    name = f"{prefix}_" if prefix else ""
    (outs / "spatial").mkdir(parents=True)
    positions = _all_spots(table)
    if not cytassist:
        positions[POSITIONS[4:]] = positions[POSITIONS[4:]].round().astype(int)
    if version.startswith("1."):
        positions.to_csv(outs / "spatial/tissue_positions_list.csv", header=False, index=False)
    else:
        positions.to_csv(outs / "spatial/tissue_positions.csv", index=False)
    pixels = full_image(sdata)
    scale = write_thumbnails(outs / "spatial", pixels)
    factors = {**scale, "fiducial_diameter_fullres": 1.6 * DRAWN_UM / mpp(sdata)}
    factors["spot_diameter_fullres"] = DRAWN_UM / mpp(sdata)
    if cytassist:
        tifffile.imwrite(outs / "spatial/cytassist_image.tiff", pixels[::3, ::3])
        factors["regist_target_img_scalef"] = scale["tissue_hires_scalef"]
    (outs / "spatial/scalefactors_json.json").write_text(json.dumps(factors))
    if mtx:
        _write_mtx(outs / f"{name}filtered_feature_bc_matrix", table)
    else:
        _write_h5(outs / f"{name}filtered_feature_bc_matrix.h5", table, version=version, protein=cytassist)
        _write_h5(outs / f"{name}raw_feature_bc_matrix.h5", table, version=version, protein=cytassist)
    (outs / f"{name}web_summary.html").write_text("<html></html>")
    return Written(outs, write_image(folder / f"{name}{image}", pixels))


def write_visium_hd(
    folder: Path, sdata: SpatialData, *, version: str = "3.1.3", prefix: str = "", image: str = "tissue.tif"
) -> Written:
    """Write ``folder/outs`` and ``folder/image``; with a prefix all of it into ``folder``."""
    outs = folder if prefix else folder / "outs"
    name = f"{prefix}_" if prefix else ""
    pixels = full_image(sdata)
    (outs / "spatial").mkdir(parents=True)
    scale = write_thumbnails(outs / "spatial", pixels)
    tifffile.imwrite(outs / "spatial/cytassist_image.tiff", pixels[::3, ::3])
    fine = sdata.tables["square_008um"]
    for bin_um, table in ((8, fine), (16, _merged(fine))):
        inner = outs / f"binned_outputs/square_{bin_um:03d}um"
        (inner / "spatial").mkdir(parents=True)
        _write_h5(inner / "filtered_feature_bc_matrix.h5", table, version=version)
        _positions(table).to_parquet(inner / "spatial/tissue_positions.parquet", index=False)
        write_thumbnails(inner / "spatial", pixels)
        factors = {**scale, "bin_size_um": float(bin_um), "microns_per_pixel": mpp(sdata)}
        factors |= {"spot_diameter_fullres": bin_um / mpp(sdata), "regist_target_img_scalef": 0.1}
        (inner / "spatial/scalefactors_json.json").write_text(json.dumps(factors))
    if version.startswith("4."):
        _write_cells(outs, fine, {**scale, "microns_per_pixel": mpp(sdata)}, version=version)
    unit = [1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0]
    pairs = [("cytassist", "spot"), ("spot", "cytassist"), ("microscope", "spot"), ("spot", "microscope")]
    matrices = {f"{a}_colrow_to_{b}_colrow": unit for a, b in pairs}
    layout = json.dumps({"file_format": "1.0", "transform": unit})
    with h5py.File(outs / f"{name}feature_slice.h5", "w") as file:
        file.attrs["metadata_json"] = json.dumps({"hd_layout_json": layout, "transform_matrices": matrices})
    (outs / f"{name}web_summary.html").write_text("<html></html>")
    return Written(outs, write_image(folder / f"{name}{image}", pixels))


def write_h5ad(folder: Path, sdata: SpatialData, *, image: str = "image.png") -> Written:
    """Write ``folder/counts.h5ad`` and ``folder/image``."""
    table = next(iter(sdata.tables.values()))
    folder.mkdir(parents=True, exist_ok=True)
    plain = ad.AnnData(table.X, obs=table.obs[["array_row", "array_col"]], var=table.var[[]])
    plain.obsm["spatial"] = table.obsm["spatial"]
    plain.write_h5ad(folder / "counts.h5ad")
    return Written(folder / "counts.h5ad", write_image(folder / image, full_image(sdata)))


def write_st(folder: Path, sdata: SpatialData, *, image: str = "HE.jpg") -> Written:
    """Write ``folder/counts.tsv.gz``, ``folder/spot_data-selection.tsv`` and ``folder/image``."""
    table = next(iter(sdata.tables.values()))
    folder.mkdir(parents=True, exist_ok=True)
    x, y = table.obs["array_col"].to_numpy(), table.obs["array_row"].to_numpy()
    counts = table.to_df().astype(int)
    counts.index = pd.Index([f"{a}x{b}" for a, b in zip(x, y, strict=True)])
    counts.to_csv(folder / "counts.tsv.gz", sep="\t")
    spots = pd.DataFrame({"x": x, "y": y, "new_x": x + 0.03, "new_y": y - 0.02})
    spots["pixel_x"], spots["pixel_y"] = np.asarray(table.obsm["spatial"]).T
    spots.assign(selected=1)[::-1].to_csv(folder / "spot_data-selection.tsv", sep="\t", index=False)
    return Written(folder / "counts.tsv.gz", write_image(folder / image, full_image(sdata)))


def full_image(sdata: SpatialData) -> np.ndarray:
    """Pixels of the section, (y, x, 3) uint8."""
    (element,) = sdata.images.values()
    return np.moveaxis(np.asarray(next(iter(get_pyramid_levels(element)))), 0, -1)


def mpp(sdata: SpatialData) -> float:
    """µm per pixel that the synthetic section was drawn with."""
    from spatialdata.transformations import get_transformation

    (element,) = sdata.images.values()
    return float(get_transformation(element, "synthetic").to_affine_matrix(("x", "y"), ("x", "y"))[0, 0])


def write_image(path: Path, pixels: np.ndarray) -> Path:
    """Write a tiled, compressed TIFF, or what the suffix says."""
    if path.suffix in {".tif", ".tiff", ".btf"}:
        tifffile.imwrite(
            path, pixels, tile=(256, 256), compression="zlib", photometric="rgb", bigtiff=path.suffix == ".btf"
        )
    else:
        Image.fromarray(pixels).save(path)
    return path


def write_thumbnails(spatial: Path, pixels: np.ndarray) -> dict[str, float]:
    """Write Space Ranger's hires and lowres image, and return how much they are shrunken."""
    factors = {}
    for kind, largest in (("hires", HIRES_PX), ("lowres", LOWRES_PX)):
        factor = largest / max(pixels.shape)
        size = (round(pixels.shape[1] * factor), round(pixels.shape[0] * factor))
        Image.fromarray(pixels).resize(size).save(spatial / f"tissue_{kind}_image.png")
        factors[f"tissue_{kind}_scalef"] = factor
    return factors


def _positions(table: ad.AnnData) -> pd.DataFrame:
    """Rows of ``tissue_positions``, for what is on the tissue."""
    x, y = np.asarray(table.obsm["spatial"]).T
    values = [table.obs_names, 1, table.obs["array_row"], table.obs["array_col"], y, x]
    return pd.DataFrame(dict(zip(POSITIONS, values, strict=True))).reset_index(drop=True)


def _all_spots(table: ad.AnnData) -> pd.DataFrame:
    """Rows of ``tissue_positions`` in the order of the array, with the spots off the tissue."""
    inside = _positions(table)
    places = inside[["array_row", "array_col"]].to_numpy()
    fit, *_ = np.linalg.lstsq(np.column_stack([places, np.ones(len(places))]), inside[POSITIONS[4:]], rcond=None)
    row, col = (a.ravel() for a in np.indices((places[:, 0].max() + 1, places[:, 1].max() + 1)))
    known = set(map(tuple, places.tolist()))
    off = [(r, c) for r, c in zip(row, col, strict=True) if (r + c) % 2 == 0 and (r, c) not in known]
    outside = pd.DataFrame(off, columns=POSITIONS[2:4], dtype=int)
    outside[POSITIONS[4:]] = np.column_stack([outside.to_numpy(), np.ones(len(outside))]) @ fit
    outside["barcode"] = [f"OFF-{r:02d}-{c:02d}" for r, c in off]
    outside["in_tissue"] = 0
    return pd.concat([inside, outside])[POSITIONS].sort_values(POSITIONS[2:4], ignore_index=True)


def _merged(table: ad.AnnData) -> ad.AnnData:
    """Bins twice as wide."""
    key = table.obs[["array_row", "array_col"]].to_numpy() // 2
    bins, member = np.unique(key, axis=0, return_inverse=True)
    sums = sparse.csr_matrix((np.ones(len(key)), (member.ravel(), np.arange(len(key)))))
    size = np.asarray(sums.sum(1))
    # middles of whole bins, also where some of the four are off the tissue
    offset = (key * 2 + 0.5 - table.obs[["array_row", "array_col"]].to_numpy())[:, ::-1]
    step = np.asarray(table.obsm["spatial"])
    unit = np.ptp(step[:, 0]) / np.ptp(table.obs["array_col"])
    names = [f"s_016um_{r:05d}_{c:05d}-1" for r, c in bins]
    obs = pd.DataFrame({"array_row": bins[:, 0], "array_col": bins[:, 1]}, index=names)
    merged = ad.AnnData(sparse.csr_matrix(sums @ table.X), obs=obs, var=table.var[[]])
    merged.obsm["spatial"] = np.asarray(sums @ (step + offset * unit)) / size
    return merged


def _write_h5(path: Path, table: ad.AnnData, *, version: str, protein: bool = False, barcodes: Any = None) -> None:
    """10x Genomics' h5 of counts: features x barcodes by columns, which is barcodes x features by rows."""
    table = table[np.argsort(table.obs_names)]  # as Space Ranger sorts them
    counts = sparse.csr_matrix(table.X)
    genes = list(table.var_names)
    kinds = ["Gene Expression"] * len(genes)
    if protein:
        counts = sparse.hstack([counts, sparse.csr_matrix(np.full((table.n_obs, 1), 7.0))], format="csr")
        genes, kinds = [*genes, "CD3E"], [*kinds, "Antibody Capture"]
    with h5py.File(path, "w") as file:
        file.attrs.update({"filetype": "matrix", "version": 2, "library_ids": np.array([b"library"])})
        file.attrs.update({"chemistry_description": "Spatial 3' v1", "software_version": f"spaceranger-{version}"})
        matrix = file.create_group("matrix")
        matrix["barcodes"] = np.array(table.obs_names if barcodes is None else barcodes, dtype="S")
        matrix["data"] = counts.data.astype(np.int32)
        matrix["indices"] = counts.indices.astype(np.int64)
        matrix["indptr"] = counts.indptr.astype(np.int64)
        matrix["shape"] = np.array(counts.shape[::-1], np.int32)
        features = matrix.create_group("features")
        features["_all_tag_keys"] = np.array([b"genome"])
        features["id"] = np.array([f"ENSG{i:011d}" for i in range(len(genes))], dtype="S")
        features["name"] = np.array(genes, dtype="S")
        features["feature_type"] = np.array(kinds, dtype="S")
        features["genome"] = np.array(["GRCh38"] * len(genes), dtype="S")


def _write_mtx(folder: Path, table: ad.AnnData) -> None:
    """10x Genomics' folder of counts: three packed text files."""
    folder.mkdir()
    with gzip.open(folder / "matrix.mtx.gz", "wb") as file:
        mmwrite(file, sparse.coo_matrix(table.X).T.astype(np.int32))
    genes = [f"ENSG{i:011d}\t{name}\tGene Expression" for i, name in enumerate(table.var_names)]
    for name, lines in (("features.tsv.gz", genes), ("barcodes.tsv.gz", list(table.obs_names))):
        with gzip.open(folder / name, "wt") as file:
            file.write("\n".join(lines) + "\n")


def _write_cells(outs: Path, table: ad.AnnData, factors: dict[str, float], *, version: str) -> None:
    """``segmented_outputs`` of Space Ranger 4, with every 50th bin as a cell."""
    inner = outs / "segmented_outputs"
    (inner / "spatial").mkdir(parents=True)
    (inner / "spatial/scalefactors_json.json").write_text(json.dumps(factors))
    some = table[::50]
    some = some[np.argsort(some.obs_names)]
    ids = range(1, some.n_obs + 1)
    _write_h5(
        inner / "filtered_feature_cell_matrix.h5", some, version=version, barcodes=[f"cellid_{i:09d}-1" for i in ids]
    )
    corners = np.array([[-4.0, -4], [4, -4], [4, 4], [-4, 4], [-4, -4]])
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [(corners + xy).tolist()]},
            "properties": {"cell_id": i},
        }
        for i, xy in zip(ids, np.asarray(some.obsm["spatial"]), strict=True)
    ]
    text = json.dumps({"type": "FeatureCollection", "features": features})
    for kind in ("cell", "nucleus"):
        (inner / f"{kind}_segmentations.geojson").write_text(text)
    mapping = pd.DataFrame({"square_008um": some.obs_names, "cell_id": [f"cellid_{i:09d}-1" for i in ids]})
    mapping.assign(in_nucleus=True, in_cell=True).to_parquet(outs / "barcode_mappings.parquet", index=False)
