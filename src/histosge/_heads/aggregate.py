"""A network that learns below the spot: what was measured on a spot is the mean of its parts, and so is what is learnt.

Notable choices, each measured by benchmarks/aggregate.py:
- the network of `in-context` is asked at every part (its own embedding and position), parts are turned into rates, which
  add up, and only their weighted mean meets the measurement; log1p values do not add up, and mean embeddings are
  narrower than those of the parts that are predicted
- a rate is expm1 of a softplus: never negative, nearly the logarithmic gene space where a gene is expressed
- the parts of a spot share its nearest measured spots, its own left out; only their relative positions differ
- keys and values are worked out once a spot, and the position code is never widened for each pair: the sums are the same
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import nn
from torch.nn.functional import softplus

from histosge._geometry import nearest_spots
from histosge._heads._protocol import Parts, Spots
from histosge._heads._space import Space, n_gene_components
from histosge._heads._training import Schedule, one_thread, seeded, stopping_spots, train
from histosge._heads.in_context import _FARTHEST_PITCH, InContext, _Network, encode_position

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from torch import Tensor

    from histosge._heads._protocol import Expansion

_BEND = 4.0
"""Sharpness of the softplus in log1p units: below about a quarter a rate leaves the straight line."""
_MOST = 9.0
"""Largest log1p rate: 8,100 of 10,000 counts in one gene."""


class _Rates(_Network):
    """Places of one spot ask its neighbours together. B spots, M places each, K neighbours, Q components, W width."""

    base: Tensor
    """(G,) where rates start, before the softplus"""

    def __init__(self, n_genes: int, *sizes: Any) -> None:
        super().__init__(*sizes)
        # weight decay pulls parameters to 0: the mean is a buffer, and only a step away from it is learnt
        self.register_buffer("base", torch.zeros(n_genes))
        self.step = nn.Parameter(torch.zeros(n_genes))

    def ask_together(
        self, place: Tensor, spots: Tensor, components: Tensor, *, near: Tensor, position: Tensor, present: Tensor
    ) -> Tensor:
        """Components (B, M, Q) at places (B, M, P), of neighbours ``near`` (B, K) at positions (B, M, K, N_POSITION)."""
        (b, m, _), k, h = place.shape, near.shape[1], self.n_heads
        x = self.dropout(self.embed(place))  # (B, M, W)
        d = x.shape[-1] // h
        both = self.key_value(self.norm_spot(self.embed(spots) + self.express(components)))  # (n, 2 W)
        key, value = both.index_select(0, near.flatten()).view(b, k, 2, h, d).unbind(2)  # (B, K, H, D) each
        # the code of a position is linear in keys and values: query and weights go through it, not every pair
        key_code, value_code = self.position.weight.view(2, h, d, -1)  # (H, D, N_POSITION) each
        key_bias, value_bias = self.position.bias.view(2, h, d)
        query = self.query(self.norm_place(x)).view(b, m, h, d)
        score = torch.einsum("bmhd,bkhd->bmhk", query, key + key_bias)
        score = score + torch.einsum("bmhp,bmkp->bmhk", torch.einsum("bmhd,hdp->bmhp", query, key_code), position)
        seen = present[:, :, None]  # (B, M, 1, K)
        weight = (score / d**0.5).masked_fill(~seen, torch.finfo(score.dtype).min).softmax(-1) * seen
        kept = self.dropout(weight)
        read = torch.einsum("bmhk,bkhd->bmhd", kept, value + value_bias)
        read = read + torch.einsum("bmhp,hdp->bmhd", torch.einsum("bmhk,bmkp->bmhp", kept, position), value_code)
        x = x + self.dropout(self.merge(read.flatten(2)))
        x = x + self.dropout(self.mlp(self.norm_mlp(x)))
        theirs = components.index_select(0, near.flatten()).view(b, k, -1)  # (B, K, Q)
        neighbours = torch.einsum("bmhk,bkq->bmhq", weight, theirs)
        neighbours = torch.einsum("bmhq,hq->bmq", neighbours, self.mix.softmax(0))
        return self.image_path(place) + neighbours * self.neighbour_path + self.correction(x)

    def log_rate(self, components: Tensor, axes: Tensor) -> Tensor:
        """log1p of the expected counts per 10,000, (..., G), of components (..., Q)."""
        return softplus(components @ axes + self.base + self.step, beta=_BEND).clamp(max=_MOST)


class Aggregate(InContext):
    """Attention of a place over its nearest measured spots, learnt through the mean of each spot's parts.

    Arguments are those of :class:`InContext`. Spots without parts are learnt from as parts of themselves.
    """

    name: ClassVar[str] = "aggregate"
    divides: ClassVar[bool] = True
    losses: Sequence[float] = ()
    network: _Rates | None  # type: ignore[assignment]

    def fit(self, spots: Spots, *, rng: np.random.Generator, progress: bool | None = None) -> Self:
        self._known = None  # worked out by another network
        device = spots.embedding.device
        parts = spots.parts or Parts.whole(spots)
        _check(parts, len(spots))
        learn, stop = (rows.to(device) for rows in stopping_spots(len(spots), rng=rng))
        with one_thread():
            known = spots.take(learn)
            n_genes = self.config["n_components"] or n_gene_components(len(known))
            space = self.space = Space.fit(known, n_image=self.config["n_image_components"], n_genes=n_genes)
            image, components = self._image(spots.embedding, space), space.components(spots.expression)
            part_image = self._image(parts.embedding, space)  # (p, P)
            with seeded(rng, device) as generator:
                network = self.network = self._build(image.shape[1], components.shape[1]).to(device)
            noise = torch.Generator(device).manual_seed(int(rng.integers(2**63 - 1)))
            mean = torch.log1p(torch.expm1(known.expression).mean(0)).clamp_min(1e-3)
            network.base.copy_(mean + torch.log1p(-torch.exp(-_BEND * mean)) / _BEND)  # inverse of the softplus
            axes = space.gene_axes * space.gene_spread[:, None]  # (Q, G)
            # a stopping spot asks the learning spots, and so does a learning spot (but not itself)
            spot_index = torch.full((len(spots),), -1, device=device)
            spot_index[learn] = torch.arange(len(learn), device=device)
            near, position, present = self._around(spots.xy_um, parts.xy_um[parts.index], spot_index, known)
            near = learn[near]

            def error(rows: Tensor, seen: Tensor) -> Tensor:
                place = part_image[parts.index[rows]]  # (B, K, P)
                around = {"near": near[rows], "position": position[rows], "present": seen}
                answer = network.ask_together(place, image, components, **around)
                rate = torch.expm1(network.log_rate(answer, axes))  # (B, K, G)
                mean = (rate * parts.weight[rows][:, :, None]).sum(1)
                return self._error(mean, spots, rows)

            def loss(batch: Tensor) -> Tensor:
                rows = learn[batch.to(device)]
                hide = torch.rand(len(rows), 1, 1, device=device, generator=noise) * self.config["thinning"]
                drawn = torch.rand(present[rows].shape, device=device, generator=noise)
                return error(rows, present[rows] & (drawn >= hide))

            with torch.no_grad():  # the error of the mean is the unit, so that clipped gradients are alike everywhere
                plain = torch.expm1(mean).expand(len(learn), -1)
                unit = float(self._error(plain, spots, learn).abs().clamp_min(1e-6))
            schedule = Schedule(n_steps=300, batch_size=64, learning_rate=3e-3, weight_decay=0.5, patience=10)
            self.losses = train(
                network,
                loss=lambda batch: loss(batch) / unit,
                stopping_loss=lambda: error(stop, present[stop]) / unit,
                n_spots=len(learn),
                schedule=schedule.over(len(learn)),
                generator=generator,
                noise=noise,
                desc="training aggregate head",
                progress=progress,
            )
        return self

    def _error(self, rate: Tensor, spots: Spots, rows: Tensor) -> Tensor:
        """Disagreement of mean rates (b, G), in counts per 10,000, with what was measured on the spots ``rows``."""
        return (torch.log1p(rate) - spots.expression[rows]).square().mean()

    def expansion(self, columns: Tensor | None = None) -> Expansion:
        space, network = self.space, self.network
        axes, start = space.gene_axes * space.gene_spread[:, None], network.base + network.step  # type: ignore[union-attr]
        if columns is not None:
            axes, start = axes[:, columns], start[columns]

        return lambda components: softplus(torch.addmm(start, components, axes), beta=_BEND).clamp_(max=_MOST)

    def _around(
        self, centre: Tensor, xy_um: Tensor, spot_index: Tensor, context: Spots
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Spots near centres (n, 2), and where they lie from each centre's places (n, M, 2)."""
        index, _, present = nearest_spots(
            centre.cpu().numpy().astype(float),
            context.xy_um.cpu().numpy().astype(float),
            k=self.config["n_neighbours"],
            exclude=spot_index.cpu().numpy(),
        )
        near = torch.as_tensor(index, device=centre.device)  # (n, K)
        step = (context.xy_um[near][:, None] - xy_um[:, :, None]) / context.pitch_um  # (n, M, K, 2)
        seen = torch.as_tensor(present, device=centre.device)[:, None] & (step.norm(dim=-1) <= _FARTHEST_PITCH)
        step = torch.where(seen[..., None], step, torch.zeros_like(step))  # the code of what is not read stays small
        return near, encode_position(step), seen

    def _build(self, n_embedding: int, n_components: int) -> _Rates:
        c = self.config
        n_genes = len(self.space.gene_mean)  # type: ignore[union-attr]
        return _Rates(n_genes, n_embedding, n_components, c["width"], c["n_heads"], c["dropout"])


def _check(parts: Parts, n_spots: int) -> None:
    total = parts.weight.sum(1)
    if len(total) != n_spots or parts.index.shape != parts.weight.shape:
        msg = (
            f"spots.parts: index {tuple(parts.index.shape)} and weight {tuple(parts.weight.shape)} must both have a row "
            f"for each of the {n_spots} spots."
        )
        raise ValueError(msg)
    wrong = (total - 1).abs() > 1e-3
    if bool(wrong.any()) or bool((parts.weight < 0).any()):
        msg = (
            f"spots.parts: the weights of {int(wrong.sum())} of {n_spots} spots do not sum to 1, or some are negative "
            f"(least {float(parts.weight.min()):.4g}). Divide each spot's weights by their sum, or leave the spot out."
        )
        raise ValueError(msg)
