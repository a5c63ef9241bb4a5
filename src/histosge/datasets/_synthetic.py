"""Synthetic sections with known truth, made offline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from histosge._section import centroids
from histosge._settings import check_seed
from histosge.datasets._simulation import (
    COARSE_UM,
    DETAIL_UM,
    MARGIN_UM,
    PITCH_UM,
    RASTER_UM,
    check_size,
    disc_points,
    draw,
    expected_rates,
    glands,
    hidden_fields,
    parts,
    sample,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from geopandas import GeoDataFrame
    from numpy.typing import NDArray
    from scipy import sparse
    from spatialdata import SpatialData

__all__ = ["synthetic", "synthetic_truth"]

_SPOT_UM, _DRAWN_SPOT_UM = 55.0, 65.0  # readers store larger circles than the physical spots
_FINEST_UM = 2 * RASTER_UM
_GLANDS_UM = (16.0, 200.0)
_BIN_POINT_UM = 5.0
_TURN_DEG = 20.0
_SPOT_COUNTS = 8000.0
_UNS = "synthetic"


@dataclass(frozen=True)
class _Measured:
    """The n measured spots or bins, named as by readers."""

    shapes_key: str
    table_key: str
    instance_key: str
    xy_um: NDArray[np.float64]
    """(n, 2), centres"""
    array_row: NDArray[np.int64]
    array_col: NDArray[np.int64]
    instances: NDArray[Any]
    """(n,), index of the shapes"""
    names: NDArray[Any]
    """(n,), names of the rows of the table"""
    offsets_um: NDArray[np.float64]
    """(k, 2), points around a centre: a spot or bin measures their mean"""
    counts: float
    """Median library size"""
    corners_um: NDArray[np.float64] | None = None
    """(4, 2) around a centre; ``None`` for spots"""


def synthetic(
    *,
    n_rows: int = 20,
    n_cols: int = 20,
    n_genes: int = 60,
    mpp: float = 1.0,
    rng: int = 0,
    detail_um: float = DETAIL_UM,
    gland_um: float | None = None,
    bin_um: float | None = None,
    genes_rng: int | None = None,
) -> SpatialData:
    """Make a section like Visium or Visium HD whose truth is known everywhere.

    Four hidden fields cause both the image and the expression: the number of nuclei, their size, the pinkness of the
    stroma, and its openings (lumen). The first and third vary over a quarter of a millimetre, the second and fourth
    over ``detail_um``. A fifth, coarse field is not visible in the image. A fifth of the genes follow no field. Counts
    are Poisson, with a random library size for each spot or bin, and each measures the mean of the area that it covers.
    The section has the traps of real sections: the stored radius of a spot is not the physical one, rows of the table
    are in another order than the shapes, the shapes' own coordinates are rotated against the image, and no coordinate
    system is called "global".

    The seed fixes the fields and which gene follows which: sections that differ only in ``bin_um`` or ``mpp`` have the
    same truth, but other nuclei and counts.

    Parameters
    ----------
    n_rows
        Rows of the hexagonal array, before the tissue's outline is cut out: the section is 86.6 µm high for each.
    n_cols
        Spots in a row: the section is 100 µm wide for each.
    n_genes
        Genes.
    mpp
        µm per pixel of the image.
    rng
        Seed.
    detail_um
        Sigma of the Gaussian that smooths the two finely varying fields, 16 to 250 µm. Two locations are correlated by
        ``exp(-(distance / (2 * detail_um)) ** 2)``: 70 is wider than a spot, 20 is structure that a spot averages over.
    gland_um
        Width of glands, 16 to 200 µm: bluer bands with sharp edges, structure smaller than a spot. More than half of
        the genes differ between glands and stroma. ``None`` makes none.
    bin_um
        Edge of contiguous square bins, as of Visium HD, that replace the spots: a whole number from 2 to 100. Bins hold
        as many counts in a µm² as spots. ``None`` measures spots.
    genes_rng
        Seed of which gene follows which field: sections with the same ``genes_rng`` and different ``rng`` are sections
        of one kind of tissue. ``None`` takes ``rng``.

    Returns
    -------
    A ``SpatialData`` with ``images["he"]`` (multi-scale, uint8 RGB), ``shapes["spots"]`` (circles) and
    ``tables["table"]`` (raw counts), aligned in the coordinate system ``"synthetic"`` (µm). With ``bin_um=8`` shapes
    and table are ``shapes["synthetic_square_008um"]`` (squares) and ``tables["square_008um"]``, named as
    ``spatialdata_io.visium_hd`` names them. Fields of the table:

    ``X``
        Raw counts, sparse float32.
    ``obs["region"]``, ``obs["spot_id"]`` or ``obs["location_id"]``
        Shape of the row. ``spot_id`` is the name of a spot, ``location_id`` the number of a bin.
    ``obs["in_tissue"]``
        1: spots and bins outside the tissue are left out.
    ``obs["array_row"]``, ``obs["array_col"]``
        Position in the array; columns of a hexagonal array count in half steps.
    ``obsm["spatial"]``
        (x, y) in pixels of the image.
    ``uns["synthetic"]``
        ``n_rows``, ``n_cols``, ``n_genes``, ``seed``, ``genes_seed``, ``detail_um`` and ``gland_um`` (0 for none),
        which :func:`synthetic_truth` needs.

    Raises
    ------
    ValueError
        Where ``detail_um``, ``gland_um`` or ``bin_um`` is out of range, or no spot or bin is left on the tissue.

    See Also
    --------
    synthetic_truth : the expected expression at any of its shapes.

    Examples
    --------
    >>> import histosge as sge
    >>> sdata = sge.datasets.synthetic()
    >>> sorted(sdata.shapes), sorted(sdata.images), sorted(sdata.tables)
    (['spots'], ['he'], ['table'])
    """
    import anndata as ad
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Affine, Scale

    check_size(n_rows=n_rows, n_cols=n_cols, n_genes=n_genes, mpp=mpp)
    _check(detail_um=detail_um, gland_um=gland_um, bin_um=bin_um)
    check_seed(rng)
    check_seed(0 if genes_rng is None else genes_rng, argument="genes_rng")
    params: dict[str, Any] = {"n_rows": n_rows, "n_cols": n_cols, "n_genes": n_genes, "seed": rng}
    params["genes_seed"] = rng if genes_rng is None else genes_rng
    params |= {"detail_um": float(detail_um), "gland_um": float(gland_um or 0)}
    random = np.random.default_rng([rng, 1])
    fields, tissue = hidden_fields(params)
    measured = _spots(n_rows, n_cols, tissue) if bin_um is None else _bins(n_rows, n_cols, tissue, bin_um=int(bin_um))
    n = len(measured.xy_um)
    if n == 0:
        msg = f"n_rows={n_rows!r} and n_cols={n_cols!r} leave no spot or bin on the tissue. Pass larger ones."
        raise ValueError(msg)
    counts = _counts(measured, fields, params, random)
    own, back = _own_shapes(measured)
    shapes = ShapesModel.parse(
        own, transformations={"synthetic": Affine(back, input_axes=("x", "y"), output_axes=("x", "y"))}
    )
    image = Image2DModel.parse(
        np.moveaxis(draw(fields, tissue, mpp=mpp, random=random, inside=glands(params)), -1, 0),
        dims=("c", "y", "x"),
        c_coords=["r", "g", "b"],
        scale_factors=[2],
        chunks=(3, 512, 512),
        transformations={"synthetic": Scale([1.0, mpp, mpp], axes=("c", "y", "x"))},
    )
    shuffled = random.permutation(n)
    adata = ad.AnnData(
        counts[shuffled],
        obs=pd.DataFrame(
            {
                "region": pd.Categorical([measured.shapes_key] * n),
                measured.instance_key: measured.instances[shuffled],
                "in_tissue": 1,
                "array_row": measured.array_row[shuffled],
                "array_col": measured.array_col[shuffled],
            },
            index=measured.names[shuffled],
        ),
        var=pd.DataFrame(index=_gene_names(n_genes)),
    )
    adata.obsm["spatial"] = measured.xy_um[shuffled] / mpp
    adata.uns[_UNS] = params
    table = TableModel.parse(adata, region=measured.shapes_key, region_key="region", instance_key=measured.instance_key)
    return SpatialData(images={"he": image}, shapes={measured.shapes_key: shapes}, tables={measured.table_key: table})


def synthetic_truth(sdata: SpatialData, *, target_key: str = "spots") -> pd.DataFrame:
    """Compute the expected expression of a synthetic section at any of its shapes.

    Parameters
    ----------
    sdata
        Result of :func:`synthetic`, also after writing and reading it.
    target_key
        Shapes at whose centres to compute it.

    Returns
    -------
    (n, genes) DataFrame, float64, indexed like the shapes: log1p of the expected counts per 10,000.

    Raises
    ------
    ValueError
        Where ``sdata`` was not made by :func:`synthetic`.
    KeyError
        Where there are no such shapes.

    Examples
    --------
    >>> import histosge as sge
    >>> sdata = sge.datasets.synthetic()
    >>> sge.datasets.synthetic_truth(sdata).shape[1]
    60
    """
    from spatialdata.transformations import get_transformation

    tables = [t for t in sdata.tables.values() if _UNS in t.uns]
    if not tables:
        msg = (
            "this SpatialData has no known truth: it was not made by histosge.datasets.synthetic(). Pass one that was."
        )
        raise ValueError(msg)
    if target_key not in sdata.shapes:
        msg = f"target_key={target_key!r} is not among the shapes of this SpatialData: {list(sdata.shapes)}."
        raise KeyError(msg)
    params = _params(tables[0].uns[_UNS])
    fields, _ = hidden_fields(params)
    element = sdata.shapes[target_key]
    matrix = get_transformation(element, to_coordinate_system="synthetic").to_affine_matrix(("x", "y"), ("x", "y"))
    xy_um = centroids(element) @ matrix[:2, :2].T + matrix[:2, 2]
    log_rate = np.empty((len(xy_um), params["n_genes"]))
    for part in parts(len(xy_um), params["n_genes"]):
        rate = expected_rates(fields, params, xy_um[part])
        log_rate[part] = np.log1p(1e4 * rate / rate.sum(1, keepdims=True))
    return pd.DataFrame(log_rate, index=element.index, columns=_gene_names(params["n_genes"]), copy=False)


def _check(*, detail_um: float, gland_um: float | None, bin_um: float | None) -> None:
    if not _FINEST_UM <= detail_um <= COARSE_UM:
        msg = (
            f"detail_um={detail_um!r} is out of range: the two fine fields can have a sigma of {_FINEST_UM:g} to "
            f"{COARSE_UM:g} µm. The truth lies on a raster of {RASTER_UM:g} µm, which holds nothing finer; "
            "the other fields are no coarser. Pass for example detail_um=20."
        )
        raise ValueError(msg)
    if gland_um is not None and not _GLANDS_UM[0] <= gland_um <= _GLANDS_UM[1]:
        msg = (
            f"gland_um={gland_um!r} is out of range: glands can be {_GLANDS_UM[0]:g} to {_GLANDS_UM[1]:g} µm wide. "
            "Pass for example gland_um=40, or None for none."
        )
        raise ValueError(msg)
    if bin_um is not None and not (2 <= bin_um <= 100 and bin_um == int(bin_um)):
        msg = (
            f"bin_um={bin_um!r} is not a whole number from 2 to 100 µm, as readers take it from a name like "
            "'square_008um'. Pass one, for example bin_um=8, or None for round spots."
        )
        raise ValueError(msg)


def _params(uns: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters that a table stores, as Python numbers; sections of earlier versions lack some, which get defaults."""
    usual = {"detail_um": DETAIL_UM, "gland_um": 0.0}
    read = {name: int(value) for name, value in uns.items() if name not in usual}
    return {"genes_seed": read["seed"]} | read | {name: float(uns.get(name, value)) for name, value in usual.items()}


