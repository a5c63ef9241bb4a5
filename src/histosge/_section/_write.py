"""Arrays → elements and tables of ``SpatialData``. Everything is made and checked before anything is written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from histosge import _keys
from histosge._geometry import (
    Footprints,
    Places,
    check_upsample,
    in_mask,
    lay_around,
    lay_over,
    nearest_spots,
    refine,
    square_bins,
    tissue_mask,
)
from histosge._image import thumbnail
from histosge._section._alignment import warn_of_orientation
from histosge._section._coordinates import align, apply, centroids, scale_of
from histosge._section._section import _drawn_size, _regions, ours
from histosge._settings import logger

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame
    from numpy.typing import NDArray
    from spatialdata import SpatialData

    from histosge._section._section import Section
    from histosge._statistics import PredictionIntervals

TISSUE = ("auto", "spots")
INVALID = ("raise", "skip")
SMALLEST_BIN_UM = 1.0
_TISSUE_BLUR_PITCH = 0.25
_SAME_PLACE_PITCH = 0.01
"""A target this near to a spot, in pitches, is the spot itself."""


@dataclass(frozen=True)
class Targets:
    """Places to predict at, and the rows of the shapes element that they are."""

    key: str
    instances: pd.Index
    xy_px: NDArray[np.float64]
    """(n, 2)"""
    spot_index: NDArray[np.int64]
    """(n,) row of the section's spot at this very place, -1 for none"""
    in_tissue: NDArray[np.bool_]
    array_row: NDArray[np.int64] | None
    array_col: NDArray[np.int64] | None
    tissue: str
    """How tissue was told"""
    footprints: Footprints
    """(n,) areas of the image that the places stand for"""

    def __len__(self) -> int:
        return len(self.xy_px)

    def take(self, rows: NDArray[np.int64]) -> Targets:
        """Return some of the places."""
        return replace(
            self,
            instances=self.instances[rows],
            xy_px=self.xy_px[rows],
            spot_index=self.spot_index[rows],
            in_tissue=self.in_tissue[rows],
            array_row=None if self.array_row is None else self.array_row[rows],
            array_col=None if self.array_col is None else self.array_col[rows],
            footprints=self.footprints.take(rows),
        )


def own_spots(section: Section) -> Targets:
    """Take the measured spots as places."""
    n = len(section.xy_px)
    return Targets(
        section.spots_key,
        section.instances,
        section.xy_px,
        spot_index=np.arange(n),
        in_tissue=np.ones(n, bool),
        array_row=None,
        array_col=None,
        tissue="measured spots",
        footprints=section.footprints,
    )


def _in_tissue(section: Section, xy_px: NDArray[np.float64], *, tissue: str) -> tuple[NDArray[np.bool_], str]:
    """Tell which places lie on tissue: dark enough in the image, and for ``"auto"`` inside it."""
    inside = np.asarray(((xy_px >= 0) & (xy_px < [section.image.width_px, section.image.height_px])).all(1))
    if tissue == "spots" and not section.measured:
        msg = "tissue='spots' keeps places within reach of a spot, and nothing was measured here. Pass tissue='auto'."
        raise ValueError(msg)
    if tissue == "spots":
        return inside, "within reach of a measured spot"
    small, factor = thumbnail(section.image, max_px=1024)
    warn_of_orientation(section, small, factor)
    cell_um = factor * section.mpp
    # a place stands for about as much tissue as a spot covers, pale stroma included
    mask, share = tissue_mask(
        small, section.xy_px / factor, blur_cells=max(_TISSUE_BLUR_PITCH * section.pitch_um / cell_um, 0.5)
    )
    how = "optical density of the image" + ("" if section.measured else ", Otsu's threshold")
    if share < 0.95:
        how += f", threshold lowered to the spots' own (Otsu's would have kept {share:.0%} of them)"
    return inside & in_mask(xy_px, mask, px_per_cell=(factor, factor)), how


