"""The published HisToSGE network (Shi et al., 2024, arXiv 2407.20518), written from its description, with corrections.

As published: one pre-norm transformer layer over a window of spots' embeddings and positions, 4 heads of 64,
MLP of 1024, then Linear(2048), ReLU, LayerNorm, Linear(genes), ReLU; mean squared error; rate 1e-3. Corrected:
- a window is a target and its 49 nearest spots, not 50 consecutive rows of the table
- positions are coded as continuous waves, in the section's coordinates, not by a table of integers that ends at 511
- training stops on held-out spots instead of after 1000 epochs
As published, the measured expression of neighbours is no input: compare with ``in-context``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import nn

from histosge._heads._neighbours import neighbours
from histosge._heads._protocol import Head, Queries, Spots
from histosge._heads._space import standardise, standardiser
from histosge._heads._state import fitted, join_state, restore_network, split_state
from histosge._heads._training import Schedule, seeded, stopping_spots, train

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_WIDTH, _HEADS, _MLP, _PROJECTION = 1024, 4, 1024, 2048
_HEAD_DIM = 64
_WAVES_PITCH = (4.0, 8.0, 16.0, 32.0, 64.0, 128.0)


def encode_position(xy_pitch: Tensor) -> Tensor:
    """Code absolute positions (n, 2) in pitches as waves: (n, 24). Continuous, any extent."""
    wave = xy_pitch[:, :, None] * (2 * torch.pi / xy_pitch.new_tensor(_WAVES_PITCH))
    wave = wave.flatten(1)
    return torch.cat([wave.sin(), wave.cos()], dim=1)


class _Network(nn.Module):
    """B targets, K neighbours, N spots, D embedding."""

    def __init__(self, n_embedding: int, n_genes: int) -> None:
        super().__init__()
        self.embed = nn.Linear(n_embedding, _WIDTH)
        self.position = nn.Linear(4 * len(_WAVES_PITCH), _WIDTH)
        self.norm_attention, self.norm_mlp = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.query_key_value = nn.Linear(_WIDTH, 3 * _HEADS * _HEAD_DIM, bias=False)
        self.merge = nn.Linear(_HEADS * _HEAD_DIM, _WIDTH)
        self.mlp = nn.Sequential(nn.Linear(_WIDTH, _MLP), nn.GELU(), nn.Linear(_MLP, _WIDTH))
        self.project = nn.Sequential(
            nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, _PROJECTION), nn.ReLU(), nn.LayerNorm(_PROJECTION)
        )
        self.genes = nn.Linear(_PROJECTION, n_genes)

    def tokens(self, embedding: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (n, width) and their queries, keys and values (n, 3, heads, dim)."""
        x = self.embed(embedding) + self.position(position)
        return x, self.query_key_value(self.norm_attention(x)).view(len(x), 3, _HEADS, _HEAD_DIM)

    def attend(self, x: Tensor, itself: Tensor, keys: Tensor, values: Tensor, present: Tensor) -> Tensor:
        """Let targets (B) attend to themselves and to their neighbours (B, K), and project: (B, genes)."""
        keys = torch.cat([itself[:, None, 1], keys], dim=1)  # (B, 1 + K, heads, dim)
        values = torch.cat([itself[:, None, 2], values], dim=1)
        seen = torch.cat([torch.ones_like(present[:, :1]), present], dim=1)
        score = torch.einsum("bhc,bkhc->bhk", itself[:, 0], keys) / _HEAD_DIM**0.5
        weight = score.masked_fill(~seen[:, None], torch.finfo(score.dtype).min).softmax(-1)
        x = x + self.merge(torch.einsum("bhk,bkhc->bhc", weight, values).flatten(1))
        x = x + self.mlp(self.norm_mlp(x))
        return self.genes(self.project(x)).relu()


