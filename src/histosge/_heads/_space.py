"""Principal components of the embedding and of the expression, which heads compute in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor

    from histosge._heads._protocol import Expansion, Spots

_SPOTS_AT_ONCE = 2**15


def standardiser(embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and spread of every column; a constant column gets spread 1."""
    mean, spread = embedding.mean(0), embedding.std(0)
    return mean, torch.where(spread > 1e-6 * (mean.abs() + 1), spread, torch.ones_like(spread))


def standardise(embedding: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """Scale columns and clip at five spreads, so that a fold or a pen mark in the image gives no extreme prediction."""
    return ((embedding - mean) / spread).clamp(-5, 5)


@dataclass(frozen=True)
class Space:
    """Scalings and principal components, fitted on the training spots. D embedding, P and Q components, G genes."""

    mean: Tensor
    """(D,)"""
    spread: Tensor
    """(D,)"""
    image_mean: Tensor
    """(D,)"""
    image_axes: Tensor
    """(P, D)"""
    image_spread: Tensor
    """(P,)"""
    gene_mean: Tensor
    """(G,)"""
    gene_axes: Tensor
    """(Q, G)"""
    gene_spread: Tensor
    """(Q,)"""

    def __post_init__(self) -> None:
        (p, d), (q, g) = ((axes.shape[:1], axes.shape[1:]) for axes in (self.image_axes, self.gene_axes))
        wanted = (d, d, d, p + d, p, g, q + g, q)
        for (name, tensor), shape in zip(self.state().items(), wanted, strict=True):
            if tensor.shape != shape:
                msg = (
                    f"space.{name}: its shape is {tuple(tensor.shape)}, but with the others it must be {tuple(shape)}."
                )
                raise ValueError(msg)

    @classmethod
    def fit(cls, spots: Spots, *, n_image: int, n_genes: int) -> Self:
        """Fit everything on ``spots`` alone, with at most one component of the embedding for every four spots."""
        mean, spread = standardiser(spots.embedding)
        scaled = standardise(spots.embedding, mean, spread)
        image = principal(scaled, max(2, min(n_image, len(spots) // 4)))
        gene_mean, gene_axes, gene_spread = principal(spots.expression, n_genes)
        return cls(mean, spread, *image, gene_mean, gene_axes, gene_spread.clamp_min(1e-6))

    def image(self, embedding: Tensor) -> Tensor:
        """Components (n, P) of embeddings (n, D); they are not scaled, so the first ones are the largest."""
        return (standardise(embedding, self.mean, self.spread) - self.image_mean) @ self.image_axes.T

    def components(self, expression: Tensor) -> Tensor:
        """Components (n, Q), of unit spread, of expression (n, G)."""
        if len(expression) > _SPOTS_AT_ONCE:  # a copy of all may not fit in memory
            return torch.cat([self.components(part) for part in expression.split(_SPOTS_AT_ONCE)])
        return (expression - self.gene_mean) @ self.gene_axes.T / self.gene_spread

    def genes(self, components: Tensor) -> Tensor:
        """Expression (n, G) of components (n, Q)."""
        return torch.addmm(self.gene_mean, components * self.gene_spread, self.gene_axes)

    def expansion(self, columns: Tensor | None = None) -> Expansion:
        """:meth:`genes`, of all genes or of ``columns``."""
        mean, axes = self.gene_mean, self.gene_axes
        if columns is not None:
            mean, axes = mean[columns], axes[:, columns]
        return lambda components: torch.addmm(mean, components * self.gene_spread, axes)

    def to(self, device: torch.device | str) -> Space:
        """Move to ``device``."""
        return Space(**{name: tensor.to(device) for name, tensor in self.state().items()})

    def state(self) -> dict[str, Tensor]:
        """Tensors by name, for safetensors."""
        return dict(self.__dict__)


def n_gene_components(n_spots: int) -> int:
    """Choose 8 to 32 components by the number of spots: docs/benchmarks.md."""
    return int(np.clip(np.sqrt(n_spots) / 2.25, 8, 32))


def principal(values: Tensor, n_components: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (c,), axes (q, c) and spread (q,) of the first principal components of (n, c) values.

    Randomised SVD (Halko, Martinsson and Tropp, 2011, algorithm 4.4), with the same random directions for all values.
    The largest entry of each axis is positive.
    """
    n_components = min(n_components, len(values) - 1, values.shape[1])
    mean = values.mean(0)
    centred = values - mean
    directions = (centred.shape[1], min(n_components + 10, *centred.shape))
    start = torch.randn(directions, generator=torch.Generator().manual_seed(0), dtype=values.dtype)
    basis = torch.linalg.qr(centred @ start.to(values.device)).Q  # (n, q + 10)
    for _ in range(4):
        basis = torch.linalg.qr(centred @ torch.linalg.qr(centred.T @ basis).Q).Q
    _, size, axes = torch.linalg.svd(basis.T @ centred, full_matrices=False)
    axes, size = axes[:n_components].contiguous(), size[:n_components]
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    return mean, axes * largest.sign(), size / max(len(values) - 1, 1) ** 0.5
