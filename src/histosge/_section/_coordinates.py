"""Where elements of a ``SpatialData`` lie on an image: coordinate systems, matrices, centres and sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from histosge._geometry import nearest_spots, similarity_scale

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from numpy.typing import NDArray
    from spatialdata import SpatialData

_SAME_PLACE_PITCH = 0.01
"""Largest difference between coordinate systems, in pitches, that counts as the same alignment."""


def align(
    sdata: SpatialData, shapes_key: str, image_key: str, *, wanted: str | None
) -> tuple[str, NDArray[np.float64]]:
    """Find the coordinate system that aligns shapes with an image, and the matrix (3, 3) from the shapes' coordinates.

    Where several hold both, they must agree, or the caller says which is ``wanted``.
    """
    from spatialdata.transformations import get_transformation

    shapes, image = sdata.shapes[shapes_key], sdata.images[image_key]
    in_image, in_shapes = (set(get_transformation(e, get_all=True)) for e in (image, shapes))
    common = sorted(in_image & in_shapes)
    if wanted is not None and wanted not in common:
        msg = (
            f"coordinate_system={wanted!r} does not hold both the image {image_key!r} ({sorted(in_image)}) "
            f"and the shapes {shapes_key!r} ({sorted(in_shapes)}). Choose one of {common}."
        )
        raise ValueError(msg)
    if not common:
        msg = (
            f"image {image_key!r} ({sorted(in_image)}) and shapes {shapes_key!r} ({sorted(in_shapes)}) share no "
            "coordinate system. Align them with `spatialdata.transformations.set_transformation`."
        )
        raise ValueError(msg)
    system = common[0] if wanted is None else wanted
    if wanted is None and len(common) > 1:
        _check_agreement(shapes, image, common, shapes_key=shapes_key, image_key=image_key)
    return system, affine(shapes, image, system, source_key=shapes_key, target_key=image_key)


def _check_agreement(shapes: GeoDataFrame, image: Any, systems: list[str], *, shapes_key: str, image_key: str) -> None:
    """Refuse coordinate systems that align the shapes differently with the image."""
    xy = centroids(shapes)
    xy = xy[np.isfinite(xy).all(axis=1)]
    if len(xy) < 2:
        return
    matrices = {system: _matrix(shapes, image, system) for system in systems}
    first = apply(matrices[systems[0]], xy)
    some = np.arange(0, len(first), max(1, len(first) // 1000))
    pitch_px = float(np.median(nearest_spots(first[some], first, k=1, exclude=some)[1]))
    # the difference of two systems is affine in the position: largest at a corner
    corners = np.array([[x, y] for x in (xy[:, 0].min(), xy[:, 0].max()) for y in (xy[:, 1].min(), xy[:, 1].max())])
    groups: list[list[str]] = []
    for system in systems:
        for group in groups:
            off = np.hypot(*(apply(matrices[system], corners) - apply(matrices[group[0]], corners)).T).max()
            if off <= _SAME_PLACE_PITCH * pitch_px:
                group.append(system)
                break
        else:
            groups.append([system])
    if len(groups) > 1:
        off = np.hypot(*(apply(matrices[groups[1][0]], corners) - apply(matrices[groups[0][0]], corners)).T).max()
        msg = (
            f"coordinate systems align {shapes_key!r} differently with the image {image_key!r}: {groups[0][0]!r} and "
            f"{groups[1][0]!r} differ by up to {off:.4g} px ({off / pitch_px:.3g} times the distance of neighbours). "
            f"Say which aligns them: coordinate_system= one of {[g[0] for g in groups]}."
        )
        raise ValueError(msg)


def _matrix(source: Any, target: Any, system: str) -> NDArray[np.float64]:
    from spatialdata.transformations import get_transformation

    source_matrix, target_matrix = (
        np.asarray(get_transformation(e, to_coordinate_system=system).to_affine_matrix(("x", "y"), ("x", "y")))
        for e in (source, target)
    )
    return np.linalg.solve(target_matrix, source_matrix)


def affine(source: Any, target: Any, system: str, *, source_key: str, target_key: str) -> NDArray[np.float64]:
    """Matrix from an element's own coordinates to another's."""
    matrix = _matrix(source, target, system)
    scale_of(matrix, source_key, target_key)
    return matrix


def scale_of(matrix: NDArray[np.float64], source_key: str, target_key: str) -> float:
    scale = similarity_scale(matrix)
    if scale is None:
        stretch = np.linalg.svd(matrix[:2, :2], compute_uv=False)
        msg = (
            f"the transformation from {source_key!r} to the image {target_key!r} stretches or shears "
            f"(scales {stretch[0]:.4g} and {stretch[1]:.4g}), so that no single µm per pixel holds. "
            "Use one that only scales, turns and shifts."
        )
        raise ValueError(msg)
    return scale


def apply(matrix: NDArray[np.float64], xy: NDArray[np.float64]) -> NDArray[np.float64]:
    """Apply a (3, 3) affine matrix to (n, 2) positions."""
    return xy @ matrix[:2, :2].T + matrix[:2, 2]


def centroids(element: GeoDataFrame) -> NDArray[np.float64]:
    """Centres of circles or polygons, in the element's own coordinates: (n, 2)."""
    points = element.geometry if (element.geom_type == "Point").all() else element.geometry.centroid
    return np.column_stack([points.x.to_numpy(), points.y.to_numpy()]).astype(float)


def drawn_size(element: GeoDataFrame) -> float:
    """Drawn diameter of a circle, or edge of a square of the same area, in the element's own coordinates."""
    if "radius" in element.columns and (element.geom_type == "Point").all():
        return float(2 * np.median(element["radius"]))
    return float(np.sqrt(np.median(element.geometry.area)))
