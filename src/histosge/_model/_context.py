"""Measured spots as heads see them: tensors, and the number of each spot's section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from histosge._heads import Spots, SubSpots

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from numpy.typing import NDArray

    from histosge._embedding import SpotParts
    from histosge._heads import Head
    from histosge._section import Section

UNMEASURED = -1
"""Number of a section that has no measured spots in a context: its targets have no neighbours"""


@dataclass(frozen=True)
class Context:
    """Measured spots that a model predicts from, and its heads on their device."""

    spots: Spots
    section: int
    """Number of the predicted section, as in ``spots.section``; ``UNMEASURED`` where nothing is measured on it"""
    heads: list[tuple[float, Head, Any]]
    """Weight, head, and what the head computed from the spots alone; ``None`` where it computes nothing in advance"""


def stack_sections(
    sections: Sequence[Section],
    embeddings: Sequence[NDArray[np.float32]],
    genes: pd.Index,
    *,
    sub_spots: Sequence[SpotParts] | None = None,
) -> Spots:
    """Put the spots of several sections, and their sub-spots, into one set of tensors; sections are numbered from 0."""
    return Spots(
        torch.as_tensor(np.concatenate(embeddings)),
        torch.as_tensor(np.concatenate([s.dense(genes) for s in sections])),
        torch.as_tensor(np.concatenate([s.xy_um for s in sections]), dtype=torch.float32),
        torch.as_tensor(section_numbers(sections)),
        float(np.mean([s.pitch_um for s in sections])),
        None if sub_spots is None else _stack_sub_spots(sections, sub_spots),
    )


def section_numbers(sections: Sequence[Section]) -> NDArray[np.int64]:
    """Number of the section of each spot."""
    return np.repeat(np.arange(len(sections)), [len(s.xy_px) for s in sections])


def _stack_sub_spots(sections: Sequence[Section], each: Sequence[SpotParts]) -> SubSpots:
    before = np.cumsum([0, *(len(p.embedding) for p in each)])
    widest = max(p.index.shape[1] for p in each)
    fill = [((0, 0), (0, widest - p.index.shape[1])) for p in each]
    index = [np.pad(p.index, f) + n for p, f, n in zip(each, fill, before, strict=False)]
    weight = [np.pad(p.weight, f) for p, f in zip(each, fill, strict=True)]
    xy_um = [p.xy_px * s.mpp for p, s in zip(each, sections, strict=True)]
    return SubSpots(
        torch.as_tensor(np.concatenate([p.embedding for p in each])),
        torch.as_tensor(np.concatenate(xy_um), dtype=torch.float32),
        torch.as_tensor(np.concatenate(index)),
        torch.as_tensor(np.concatenate(weight), dtype=torch.float32),
    )
