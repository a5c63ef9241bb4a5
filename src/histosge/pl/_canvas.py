"""Common parts of maps: the image of a section, the shapes over it, colours, layout.

All coordinates are in pixels of the image's finest scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely

from histosge import _keys
from histosge._geometry import LEGACY_ST, VISIUM, Footprints
from histosge._image import thumbnail
from histosge._section import affine, centroids, lazy_image, match_rows
from histosge.pl._places import fill, of_polygons

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes
    from numpy.typing import NDArray
    from spatialdata import SpatialData

    from histosge._image import UInt8

    Floats = NDArray[np.float64]

_IMAGE_PX = 1500
_EDGE, _TITLE = 0.08, 0.42
"""Inches around the figure, and for two lines of title above a panel."""
BAR = 0.85
"""Inches of a colour bar with its label next to a panel."""
PLAIN = 0.1
_MISSING = (0.83, 0.83, 0.83, 1.0)
_DIAMETER_UM = {technology.name: technology.spot_um for technology in (VISIUM, LEGACY_ST)}
"""Readers draw spots larger than they are."""


@dataclass(frozen=True)
class Canvas:
    """The H&E image of a section, and its elements in pixels of the image."""

    sdata: SpatialData
    image_key: str
    coordinate_system: str
    mpp: float
    small: UInt8
    """(h, w, 3)"""
    factor: int
    """Pixels of the image in one of ``small``"""

    def outlines(self, key: str, instances: Any, *, diameter_um: float | None = None) -> Footprints:
        """Return some shapes of an element, by name; circles may be drawn in another size than the stored one."""
        element = self.sdata.shapes[key]
        missing = ~np.isin(instances, element.index)
        if missing.any():
            msg = (
                f"{missing.sum()} of {len(missing)} rows have no shape in sdata.shapes[{key!r}] (for example "
                f"{list(np.asarray(instances)[missing][:3])}): the table belongs to other shapes. Predict again, or "
                "restore these shapes."
            )
            raise KeyError(msg)
        element = element.loc[instances]
        image = self.sdata.images[self.image_key]
        matrix = affine(
            self.sdata.shapes[key], image, self.coordinate_system, source_key=key, target_key=self.image_key
        )
        if (shapely.get_type_id(element.geometry.to_numpy()) == shapely.GeometryType.POINT).all():
            xy = centroids(element) @ matrix[:2, :2].T + matrix[:2, 2]
            scale = np.sqrt(abs(np.linalg.det(matrix[:2, :2])))
            stored = 2 * scale * element["radius"].to_numpy(float)
            return Footprints.discs(xy, diameter_px=stored if diameter_um is None else diameter_um / self.mpp)
        return of_polygons(element.geometry.to_numpy(), matrix)

    def tissue(self, ax: Axes) -> None:
        """Draw the image."""
        ax.imshow(
            self.small, extent=(0, self.small.shape[1] * self.factor, self.small.shape[0] * self.factor, 0), zorder=-1
        )

    def frame(self, axes: NDArray[Any], shown: Sequence[Footprints]) -> None:
        """Show the same part of the section in all axes, without ticks; a scale bar in the first."""
        from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar

        x0, y0, x1, y1 = view(shown)
        for ax in axes.flat:
            ax.set(xlim=(x0, x1), ylim=(y1, y0), aspect="equal", xticks=[], yticks=[], xlabel="", ylabel="")
        third_um = (x1 - x0) * self.mpp / 3
        length_um = max(step * 10.0**k for k in range(6) for step in (1, 2, 5) if step * 10.0**k <= max(third_um, 1))
        text = f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} µm"
        bar = AnchoredSizeBar(
            axes.flat[0].transData, length_um / self.mpp, text, "lower left", pad=0.25, sep=2, borderpad=0.3,
            size_vertical=(y1 - y0) / 120, fontproperties={"size": 7},
        )  # fmt: skip
        bar.patch.set(alpha=0.75, linewidth=0)
        axes.flat[0].add_artist(bar)


def open_canvas(sdata: SpatialData, table: AnnData, key: str) -> Canvas:
    """Find the image of a predicted table or a table of embeddings, and make a small copy of it."""
    from spatialdata.transformations import get_transformation

    made, shapes = table.uns[_keys.UNS], region(table)
    for kind, holder, name in (("images", sdata.images, str(made["image"])), ("shapes", sdata.shapes, shapes)):
        if name not in holder:
            msg = (
                f"sdata.{kind} has no {name!r}, which sdata.tables[{key!r}] needs; there are {list(holder)}. If it is "
                f"from a store, put sdata.shapes[{shapes!r}] and sdata.tables[{key!r}] into that of the section."
            )
            raise KeyError(msg)
    image = str(made["image"])
    systems = [set(get_transformation(e, get_all=True)) for e in (sdata.images[image], sdata.shapes[shapes])]
    common = sorted(systems[0] & systems[1])
    if not common:
        msg = (
            f"image {image!r} and shapes {shapes!r} share no coordinate system: {sorted(systems[0])}, "
            f"{sorted(systems[1])}. Align them with `spatialdata.transformations.set_transformation`."
        )
        raise KeyError(msg)
    system = str(made.get("coordinate_system", common[0]))
    small, factor = thumbnail(lazy_image(sdata.images[image], image), max_px=_IMAGE_PX)
    return Canvas(sdata, image, system if system in common else common[0], float(made["mpp"]), small, factor)


def measured_spots(canvas: Canvas, made: dict[str, Any]) -> tuple[AnnData, NDArray[np.int64], Footprints]:
    """Return the measured table, the rows that are spots of the section, and their outlines."""
    spots, name = str(made["spots"]), str(made["table"])
    table = canvas.sdata.tables[name]
    rows, instances, _ = match_rows(table, canvas.sdata.shapes[spots], spots, name)
    outlines = canvas.outlines(spots, instances, diameter_um=_DIAMETER_UM.get(str(made.get("technology"))))
    return table, rows, outlines


def predicted_table(sdata: SpatialData, key: str) -> AnnData:
    """Return a predicted table."""
    have = [n for n, t in sdata.tables.items() if "head" in t.uns.get(_keys.UNS, {})]
    if key not in have:
        msg = f"key={key!r} is not a table that histosge.tl.predict wrote; there are {have}."
        raise KeyError(msg)
    return sdata.tables[key]


def region(table: AnnData) -> str:
    """Name of the shapes that a table annotates."""
    return str(np.asarray(table.obs[_keys.REGION])[0])


def view(shown: Sequence[Footprints]) -> Floats:
    """Return x0, y0, x1, y1 of all shapes that are shown, with a margin."""
    bounds = np.array([targets.extent for targets in shown])
    low, high = bounds[:, :2].min(0), bounds[:, 2:].max(0)
    margin = 0.015 * (high - low).max()
    return np.concatenate([low - margin, high + margin])


def to_show(targets: Footprints, others: Sequence[Footprints]) -> list[Footprints]:
    """Return all shapes, or the targets alone where they cover a small part, such as the cells of a region."""
    own, whole = (np.diff(view(some).reshape(2, 2), axis=0) for some in ([targets], [targets, *others]))
    return [targets] if (own < whole / 2).any() else [targets, *others]


def panel_inches(shown: Sequence[Footprints], longest: float) -> tuple[float, float]:
    """Width and height of a panel with the section's proportions, wide enough for its title."""
    x0, y0, x1, y1 = view(shown)
    width, height = longest * np.array([x1 - x0, y1 - y0]) / max(x1 - x0, y1 - y0)
    return max(float(width), 1.6), max(float(height), 0.8)


