"""Contiguous bins, merged to the scale at which their counts carry signal.

A bin of 8 µm holds a few hundred counts of all genes. log1p of such counts is mostly noise, and its mean is far below
log1p of the expected counts: docs/benchmarks.md.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from histosge._section._values import COUNTS
from histosge._settings import logger

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from histosge._section._section import Section

ENOUGH_COUNTS = 800
"""Bins are merged until half of them hold as many."""
_TIMES = (1, 2, 4)
"""How many bins the edge of a merged one may have."""


def merge_bins(section: Section, merge_um: float | None) -> Section:
    """Merge contiguous bins to an edge of ``merge_um``, ``None`` for :func:`merged_edge`; log it."""
    times = _times(section, merged_edge(section) if merge_um is None else merge_um)
    if times == 1:
        return section
    counts = float(np.median(_totals(section)))
    found = _merged(section, times)
    logger.info(
        "merging %s bins of %g µm with %g counts each (median), %d x %d, to %s bins of %g µm (merge_um)",
        f"{len(section.xy_px):,}", section.spot_um, counts, times, times, f"{len(found.xy_px):,}", found.spot_um,
    )  # fmt: skip
    return found


def merged_edge(section: Section) -> float:
    """Smallest edge in µm at which half of the bins hold enough counts; that of the spots where nothing is merged."""
    if not _can_be_merged(section):
        return section.spot_um
    counts = float(np.median(_totals(section)))
    return section.spot_um * next((k for k in _TIMES if counts * k**2 >= ENOUGH_COUNTS), _TIMES[-1])


def _merged(section: Section, times: int) -> Section:
    """Sum the counts of squares of ``times`` x ``times`` bins, as if the section had been measured in larger bins.

    Squares of which less than half was measured, at the border of the tissue, are left out.
    """
    lattice, measured = section.lattice, section.counts
    if lattice is None or measured is None:
        return section
    first = lattice.index.min(axis=0)
    sites, square, n_bins = np.unique((lattice.index - first) // times, axis=0, return_inverse=True, return_counts=True)
    kept = 2 * n_bins >= times**2
    number = np.where(kept, np.cumsum(kept) - 1, -1)[square.reshape(-1)]
    bins = np.flatnonzero(number >= 0)
    number, n = number[bins], int(kept.sum())
    sums = sparse.csr_matrix((np.ones(len(bins), np.float32), (number, bins)), shape=(n, len(square)))
    counts = sparse.csr_matrix(sums @ measured)
    # the middle of the square, seen from each of its bins
    sites = sites[kept]
    middle = first + sites * times + (times - 1) / 2
    away = middle[number] - lattice.index[bins]
    centre_px = np.column_stack(
        [np.bincount(number, at, n) for at in (section.xy_px[bins] + away @ lattice.basis).T]
    ) / np.bincount(number, minlength=n)[:, None]  # fmt: skip
    at_middle = np.lexsort((np.abs(away).max(axis=1), number))  # the bin that is nearest to the middle, for labels
    rows = section.rows[bins[at_middle[np.searchsorted(number[at_middle], np.arange(n))]]]
    coarse = replace(
        lattice,
        pitch_px=lattice.pitch_px * times,
        basis=lattice.basis * times,
        origin=lattice.origin + (first + (times - 1) / 2) @ lattice.basis,
        index=sites,
    )
    return replace(
        section,
        instances=pd.RangeIndex(n),
        xy_px=centre_px,
        expression=section.values.expression(counts),
        counts=counts,
        pitch_um=section.pitch_um * times,
        spot_um=section.spot_um * times,
        lattice=coarse,
        rows=rows,
        merged=times,
    )


def _totals(section: Section) -> NDArray[np.float64]:
    return np.asarray(section.counts.sum(axis=1), np.float64).ravel()  # type: ignore[union-attr]


def _can_be_merged(section: Section) -> bool:
    return (
        section.contiguous and section.lattice is not None and section.counts is not None and section.values == COUNTS
    )


def _times(section: Section, merge_um: float) -> int:
    """How many bins the edge of a merged one has; 1 where bins stay, and for spots."""
    if not section.contiguous or section.lattice is None:
        return 1
    times = merge_um / section.spot_um
    if not (np.isfinite(times) and times > 0.99 and abs(times - round(times)) < 0.01):
        msg = (
            f"merge_um={merge_um!r} is no whole multiple of the bins of {section.spots_key!r}, {section.spot_um:g} µm: "
            f"pass {section.spot_um:g} to keep them, {2 * section.spot_um:g} or {4 * section.spot_um:g}."
        )
        raise ValueError(msg)
    if round(times) > 1 and not _can_be_merged(section):
        msg = (
            f"merge_um={merge_um!r} adds up counts, and {section.spots_key!r} holds {section.values.input}: name the "
            "layer that holds raw counts, layer=, or leave merge_um= out."
        )
        raise ValueError(msg)
    return round(times)
