"""Fit a model to sections: choose genes, fit heads fold by fold and score them on held-out spots."""

from __future__ import annotations

import difflib
import inspect
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
from scipy import sparse

from histosge._heads import POSITION_ONLY, AnyHead, get_head, head_name, parts_of, wrong_option
from histosge._model._completion import measured_together
from histosge._model._context import section_numbers, stack_sections
from histosge._model._crossfit import compare, cross_fit, score, summary
from histosge._model._draw import check_max_spots
from histosge._model._files import training_table
from histosge._model._genes import select_genes
from histosge._model._model import Model
from histosge._model._projection import Projection
from histosge._options import MAX_SPOTS
from histosge._settings import is_whole, logger
from histosge._statistics import BASELINES, better_baselines, block_folds, calibrate

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray

    from histosge._embedding import EmbeddingConfig, SpotParts
    from histosge._section import Section
    from histosge._statistics import PredictionIntervals


def fit_model(
    sections: Sequence[Section],
    embeddings: Sequence[NDArray[np.float32]],
    *,
    config: EmbeddingConfig,
    head: AnyHead,
    genes: int | Sequence[str] | str,
    n_folds: int,
    rng: np.random.Generator,
    device: torch.device,
    worker_device: str | None = None,
    sub_spots: Sequence[SpotParts] | None = None,
    baselines: Sequence[str] = BASELINES,
    head_options: dict[str, Any] | None = None,
    n_measured: int | None = None,
    progress: bool | None = None,
) -> Model:
    """Fit a head on every fold of the spots of one or more sections, and score it on the held-out spots.

    ``sub_spots`` are the sub-spots of each section, for heads that learn from them. ``n_measured`` is the number of
    spots that the sections have, where these here are drawn from them. Workers of dask fit on ``worker_device``.
    Arguments are checked by the caller: :func:`check_arguments`.
    """
    listed = genes_of(sections, genes)
    names = listed.sort_values()  # whatever the order of the tables, seeds draw the same weights for a gene
    measured_by = np.stack([names.isin(s.genes) for s in sections])  # (sections, genes)
    everything = sparse.vstack([_columns(s, names) for s in sections]).tocsr()
    xy_um, number = np.vstack([s.xy_um for s in sections]), section_numbers(sections)
    fold = block_folds(xy_um, n_folds=n_folds, rng=rng, groups=number)

    final, per_fold, highly_variable = select_genes(
        genes, names, everything, xy_um, groups=number, fold=fold, measured=measured_by
    )
    if not final.any():
        keys = [s.spots_key for s in sections]
        msg = (
            f"genes={genes!r}: none of them is measured and seen on the spots to learn from, of sections {keys}. Choose "
            "genes that these sections measure, or leave the sections out."
        )
        raise ValueError(msg)
    partly = int((final & ~measured_by.all(axis=0)).sum())
    if partly:
        logger.info(
            "%d of %d genes are measured by some of the sections only: learnt from those, and filled in on the others",
            partly, final.sum(),
        )  # fmt: skip
    union = np.flatnonzero(final | per_fold.any(axis=0))
    spots = stack_sections(sections, embeddings, names[union], sub_spots=sub_spots).to(device)
    projection = Projection.fit(spots.embedding, config.splits)
    spots = projection.of_spots(spots)

    name = head_name(head)
    logger.info("fitting %s on %d spots x %d genes, %d folds", name, len(spots), int(final.sum()), n_folds)
    fitted = cross_fit(
        spots, head=head, fold=fold, rng=rng, options=head_options, progress=progress, worker_device=worker_device
    )
    measured = spots.expression.cpu().numpy()

    def chosen(left_out: int) -> NDArray[np.bool_]:
        return per_fold[left_out][union]

    predicted = {name: fitted.held_out} | fitted.parts
    held_out = {each: summary(values, measured, fold=fold, chosen=chosen) for each, values in predicted.items()}
    others = [name for name in baselines if name not in held_out]
    # with many sections, a block may be a whole one, and its spots have no neighbours that are measured
    if any(len(np.unique(fold[number == one])) == 1 for one in np.unique(number)):
        logger.debug("no held-out scores of %s: folds hold whole sections", " and ".join(POSITION_ONLY))
        others = [name for name in others if name not in POSITION_ONLY]
    held_out |= compare(spots, heads=others, fold=fold, chosen=chosen, rng=rng, worker_device=worker_device)
    if baselines:
        _report(name, held_out)

    gene_scores = score(fitted.held_out, measured, fold=fold)
    chosen_names = listed[listed.isin(names[final])]  # in the order of the tables again
    keep = names[union].get_indexer(chosen_names)
    n_sections = measured_by.sum(axis=0)[union][keep]
    scores = pd.DataFrame(
        {
            "highly_variable": highly_variable[union][keep],
            "held_out_pcc": gene_scores.pcc[keep].astype(np.float32),
            "held_out_mse": gene_scores.mse[keep].astype(np.float32),
            "predictable": gene_scores.predictable[keep],
        },
        index=pd.Index(names[union][keep], name="gene"),
    )
    if (n_sections < len(sections)).any():
        scores["n_sections"] = n_sections
    intervals = _intervals(fitted.held_out[:, keep], measured[:, keep], fold=fold)
    info = {
        "split": f"blocks, {n_folds} folds, each spot predicted by heads that never saw it",
        "n_folds": n_folds,
        "n_spots": len(spots),
        "n_sections": len(sections),
        "pitch_um": spots.pitch_um,
        "spot_um": float(np.mean([s.spot_um for s in sections])),
        "unit": sections[0].values.unit,
    }
    kinds = _kinds(sections)
    if len(kinds) > 1:
        info["kinds_of_sections"] = "; ".join(f"{n} {kind}" for kind, n in kinds.items())
        logger.info("sections differ: %s", info["kinds_of_sections"])
    if any(section.merged > 1 for section in sections):
        info["merged_um"] = max(section.spot_um for section in sections if section.merged > 1)
    if n_measured is not None and n_measured > len(spots):
        info["n_measured"] = n_measured
    scores.index.name = None
    found = pd.Index(scores.index), pd.Index(names[union]), fitted.heads
    kept = replace(spots, sub_spots=None).to("cpu")
    training = training_table(fitted.losses)
    return Model(name, *found, scores, held_out, config, kept, intervals, info, training, projection)