def _spots(n_rows: int, n_cols: int, tissue: NDArray[np.bool_]) -> _Measured:
    """Spots of a hexagonal array."""
    row, col = (a.ravel() for a in np.meshgrid(np.arange(n_rows), np.arange(n_cols), indexing="ij"))
    xy_um = np.column_stack([PITCH_UM * (col + 0.5 * (row % 2)), PITCH_UM * np.sqrt(0.75) * row]) + MARGIN_UM
    on_tissue = _on_tissue(tissue, xy_um)
    xy_um, row, col = xy_um[on_tissue], row[on_tissue], col[on_tissue]
    name = np.array([f"SPOT-{r:02d}-{c:02d}" for r, c in zip(row, col, strict=True)])
    return _Measured(
        shapes_key="spots",
        table_key="table",
        instance_key="spot_id",
        xy_um=xy_um,
        array_row=row,
        array_col=2 * col + row % 2,
        instances=name,
        names=name,
        offsets_um=disc_points(_SPOT_UM / 2),
        counts=_SPOT_COUNTS,
    )


def _bins(n_rows: int, n_cols: int, tissue: NDArray[np.bool_], *, bin_um: int) -> _Measured:
    """Contiguous square bins over the extent of the array."""
    shape = (int(n_rows * PITCH_UM * np.sqrt(0.75) // bin_um), int(n_cols * PITCH_UM // bin_um))
    row, col = (a.ravel() for a in np.indices(shape))
    xy_um = MARGIN_UM + bin_um * (np.column_stack([col, row]).astype(float) + 0.5)
    on_tissue = _on_tissue(tissue, xy_um)
    xy_um, row, col = xy_um[on_tissue], row[on_tissue], col[on_tissue]
    size = f"{bin_um:03d}um"
    # midpoints of equal parts of the square
    n_side = max(2, int(np.ceil(bin_um / _BIN_POINT_UM)))
    x, y = (a.ravel() for a in np.meshgrid(*[((np.arange(n_side) + 0.5) / n_side - 0.5) * bin_um] * 2))
    return _Measured(
        # one SpatialData cannot hold shapes and a table of one name
        shapes_key=f"synthetic_square_{size}",
        table_key=f"square_{size}",
        instance_key="location_id",
        xy_um=xy_um,
        array_row=row,
        array_col=col,
        instances=np.arange(len(xy_um)),
        names=np.array([f"s_{size}_{r:05d}_{c:05d}-1" for r, c in zip(row, col, strict=True)]),
        offsets_um=np.column_stack([x, y]),
        counts=_SPOT_COUNTS * bin_um**2 / (np.pi * (_SPOT_UM / 2) ** 2),
        corners_um=np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]]) * bin_um,
    )


