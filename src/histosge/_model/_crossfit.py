"""Held-out predictions and their scores. Nothing here is scored on what it was trained on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import stats

from histosge._cluster import active_client, on_workers
from histosge._embedding import resolve_device
from histosge._heads import AnyHead, Head, Queries, Spots, get_head, head_name, new_head, parts_of, side_by_side
from histosge._model._completion import complete, measured_together
from histosge._settings import logger, progress_bar
from histosge._statistics import correlation

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.floating]
    Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class CrossFit:
    """Predictions of heads at held-out spots, and the heads for new targets."""

    held_out: Floats
    """(n_spots, n_genes) log1p expression, each spot predicted by heads that were not trained on it"""
    parts: dict[str, Floats]
    """The same by name of each head; ``held_out`` is their mean"""
    fold: NDArray[np.int64]
    """(n_spots,)"""
    heads: list[tuple[float, Head]]
    """Heads and their weights in a prediction: networks of all folds, and other heads fitted on all spots"""
    losses: dict[tuple[str, int], Sequence[float]]
    """Loss on the stopping spots after each epoch, by name of the head and held-out fold"""


def cross_fit(
    spots: Spots,
    *,
    head: AnyHead,
    fold: NDArray[np.int64],
    rng: np.random.Generator,
    options: dict[str, Any] | None = None,
    progress: bool | None = None,
    final: bool = True,
    worker_device: str | None = None,
) -> CrossFit:
    """Fit one head per fold on the spots outside it, and predict the spots inside it from the others.

    A held-out spot is hidden from the context as well: its measurement reaches nothing that predicts it.

    Parameters
    ----------
    spots
        Measured spots.
    head
        Name of a head, names joined by ``+`` for their mean, or a head of the user's.
    fold
        (n_spots,) number of each spot's fold.
    rng
        Source of all randomness.
    options
        Arguments of the head; for joined heads, a dict of arguments for each name.
    progress
        Whether to show progress bars.
    final
        Whether to fit the heads for new targets as well.
    worker_device
        Where workers of dask fit; by default each chooses.
    """
    names = parts_of(head)
    folds = np.unique(fold)
    fits: list[tuple[str, int | None]] = [(name, int(number)) for number in folds for name in names]
    fits += [(name, None) for name in names if final and not get_head(name).ensembles_folds]
    seeds = rng.integers(2**63 - 1, size=len(fits)).tolist()
    tasks = [_Fit(name, left_out, seed) for (name, left_out), seed in zip(fits, seeds, strict=True)]
    plan = _Fits(
        spots, head, {names[0]: options or {}} if len(names) == 1 else options or {}, fold, final, worker_device
    )
    done = _all(plan, tasks, progress=progress)

    parts = {name: np.zeros(spots.expression.shape, np.float32) for name in names}
    for task, each in zip(tasks, done, strict=True):
        if each.held_out is not None:
            parts[task.name][fold == task.left_out] = each.held_out
    losses = {(t.name, t.left_out): each.losses for t, each in zip(tasks, done, strict=True) if t.left_out is not None}
    heads = [
        (1 / len(names) / (1 if task.left_out is None else len(folds)), each.head)
        for name in names
        for task, each in zip(tasks, done, strict=True)
        if task.name == name and each.head is not None
    ]
    losses = {key: values for key, values in sorted(losses.items()) if len(values)}
    return CrossFit(np.mean(list(parts.values()), axis=0), parts, fold, heads, losses)


@dataclass(frozen=True)
class _Fits:
    """What all fits share."""

    spots: Spots
    head: AnyHead
    options: dict[str, Any]
    """Arguments of each head, by name"""
    fold: NDArray[np.int64]
    final: bool
    device: str | None = None
    """Where a worker of dask fits; by default it chooses. Without dask, fits run where the spots are."""

    def open(self) -> _Fits:
        """Move the spots to the device, on a worker."""
        return replace(self, spots=self.spots.to(resolve_device(self.device)))


@dataclass(frozen=True)
class _Fit:
    """One fit: without the spots of a fold, which it then predicts, or on all spots."""

    name: str
    left_out: int | None
    seed: int


@dataclass(frozen=True)
class _Fitted:
    head: Head | None
    """Where the model keeps it"""
    held_out: NDArray[np.float32] | None
    """(m, n_genes) predicted expression of the fold"""
    losses: Sequence[float] = ()


def _all(plan: _Fits, tasks: Sequence[_Fit], *, progress: bool | None) -> list[_Fitted]:
    """Run all fits: on the workers of dask if there is a ``Client``, else here."""
    desc, client = f"fitting {head_name(plan.head)}", active_client()
    if client is None:
        here = [partial(_fit, plan, task, progress=progress) for task in tasks]
        return side_by_side(here, device=plan.spots.embedding.device, desc=desc, progress=progress)
    done: dict[int, _Fitted] = {}
    with progress_bar(desc=desc, total=len(tasks), unit="fit", show=progress) as bar:
        for i, fitted in on_workers(_fit_there, tasks, client=client, plan=plan, opens=_Fits.open, name="histosge_fit"):
            done[i] = fitted
            bar.update()
    return [done[i] for i in range(len(tasks))]


def _fit(plan: _Fits, task: _Fit, *, progress: bool | None = False) -> _Fitted:
    made = new_head(task.name if isinstance(plan.head, str) else plan.head, plan.options.get(task.name, {}))
    rng = np.random.default_rng(task.seed)  # fits run side by side: each has a source of its own
    spots, device = plan.spots, plan.spots.embedding.device
    if task.left_out is None:
        return _Fitted(made.fit(complete(spots), rng=rng, progress=progress), None)
    inside = plan.fold == task.left_out
    # after the fold is left out: what fills a gene in is learnt from the others as well
    known = complete(spots.take(torch.as_tensor(np.flatnonzero(~inside), device=device)))
    made = made.fit(known, rng=rng, progress=progress)
    hidden = Queries.of(spots.take(torch.as_tensor(np.flatnonzero(inside), device=device)), hidden=False)
    predicted = made.predict(hidden, context=known).clamp_min(0).cpu().numpy()
    return _Fitted(made if made.ensembles_folds and plan.final else None, predicted, made.losses)


def _fit_there(plan: _Fits, task: _Fit) -> _Fitted:
    """Fit on a worker; what it returns lies on the processor."""
    fitted = _fit(plan, task)
    return fitted if fitted.head is None else replace(fitted, head=fitted.head.to("cpu"))


@dataclass(frozen=True)
class Scores:
    """Held-out scores of every gene."""

    pcc: Floats
    """(n_genes,) Pearson correlation, mean over folds"""
    mse: Floats
    """(n_genes,)"""
    p_value: Floats
    """(n_genes,) p value of the correlation: one-sided t test against 0"""

    @property
    def predictable(self) -> Bools:
        """Which genes are predicted better than chance, at a false discovery rate of 5 % (Benjamini and Hochberg)."""
        return stats.false_discovery_control(self.p_value) <= 0.05


def score(predicted: Floats, measured: Floats, *, fold: NDArray[np.int64]) -> Scores:
    """Score held-out predictions fold by fold, since heads of different folds may differ in their mean.

    Spots where a gene is not measured (NaN) do not count.
    """
    found = Scores(*np.zeros((3, measured.shape[1])))
    for rows, genes in measured_together(measured):
        each = _score(predicted[rows][:, genes], measured[rows][:, genes], fold=fold[rows])
        found.pcc[genes], found.mse[genes], found.p_value[genes] = each.pcc, each.mse, each.p_value
    return found


def _score(predicted: Floats, measured: Floats, *, fold: NDArray[np.int64]) -> Scores:
    folds = [np.flatnonzero(fold == number) for number in np.unique(fold)]
    share = np.array([len(rows) for rows in folds]) / len(fold)
    pcc = np.stack([correlation(predicted[rows], measured[rows]) for rows in folds])
    mean_pcc = share @ pcc
    # Each fold's correlation has n - 2 degrees of freedom, and independent folds would add theirs up. But folds predict
    # each other (A from B's measurements, B from A's), which on pure noise doubles the variance of the mean.
    freedom = float(len(fold) - 2 * len(folds))
    freedom = max(freedom / 2 if len(folds) > 1 else freedom, 1.0)
    clipped = np.clip(mean_pcc, -1 + 1e-12, 1 - 1e-12)
    p_value = stats.t.sf(clipped * np.sqrt(freedom / (1 - clipped**2)), freedom)
    mse = ((np.asarray(predicted, np.float64) - measured) ** 2).mean(0)
    return Scores(mean_pcc, mse, p_value)


def compare(
    spots: Spots,
    *,
    heads: Sequence[str],
    fold: NDArray[np.int64],
    chosen: Callable[[int], Bools],
    rng: np.random.Generator,
    worker_device: str | None = None,
) -> dict[str, dict[str, float]]:
    """Score baselines on the same folds: mean PCC and MSE over the genes chosen on each fold's training spots."""
    found = {}
    for head in heads:
        fitted = cross_fit(
            spots, head=head, fold=fold, rng=rng, progress=False, final=False, worker_device=worker_device
        )
        found[head] = summary(fitted.held_out, spots.expression.cpu().numpy(), fold=fold, chosen=chosen)
        logger.debug("held-out PCC of %s: %.3f", head, found[head]["pcc"])
    return found


def summary(
    predicted: Floats, measured: Floats, *, fold: NDArray[np.int64], chosen: Callable[[int], Bools]
) -> dict[str, float]:
    """Mean score over the genes that are chosen on the training spots of each fold."""
    pcc, mse, share = [], [], []
    for number in np.unique(fold):
        rows, genes = np.flatnonzero(fold == number), chosen(int(number))
        p, m = predicted[np.ix_(rows, genes)], measured[np.ix_(rows, genes)]
        groups = [(p[some][:, of], m[some][:, of]) for some, of in measured_together(m)]
        groups = [(a, b) for a, b in groups if len(b) > 1]  # some genes may be measured in other folds only
        if groups:
            pcc.append(np.concatenate([correlation(a, b) for a, b in groups]).mean())
            mse.append(np.concatenate([((a - b) ** 2).mean(0) for a, b in groups]).mean())
            share.append(len(rows))
    return {"pcc": float(np.average(pcc, weights=share)), "mse": float(np.average(mse, weights=share))}
