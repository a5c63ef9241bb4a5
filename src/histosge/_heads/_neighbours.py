"""Measured spots around targets, inside the section of each target."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from histosge._geometry import nearest_spots

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from histosge._heads._protocol import Queries, Spots


def neighbours(queries: Queries, context: Spots, *, k: int) -> tuple[Tensor, Tensor, NDArray[np.float64]]:
    """Find the ``k`` nearest spots of each target, without the hidden spot at the target.

    Returns
    -------
    near
        (m, k) rows of the context, nearest first; 0 where there are fewer spots.
    present
        (m, k) whether there is such a spot.
    distance
        (m, k) in µm; 0 where there is no such spot.
    """
    index, distance, present = nearest_spots(
        queries.xy_um.cpu().numpy().astype(float),
        context.xy_um.cpu().numpy().astype(float),
        k=k,
        exclude=queries.spot_index.cpu().numpy(),
        groups=queries.section.cpu().numpy(),
        spot_groups=context.section.cpu().numpy(),
    )
    device = queries.xy_um.device
    return torch.as_tensor(index, device=device), torch.as_tensor(present, device=device), distance
