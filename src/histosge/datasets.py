"""Sections to try things on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from histosge._section import centroids

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from spatialdata import SpatialData

__all__ = ["synthetic", "synthetic_truth"]

_PITCH_UM, _SPOT_UM, _DRAWN_SPOT_UM = 100.0, 55.0, 65.0  # readers store a spot that is drawn too large
_MARGIN_UM = 250.0
_RASTER_UM = 8.0
_TURN_DEG = 20.0
_UNS = "synthetic"
# optical density of a full stain in red, green and blue
_HAEMATOXYLIN, _EOSIN = np.array([0.65, 0.70, 0.29]), np.array([0.07, 0.99, 0.11])


def synthetic(*, n_rows: int = 20, n_cols: int = 20, n_genes: int = 60, mpp: float = 1.0, rng: int = 0) -> SpatialData:
    """Make a Visium-like section of which the truth is known everywhere.

    Four hidden fields cause both the image and the expression: how many nuclei there are, how large they are, how
    pink the stroma is, and where it opens into lumen; two of them change over a quarter of a millimetre, two within
    the distance of two spots. A fifth, smooth one is not visible in the image. A fifth of the genes follow none.
    Counts are Poisson, with a random library size for each spot. What trips readers of real sections is here too:
    the drawn radius of a spot is not the physical one, rows of the table are in another order than the shapes, the
    spots are turned against the image, and no coordinate system is called "global".

    Parameters
    ----------
    n_rows
        Rows of the hexagonal array, before the tissue's outline is cut out.
    n_cols
        Spots in a row.
    n_genes
        Genes.
    mpp
        µm per pixel of the image.
    rng
        Seed.

    Returns
    -------
    A ``SpatialData`` with ``images["he"]`` (multi-scale, uint8 RGB), ``shapes["spots"]`` (circles) and
    ``tables["table"]`` (raw counts), aligned in the coordinate system ``"synthetic"`` (µm).

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
    import geopandas as gpd
    import shapely
    from scipy import sparse
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Affine, Scale

    params = {"n_rows": n_rows, "n_cols": n_cols, "n_genes": n_genes, "seed": rng}
    random = np.random.default_rng([rng, 1])
    fields, tissue = _fields(params)

    row, col = (a.ravel() for a in np.meshgrid(np.arange(n_rows), np.arange(n_cols), indexing="ij"))
    xy_um = np.column_stack([_PITCH_UM * (col + 0.5 * (row % 2)), _PITCH_UM * np.sqrt(0.75) * row]) + _MARGIN_UM
    on_tissue = _sample(tissue[None].astype(float), xy_um)[:, 0] > 0.5
    xy_um, row, col = xy_um[on_tissue], row[on_tissue], col[on_tissue]
    n = len(xy_um)
    # a spot catches the mean of its disc
    disc = _disc_points(_SPOT_UM / 2)
    rate = _rates(fields, params, (xy_um[:, None] + disc[None]).reshape(-1, 2)).reshape(n, len(disc), n_genes).mean(1)
    library = random.lognormal(np.log(8000), 0.35, n)
    counts = random.poisson(rate / rate.sum(1, keepdims=True) * library[:, None]).astype(np.float32)

    name = np.array([f"SPOT-{r:02d}-{c:02d}" for r, c in zip(row, col, strict=True)])
    turn = np.deg2rad(_TURN_DEG)
    turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    # the spots' own coordinates: half-µm units, turned and shifted; their transformation turns them back
    own = (xy_um @ turned.T) * 2 + [300.0, 700.0]
    back = np.linalg.inv(np.block([[turned * 2, np.array([[300.0], [700.0]])], [np.zeros((1, 2)), np.ones((1, 1))]]))
    circles = gpd.GeoDataFrame({"radius": _DRAWN_SPOT_UM / 2 * 2}, geometry=shapely.points(own), index=name)
    spots = ShapesModel.parse(
        circles, transformations={"synthetic": Affine(back, input_axes=("x", "y"), output_axes=("x", "y"))}
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
        sparse.csr_matrix(counts[shuffled]),
        obs=pd.DataFrame(
            {
                "region": pd.Categorical(["spots"] * n),
                "spot_id": name[shuffled],
                "in_tissue": 1,
                "array_row": row[shuffled],
                "array_col": (2 * col + row % 2)[shuffled],
            },
            index=name[shuffled],
        ),
        var=pd.DataFrame(index=_gene_names(n_genes)),
    )
    adata.obsm["spatial"] = xy_um[shuffled] / mpp
    adata.uns[_UNS] = params
    table = TableModel.parse(adata, region="spots", region_key="region", instance_key="spot_id")
    return SpatialData(images={"he": image}, shapes={"spots": spots}, tables={"table": table})


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
    params = {k: int(v) for k, v in tables[0].uns[_UNS].items()}
    fields, _ = _fields(params)
    element = sdata.shapes[target_key]
    matrix = get_transformation(element, to_coordinate_system="synthetic").to_affine_matrix(("x", "y"), ("x", "y"))
    rate = _rates(fields, params, centroids(element) @ matrix[:2, :2].T + matrix[:2, 2])
    log_rate = np.log1p(1e4 * rate / rate.sum(1, keepdims=True))
    return pd.DataFrame(log_rate, index=element.index, columns=_gene_names(params["n_genes"]))


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
    for sigma_um in (250.0, 70.0, 250.0, 70.0, 250.0):
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
    return np.exp(base + _sample(fields, xy_um) @ loading)


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
        big = zoom(raster, (h / raster.shape[0], w / raster.shape[1]), order=1)
        return big.astype(np.float32)

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
        dots = gaussian_filter(dots, sigma_um / mpp) * np.float32(2 * np.pi * (sigma_um / mpp) ** 2)
        haematoxylin += np.minimum(dots, 1.3)
    grain = gaussian_filter(random.standard_normal((h, w)).astype(np.float32), 2.0 / mpp) * np.float32(4.0 / mpp)
    inside = fine(tissue.astype(float)) > 0.5
    eosin = inside * (0.32 + 0.10 * np.tanh(fine(pink)) + 0.05 * grain)
    holes = gaussian_filter(random.standard_normal((h, w)).astype(np.float32), 5.0 / mpp) * np.float32(10.0 / mpp)
    open_here = holes > 2.2 - 0.9 * fine(lumen)
    eosin, haematoxylin = np.where(open_here, 0.02, eosin), np.where(open_here, 0.0, haematoxylin)
    density = 0.55 * haematoxylin[..., None] * _HAEMATOXYLIN + np.clip(eosin, 0, None)[..., None] * _EOSIN
    light = 245 * 10 ** (-density) + random.normal(0, 2, density.shape)
    return np.clip(np.rint(light), 0, 255).astype(np.uint8)
