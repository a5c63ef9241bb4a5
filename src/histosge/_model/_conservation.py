"""The measurement of each spot, shrunk towards the prediction, to which its bins are scaled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from histosge._geometry import spot_by_bin
from histosge._statistics import Conservation, noise_variance, shrinkage

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from histosge._embedding import Embedder
    from histosge._geometry import Targets
    from histosge._model._context import Context
    from histosge._model._model import Model
    from histosge._section import Section


def check_conservation(section: Section, targets: Targets) -> None:
    """Raise, before the work starts, where bins cannot be scaled to the measurement of their spots."""
    if not section.measured:
        msg = "conserve=True needs measured spots, and nothing was measured on this section: leave conserve= out."
        raise ValueError(msg)
    if not targets.are_bins or np.median(targets.footprints.size_px) * section.mpp > section.spot_um / 2:
        why = f"lays bins of at most half a spot ({section.spot_um / 2:g} µm): pass bin_um="
    elif section.contiguous:
        why = "is for spots with gaps between them, not for measured bins"
    elif section.counts is None:
        why = "needs raw counts, whose noise is known: name them, layer="
    else:
        return
    msg = f"conserve=True {why}; or leave conserve= out."
    raise ValueError(msg)


def conservation_of(
    model: Model, embedder: Embedder, targets: Targets, context: Context, at_spots: NDArray[np.float32]
) -> Conservation:
    """Shrink the measurement of each spot towards the prediction of the model there, the spot in its context."""
    section = embedder.section
    check_conservation(section, targets)
    counts, row, col = section.counts, targets.array_row, targets.array_col
    if counts is None or row is None or col is None:
        msg = "conserve=True needs raw counts and a grid of bins: pass bin_um=, or leave conserve= out."
        raise ValueError(msg)
    missing = model.genes.difference(section.genes)
    if len(missing):
        msg = (
            f"conserve=True needs measured genes, and section {section.spots_key!r} does not measure {len(missing)} of "
            f"them (for example {list(missing[:3])}): leave conserve= out."
        )
        raise ValueError(msg)
    n = len(section.xy_px)
    predicted = model.predict_from(context, embedding=at_spots, xy_um=section.xy_um, spot_index=np.full(n, -1))
    columns = section.genes.get_indexer(model.genes)
    noise = noise_variance(counts[:, columns], total=np.asarray(counts.sum(axis=1)).ravel())
    shrunken = shrinkage(section.dense(model.genes), predicted, noise=noise)
    bin_px = float(targets.footprints.size_px[0])
    share = spot_by_bin(section.footprints, targets.xy_px, bin_px=bin_px, row=row, col=col)
    inner_um = section.spot_um / 2 + bin_px * section.mpp / np.sqrt(2)
    return Conservation(
        share,
        targets.xy_px * section.mpp,
        section.xy_um,
        (inner_um, max(inner_um, section.pitch_um / 2)),
        np.expm1(shrunken.mean).astype(np.float32),
        shrunken.weight.mean(0).astype(np.float32),
    )
