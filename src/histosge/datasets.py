"""Sections to try things on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from histosge._section import centroids

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from geopandas import GeoDataFrame
    from numpy.typing import NDArray
    from scipy import sparse
    from spatialdata import SpatialData

__all__ = ["synthetic", "synthetic_truth"]

_PITCH_UM, _SPOT_UM, _DRAWN_SPOT_UM = 100.0, 55.0, 65.0  # readers store a spot that is drawn too large
_MARGIN_UM = 250.0
_RASTER_UM = 8.0
_COARSE_UM, _DETAIL_UM = 250.0, 70.0  # sigma of the hidden fields
_FINEST_UM = 2 * _RASTER_UM
_BIN_POINT_UM = 5.0
_TURN_DEG = 20.0
_SPOT_COUNTS = 8000.0
_UNS = "synthetic"
_PART = 2**24
"""Values that are worked on at once, 128 MiB of float64."""
# optical density of a full stain in red, green and blue
_HAEMATOXYLIN, _EOSIN = np.array([0.65, 0.70, 0.29]), np.array([0.07, 0.99, 0.11])


@dataclass(frozen=True)
class _Places:
    """What is measured: n spots or bins, and how readers name them."""

    shapes_key: str
    table_key: str
    instance_key: str
    xy_um: NDArray[np.float64]
    """(n, 2), centres"""
    array_row: NDArray[np.int64]
    array_col: NDArray[np.int64]
    instances: NDArray[Any]
    """(n,) what the shapes are indexed by"""
    names: NDArray[Any]
    """(n,) what the rows of the table are called"""
    offsets_um: NDArray[np.float64]
    """(k, 2), points around a centre: what is caught is their mean"""
    counts: float
    """Median library size"""
    corners_um: NDArray[np.float64] | None = None
    """(4, 2) around a centre; ``None`` where places are round"""


def synthetic(
    *,
    n_rows: int = 20,
    n_cols: int = 20,
    n_genes: int = 60,
    mpp: float = 1.0,
    rng: int = 0,
    detail_um: float = _DETAIL_UM,
    bin_um: float | None = None,
) -> SpatialData:
    """Make a section, Visium-like or as Visium HD, of which the truth is known everywhere.

    Four hidden fields cause both the image and the expression: how many nuclei there are, how large they are, how
    pink the stroma is, and where it opens into lumen. The first and third change over a quarter of a millimetre, the
    second and fourth over ``detail_um``. A fifth, coarse one is not visible in the image. A fifth of the genes follow
    none. Counts are Poisson, with a random library size for each spot or bin; either catches the mean of what it
    covers. What trips readers of real sections is here too: the drawn radius of a spot is not the physical one, rows
    of the table are in another order than the shapes, the shapes' own coordinates are turned against the image, and no
    coordinate system is called "global".

    The seed fixes the fields and which gene follows which: sections that differ in ``bin_um`` or ``mpp`` only have the
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
        Sigma of the Gaussian that smooths the two finely varying fields, 16 to 250 µm. Two places are correlated by
        ``exp(-(distance / (2 * detail_um)) ** 2)``: 70 is wider than a spot, 20 is structure that a spot averages over.
    bin_um
        Edge of contiguous square bins, as Visium HD has, that cover the array's extent instead of its spots: a whole
        number from 2 to 100. Bins hold counts by their area, as many in a µm² as spots. ``None`` measures spots.

    Returns
    -------
    A ``SpatialData`` with ``images["he"]`` (multi-scale, uint8 RGB), ``shapes["spots"]`` (circles) and
    ``tables["table"]`` (raw counts), aligned in the coordinate system ``"synthetic"`` (µm). With ``bin_um=8`` shapes
    and table are ``shapes["synthetic_square_008um"]`` (squares) and ``tables["square_008um"]``, named as
    ``spatialdata_io.visium_hd`` names them. Fields of the table:

    ``X``
        Raw counts, sparse float32.
    ``obs["region"]``, ``obs["spot_id"]`` or ``obs["location_id"]``
        Which shape the row is about. ``spot_id`` is the name of a spot, ``location_id`` the number of a bin.
    ``obs["in_tissue"]``
        1: places off the tissue are left out.
    ``obs["array_row"]``, ``obs["array_col"]``
        Place in the array; columns of a hexagonal array count in half steps.
    ``obsm["spatial"]``
        (x, y) in pixels of the image.
    ``uns["synthetic"]``
        ``n_rows``, ``n_cols``, ``n_genes``, ``seed`` and ``detail_um``: all that :func:`synthetic_truth` needs.

    See Also
    --------
    synthetic_truth : the expected expression at any places of it.

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

    _check(detail_um=detail_um, bin_um=bin_um)
    params = {"n_rows": n_rows, "n_cols": n_cols, "n_genes": n_genes, "seed": rng, "detail_um": float(detail_um)}
    random = np.random.default_rng([rng, 1])
    fields, tissue = _fields(params)
    places = _spots(n_rows, n_cols, tissue) if bin_um is None else _bins(n_rows, n_cols, tissue, bin_um=int(bin_um))
    n = len(places.xy_um)
    if n == 0:
        msg = f"n_rows={n_rows!r} and n_cols={n_cols!r} leave no place to measure on the tissue. Pass larger ones."
        raise ValueError(msg)
    counts = _counts(places, fields, params, random)
    own, back = _own_shapes(places)
    shapes = ShapesModel.parse(
        own, transformations={"synthetic": Affine(back, input_axes=("x", "y"), output_axes=("x", "y"))}
    )
    image = Image2DModel.parse(
        np.moveaxis(_render(fields, tissue, mpp=mpp, random=random), -1, 0),
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
                "region": pd.Categorical([places.shapes_key] * n),
                places.instance_key: places.instances[shuffled],
                "in_tissue": 1,
                "array_row": places.array_row[shuffled],
                "array_col": places.array_col[shuffled],
            },
            index=places.names[shuffled],
        ),
        var=pd.DataFrame(index=_gene_names(n_genes)),
    )
    adata.obsm["spatial"] = places.xy_um[shuffled] / mpp
    adata.uns[_UNS] = params
    table = TableModel.parse(adata, region=places.shapes_key, region_key="region", instance_key=places.instance_key)
    return SpatialData(images={"he": image}, shapes={places.shapes_key: shapes}, tables={places.table_key: table})


