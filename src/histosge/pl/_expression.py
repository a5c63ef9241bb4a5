"""Draw the image, what was measured and what was predicted, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from histosge import _keys
from histosge._image import thumbnail
from histosge._section import Section, centroids, read_section
from histosge._section import to_image as places_in_image

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes
    from numpy.typing import NDArray
    from spatialdata import SpatialData


def expression(
    sdata: SpatialData,
    genes: str | Sequence[str],
    *,
    key: str = "histosge",
    obs: str | None = None,
    layer: str | None = None,
    cmap: str = "magma",
    panel_size: float = 4.0,
) -> NDArray[Any]:
    """Draw the H&E image, measured and predicted expression side by side.

    Parameters
    ----------
    sdata
        Section with a table that :func:`histosge.tl.predict` wrote.
    genes
        One gene or several, a row of panels each.
    key
        Name of the predicted table.
    obs
        Column of the predicted table's ``obs`` to draw as well, for example ``"leiden"``.
    layer
        Layer of the measured table that holds the counts. ``None`` takes the one that was predicted from.
    cmap
        Colour map of the expression.
    panel_size
        Edge of a panel in inches.

    Returns
    -------
    Axes, (genes, panels): H&E, measured, predicted and, with ``obs``, that column. Measured and predicted have a
    colour scale each, from their 1st to their 99th percentile: a prediction varies less than a noisy measurement.

    Raises
    ------
    KeyError
        Where there is no such table, gene or column.

    Examples
    --------
    >>> import histosge as sge
    >>> sdata = sge.datasets.synthetic()
    >>> sge.tl.predict(sdata, encoder="stain-texture", head="ridge", genes=20, n_folds=2)
    >>> axes = sge.pl.expression(sdata, sdata["histosge"].var_names[0])
    >>> axes.shape
    (1, 3)
    """
    import matplotlib.pyplot as plt

    if key not in sdata.tables or "head" not in sdata.tables[key].uns.get(_keys.UNS, {}):
        have = [n for n, t in sdata.tables.items() if "head" in t.uns.get(_keys.UNS, {})]
        msg = f"key={key!r} is not a table that histosge.tl.predict wrote; there are {have}."
        raise KeyError(msg)
    table = sdata.tables[key]
    genes = [genes] if isinstance(genes, str) else list(genes)
    missing = [g for g in genes if g not in table.var_names]
    if missing:
        msg = (
            f"genes {missing} were not predicted. Predict them with genes=[...]; here are {list(table.var_names[:5])} …"
        )
        raise KeyError(msg)
    if obs is not None and obs not in table.obs:
        msg = f"obs={obs!r} is not a column of sdata.tables[{key!r}].obs: {list(table.obs.columns)}."
        raise KeyError(msg)
    made = table.uns[_keys.UNS]
    section = read_section(
        sdata,
        image_key=made["image"],
        spots_key=made["spots"],
        table_key=made["table"],
        coordinate_system=made["coordinate_system"],
        layer=layer if layer is not None else made.get("layer"),
        mpp=float(made["mpp"]),
        report=False,
    )
    small, factor = thumbnail(section.image, max_px=1500)
    region = table.obs[_keys.REGION].iloc[0]
    shapes = _outlines(sdata, section, table, region)
    spots = section.xy_px, np.full(len(section.xy_px), section.spot_um / section.mpp)

    n_panels = 3 + (obs is not None)
    _, axes = plt.subplots(
        len(genes),
        n_panels,
        figsize=(panel_size * n_panels * 1.12, panel_size * len(genes)),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for row, gene in zip(axes, genes, strict=True):
        measured = section.dense([gene])[:, 0] if gene in section.genes else np.zeros(len(section.xy_px))
        predicted = _column(table, gene)
        pcc = table.var.loc[gene, "held_out_pcc"]
        row[0].imshow(small, extent=(0, small.shape[1] * factor, small.shape[0] * factor, 0))
        row[0].set_title("H&E")
        _draw(row[1], spots, measured, cmap=cmap, title=f"{gene}, measured")
        _draw(row[2], shapes, predicted, cmap=cmap, title=f"{gene}, predicted (held-out PCC {pcc:.2f})")
        if obs is not None:
            _draw(row[3], shapes, table.obs[obs].to_numpy(), cmap=cmap, title=obs, label=obs)
        low, high = section.xy_px.min(0), section.xy_px.max(0)
        margin = section.pitch_um / section.mpp
        for ax in row:
            ax.set(xlim=(low[0] - margin, high[0] + margin), ylim=(high[1] + margin, low[1] - margin), aspect="equal")
            ax.set(xticks=[], yticks=[])
        _scale_bar(row[0], section)
    return axes


def _column(table: AnnData, gene: str) -> NDArray[np.float32]:
    values = table[:, gene].X
    return np.asarray(values.todense() if hasattr(values, "todense") else values, dtype=np.float32).ravel()


def _outlines(
    sdata: SpatialData, section: Section, table: AnnData, region: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where the predicted places lie, and how wide to draw them, in pixels of the image."""
    element = sdata.shapes[region].loc[table.obs[_keys.INSTANCE].to_numpy()]
    matrix = places_in_image(sdata, section, region)
    scale = float(np.sqrt(abs(np.linalg.det(matrix[:2, :2]))))
    width = (
        2 * element["radius"].to_numpy() if "radius" in element.columns else np.sqrt(element.geometry.area.to_numpy())
    )
    xy = centroids(element) @ matrix[:2, :2].T + matrix[:2, 2]
    return xy, width * scale


