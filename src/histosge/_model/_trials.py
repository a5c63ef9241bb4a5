"""Trials: sections with their training spots only, and the targets whose measurement is hidden.

A new split is a function here and an entry in ``_SPLITS``; how spots are drawn is in ``_statistics/_splits.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from histosge._embedding import SpotParts
from histosge._geometry import padded
from histosge._section import per_target_sum
from histosge._statistics import (
    block_splits,
    group_splits,
    lattice_splits,
    noise_ceiling,
    pseudo_spots,
    random_splits,
    thin,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from histosge._section import Section
    from histosge._statistics import Split

PROTOCOLS = ("held-out", "published")
_BUFFER_PITCH = 2.5
"""Reach of the context of the default head: 18 neighbours on a hexagonal array."""
_KEEP = 4
"""Every fourth spot of a regular array is kept: as with 4 targets per spot."""


@dataclass(frozen=True)
class Measured:
    """A section, with embeddings and annotation of its spots."""

    name: str
    section: Section
    embedding: NDArray[np.float32]
    """(n, d) of its spots"""
    labels: NDArray[Any] | None = None
    """(n,) annotation of its spots; nothing learns from it"""
    parts: SpotParts | None = None
    """Sub-spots of its spots"""


@dataclass(frozen=True)
class Plan:
    """How to hold out: the arguments of :func:`histosge.tl.evaluate`."""

    split: str
    protocol: str
    n_splits: int
    n_repeats: int
    buffer_um: float | None = None
    block_um: float | None = None
    keep: int = _KEEP


@dataclass(frozen=True)
class Trial:
    """What a model learns from, and the targets where it is scored."""

    name: str
    """Name of the section that is scored"""
    repeat: int
    fold: int
    sections: list[Section]
    """Sections with their training spots only"""
    embeddings: list[NDArray[np.float32]]
    place: NDArray[np.float32]
    """(m, d) embeddings of the targets"""
    xy_um: NDArray[np.float64]
    """(m, 2) positions in the coordinates of their section"""
    spot_index: NDArray[np.int64]
    """(m,) training spot at the target, hidden from it; -1 for none"""
    truth: sparse.csr_matrix
    """(m, genes) log1p expression measured there"""
    genes: pd.Index
    """Genes of ``truth``"""
    rows: NDArray[np.int64]
    """(m,) rows of the targets among the spots of the section that is scored"""
    ceiling: pd.Series | None = None
    """Noise ceiling of ``truth`` by gene, where the truth is not the measurement of the section"""
    parts: list[SpotParts] | None = None
    """Sub-spots of the training spots of each section"""
    measured: bool = True
    """Whether the targets lie on a section with training spots"""


def trials(sections: Sequence[Measured], plan: Plan, *, rng: np.random.Generator) -> Iterator[Trial]:
    """Make all trials of a plan."""
    for repeat in range(plan.n_repeats):
        yield from _SPLITS[plan.split](sections, plan, repeat, rng)


def _blocks(sections: Sequence[Measured], plan: Plan, repeat: int, rng: np.random.Generator) -> Iterator[Trial]:
    """Hold out contiguous blocks with a buffer."""
    for measured in sections:
        section = measured.section
        buffer_um = _BUFFER_PITCH * section.pitch_um if plan.buffer_um is None else plan.buffer_um
        block_um = plan.block_um
        if block_um is None:
            # four buffers wide, since buffers around smaller blocks leave few spots; on small sections one or two
            # blocks a fold
            area = len(section.xy_um) * section.pitch_um**2
            block_um = min(max(4 * buffer_um, (area / plan.n_splits / 6) ** 0.5), (area / plan.n_splits / 1.5) ** 0.5)
        for split in block_splits(
            section.xy_um, n_splits=plan.n_splits, rng=rng, buffer_um=buffer_um, block_um=block_um
        ):
            yield _within(measured, split, plan, repeat)


def _random(sections: Sequence[Measured], plan: Plan, repeat: int, rng: np.random.Generator) -> Iterator[Trial]:
    """Hold out random halves."""
    for measured in sections:
        for split in random_splits(len(measured.section.xy_px), n_splits=plan.n_splits, rng=rng):
            yield _within(measured, split, plan, repeat)


def _lattice(sections: Sequence[Measured], plan: Plan, repeat: int, rng: np.random.Generator) -> Iterator[Trial]:
    """Keep a regular part of the spots, and hold out the spots between them."""
    for measured in sections:
        if measured.section.lattice is None:
            msg = (
                f"split='lattice': the spots of {measured.section.spots_key!r} lie on no lattice, so that they cannot "
                "be thinned regularly. Choose split='blocks' or 'random'."
            )
            raise ValueError(msg)
        n_splits = min(plan.n_splits, plan.keep)
        for split in lattice_splits(measured.section.lattice, keep=plan.keep, n_splits=n_splits, rng=rng):
            trial = _within(measured, split, plan, repeat)
            # heads see distances in pitches: in those of the remaining array
            pitch_um = measured.section.pitch_um * np.sqrt(plan.keep)
            yield replace(trial, sections=[replace(trial.sections[0], pitch_um=pitch_um, lattice=None)])


def _within(measured: Measured, split: Split, plan: Plan, repeat: int) -> Trial:
    section = measured.section
    test = split.test
    spot_index = np.full(len(test), -1)
    if plan.protocol == "published":  # the paper scores all spots, the training spots too
        test = np.arange(len(section.xy_px))
        spot_index = np.full(len(test), -1)
        spot_index[split.train] = np.arange(len(split.train))
    return Trial(
        measured.name,
        repeat,
        split.fold,
        [section.take(split.train)],
        [measured.embedding[split.train]],
        measured.embedding[test],
        section.xy_um[test],
        spot_index,
        section.expression[test],
        section.genes,
        test,
        parts=None if measured.parts is None else [measured.parts.take(split.train)],
    )


def _sections(sections: Sequence[Measured], plan: Plan, repeat: int, rng: np.random.Generator) -> Iterator[Trial]:
    """Hold out one section after the other. None of its spots are in the training set."""
    of_each = [m.section for m in sections]
    for split in group_splits(np.arange(len(sections))):
        (left,) = split.test
        known = [sections[i] for i in split.train]
        parts = [m.parts for m in known if m.parts is not None]
        n = len(of_each[left].xy_px)
        yield Trial(
            sections[left].name,
            repeat,
            split.fold,
            [of_each[i] for i in split.train],
            [m.embedding for m in known],
            sections[left].embedding,
            of_each[left].xy_um,
            np.full(n, -1),
            of_each[left].expression,
            of_each[left].genes,
            np.arange(n),
            parts=parts if len(parts) == len(known) else None,
            measured=False,
        )


def _pseudo_spots(sections: Sequence[Measured], plan: Plan, repeat: int, rng: np.random.Generator) -> Iterator[Trial]:
    """Merge spots and their rings into big spots of half the counts; the other half of each spot is the truth.

    With the same counts on both sides, the big spot would contain the noise of each of its spots, and a copy of the big
    spot would score well (docs/benchmarks.md).
    """
    for measured in sections:
        section = measured.section
        if section.counts is None or section.lattice is None:
            what = "raw counts (whole numbers)" if section.counts is None else "spots on a lattice"
            msg = f"split='pseudo-spots' needs {what}, which {section.spots_key!r} does not have. Choose another split."
            raise ValueError(msg)
        # counts are drawn gene by gene: not in the order of the table
        columns = section.genes.argsort()
        by_name = replace(measured, section=section.with_genes(section.genes[columns]))
        for fold in range(plan.n_splits):
            group = pseudo_spots(section.lattice, rng=rng)
            half, other = thin(section.counts[:, columns], rng=rng)
            yield pseudo_trial(by_name, group, half, other, repeat=repeat, fold=fold)


def pseudo_trial(
    measured: Measured,
    group: NDArray[np.int64],
    half: sparse.csr_matrix,
    other: sparse.csr_matrix,
    *,
    repeat: int = 0,
    fold: int = 0,
) -> Trial:
    """Learn from big spots of one half of the counts; ``group`` (n,) is the big spot of each spot, -1 for none."""
    section = measured.section
    members = np.flatnonzero(group >= 0)
    big = sparse.csr_matrix((np.ones(len(members)), (group[members], members)), shape=(group.max() + 1, len(group)))
    size = np.asarray(big.sum(1)).ravel()
    truth = other[members]
    seen = np.asarray(truth.sum(1)).ravel() > 0
    hexagonal = section.lattice is not None and section.lattice.kind == "hexagonal"
    merged = replace(
        section,
        instances=pd.RangeIndex(len(size)),
        rows=np.arange(len(size)),
        counts=None,
        xy_px=(big @ section.xy_px) / size[:, None],
        expression=per_target_sum(sparse.csr_matrix(big @ half)),
        # the centres of flowers of 7 (of 5) lie on a lattice of their own
        pitch_um=section.pitch_um * np.sqrt(7 if hexagonal else 5),
        lattice=None,
    )
    return Trial(
        measured.name,
        repeat,
        fold,
        [merged],
        [((big @ measured.embedding) / size[:, None]).astype(np.float32)],
        measured.embedding[members],
        section.xy_um[members],
        np.full(len(members), -1),
        per_target_sum(truth),
        section.genes,
        members,
        # half the counts are noisier than all of them
        pd.Series(noise_ceiling(truth[seen]), section.genes),
        [_members(measured, big)],
    )


def _members(measured: Measured, big: sparse.csr_matrix) -> SpotParts:
    """Spots as the sub-spots of big spots; ``big`` (n_big, n) is 1 where a spot belongs to a big spot."""
    index, weight = padded(big.multiply(1 / big.sum(1)).tocsr())
    return SpotParts(measured.embedding, measured.section.xy_px, index, weight.astype(np.float32))


_SPLITS: dict[str, Callable[[Sequence[Measured], Plan, int, np.random.Generator], Iterator[Trial]]] = {
    "blocks": _blocks,
    "random": _random,
    "lattice": _lattice,
    "sections": _sections,
    "pseudo-spots": _pseudo_spots,
}
SPLITS = tuple(_SPLITS)
