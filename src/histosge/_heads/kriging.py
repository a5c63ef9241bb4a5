"""Kriging: an exact Gaussian process on position and image, conditioned on the measured spots.

The strongest of the plain rivals, and half of the default (docs/benchmarks.md). Notable choices:
- covariance of two places = near in space + alike in the image + both + linear in the image
- each principal component of the expression has its own share of each and its own noise; lengths are common to all
- lengths and shares maximise the marginal likelihood (Rasmussen and Williams, 2006, §5.4) of a sample of the spots,
  under weak priors that keep small sections from running away
- nothing of the spots is stored: prediction conditions on the context it is given, a place's own spot left out exactly
- a large context is cut into tiles of the plane, each conditioned on the spots around it: where they are is a matter of
  the context alone, so that a place gets the same answer in whatever company it comes
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from scipy.spatial import cKDTree

from histosge._heads._protocol import Places, Spots
from histosge._heads._space import Space, n_gene_components
from histosge._training import one_thread, steps_bar

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from histosge._heads._protocol import Expansion, Run

_MOST_COMPONENTS = 16
"""Components beyond these are nearly all noise, and each costs a factorisation."""
_MOST_SPOTS = 6000
"""With more spots, places are predicted tile by tile, from the nearest ``_NEAR_SPOTS`` and ``_DRAWN_SPOTS`` of all."""
_NEAR_SPOTS = 1000
_DRAWN_SPOTS = 1500
"""Spots drawn once from all: near ones know the place, these know the image, and hold tiles together."""
_INNER = 0.6
"""A tile lies within this share of the way to the farthest of its spots: all of its places have spots around them."""
_KEPT_PARTS = 64
"""Tiles that are kept worked out, a megabyte each."""
_PAIRS_AT_ONCE = {"cpu": 2**18, "other": 2**25}
"""Covariances of places with spots that are worked out at once: on a processor, what its cache holds."""
_FIRST_LENGTHS = (5.0, 0.8, 8.0, 0.8)
"""Where lengths start and what the prior holds them near: pitches, image, and both again for the product."""
_JITTER = 1e-4


@dataclass(frozen=True)
class _Known:
    """Spots worked into weights: kept, since places come in parts."""

    place: Tensor
    """(n, 2) in pitches"""
    image: Tensor
    """(n, P)"""
    weight: Tensor
    """(3, n, Q) of each covariance but the linear one"""
    slope: Tensor
    """(P, Q) what the linear one comes to"""
    left_out: Tensor | None
    """(n, Q) components at each spot, given all others"""


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
    averaged: ClassVar[bool] = False
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
        self._known: OrderedDict[bytes, _Known] = OrderedDict()

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
            self.parameters = self._maximise(place, image, target, progress=progress)
        self._context = None  # worked out with other lengths
        return self

    def _maximise(self, place: Tensor, image: Tensor, target: Tensor, *, progress: bool | None) -> dict[str, Tensor]:
        """Lengths (4,), shares (4, Q) and noise (Q,), as logarithms, of the largest posterior density."""
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
                    covariance.diagonal(dim1=1, dim2=2).add_((share[4] + _JITTER)[:, None])
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
        found = {"lengths": lengths.detach(), "shares": (common + own).detach()}
        if not all(bool(tensor.isfinite().all()) for tensor in found.values()):
            msg = (
                "kriging diverged: the likelihood was not a number. "
                "Look for NaN or infinite values in the embedding and the counts."
            )
            raise RuntimeError(msg)
        return found

    def predict(self, places: Places, *, context: Spots) -> Tensor:
        (components,) = self.answers([self], places, context=context)
        with torch.inference_mode():
            return self.expansion()(components)

    @classmethod
    def answers(cls, heads: Sequence[Self], places: Places, *, context: Spots, run: Run = map) -> list[Tensor]:
        return [head._answer(places, context, run) for head in heads]

    def expansion(self, columns: Tensor | None = None) -> Expansion:
        return self.space.expansion(columns)  # type: ignore[union-attr]

    def _answer(self, places: Places, context: Spots, run: Run) -> Tensor:
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
            if self._context is not context:
                self._context, self._known = context, OrderedDict()
            for rows, near in _parts(places, context):
                own = places.own[rows]
                at = torch.searchsorted(near, own).clamp_max(len(near) - 1)
                own = torch.where(near[at] == own, at, -1)  # `near` is sorted; -1 is in no part
                known = self._recall(context, near, space, leave_out=bool((own >= 0).any()))
                some = Places(places.embedding[rows], places.xy_um[rows], own)
                components[rows] = self._read(some, known, space, pitch_um=context.pitch_um, run=run)
        return components

    def _recall(self, context: Spots, near: Tensor, space: Space, *, leave_out: bool) -> _Known:
        """Spots ``near`` of the context, worked out when they are first asked for, and of late."""
        key = near.cpu().numpy().tobytes()
        known = self._known.get(key)
        if known is None or (leave_out and known.left_out is None):
            known = self._known[key] = self._condition(context.take(near), space, leave_out=leave_out)
        self._known.move_to_end(key)
        while len(self._known) > _KEPT_PARTS:
            self._known.popitem(last=False)
        return known

    def _condition(self, spots: Spots, space: Space, *, leave_out: bool) -> _Known:
        """Weights of all spots, and what is said at each spot by all others."""
        share, lengths = self.parameters["shares"].exp(), self.parameters["lengths"]
        place, image = _inputs(spots, space, spots.pitch_um)
        near, alike, both = _decays(place, image, place, image, lengths)  # (n, n) each
        target = space.components(spots.expression)  # (n, Q)
        weight = torch.empty_like(target)
        left_out = torch.empty_like(target) if leave_out else None
        matrix = torch.empty_like(near)  # covariance, its factor and its inverse: there is room for one of them
        for q, (of_near, of_alike, of_both, linear, noise) in enumerate(share.T.tolist()):
            torch.mul(near, of_near, out=matrix)
            matrix.add_(alike, alpha=of_alike).add_(both, alpha=of_both).addmm_(image, image.T, alpha=linear)
            matrix.diagonal().add_(noise + _JITTER)
            factor = torch.linalg.cholesky(matrix.T, out=matrix.T)  # by columns, as LAPACK likes it: nothing is copied
            half = torch.linalg.solve_triangular(factor, target[:, q : q + 1], upper=False)
            weight[:, q] = torch.linalg.solve_triangular(factor.T, half, upper=True)[:, 0]
            if left_out is not None:
                # Rasmussen and Williams (2006), equation 5.12, without the spot's own term instead of with its difference
                # from itself: not even a rounding error of what was measured there is left
                inverse = torch.cholesky_inverse(factor, out=factor)
                precision = inverse.diagonal().clone()
                inverse.diagonal().zero_()
                left_out[:, q] = -(inverse @ target[:, q]) / precision
        return _Known(place, image, share[:3, None] * weight, share[3] * (image.T @ weight), left_out)

    def _read(self, places: Places, known: _Known, space: Space, *, pitch_um: float, run: Run = map) -> Tensor:
        """Components (m, Q) at places; where a place is a spot, those that all other spots give it."""
        lengths = self.parameters["lengths"]
        out = known.slope.new_empty(len(places), known.slope.shape[1])
        pairs = _PAIRS_AT_ONCE["cpu" if out.device.type == "cpu" else "other"]

        @torch.inference_mode()
        def read(rows: slice) -> None:
            place, image = _inputs(places.take(rows), space, pitch_um)
            some = image @ known.slope  # (m', Q)
            for decay, weight in zip(
                _decays(place, image, known.place, known.image, lengths), known.weight, strict=True
            ):
                some.addmm_(decay, weight)
            out[rows] = some

        n = max(1, pairs // len(known.place))
        list(run(read, [slice(start, start + n) for start in range(0, len(places), n)]))
        if known.left_out is not None:
            hidden = places.own >= 0
            out[hidden] = known.left_out[places.own[hidden]]
        return out

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


def _inputs(where: Spots | Places, space: Space, pitch_um: float) -> tuple[Tensor, Tensor]:
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


def _decays(
    place: Tensor, image: Tensor, places: Tensor, images: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Near, alike, near and alike: what ``_kernels`` stacks, (m, n) each, worked out where it lies."""
    near, alike, both_near, both_alike = lengths.exp().tolist()
    x, y = places.T.contiguous()  # (n,) each: strided ones cost several times as much
    distance = (place[:, :1] - x).square_()
    other = place[:, 1:] - y
    distance.addcmul_(other, other).sqrt_()
    # minus half the square of the difference, by one product: a b - a a / 2 - b b / 2
    a = torch.cat([image, image.square().sum(1, keepdim=True) / -2, image.new_ones(len(image), 1)], 1)
    b = torch.cat([images, images.new_ones(len(images), 1), images.square().sum(1, keepdim=True) / -2], 1)
    unlike = torch.mm(a, b.T, out=other).clamp_max_(0)
    both = _exp(torch.mul(unlike, 1 / both_alike**2).add_(distance, alpha=-1 / both_near))
    return _exp(distance.mul_(-1 / near)), _exp(unlike.mul_(1 / alike**2)), both


