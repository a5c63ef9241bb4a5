"""A network on position alone, the idea of STAGE (Li et al., 2024): what smoothness in space can say without the image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import nn

from histosge._heads._space import n_gene_components, principal
from histosge._heads._training import Schedule, one_thread, seeded, stopping_spots, train

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from torch import Tensor

    from histosge._heads._protocol import Queries, Spots


class Coordinates:
    """Multi-layer perceptron from position to principal components of the expression; no image, no neighbours.

    Parameters
    ----------
    width
        Units of each of the two hidden layers.
    n_steps
        Most optimiser steps; early stopping may end training before.
    """

    name: ClassVar[str] = "coordinates"
    ensembles_folds: ClassVar[bool] = True
    divides: ClassVar[bool] = False
    losses: Sequence[float] = ()

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
            spread = spread.clamp_min(1e-6)  # of genes that never vary
            centre, reach = known.xy_um.mean(0), known.xy_um.std(0).max().clamp_min(1e-6)
            self.scaling = {
                "centre": centre,
                "reach": reach.reshape(1),
                "gene_mean": mean,
                "gene_axes": axes * spread[:, None],
            }
            self.network = _network(self.config["width"], len(axes)).to(device)
            target = (spots.expression - mean) @ axes.T / spread  # (n, q)
            weight = spread**2 / (spread**2).sum()
            place = self._place(spots.xy_um)

            def error(rows: Tensor) -> Tensor:
                return ((self.network(place[rows]) - target[rows]) ** 2 @ weight).mean()  # type: ignore[misc]

            self.losses = train(
                self.network,
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

    def predict(self, places: Queries, *, context: Spots) -> Tensor:
        if self.network is None:
            raise _not_fitted()
        device = places.embedding.device
        self.network.to(device).eval()
        self.scaling = {name: tensor.to(device) for name, tensor in self.scaling.items()}
        with torch.inference_mode():
            return self.network(self._place(places.xy_um)) @ self.scaling["gene_axes"] + self.scaling["gene_mean"]

    def _place(self, xy_um: Tensor) -> Tensor:
        return (xy_um - self.scaling["centre"]) / self.scaling["reach"]

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self.network is None:
            raise _not_fitted()
        network = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        return self.config, network | {f"scaling.{name}": tensor for name, tensor in self.scaling.items()}

    @classmethod
    def from_state(cls, config: dict[str, Any], weights: dict[str, Tensor]) -> Self:
        head = cls(**config)
        head.scaling = {n.removeprefix("scaling."): t for n, t in weights.items() if n.startswith("scaling.")}
        head.network = _network(config["width"], len(head.scaling["gene_axes"]))
        head.network.load_state_dict(
            {n.removeprefix("network."): t for n, t in weights.items() if n.startswith("network.")}
        )
        return head


def _network(width: int, n_components: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(2, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, n_components)
    )


def _not_fitted() -> RuntimeError:
    return RuntimeError("head 'coordinates' is not fitted: call fit() first.")
