"""What a file states about the array of its spots: names, columns, scale factors, and the reader that read it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from histosge._geometry import LEGACY_ST, VISIUM, Technology

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData
    from numpy.typing import NDArray

BARCODE_OF_BIN = re.compile(r"s_(\d{3})um_(\d{5})_(\d{5})")
"""Barcode of Visium HD, anywhere in a name: edge in µm, row, column."""
_VISIUM_BARCODE = re.compile(r"(?<![ACGT])[ACGT]{16}(?![ACGT])")
_ST_NAME = re.compile(r"(?<![\d.])(\d{1,3}(?:\.\d+)?)x(\d{1,3}(?:\.\d+)?)(?![\d.])")
_KEY_OF_BINS = re.compile(r"square_(\d{3})um")

_ST_ARRAY = (34, 36)
"""Columns and rows of the largest array of Spatial Transcriptomics (33 x 35), with a margin for rounding."""
_SAMPLE = 200
"""Names that are checked, evenly over all."""
_FEWEST_PLACES = 20
_DOUBLED = 0.05
"""Largest share of the spots that may share a position on the array."""


@dataclass(frozen=True)
class Declared:
    """What a file states about the array of its spots."""

    technology: Technology | None = None
    source: str = ""
    """Where the file states it"""
    row: NDArray[np.int64] | None = None
    """(n,) on the array"""
    col: NDArray[np.int64] | None = None
    mpp: float | None = None
    """µm per pixel of the image"""
    spot_px: float | None = None
    """Diameter of a spot in pixels of the image, as Space Ranger estimates it"""
    doubtful: bool = False
    """Whether other technologies use the same names of spots"""


def read_declared(
    table: AnnData,
    *,
    rows: NDArray[np.int64],
    instances: pd.Index,
    keys: str,
    attrs: Mapping[Any, Any],
    xy_px: NDArray[np.float64],
    scale_factors: Mapping[str, Any],
) -> Declared:
    """Collect what names, columns, keys and scale factors state about the array.

    Parameters
    ----------
    table
        Measured table.
    rows
        (n,) which of its rows are the spots.
    instances
        (n,) names of the spots in the shapes element.
    keys
        Names of the elements.
    attrs
        Those of the ``SpatialData``, where readers write their name.
    xy_px
        (n, 2) spots in pixels of the image.
    scale_factors
        Those of Space Ranger; see :func:`scale_factors`.
    """
    names = [table.obs_names[rows].astype(str), instances.astype(str)]
    names += [table.obs[c].iloc[rows].astype(str) for c in table.obs.columns if "barcode" in str(c).lower()]
    technology, source, doubtful = _technology(names, keys, attrs, scale_factors)
    row, col = _array(table.obs.iloc[rows], names)
    if technology is None and row is not None and col is not None and _is_visium_array(row, col):
        technology, source = VISIUM, "array_row and array_col"
    full = _pixels_of_full(table, rows, xy_px)
    mpp, spot_px = (_positive(scale_factors.get(name)) for name in ("microns_per_pixel", "spot_diameter_fullres"))
    return Declared(
        technology,
        source,
        row,
        col,
        mpp=None if full is None or mpp is None else mpp / full,
        spot_px=None if full is None or spot_px is None else spot_px * full,
        doubtful=doubtful,
    )


def scale_factors(table: AnnData, *, spots_key: str, rows: NDArray[np.int64]) -> dict[str, Any]:
    """Space Ranger's scale factors in ``uns["spatial"]``, for the library of the spots; empty without any."""
    return dict(library_of(table, spots_key=spots_key, rows=rows).get("scalefactors", {}))


def library_of(table: AnnData, *, spots_key: str, rows: NDArray[np.int64]) -> Mapping[str, Any]:
    """The entry of ``uns["spatial"]`` for the spots; empty where there is none, or where it is not clear which."""
    libraries = table.uns.get("spatial", {})
    libraries = {k: v for k, v in libraries.items() if hasattr(v, "get")} if hasattr(libraries, "items") else {}
    if len(libraries) > 1 and "library_id" in table.obs:
        of_spots = table.obs["library_id"].iloc[rows].astype(str).unique()
        libraries = {k: v for k, v in libraries.items() if str(k) in of_spots}
    if len(libraries) > 1:
        libraries = {k: v for k, v in libraries.items() if str(k) == spots_key}
    return next(iter(libraries.values())) if len(libraries) == 1 else {}


def check_single_section(table: AnnData, rows: NDArray[np.int64], spots_key: str, *, remedy: str) -> None:
    """Refuse spots of several sections in one element: they share positions on the array."""
    row, col = _array(table.obs.iloc[rows], [table.obs_names[rows].astype(str)])
    if row is None or col is None:
        return
    again = pd.DataFrame({"row": row, "col": col}).duplicated()
    # columns with only a few values are not positions
    if again.mean() > _DOUBLED and (~again).sum() >= _FEWEST_PLACES:
        msg = (
            f"{again.mean():.0%} of the {len(rows)} spots of {spots_key!r} have a position on the array (array_row, "
            "array_col or their names) that another spot has as well: they are of several sections. Read one of them: "
            f"{remedy}"
        )
        raise ValueError(msg)


