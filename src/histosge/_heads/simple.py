"""The rivals that a head has to beat: gene mean, inverse distance, ridge on the embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch

from histosge._geometry import nearest_spots
from histosge._heads._space import standardise, standardiser

if TYPE_CHECKING:
    from torch import Tensor

    from histosge._heads._protocol import Places, Spots


class Mean:
    """Every place gets the mean of the spots learnt from: what any head must beat to be worth anything."""

    name: ClassVar[str] = "mean"
    averaged: ClassVar[bool] = False
    divides: ClassVar[bool] = False

    def __init__(self, mean: Tensor | None = None) -> None:
        self.mean = mean

    def fit(self, spots: Spots, *, rng: np.random.Generator, progress: bool | None = None) -> Self:
        self.mean = spots.expression.mean(0)
        return self

    def predict(self, places: Places, *, context: Spots) -> Tensor:
        if self.mean is None:
            raise _not_fitted(self.name)
        return self.mean.to(places.embedding.device).expand(len(places), -1).clone()

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self.mean is None:
            raise _not_fitted(self.name)
        return {}, {"mean": self.mean}

    @classmethod
    def from_state(cls, config: dict[str, Any], weights: dict[str, Tensor]) -> Self:
        return cls(weights["mean"])


class Nearest:
    """Inverse-distance mean of the measured spots around a place (Shepard, 1968); the image is not looked at."""

    name: ClassVar[str] = "nearest"
    averaged: ClassVar[bool] = False
    divides: ClassVar[bool] = False

    def __init__(self, n_neighbours: int = 20) -> None:
        self.n_neighbours = n_neighbours

    def fit(self, spots: Spots, *, rng: np.random.Generator, progress: bool | None = None) -> Self:
        return self

    def predict(self, places: Places, *, context: Spots) -> Tensor:
        index, dist, present = nearest_spots(
            places.xy_um.cpu().numpy().astype(float),
            context.xy_um.cpu().numpy().astype(float),
            k=self.n_neighbours,
            exclude=places.own.cpu().numpy(),
        )
        if not present.any(axis=1).all():
            msg = "head='nearest' needs measured spots around every place, and there are none. Use another head."
            raise ValueError(msg)
        # a place on top of a spot takes its value: below a thousandth of a pitch distance no longer counts
        weight = np.where(present, 1 / np.maximum(dist, 1e-3 * context.pitch_um), 0)
        weight /= weight.sum(axis=1, keepdims=True)
        device = context.expression.device
        where, how = torch.as_tensor(index, device=device), torch.as_tensor(weight, dtype=torch.float32, device=device)
        out = [  # in parts: (m, k, g) need not fit in memory
            torch.einsum("mk,mkg->mg", w, context.expression[i])
            for w, i in zip(how.split(1024), where.split(1024), strict=True)
        ]
        return torch.cat(out)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"n_neighbours": self.n_neighbours}, {}

    @classmethod
    def from_state(cls, config: dict[str, Any], weights: dict[str, Tensor]) -> Self:
        return cls(**config)


class Ridge:
    """Ridge regression on principal components of the embedding, its penalty chosen by leave-one-out error.

    The protocol of HEST-Bench (Jaume et al., 2024) with a cross-validated penalty, and with at most one component
    for every four spots, without which leave-one-out cannot tell the penalty on small sections.
    """

    name: ClassVar[str] = "ridge"
    averaged: ClassVar[bool] = False
    divides: ClassVar[bool] = False

    def __init__(self, weights: dict[str, Tensor] | None = None) -> None:
        self.weights = weights

    def fit(self, spots: Spots, *, rng: np.random.Generator, progress: bool | None = None) -> Self:
        from sklearn.decomposition import PCA
        from sklearn.linear_model import RidgeCV

        mean, spread = standardiser(spots.embedding)
        scaled = standardise(spots.embedding, mean, spread).cpu().numpy().astype(np.float64)
        n_components = max(1, min(256, len(spots) // 4, scaled.shape[1]))
        pca = PCA(n_components, svd_solver="full").fit(scaled)
        ridge = RidgeCV(np.logspace(-1, 7, 25)).fit(pca.transform(scaled), spots.expression.cpu().numpy())
        slope = pca.components_.T @ np.atleast_2d(ridge.coef_).T  # (d, g)
        offset = ridge.intercept_ - pca.mean_ @ slope
        self.weights = {
            "mean": mean,
            "spread": spread,
            "slope": torch.as_tensor(slope, dtype=torch.float32),
            "offset": torch.as_tensor(offset, dtype=torch.float32).reshape(-1),
        }
        return self

    def predict(self, places: Places, *, context: Spots) -> Tensor:
        if self.weights is None:
            raise _not_fitted(self.name)
        w = {name: tensor.to(places.embedding.device) for name, tensor in self.weights.items()}
        return standardise(places.embedding, w["mean"], w["spread"]) @ w["slope"] + w["offset"]

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self.weights is None:
            raise _not_fitted(self.name)
        return {}, self.weights

    @classmethod
    def from_state(cls, config: dict[str, Any], weights: dict[str, Tensor]) -> Self:
        return cls(weights)


def _not_fitted(name: str) -> RuntimeError:
    return RuntimeError(f"head {name!r} is not fitted: call fit() first.")
