"""Draw spatial domains over the tissue."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from histosge import _keys
from histosge.pl._canvas import (
    PLAIN,
    categories,
    colours_of,
    draw_categories,
    lay_panels,
    legend_shape,
    measured_spots,
    open_canvas,
    panel_inches,
    predicted_table,
    region,
    to_show,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from spatialdata import SpatialData


def domains(
    sdata: SpatialData, *, key: str = "histosge", domain: str = "domain", panel_size: float = 4.0
) -> NDArray[Any]:
    """Draw the domains of the predicted table over the tissue, next to the H&E image and the domains of the spots.

    Parameters
    ----------
    sdata
        Section with a table that :func:`histosge.tl.predict` wrote.
    key
        Name of the predicted table.
    domain
        Column of its ``obs``: from :func:`histosge.tl.domains`, from leiden, or any categories.
    panel_size
        Longer edge of a panel in inches.

    Returns
    -------
    Axes, (panels,): H&E; measured, where the measured table has that column as well; predicted. Colours are those in
    ``uns["{domain}_colors"]``, where scanpy stores them, else scanpy's choice. Two tables share colours by name.

    Raises
    ------
    KeyError
        Where there is no such table or column, or ``sdata`` lacks the image or the shapes.
    ValueError
        Where the column holds numbers.

    Examples
    --------
    >>> import histosge as sge
    >>> sdata = sge.datasets.synthetic(n_rows=12, n_cols=12, n_genes=20, mpp=2.0)
    >>> sge.tl.predict(sdata, encoder="stain-texture", head="ridge", genes=20, n_folds=2)
    >>> sge.pl.domains(sdata, domain="in_spot").shape
    (2,)
    """
    table = predicted_table(sdata, key)
    if domain not in table.obs:
        msg = (
            f"domain={domain!r} is not a column of sdata.tables[{key!r}].obs: {list(table.obs.columns)}. "
            "Run sge.tl.domains(sdata) first."
        )
        raise KeyError(msg)
    predicted = categories(table.obs[domain])
    if predicted is None:
        msg = (
            f"domain={domain!r} holds numbers, not domains. Make it categorical, or draw it with "
            "sge.pl.expression(obs=...)."
        )
        raise ValueError(msg)
    canvas = open_canvas(sdata, table, key)
    made = table.uns[_keys.UNS]
    drawn = [("predicted", canvas.outlines(region(table), table.obs[_keys.INSTANCE].to_numpy()), predicted)]
    colours = colours_of(table, domain, list(map(str, predicted.categories)))
    if "table" in made and domain in sdata.tables[str(made["table"])].obs:
        source, rows, outlines = measured_spots(canvas, made)
        measured = categories(source.obs[domain].iloc[rows])
        if measured is not None:
            drawn.insert(0, ("measured", outlines, measured))
            colours = colours_of(source, domain, list(map(str, measured.categories))) | colours
    shown = to_show(drawn[-1][1], [outlines for _, outlines, _ in drawn[:-1]])
    panel = panel_inches(shown, panel_size)
    legends = [legend_shape(list(map(str, values.categories)), panel[1])[1] for _, _, values in drawn]
    axes = lay_panels(1, panel=panel, gaps=[PLAIN, *legends])[0]
    canvas.tissue(axes[0])
    axes[0].set_title("H&E", fontsize=9)
    for ax, (name, outlines, values) in zip(axes[1:], drawn, strict=True):
        draw_categories(ax, outlines, values, colours)
        n = len(np.unique(values.codes[values.codes >= 0]))
        ax.set_title(f"{domain}, {name}: {n} domain{'s' * (n != 1)}", fontsize=9)
    canvas.frame(axes, shown)
    return axes