def _on_tissue(tissue: NDArray[np.bool_], xy_um: NDArray[np.float64]) -> NDArray[np.bool_]:
    return sample(tissue[None].astype(float), xy_um)[:, 0] > 0.5


def _counts(
    measured: _Measured, fields: NDArray[np.float64], params: dict[str, Any], random: np.random.Generator
) -> sparse.csr_matrix:
    """Draw the counts in parts, with the random numbers of one draw: (n, genes) float32."""
    from scipy import sparse

    n, n_points, n_genes = len(measured.xy_um), len(measured.offsets_um), params["n_genes"]
    library = random.lognormal(np.log(measured.counts), 0.35, n)
    drawn = []
    for part in parts(n, n_points * n_genes):
        points_um = (measured.xy_um[part, None] + measured.offsets_um[None]).reshape(-1, 2)
        rate = expected_rates(fields, params, points_um).reshape(-1, n_points, n_genes).mean(1)  # (part, genes)
        counts = random.poisson(rate / rate.sum(1, keepdims=True) * library[part, None])
        drawn.append(sparse.csr_matrix(counts.astype(np.float32)))
    return sparse.vstack(drawn, format="csr")


def _own_shapes(measured: _Measured) -> tuple[GeoDataFrame, NDArray[np.float64]]:
    """Shapes in their own coordinates (half µm, rotated, shifted), and the matrix (3, 3) back to µm of the image."""
    import geopandas as gpd
    import shapely

    turn = np.deg2rad(_TURN_DEG)
    turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    back = np.linalg.inv(np.block([[turned * 2, np.array([[300.0], [700.0]])], [np.zeros((1, 2)), np.ones((1, 1))]]))
    if measured.corners_um is None:
        own = (measured.xy_um @ turned.T) * 2 + [300.0, 700.0]
        frame = gpd.GeoDataFrame(
            {"radius": _DRAWN_SPOT_UM / 2 * 2}, geometry=shapely.points(own), index=measured.instances
        )
    else:
        corners_um = measured.xy_um[:, None] + measured.corners_um  # (n, 4, 2)
        frame = gpd.GeoDataFrame(
            geometry=shapely.polygons((corners_um @ turned.T) * 2 + [300.0, 700.0]), index=measured.instances
        )
    return frame, back


def _gene_names(n: int) -> list[str]:
    return [f"GENE{i:03d}" for i in range(n)]
