"""Kriging: an exact Gaussian process on position and image, conditioned on the measured spots.

The strongest of the plain rivals, and half of the default (docs/benchmarks.md). Notable choices:
- covariance of two places = near in space + alike in the image + both + linear in the image
- principal components of the expression have shares of each and noise of their own, alike ones in common; lengths are
  common to all
- lengths and shares maximise the marginal likelihood (Rasmussen and Williams, 2006, §5.4) of a sample of the spots,
  under weak priors that keep small sections from running away
- nothing of the spots is stored: prediction conditions on the context it is given, a place's own spot left out
- that is exact, and nearly so with a large context: ``_conditioning.py``
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from histosge._heads._conditioning import JITTER, Conditioned, Covariance, n_kinds, tie
from histosge._heads._space import Space, n_gene_components
from histosge._heads._training import one_thread, steps_bar

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from torch import Tensor

    from histosge._heads._conditioning import Known
    from histosge._heads._protocol import Expansion, Queries, Run, Spots

_MOST_COMPONENTS = 16
"""Components beyond these are nearly all noise, and each costs a factorisation."""
_PAIRS_AT_ONCE = {"cpu": 2**18, "other": 2**25}
"""Covariances of places with spots that are worked out at once: on a processor, what its cache holds."""
_FIRST_LENGTHS = (5.0, 0.8, 8.0, 0.8)
"""Where lengths start and what the prior holds them near: pitches, image, and both again for the product."""


class Kriging:
    """Gaussian process on position and image.

    Parameters
    ----------
    n_components
        Principal components of the expression; by default by the number of spots, 8 to 16.
    n_image_components
        Principal components of the embedding, at most one for every four spots.
    n_sample
        Spots, drawn at random, that lengths and shares are fitted to.
    n_steps
        Steps of the optimiser.
    """

    name: ClassVar[str] = "kriging"
    ensembles_folds: ClassVar[bool] = False
    divides: ClassVar[bool] = False
    losses: Sequence[float] = ()

    def __init__(
        self, *, n_components: int | None = None, n_image_components: int = 64, n_sample: int = 300, n_steps: int = 30
    ) -> None:
        self.config: dict[str, Any] = {
            "n_components": n_components,
            "n_image_components": n_image_components,
            "n_sample": n_sample,
            "n_steps": n_steps,
        }
        self.space: Space | None = None
        self.parameters: dict[str, Tensor] = {}
        self._context: Spots | None = None
        self._conditioned: Conditioned | None = None

    def fit(self, spots: Spots, *, rng: np.random.Generator, progress: bool | None = None) -> Self:
        device = spots.embedding.device
        n_genes = self.config["n_components"] or min(n_gene_components(len(spots)), _MOST_COMPONENTS)
        generator = torch.Generator().manual_seed(int(rng.integers(2**63 - 1)))
        with one_thread():
            self.space = Space.fit(spots, n_image=self.config["n_image_components"], n_genes=n_genes)
            sample = torch.randperm(len(spots), generator=generator)[: self.config["n_sample"]]
            known = spots.take(sample.to(device))
            place, image = _inputs(known, self.space, spots.pitch_um)
            target = self.space.components(known.expression)  # (n, Q)
            try:
                lengths, shares = self._maximise(place, image, target, progress=progress)
            except torch.linalg.LinAlgError as error:  # what is not a number has no factor
                raise _diverged() from error
            shares = tie(shares.exp(), n_kinds(len(spots))).log()
            self.parameters = {"lengths": lengths, "shares": shares}
        self._context = self._conditioned = None  # worked out with other lengths
        return self

    def _maximise(
        self, place: Tensor, image: Tensor, target: Tensor, *, progress: bool | None
    ) -> tuple[Tensor, Tensor]:
        """Lengths (4,) and shares (5, Q), noise last, as logarithms: of the largest posterior density."""
        n, n_components = target.shape
        first = target.new_tensor(_FIRST_LENGTHS).log()
        even, half = math.log(0.5 / 4), math.log(0.5)  # half of a component's variance is noise, to begin with
        lengths = first.clone().requires_grad_()
        common = target.new_full((5, 1), even).index_fill(0, torch.tensor(4, device=target.device), half)
        start = common.clone()
        common = common.requires_grad_()
        own = target.new_zeros(5, n_components).requires_grad_()
        distance, unlike, alike = _distances(place, place), _squares(image, image), image @ image.T
        optimiser = torch.optim.Adam([lengths, common, own], lr=0.1)
        with steps_bar(desc="fitting kriging", total=self.config["n_steps"], unit="step", show=progress) as bar:
            for _ in range(self.config["n_steps"]):
                optimiser.zero_grad(set_to_none=True)
                share = (common + own).exp()  # (5, Q)
                kernels = _kernels(distance, unlike, alike, lengths)  # (4, n, n)
                prior = (lengths - first).square().sum() / (2 * 0.5**2) + (common - start).square().sum() / 2
                prior = prior + own.square().sum() / 2
                # the likelihood's gradient is known (ibid., equation 5.9): cheaper than back through the factors
                with torch.no_grad():
                    flat = kernels.flatten(1)  # (4, n n)
                    covariance = (share[:4].T @ flat).view(-1, n, n)  # (Q, n, n)
                    covariance.diagonal(dim1=1, dim2=2).add_((share[4] + JITTER)[:, None])
                    factor = torch.linalg.cholesky(covariance)
                    inverse = torch.cholesky_inverse(factor)  # (Q, n, n)
                    weight = inverse @ target.T[:, :, None]  # (Q, n, 1)
                    deviance = (target.T[:, None] @ weight).sum() / 2
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

    def predict(self, places: Queries, *, context: Spots) -> Tensor:
        (components,) = self.answers([self], places, context=context)
        with torch.inference_mode():
            return self.expansion()(components)

    @classmethod
    def answers(cls, heads: Sequence[Self], places: Queries, *, context: Spots, run: Run = map) -> list[Tensor]:
        return [head._answer(places, context, run) for head in heads]

    def expansion(self, columns: Tensor | None = None) -> Expansion:
        return self.space.expansion(columns)  # type: ignore[union-attr]

    def _answer(self, places: Queries, context: Spots, run: Run) -> Tensor:
        """Components (m, Q) at places."""
        if self.space is None:
            raise _not_fitted()
        device = places.embedding.device
        space = self.space = self.space.to(device)
        self.parameters = {name: tensor.to(device) for name, tensor in self.parameters.items()}
        components = space.gene_mean.new_zeros(len(places), len(space.gene_axes))
        if len(context) == 0 or len(places) == 0:  # nothing is known around: the prior mean
            return components
        with torch.inference_mode():
            known = self._condition(context, run)
            tiles = known.tiles(places.xy_um / context.pitch_um, places.spot_index)
            if len(tiles) == 1:
                [(tile, *_)] = tiles
                weights = known.known(tile, leave_out=bool((places.spot_index >= 0).any()))
                return self._read(places, weights, space, pitch_um=context.pitch_um, run=run)[0]

            @torch.inference_mode()
            def answer(asked: tuple[int, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
                tile, rows, _ = asked
                some = places.take(rows)
                weights = known.known(tile, leave_out=bool((some.spot_index >= 0).any()))
                return self._read(some, weights, space, pitch_um=context.pitch_um)

            total = components.new_zeros(len(places), 1)
            for (_, rows, share), (said, sound) in zip(tiles, run(answer, tiles), strict=True):
                share = (share * sound)[:, None]
                total.index_add_(0, rows, share)
                components.index_add_(0, rows, share * said)
            return components.div_(total)

    def _condition(self, context: Spots, run: Run) -> Conditioned:
        """Spots of the context, worked out once."""
        if self._conditioned is None or self._context is not context:
            space: Space = self.space  # type: ignore[assignment]
            place, image = _inputs(context, space, context.pitch_um)
            covariance = Covariance.of(*(self.parameters[name].exp() for name in ("lengths", "shares")))
            self._conditioned = Conditioned(place, image, space.components(context.expression), covariance, run=run)
            self._context = context
        return self._conditioned

    def _read(
        self, places: Queries, known: Known, space: Space, *, pitch_um: float, run: Run = map
    ) -> tuple[Tensor, Tensor]:
        """Components (m, Q) at places, and whether they are sound, (m,).

        Where a place is a spot they are those that all other spots give it, unless what is known holds it unseen.
        """
        out = known.slope.new_empty(len(places), known.slope.shape[1])
        pairs = _PAIRS_AT_ONCE["cpu" if out.device.type == "cpu" else "other"]
        conditioned: Conditioned = self._conditioned  # type: ignore[assignment]
        covariance, (near, like) = conditioned.covariance, conditioned.sources(known)
        weights = covariance.shares[:3, None] * known.weight  # (3, n, Q) of each covariance but the linear one

        @torch.inference_mode()
        def read(rows: slice) -> None:
            place, image = _inputs(places.take(rows), space, pitch_um)
            some = image @ known.slope  # (m', Q)
            for decay, weight in zip(covariance.decays(place, image, near, like), weights, strict=True):
                some.addmm_(decay, weight)
            out[rows] = some

        n = max(1, pairs // len(near))
        list(run(read, [slice(start, start + n) for start in range(0, len(places), n)]))
        sound = torch.ones_like(places.spot_index, dtype=torch.bool)
        if known.left_out is not None:
            hidden = places.spot_index >= 0
            at = spot_index = places.spot_index[hidden]
            if known.spots is not None:
                at = torch.searchsorted(known.spots, spot_index).clamp_max(len(known.spots) - 1)
                sound[hidden] = known.spots[at] == spot_index
            out[hidden] = known.left_out[at]
        return out, sound

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self.space is None:
            raise _not_fitted()
        return self.config, self.parameters | {f"space.{name}": t for name, t in self.space.state().items()}

    @classmethod
    def from_state(cls, config: dict[str, Any], weights: dict[str, Tensor]) -> Self:
        head = cls(**config)
        head.space = Space(**{n.removeprefix("space."): t for n, t in weights.items() if n.startswith("space.")})
        head.parameters = {n: t for n, t in weights.items() if not n.startswith("space.")}
        return head


def _inputs(where: Spots | Queries, space: Space, pitch_um: float) -> tuple[Tensor, Tensor]:
    """Positions (n, 2) in pitches, and image components (n, P) of total variance 1."""
    scale = space.image_spread.square().sum().sqrt().clamp_min(1e-6)
    return where.xy_um / pitch_um, space.image(where.embedding) / scale


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # not by the square of the difference: sections lie thousands of pitches apart, where that loses all digits
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _squares(a: Tensor, b: Tensor) -> Tensor:
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min(0)


def _kernels(distance: Tensor, unlike: Tensor, alike: Tensor, lengths: Tensor) -> Tensor:
    """Near, alike, near and alike, linear: (4, m, n)."""
    near, image, both_near, both_image = lengths.exp()
    return torch.stack(
        [
            torch.exp(-distance / near),
            torch.exp(-unlike / (2 * image**2)),
            torch.exp(-distance / both_near - unlike / (2 * both_image**2)),
            alike,
        ]
    )


def _not_fitted() -> RuntimeError:
    return RuntimeError("head 'kriging' is not fitted: call fit() first.")


def _diverged() -> RuntimeError:
    return RuntimeError(
        "kriging diverged: the likelihood was not a number. "
        "Look for NaN or infinite values in the embedding and the counts."
    )
