"""Draw training curves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from histosge import _keys
from histosge.pl._canvas import predicted_table

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from spatialdata import SpatialData

    from histosge import Model


def training(data: Model | SpatialData, *, key: str = "histosge", panel_size: float = 3.2) -> NDArray[Any]:
    """Draw the loss on the stopping spots, epoch by epoch, for each head and fold, and where training stopped.

    Parameters
    ----------
    data
        Model of :func:`histosge.tl.fit`, or a section with a table that :func:`histosge.tl.predict` wrote.
    key
        Name of the predicted table; not used for a model.
    panel_size
        Height of a panel in inches.

    Returns
    -------
    Axes, (heads,): a line for each fold. The dot is the best epoch, whose weights are used. The line ends where
    training stopped.

    Raises
    ------
    KeyError
        Where there is no such table.
    TypeError
        Where ``data`` is neither model nor section.
    ValueError
        Where no head was trained in steps: ``ridge``, ``kriging`` and ``nearest`` are solved directly.

    Examples
    --------
    >>> import histosge as sge
    >>> sdata = sge.datasets.synthetic(n_rows=12, n_cols=12, n_genes=20, mpp=2.0)
    >>> sge.tl.predict(sdata, encoder="stain-texture", head="in-context", genes=20, n_folds=2)
    >>> sge.pl.training(sdata).shape
    (1,)
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    name, losses = _losses(data, key)
    if len(losses) == 0:
        msg = f"head {name!r} was not trained in steps, but solved directly: there are no curves to draw."
        raise ValueError(msg)
    heads = list(dict.fromkeys(losses["head"]))
    folds = sorted(set(losses["fold"]))
    colours = dict(zip(folds, plt.get_cmap("viridis")(np.linspace(0, 0.9, len(folds))), strict=True))
    size = (1.35 * panel_size * len(heads) + 0.6, panel_size)
    figure, axes = plt.subplots(1, len(heads), figsize=size, squeeze=False, layout="constrained")
    for ax, head in zip(axes[0], heads, strict=True):
        best = []
        for fold, curve in losses[losses["head"] == head].groupby("fold"):
            curve = curve.sort_values("epoch")
            kept = curve.loc[curve["loss"].idxmin()]
            best.append(int(kept["epoch"]))
            ax.plot(curve["epoch"], curve["loss"], color=colours[fold], lw=1.2, label=f"fold {fold}")
            ax.plot(kept["epoch"], kept["loss"], marker="o", color=colours[fold], markersize=5, mec="white", mew=0.8)
        kept_epochs = f"epoch {best[0]}" if min(best) == max(best) else f"epochs {min(best)} to {max(best)}"
        ax.set_title(f"{head}: weights of {kept_epochs} kept (dots)", fontsize=9)
        ax.set_xlabel("epoch", fontsize=9)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("loss on the stopping spots", fontsize=9)
    handles = [plt.Line2D([], [], color=colour, label=f"fold {fold}") for fold, colour in colours.items()]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)
    return axes[0]


def _losses(data: Any, key: str) -> tuple[str, pd.DataFrame]:
    """Return the name of the head, and one row for each epoch."""
    if isinstance(getattr(data, "training", None), pd.DataFrame):
        return str(data.head), data.training
    if not hasattr(data, "tables"):
        msg = (
            f"data is a {type(data).__name__}: pass a Model of sge.tl.fit, or a SpatialData that sge.tl.predict wrote "
            "into."
        )
        raise TypeError(msg)
    made = predicted_table(data, key).uns[_keys.UNS]
    columns = {name: np.asarray(values) for name, values in made.get("training", {}).items()}
    return str(made["head"]), pd.DataFrame(columns)