def _draw(
    ax: Axes,
    shapes: tuple[NDArray[np.float64], NDArray[np.float64]],
    values: Any,
    *,
    cmap: str,
    title: str,
    label: str = "log1p expression",
) -> None:
    """Draw discs in data coordinates, coloured by numbers or by category."""
    import matplotlib.pyplot as plt
    from matplotlib.collections import EllipseCollection

    xy, width = shapes
    discs = EllipseCollection(
        width, width, np.zeros(len(xy)), units="xy", offsets=xy, offset_transform=ax.transData, linewidths=0
    )
    values = np.asarray(values)
    if values.dtype.kind in "fiu":
        discs.set(array=values.astype(float), cmap=cmap, clim=tuple(np.percentile(values, [1, 99])))
        ax.add_collection(discs)
        ax.figure.colorbar(discs, ax=ax, shrink=0.7, label=label)
    else:
        names = sorted(set(values.astype(str)), key=lambda v: (len(v), v))
        colours = plt.get_cmap("tab20")(np.arange(len(names)) % 20)
        discs.set_facecolor(list(map(tuple, colours[[names.index(v) for v in values.astype(str)]])))
        ax.add_collection(discs)
        handles = [plt.Line2D([], [], marker="o", ls="", color=c, label=n) for n, c in zip(names, colours, strict=True)]
        ax.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(1, 1),
            frameon=False,
            handletextpad=0.1,
            # a legend taller than its panel would push all panels together
            ncols=-(-len(names) // 12),
            fontsize=8,
            columnspacing=0.5,
        )
    ax.set_title(title)
    ax.set_facecolor("white")


def _scale_bar(ax: Axes, section: Section) -> None:
    """Draw a bar of 500 µm, or of 1 mm on large sections."""
    wide = np.ptp(section.xy_um[:, 0]) > 4000
    length_um = 1000 if wide else 500
    x, y = ax.get_xlim()[0], ax.get_ylim()[0]
    step = 0.4 * section.pitch_um / section.mpp
    ax.plot([x + step, x + step + length_um / section.mpp], [y - step] * 2, color="black", lw=3, solid_capstyle="butt")
    ax.text(x + step, y - 1.5 * step, "1 mm" if wide else "500 µm", va="bottom", ha="left", fontsize=8)