def lay_targets(
    section: Section, *, key: str, upsample: int | None, bin_um: float | None, tissue: str = "auto"
) -> tuple[Targets, Places]:
    """Lay places between the spots, or square bins, and keep those on tissue; the spots' own are always kept."""
    if tissue not in TISSUE:
        msg = (
            f"tissue={tissue!r}: choose 'auto' (dark enough in the image and within reach of a spot) "
            "or 'spots' (within reach of a spot)."
        )
        raise ValueError(msg)
    if bin_um is not None:
        reach_um = section.pitch_um / np.sqrt(2)
        if not SMALLEST_BIN_UM <= bin_um <= section.spot_um * (1 + 1e-6):  # which may be measured: 19.999...
            msg = (
                f"bin_um={bin_um!r}: bins must be at least {SMALLEST_BIN_UM:g} µm wide and no wider than a measured spot "
                f"({section.spot_um:g} µm), above which nothing is resolved. For places between spots pass upsample=."
            )
            raise ValueError(msg)
        if section.measured:
            places = square_bins(section.xy_px, bin_px=bin_um / section.mpp, margin_px=reach_um / section.mpp)
        else:
            places = _lay_over_image(section, step_um=bin_um, hexagonal=False)
    elif not section.measured:
        upsample = 4 if upsample is None else upsample
        check_upsample(upsample)
        places = _lay_over_image(section, step_um=section.pitch_um / np.sqrt(upsample), hexagonal=True)
    elif section.lattice is None:
        upsample = 4 if upsample is None else upsample
        places = lay_around(section.xy_px, pitch_px=section.pitch_um / section.mpp, upsample=upsample)
    else:
        places = refine(section.lattice, section.xy_px, upsample=4 if upsample is None else upsample)
    on_tissue, how = _in_tissue(section, places.xy_px, tissue=tissue)
    places = places.keep(on_tissue | (places.spot_index >= 0))
    targets = Targets(
        key,
        pd.RangeIndex(len(places)),
        places.xy_px,
        places.spot_index,
        np.ones(len(places), dtype=bool),
        places.array_row,
        places.array_col,
        how,
        Footprints.discs(places.xy_px, diameter_px=section.spot_um / section.mpp)
        if bin_um is None
        else Footprints.squares(places.xy_px, edge_px=places.size_px),
    )
    return targets, places


def _lay_over_image(section: Section, *, step_um: float, hexagonal: bool) -> Places:
    """Lay places over the image of a section without spots."""
    width, height = section.image.width_px, section.image.height_px
    return lay_over(width, height, step_px=step_um / section.mpp, hexagonal=hexagonal)


def to_image(sdata: SpatialData, section: Section, key: str) -> NDArray[np.float64]:
    """Matrix (3, 3) from a shapes element's own coordinates to pixels of the section's image."""
    wanted = section.coordinate_system if section.system_given else None
    return align(sdata, key, section.image_key, wanted=wanted)[1]


