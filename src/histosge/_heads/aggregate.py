"""A network that learns from sub-spots: a spot measures the mean of its sub-spots, and the loss is that of the mean.

Notable choices, each measured by benchmarks/aggregate.py:
- the network of `in-context` predicts at every sub-spot, from its embedding and position. Predictions are turned into
  rates, and their weighted mean is compared with the measurement: rates are additive, log1p values are not. Mean
  embeddings of spots vary less than those of the sub-spots that are predicted
- a rate is expm1 of a softplus: never negative, and nearly log-linear where a gene is expressed
- the sub-spots of a spot share its nearest measured spots, without the spot itself; only relative positions differ
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import softplus

from histosge._heads._attention import Attention
from histosge._heads._protocol import Spots, SubSpots
from histosge._heads._state import fitted
from histosge._heads.in_context import InContext

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from histosge._heads._protocol import Expansion
    from histosge._heads._space import Space

_BEND = 4.0
"""Sharpness of the softplus: it is nearly linear above about a quarter, in log1p units."""
_MOST = 9.0
"""Largest log1p rate: 8,100 of 10,000 counts in one gene."""


class _Rates(Attention):
    """Attention with an output layer from components to rates."""

    base: Tensor
    """(G,) initial rates, before the softplus"""

    def __init__(self, n_genes: int, *sizes: Any) -> None:
        super().__init__(*sizes)
        # weight decay pulls parameters to 0: so the mean is a buffer, and a difference from it is learnt
        self.register_buffer("base", torch.zeros(n_genes))
        self.step = nn.Parameter(torch.zeros(n_genes))

    def log_rate(self, components: Tensor, axes: Tensor) -> Tensor:
        """log1p of the expected counts per 10,000, (..., G), of components (..., Q)."""
        return softplus(components @ axes + self.base + self.step, beta=_BEND).clamp(max=_MOST)


class Aggregate(InContext):
    """Attention of a target over its nearest measured spots, learnt through the mean of each spot's sub-spots.

    Arguments are those of :class:`InContext`. Without sub-spots, each spot is its own sub-spot.
    """

    name: ClassVar[str] = "aggregate"
    learns_sub_spots: ClassVar[bool] = True
    network: _Rates | None

    def _below(self, spots: Spots) -> SubSpots:
        below = spots.sub_spots or SubSpots.whole(spots)
        _check(below, len(spots))
        return below

    def _objective(self, spots: Spots, below: SubSpots, learn: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        space, network = fitted(self.space, self), fitted(self.network, self)
        mean = torch.log1p(torch.expm1(spots.expression[learn]).mean(0)).clamp_min(1e-3)
        network.base.copy_(mean + torch.log1p(-torch.exp(-_BEND * mean)) / _BEND)  # inverse of the softplus
        axes = space.gene_axes * space.gene_spread[:, None]  # (Q, G)
        # in units of the error of the mean, so that gradient clipping does not depend on the data
        plain = torch.expm1(mean).expand(len(learn), -1)
        with torch.no_grad():
            unit = float(self._error(plain, spots, learn).abs().clamp_min(1e-6))

        def objective(predicted: Tensor, rows: Tensor) -> Tensor:
            rate = torch.expm1(network.log_rate(predicted, axes))  # (B, M, G)
            return self._error((rate * below.weight[rows][:, :, None]).sum(1), spots, rows) / unit

        return objective

    def _error(self, rate: Tensor, spots: Spots, rows: Tensor) -> Tensor:
        """Squared error of mean rates (b, G), in counts per 10,000, at the spots ``rows``, in log1p units."""
        return (torch.log1p(rate) - spots.expression[rows]).square().mean()

    def expansion(self, columns: Tensor | None = None) -> Expansion:
        space, network = fitted(self.space, self), fitted(self.network, self)
        axes, start = space.gene_axes * space.gene_spread[:, None], network.base + network.step
        if columns is not None:
            axes, start = axes[:, columns], start[columns]

        return lambda components: softplus(torch.addmm(start, components, axes), beta=_BEND).clamp_(max=_MOST)

    def _build(self, space: Space) -> _Rates:
        c = self.config
        sizes = len(space.image_axes), len(space.gene_axes), c["width"], c["n_heads"], c["dropout"]
        return _Rates(len(space.gene_mean), *sizes)


def _check(below: SubSpots, n_spots: int) -> None:
    total = below.weight.sum(1)
    if len(total) != n_spots or below.index.shape != below.weight.shape:
        msg = (
            f"spots.sub_spots: index {tuple(below.index.shape)} and weight {tuple(below.weight.shape)} must both have "
            f"a row for each of the {n_spots} spots."
        )
        raise ValueError(msg)
    wrong = (total - 1).abs() > 1e-3
    if bool(wrong.any()) or bool((below.weight < 0).any()):
        msg = (
            f"spots.sub_spots: the weights of {int(wrong.sum())} of {n_spots} spots do not sum to 1, or some are "
            f"negative (least {float(below.weight.min()):.4g}). Divide each spot's weights by their sum, or leave the "
            "spot out."
        )
        raise ValueError(msg)