class Published(Head):
    """The paper's network, with its defects corrected.

    Parameters
    ----------
    n_neighbours
        Spots in a window, without the target itself.
    n_steps
        Largest number of optimiser steps; early stopping usually ends training before.
    """

    name: ClassVar[str] = "published"
    ensembles_folds: ClassVar[bool] = True

    def __init__(self, *, n_neighbours: int = 49, n_steps: int = 300) -> None:
        self.config: dict[str, Any] = {"n_neighbours": n_neighbours, "n_steps": n_steps}
        self.scaling: dict[str, Tensor] = {}
        self.network: _Network | None = None

    def fit(self, spots: Spots, *, rng: np.random.Generator, progress: bool | None = None) -> Self:
        device = spots.embedding.device
        learn, stop = (rows.to(device) for rows in stopping_spots(len(spots), rng=rng))
        known = spots.take(learn)
        with seeded(rng, device) as generator:
            mean, spread = standardiser(known.embedding)
            self.scaling = {"mean": mean, "spread": spread, "centre": known.xy_um.mean(0)}
            network = self.network = _Network(spots.embedding.shape[1], spots.expression.shape[1]).to(device)
            # start from the mean of every gene: otherwise training must find it first, through the final ReLU
            nn.init.zeros_(network.genes.weight)
            network.genes.bias.data.copy_(known.expression.mean(0))
            inside = self._prepare(Queries.of(known), known)
            outside = self._prepare(Queries.of(spots.take(stop), hidden=False), known)

            def loss(batch: Tensor) -> Tensor:
                rows = batch.to(device)
                return nn.functional.mse_loss(self._run(inside, rows), known.expression[rows])

            self.losses = train(
                network,
                loss=loss,
                stopping_loss=lambda: nn.functional.mse_loss(self._run(outside, None), spots.expression[stop]),
                n_spots=len(learn),
                schedule=Schedule(
                    n_steps=self.config["n_steps"], batch_size=512, learning_rate=1e-3, weight_decay=0.0, patience=10
                ),
                generator=generator,
                desc="training published head",
                progress=progress,
            )
        return self

    def predict(self, queries: Queries, *, context: Spots) -> Tensor:
        fitted(self.network, self)
        prepared = self._prepare(queries, context)
        with torch.inference_mode():
            parts = torch.arange(len(queries), device=queries.xy_um.device).split(1024)
            return torch.cat([self._run(prepared, rows) for rows in parts])

    def _prepare(self, queries: Queries, context: Spots) -> dict[str, Tensor]:
        """Scale inputs and find the windows; the window of a spot of the context is without that spot."""
        near, present, _ = neighbours(queries, context, k=self.config["n_neighbours"])
        s = self.scaling
        return {
            "place": standardise(queries.embedding, s["mean"], s["spread"]),
            "place_position": encode_position((queries.xy_um - s["centre"]) / context.pitch_um),
            "spots": standardise(context.embedding, s["mean"], s["spread"]),
            "spots_position": encode_position((context.xy_um - s["centre"]) / context.pitch_um),
            "near": near,
            "present": present,
        }

    def _run(self, given: dict[str, Tensor], rows: Tensor | None) -> Tensor:
        network = fitted(self.network, self)
        rows = torch.arange(len(given["place"]), device=given["place"].device) if rows is None else rows
        x, itself = network.tokens(given["place"][rows], given["place_position"][rows])
        # keys and values once per spot of the windows, not once per window
        needed, at = given["near"][rows].unique(return_inverse=True)
        _, spots = network.tokens(given["spots"][needed], given["spots_position"][needed])
        # not spots[at]: on several threads its gradient is summed in any order, so a seed would not fix the result
        keys, values = (spots[:, i].index_select(0, at.flatten()).view(*at.shape, _HEADS, _HEAD_DIM) for i in (1, 2))
        return network.attend(x, itself, keys, values, given["present"][rows])

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        network = fitted(self.network, self)
        return self.config, join_state(network=network.state_dict(), scaling=self.scaling)

    @classmethod
    def from_state(cls, config: dict[str, Any], weights: dict[str, Tensor]) -> Self:
        head, stored = cls(**config), split_state(weights)
        network = stored["network"]
        sizes = network["embed.weight"].shape[1], network["genes.weight"].shape[0]
        head.network, head.scaling = restore_network(lambda: _Network(*sizes), network), stored["scaling"]
        return head