def lay_panels(n_rows: int, *, panel: tuple[float, float], gaps: Sequence[float]) -> NDArray[Any]:
    """Lay out axes (n_rows, columns) of one size, with space in inches right of each column (colour bar, legend).

    No layout engine: sizes are known, and its solver takes longer than the drawing, and bars may still overlap.
    """
    import matplotlib.pyplot as plt

    width, height = panel
    left = _EDGE + np.cumsum([0.0, *(width + gap for gap in gaps)])
    total = np.array([left[-1], _EDGE + n_rows * (height + _TITLE)])
    figure = plt.figure(figsize=tuple(total))
    axes = np.empty((n_rows, len(gaps)), object)
    for i, j in np.ndindex(axes.shape):
        corner = np.array([left[j], total[1] - (i + 1) * (height + _TITLE)])
        shared = axes[0, 0]
        axes[i, j] = figure.add_axes((*(corner / total), *(np.array(panel) / total)), sharex=shared, sharey=shared)
    return axes


def write_in(ax: Axes, text: str) -> None:
    """Write in the middle of a panel that has nothing to draw."""
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", fontsize=9)


def draw_numbers(
    ax: Axes, targets: Footprints, values: Any, *, cmap: str, label: str, absent: str = "no values"
) -> None:
    """Colour shapes by numbers, from the 1st to the 99th percentile, with a colour bar; write ``absent`` without any."""
    values = np.asarray(values, float)
    if not np.isfinite(values).any():
        write_in(ax, absent)
        return
    drawn = fill(ax, targets, numbers=values, cmap=cmap, clim=_limits(values))
    inch = 1 / _inches(ax)[0]  # in widths of the panel
    bar = ax.figure.colorbar(drawn, cax=ax.inset_axes((1 + 0.06 * inch, 0.0, 0.12 * inch, 1.0)))
    bar.ax.tick_params(labelsize=7, length=2)
    bar.set_label(label, fontsize=8)
    bar.outline.set_linewidth(0.5)