def read_targets(sdata: SpatialData, section: Section, key: str, *, on_invalid: str = "raise") -> Targets:
    """Take the places of any shapes element; ``on_invalid="skip"`` leaves out what is no place of the image."""
    import shapely

    if key not in sdata.shapes:
        msg = f"target_key={key!r} is not among the shapes of this SpatialData: {list(sdata.shapes)}."
        raise KeyError(msg)
    if on_invalid not in INVALID:
        msg = (
            f"on_invalid={on_invalid!r}: choose 'raise', or 'skip' to leave out shapes that are no places of the image."
        )
        raise ValueError(msg)
    element = sdata.shapes[key]
    if not element.index.is_unique:
        msg = f"target_key={key!r}: its index has doubles, so that rows cannot be told apart. Reset the index."
        raise ValueError(msg)
    matrix = to_image(sdata, section, key)
    outlines = element.geometry.to_numpy()
    broken = shapely.is_missing(outlines) | shapely.is_empty(outlines) | ~shapely.is_valid(outlines)
    with np.errstate(invalid="ignore"):
        xy_px = apply(matrix, centroids(element))
        outside = ~((xy_px >= 0) & (xy_px <= [section.image.width_px, section.image.height_px])).all(1)
    wrong = broken | outside
    if wrong.any():
        found = {
            "shapes are not valid": broken,
            f"places lie outside the image {section.image_key!r}": outside & ~broken,
        }
        told = " and ".join(f"{int(rows.sum())} of {len(element)} {name}" for name, rows in found.items() if rows.any())
        what = f"target_key={key!r}: {told} (for example {list(element.index[wrong][:3])})"
        if on_invalid == "raise" or wrong.all():
            msg = f"{what}. Remove them (shapely.make_valid mends some), or pass on_invalid='skip' to leave them out."
            raise ValueError(msg)
        logger.warning("%s: leaving them out", what)
        element, xy_px = element[~wrong], xy_px[~wrong]
    near, dist, present = nearest_spots(xy_px, section.xy_px, k=1)
    areas = _footprints(sdata, section, element, matrix, xy_px)
    # a cell or a bin in the middle of a spot is not the spot
    same = (dist[:, 0] * section.mpp <= _SAME_PLACE_PITCH * section.pitch_um) & present[:, 0]
    same &= ~_smaller(section, areas)
    in_tissue, how = _in_tissue(section, xy_px, tissue="auto")
    grid = {c: element[c].to_numpy(np.int64) if c in element.columns else None for c in ("array_row", "array_col")}
    spot_index = np.where(same, near[:, 0], -1)
    return Targets(key, element.index, xy_px, spot_index, in_tissue, grid["array_row"], grid["array_col"], how, areas)


def smaller_than_spot(section: Section, targets: Targets) -> bool:
    """Whether places stand for clearly less than what a spot measured."""
    return len(targets) > 0 and float(np.mean(_smaller(section, targets.footprints))) > 0.5


def _smaller(section: Section, areas: Footprints) -> NDArray[np.bool_]:
    spot_px = np.median(section.footprints.size_px) if section.measured else section.spot_um / section.mpp
    return areas.size_px < 0.9 * spot_px


def _footprints(
    sdata: SpatialData, section: Section, element: GeoDataFrame, matrix: NDArray[np.float64], xy_px: NDArray[np.float64]
) -> Footprints:
    """Areas of circles and polygons in pixels of the image."""
    import shapely

    if not (element.geom_type == "Point").all():
        return Footprints.of_polygons(shapely.transform(element.geometry.to_numpy(), lambda xy: apply(matrix, xy)))
    spot_px = section.spot_um / section.mpp
    # places that were laid between spots are drawn as wide as their step, but stand for what a spot would measure
    if "radius" not in element.columns or "is_spot" in element.columns:
        return Footprints.discs(xy_px, diameter_px=spot_px)
    size_px = 2 * element["radius"].to_numpy(float) * scale_of(matrix, "shapes", section.image_key)
    if not section.measured:
        return Footprints.discs(xy_px, diameter_px=size_px)
    # readers draw spots larger than they are: what is drawn as they are is a spot
    spots = sdata.shapes[section.spots_key]
    drawn_px = _drawn_size(spots) * scale_of(section.to_image, section.spots_key, section.image_key)
    return Footprints.discs(xy_px, diameter_px=np.where(np.abs(size_px / drawn_px - 1) < 0.01, spot_px, size_px))


