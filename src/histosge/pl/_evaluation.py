"""Draw the scores of heads: correlations, gene by gene, prediction intervals, smoothness."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from histosge._statistics import LEVEL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

_COVERAGES = {1: "coverage", 2: "coverage_2", 4: "coverage_4", 8: "coverage_8"}
"""Columns of scores by the number of spots that are averaged."""


def evaluation(
    scores: pd.DataFrame,
    *,
    head: str | None = None,
    baseline: str | None = None,
    figsize: tuple[float, float] = (10.0, 4.0),
) -> NDArray[Any]:
    """Draw the scores of heads on held-out spots.

    The scores of each gene are first averaged over all splits, repeats and sections.

    Parameters
    ----------
    scores
        Result of :func:`histosge.tl.evaluate`: one split and one protocol.
    head
        Head to compare with a baseline, gene by gene. ``None`` takes the first of ``scores``.
    baseline
        Head to compare it with. ``None`` takes the best other head.
    figsize
        Width and height of the figure in inches.

    Returns
    -------
    Axes, (panels,): correlation of predicted and measured by head, best first, with the noise ceiling and the share of
    the mean in it; ``head`` against ``baseline``; the share of measurements within the prediction intervals against
    their width, also after averaging over 2, 4 and 8 spots, with a line at the target coverage of 0.9; Moran's I of
    predicted against that of measured expression, where points above the diagonal are smoother than the measurement.
    Panels without scores are left out: with a single head the second.

    Raises
    ------
    TypeError
        Where ``scores`` is no DataFrame.
    ValueError
        Where it lacks columns, rows or a head, or mixes splits or protocols.

    Examples
    --------
    >>> import histosge as sge
    >>> sdata = sge.datasets.synthetic()
    >>> scores = sge.tl.evaluate(
    ...     sdata, encoder="stain-texture", heads=["ridge", "mean"], genes=20, n_splits=2, n_folds=2
    ... )
    >>> axes = sge.pl.evaluation(scores)
    >>> axes.shape
    (4,)
    """
    import matplotlib.pyplot as plt

    _check_scores(scores)
    heads = list(dict.fromkeys(scores["head"]))
    genes = scores.groupby(["head", "gene"], sort=False).mean(numeric_only=True)
    mean = genes["pcc"].groupby("head").mean()
    one, other = _pair(heads, head, baseline, mean)
    colours = dict(zip(heads, plt.get_cmap("tab10")(np.arange(len(heads)) % 10), strict=True))
    has = {
        a: {a, b} <= set(genes) and bool(genes[[a, b]].notna().all(axis=1).any())
        for a, b in (("coverage", "width"), ("morans_i", "morans_i_measured"))
    }

    n_panels = 1 + (other is not None) + has["coverage"] + has["morans_i"]
    figure, axes = plt.subplots(
        1, n_panels, figsize=figsize, width_ratios=[1.25] + [1] * (n_panels - 1), squeeze=False, layout="constrained"
    )
    held_out = _describe(figure, scores)
    rest = iter(axes[0])
    _draw_correlations(next(rest), genes, mean, colours=colours, name="held-out PCC" if held_out else "PCC")
    if other is not None:
        _draw_pair(next(rest), genes["pcc"].unstack("head")[[one, other]].dropna(), colours=colours)
    if has["coverage"]:
        _draw_coverage(next(rest), genes.groupby("head").mean(), colours=colours)
    if has["morans_i"]:
        _draw_smoothness(next(rest), genes, colours=colours)
    for ax in axes[0]:
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    return axes[0]


def _check_scores(scores: Any) -> None:
    """Raise where scores are not from :func:`histosge.tl.evaluate`, or are not comparable."""
    if not isinstance(scores, pd.DataFrame):
        msg = f"scores is a {type(scores).__name__}: pass the DataFrame that histosge.tl.evaluate returned."
        raise TypeError(msg)
    missing = [c for c in ("split", "protocol", "head", "gene", "pcc") if c not in scores]
    if missing:
        msg = (
            f"scores lacks the columns {missing}: pass the DataFrame that histosge.tl.evaluate returned, "
            "one row for each gene, head and split."
        )
        raise ValueError(msg)
    if len(scores) == 0:
        msg = "scores has no rows: nothing was scored, or all rows were filtered out. Evaluate again, or filter less."
        raise ValueError(msg)
    for name in ("split", "protocol"):
        values = list(dict.fromkeys(scores[name]))
        if len(values) > 1:
            msg = (
                f"scores holds {name} {values}, which are not comparable. "
                f"Draw one of them: scores[scores[{name!r}] == {values[0]!r}]."
            )
            raise ValueError(msg)


def _pair(heads: list[str], head: str | None, baseline: str | None, mean: pd.Series) -> tuple[str, str | None]:
    """Choose head and baseline; no baseline where there is only one head."""
    for name, value in (("head", head), ("baseline", baseline)):
        if value is not None and value not in heads:
            msg = f"{name}={value!r} is not in scores. Choose one of {heads}."
            raise ValueError(msg)
    if head is not None and head == baseline:
        msg = f"head and baseline are both {head!r}. Choose two of {heads}."
        raise ValueError(msg)
    one = head if head is not None else next((h for h in heads if h != baseline), heads[0])
    others = [h for h in heads if h != one]
    if baseline is not None or not others:
        return one, baseline if others else None
    return one, str(mean[others].idxmax())


def _describe(figure: Figure, scores: pd.DataFrame) -> bool:
    """Set the title: split, protocol, numbers of sections, genes and splits; return whether spots were held out."""
    split, protocol = scores["split"].iloc[0], scores["protocol"].iloc[0]
    counted = [(scores["gene"].nunique(), "gene")]
    if "section" in scores:
        counted.append((scores["section"].nunique(), "section"))
    if {"section", "repeat", "fold"} <= set(scores.columns):
        counted.append((len(scores[["section", "repeat", "fold"]].drop_duplicates()), "split"))
    counts = ", ".join(f"{n} {word}{'s' * (n != 1)}" for n, word in counted)
    held_out = protocol == "held-out"
    text = f"{protocol} spots, split {split!r}: {counts}"
    if not held_out:
        text = f"protocol {protocol!r}: SCORED ON TRAINING SPOTS AS WELL, not held out\nsplit {split!r}: {counts}"
    figure.suptitle(
        text, fontsize=10, color="black" if held_out else "tab:red", fontweight=None if held_out else "bold"
    )
    return held_out


def _draw_correlations(ax: Axes, genes: pd.DataFrame, mean: pd.Series, *, colours: dict[str, Any], name: str) -> None:
    """Draw a box of all genes for every head, best on top, and one of the noise ceiling above."""
    order = list(mean.sort_values(kind="stable").index)
    boxes = [genes.loc[h, "pcc"].to_numpy() for h in order]
    labels = [f"{h}\n{mean[h]:.3f}" for h in order]
    paint = [colours[h] for h in order]
    if "ceiling" in genes and genes["ceiling"].notna().any():
        ceiling = genes["ceiling"].groupby("gene").mean().dropna()
        if ceiling.mean() > 0:
            labels = [f"{text}, {mean[h] / ceiling.mean():.0%}" for text, h in zip(labels, order, strict=True)]
        boxes.append(ceiling.to_numpy())
        labels.append(f"noise ceiling\n{ceiling.mean():.3f}")
        paint.append("0.6")
    drawn = ax.boxplot(
        boxes,
        orientation="horizontal",
        widths=0.6,
        patch_artist=True,
        showmeans=True,
        medianprops={"color": "black"},
        meanprops={"marker": "D", "markersize": 3.5, "markerfacecolor": "white", "markeredgecolor": "black"},
        flierprops={"marker": ".", "markersize": 2, "markeredgecolor": "0.5"},
    )
    for box, colour in zip(drawn["boxes"], paint, strict=True):
        box.set_facecolor(colour)
    ax.set_yticks(np.arange(1, len(boxes) + 1), labels)
    ax.axvline(0, color="0.7", lw=0.8, zorder=0)
    ax.set_xlabel(f"{name} of a gene", fontsize=9)
    ax.set_title("mean ◇" + (", its share of the ceiling" if len(boxes) > len(order) else ""), fontsize=9)


def _draw_pair(ax: Axes, pcc: pd.DataFrame, *, colours: dict[str, Any]) -> None:
    """Draw one head against another, one point for each gene, in the colour of the better head."""
    one, other = pcc.columns
    ahead = (pcc[one] > pcc[other]).to_numpy()
    ax.scatter(pcc[other], pcc[one], s=10, lw=0, alpha=0.7, c=[colours[one if a else other] for a in ahead])
    _square(ax, pcc.to_numpy())
    ax.set_xlabel(f"PCC of {other}", fontsize=9)
    ax.set_ylabel(f"PCC of {one}", fontsize=9)
    ax.set_title(f"{one} is ahead\nfor {ahead.mean():.0%} of genes", fontsize=9)


def _draw_coverage(ax: Axes, heads: pd.DataFrame, *, colours: dict[str, Any]) -> None:
    """Draw coverage against width of intervals: a line for each head, larger points for averages over more spots."""
    for name, row in heads.iterrows():
        found = [(k, row[c]) for k, c in _COVERAGES.items() if c in heads and pd.notna(row[c])]
        if not found:
            continue
        k, share = np.array(found).T
        x = np.full(len(k), row["width"])
        ax.plot(x, share, color=colours[str(name)], lw=1)
        ax.scatter(x, share, s=8 * np.sqrt(8 * k), color=[colours[str(name)]], edgecolors="white", lw=0.5, zorder=3)
    ax.axhline(LEVEL, color="black", ls="--", lw=0.8)
    ax.margins(x=0.2, y=0.1)
    ax.set_xlabel("mean width (log1p)", fontsize=9)
    ax.set_ylabel("share of measurements inside", fontsize=9)
    ax.set_title("intervals: dots grow with\nspots averaged (1, 2, 4, 8)", fontsize=9)


def _draw_smoothness(ax: Axes, genes: pd.DataFrame, *, colours: dict[str, Any]) -> None:
    """Draw Moran's I of predictions against that of measurements: a point for each gene, a large one for the mean."""
    for name, part in genes.groupby("head", sort=False):
        x, y = part["morans_i_measured"], part["morans_i"]
        ax.scatter(x, y, s=5, lw=0, alpha=0.35, color=[colours[str(name)]])
        ax.scatter(x.mean(), y.mean(), s=45, color=[colours[str(name)]], edgecolors="black", lw=0.8, zorder=3)
    _square(ax, genes[["morans_i_measured", "morans_i"]].to_numpy())
    ax.set_xlabel("Moran's I, measured", fontsize=9)
    ax.set_ylabel("Moran's I, predicted", fontsize=9)
    ax.set_title("above the line:\nsmoother than measured", fontsize=9)


def _square(ax: Axes, values: NDArray[np.floating]) -> None:
    """Set the same limits on both axes, and draw the diagonal."""
    low, high = np.nanmin(values), np.nanmax(values)
    margin = 0.05 * max(high - low, 0.1)
    ax.axline((0, 0), slope=1, color="0.5", lw=0.8, zorder=0)
    ax.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin))
