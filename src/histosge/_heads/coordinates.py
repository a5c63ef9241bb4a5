"""A network on position alone, the idea of STAGE (Li et al., 2024): a spatially smooth baseline without an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import nn

from histosge._heads._protocol import Head
from histosge._heads._space import n_gene_components, principal
from histosge._heads._state import fitted, join_state, restore_network, split_state
from histosge._heads._training import Schedule, one_thread, seeded, stopping_spots, train

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from histosge._heads._protocol import Queries, Spots


class Coordinates(Head):
    """Multi-layer perceptron from position to principal components of the expression; no image, no neighbours.

    Positions are in the coordinates of their section.

    Parameters
    ----------
    width
        Units of each of the two hidden layers.
    n_steps
        Largest number of optimiser steps; early stopping may end training before.
    """

    name: ClassVar[str] = "coordinates"
    ensembles_folds: ClassVar[bool] = True

    def __init__(self, *, width: int = 256, n_steps: int = 1500) -> None:
        self.config: dict[str, Any] = {"width": width, "n_steps": n_steps}
        self.scaling: dict[str, Tensor] = {}
        self.network: nn.Sequential | None = None

    def fit(self, spots: Spots, *, rng: np.random.Generator, progress: bool | None = None) -> Self:
        device = spots.embedding.device
        learn, stop = (rows.to(device) for rows in stopping_spots(len(spots), rng=rng))
        with seeded(rng, device) as generator, one_thread():
            known = spots.take(learn)
            mean, axes, spread = principal(known.expression, n_gene_components(len(known)))
            spread = spread.clamp_min(1e-6)  # genes without variation
            centre, reach = known.xy_um.mean(0), known.xy_um.std(0).max().clamp_min(1e-6)
            self.scaling = {
                "centre": centre,
                "reach": reach.reshape(1),
                "gene_mean": mean,
                "gene_axes": axes * spread[:, None],
            }
            network = self.network = _network(self.config["width"], len(axes)).to(device)
            response = (spots.expression - mean) @ axes.T / spread  # (n, q)
            weight = spread**2 / (spread**2).sum()
            place = self._place(spots.xy_um)

            def error(rows: Tensor) -> Tensor:
                return ((network(place[rows]) - response[rows]) ** 2 @ weight).mean()

            self.losses = train(
                network,
                loss=lambda batch: error(learn[batch.to(device)]),
                stopping_loss=lambda: error(stop),
                n_spots=len(learn),
                schedule=Schedule(
                    n_steps=self.config["n_steps"], batch_size=128, learning_rate=3e-3, weight_decay=0.01, patience=30
                ),
                generator=generator,
                desc="training coordinates head",
                progress=progress,
            )
        return self

    def predict(self, queries: Queries, *, context: Spots) -> Tensor:
        network = fitted(self.network, self)
        with torch.inference_mode():
            return network(self._place(queries.xy_um)) @ self.scaling["gene_axes"] + self.scaling["gene_mean"]

    def _place(self, xy_um: Tensor) -> Tensor:
        return (xy_um - self.scaling["centre"]) / self.scaling["reach"]

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        network = fitted(self.network, self)
        return self.config, join_state(network=network.state_dict(), scaling=self.scaling)

    @classmethod
    def from_state(cls, config: dict[str, Any], weights: dict[str, Tensor]) -> Self:
        head, stored = cls(**config), split_state(weights)
        scaling = head.scaling = stored["scaling"]
        head.network = restore_network(lambda: _network(config["width"], len(scaling["gene_axes"])), stored["network"])
        return head


def _network(width: int, n_components: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(2, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, n_components)
    )
