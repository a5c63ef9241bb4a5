"""Hold spots out, fit, predict, score: every split, with the very model that a user would get.

A trial is a section that knows only its training spots, and places where something was measured that it does not know.
A model is fitted on it from scratch, so that genes, scalings, components, stopping and prediction intervals are chosen inside.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from histosge._embedding import SpotParts
from histosge._geometry import padded
from histosge._model._context import UNMEASURED, stack_sections
from histosge._model._fit import fit_model
from histosge._section import per_target_sum
from histosge._settings import logger, progress_bar, settings
from histosge._statistics import (
    SPATIAL_WEIGHT,
    _counting_noise,
    _metrics,
    agreement,
    block_splits,
    empirical_coverage,
    find_domains,
    group_splits,
    lattice_splits,
    neighbour_average,
    pseudo_spots,
    random_splits,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from numpy.typing import NDArray

    from histosge._embedding import EmbeddingConfig
    from histosge._model._model import Model
    from histosge._section import Section
    from histosge._statistics import Split

    Floats = NDArray[np.floating]

SPLITS = ("blocks", "random", "lattice", "sections", "pseudo-spots")
PROTOCOLS = ("held-out", "published")
SCALES = (2, 4, 8)
"""Numbers of neighbours that measurements and prediction intervals are averaged over, to see what holds at coarser scales."""
_BUFFER_PITCH = 2.5
"""Reach of the context of the default head: 18 neighbours on a hexagonal array."""
_KEEP = 4
"""Of the spots of a regular array, one in so many is kept: what 4 places a spot face."""


@dataclass(frozen=True)
class Measured:
    """A section with all that was measured on it."""

    name: str
    section: Section
    embedding: NDArray[np.float32]
    """(n, d) of its spots"""
    counts: sparse.csr_matrix | None
    """(n, genes) raw counts, if there are any"""
    labels: NDArray[Any] | None = None
    """(n,) annotation of its spots, that nothing learns from"""
    parts: SpotParts | None = None
    """What lies below its spots"""


@dataclass(frozen=True)
class Plan:
    """How to hold out; what :func:`histosge.tl.evaluate` was asked for."""

    split: str
    protocol: str
    n_splits: int
    n_repeats: int
    buffer_um: float | None = None
    block_um: float | None = None
    keep: int = _KEEP


@dataclass(frozen=True)
class Trial:
    """What a model may learn from, and what it is asked."""

    name: str
    """Name of the section scored"""
    repeat: int
    fold: int
    sections: list[Section]
    """Sections that know their training spots only"""
    embeddings: list[NDArray[np.float32]]
    place: NDArray[np.float32]
    """(m, d) embeddings of the places"""
    xy_um: NDArray[np.float64]
    """(m, 2) in the coordinates of their section"""
    spot_index: NDArray[np.int64]
    """(m,) training spot at the place, hidden from it; -1 for none"""
    truth: sparse.csr_matrix
    """(m, genes of the first section) log1p expression measured there"""
    rows: NDArray[np.int64]
    """(m,) rows of the places among the spots of the section scored"""
    ceiling: pd.Series | None = None
    """Noise ceiling of ``truth`` by gene, where this is not what was measured on the section"""
    parts: list[SpotParts] | None = None
    """Sub-spots of the training spots of each section"""
    measured: bool = True
    """Whether the places are of the section that is learnt from"""


def trials(several: Sequence[Measured], plan: Plan, *, rng: np.random.Generator) -> Iterator[Trial]:
    """Lay out everything that is to be fitted and scored."""
    for repeat in range(plan.n_repeats):
        if plan.split == "sections":
            yield from _across_sections(several, repeat)
            continue
        for one in several:
            if plan.split == "pseudo-spots":
                yield from _pseudo_spots(one, plan, repeat, rng=rng)
            else:
                for split in _splits(one.section, plan, rng=rng):
                    yield _within(one, split, plan, repeat)


def _splits(section: Section, plan: Plan, *, rng: np.random.Generator) -> list[Split]:
    if plan.split == "blocks":
        buffer_um = _BUFFER_PITCH * section.pitch_um if plan.buffer_um is None else plan.buffer_um
        if plan.block_um is not None:
            block = {"buffer_um": buffer_um, "block_um": plan.block_um}
            return block_splits(section.xy_um, n_splits=plan.n_splits, rng=rng, **block)
        # blocks four buffers wide, or buffers would leave nothing; on small sections one or two blocks a fold
        area = len(section.xy_um) * section.pitch_um**2
        block_um = min(max(4 * buffer_um, (area / plan.n_splits / 6) ** 0.5), (area / plan.n_splits / 1.5) ** 0.5)
        return block_splits(section.xy_um, n_splits=plan.n_splits, rng=rng, buffer_um=buffer_um, block_um=block_um)
    if plan.split == "lattice":
        if section.lattice is None:
            msg = (
                f"split='lattice': the spots of {section.spots_key!r} lie on no lattice, so that none can be thinned "
                "regularly. Choose split='blocks' or 'random'."
            )
            raise ValueError(msg)
        return lattice_splits(section.lattice, keep=plan.keep, n_splits=min(plan.n_splits, plan.keep), rng=rng)
    return random_splits(len(section.xy_px), n_splits=plan.n_splits, rng=rng)


def _within(one: Measured, split: Split, plan: Plan, repeat: int) -> Trial:
    section = one.section
    test = split.test
    spot_index = np.full(len(test), -1)
    if plan.protocol == "published":  # the paper scores all spots, those trained on as well
        test = np.arange(len(section.xy_px))
        spot_index = np.full(len(test), -1)
        spot_index[split.train] = np.arange(len(split.train))
    known = section.take(split.train)
    if plan.split == "lattice":  # the unit that heads see distances in is that of the array that is left
        known = replace(known, pitch_um=section.pitch_um * np.sqrt(plan.keep), lattice=None)
    return Trial(
        one.name,
        repeat,
        split.fold,
        [known],
        [one.embedding[split.train]],
        one.embedding[test],
        section.xy_um[test],
        spot_index,
        section.expression[test],
        test,
        parts=None if one.parts is None else [one.parts.take(split.train)],
    )


def _across_sections(several: Sequence[Measured], repeat: int) -> Iterator[Trial]:
    # a gene that a section was not measured for is no zero: it can be neither learnt nor scored there
    genes = several[0].section.genes
    for other in several[1:]:
        genes = genes.intersection(other.section.genes, sort=False)
    sections = [
        replace(m.section, expression=m.section.expression[:, m.section.genes.get_indexer(genes)], genes=genes)
        for m in several
    ]
    for split in group_splits(np.arange(len(several))):
        (left,) = split.test
        section = sections[left]
        n = len(section.xy_px)
        yield Trial(
            several[left].name,
            repeat,
            split.fold,
            [sections[i] for i in split.train],
            [several[i].embedding for i in split.train],
            several[left].embedding,
            section.xy_um,
            np.full(n, -1),
            section.expression,
            np.arange(n),
            parts=_parts_of([several[i] for i in split.train]),
            measured=False,
        )


def _parts_of(several: Sequence[Measured]) -> list[SpotParts] | None:
    parts = [one.parts for one in several if one.parts is not None]
    return parts if len(parts) == len(several) else None


def _pseudo_spots(one: Measured, plan: Plan, repeat: int, *, rng: np.random.Generator) -> Iterator[Trial]:
    """Merge spots and their rings into big spots of half the counts; the other half of each spot is the truth.

    With the same counts on both sides, each spot's noise would sit in its own big spot, and whatever copies the big
    spot would look good (docs/benchmarks.md).
    """
    section = one.section
    if one.counts is None or section.lattice is None:
        what = "raw counts (whole numbers)" if one.counts is None else "spots on a lattice"
        msg = f"split='pseudo-spots' needs {what}, which {section.spots_key!r} has not. Choose another split."
        raise ValueError(msg)
    for fold in range(plan.n_splits):
        group = pseudo_spots(section.lattice, rng=rng)
        members = np.flatnonzero(group >= 0)
        big = sparse.csr_matrix((np.ones(len(members)), (group[members], members)), shape=(group.max() + 1, len(group)))
        size = np.asarray(big.sum(1)).ravel()
        half, other = _counting_noise.thin(one.counts, rng=rng)
        truth = other[members]
        seen = np.asarray(truth.sum(1)).ravel() > 0
        kind = section.lattice.kind
        merged = replace(
            section,
            instances=pd.RangeIndex(len(size)),
            xy_px=(big @ section.xy_px) / size[:, None],
            expression=per_target_sum(sparse.csr_matrix(big @ half)),
            # the centres of flowers of 7 (of 5) lie on a lattice of their own
            pitch_um=section.pitch_um * np.sqrt(7 if kind == "hexagonal" else 5),
            lattice=None,
        )
        yield Trial(
            one.name,
            repeat,
            fold,
            [merged],
            [((big @ one.embedding) / size[:, None]).astype(np.float32)],
            one.embedding[members],
            section.xy_um[members],
            np.full(len(members), -1),
            per_target_sum(truth),
            members,
            # half the counts are noisier than all of them
            pd.Series(_counting_noise.noise_ceiling(truth[seen]), section.genes),
            [_members(one, big)],
        )


def _members(one: Measured, big: sparse.csr_matrix) -> SpotParts:
    """Spots as the parts of big spots, (n_big, n)."""
    index, weight = padded(big.multiply(1 / big.sum(1)).tocsr())
    return SpotParts(one.embedding, one.section.xy_px, index, weight.astype(np.float32))


def evaluate(
    several: Sequence[Measured],
    plan: Plan,
    *,
    heads: Sequence[str],
    config: EmbeddingConfig,
    genes: int | Sequence[str] | str,
    n_folds: int,
    rng: np.random.Generator,
    device: torch.device,
    head_options: dict[str, dict[str, Any]] | None = None,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Score every head in every trial: one row for each gene."""
    ceilings = {one.name: _ceiling(one) for one in several}
    by_name = {one.name: one for one in several}
    tables, told = [], []
    plans = list(trials(several, plan, rng=rng))
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
                        # every head of a trial deals the same folds
                        rng=np.random.default_rng(seed),
                        device=device,
                        baselines=(),
                        head_options=(head_options or {}).get(head),
                        progress=False,
                    )
                predicted, measured = ask(model, trial, device=device)
                table = score_genes(predicted, measured, model, trial, plan)
                ceiling = ceilings[trial.name] if trial.ceiling is None else trial.ceiling
                table["ceiling"] = ceiling.reindex(table["gene"]).to_numpy()
                tables.append(table)
                if by_name[trial.name].labels is not None:
                    told.append((trial, head, model.genes, predicted))
                bar.update()
                bar.set_postfix(head=head, pcc=f"{table['pcc'].mean():.3f}")
    result = pd.concat(tables, ignore_index=True)
    if told:
        result = result.merge(_domains_of(told, by_name), on=["section", "repeat", "head"], how="left")
    return result


