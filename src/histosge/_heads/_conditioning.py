"""What measured spots say of all places: a Gaussian process conditioned on all spots at once, or tile by tile.

Up to ``_MOST_SPOTS`` spots the answer is exact. Of more, some are drawn, and what all spots say of those is worked out
once; the plane is cut into tiles, and each tile conditions exactly on the spots in it and around it, and on the rest
through those that were drawn: the partially independent conditional of Snelson and Ghahramani (2007, "Local and global
sparse Gaussian process approximations", AISTATS), with blocks that overlap. Around their borders tiles are blended. Time
is nearly linear in the spots.

Tiles are a matter of the spots alone, so that a place gets the same answer in whatever company it comes.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from histosge._heads._protocol import Run

    Decays = tuple[Tensor, Tensor, Tensor]
    """Near, alike, near and alike: (m, n) each"""

_MOST_SPOTS = 6000
"""With more spots, places are predicted tile by tile."""
_TILE_SPOTS = 500
"""Spots in a tile, roughly: two thirds to one and a half times as many."""
_NEAR_SPOTS = 1000
"""Spots that a tile conditions on exactly: its own and those around it, so that all of its places have some around them."""
_BLENDED = 2.0
"""Pitches on either side of a cut where the two sides are blended: without it maps would have seams."""
_DRAWN_SPOTS = 1000
"""Spots that stand for all others."""
_KEPT_TILES = 1024
"""Tiles that are kept worked out, a fifth of a megabyte each: those of half a million spots."""
_KINDS, _KINDS_OF_MANY = 8, 4
"""Components with similar covariances are worked out together, in so many kinds, up to ``_MOST_SPOTS`` and beyond."""
_SPOTS_AT_ONCE = 4096
JITTER = 1e-4
_DRAWN_JITTER = 1e-3
"""Of the drawn spots among themselves, in float64: some may be all but alike."""


def n_kinds(n_spots: int) -> int:
    """Choose how many kinds of covariance components have: docs/benchmarks.md."""
    return _KINDS if n_spots <= _MOST_SPOTS else _KINDS_OF_MANY


def tie(shares: Tensor, n_kinds: int) -> Tensor:
    """Give components with similar shares (5, Q) of the variance the mean of these; each component's sum to 1.

    Components that have them in common are worked out together. Predictions depend on ratios of shares, and hardly on their sum.
    """
    shares = shares / shares.sum(0)
    if shares.shape[1] <= n_kinds:
        return shares
    # of square roots: a difference between two small shares counts for more than one between two large ones
    near = linkage(shares.T.cpu().double().sqrt().numpy(), "ward")
    label = torch.as_tensor(fcluster(near, n_kinds, "maxclust"), device=shares.device)
    for kind in label.unique():
        shares[:, label == kind] = shares[:, label == kind].mean(1, keepdim=True)
    return shares


@dataclass(frozen=True)
class Covariance:
    """Near in space + alike in the image + both + linear in the image, in shares that differ between kinds."""

    lengths: tuple[float, float, float, float]
    """Near, alike, and both again for their product"""
    shares: Tensor
    """(5, Q) each term's and the noise's part of the variance"""
    kinds: tuple[Tensor, ...]
    """Columns of the components that have their shares in common"""

    @classmethod
    def of(cls, lengths: Tensor, shares: Tensor) -> Covariance:
        """Find the components that have their shares in common: see :func:`tie`."""
        _, label = shares.unique(dim=1, return_inverse=True)
        kinds = tuple((label == kind).nonzero()[:, 0] for kind in range(int(label.max()) + 1))
        return cls(tuple(lengths.tolist()), shares, kinds)

    def decays(self, place: Tensor, image: Tensor, places: Tensor, images: Tensor) -> Decays:
        """Work out near, alike, near and alike between (m) and (n) places where they lie, (m, n) each."""
        near, alike, both_near, both_alike = self.lengths
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

    def mix(self, kind: int, decays: Decays, image: Tensor, images: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Sum (m, n) of all terms for a kind."""
        of_near, of_alike, of_both, linear, _ = self.of_kind(kind)
        near, alike, both = decays
        total = torch.mul(near, of_near, out=out)
        return total.add_(alike, alpha=of_alike).add_(both, alpha=of_both).addmm_(image, images.T, alpha=linear)

    def of_kind(self, kind: int) -> list[float]:
        """Shares of a kind, noise last."""
        return self.shares[:, self.kinds[kind][0]].tolist()

    def noise(self, kind: int) -> float:
        """Variance of the noise of a kind."""
        return self.of_kind(kind)[4] + JITTER

    def at_itself(self, kind: int, image: Tensor) -> Tensor:
        """Variance (n,) at places, without noise."""
        *decaying, linear, _ = self.of_kind(kind)
        return sum(decaying) + linear * image.square().sum(1)


