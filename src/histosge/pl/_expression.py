"""Draw the image, measured and predicted expression, and the width of prediction intervals, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from histosge import _keys
from histosge._section import NEARLY_EMPTY, interval_layers, intervals_of, open_layer, sample, select
from histosge._settings import settings
from histosge._statistics import LEVEL
from histosge.pl._canvas import (
    BAR,
    PLAIN,
    Canvas,
    categories,
    colours_of,
    draw_categories,
    draw_numbers,
    lay_panels,
    legend_shape,
    measured_spots,
    open_canvas,
    panel_inches,
    predicted_table,
    region,
    to_show,
    write_in,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray
    from spatialdata import SpatialData

    from histosge._geometry import Footprints

    Values = NDArray[np.float32]

PANELS = ("image", "measured", "predicted", "width")


def expression(
    sdata: SpatialData,
    genes: str | Sequence[str],
    *,
    key: str = "histosge",
    obs: str | None = None,
    layer: str | None = None,
    panels: Sequence[str] | None = None,
    level: float = LEVEL,
    cmap: str = "magma",
    panel_size: float | None = None,
) -> NDArray[Any]:
    """Draw the H&E image, measured and predicted expression side by side.

    Targets have their true size and shape. More than 20,000 are drawn as a raster; a million take seconds.

    Parameters
    ----------
    sdata
        Section with a table that :func:`histosge.tl.predict` wrote. The table may be lazy: only the values that are
        drawn are read.
    genes
        One gene or several.
    key
        Name of the predicted table.
    obs
        Column of the predicted table's ``obs`` to draw as well, for example ``"leiden"``.
    layer
        Layer of the measured table that holds the counts. ``None`` takes the layer of the prediction.
    panels
        Panels of each gene, in this order: ``"image"``, ``"measured"``, ``"predicted"``, and ``"width"``, the width of
        the prediction interval, which is computed here. ``None`` draws the first three, without measured spots the
        image and the prediction.
    level
        Target coverage of the intervals; see :func:`histosge.tl.intervals`.
    cmap
        Colour map of the expression.
    panel_size
        Longer edge of a panel in inches. ``None`` is 4, and less for many panels.

    Returns
    -------
    Axes, (genes, panels), ``obs`` last. Genes are below each other, many genes in several columns. Each panel has its
    own colour scale, from the 1st to the 99th percentile, since a prediction varies less than a noisy measurement.

    Raises
    ------
    KeyError
        Where there is no such table, gene, column or layer, or ``sdata`` lacks the image or the shapes.
    ValueError
        Where a panel is unknown or has nothing to show.

    Examples
    --------
    >>> import histosge as sge
    >>> sdata = sge.datasets.synthetic(n_rows=12, n_cols=12, n_genes=20, mpp=2.0)
    >>> sge.tl.predict(sdata, encoder="stain-texture", head="ridge", genes=20, n_folds=2)
    >>> axes = sge.pl.expression(sdata, sdata["histosge"].var_names[0])
    >>> axes.shape
    (1, 3)
    """
    table = predicted_table(sdata, key)
    genes = [genes] if isinstance(genes, str) else list(genes)
    missing = [g for g in genes if g not in table.var_names]
    if missing or not genes:
        msg = (
            f"genes {missing} were not predicted. Predict them with genes=[...]; here are {list(table.var_names[:5])} …"
        )
        raise KeyError(msg)
    if obs is not None and obs not in table.obs:
        msg = f"obs={obs!r} is not a column of sdata.tables[{key!r}].obs: {list(table.obs.columns)}."
        raise KeyError(msg)
    made = table.uns[_keys.UNS]
    kinds = _kinds(panels, table)
    columns = table.var_names.get_indexer(pd.Index(genes))
    kept = intervals_of(table, f"table {key!r}").take(columns) if "width" in kinds else None
    level = level if kept is None else kept.choose_level(level)
    canvas = open_canvas(sdata, table, key)
    places = canvas.outlines(region(table), table.obs[_keys.INSTANCE].to_numpy())
    drawn: dict[str, tuple[Footprints, Values]] = {}
    measured: pd.Index = pd.Index([])
    if "measured" in kinds:
        layer = made.get("layer") if layer is None else layer
        measured, spots, values = _measured(canvas, made, genes, layer)
        drawn["measured"] = spots, values
    if kept is not None or "predicted" in kinds:
        drawn["predicted"] = places, _predicted(table, columns)
    if kept is not None:
        layers = interval_layers(drawn["predicted"][1], kept, level=level)
        drawn["width"] = places, layers["upper"] - layers["lower"]

    n_panels = len(kinds) + (obs is not None)
    blocks = max(1, round(np.sqrt(len(genes) / max(n_panels, 1))))
    n_rows = -(-len(genes) // blocks)
    if panel_size is None:
        panel_size = float(np.clip(20 / max(n_rows, blocks * n_panels), 2.0, 4.0))
    column = None if obs is None else table.obs[obs]
    named = None if column is None else categories(column)
    shown = to_show(places, [outlines for outlines, _ in drawn.values()])
    panel = panel_inches(shown, panel_size)
    gaps = [PLAIN if kind == "image" else BAR for kind in kinds]
    if column is not None:
        gaps.append(BAR if named is None else legend_shape(list(map(str, named.categories)), panel[1])[1])
    grid = lay_panels(n_rows, panel=panel, gaps=gaps * blocks)
    for ax in grid[-1, (len(genes) - (n_rows - 1) * blocks) * n_panels :]:
        ax.set_visible(False)
    axes = grid.reshape(n_rows * blocks, n_panels)[: len(genes)]
    for i, (row, gene) in enumerate(zip(axes, genes, strict=True)):
        for ax, kind in zip(row, kinds, strict=False):
            if kind == "image":
                canvas.tissue(ax)
                ax.set_title("H&E", fontsize=9)
                continue
            outlines, values = drawn[kind]
            ax.set_title(_title(kind, gene, table), fontsize=9)
            if kind == "measured" and gene not in measured:
                write_in(ax, "not measured")
                continue
            label = _label(made) if kind != "width" else f"width of the {100 * level:g}% interval"
            colours = cmap if kind != "width" else "cividis"
            draw_numbers(ax, outlines, values[:, i], cmap=colours, label=label, absent="no interval: not measured")
        if column is not None:
            row[-1].set_title(obs, fontsize=9)
            if named is None:
                draw_numbers(row[-1], places, column, cmap=cmap, label=str(obs))
            else:
                draw_categories(row[-1], places, named, colours_of(table, str(obs), list(map(str, named.categories))))
        canvas.frame(row, shown)
    return axes


def _kinds(panels: Sequence[str] | None, table: AnnData) -> list[str]:
    """Panels of a gene."""
    made = table.uns[_keys.UNS]
    if panels is None:
        return ["image", *(["measured"] if "table" in made else []), "predicted"]
    kinds = [panels] if isinstance(panels, str) else list(panels)
    unknown = [kind for kind in kinds if kind not in PANELS]
    if unknown or not kinds or len(set(kinds)) < len(kinds):
        msg = f"panels={panels!r}: choose any of {PANELS}, each once."
        raise ValueError(msg)
    if "measured" in kinds and "table" not in made:
        msg = f"panels={panels!r}: nothing was measured on this section. Leave out 'measured'."
        raise ValueError(msg)
    return kinds


def _label(made: dict[str, Any]) -> str:
    """Label of a colour bar; it states where the scale is not known."""
    return f"log1p expression{', scale as given' if 'as given' in str(made.get('unit')) else ''}"


def _title(kind: str, gene: str, table: AnnData) -> str:
    if kind != "predicted":
        return f"{gene}\n{'measured' if kind == 'measured' else 'width of the prediction interval'}"
    return f"{gene}\npredicted, held-out PCC {table.var.loc[gene, 'held_out_pcc']:.2f}"


def _predicted(table: AnnData, columns: NDArray[np.int64]) -> Values:
    """Return values of some genes, (n, genes); from a lazy table nothing else is read."""
    part = table.X[:, columns]
    part = part.compute() if hasattr(part, "compute") else part
    return np.asarray(part.toarray() if sparse.issparse(part) else part, dtype=np.float32)


def _measured(
    canvas: Canvas, made: dict[str, Any], genes: Sequence[str], layer: str | None
) -> tuple[pd.Index, Footprints, Values]:
    """Return which genes were measured, at which spots, and their expression as :func:`read_section` computes it.

    That function needs several copies of all genes in memory. Here only sums over genes are computed, row by row.
    """
    table, rows, outlines = measured_spots(canvas, made)
    source = open_layer(table, layer, str(made["table"]))
    columns = source.genes.get_indexer(pd.Index(genes))
    with settings.override(verbosity=0):  # was logged when the section was read
        kind = source.values(*source.split(select(source.matrix, rows[sample(len(rows))])))
    totals, found = [], []
    for part in _runs(source.matrix, rows):
        counts, _ = source.split(part)
        totals.append(kind.totals(counts))
        found.append(counts[:, np.maximum(columns, 0)])
    sums, values = np.concatenate(totals), sparse.vstack(found).tocsr()
    keep = sums > NEARLY_EMPTY * np.median(sums[sums > 0])
    drawn = kind.expression(values, sums).toarray()
    drawn[:, columns < 0] = 0
    return source.genes.intersection(list(genes)), outlines if keep.all() else outlines.take(keep), drawn[keep]


def _runs(matrix: Any, rows: NDArray[np.int64]) -> Iterator[Any]:
    """Yield rows of a matrix, in memory or lazy, some at a time; a matrix compressed by columns at once."""
    step = len(rows) if getattr(matrix, "format", None) == "csc" else settings.part_rows
    for start in range(0, len(rows), step):
        run = rows[start : start + step]
        together = run[-1] - run[0] + 1 == len(run) and bool((np.diff(run) == 1).all())
        yield matrix[run[0] : run[-1] + 1] if together else select(matrix, run)
