"""Kriging: a Gaussian process on position and image, conditioned on the measured spots.

It is the strongest head without a network, and half of the default (docs/benchmarks.md). Notable choices:
- covariance of two targets = near in space + similar in the image + both + linear in the image; targets of different
  sections are not near
- each principal component of the expression has its own noise and shares of these terms, and similar components have
  the same; lengths are common to all
- lengths and shares maximise the marginal likelihood (Rasmussen and Williams, 2006, §5.4) of a sample of the spots,
  under weak priors that prevent extreme values on small sections
- nothing of the spots is stored: a prediction conditions on the given context, without the hidden spot of the target
- predictions are exact, with a large context nearly so: ``_conditioning.py``
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from histosge._heads._conditioning import (
    JITTER,
    Conditioned,
    Covariance,
    Points,
    n_kernel_groups,
    share_hyperparameters,
)
from histosge._heads._protocol import LowRank
from histosge._heads._space import Space, n_gene_components
from histosge._heads._state import fitted, join_state, split_state
from histosge._heads._training import one_thread, steps_bar

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from torch import Tensor

    from histosge._heads._conditioning import Weights
    from histosge._heads._protocol import Expansion, Queries, Run, Spots

_MOST_COMPONENTS = 16
"""Largest number of components: further ones are nearly all noise, and each takes a factorisation."""
_PAIRS_AT_ONCE = {"cpu": 2**18, "other": 2**25}
"""Covariances of targets with spots that are computed at once: on a processor, they fit in its cache."""
_PLACES_AT_ONCE = 512
"""Targets whose image components are computed at once: their embeddings fit in the cache."""
_FIRST_LENGTHS = (5.0, 0.8, 8.0, 0.8)
"""Initial lengths, and centre of their prior: in pitches, in the image, and both again for the product."""
_APART_PITCH = 1e9
"""Distance of spots of different sections in the likelihood; an infinite distance has no finite gradient."""


class Kriging(LowRank):
    """Gaussian process on position and image.

    Parameters
    ----------
    n_components
        Principal components of the expression. By default 8 to 16, more with more spots.
    n_image_components
        Principal components of the embedding, at most one for every four spots.
    n_sample
        Number of randomly drawn spots that lengths and shares are fitted to.
    n_steps
        Steps of the optimiser.
    n_exact
        Spots up to which predictions are exact. With more, places are predicted tile by tile.
    n_inducing
        Inducing points of the prediction by tiles: spots, drawn at random.
    n_tile
        Spots in a tile, roughly: two thirds to one and a half times as many.
    n_near
        Spots that a tile conditions on exactly: its own and those around it, so that all of its places have some around
        them.
    """

    name: ClassVar[str] = "kriging"

    def __init__(
        self,
        *,
        n_components: int | None = None,
        n_image_components: int = 64,
        n_sample: int = 300,
        n_steps: int = 30,
        n_exact: int = 6000,
        n_inducing: int = 1000,
        n_tile: int = 500,
        n_near: int = 1000,
    ) -> None:
        self.config: dict[str, Any] = {
            "n_components": n_components,
            "n_image_components": n_image_components,
            "n_sample": n_sample,
            "n_steps": n_steps,
            "n_exact": n_exact,
            "n_inducing": n_inducing,
            "n_tile": n_tile,
            "n_near": n_near,
        }
        self.space: Space | None = None
        self.parameters: dict[str, Tensor] = {}

    def fit(self, spots: Spots, *, rng: np.random.Generator, progress: bool | None = None) -> Self:
        device = spots.embedding.device
        n_genes = self.config["n_components"] or min(n_gene_components(len(spots)), _MOST_COMPONENTS)
        generator = torch.Generator().manual_seed(int(rng.integers(2**63 - 1)))
        with one_thread():
            self.space = Space.fit(spots, n_image=self.config["n_image_components"], n_genes=n_genes)
            sample = torch.randperm(len(spots), generator=generator)[: self.config["n_sample"]]
            known = spots.take(sample.to(device))
            points = _points(known, self.space, spots.pitch_um)
            response = self.space.components(known.expression)  # (n, Q)
            try:
                lengths, shares = self._maximise(points, response, progress=progress)
            except torch.linalg.LinAlgError as error:  # NaN has no factor
                raise _diverged() from error
            shares = share_hyperparameters(
                shares.exp(), n_kernel_groups(len(spots), n_exact=self.config["n_exact"])
            ).log()
            self.parameters = {"lengths": lengths, "shares": shares}
        return self

    def _maximise(self, points: Points, response: Tensor, *, progress: bool | None) -> tuple[Tensor, Tensor]:
        """Find lengths (4,) and shares (5, Q), noise last, of the largest posterior density, as logarithms."""
        n, n_components = response.shape
        first = response.new_tensor(_FIRST_LENGTHS).log()
        even, half = math.log(0.5 / 4), math.log(0.5)  # at the start half of a component's variance is noise
        lengths = first.clone().requires_grad_()
        common = response.new_full((5, 1), even).index_fill(0, torch.tensor(4, device=response.device), half)
        start = common.clone()
        common = common.requires_grad_()
        own = response.new_zeros(5, n_components).requires_grad_()
        distance, image = _distances(points.position, points.position), points.image
        distance = distance.masked_fill_(points.section[:, None] != points.section, _APART_PITCH)
        unlike, similar = _squares(image, image), image @ image.T
        optimiser = torch.optim.Adam([lengths, common, own], lr=0.1)
        with steps_bar(desc="fitting kriging", total=self.config["n_steps"], unit="step", show=progress) as bar:
            for _ in range(self.config["n_steps"]):
                optimiser.zero_grad(set_to_none=True)
                share = (common + own).exp()  # (5, Q)
                kernels = _kernels(distance, unlike, similar, lengths)  # (4, n, n)
                prior = (lengths - first).square().sum() / (2 * 0.5**2) + (common - start).square().sum() / 2
                prior = prior + own.square().sum() / 2
                # closed form of the likelihood's gradient (ibid., equation 5.9): cheaper than through the factors
                with torch.no_grad():
                    flat = kernels.flatten(1)  # (4, n n)
                    covariance = (share[:4].T @ flat).view(-1, n, n)  # (Q, n, n)
                    covariance.diagonal(dim1=1, dim2=2).add_((share[4] + JITTER)[:, None])
                    factor = torch.linalg.cholesky(covariance)
                    inverse = torch.cholesky_inverse(factor)  # (Q, n, n)
                    weight = inverse @ response.T[:, :, None]  # (Q, n, 1)
                    deviance = (response.T[:, None] @ weight).sum() / 2
                    deviance = deviance + factor.diagonal(dim1=1, dim2=2).log().sum()
                    slope = inverse.baddbmm_(weight, weight.mT, alpha=-1).div_(2 * n).flatten(1)  # (Q, n n)
                    of_noise = slope[:, :: n + 1].sum(1)  # (Q,) along the diagonal
                    of_share = torch.cat([flat @ slope.T, of_noise[None]])  # (5, Q)
                    of_kernels = (share[:4] @ slope).view_as(kernels)
                torch.autograd.backward([kernels, share, prior / n], [of_kernels, of_share, None])
                optimiser.step()
                bar.update()
                bar.set_postfix(loss=f"{float((deviance + prior.detach()) / n):.4f}")
        share = (common + own).detach()
        if not (lengths.isfinite().all() and share.isfinite().all()):
            raise _diverged()
        return lengths.detach(), share

    def condition(self, context: Spots, *, run: Run = map) -> Conditioned | None:
        """Condition on the spots of the context; ``None`` if there are none."""
        space = fitted(self.space, self)
        if len(context) == 0:
            return None
        with torch.inference_mode():
            covariance = Covariance.of(*(self.parameters[name].exp() for name in ("lengths", "shares")))
            points, response = _points(context, space, context.pitch_um), space.components(context.expression)
            sizes = {name: self.config[name] for name in ("n_exact", "n_inducing", "n_tile", "n_near")}
            return Conditioned(points, response, covariance, pitch_um=context.pitch_um, run=run, **sizes)

    @classmethod
    def components(
        cls, heads: Sequence[Self], conditions: Sequence[Conditioned | None], queries: Queries, *, run: Run = map
    ) -> list[Tensor]:
        pairs = zip(heads, conditions, strict=True)
        return [head._components(conditioned, queries, run) for head, conditioned in pairs]

    def expansion(self, columns: Tensor | None = None) -> Expansion:
        return fitted(self.space, self).expansion(columns)

    def _components(self, conditioned: Conditioned | None, queries: Queries, run: Run) -> Tensor:
        """Predict components (m, Q) at targets."""
        space = fitted(self.space, self)
        components = space.gene_mean.new_zeros(len(queries), len(space.gene_axes))
        if conditioned is None or len(queries) == 0:  # no context: the prior mean
            return components
        with torch.inference_mode():
            points = _points(queries, space, conditioned.pitch_um, run=run)
            tiles = conditioned.tiles(points, queries.spot_index)
            if len(tiles) == 1:
                weights = conditioned.weights(tiles[0][0], leave_out=bool((queries.spot_index >= 0).any()))
                return _read(points, queries.spot_index, weights, conditioned, run=run)[0]

            @torch.inference_mode()
            def predict(part: tuple[int, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
                tile, rows, _ = part
                spot_index = queries.spot_index[rows]
                weights = conditioned.weights(tile, leave_out=bool((spot_index >= 0).any()))
                return _read(points.take(rows), spot_index, weights, conditioned)

            total = components.new_zeros(len(queries), 1)
            for (_, rows, share), (predicted, sound) in zip(tiles, run(predict, tiles), strict=True):
                share = (share * sound)[:, None]
                total.index_add_(0, rows, share)
                components.index_add_(0, rows, share * predicted)
            return components.div_(total)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        space = fitted(self.space, self)
        return self.config, join_state(parameters=self.parameters, space=space.state())

    @classmethod
    def from_state(cls, config: dict[str, Any], weights: dict[str, Tensor]) -> Self:
        head, stored = cls(**config), split_state(weights)
        head.space, head.parameters = Space(**stored["space"]), stored["parameters"]
        return head


def _read(
    points: Points, spot_index: Tensor, weights: Weights, conditioned: Conditioned, *, run: Run = map
) -> tuple[Tensor, Tensor]:
    """Return components (m, Q) at points, and whether they are valid, (m,).

    At a point that is a spot they are predicted from all other spots. They are not valid if ``weights`` lacks this
    spot.
    """
    out = weights.slope.new_empty(len(points), weights.slope.shape[1])
    pairs = _PAIRS_AT_ONCE["cpu" if out.device.type == "cpu" else "other"]
    covariance, sources = conditioned.covariance, conditioned.sources(weights)
    each = covariance.shares[:3, None] * weights.weight  # (3, n, Q) for each covariance but the linear one

    @torch.inference_mode()
    def read(rows: slice) -> None:
        some = points.take(rows)
        found = some.image @ weights.slope  # (m', Q)
        for decay, weight in zip(covariance.decays(some, sources), each, strict=True):
            found.addmm_(decay, weight)
        out[rows] = found

    n = max(1, pairs // len(sources))
    list(run(read, [slice(start, start + n) for start in range(0, len(points), n)]))
    sound = torch.ones_like(spot_index, dtype=torch.bool)
    if weights.left_out is not None:
        hidden = spot_index >= 0
        at = spot = spot_index[hidden]
        if weights.spots is not None:
            at = torch.searchsorted(weights.spots, spot).clamp_max(len(weights.spots) - 1)
            sound[hidden] = weights.spots[at] == spot
        out[hidden] = weights.left_out[at]
    return out, sound


def _points(places: Spots | Queries, space: Space, pitch_um: float, *, run: Run | None = None) -> Points:
    """Return positions in pitches, and image components of total variance 1; with ``run`` a few targets at a time."""
    scale = space.image_spread.square().sum().sqrt().clamp_min(1e-6)
    n = len(places)
    image = space.gene_mean.new_empty(n, len(space.image_axes))

    def fill(rows: slice) -> None:
        image[rows] = space.image(places.embedding[rows]) / scale

    if run is None:
        image = space.image(places.embedding) / scale
    else:
        list(run(torch.inference_mode()(fill), [slice(i, i + _PLACES_AT_ONCE) for i in range(0, n, _PLACES_AT_ONCE)]))
    return Points(places.xy_um / pitch_um, places.section, image)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # not from a matrix product, which loses digits: positions are many pitches from the origin
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _squares(a: Tensor, b: Tensor) -> Tensor:
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min(0)


def _kernels(distance: Tensor, unlike: Tensor, similar: Tensor, lengths: Tensor) -> Tensor:
    """Near, similar, near and similar, linear: (4, m, n)."""
    near, image, both_near, both_image = lengths.exp()
    return torch.stack(
        [
            torch.exp(-distance / near),
            torch.exp(-unlike / (2 * image**2)),
            torch.exp(-distance / both_near - unlike / (2 * both_image**2)),
            similar,
        ]
    )


def _diverged() -> RuntimeError:
    return RuntimeError(
        "kriging diverged: the likelihood was not a number. "
        "Look for NaN or infinite values in the embedding and the counts."
    )
