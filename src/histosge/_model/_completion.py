"""Genes that only some sections measure: scored where they are measured, and filled in where they are not."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from histosge._heads import Queries, Spots, get_head

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Which = NDArray[np.int64] | slice

_ALL = slice(None)


def complete(spots: Spots, *, by: Spots | None = None) -> Spots:
    """Fill in the genes that the section of a spot does not measure (NaN).

    Each is a ridge regression on the genes that all measure and on the embedding, learnt from the spots that measure
    it. Like the components that heads compute in, it is a linear function of other genes and the image. A gene that
    nothing measures is 0.

    Parameters
    ----------
    spots
        Spots of one or more sections.
    by
        Spots of other sections, to learn from as well.
    """
    if not spots.expression.isnan().any():
        return spots
    n, device = len(spots), spots.embedding.device
    embedding, expression = spots.embedding, spots.expression.clone()
    if by is not None:
        embedding, expression = torch.cat([embedding, by.embedding]), torch.cat([expression, by.expression])
    groups = list(measured_together(expression.cpu().numpy()))
    shared = [expression[:, genes] for rows, genes in groups if isinstance(rows, slice)]
    known = torch.cat([*shared, embedding], dim=1)
    nowhere = known.new_zeros(len(known), 2)  # positions and sections tell nothing here

    for rows, genes in groups:
        if isinstance(rows, slice):
            continue
        there = torch.zeros(len(known), dtype=torch.bool, device=device)
        there[torch.as_tensor(rows, device=device)] = True
        left = torch.nonzero(~there[:n])[:, 0]
        columns = torch.as_tensor(genes, device=device)
        if len(rows) == 0:
            expression[:, columns] = 0.0
            continue
        section = there.long()
        everything = Spots(known, expression[:, columns], nowhere, section, spots.pitch_um)
        ridge = get_head("ridge")().fit(everything.take(there), rng=np.random.default_rng(0))
        at = Queries.of(everything.take(left), hidden=False)
        expression[left[:, None], columns] = ridge.predict(at, context=everything).clamp_min(0)
    return replace(spots, expression=expression[:n])


def measured_together(measured: NDArray[np.floating]) -> Iterator[tuple[Which, Which]]:
    """Rows (spots) and columns (genes) of (n, g) values without NaN, for each set of genes with the same rows.

    Rows of genes without NaN are ``slice(None)``, and so are columns where there is no NaN at all, the usual case.
    """
    absent = np.isnan(measured)
    partly = absent.any(axis=0)
    if not partly.any():
        yield _ALL, _ALL
        return
    if not partly.all():
        yield _ALL, np.flatnonzero(~partly)
    patterns, which = np.unique(absent[:, partly], axis=1, return_inverse=True)
    for i, pattern in enumerate(patterns.T):
        yield np.flatnonzero(~pattern), np.flatnonzero(partly)[np.ravel(which) == i]