def shapes_element(
    sdata: SpatialData, section: Section, places: Places, *, square: bool, instances: pd.Index | None = None
) -> GeoDataFrame:
    """Make circles or squares in the spots' own coordinates, with all their transformations."""
    import geopandas as gpd
    import shapely
    from spatialdata.models import ShapesModel
    from spatialdata.transformations import Affine, get_transformation

    back = np.asarray(np.linalg.inv(section.to_image), np.float64)
    # a dict of its own: moving the places later must not move the spots
    measured = section.spots_key if section.measured else section.image_key
    transformations = dict(get_transformation(sdata[measured], get_all=True))
    if not section.measured:  # pixels of the image; shapes have no channels
        xy = ("x", "y")
        transformations = {k: Affine(t.to_affine_matrix(xy, xy), xy, xy) for k, t in transformations.items()}
    if square:
        half = places.size_px / 2
        corner = np.array([[-half, -half], [half, -half], [half, half], [-half, half]])
        ring = apply(back, (places.xy_px[:, None] + corner[None]).reshape(-1, 2)).reshape(-1, 4, 2)
        frame = gpd.GeoDataFrame(geometry=shapely.polygons(ring), index=instances)
    else:
        frame = gpd.GeoDataFrame(geometry=shapely.points(apply(back, places.xy_px)), index=instances)
        frame["radius"] = places.size_px / 2 * scale_of(back, section.image_key, section.spots_key)
    frame["array_row"], frame["array_col"] = places.array_row, places.array_col
    frame["is_spot"] = places.spot_index >= 0
    return ShapesModel.parse(frame, transformations=transformations)


def make_table(adata: AnnData, *, region: str, instances: pd.Index) -> AnnData:
    """Link a table to the shapes element its rows describe."""
    from spatialdata.models import TableModel

    adata.obs[_keys.REGION] = pd.Categorical([region] * adata.n_obs)
    adata.obs[_keys.INSTANCE] = np.asarray(instances)
    return TableModel.parse(adata, region=region, region_key=_keys.REGION, instance_key=_keys.INSTANCE)


def predicted_table(
    section: Section,
    targets: Targets,
    *,
    expression: NDArray[np.float32],
    bars: PredictionIntervals | None,
    var: pd.DataFrame,
    provenance: dict[str, Any],
    layers: dict[str, NDArray[np.float32]] | None = None,
) -> AnnData:
    """Make the table of predicted expression."""
    import anndata as ad

    _, dist, present = nearest_spots(targets.xy_px, section.xy_px, k=1)
    distance_um = np.where(present[:, 0], dist[:, 0] * section.mpp, np.nan)
    # contiguous bins leave no gap: the corner of a bin belongs to it as well
    radius_um = section.spot_um / (np.sqrt(2) if section.contiguous else 2)
    obs = pd.DataFrame(index=pd.Index([f"{targets.key}-{i}" for i in targets.instances], dtype=str))
    if targets.array_row is not None and targets.array_col is not None:
        obs["array_row"], obs["array_col"] = targets.array_row, targets.array_col
    obs["in_tissue"] = targets.in_tissue
    obs["is_spot"] = targets.spot_index >= 0
    obs["in_spot"] = distance_um <= radius_um
    obs["distance_to_spot_um"] = distance_um.astype(np.float32)
    adata = ad.AnnData(X=expression, obs=obs, var=var)
    if bars is not None:
        adata.layers["sd"], adata.layers["lower"], adata.layers["upper"] = bars.around(expression)
    for name, values in (layers or {}).items():
        adata.layers[name] = values
    adata.obsm["spatial"] = targets.xy_px
    adata.uns[_keys.UNS] = provenance
    # scanpy asks here whether, and to what base, values are logarithms; natural is written as no base at all
    adata.uns["log1p"] = {}
    return make_table(adata, region=targets.key, instances=targets.instances)


def embedding_table(
    targets: Targets, *, encoder: str, values: NDArray[np.float32], provenance: dict[str, Any]
) -> AnnData:
    """Make the table that holds the embeddings of some shapes."""
    import anndata as ad

    obs = pd.DataFrame(index=pd.Index([f"{targets.key}-{i}" for i in targets.instances], dtype=str))
    adata = ad.AnnData(obs=obs)
    adata.obsm[_keys.embedding(encoder)] = values
    adata.obsm["spatial"] = targets.xy_px
    adata.uns[_keys.UNS] = provenance
    return make_table(adata, region=targets.key, instances=targets.instances)


