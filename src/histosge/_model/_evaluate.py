"""Hold spots out, fit, predict and score the same model that :func:`histosge.tl.fit` fits.

A model is fitted from scratch in every trial: genes, scalings, components, stopping and prediction intervals depend on
the training spots only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from histosge._model._context import UNMEASURED, stack_sections
from histosge._model._fit import fit_model
from histosge._model._trials import trials
from histosge._settings import logger, progress_bar, settings
from histosge._statistics import (
    SPATIAL_WEIGHT,
    agreement,
    correlation,
    empirical_coverage,
    find_domains,
    gene_agreement,
    morans_i,
    neighbour_average,
    noise_ceiling,
    rank_correlation,
    structural_similarity,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray

    from histosge._embedding import EmbeddingConfig
    from histosge._model._model import Model
    from histosge._model._trials import Measured, Plan, Trial
    from histosge._section import Section

    Floats = NDArray[np.floating]

SCALES = (2, 4, 8)
"""Numbers of neighbours over which measurements and prediction intervals are averaged, to score coarser scales."""


def evaluate(
    sections: Sequence[Measured],
    plan: Plan,
    *,
    heads: Sequence[str],
    config: EmbeddingConfig,
    genes: int | Sequence[str] | str,
    n_folds: int,
    rng: np.random.Generator,
    device: torch.device,
    worker_device: str | None = None,
    head_options: dict[str, dict[str, Any]] | None = None,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Score every head in every trial: one row for each gene."""
    ceilings = {each.name: _ceiling(each.section) for each in sections}
    by_name = {each.name: each for each in sections}
    tables, with_labels = [], []
    plans = list(trials(sections, plan, rng=rng))
    seeds = rng.integers(2**63 - 1, size=len(plans))
    with progress_bar(desc="evaluating", total=len(plans) * len(heads), unit="fit", show=progress) as bar:
        for trial, seed in zip(plans, seeds, strict=True):
            for head in heads:
                with settings.override(verbosity=min(settings.verbosity, 1)):
                    model = fit_model(
                        trial.sections,
                        trial.embeddings,
                        config=config,
                        sub_spots=trial.parts,
                        head=head,
                        genes=genes,
                        n_folds=n_folds,
                        # every head of a trial gets the same folds
                        rng=np.random.default_rng(seed),
                        device=device,
                        worker_device=worker_device,
                        baselines=(),
                        head_options=(head_options or {}).get(head),
                        progress=False,
                    )
                predicted, measured = predict_trial(model, trial, device=device)
                table = score_genes(predicted, measured, model, trial, plan)
                ceiling = ceilings[trial.name] if trial.ceiling is None else trial.ceiling
                table["ceiling"] = ceiling.reindex(table["gene"]).to_numpy()
                tables.append(table)
                if by_name[trial.name].labels is not None:
                    with_labels.append((trial, head, model.genes, predicted))
                bar.update()
                bar.set_postfix(head=head, pcc=f"{table['pcc'].mean():.3f}")
    result = pd.concat(tables, ignore_index=True)
    if with_labels:
        result = result.merge(_domains_of(with_labels, by_name), on=["section", "repeat", "head"], how="left")
    return result


