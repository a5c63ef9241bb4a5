"""Half of the default: HisToSGE's multi-head attention, made to look at the measured spots around a place.

Notable choices, each measured in docs/benchmarks.md:
- the query is the place (embedding, no expression), keys and values are its nearest measured spots (embedding,
  expression, position relative to the place in pitches); a spot never sees its own measurement
- only the place asks: with one layer the spots' own answers would never be read, so none are computed
- expression lives in a few principal components of the training spots; MSE weighted by their variance
- answer = linear image path + attention-weighted components of the neighbours + learned correction
- context is thinned at random in training, so that one head serves every distance, down to no context at all
- in prediction keys and values are worked out once a spot and not once a place and neighbour: a place's position
  relative to its neighbours enters by a sum, which is taken apart
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import nn

from histosge._geometry import nearest_spots
from histosge._heads._protocol import Queries, Spots
from histosge._heads._space import Space, n_gene_components
from histosge._heads._training import Dropout, Schedule, one_thread, seeded, stopping_spots, train

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from histosge._heads._protocol import Expansion, Run

_WAVES_PITCH = (8.0, 4.0, 2.0)
"""Wavelengths of the position code, in pitches: the context is about five pitches wide."""
_FARTHEST_PITCH = 20.0
"""A spot farther away says nothing about a place: spots of other sections, and of the far side of a hole."""
N_POSITION = 4 * len(_WAVES_PITCH) + 3
_PLACES_AT_ONCE = 1024
"""Places that ask together in prediction: few and side by side, they share their neighbours."""
_STRIP_PITCH = 5.0
"""Places are put in order along strips this wide, about as far as they look."""


def encode_position(step: Tensor) -> Tensor:
    """Code relative positions (..., 2) in pitches as waves and decays: (..., N_POSITION). Continuous, any extent."""
    wave = step[..., None] * (2 * torch.pi / step.new_tensor(_WAVES_PITCH))  # (..., 2, waves)
    wave = wave.flatten(-2)
    r = step.norm(dim=-1, keepdim=True)
    return torch.cat([wave.sin(), wave.cos(), r, torch.exp(-r), torch.exp(-(r**2) / 2)], dim=-1)


@dataclass(frozen=True)
class _Known:
    """What is worked out of a context alone: kept, since places come in parts."""

    spots: Spots
    components: Tensor
    """(n, Q)"""
    key_value: Tensor
    """(n, 2 W)"""


@dataclass(frozen=True)
class _Around:
    """Neighbours of some places: the same for all networks that look equally far."""

    seen: Tensor
    """(U,) spots that any of them looks at"""
    at: Tensor
    """(B, K) which of these"""
    position: Tensor
    """(B, K, N_POSITION)"""
    present: Tensor
    """(B, K)"""


class _Network(nn.Module):
    """One place asks its measured neighbours. Shapes: B places, K neighbours, D embedding, Q components, W width."""

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

    def forward(self, place: Tensor, spots: Tensor, components: Tensor, position: Tensor, present: Tensor) -> Tensor:
        b, k, _ = spots.shape
        x = self.dropout(self.embed(place))  # (B, W)
        key, value = (
            (self.know(spots, components) + self.position(position))
            .view(b, k, 2, self.n_heads, x.shape[-1] // self.n_heads)
            .unbind(2)
        )  # (B, K, H, W / H) each
        query = self.query(self.norm_place(x)).view(b, self.n_heads, x.shape[-1] // self.n_heads)
        weight = _attention(torch.einsum("bhc,bkhc->bhk", query, key) / query.shape[-1] ** 0.5, present[:, None])
        read = torch.einsum("bhk,bkhc->bhc", self.dropout(weight), value).flatten(1)
        neighbours = torch.einsum("bhk,bkq,hq->bq", weight, components, self.mix.softmax(0))
        return self._answer(x, place, read, neighbours)

    def learn(
        self, place: Tensor, spots: Tensor, components: Tensor, *, near: Tensor, position: Tensor, present: Tensor
    ) -> Tensor:
        """What ``forward`` answers, of all spots and the rows ``near`` (B, K) of those that are neighbours.

        Keys and values are worked out once for each spot that any of the places sees: in training half of the neighbours
        are hidden, and of the others some are seen by several. The code of a position is linear in keys and values: query
        and weights go through it, not every pair.
        """
        (b, k), h = near.shape, self.n_heads
        x = self.dropout(self.embed(place))  # (B, W)
        c = x.shape[-1] // h
        query = (self.query(self.norm_place(x)) / c**0.5).view(b, h, c)  # (B, H, C = W / H)
        # what is hidden is told by `present`: which spot it was does not matter
        seen, at = torch.where(present, near, near[:1, :1]).unique(return_inverse=True)  # (U,), (B, K)
        known = self.know(spots[seen], components[seen]) + self.position.bias  # (U, 2 W)
        key, value = known.index_select(0, at.flatten()).view(b, k, 2, h, c).unbind(2)  # (B, K, H, C) each
        key_code, value_code = self.position.weight.view(2, h, c, N_POSITION)  # (H, C, N_POSITION) each
        of_step = (query.transpose(0, 1) @ key_code).transpose(0, 1) @ position.mT  # (B, H, K)
        weight = _attention((query[:, None] * key).sum(-1).mT + of_step, present[:, None])
        kept = self.dropout(weight)
        steps = (kept @ position).transpose(0, 1) @ value_code.mT  # (H, B, C)
        read = (kept.mT[..., None] * value).sum(1) + steps.transpose(0, 1)  # (B, H, C)
        theirs = components.index_select(0, near.flatten()).view(b, k, -1)  # (B, K, Q)
        neighbours = (weight @ theirs * self.mix.softmax(0)).sum(1)  # (B, Q)
        return self._answer(x, place, read.flatten(1), neighbours)

    def know(self, spots: Tensor, components: Tensor) -> Tensor:
        """Keys and values (..., 2 W) of spots, but for their positions."""
        return self.key_value(self.norm_spot(self.embed(spots) + self.express(components)))

    def ask(self, place: Tensor, around: _Around, known: _Known) -> Tensor:
        """What ``forward`` answers in evaluation, from what is known of spots.

        A key is a spot's plus its position's, and so a score is the sum of two: of places with the spots that any of them
        looks at, U in number, and of places with the few numbers of the position code. Values are read in the same way.
        No (B, K, W) is made.
        """
        b, heads = len(place), self.n_heads
        x = self.embed(place)  # (B, W)
        c = x.shape[-1] // heads
        query = self.query(self.norm_place(x)).view(b, heads, c).transpose(0, 1) / c**0.5  # (H, B, C = W / H)
        seen, position = around.seen, around.position  # (U,), (B, K, N_POSITION)
        at = around.at.expand(heads, -1, -1)  # (H, B, K)
        key, value = (known.key_value[seen] + self.position.bias).view(-1, 2, heads, c).permute(1, 2, 0, 3)
        key_code, value_code = self.position.weight.view(2, heads, c, N_POSITION)  # (H, C, N_POSITION) each
        of_step = ((query @ key_code).transpose(0, 1) @ position.mT).transpose(0, 1)  # (H, B, K)
        weight = _attention((query @ key.mT).gather(2, at) + of_step, around.present)
        spread = weight.new_zeros(heads, b, len(seen)).scatter_add_(2, at, weight)  # (H, B, U)
        steps = (weight.transpose(0, 1) @ position).transpose(0, 1)  # (H, B, N_POSITION)
        read = spread @ value + steps @ value_code.mT  # (H, B, C)
        neighbours = (spread @ known.components[seen] * self.mix.softmax(0)[:, None]).sum(0)  # (B, Q)
        return self._answer(x, place, read.transpose(0, 1).flatten(1), neighbours)

    def _answer(self, x: Tensor, place: Tensor, read: Tensor, neighbours: Tensor) -> Tensor:
        x = x + self.dropout(self.merge(read))
        x = x + self.dropout(self.mlp(self.norm_mlp(x)))
        return self.image_path(place) + neighbours * self.neighbour_path + self.correction(x)  # (B, Q)


def _attention(score: Tensor, present: Tensor) -> Tensor:
    """Weights of neighbours, (..., K)."""
    weight = score.masked_fill(~present, torch.finfo(score.dtype).min).softmax(-1)
    return weight * present  # no context at all: nothing is read, instead of an even mean of nothing


def _along_strips(xy_um: NDArray[np.float32], *, width_um: float) -> NDArray[np.int64]:
    """Order of (m, 2) places in which any few that follow one another lie together."""
    return np.lexsort((xy_um[:, 0], np.floor(xy_um[:, 1] / width_um)))


class InContext:
    """Attention of a place over its nearest measured spots, in a low-rank gene space.

    Parameters
    ----------
    n_neighbours
        Measured spots that a place looks at.
    n_components
        Principal components of the expression; by default by the number of spots, 8 to 32.
    n_image_components
        Principal components of the embedding, at most one for every four spots.
    width, n_heads, dropout
        Size of the network.
    thinning
        Upper end of the random share of neighbours hidden in training.
    """

    name: ClassVar[str] = "in-context"
    ensembles_folds: ClassVar[bool] = True
    divides: ClassVar[bool] = False
    losses: Sequence[float] = ()

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
    ) -> None:
        self.config: dict[str, Any] = {
            "n_neighbours": n_neighbours,
            "n_components": n_components,
            "n_image_components": n_image_components,
            "width": width,
            "n_heads": n_heads,
            "dropout": dropout,
            "thinning": thinning,
        }
        self.space: Space | None = None
        self.network: _Network | None = None
        self._known: _Known | None = None

    def fit(self, spots: Spots, *, rng: np.random.Generator, progress: bool | None = None) -> Self:
        self._known = None  # worked out by another network
        device = spots.embedding.device
        learn, stop = stopping_spots(len(spots), rng=rng)
        learn, stop = learn.to(device), stop.to(device)
        with one_thread():
            known = spots.take(learn)
            n_genes = self.config["n_components"] or n_gene_components(len(known))
            space = Space.fit(known, n_image=self.config["n_image_components"], n_genes=n_genes)
            self.space = space
            image, components = self._image(spots.embedding, space), space.components(spots.expression)
            with seeded(rng, device) as generator:
                network = self.network = self._build(image.shape[1], components.shape[1]).to(device)
            noise = torch.Generator(device).manual_seed(int(rng.integers(2**63 - 1)))
            # a stopping spot asks the learning spots, and so does a learning spot (but not itself)
            spot_index = torch.full((len(spots),), -1, device=device)
            spot_index[learn] = torch.arange(len(learn), device=device)
            context = self._neighbours(Queries(spots.embedding, spots.xy_um, spot_index), known)
            near, position, present = learn[context[0]], encode_position(context[1]), context[2]
            weight = space.gene_spread**2
            weight = weight / weight.sum()

            def error(rows: Tensor, seen: Tensor) -> Tensor:
                around = {"near": near[rows], "position": position[rows], "present": seen}
                answer = network.learn(image[rows], image, components, **around)
                return ((answer - components[rows]) ** 2 @ weight).mean()

            def loss(batch: Tensor) -> Tensor:
                rows = learn[batch.to(device)]
                hide = torch.rand(len(rows), 1, device=device, generator=noise) * self.config["thinning"]
                drawn = torch.rand(present[rows].shape, device=device, generator=noise)
                return error(rows, present[rows] & (drawn >= hide))

            schedule = Schedule(n_steps=300, batch_size=64, learning_rate=3e-3, weight_decay=0.5, patience=10)
            self.losses = train(
                network,
                loss=loss,
                stopping_loss=lambda: error(stop, present[stop]),
                n_spots=len(learn),
                schedule=schedule.over(len(learn)),
                generator=generator,
                noise=noise,
                desc="training in-context head",
                progress=progress,
            )
        return self

    def predict(self, places: Queries, *, context: Spots) -> Tensor:
        (components,) = self.answers([self], places, context=context)
        with torch.inference_mode():
            return self.expansion()(components)

    @classmethod
    def answers(cls, heads: Sequence[Self], places: Queries, *, context: Spots, run: Run = map) -> list[Tensor]:
        """Components (m, Q) of each head: neighbours are looked for once, and each piece of the places asks all."""
        # many small steps: with a busy core among two, two threads took ten times as long as one (docs/benchmarks.md)
        with torch.inference_mode(), one_thread():
            ready = [head._ready(context, places.embedding.device) for head in heads]
            answers = [known.components.new_empty(len(places), known.components.shape[1]) for _, _, known in ready]
            reach = [head.config["n_neighbours"] for head in heads]
            near = {k: head._neighbours(places, context) for k, head in dict(zip(reach, heads, strict=True)).items()}
            along = _along_strips(places.xy_um.cpu().numpy(), width_um=_STRIP_PITCH * context.pitch_um)

            @torch.inference_mode()
            def ask(rows: Tensor) -> None:
                around = {}
                for k, (index, step, present) in near.items():
                    seen, at = index[rows].unique(return_inverse=True)
                    around[k] = _Around(seen, at, encode_position(step[rows]), present[rows])
                embedding = places.embedding[rows]
                for k, head, answer, (network, space, known) in zip(reach, heads, answers, ready, strict=True):
                    answer[rows] = network.ask(head._image(embedding, space), around[k], known)

            list(run(ask, torch.as_tensor(along, device=places.embedding.device).split(_PLACES_AT_ONCE)))
        return answers

    def _ready(self, context: Spots, device: torch.device) -> tuple[_Network, Space, _Known]:
        """Move to where it is asked, and work out what is a matter of the context alone."""
        if self.network is None or self.space is None:
            msg = f"head {self.name!r} is not fitted: call fit() first."
            raise RuntimeError(msg)
        network, space = self.network.to(device).eval(), self.space.to(device)
        self.space = space
        if self._known is None or self._known.spots is not context:
            components = space.components(context.expression)
            self._known = _Known(context, components, network.know(self._image(context.embedding, space), components))
        return network, space, self._known

    def expansion(self, columns: Tensor | None = None) -> Expansion:
        """How components (m, Q) become expression (m, g), of all genes or of ``columns``."""
        return self.space.expansion(columns)  # type: ignore[union-attr]

    def _image(self, embedding: Tensor, space: Space) -> Tensor:
        # one scale for all components: the first stay the largest; 3 keeps them within the reach of the layers
        return space.image(embedding) * (3 / space.image_spread[0].clamp_min(1e-6))

    def _neighbours(self, places: Queries, context: Spots) -> tuple[Tensor, Tensor, Tensor]:
        """Nearest spots: rows (m, k), steps to them (m, k, 2) in pitches, and whether they are read (m, k)."""
        device = places.embedding.device
        index, _, present = nearest_spots(
            places.xy_um.cpu().numpy().astype(float),
            context.xy_um.cpu().numpy().astype(float),
            k=self.config["n_neighbours"],
            exclude=places.spot_index.cpu().numpy(),
        )
        near, seen = torch.as_tensor(index, device=device), torch.as_tensor(present, device=device)
        if len(context) == 0:
            msg = f"head {self.name!r} got no measured spots as context."
            raise ValueError(msg)
        step = (context.xy_um[near] - places.xy_um[:, None]) / context.pitch_um  # (m, k, 2)
        seen = seen & (step.norm(dim=-1) <= _FARTHEST_PITCH)
        step = torch.where(seen[..., None], step, torch.zeros_like(step))  # the code of what is not read stays small
        return near, step, seen

    def _build(self, n_embedding: int, n_components: int) -> _Network:
        c = self.config
        return _Network(n_embedding, n_components, c["width"], c["n_heads"], c["dropout"])

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self.network is None or self.space is None:
            msg = f"head {self.name!r} is not fitted: call fit() first."
            raise RuntimeError(msg)
        network = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        return self.config, network | {f"space.{name}": tensor for name, tensor in self.space.state().items()}

    @classmethod
    def from_state(cls, config: dict[str, Any], weights: dict[str, Tensor]) -> Self:
        head = cls(**config)
        parts: dict[str, dict[str, Tensor]] = {"network": {}, "space": {}}
        for name, tensor in weights.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        head.space = Space(**parts["space"])
        head.network = head._build(len(head.space.image_axes), len(head.space.gene_axes))
        head.network.load_state_dict(parts["network"])
        return head