def check_arguments(
    *,
    head: AnyHead,
    genes: int | Sequence[str] | str,
    n_folds: int,
    sections: Sequence[Section],
    head_options: dict[str, Any] | None = None,
    max_spots: int = MAX_SPOTS,
) -> pd.Index:
    """Check the arguments of :func:`fit_model` before the sections are embedded; return the genes to choose from.

    Without sections, what does not depend on them is checked.
    """
    _check_options(head, head_options)
    if not (is_whole(n_folds) and 2 <= n_folds <= 20):
        msg = f"n_folds={n_folds!r}: choose a whole number from 2 to 20."
        raise ValueError(msg)
    check_max_spots(max_spots)
    if len({section.values.unit for section in sections}) > 1:
        units = "; ".join(f"{section.spots_key!r} in {section.values.unit}" for section in sections)
        msg = (
            f"the sections do not hold expression in one unit: {units}. Name the layer that holds the counts of each, "
            "layer=, or give X the same unit in all."
        )
        raise ValueError(msg)
    names = genes_of(sections, genes) if sections else pd.Index([], dtype=str)
    if sections and len(names) == 0:
        msg = (
            "the sections have no gene in common. Check that all use the same names of genes, symbols or Ensembl ids. "
            "Where they measure different genes, genes='union' learns each from the sections that measure it."
        )
        raise ValueError(msg)
    listed = isinstance(genes, Collection) and not isinstance(genes, str) and len(genes) > 0
    if not (is_whole(genes) and genes >= 1) and not listed and not isinstance(genes, str):
        msg = f"genes={genes!r}: pass a number above 0, a list of gene names, 'all' or 'union'."
        raise ValueError(msg)
    if isinstance(genes, str) and genes not in ("all", "union"):
        msg = f"genes={genes!r}: pass a number, a list of gene names, 'all' or 'union' (one gene: genes=[{genes!r}])."
        raise ValueError(msg)
    if listed and sections:
        wanted = pd.Index([str(g) for g in cast("Sequence[str]", genes)])
        missing = wanted.difference(names)
        no_genes = {g: kind for section in sections for g, kind in section.others.items() if g in missing}
        if no_genes:
            msg = (
                f"genes: {no_genes} are no gene expression, and only genes are predicted. Leave them out of genes=, or "
                "choose from the names of genes."
            )
            raise ValueError(msg)
        if len(missing):
            close = [c for m in missing[:3] for c in difflib.get_close_matches(m, names, n=1)]
            hint = f" Similar names: {close}." if close else ""
            msg = (
                f"genes: {len(missing)} of {len(wanted)} names are not in the table ({list(missing[:5])}).{hint} "
                "Choose from its var_names."
            )
            raise ValueError(msg)
    return names