def find_embedding(
    sdata: SpatialData,
    *,
    target_key: str,
    encoder: str,
    instances: pd.Index,
    xy_px: NDArray[np.float64],
    provenance: dict[str, Any],
) -> NDArray[np.float32] | None:
    """Embeddings made before of the same places in the same way, in the order of ``instances``; else ``None``."""
    name = _keys.embedding_table(target_key, encoder)
    if name not in sdata.tables or not ours(sdata.tables[name]):
        return None
    table = sdata.tables[name]
    same = {k: _alike(table.uns[_keys.UNS].get(k), v) for k, v in provenance.items()}
    rows = pd.Index(table.obs[_keys.INSTANCE]).get_indexer(instances)
    moved = (rows >= 0).all() and not np.allclose(table.obsm["spatial"][rows], xy_px, atol=1e-3)
    if not all(same.values()) or (rows < 0).any() or moved:
        other = [k for k, v in same.items() if not v] or ["places"]
        logger.info("table %r was made with other %s: embedding again", name, ", ".join(other))
        return None
    return np.asarray(table.obsm[_keys.embedding(encoder)], dtype=np.float32)[rows]


def _same_places(old: GeoDataFrame, new: GeoDataFrame) -> bool:
    """Whether two shapes elements are the same, transformations included."""
    from spatialdata.transformations import get_transformation

    if len(old) != len(new) or set(old.columns) != set(new.columns):
        return False
    return old.equals(new[old.columns]) and get_transformation(old, get_all=True) == get_transformation(
        new, get_all=True
    )


def _alike(a: Any, b: Any) -> bool:
    """Compare what was written into ``uns`` with what came back from disk, where numbers are numpy's."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[k], b[k]) for k in a)
    return np.array_equal(a, b)


def commit(
    sdata: SpatialData,
    *,
    shapes: dict[str, GeoDataFrame] | None = None,
    tables: dict[str, AnnData | None] | None = None,
    dry_run: bool = False,
) -> None:
    """Write everything or, where it would touch what is not ours, nothing; ``dry_run`` only checks."""
    shapes, tables = shapes or {}, tables or {}
    for key in [*shapes, *tables]:
        _keys.check("key_added", key)
    for key in tables:
        if key in sdata.tables and not ours(sdata.tables[key]):
            msg = f"key_added={key!r} is a table that histosge did not write; choose another name, or remove it first."
            raise ValueError(msg)
    for key in shapes:
        others = [n for n, t in sdata.tables.items() if key in _regions(t) and not ours(t)]
        if key in sdata.shapes and (others or "array_row" not in sdata.shapes[key].columns):
            by = f" (annotated by {others})" if others else ""
            msg = f"shapes {key!r} were not laid by histosge{by}; choose another key_added=, or remove them first."
            raise ValueError(msg)
    for kind, keys in (("shapes", shapes), ("tables", tables)):
        for key in keys:
            # SpatialData tells names apart by neither kind nor case
            taken = [(k, name) for k, name, _ in sdata.gen_elements() if name.lower() == key.lower()]
            if any((k, name) != (kind, key) for k, name in taken):
                msg = (
                    f"key_added={key!r} is taken by another element of this SpatialData "
                    f"({', '.join(f'{k}[{name!r}]' for k, name in taken)}); choose another name."
                )
                raise ValueError(msg)
    if dry_run:
        return
    for name, holder in (("shapes", shapes), ("tables", tables)):
        for key, element in holder.items():
            existing = getattr(sdata, name)
            if key in existing and name == "shapes" and _same_places(existing[key], element):
                continue  # tables on these places stay true
            if key in existing:
                logger.warning("replacing sdata.%s[%r] of an earlier run", name, key)
                # tables of ours on the old places describe places that are no more
                stale = [
                    n for n, t in sdata.tables.items() if name == "shapes" and _regions(t) == [key] and n not in tables
                ]
                for old in stale:
                    logger.warning("removing sdata.tables[%r], which describes the replaced places", old)
                    del sdata.tables[old]
                del existing[key]
            existing[key] = element