def predict_trial(
    model: Model, trial: Trial, *, device: torch.device
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return predicted and measured expression (m, genes) at the targets of a trial.

    Measured expression is NaN for genes that were not measured there.
    """
    spots = model.projection.of_spots(stack_sections(trial.sections, trial.embeddings, model.context_genes))
    context = model.condition(spots, section=0 if trial.measured else UNMEASURED, device=device)
    predicted = model.predict_from(context, embedding=trial.place, xy_um=trial.xy_um, spot_index=trial.spot_index)
    columns = trial.genes.get_indexer(model.genes)
    measured = np.asarray(trial.truth[:, columns].todense(), np.float32)
    measured[:, columns < 0] = np.nan
    return predicted, measured


def score_genes(predicted: Floats, measured: Floats, model: Model, trial: Trial, plan: Plan) -> pd.DataFrame:
    """Score one head in one trial, gene by gene; genes that were not measured at the targets have no score."""
    xy = trial.xy_um
    scored = np.flatnonzero(~np.isnan(measured).any(axis=0))
    genes, predicted, measured = model.genes[scored], predicted[:, scored], measured[:, scored]
    known = np.vstack([s.dense(genes) for s in trial.sections])
    error = predicted - measured
    mse, mse_mean = (error**2).mean(0), ((measured - np.nanmean(known, axis=0)) ** 2).mean(0)
    table = pd.DataFrame(
        {
            "section": trial.name,
            "split": plan.split,
            "protocol": plan.protocol,
            "repeat": trial.repeat,
            "fold": trial.fold,
            "head": model.head,
            "gene": np.asarray(genes),
            "n_train": len(known),
            "n_test": len(measured),
            "pcc": correlation(predicted, measured),
            "spearman": rank_correlation(predicted, measured),
            "mse": mse,
            "mae": np.abs(error).mean(0),
            "mse_mean": mse_mean,
            "skill": np.where(mse_mean > 0, 1 - mse / np.where(mse_mean > 0, mse_mean, 1), 0.0),
            "morans_i": morans_i(predicted, xy),
            "morans_i_measured": morans_i(measured, xy),
            "gene_agreement": gene_agreement(predicted, measured),
            "ssim": structural_similarity(predicted, measured, xy=xy),
        }
    )
    lower, upper = model.intervals.take(scored).interval(predicted)
    table["coverage"] = empirical_coverage(measured, lower, upper)
    table["width"] = (upper - lower).mean(0)
    for k in SCALES:
        each = (neighbour_average(v, xy=xy, k=k) for v in (measured, lower, upper))
        table[f"coverage_{k}"] = empirical_coverage(*each)
    return table


def _ceiling(section: Section) -> pd.Series:
    """Highest correlation that counting noise allows, by gene; NaN without counts."""
    if section.counts is None:
        logger.info("no noise ceiling: the table of %r holds no raw counts", section.spots_key)
        return pd.Series(np.nan, section.genes)
    return pd.Series(noise_ceiling(section.counts), section.genes)


def _domains_of(
    predictions: list[tuple[Trial, str, pd.Index, NDArray[np.float32]]], by_name: dict[str, Measured]
) -> pd.DataFrame:
    """Agreement of domains with the labels: of predicted and of measured expression, with the same settings."""
    found = []
    for section, repeat, head in dict.fromkeys((t.name, t.repeat, h) for t, h, _, _ in predictions):
        parts = [(t, g, p) for t, h, g, p in predictions if (t.name, t.repeat, h) == (section, repeat, head)]
        genes = parts[0][1]
        for _, other, _ in parts[1:]:  # each fold chooses its own genes: compare the genes that all folds chose
            genes = genes.intersection(other, sort=False)
        genes = genes.sort_values()
        measured = by_name[section]
        scores: dict[str, Any] = {"section": section, "repeat": repeat, "head": head}
        found.append(scores)
        if len(genes) == 0:
            logger.warning("no gene was chosen in every fold of section %r: ari and nmi are NaN", section)
            scores |= dict.fromkeys(("ari", "nmi", "ari_measured", "nmi_measured"), np.nan)
            continue
        predicted = np.full((len(measured.section.xy_px), len(genes)), np.nan, np.float32)
        for trial, mine, values in parts:
            predicted[trial.rows] = values[:, mine.get_indexer(genes)]
        rows = np.flatnonzero(~pd.isna(measured.labels))
        for name, values in (("", predicted), ("_measured", measured.section.dense(genes))):
            domains = find_domains(
                values, measured.section.xy_px, resolution=1.0, n_domains=None, n_pcs=30, n_neighbours=15,
                spatial_weight=SPATIAL_WEIGHT, rng=0,
            )  # fmt: skip
            agreed = agreement(domains[rows], np.asarray(measured.labels)[rows].astype(str))
            scores |= {f"ari{name}": agreed["ari"], f"nmi{name}": agreed["nmi"]}
    return pd.DataFrame(found)
