"""Baselines: gene mean, inverse distance, ridge on the embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch

from histosge._heads._neighbours import neighbours
from histosge._heads._protocol import Head
from histosge._heads._space import standardise, standardiser
from histosge._heads._state import fitted

if TYPE_CHECKING:
    from torch import Tensor

    from histosge._heads._protocol import Queries, Spots

_PENALTIES = np.logspace(-1, 7, 25)
_TINY = 1e-12
"""Components shorter than this are ignored: a constant embedding has no component."""


class Mean(Head):
    """Every target gets the mean of the training spots. A useful head predicts better."""

    name: ClassVar[str] = "mean"

    def __init__(self) -> None:
        self.mean: Tensor | None = None

    def fit(self, spots: Spots, *, rng: np.random.Generator, progress: bool | None = None) -> Self:
        self.mean = spots.expression.mean(0)
        return self

    def predict(self, queries: Queries, *, context: Spots) -> Tensor:
        return fitted(self.mean, self).expand(len(queries), -1).clone()

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {}, {"mean": fitted(self.mean, self)}

    @classmethod
    def from_state(cls, config: dict[str, Any], weights: dict[str, Tensor]) -> Self:
        head = cls()
        head.mean = weights["mean"]
        return head


class Nearest(Head):
    """Inverse-distance mean of the measured spots around a target (Shepard, 1968), without the image."""

    name: ClassVar[str] = "nearest"

    def __init__(self, n_neighbours: int = 20) -> None:
        self.n_neighbours = n_neighbours

    def fit(self, spots: Spots, *, rng: np.random.Generator, progress: bool | None = None) -> Self:
        return self

    def predict(self, queries: Queries, *, context: Spots) -> Tensor:
        near, there, distance = neighbours(queries, context, k=self.n_neighbours)
        present = there.cpu().numpy()
        if not present.any(axis=1).all():
            msg = "head='nearest' needs measured spots around every target, and there are none. Use another head."
            raise ValueError(msg)
        # a target at a spot takes its value: distances below a thousandth of a pitch count as that
        weight = np.where(present, 1 / np.maximum(distance, 1e-3 * context.pitch_um), 0)
        weight /= weight.sum(axis=1, keepdims=True)
        share = torch.as_tensor(weight, dtype=torch.float32, device=near.device)
        out = [  # in parts: (m, k, g) may not fit in memory
            torch.einsum("mk,mkg->mg", w, context.expression[i])
            for w, i in zip(share.split(1024), near.split(1024), strict=True)
        ]
        return torch.cat(out)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"n_neighbours": self.n_neighbours}, {}

    @classmethod
    def from_state(cls, config: dict[str, Any], weights: dict[str, Tensor]) -> Self:
        return cls(**config)


class Ridge(Head):
    """Ridge regression on principal components of the embedding, its penalty chosen by leave-one-out error.

    The protocol of HEST-Bench (Jaume et al., 2024) with a cross-validated penalty, and with at most one component
    for every four spots: with more, leave-one-out cannot choose the penalty on small sections.
    """

    name: ClassVar[str] = "ridge"

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] | None = None

    def fit(self, spots: Spots, *, rng: np.random.Generator, progress: bool | None = None) -> Self:
        mean, spread = standardiser(spots.embedding)
        # in float64 on the processor, since not every device has float64
        x = standardise(spots.embedding, mean, spread).cpu().double()
        y = spots.expression.cpu().double()
        n_components = max(1, min(256, len(x) // 4, x.shape[1]))
        x_mean, y_mean = x.mean(0), y.mean(0)
        axes, left, size = _components(x - x_mean, n_components)
        shrunk = left.T @ (y - y_mean)  # (q, g): coefficients of each component, before the penalty
        kept = size**2 / (size**2 + torch.as_tensor(_PENALTIES)[:, None])  # (penalties, q)
        kept = kept[_left_out_error(y - y_mean, left, shrunk, kept).argmin()]
        slope = axes @ ((kept / size.clamp_min(_TINY))[:, None] * shrunk)  # (d, g)
        offset = y_mean - x_mean @ slope
        slope, offset = (values.float().to(mean.device) for values in (slope, offset))
        self.weights = {"mean": mean, "spread": spread, "slope": slope, "offset": offset}
        return self

    def predict(self, queries: Queries, *, context: Spots) -> Tensor:
        w = fitted(self.weights, self)
        return standardise(queries.embedding, w["mean"], w["spread"]) @ w["slope"] + w["offset"]

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {}, fitted(self.weights, self)

    @classmethod
    def from_state(cls, config: dict[str, Any], weights: dict[str, Tensor]) -> Self:
        head = cls()
        head.weights = weights
        return head


def _components(centred: Tensor, n_components: int) -> tuple[Tensor, Tensor, Tensor]:
    """First principal components of (n, d): axes (d, q), scores of unit length (n, q), and their lengths (q,).

    Computed from the smaller of the two products of the matrix with itself. That squares its condition number, but the
    loss in float64 is far below any penalty.
    """
    n, d = centred.shape
    square, side = torch.linalg.eigh(centred.T @ centred if d <= n else centred @ centred.T)
    size = square.flip(0)[:n_components].clamp_min(0).sqrt()
    side = side.flip(1)[:, :n_components]
    other = (centred @ side if d <= n else centred.T @ side) / size.clamp_min(_TINY)
    return (side, other, size) if d <= n else (other, side, size)


def _left_out_error(y: Tensor, left: Tensor, shrunk: Tensor, kept: Tensor) -> Tensor:
    """Squared leave-one-out error over all spots and genes for every penalty, (penalties,).

    The error at a spot left out is its residual over one minus its leverage (Golub, Heath and Wahba, 1979). The squared
    residual is multiplied out, so that the (n, g) values are read once and not for every penalty.
    """
    total = y.square().sum(1)  # (n,)
    crossed = left * (y @ shrunk.T)  # (n, q)
    within = shrunk @ shrunk.T  # (q, q)
    errors = []
    for share in kept:
        some = left * share  # (n, q)
        residual = total - 2 * crossed @ share + ((some @ within) * some).sum(1)
        leverage = 1 / len(y) + (some * left).sum(1)  # the mean is learnt as well
        errors.append((residual / (1 - leverage) ** 2).sum())
    return torch.stack(errors)