@dataclass(frozen=True)
class Known:
    """Spots worked into weights: places are read from them by one product a covariance."""

    weight: Tensor
    """(n, Q) of these spots and, behind them, of the drawn ones"""
    slope: Tensor
    """(P, Q) what the linear covariance comes to"""
    spots: Tensor | None
    """(k,) rows of the context that these are, in order; ``None``: all"""
    left_out: Tensor | None
    """(k, Q) components at each of these spots, given all others"""


@dataclass(frozen=True)
class InducingPoints:
    """What all spots say of the m drawn ones, of one kind with q components."""

    white: Tensor
    """(m, m) what makes the drawn spots independent, of unit variance"""
    precision: Tensor
    """(m, m) float64, of what was so made, given all spots"""
    told: Tensor
    """(m, q) float64, precision times mean"""
    left: Tensor
    """(n,) variance of every spot, noise included, once the drawn ones are known"""


class Conditioned:
    """The spots of a context, worked into weights when these are asked for.

    Parameters
    ----------
    place, image, target
        Position (n, 2) in pitches, image (n, P) and components (n, Q) of the spots.
    covariance
        Of all places.
    run
        How independent pieces of work are run.
    """

    def __init__(self, place: Tensor, image: Tensor, target: Tensor, covariance: Covariance, *, run: Run = map) -> None:
        self.place, self.image, self.target, self.covariance = place, image, target, covariance
        self._known: OrderedDict[int, Known] = OrderedDict()
        self._tiles: _Tiles | None = None
        if len(place) > _MOST_SPOTS:
            self._tiles = _Tiles.of(place.cpu().double().numpy())
            rows = np.random.default_rng(0).choice(len(place), min(_DRAWN_SPOTS, len(place)), replace=False)
            self._drawn_spots = torch.as_tensor(np.sort(rows), device=place.device)
            self._drawn_place, self._drawn_image = place[self._drawn_spots], image[self._drawn_spots]
            self._drawn = self._sum_up(run)

    def tiles(self, place: Tensor, spot_index: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        """Tiles that have a say in places (m, 2): their number, which places, and how much, (k,) each.

        A place that is a spot is where its spot is. The shares of a place sum to 1.
        """
        if self._tiles is None:
            everywhere = torch.arange(len(place), device=place.device)
            return [(0, everywhere, place.new_ones(len(place)))]
        where = torch.where((spot_index >= 0)[:, None], self.place[spot_index.clamp_min(0)], place)
        return [
            (
                tile,
                torch.as_tensor(rows, device=place.device),
                torch.as_tensor(share, dtype=place.dtype).to(place.device),
            )
            for tile, rows, share in self._tiles.shares(where.cpu().double().numpy())
        ]

    def known(self, tile: int, *, leave_out: bool) -> Known:
        """Weights for the places of a tile; those last used are not worked out again."""
        known = self._known.get(tile)
        if known is None or (leave_out and known.left_out is None):
            work = self._condition if self._tiles is None else self._condition_tile
            known = work(tile, leave_out=leave_out)
        self._known.pop(tile, None)  # threads ask side by side: what is there now may be gone a step later
        self._known[tile] = known
        while len(self._known) > _KEPT_TILES:
            self._known.popitem(last=False)
        return known

    def _condition(self, _: int, *, leave_out: bool) -> Known:
        """Weights of all spots, exactly."""
        image, covariance = self.image, self.covariance
        decays = covariance.decays(self.place, image, self.place, image)
        weight = torch.empty_like(self.target)
        left_out = torch.empty_like(self.target) if leave_out else None
        matrix = torch.empty_like(decays[0])  # covariance, its factor and its inverse: there is room for one of them
        for kind, columns in enumerate(covariance.kinds):
            covariance.mix(kind, decays, image, image, out=matrix).diagonal().add_(covariance.noise(kind))
            weight[:, columns], without = _solve(matrix, self.target[:, columns], leave_out=leave_out)
            if left_out is not None and without is not None:
                left_out[:, columns] = without
        return Known(weight, covariance.shares[3] * (image.T @ weight), None, left_out)

    def sources(self, known: Known) -> tuple[Tensor, Tensor]:
        """Position (n, 2) and image (n, P) of what :class:`Known` weighs."""
        if known.spots is None:
            return self.place, self.image
        place = torch.cat([self.place[known.spots], self._drawn_place])
        return place, torch.cat([self.image[known.spots], self._drawn_image])

    # ------------------------------------------------------------------------------------------------- large contexts

    def _sum_up(self, run: Run) -> list[InducingPoints]:
        """Information on the drawn spots: their own, and each spot's as if it were alone with them."""
        place, image, covariance = self._drawn_place, self._drawn_image, self.covariance
        within = covariance.decays(place, image, place, image)
        found: dict[int, InducingPoints] = {}

        @torch.inference_mode()
        def sum_up(kind: int) -> None:
            matrix = _precise(covariance.mix(kind, within, image, image))
            matrix.diagonal().add_(_DRAWN_JITTER)
            unit = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
            white = _like(image, torch.linalg.solve_triangular(torch.linalg.cholesky(matrix), unit, upper=False))
            told = unit.new_zeros(len(unit), len(covariance.kinds[kind]))
            left = []
            for rows in torch.arange(len(self.place), device=place.device).split(_SPOTS_AT_ONCE):
                decays = covariance.decays(place, image, self.place[rows], self.image[rows])
                seen = white @ covariance.mix(kind, decays, image, self.image[rows])  # (m, n')
                rest = (covariance.at_itself(kind, self.image[rows]) - seen.square().sum(0)).clamp_min_(0)
                left.append(rest + covariance.noise(kind))
                weighed = seen / left[-1]
                unit += _precise(weighed @ seen.T)
                told += _precise(weighed) @ _precise(self.target[rows][:, covariance.kinds[kind]])
            found[kind] = InducingPoints(white, unit, told, torch.cat(left))

        list(run(sum_up, range(len(covariance.kinds))))
        return [found[kind] for kind in range(len(covariance.kinds))]

    def _condition_tile(self, tile: int, *, leave_out: bool) -> Known:
        """Weights of the spots in and around a tile, given all others, and of the drawn spots, which speak for those."""
        spots = torch.as_tensor(self._tiles.near(tile), device=self.place.device)  # type: ignore[union-attr]
        place, image, target, covariance = self.place[spots], self.image[spots], self.target[spots], self.covariance
        to_drawn = covariance.decays(self._drawn_place, self._drawn_image, place, image)
        within = covariance.decays(place, image, place, image)
        weight = target.new_empty(len(place) + len(self._drawn_place), target.shape[1])
        left_out = torch.empty_like(target) if leave_out else None
        matrix = torch.empty_like(within[0])
        for kind, (columns, drawn) in enumerate(zip(covariance.kinds, self._drawn, strict=True)):
            seen = drawn.white @ covariance.mix(kind, to_drawn, self._drawn_image, image)  # (m, k)
            weighed = seen / drawn.left[spots]
            values = target[:, columns]
            # what the other spots say: all of them, less these
            factor = torch.linalg.cholesky(drawn.precision - _precise(weighed @ seen.T))
            variance = torch.cholesky_inverse(factor)  # (m, m) of the drawn
            # (in double precision: of a spot that is hidden, no trace may stay)
            told = drawn.told - _precise(weighed) @ _precise(values)  # (m, q)
            others = _like(values, variance @ told)  # (m, q)
            # these spots, given the others: their own covariance where the drawn ones have that of the others
            change = _like(seen, variance)
            change.diagonal().sub_(1)
            change = change @ seen  # (m, k)
            covariance.mix(kind, within, image, image, out=matrix).addmm_(seen.T, change)
            matrix.diagonal().add_(covariance.noise(kind))
            expected = seen.T @ others  # (k, q)
            weight[: len(place), columns], without = _solve(matrix, values - expected, leave_out=leave_out)
            weight[len(place) :, columns] = drawn.white.T @ (others + change @ weight[: len(place), columns])
            if left_out is not None and without is not None:
                left_out[:, columns] = expected + without
        slope = image.T @ weight[: len(place)] + self._drawn_image.T @ weight[len(place) :]
        return Known(weight, covariance.shares[3] * slope, spots, left_out)


@dataclass(frozen=True)
class _Tiles:
    """The plane, cut where spots are many: each tile has about as many as any other."""

    xy: NDArray[np.float64]
    cuts: list[tuple[int, float, int, int]]
    """Axis, where, and what lies up to there and beyond: a cut, or ~ a tile"""
    spots: list[NDArray[np.intp]]
    """Rows of the spots in each tile"""

    @classmethod
    def of(cls, xy: NDArray[np.float64]) -> _Tiles:
        """Cut across the longer side, into halves or thirds and two thirds …, so that tiles end up equal."""
        cuts: list[tuple[int, float, int, int]] = []
        tiles: list[NDArray[np.intp]] = []

        def cut(rows: NDArray[np.intp]) -> int:
            n_tiles = max(1, round(len(rows) / _TILE_SPOTS))
            axis = int(np.argmax(np.ptp(xy[rows], axis=0)))
            values = np.sort(xy[rows, axis])
            steps = np.flatnonzero(np.diff(values) > 0) + 1  # between spots that lie on one another there is no cut
            if n_tiles == 1 or len(steps) == 0:
                tiles.append(rows)
                return ~(len(tiles) - 1)
            n_below = len(rows) * (n_tiles // 2) / n_tiles
            step = steps[np.argmin(np.abs(steps - n_below))]
            at = float(values[step - 1] + values[step]) / 2
            below = xy[rows, axis] <= at
            here = len(cuts)
            cuts.append((axis, at, 0, 0))
            cuts[here] = (axis, at, cut(rows[below]), cut(rows[~below]))
            return here

        cut(np.arange(len(xy)))
        return cls(xy, cuts, tiles)

    def shares(self, xy: NDArray[np.float64]) -> list[tuple[int, NDArray[np.intp], NDArray[np.float64]]]:
        """Tiles, the places (m, 2) that each has a share in, and that share: from all to nothing around a cut."""
        found: list[tuple[int, NDArray[np.intp], NDArray[np.float64]]] = []
        waiting = [(0 if self.cuts else ~0, np.arange(len(xy)), np.ones(len(xy)))]
        while waiting:
            here, rows, share = waiting.pop()
            if len(rows) == 0:
                continue
            if here < 0:
                found.append((~here, rows, share))
                continue
            axis, at, below, beyond = self.cuts[here]
            upper = np.clip((xy[rows, axis] - at) / (2 * _BLENDED) + 0.5, 0, 1)
            for there, part in ((beyond, upper), (below, 1 - upper)):
                kept = part > 0
                waiting.append((there, rows[kept], share[kept] * part[kept]))
        return found

    def near(self, tile: int) -> NDArray[np.intp]:
        """Rows, sorted, of the spots of a tile and of those nearest to the box around them."""
        own = self.spots[tile]
        n = min(max(_NEAR_SPOTS, len(own)), len(self.xy))
        low, high = self.xy[own].min(0), self.xy[own].max(0)
        beyond = np.maximum(np.maximum(low - self.xy, self.xy - high), 0)
        distance = np.hypot(*beyond.T)
        distance[own] = -1
        return np.sort(np.argpartition(distance, n - 1)[:n])


def _solve(matrix: Tensor, values: Tensor, *, leave_out: bool) -> tuple[Tensor, Tensor | None]:
    """Solve for values (n, q), and say what all others give each row; the matrix is overwritten.

    Rasmussen and Williams (2006), equation 5.12, without the row's own term instead of with its difference from itself:
    not even a rounding error of its value is left.
    """
    factor = torch.linalg.cholesky(matrix.T, out=matrix.T)  # by columns, as LAPACK likes it: nothing is copied
    half = torch.linalg.solve_triangular(factor, values, upper=False)
    solved = torch.linalg.solve_triangular(factor.T, half, upper=True)
    if not leave_out:
        return solved, None
    inverse = torch.cholesky_inverse(factor, out=factor)
    precision = inverse.diagonal().clone()
    inverse.diagonal().zero_()
    return solved, -(inverse @ values) / precision[:, None]


def _precise(values: Tensor) -> Tensor:
    """Double precision, on the processor where the device has none."""
    return values.cpu().double() if values.device.type == "mps" else values.double()


def _like(other: Tensor, values: Tensor) -> Tensor:
    """Back from double precision: first the type, then the device, which may not know the other type."""
    return values.to(other.dtype).to(other.device)


def _exp(values: Tensor) -> Tensor:
    """Exponential in place; on a processor numpy's, which takes half as long as torch's."""
    if values.device.type != "cpu":
        return values.exp_()
    array = values.numpy()
    np.exp(array, out=array)
    return values