def ask(model: Model, trial: Trial, *, device: torch.device) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Predicted and measured (m, genes) at the places of a trial."""
    spots = model.projection.of_spots(stack_sections(trial.sections, trial.embeddings, model.context_genes))
    context = model.condition(spots, section=0 if trial.measured else UNMEASURED, device=device)
    predicted = model.predict_from(context, places=trial.place, xy_um=trial.xy_um, spot_index=trial.spot_index)
    columns = trial.sections[0].genes.get_indexer(model.genes)
    return predicted, np.asarray(trial.truth[:, columns].todense(), np.float32)


def score_genes(predicted: Floats, measured: Floats, model: Model, trial: Trial, plan: Plan) -> pd.DataFrame:
    """Score one head in one trial, gene by gene."""
    xy = trial.xy_um
    known = np.vstack([s.dense(model.genes) for s in trial.sections])
    error = predicted - measured
    mse, mse_mean = (error**2).mean(0), ((measured - known.mean(0)) ** 2).mean(0)
    table = pd.DataFrame(
        {
            "section": trial.name,
            "split": plan.split,
            "protocol": plan.protocol,
            "repeat": trial.repeat,
            "fold": trial.fold,
            "head": model.head,
            "gene": np.asarray(model.genes),
            "n_train": len(known),
            "n_test": len(measured),
            "pcc": _metrics.correlation(predicted, measured),
            "spearman": _metrics.rank_correlation(predicted, measured),
            "mse": mse,
            "mae": np.abs(error).mean(0),
            "mse_mean": mse_mean,
            "skill": np.where(mse_mean > 0, 1 - mse / np.where(mse_mean > 0, mse_mean, 1), 0.0),
            "morans_i": _metrics.morans_i(predicted, xy),
            "morans_i_measured": _metrics.morans_i(measured, xy),
            "gene_agreement": _metrics.gene_agreement(predicted, measured),
            "ssim": _metrics.structural_similarity(predicted, measured, xy=xy),
        }
    )
    lower, upper = model.intervals.interval(predicted)
    table["coverage"] = empirical_coverage(measured, lower, upper)
    table["width"] = (upper - lower).mean(0)
    for k in SCALES:
        each = (neighbour_average(v, xy=xy, k=k) for v in (measured, lower, upper))
        table[f"coverage_{k}"] = empirical_coverage(*each)
    return table


def _ceiling(one: Measured) -> pd.Series:
    """Highest correlation that counting noise allows, by gene; NaN where there are no counts to tell it from."""
    genes = one.section.genes
    if one.counts is None:
        logger.info("no noise ceiling: the table of %r holds no raw counts", one.section.spots_key)
        return pd.Series(np.nan, genes)
    return pd.Series(_counting_noise.noise_ceiling(one.counts), genes)


def _domains_of(
    told: list[tuple[Trial, str, pd.Index, NDArray[np.float32]]], by_name: dict[str, Measured]
) -> pd.DataFrame:
    """Agreement with the labels of domains found on predicted and on measured expression, all settings alike."""
    found = []
    for section, repeat, head in dict.fromkeys((t.name, t.repeat, h) for t, h, _, _ in told):
        parts = [(t, g, p) for t, h, g, p in told if (t.name, t.repeat, h) == (section, repeat, head)]
        genes = parts[0][1]
        for _, other, _ in parts[1:]:  # each fold chose its own: what all chose is compared
            genes = genes.intersection(other, sort=False)
        one = by_name[section]
        scores: dict[str, Any] = {"section": section, "repeat": repeat, "head": head}
        found.append(scores)
        if len(genes) == 0:
            logger.warning("no gene was chosen in every fold of section %r: ari and nmi are NaN", section)
            scores |= dict.fromkeys(("ari", "nmi", "ari_measured", "nmi_measured"), np.nan)
            continue
        predicted = np.full((len(one.section.xy_px), len(genes)), np.nan, np.float32)
        for trial, mine, values in parts:
            predicted[trial.rows] = values[:, mine.get_indexer(genes)]
        rows = np.flatnonzero(~pd.isna(one.labels))
        for name, values in (("", predicted), ("_measured", one.section.dense(genes))):
            domains = find_domains(
                values, one.section.xy_px, resolution=1.0, n_domains=None, n_pcs=30, n_neighbours=15,
                spatial_weight=SPATIAL_WEIGHT, rng=0,
            )  # fmt: skip
            agreed = agreement(domains[rows], np.asarray(one.labels)[rows].astype(str))
            scores |= {f"ari{name}": agreed["ari"], f"nmi{name}": agreed["nmi"]}
    return pd.DataFrame(found)
