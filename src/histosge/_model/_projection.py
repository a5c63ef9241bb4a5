"""Joined encoders in balance: the principal components of each, all encoders with the same total variance.

Without it, the encoder with the longest embedding dominates: docs/design.md. Everything is fitted on the training
spots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch
from scipy.linalg import hadamard

from histosge._heads import principal, standardise, standardiser

if TYPE_CHECKING:
    from torch import Tensor

    from histosge._heads import Spots

N_COLUMNS = 64
"""Columns of each encoder, and the most components it may have."""


@dataclass(frozen=True)
class _OfEncoder:
    """Projection of the embedding of one encoder. D numbers, C columns."""

    mean: Tensor
    """(D,)"""
    spread: Tensor
    """(D,)"""
    matrix: Tensor
    """(D, C)"""
    offset: Tensor
    """(C,)"""

    @classmethod
    def fit(cls, embedding: Tensor) -> Self:
        """Fit it to the embeddings (n, D) of spots: at most one component for every four spots."""
        mean, spread = standardiser(embedding)
        scaled = standardise(embedding, mean, spread)
        centre, axes, size = principal(scaled, max(2, min(N_COLUMNS, len(embedding) // 4)))
        # A rotation into columns that share the variance of every component evenly. All columns then have variance 1:
        # a head that standardises columns leaves the lengths of components, and the balance of encoders, as they are.
        even = torch.as_tensor(hadamard(N_COLUMNS)[: len(axes)], dtype=axes.dtype, device=axes.device)  # (q, C)
        matrix = axes.T @ even / size.square().sum().sqrt().clamp_min(1e-6)
        return cls(mean, spread, matrix, -centre @ matrix)

    def __call__(self, embedding: Tensor) -> Tensor:
        mean, spread, matrix, offset = (t.to(embedding.device) for t in vars(self).values())
        return standardise(embedding, mean, spread) @ matrix + offset


@dataclass(frozen=True)
class Projection:
    """From the embeddings of joined encoders to columns in balance; that of a single encoder is not changed."""

    encoders: tuple[_OfEncoder, ...] = ()

    @classmethod
    def fit(cls, embedding: Tensor, splits: tuple[int, ...]) -> Self:
        """Fit it to the embeddings (n, D) of spots; ``splits`` are the first columns of all encoders but the first."""
        return cls(tuple(map(_OfEncoder.fit, embedding.tensor_split(splits, dim=1)))) if splits else cls()

    def __call__(self, embedding: Tensor) -> Tensor:
        """Project embeddings (n, D)."""
        if not self.encoders:
            return embedding
        ends = torch.tensor([len(encoder.mean) for encoder in self.encoders]).cumsum(0).tolist()
        blocks = embedding.tensor_split(ends[:-1], dim=1)
        return torch.cat([encoder(block) for encoder, block in zip(self.encoders, blocks, strict=True)], dim=1)

    def of_spots(self, spots: Spots) -> Spots:
        """Project spots and their sub-spots."""
        if not self.encoders:
            return spots
        below = spots.sub_spots
        below = None if below is None else replace(below, embedding=self(below.embedding))
        return replace(spots, embedding=self(spots.embedding), sub_spots=below)

    def state(self) -> dict[str, Tensor]:
        """Tensors by name, for safetensors."""
        return {f"{i}.{name}": t for i, encoder in enumerate(self.encoders) for name, t in vars(encoder).items()}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor]) -> Self:
        """Restore a projection from its :meth:`state`."""
        names = ("mean", "spread", "matrix", "offset")
        n_encoders = len(tensors) // len(names)
        return cls(tuple(_OfEncoder(*(tensors[f"{i}.{name}"] for name in names)) for i in range(n_encoders)))