def synthetic_truth(sdata: SpatialData, *, target_key: str = "spots") -> pd.DataFrame:
    """Give the expected expression of a synthetic section at any of its shapes.

    Parameters
    ----------
    sdata
        What :func:`synthetic` returned, also after writing and reading it.
    target_key
        Shapes to give it for: their centres.

    Returns
    -------
    (n, genes) DataFrame, float64, indexed like the shapes: log1p of the expected counts per 10,000.

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
        msg = "this SpatialData has no known truth: it was not made by histosge.datasets.synthetic()."
        raise ValueError(msg)
    if target_key not in sdata.shapes:
        msg = f"target_key={target_key!r} is not among the shapes of this SpatialData: {list(sdata.shapes)}."
        raise KeyError(msg)
    params = _params(tables[0].uns[_UNS])
    fields, _ = _fields(params)
    element = sdata.shapes[target_key]
    matrix = get_transformation(element, to_coordinate_system="synthetic").to_affine_matrix(("x", "y"), ("x", "y"))
    xy_um = centroids(element) @ matrix[:2, :2].T + matrix[:2, 2]
    log_rate = np.empty((len(xy_um), params["n_genes"]))
    for part in _parts(len(xy_um), params["n_genes"]):
        rate = _rates(fields, params, xy_um[part])
        log_rate[part] = np.log1p(1e4 * rate / rate.sum(1, keepdims=True))
    return pd.DataFrame(log_rate, index=element.index, columns=_gene_names(params["n_genes"]), copy=False)


def _check(*, detail_um: float, bin_um: float | None) -> None:
    if not _FINEST_UM <= detail_um <= _COARSE_UM:
        msg = (
            f"detail_um={detail_um!r} is out of range: the two fine fields can have a sigma of {_FINEST_UM:g} to "
            f"{_COARSE_UM:g} µm. The truth lies on a raster of {_RASTER_UM:g} µm, which holds nothing finer; "
            "the other fields are no coarser. Pass for example detail_um=20."
        )
        raise ValueError(msg)
    if bin_um is not None and not (2 <= bin_um <= 100 and bin_um == int(bin_um)):
        msg = (
            f"bin_um={bin_um!r} is not a whole number from 2 to 100 µm, as readers take it from a name like "
            "'square_008um'. Pass one, for example bin_um=8, or None for round spots."
        )
        raise ValueError(msg)


def _params(uns: Mapping[str, Any]) -> dict[str, Any]:
    """What a table remembers, as Python's own numbers; sections from before ``detail_um`` have the usual one."""
    read = {name: int(value) for name, value in uns.items() if name != "detail_um"}
    return {**read, "detail_um": float(uns.get("detail_um", _DETAIL_UM))}