def _kinds(sections: Sequence[Section]) -> Counter[str]:
    """Count the sections of each technology, pitch and scale; scales of 0.49 and 0.5 µm per pixel are the same."""
    return Counter(f"{s.technology}, pitch {s.pitch_um:.3g} µm, {s.mpp:.1g} µm per pixel" for s in sections)


def genes_of(sections: Sequence[Section], genes: int | Sequence[str] | str) -> pd.Index:
    """Genes to choose from, in the order of the first section: those that all sections measure, or at least one."""
    of_any = not is_whole(genes) and (not isinstance(genes, str) or genes == "union")
    names = sections[0].genes
    for other in sections[1:]:
        names = names.union(other.genes, sort=False) if of_any else names.intersection(other.genes, sort=False)
    return names


def _columns(section: Section, names: pd.Index) -> sparse.csr_matrix:
    """Expression (n, len(names)), without entries for genes that the section does not measure."""
    at = section.genes.get_indexer(names)
    there = np.flatnonzero(at >= 0)
    pick = sparse.csr_matrix((np.ones(len(there), np.float32), (at[there], there)), (len(section.genes), len(names)))
    return section.expression @ pick


def _intervals(
    held_out: NDArray[np.floating], measured: NDArray[np.floating], *, fold: NDArray[np.int64]
) -> PredictionIntervals:
    """Calibrate the intervals of each gene on the spots that measure it."""
    groups = list(measured_together(measured))
    each = [calibrate(held_out[rows][:, genes], measured[rows][:, genes], fold=fold[rows]) for rows, genes in groups]
    numbers = np.empty((measured.shape[1], each[0].numbers.shape[1]), np.float32)
    for (_, genes), found in zip(groups, each, strict=True):
        numbers[genes] = found.numbers
    return replace(each[0], numbers=numbers, n_spots=len(fold))


def _check_options(head: AnyHead, options: dict[str, Any] | None) -> None:
    """Raise where a head is unknown, or does not have one of the options."""
    names = parts_of(head)
    if options and not isinstance(head, (str, type)):
        msg = (
            f"head_options={options!r}: head={head!r} is an object that has its options. Leave head_options= out, or "
            "pass its class."
        )
        raise ValueError(msg)
    given = {"head_options": {} if options is None else options}
    if len(names) > 1 and isinstance(options, dict):
        unknown = set(options) - set(names)
        if unknown:
            msg = (
                f"head_options of {sorted(unknown)}: head {head!r} takes options by name of its parts, "
                f"for example {{{names[0]!r}: {{...}}}}."
            )
            raise ValueError(msg)
        given = {f"head_options[{name!r}]": options[name] for name in names if name in options}
        names = tuple(name for name in names if name in options)
    for name, (argument, each) in zip(names, given.items(), strict=False):
        if not isinstance(each, dict):
            msg = f"{argument}={each!r}: pass a dict of arguments of the head."
            raise ValueError(msg)
        known = list(inspect.signature(get_head(name)).parameters)
        for option in each:
            if option not in known:
                choices = f"Choose from {known}" if known else "It has none"
                msg = f"head_options: head {name!r} has no option {option!r}. {choices}."
                raise ValueError(msg)
            if wrong := wrong_option(get_head(name), option, each[option]):
                msg = f"head_options: {option}={each[option]!r} of head {name!r} must be {wrong}."
                raise ValueError(msg)


def _report(head: str, held_out: dict[str, dict[str, float]]) -> None:
    message = ", ".join(f"{name} {s['pcc']:.3f}" for name, s in held_out.items())
    logger.info("held-out PCC, mean over genes: %s", message)
    better = better_baselines(head, {name: scores["pcc"] for name, scores in held_out.items()})
    if better:
        logger.warning(
            "head %r does not beat %s on held-out spots (PCC %.3f): consider head=%r",
            head, " and ".join(better), held_out[head]["pcc"], better[0],
        )  # fmt: skip