def _technology(
    names: list[Any], keys: str, attrs: Mapping[Any, Any], factors: Mapping[str, Any]
) -> tuple[Technology | None, str, bool]:
    sampled = [_sample(column) for column in names]
    for column in sampled:
        edges = {m[1] for name in column if (m := BARCODE_OF_BIN.search(name))}
        if len(edges) > 1:
            msg = (
                f"barcodes are of bins of {sorted(int(e) for e in edges)} µm (for example {list(column[:2])}), of "
                "several tables. Make a table of each size."
            )
            raise ValueError(msg)
        if edges and _share(column, BARCODE_OF_BIN) > 0.5:
            um = float(edges.pop())
            return Technology("visium-hd", um, um), "barcodes", False
    if named := _KEY_OF_BINS.search(keys):
        um = float(named[1])
        return Technology("visium-hd", um, um), "name of the element", False
    if (bins_um := _positive(factors.get("bin_size_um"))) is not None:
        return Technology("visium-hd", bins_um, bins_um), "scale factors", False
    if attrs.get("histosge_reader") == "st":
        return LEGACY_ST, "read from the table of an ST array", False
    if attrs.get("spatialdata_io_reader") == "visium":
        return VISIUM, "read by spatialdata_io.visium", False
    for column in sampled:
        if _share(column, _VISIUM_BARCODE) > 0.5:
            return VISIUM, "barcodes", False
        at = [m for name in column if (m := _ST_NAME.search(name))]
        if len(at) > 0.5 * len(column):
            col, row = (np.array([float(m[i]) for m in at]) for i in (1, 2))
            if col.max() <= _ST_ARRAY[0] and row.max() <= _ST_ARRAY[1]:
                whole = not any("." in m[0] for m in at)  # positions of the spot detector are not whole numbers
                return LEGACY_ST, f"names of spots, as {at[0][0]}", whole
    return None, "", False


def _array(obs: pd.DataFrame, names: list[Any]) -> tuple[NDArray[np.int64] | None, NDArray[np.int64] | None]:
    """Row and column of each spot on the array, from columns of ``obs`` or from names."""
    array = _columns(obs)
    if array is not None:
        return array[:, 0], array[:, 1]
    for column in names:
        for pattern, (row, col) in ((BARCODE_OF_BIN, (1, 2)), (_ST_NAME, (1, 0))):
            if _share(_sample(column), pattern) == 1.0:
                at = pd.Series(np.asarray(column)).str.extract(pattern).astype(float)
                if at.notna().all(axis=None):
                    whole = at.round().to_numpy(np.int64)
                    return whole[:, row], whole[:, col]
    return None, None


def _columns(obs: pd.DataFrame) -> NDArray[np.int64] | None:
    """``array_row`` and ``array_col``, (n, 2), where they are whole numbers."""
    if not {"array_row", "array_col"} <= set(obs.columns):
        return None
    array = obs[["array_row", "array_col"]].apply(pd.to_numeric, errors="coerce").to_numpy(float)
    if not np.isfinite(array).all() or (array != np.rint(array)).any():
        return None
    return array.astype(np.int64)


def _is_visium_array(row: NDArray[np.int64], col: NDArray[np.int64]) -> bool:
    """Whether columns count in half steps, as Space Ranger's do, and fit on a capture area."""
    staggered = (row + col) % 2 == (row[0] + col[0]) % 2
    both = len(np.unique(row % 2)) == 2
    return bool(staggered.all() and both and np.ptp(row) < 128 and np.ptp(col) < 224)


def _pixels_of_full(table: AnnData, rows: NDArray[np.int64], xy_px: NDArray[np.float64]) -> float | None:
    """Pixels of the image per pixel of Space Ranger's full-resolution image, the unit of ``obsm["spatial"]``."""
    if "spatial" not in table.obsm:
        return None
    full = np.asarray(table.obsm["spatial"], float)[rows, :2]
    spread = full.std(axis=0).sum()
    if not np.isfinite(full).all() or spread <= 0:
        return None
    return float(np.sqrt(xy_px.var(axis=0).sum() / full.var(axis=0).sum()))


def _sample(column: Any) -> list[str]:
    """Some names, evenly over all."""
    rows = np.unique(np.linspace(0, len(column) - 1, _SAMPLE).astype(int))
    return [str(name) for name in np.asarray(column)[rows]]


def _share(names: list[str], pattern: re.Pattern[str]) -> float:
    return sum(pattern.search(name) is not None for name in names) / len(names)


def _positive(value: Any) -> float | None:
    """The value as a number above 0; ``None`` for anything else that a file may hold."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) and number > 0 else None