def _limits(values: Floats) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    if len(known) == 0:
        return 0.0, 1.0
    low, high = np.percentile(known, [1, 99])
    if low == high:  # rare genes are 0 nearly everywhere
        low, high = known.min(), known.max()
    return float(low), float(high if high > low else low + 1)


def draw_categories(ax: Axes, targets: Footprints, values: pd.Categorical, colours: dict[str, Any]) -> None:
    """Colour shapes by category, with a legend."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_rgba_array

    names = list(map(str, values.categories))
    paint = np.vstack([to_rgba_array([colours[name] for name in names]), _MISSING])  # the last is of code -1
    fill(ax, targets, colours=paint[values.codes])
    seen = [names[i] for i in np.unique(values.codes) if i >= 0]
    marks = [(colours[name], name) for name in seen] + [(_MISSING, "missing")] * bool((values.codes < 0).any())
    handles = [plt.Line2D([], [], marker="s", ls="", markersize=6, color=c, label=n) for c, n in marks]
    n_cols, _ = legend_shape([name for _, name in marks], _inches(ax)[1])
    ax.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.02), ncols=n_cols, frameon=False,
        fontsize=8, handletextpad=0.1, labelspacing=0.3, columnspacing=0.5, borderpad=0.2,
    )  # fmt: skip


def legend_shape(names: Sequence[str], height: float) -> tuple[int, float]:
    """Return columns and width in inches of a legend that is no taller than its panel."""
    n_cols = -(-len(names) // max(3, int(height / 0.17)))
    return n_cols, n_cols * (0.42 + 0.072 * max(map(len, names), default=0))


def _inches(ax: Axes) -> NDArray[np.float64]:
    """Width and height of a panel."""
    return np.array(ax.get_window_extent().size) / ax.figure.dpi


def categories(values: Any) -> pd.Categorical | None:
    """Return a column as categories; ``None`` for numbers."""
    import pandas as pd

    if isinstance(getattr(values, "dtype", None), pd.CategoricalDtype):
        return pd.Categorical(values)
    plain = np.asarray(values)
    if plain.dtype.kind in "fiu":
        return None
    texts = pd.Series(plain).where(pd.notna(plain)).map(str, na_action="ignore")
    names: list[Any] = sorted(set(texts.dropna()), key=lambda text: (len(text), text))
    return pd.Categorical(texts, categories=names)


def colours_of(table: AnnData, column: str, names: Sequence[str]) -> dict[str, Any]:
    """Return the colour of each category: stored by scanpy, else scanpy's choice. Nothing is stored."""
    stored = list(map(str, np.atleast_1d(table.uns.get(f"{column}_colors", []))))
    if len(stored) >= len(names) > 0:
        return dict(zip(names, stored, strict=False))
    from scanpy.plotting import palettes

    chosen = next((p for p in (palettes.default_20, palettes.default_28) if len(names) <= len(p)), palettes.default_102)
    return {name: chosen[i % len(chosen)] for i, name in enumerate(names)}
