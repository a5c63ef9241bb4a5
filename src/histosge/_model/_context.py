"""Measured spots as heads see them: tensors, the sections far apart in one plane."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from histosge._heads import Parts, Spots

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from numpy.typing import NDArray

    from histosge._embedding import SpotParts
    from histosge._section import Section

FAR_UM = 204_800.0
"""Sections of one model are laid this far apart, so that neighbours are always of one section.

A whole number of the published head's longest waves (128 pitches) for pitches of 2, 8, 16, 100 and 200 µm, so that a
section has the same position code in training and in prediction.
"""


def stack_sections(
    sections: Sequence[Section],
    embeddings: Sequence[NDArray[np.float32]],
    genes: pd.Index,
    *,
    parts: Sequence[SpotParts] | None = None,
) -> Spots:
    """Lay the spots of several sections, and their parts, far apart in one plane."""
    each = [
        spots_of(s, e, s.dense(genes), offset_um=FAR_UM * i)
        for i, (s, e) in enumerate(zip(sections, embeddings, strict=True))
    ]
    return Spots(
        torch.cat([s.embedding for s in each]),
        torch.cat([s.expression for s in each]),
        torch.cat([s.xy_um for s in each]),
        float(np.mean([s.pitch_um for s in each])),
        None if parts is None else _stack_parts(sections, parts),
    )


def _stack_parts(sections: Sequence[Section], parts: Sequence[SpotParts]) -> Parts:
    before = np.cumsum([0, *(len(p.embedding) for p in parts)])
    widest = max(p.index.shape[1] for p in parts)
    fill = [((0, 0), (0, widest - p.index.shape[1])) for p in parts]
    index = [np.pad(p.index, f) + n for p, f, n in zip(parts, fill, before, strict=False)]
    weight = [np.pad(p.weight, f) for p, f in zip(parts, fill, strict=True)]
    xy_um = [p.xy_px * s.mpp + [FAR_UM * i, 0.0] for i, (p, s) in enumerate(zip(parts, sections, strict=True))]
    return Parts(
        torch.as_tensor(np.concatenate([p.embedding for p in parts])),
        torch.as_tensor(np.concatenate(xy_um), dtype=torch.float32),
        torch.as_tensor(np.concatenate(index)),
        torch.as_tensor(np.concatenate(weight), dtype=torch.float32),
    )


def spots_of(
    section: Section, embedding: NDArray[np.float32], expression: NDArray[np.float32], offset_um: float = 0.0
) -> Spots:
    xy = torch.as_tensor(section.xy_um + [offset_um, 0.0], dtype=torch.float32)
    return Spots(torch.as_tensor(embedding), torch.as_tensor(expression), xy, section.pitch_um)
