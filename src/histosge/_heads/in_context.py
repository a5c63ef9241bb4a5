"""Half of the default: HisToSGE's multi-head attention, from a target to the measured spots around it.

Notable choices, each measured in docs/benchmarks.md:
- the query is the target (embedding, no expression), keys and values are its nearest measured spots (embedding,
  expression, position relative to the target in pitches); the own measurement of a spot is hidden
- only targets have queries: with one layer, the outputs of spots are not needed
- expression is represented by a few principal components of the training spots; MSE weighted by their variance
- prediction = linear image path + attention-weighted components of the neighbours + learned correction
- context is thinned at random in training, so that one head predicts at any distance from spots, even without context
- keys and values are computed once for each spot, not for each pair of target and neighbour (``_attention.py``)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch

from histosge._heads._attention import Attention, Dense, encode_position
from histosge._heads._neighbours import neighbours
from histosge._heads._protocol import LowRank, Queries, Spots, SubSpots
from histosge._heads._space import Space, n_gene_components
from histosge._heads._state import fitted, join_state, restore_network, split_state
from histosge._heads._training import Schedule, one_thread, seeded, stopping_spots, train

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from histosge._heads._protocol import Expansion, Run

_FARTHEST_PITCH = 20.0
"""Spots farther away, such as those beyond a hole in the tissue, are ignored."""
_PLACES_AT_ONCE = 1024
"""Targets that are predicted together: few enough, and near enough to each other, to share their neighbours."""
_STRIP_PITCH = 5.0
"""Width of the strips along which targets are ordered: about the reach of their context."""


@dataclass(frozen=True)
class _Condition:
    """What depends on the context alone."""

    context: Spots
    components: Tensor
    """(n, Q)"""
    keys_values: Tensor
    """(n, 2, H, C)"""


def _along_strips(xy_um: NDArray[np.float32], section: NDArray[np.int64], *, width_um: float) -> NDArray[np.int64]:
    """Order (m, 2) targets so that consecutive ones are near each other."""
    return np.lexsort((xy_um[:, 0], np.floor(xy_um[:, 1] / width_um), section))


class InContext(LowRank):
    """Attention of a target over its nearest measured spots, in a low-rank gene space.

    Parameters
    ----------
    n_neighbours
        Measured spots that a target attends to.
    n_components
        Principal components of the expression. By default 8 to 32, more with more spots.
    n_image_components
        Principal components of the embedding, at most one for every four spots.
    width, n_heads, dropout
        Size of the network.
    thinning
        Largest share of neighbours that is hidden in training; the share is drawn at random.
    n_steps
        Largest number of optimiser steps with up to 2400 spots; more spots get more steps. Early stopping may end
        training before.
    """

    name: ClassVar[str] = "in-context"
    ensembles_folds: ClassVar[bool] = True

    def __init__(
        self,
        *,
        n_neighbours: int = 18,
        n_components: int | None = None,
        n_image_components: int = 64,
        width: int = 128,
        n_heads: int = 4,
        dropout: float = 0.2,
        thinning: float = 1.0,
        n_steps: int = 300,
    ) -> None:
        self.config: dict[str, Any] = {
            "n_neighbours": n_neighbours,
            "n_components": n_components,
            "n_image_components": n_image_components,
            "width": width,
            "n_heads": n_heads,
            "dropout": dropout,
            "thinning": thinning,
            "n_steps": n_steps,
        }
        self.space: Space | None = None
        self.network: Attention | None = None

    def fit(self, spots: Spots, *, rng: np.random.Generator, progress: bool | None = None) -> Self:
        device = spots.embedding.device
        below = self._below(spots)
        learn, stop = (rows.to(device) for rows in stopping_spots(len(spots), rng=rng))
        with one_thread():
            known = spots.take(learn)
            n_genes = self.config["n_components"] or n_gene_components(len(known))
            space = self.space = Space.fit(known, n_image=self.config["n_image_components"], n_genes=n_genes)
            image, components = self._image(spots.embedding, space), space.components(spots.expression)
            place = image if below.embedding is spots.embedding else self._image(below.embedding, space)
            with seeded(rng, device) as generator:
                network = self.network = self._build(space).to(device)
            noise = torch.Generator(device).manual_seed(int(rng.integers(2**63 - 1)))
            # stopping and training spots attend to training spots, but not to themselves
            spot_index = torch.full((len(spots),), -1, device=device)
            spot_index[learn] = torch.arange(len(learn), device=device)
            queries = Queries(spots.embedding, spots.xy_um, spots.section, spot_index)
            near, step, present = self._around(queries, known, xy_um=below.xy_um[below.index])
            near, position = learn[near], encode_position(step)
            objective = self._objective(spots, below, learn)

            def error(rows: Tensor, seen: Tensor) -> Tensor:
                around = {"near": near[rows], "position": position[rows], "present": seen}
                return objective(network(place[below.index[rows]], image, components, **around), rows)

            def loss(batch: Tensor) -> Tensor:
                rows = learn[batch.to(device)]
                hide = torch.rand(len(rows), 1, 1, device=device, generator=noise) * self.config["thinning"]
                drawn = torch.rand(present[rows].shape, device=device, generator=noise)
                return error(rows, present[rows] & (drawn >= hide))

            n_steps = self.config["n_steps"]
            schedule = Schedule(n_steps=n_steps, batch_size=64, learning_rate=3e-3, weight_decay=0.5, patience=10)
            self.losses = train(
                network,
                loss=loss,
                stopping_loss=lambda: error(stop, present[stop]),
                n_spots=len(learn),
                schedule=schedule.over(len(learn)),
                generator=generator,
                noise=noise,
                desc=f"training {self.name} head",
                progress=progress,
            )
        return self

    def _below(self, spots: Spots) -> SubSpots:
        """Return the sub-spots that the network predicts in training: here each spot itself."""
        return SubSpots.whole(spots)

    def _objective(self, spots: Spots, below: SubSpots, learn: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the loss of components (B, M, Q) predicted at the sub-spots of the spots ``rows`` (B,)."""
        space: Space = self.space  # type: ignore[assignment]
        components, weight = space.components(spots.expression), space.gene_spread**2
        weight = weight / weight.sum()
        return lambda predicted, rows: ((predicted[:, 0] - components[rows]) ** 2 @ weight).mean()

    def condition(self, context: Spots, *, run: Run = map) -> _Condition:
        network, space = fitted(self.network, self), fitted(self.space, self)
        if len(context) == 0:
            msg = f"head {self.name!r} got no measured spots as context."
            raise ValueError(msg)
        with torch.inference_mode(), one_thread():
            components = space.components(context.expression)
            return _Condition(
                context, components, network.keys_values(self._image(context.embedding, space), components)
            )

    @classmethod
    def components(
        cls, heads: Sequence[Self], conditions: Sequence[_Condition], queries: Queries, *, run: Run = map
    ) -> list[Tensor]:
        """Find neighbours once, and predict each piece of the targets by all heads."""
        context = conditions[0].context
        # many small steps: with a busy core among two, two threads took ten times as long as one (docs/benchmarks.md)
        with torch.inference_mode(), one_thread():
            found = [known.components.new_empty(len(queries), known.components.shape[1]) for known in conditions]
            reach = [head.config["n_neighbours"] for head in heads]
            xy_um = queries.xy_um[:, None]
            near = {
                k: head._around(queries, context, xy_um=xy_um)
                for k, head in dict(zip(reach, heads, strict=True)).items()
            }
            xy, section = queries.xy_um.cpu().numpy(), queries.section.cpu().numpy()
            along = _along_strips(xy, section, width_um=_STRIP_PITCH * context.pitch_um)

            @torch.inference_mode()
            def predict(rows: Tensor) -> None:
                around = {}
                for k, (index, step, present) in near.items():
                    seen, at = index[rows].unique(return_inverse=True)
                    around[k] = seen, at, encode_position(step[rows, 0]), present[rows, 0]
                embedding = queries.embedding[rows]
                for k, head, out, known in zip(reach, heads, found, conditions, strict=True):
                    seen, at, position, present = around[k]
                    network: Attention = head.network  # type: ignore[assignment]
                    dense = Dense(known.keys_values[seen], known.components[seen], at)
                    image = head._image(embedding, head.space)  # type: ignore[arg-type]
                    out[rows] = network.attend(image, position, present, dense)

            list(run(predict, torch.as_tensor(along, device=xy_um.device).split(_PLACES_AT_ONCE)))
        return found

    def expansion(self, columns: Tensor | None = None) -> Expansion:
        return fitted(self.space, self).expansion(columns)

    def _image(self, embedding: Tensor, space: Space) -> Tensor:
        # one scale for all components, so that the first are the largest; 3 keeps them in the range of the layers
        return space.image(embedding) * (3 / space.image_spread[0].clamp_min(1e-6))

    def _around(self, queries: Queries, context: Spots, *, xy_um: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Find the spots around each query, and their positions relative to the targets ``xy_um`` (m, M, 2) at it.

        Returns rows (m, K), steps (m, M, K, 2) in pitches, and whether they are read, (m, M, K).
        """
        near, present, _ = neighbours(queries, context, k=self.config["n_neighbours"])
        step = (context.xy_um[near][:, None] - xy_um[:, :, None]) / context.pitch_um
        present = present[:, None] & (step.norm(dim=-1) <= _FARTHEST_PITCH)
        # the position code of ignored spots stays small
        return near, torch.where(present[..., None], step, torch.zeros_like(step)), present

    def _build(self, space: Space) -> Attention:
        c = self.config
        sizes = len(space.image_axes), len(space.gene_axes), c["width"], c["n_heads"], c["dropout"]
        return Attention(*sizes)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        network, space = fitted(self.network, self), fitted(self.space, self)
        return self.config, join_state(network=network.state_dict(), space=space.state())

    @classmethod
    def from_state(cls, config: dict[str, Any], weights: dict[str, Tensor]) -> Self:
        head, stored = cls(**config), split_state(weights)
        space = head.space = Space(**stored["space"])
        head.network = restore_network(lambda: head._build(space), stored["network"])
        return head
