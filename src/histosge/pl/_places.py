"""Draw shapes at their true size.

Few shapes are drawn one by one, as vectors. For many shapes a raster is computed once, with the number of the shape
under each pixel, and used in every panel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import shapely

from histosge._geometry import Footprints

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

MANY = 20_000
"""More shapes are drawn as a raster: as vectors, a million take seconds a panel, and as many objects in a PDF."""
_RASTER_PX = 800
_MOST_PX = 4000
_RASTERS: WeakKeyDictionary[Footprints, NDArray[np.int32]] = WeakKeyDictionary()
"""Rasters of shapes that are drawn in several panels"""


def of_polygons(stored: NDArray[Any], matrix: Floats) -> Footprints:
    """Transform polygons by a matrix (3, 3). Equal squares are recognised: they are drawn faster, without geometry."""
    if (shapely.get_type_id(stored) == shapely.GeometryType.POLYGON).all() and (
        shapely.get_num_coordinates(stored) == 5
    ).all():
        corners = (shapely.get_coordinates(stored) @ matrix[:2, :2].T + matrix[:2, 2]).reshape(-1, 5, 2)
        edges = np.diff(corners, axis=1)  # (n, 4, 2)
        one, next_one = edges[0, 0], edges[0, 1]
        size = float(np.hypot(*one))
        square = abs(np.hypot(*next_one) - size) < 1e-3 * size and abs(one @ next_one) < 1e-3 * size**2
        if square and np.allclose(edges, edges[:1], atol=1e-3 * size):
            return Footprints.squares(corners[:, :4].mean(1), edge_px=size, turn=float(np.arctan2(one[1], one[0])))
    return Footprints.of_polygons(shapely.transform(stored, lambda xy: xy @ matrix[:2, :2].T + matrix[:2, 2]))


def fill(ax: Axes, shapes: Footprints, *, numbers: Any = None, colours: Any = None, **style: Any) -> ScalarMappable:
    """Draw all shapes: coloured by (n,) numbers, with ``cmap`` and ``clim``, or in (n, 4) colours."""
    drawn: Any
    if len(shapes) > MANY:
        drawn = _draw_raster(ax, shapes, numbers, colours)
    elif shapes.kind == "disc":
        drawn = _draw_discs(ax, shapes, numbers, colours)
    else:
        drawn = _draw_polygons(ax, shapes.as_polygons(), numbers, colours)
    drawn.set(**style)
    return drawn


def _draw_raster(ax: Axes, shapes: Footprints, numbers: Any, colours: Any) -> Any:
    rows = raster(shapes)
    if numbers is not None:
        values = np.ma.masked_invalid(np.append(np.asarray(numbers, np.float32), np.nan)[rows])
    else:
        paint = np.rint(255 * np.asarray(colours)).astype(np.uint8)
        values = np.append(paint, np.zeros((1, 4), np.uint8), axis=0)[rows]
    x0, y0, x1, y1 = shapes.extent
    return ax.imshow(values, extent=(x0, x1, y1, y0))


def _draw_discs(ax: Axes, shapes: Footprints, numbers: Any, colours: Any) -> Any:
    from matplotlib.collections import EllipseCollection

    where: dict[str, Any] = {"offsets": shapes.xy_px, "offset_transform": ax.transData}
    size, angle = shapes.size_px, np.zeros(len(shapes))
    drawn = EllipseCollection(size, size, angle, units="xy", linewidths=0, **where)
    ax.add_collection(drawn)
    if numbers is None:
        drawn.set_facecolor(list(map(tuple, colours)))
    else:
        drawn.set_array(np.asarray(numbers, float))
    return drawn


def _draw_polygons(ax: Axes, shapes: Footprints, numbers: Any, colours: Any) -> Any:
    import geopandas as gpd

    how: dict[str, Any] = {"color": list(map(tuple, colours))} if numbers is None else {}
    values = np.zeros(len(shapes)) if numbers is None else numbers
    frame = gpd.GeoDataFrame({"value": values}, geometry=shapes.polygons)
    frame.plot("value" if numbers is not None else None, ax=ax, aspect=None, linewidth=0, **how)
    return ax.collections[-1]


def raster(shapes: Footprints) -> NDArray[np.int32]:
    """Return (h, w) the number of the shape under each pixel of ``shapes.extent``, -1 for none."""
    if shapes not in _RASTERS:
        _RASTERS[shapes] = _rasterise(shapes)
    return _RASTERS[shapes]


def _rasterise(shapes: Footprints) -> NDArray[np.int32]:
    low, span = shapes.extent[:2], shapes.extent[2:] - shapes.extent[:2]
    longest, size = float(span.max()), float(np.median(shapes.size_px))
    # whole pixels fit squares along the axes; rotated squares need more pixels
    least = 1 if shapes.kind == "square" and abs(np.sin(2 * shapes.turn)) < 1e-6 else 2
    step = max(size / max(least, int(_RASTER_PX * size / longest)), longest / _MOST_PX)
    width, height = np.ceil(span / step - 1e-6).astype(int).tolist()
    if shapes.kind == "polygon":
        return _burn(shapes, width, height)
    from scipy.spatial import cKDTree

    x, y = (low[i] + span[i] / n * (np.arange(n) + 0.5) for i, n in ((0, width), (1, height)))
    pixels = np.stack(np.broadcast_arrays(x[None], y[:, None]), axis=-1).reshape(-1, 2)
    turned, norm = np.eye(2), 2.0
    if shapes.kind == "square":  # the nearest centre, by the larger of two distances along the edges
        c, s = np.cos(shapes.turn), np.sin(shapes.turn)
        turned, norm = np.array([[c, -s], [s, c]]), np.inf
    tree = cKDTree(shapes.xy_px @ turned, balanced_tree=False, compact_nodes=False)
    reach = shapes.size_px.max() / 2 * (1 + 1e-6)
    distance, found = tree.query(pixels @ turned, p=norm, distance_upper_bound=reach)
    inside = distance <= np.append(shapes.size_px, 0)[found] / 2 * (1 + 1e-6)
    return np.where(inside, found, -1).astype(np.int32).reshape(height, width)


def _burn(shapes: Footprints, width: int, height: int) -> NDArray[np.int32]:
    """Rasterise many polygons, the last on top."""
    import datashader as ds
    import geopandas as gpd

    x0, y0, x1, y1 = shapes.extent
    canvas = ds.Canvas(width, height, x_range=(x0, x1), y_range=(y0, y1))
    frame = gpd.GeoDataFrame({"row": np.arange(len(shapes))}, geometry=shapes.polygons)
    rows = canvas.polygons(frame, "geometry", agg=ds.max("row")).to_numpy()
    return np.nan_to_num(rows, nan=-1).astype(np.int32)