def _exp(values: Tensor) -> Tensor:
    """Exponential in place; on a processor numpy's, which takes half as long as torch's."""
    if values.device.type != "cpu":
        return values.exp_()
    array = values.numpy()
    np.exp(array, out=array)
    return values


def _parts(places: Places, context: Spots) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of places, and the (sorted) rows of the spots that they are predicted from: all, or those around a tile.

    Those around a tile are the nearest to its middle, and some drawn from all (docs/benchmarks.md). Tiles are halves of
    halves of the box around the context, down to where the nearest spots reach well beyond the tile. Places outside the box go to the tile at its edge.
    """
    device = places.embedding.device
    if len(context) <= _MOST_SPOTS:
        yield torch.arange(len(places), device=device), torch.arange(len(context), device=device)
        return
    xy, spots = (where.xy_um.cpu().numpy().astype(float) for where in (places, context))
    tree = cKDTree(spots)
    drawn = np.random.default_rng(0).choice(len(spots), min(_DRAWN_SPOTS, len(spots)), replace=False)
    waiting: list[tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]]
    waiting = [(np.arange(len(xy)), spots.min(0), spots.max(0))]
    while waiting:
        rows, low, high = waiting.pop()
        if len(rows) == 0:
            continue
        middle = (low + high) / 2
        distance, near = tree.query(middle, k=list(range(1, min(_NEAR_SPOTS, tree.n) + 1)))
        reach = max(_INNER * distance[-1], context.pitch_um / 2)  # however many spots lie on one another, tiles end
        if np.hypot(*(high - middle)) <= reach:
            yield torch.as_tensor(rows, device=device), torch.as_tensor(np.union1d(near, drawn), device=device)
            continue
        wide = int(np.argmax(high - low))  # the longer side is halved
        left = xy[rows, wide] <= middle[wide]
        before, after = high.copy(), low.copy()
        before[wide] = after[wide] = middle[wide]
        waiting += [(rows[left], low, before), (rows[~left], after, high)]


def _not_fitted() -> RuntimeError:
    return RuntimeError("head 'kriging' is not fitted: call fit() first.")