def _parts(n: int, values: int) -> Iterator[slice]:
    """Rows to work on at once, where each makes so many values."""
    step = max(1, _PART // max(1, values))
    for start in range(0, n, step):
        yield slice(start, start + step)


def _spots(n_rows: int, n_cols: int, tissue: NDArray[np.bool_]) -> _Places:
    """Spots of a hexagonal array, with the disc that each catches."""
    row, col = (a.ravel() for a in np.meshgrid(np.arange(n_rows), np.arange(n_cols), indexing="ij"))
    xy_um = np.column_stack([_PITCH_UM * (col + 0.5 * (row % 2)), _PITCH_UM * np.sqrt(0.75) * row]) + _MARGIN_UM
    on_tissue = _on_tissue(tissue, xy_um)
    xy_um, row, col = xy_um[on_tissue], row[on_tissue], col[on_tissue]
    name = np.array([f"SPOT-{r:02d}-{c:02d}" for r, c in zip(row, col, strict=True)])
    return _Places(
        shapes_key="spots",
        table_key="table",
        instance_key="spot_id",
        xy_um=xy_um,
        array_row=row,
        array_col=2 * col + row % 2,
        instances=name,
        names=name,
        offsets_um=_disc_points(_SPOT_UM / 2),
        counts=_SPOT_COUNTS,
    )


def _bins(n_rows: int, n_cols: int, tissue: NDArray[np.bool_], *, bin_um: int) -> _Places:
    """Square bins side by side over the extent of the array."""
    shape = (int(n_rows * _PITCH_UM * np.sqrt(0.75) // bin_um), int(n_cols * _PITCH_UM // bin_um))
    row, col = (a.ravel() for a in np.indices(shape))
    xy_um = _MARGIN_UM + bin_um * (np.column_stack([col, row]).astype(float) + 0.5)
    on_tissue = _on_tissue(tissue, xy_um)
    xy_um, row, col = xy_um[on_tissue], row[on_tissue], col[on_tissue]
    size = f"{bin_um:03d}um"
    # midpoints of equal parts of the square
    n_side = max(2, int(np.ceil(bin_um / _BIN_POINT_UM)))
    x, y = (a.ravel() for a in np.meshgrid(*[((np.arange(n_side) + 0.5) / n_side - 0.5) * bin_um] * 2))
    return _Places(
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
    return _sample(tissue[None].astype(float), xy_um)[:, 0] > 0.5


def _counts(
    places: _Places, fields: NDArray[np.float64], params: dict[str, Any], random: np.random.Generator
) -> sparse.csr_matrix:
    """Draw what is measured, part by part and in the order of one draw: (n, genes) float32."""
    from scipy import sparse

    n, n_points, n_genes = len(places.xy_um), len(places.offsets_um), params["n_genes"]
    library = random.lognormal(np.log(places.counts), 0.35, n)
    drawn = []
    for part in _parts(n, n_points * n_genes):
        points_um = (places.xy_um[part, None] + places.offsets_um[None]).reshape(-1, 2)
        rate = _rates(fields, params, points_um).reshape(-1, n_points, n_genes).mean(1)  # (part, genes)
        counts = random.poisson(rate / rate.sum(1, keepdims=True) * library[part, None])
        drawn.append(sparse.csr_matrix(counts.astype(np.float32)))
    return sparse.vstack(drawn, format="csr")


def _own_shapes(places: _Places) -> tuple[GeoDataFrame, NDArray[np.float64]]:
    """Shapes in their own coordinates, half-µm units, turned and shifted; the matrix (3, 3) that turns them back."""
    import geopandas as gpd
    import shapely

    turn = np.deg2rad(_TURN_DEG)
    turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    back = np.linalg.inv(np.block([[turned * 2, np.array([[300.0], [700.0]])], [np.zeros((1, 2)), np.ones((1, 1))]]))
    if places.corners_um is None:
        own = (places.xy_um @ turned.T) * 2 + [300.0, 700.0]
        frame = gpd.GeoDataFrame(
            {"radius": _DRAWN_SPOT_UM / 2 * 2}, geometry=shapely.points(own), index=places.instances
        )
    else:
        corners_um = places.xy_um[:, None] + places.corners_um  # (n, 4, 2)
        frame = gpd.GeoDataFrame(
            geometry=shapely.polygons((corners_um @ turned.T) * 2 + [300.0, 700.0]), index=places.instances
        )
    return frame, back


def _gene_names(n: int) -> list[str]:
    return [f"GENE{i:03d}" for i in range(n)]


def _fields(params: dict[str, Any]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Hidden fields (5, h, w) of unit variance on an 8 µm raster, and where there is tissue (h, w)."""
    from scipy.ndimage import gaussian_filter

    random = np.random.default_rng([params["seed"], 0])
    width = params["n_cols"] * _PITCH_UM + 2 * _MARGIN_UM
    height = params["n_rows"] * _PITCH_UM * np.sqrt(0.75) + 2 * _MARGIN_UM
    shape = (int(np.ceil(height / _RASTER_UM)), int(np.ceil(width / _RASTER_UM)))
    smooth = []
    detail_um = params.get("detail_um", _DETAIL_UM)
    for sigma_um in (_COARSE_UM, detail_um, _COARSE_UM, detail_um, _COARSE_UM):
        noise = gaussian_filter(random.standard_normal(shape), sigma_um / _RASTER_UM, mode="wrap")
        smooth.append((noise - noise.mean()) / noise.std())
    y, x = np.indices(shape)
    angle = np.arctan2(y / shape[0] - 0.5, x / shape[1] - 0.5)
    radius = np.hypot((y / shape[0] - 0.5) / 0.46, (x / shape[1] - 0.5) / 0.46)
    outline = 0.93 + 0.05 * np.sin(3 * angle + 1) + 0.03 * np.cos(5 * angle)
    return np.stack(smooth), radius < outline


def _sample(rasters: NDArray[np.float64], xy_um: NDArray[np.float64]) -> NDArray[np.float64]:
    """Read rasters (k, h, w) at places (n, 2): (n, k)."""
    from scipy.ndimage import map_coordinates

    at = xy_um.T[::-1] / _RASTER_UM - 0.5
    return np.column_stack([map_coordinates(r, at, order=1, mode="nearest") for r in rasters])


def _rates(fields: NDArray[np.float64], params: dict[str, Any], xy_um: NDArray[np.float64]) -> NDArray[np.float64]:
    """Expected counts, up to library size, at places (n, 2): (n, genes)."""
    random = np.random.default_rng([params["seed"], 2])
    n_genes = params["n_genes"]
    loading = np.zeros((len(fields), n_genes))
    first = random.integers(len(fields), size=n_genes)
    loading[first, np.arange(n_genes)] = random.choice([-1.0, 1.0], n_genes) * random.uniform(0.5, 0.9, n_genes)
    loading += random.normal(0, 0.1, loading.shape)
    loading[:, n_genes - n_genes // 5 :] = 0
    base = random.normal(0, 1, n_genes)
    rate = _sample(fields, xy_um) @ loading
    rate += base
    return np.exp(rate, out=rate)


def _disc_points(radius_um: float) -> NDArray[np.float64]:
    x, y = (a.ravel() for a in np.meshgrid(*[np.linspace(-radius_um, radius_um, 7)] * 2))
    return np.column_stack([x, y])[np.hypot(x, y) <= radius_um]


def _render(
    fields: NDArray[np.float64], tissue: NDArray[np.bool_], *, mpp: float, random: np.random.Generator
) -> NDArray[np.uint8]:
    """Draw the H&E image: nuclei, stroma and lumen by the fields, light absorbed by Beer and Lambert's law."""
    from scipy.ndimage import gaussian_filter, zoom

    h, w = (round(side * _RASTER_UM / mpp) for side in tissue.shape)
    crowding, size, pink, lumen, _ = fields

    def fine(raster: NDArray[np.float64]) -> NDArray[np.float32]:
        big: NDArray[np.float32] = zoom(raster, (h / raster.shape[0], w / raster.shape[1]), np.float32, order=1)
        return big

    def mottled(sigma_um: float, gain: float) -> NDArray[np.float32]:
        noise = np.empty((h, w), np.float32)
        for rows in _parts(h, w):
            noise[rows] = random.standard_normal(noise[rows].shape)
        noise = gaussian_filter(noise, sigma_um / mpp)
        noise *= np.float32(gain / mpp)
        return noise

    # nuclei: seeds thinned by the field, small ones and large ones in shares that follow another field
    per_um2 = 0.0035 * np.exp(0.6 * crowding) * tissue
    n_small = random.poisson(per_um2 * _RASTER_UM**2 / (1 + np.exp(1.5 * size)))
    n_large = random.poisson(per_um2 * _RASTER_UM**2 / (1 + np.exp(-1.5 * size)))
    haematoxylin = np.zeros((h, w), np.float32)
    for seeds, sigma_um in ((n_small, 1.6), (n_large, 3.2)):
        row, col = np.nonzero(seeds)
        times = seeds[row, col]
        row, col = np.repeat(row, times), np.repeat(col, times)
        y = np.clip(((row + random.random(len(row))) * _RASTER_UM / mpp).astype(int), 0, h - 1)
        x = np.clip(((col + random.random(len(col))) * _RASTER_UM / mpp).astype(int), 0, w - 1)
        dots = np.zeros((h, w), np.float32)
        np.add.at(dots, (y, x), 1.0)
        dots = gaussian_filter(dots, sigma_um / mpp)
        dots *= np.float32(2 * np.pi * (sigma_um / mpp) ** 2)
        haematoxylin += np.minimum(dots, 1.3, out=dots)
    del dots
    # whole images are held in float32, and few at once: all that needs more is done in strips
    eosin, rosy = mottled(2.0, 4.0), fine(pink)
    for rows in _parts(h, w):
        eosin[rows] = 0.32 + 0.10 * np.tanh(rosy[rows]) + 0.05 * eosin[rows]
    del rosy
    eosin *= fine(tissue.astype(float)) > 0.5
    holes, opening = mottled(5.0, 10.0), fine(lumen)
    image = np.empty((h, w, 3), np.uint8)
    for rows in _parts(h, 3 * w):
        open_here = holes[rows] > 2.2 - 0.9 * opening[rows]
        pinkness, blueness = np.where(open_here, 0.02, eosin[rows]), np.where(open_here, 0.0, haematoxylin[rows])
        density = 0.55 * blueness[..., None] * _HAEMATOXYLIN + np.clip(pinkness, 0, None)[..., None] * _EOSIN
        light = 245 * 10 ** (-density) + random.normal(0, 2, density.shape)
        image[rows] = np.clip(np.rint(light), 0, 255)
    return image
