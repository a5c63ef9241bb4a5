"""The default head: HisToSGE's multi-head attention, made to look at the measured spots around a place.

Notable choices, each measured in docs/benchmarks.md:
- the query is the place (embedding, no expression), keys and values are its nearest measured spots (embedding,
  expression, position relative to the place in pitches); a spot never sees its own measurement
- only the place asks: with one layer the spots' own answers would never be read, so none are computed
- expression lives in a few principal components of the training spots; MSE weighted by their variance
- answer = linear image path + attention-weighted components of the neighbours + learned correction
- context is thinned at random in training, so that one head serves every distance, down to no context at all
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import nn

from histosge._geometry import nearest_spots
from histosge._heads._protocol import Places, Spots, standardise, standardiser
from histosge._training import Schedule, one_thread, seeded, stopping_spots, train

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
            nn.Linear(width, 2 * width), nn.GELU("tanh"), nn.Dropout(dropout), nn.Linear(2 * width, width)
        )
        self.dropout = nn.Dropout(dropout)
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
        tokens = self.dropout(self.embed(spots) + self.express(components))  # (B, K, W)
        key, value = (
            (self.key_value(self.norm_spot(tokens)) + self.position(position))
            .view(b, k, 2, self.n_heads, x.shape[-1] // self.n_heads)
            .unbind(2)
        )  # (B, K, H, W / H) each
        query = self.query(self.norm_place(x)).view(b, self.n_heads, x.shape[-1] // self.n_heads)
        score = torch.einsum("bhc,bkhc->bhk", query, key) / query.shape[-1] ** 0.5
        weight = score.masked_fill(~present[:, None], torch.finfo(score.dtype).min).softmax(-1)
        weight = weight * present[:, None]  # no context at all: nothing is read, instead of an even mean of nothing
        read = torch.einsum("bhk,bkhc->bhc", self.dropout(weight), value).flatten(1)
        x = x + self.dropout(self.merge(read))
        x = x + self.dropout(self.mlp(self.norm_mlp(x)))
        neighbours = torch.einsum("bhk,bkq,hq->bq", weight, components, self.mix.softmax(0))
        return self.image_path(place) + neighbours * self.neighbour_path + self.correction(x)  # (B, Q)


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
        self.scaling: dict[str, Tensor] = {}
        self.network: _Network | None = None

    def fit(self, spots: Spots, *, rng: np.random.Generator, progress: bool | None = None) -> Self:
        device = spots.embedding.device
        learn, stop = stopping_spots(len(spots), rng=rng)
        learn, stop = learn.to(device), stop.to(device)
        with seeded(rng, device) as generator, one_thread():
            self._scale(spots.take(learn))
            image, components = self._image(spots.embedding), self._components(spots.expression)
            self.network = self._build(image.shape[1], components.shape[1]).to(device)
            # a stopping spot asks the learning spots, and so does a learning spot (but not itself)
            own = torch.full((len(spots),), -1, device=device)
            own[learn] = torch.arange(len(learn), device=device)
            context = self._neighbours(Places(spots.embedding, spots.xy_um, own), spots.take(learn))
            near, position, present = learn[context[0]], context[1], context[2]
            weight = self.scaling["component_spread"] ** 2
            weight = weight / weight.sum()

            def error(rows: Tensor, seen: Tensor) -> Tensor:
                answer = self.network(image[rows], image[near[rows]], components[near[rows]], position[rows], seen)  # type: ignore[misc]
                return ((answer - components[rows]) ** 2 @ weight).mean()

            def loss(batch: Tensor) -> Tensor:
                rows = learn[batch.to(device)]
                hide = torch.rand(len(rows), 1, device=device) * self.config["thinning"]
                return error(rows, present[rows] & (torch.rand(present[rows].shape, device=device) >= hide))

            train(
                self.network,
                loss=loss,
                stopping_loss=lambda: error(stop, present[stop]),
                n_spots=len(learn),
                schedule=Schedule(n_steps=400, batch_size=64, learning_rate=2e-3, weight_decay=0.5, patience=10),
                generator=generator,
                desc="training in-context head",
                progress=progress,
            )
        return self

    def predict(self, places: Places, *, context: Spots) -> Tensor:
        if self.network is None:
            msg = "head 'in-context' is not fitted: call fit() first."
            raise RuntimeError(msg)
        device = places.embedding.device
        self.network.to(device).eval()
        self.scaling = {name: tensor.to(device) for name, tensor in self.scaling.items()}
        near, position, present = self._neighbours(places, context)
        image, spots = self._image(places.embedding), self._image(context.embedding)
        components = self._components(context.expression)
        answers = [components.new_zeros(0, components.shape[1])]
        with torch.inference_mode():
            for rows in torch.arange(len(places), device=device).split(4096):
                n = near[rows]
                answers.append(self.network(image[rows], spots[n], components[n], position[rows], present[rows]))
        answer = torch.cat(answers) * self.scaling["component_spread"]
        return answer @ self.scaling["component_genes"] + self.scaling["gene_mean"]  # (m, g)

    def _scale(self, spots: Spots) -> None:
        """Fix scalings and principal components, from the learning spots alone."""
        n, device = len(spots), spots.embedding.device
        mean, spread = standardiser(spots.embedding)
        scaled = standardise(spots.embedding, mean, spread)
        centre, axes, size = _principal(scaled, max(2, min(self.config["n_image_components"], n // 4)))
        # one scale for all: the first components stay the largest; 3 keeps them within the reach of the layers
        axes = axes * (3 / size[0].clamp_min(1e-6))
        # 8 to 32 components by the number of spots: docs/benchmarks.md
        wanted = self.config["n_components"] or int(np.clip(np.sqrt(n) / 2.25, 8, 32))
        gene_mean, genes, gene_size = _principal(spots.expression, wanted)
        self.scaling = {
            "mean": mean,
            "spread": spread,
            "image_mean": centre,
            "image_axes": axes,
            "gene_mean": gene_mean,
            "component_genes": genes,
            "component_spread": gene_size.clamp_min(1e-6),
        }
        self.scaling = {name: tensor.to(device) for name, tensor in self.scaling.items()}

    def _image(self, embedding: Tensor) -> Tensor:
        s = self.scaling
        return (standardise(embedding, s["mean"], s["spread"]) - s["image_mean"]) @ s["image_axes"].T

    def _components(self, expression: Tensor) -> Tensor:
        s = self.scaling
        return (expression - s["gene_mean"]) @ s["component_genes"].T / s["component_spread"]

    def _neighbours(self, places: Places, context: Spots) -> tuple[Tensor, Tensor, Tensor]:
        device = places.embedding.device
        index, _, present = nearest_spots(
            places.xy_um.cpu().numpy().astype(float),
            context.xy_um.cpu().numpy().astype(float),
            k=self.config["n_neighbours"],
            exclude=places.own.cpu().numpy(),
        )
        near, seen = torch.as_tensor(index, device=device), torch.as_tensor(present, device=device)
        if len(context) == 0:
            msg = "head 'in-context' got no measured spots as context."
            raise ValueError(msg)
        step = (context.xy_um[near] - places.xy_um[:, None]) / context.pitch_um  # (m, k, 2)
        return near, encode_position(step), seen

    def _build(self, n_embedding: int, n_components: int) -> _Network:
        c = self.config
        return _Network(n_embedding, n_components, c["width"], c["n_heads"], c["dropout"])

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self.network is None:
            msg = "head 'in-context' is not fitted: call fit() first."
            raise RuntimeError(msg)
        network = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        return self.config, network | {f"scaling.{name}": tensor for name, tensor in self.scaling.items()}

    @classmethod
    def from_state(cls, config: dict[str, Any], weights: dict[str, Tensor]) -> Self:
        head = cls(**config)
        parts: dict[str, dict[str, Tensor]] = {"network": {}, "scaling": {}}
        for name, tensor in weights.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        head.scaling = parts["scaling"]
        head.network = head._build(len(head.scaling["image_axes"]), len(head.scaling["component_genes"]))
        head.network.load_state_dict(parts["network"])
        return head


def _principal(values: Tensor, n_components: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (c,), axes (q, c) and spread (q,) of the first principal components of (n, c) values.

    Randomised SVD (Halko, Martinsson and Tropp, 2011) from the seed in force; signs are fixed by the largest entry.
    """
    n_components = min(n_components, len(values) - 1, values.shape[1])
    mean = values.mean(0)
    centred = values - mean
    _, size, axes = torch.svd_lowrank(centred, q=min(n_components + 10, *centred.shape), niter=4)
    axes, size = axes.T[:n_components].contiguous(), size[:n_components]
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    return mean, axes * largest.sign(), size / max(len(values) - 1, 1) ** 0.5
