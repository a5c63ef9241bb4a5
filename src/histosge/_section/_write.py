"""Arrays → elements and tables of ``SpatialData``. All are made and checked before the first is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from histosge import _keys
from histosge._geometry import nearest_spots
from histosge._section._coordinates import apply, scale_of
from histosge._section._intervals import write_intervals
from histosge._section._tables import ours, regions
from histosge._settings import logger

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame
    from numpy.typing import NDArray
    from spatialdata import SpatialData

    from histosge._geometry import Targets
    from histosge._section._section import Section
    from histosge._statistics import PredictionIntervals


def shapes_element(section: Section, targets: Targets) -> GeoDataFrame:
    """Make circles or squares in the spots' own coordinates, with all their transformations."""
    import geopandas as gpd
    import shapely
    from spatialdata.models import ShapesModel

    back = np.asarray(np.linalg.inv(section.to_image), np.float64)
    if targets.are_bins:
        half = targets.footprints.size_px[:, None, None] / 2
        corner = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
        ring = apply(back, (targets.xy_px[:, None] + half * corner[None]).reshape(-1, 2)).reshape(-1, 4, 2)
        frame = gpd.GeoDataFrame(geometry=shapely.polygons(ring), index=targets.instances)
    else:
        frame = gpd.GeoDataFrame(geometry=shapely.points(apply(back, targets.xy_px)), index=targets.instances)
        frame["radius"] = float(targets.step_px or 0) / 2 * scale_of(back, section.image_key, section.spots_key)
    frame["array_row"], frame["array_col"] = targets.array_row, targets.array_col
    frame["is_spot"] = targets.spot_index >= 0
    # a copy of the dict: moving the targets later must not move the spots
    return ShapesModel.parse(frame, transformations=dict(section.transformations))


def make_table(adata: AnnData, *, region: str, instances: NDArray[Any]) -> AnnData:
    """Link a table to the shapes element that its rows describe."""
    from spatialdata.models import TableModel

    adata.obs[_keys.REGION] = pd.Categorical([region] * adata.n_obs)
    adata.obs[_keys.INSTANCE] = np.asarray(instances)
    return TableModel.parse(adata, region=region, region_key=_keys.REGION, instance_key=_keys.INSTANCE)


def predicted_table(
    section: Section,
    targets: Targets,
    *,
    matrices: dict[str, NDArray[np.float32]],
    intervals: PredictionIntervals | None,
    var: pd.DataFrame,
    provenance: dict[str, Any],
) -> AnnData:
    """Make the table of predicted expression; ``matrices`` are ``X`` and layers by name, or none yet."""
    import anndata as ad

    _, dist, present = nearest_spots(targets.xy_px, section.xy_px, k=1)
    distance_um = np.where(present[:, 0], dist[:, 0] * section.mpp, np.nan)
    # contiguous bins have no gaps: up to its corner a bin is measured
    radius_um = section.spot_um / (np.sqrt(2) if section.contiguous else 2)
    obs = pd.DataFrame(index=pd.Index([f"{targets.key}-{i}" for i in targets.instances], dtype=str))
    if targets.array_row is not None and targets.array_col is not None:
        obs["array_row"], obs["array_col"] = targets.array_row, targets.array_col
    obs["in_tissue"] = True if targets.in_tissue is None else targets.in_tissue
    obs["is_spot"] = targets.spot_index >= 0
    obs["in_spot"] = distance_um <= radius_um
    obs["distance_to_spot_um"] = distance_um.astype(np.float32)
    layers = {name: values for name, values in matrices.items() if name != "X"}
    adata = ad.AnnData(X=matrices.get("X"), layers=layers, obs=obs, var=var)
    adata.obsm["spatial"] = targets.xy_px
    adata.uns[_keys.UNS] = provenance
    if intervals is not None:
        write_intervals(adata, intervals)
    # scanpy reads here that values are logarithms; without a base they are natural
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
    section: Section, targets: Targets, *, encoder: str, provenance: dict[str, Any]
) -> NDArray[np.float32] | None:
    """Take the embeddings of these targets from ``sdata`` if they were made with the same settings; else ``None``."""
    name = _keys.embedding_table(targets.key, encoder)
    table = section.written.get(name)
    if table is None:
        return None
    same = {k: _equal(table.uns[_keys.UNS].get(k), v) for k, v in provenance.items()}
    rows = pd.Index(table.obs[_keys.INSTANCE]).get_indexer(pd.Index(targets.instances))
    moved = (rows >= 0).all() and not np.allclose(table.obsm["spatial"][rows], targets.xy_px, atol=1e-3)
    if not all(same.values()) or (rows < 0).any() or moved:
        other = [k for k, v in same.items() if not v] or ["targets"]
        logger.info("table %r was made with other %s: embedding again", name, ", ".join(other))
        return None
    return np.asarray(table.obsm[_keys.embedding(encoder)], dtype=np.float32)[rows]


def _same_shapes(old: GeoDataFrame, new: GeoDataFrame) -> bool:
    """Whether two shapes elements are the same, transformations included."""
    from spatialdata.transformations import get_transformation

    if len(old) != len(new) or set(old.columns) != set(new.columns):
        return False
    return old.equals(new[old.columns]) and get_transformation(old, get_all=True) == get_transformation(
        new, get_all=True
    )


def _equal(a: Any, b: Any) -> bool:
    """Compare values of ``uns``; read from disk, numbers are numpy's."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return np.array_equal(a, b)


def commit(
    sdata: SpatialData,
    *,
    shapes: dict[str, GeoDataFrame] | None = None,
    tables: dict[str, AnnData | None] | None = None,
    dry_run: bool = False,
) -> None:
    """Write all elements; where one would replace what is not ours, raise and write none. ``dry_run`` only checks."""
    shapes, tables = shapes or {}, tables or {}
    for key in [*shapes, *tables]:
        _keys.check("key_added", key)
    for key in tables:
        if key in sdata.tables and not ours(sdata.tables[key]):
            msg = f"key_added={key!r} is a table that histosge did not write; choose another name, or remove it first."
            raise ValueError(msg)
    for key in shapes:
        others = [n for n, t in sdata.tables.items() if key in regions(t) and not ours(t)]
        if key in sdata.shapes and (others or "array_row" not in sdata.shapes[key].columns):
            by = f" (annotated by {others})" if others else ""
            msg = f"shapes {key!r} were not laid by histosge{by}; choose another key_added=, or remove them first."
            raise ValueError(msg)
    for kind, keys in (("shapes", shapes), ("tables", tables)):
        for key in keys:
            # for SpatialData, names of elements must differ whatever their kind or case
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
            if key in existing and name == "shapes" and _same_shapes(existing[key], element):
                continue  # tables on these shapes stay valid
            if key in existing:
                logger.warning("replacing sdata.%s[%r] of an earlier run", name, key)
                # our tables on the old shapes describe targets that no longer exist
                stale = [
                    n for n, t in sdata.tables.items() if name == "shapes" and regions(t) == [key] and n not in tables
                ]
                for old in stale:
                    logger.warning("removing sdata.tables[%r], which describes the replaced shapes", old)
                    del sdata.tables[old]
                del existing[key]
            existing[key] = element
