"""Attention of targets to their nearest measured spots: the network of ``in-context`` and ``aggregate``.

Keys and values are those of a spot plus those of its position relative to the target. They are linear in the code of
the position. So query and weights are multiplied with that code, and no key is computed for each pair of target and
spot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from histosge._heads._training import Dropout

if TYPE_CHECKING:
    from torch import Tensor

_WAVES_PITCH = (8.0, 4.0, 2.0)
"""Wavelengths of the position code, in pitches: the context is about five pitches wide."""
N_POSITION = 4 * len(_WAVES_PITCH) + 3


def encode_position(step: Tensor) -> Tensor:
    """Code relative positions (..., 2) in pitches as waves and decays: (..., N_POSITION). Continuous, any extent."""
    wave = step[..., None] * (2 * torch.pi / step.new_tensor(_WAVES_PITCH))  # (..., 2, waves)
    wave = wave.flatten(-2)
    r = step.norm(dim=-1, keepdim=True)
    return torch.cat([wave.sin(), wave.cos(), r, torch.exp(-r), torch.exp(-(r**2) / 2)], dim=-1)


class Gathered:
    """Keys and values of neighbours, gathered for groups of targets that share them: fast for random batches.

    Shapes: B groups of M targets, N = B M targets in all, K neighbours, U spots, H heads of C numbers, Q components.
    """

    def __init__(self, key_value: Tensor, components: Tensor, at: Tensor) -> None:
        """Take keys and values (U, 2, H, C), components (U, Q), and the rows of each group's neighbours, (B, K)."""
        b, k = at.shape
        each = key_value.index_select(0, at.flatten()).view(b, k, *key_value.shape[1:])
        self.key, self.value = each.permute(2, 0, 3, 1, 4)  # (B, H, K, C) each
        self.components = components.index_select(0, at.flatten()).view(b, k, -1)

    def scores(self, query: Tensor) -> Tensor:
        """Products (N, H, K) of queries (H, N, C) with the keys of their neighbours."""
        h, n, c = query.shape
        b = len(self.key)
        score = query.view(h, b, n // b, c).transpose(0, 1) @ self.key.mT  # (B, H, M, K)
        return score.transpose(1, 2).flatten(0, 1)

    def sums(self, kept: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Values (N, H, C) weighted by ``kept``, and components (N, H, Q) weighted by ``weight``, (N, H, K) each."""
        n, h, k = weight.shape
        b = len(self.value)
        read = kept.view(b, n // b, h, k).transpose(1, 2) @ self.value  # (B, H, M, C)
        mean = weight.view(b, n // b * h, k) @ self.components
        return read.transpose(1, 2).flatten(0, 1), mean.view(n, h, -1)


class Dense:
    """Products of all targets with all spots that any of them attends to: fast where targets are near each other.

    For evaluation, without dropout. Shapes as for :class:`Gathered`; each target is a group of its own.
    """

    def __init__(self, key_value: Tensor, components: Tensor, at: Tensor) -> None:
        self.key, self.value = key_value.permute(1, 2, 0, 3)  # (H, U, C) each
        self.components = components
        self.at = at.expand(len(self.key), -1, -1)  # (H, N, K)

    def scores(self, query: Tensor) -> Tensor:
        """Products (N, H, K) of queries (H, N, C) with the keys of their neighbours."""
        return (query @ self.key.mT).gather(2, self.at).transpose(0, 1)

    def sums(self, kept: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Values (N, H, C) and components (N, H, Q), weighted (N, H, K)."""
        n, h, _ = weight.shape
        spread = weight.new_zeros(h, n, len(self.components)).scatter_add_(2, self.at, weight.transpose(0, 1))
        return (spread @ self.value).transpose(0, 1), (spread @ self.components).transpose(0, 1)


class Attention(nn.Module):
    """Targets attend to measured spots. Shapes: P image components, Q components, W width, others as above."""

    def __init__(self, n_embedding: int, n_components: int, width: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.embed = nn.Linear(n_embedding, width)
        self.express = nn.Linear(n_components, width)
        self.norm_place, self.norm_spot, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.position = nn.Linear(N_POSITION, 2 * width)
        self.merge = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU("tanh"), Dropout(dropout), nn.Linear(2 * width, width)
        )
        self.dropout = Dropout(dropout)
        self.image_path = nn.Linear(n_embedding, n_components)
        self.mix = nn.Parameter(torch.zeros(n_heads, n_components))
        self.neighbour_path = nn.Parameter(torch.full((n_components,), 0.5))
        last = nn.Linear(width, n_components)
        self.correction = nn.Sequential(nn.LayerNorm(width), last)
        nn.init.normal_(self.image_path.weight, std=0.005)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(
        self, place: Tensor, spots: Tensor, components: Tensor, *, near: Tensor, position: Tensor, present: Tensor
    ) -> Tensor:
        """Predict components (B, M, Q) in training.

        Parameters
        ----------
        place
            (B, M, P) groups of targets that share their neighbours.
        spots, components
            (n, P) and (n, Q) all spots.
        near
            (B, K) rows of the spots that are neighbours.
        position
            (B, M, K, N_POSITION) code of their positions relative to the targets.
        present
            (B, M, K) whether the target attends to the spot.
        """
        # compute keys and values of visible spots only: half of the neighbours are hidden, and groups share some
        seen, at = torch.where(present.any(1), near, near[:1, :1]).unique(return_inverse=True)  # (U,), (B, K)
        around = Gathered(self.keys_values(spots[seen], components[seen]), components[seen], at)
        b, m, _ = place.shape
        found = self.attend(place.flatten(0, 1), position.flatten(0, 1), present.flatten(0, 1), around)
        return found.view(b, m, -1)

    def keys_values(self, spots: Tensor, components: Tensor) -> Tensor:
        """Keys and values (n, 2, H, C) of spots (n, P) with components (n, Q), without their positions."""
        both = self.key_value(self.norm_spot(self.embed(spots) + self.express(components))) + self.position.bias
        return both.view(len(spots), 2, self.n_heads, -1)

    def attend(self, place: Tensor, position: Tensor, present: Tensor, around: Gathered | Dense) -> Tensor:
        """Predict components (N, Q) at targets (N, P) from neighbours: position (N, K, N_POSITION), present (N, K)."""
        x = self.dropout(self.embed(place))  # (N, W)
        n, c = len(x), x.shape[-1] // self.n_heads
        query = (self.query(self.norm_place(x)) / c**0.5).view(n, self.n_heads, c).transpose(0, 1)  # (H, N, C)
        key_code, value_code = self.position.weight.view(2, self.n_heads, c, N_POSITION)  # (H, C, N_POSITION) each
        score = around.scores(query) + (query @ key_code).transpose(0, 1) @ position.mT  # (N, H, K)
        weight = score.masked_fill(~present[:, None], torch.finfo(score.dtype).min).softmax(-1)
        weight = weight * present[:, None]  # without any neighbour all weights are 0; softmax alone gives equal ones
        kept = self.dropout(weight)
        read, neighbours = around.sums(kept, weight)
        read = read + ((kept @ position).transpose(0, 1) @ value_code.mT).transpose(0, 1)  # (N, H, C)
        neighbours = (neighbours * self.mix.softmax(0)).sum(1)  # (N, Q)
        x = x + self.dropout(self.merge(read.flatten(1)))
        x = x + self.dropout(self.mlp(self.norm_mlp(x)))
        return self.image_path(place) + neighbours * self.neighbour_path + self.correction(x)
