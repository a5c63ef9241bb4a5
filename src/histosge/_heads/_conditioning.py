"""A Gaussian process conditioned on the measured spots: on all of them at once, or tile by tile.

Up to ``n_exact`` spots the prediction is exact. With more spots, some are drawn as inducing points, and the
information of all spots on these is computed once. Each section is cut into tiles. Each tile conditions exactly on the
spots in and around it, and on the other spots through the inducing points: the partially independent conditional of
Snelson and Ghahramani (2007, "Local and global sparse Gaussian process approximations", AISTATS), with blocks that
overlap. Tiles are blended around their borders. Time is nearly linear in the number of spots.

Tiles depend on the spots alone, so that the prediction of a target does not depend on the other targets.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage

from histosge._heads._tiles import Tiles

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from histosge._heads._protocol import Run

    Decays = tuple[Tensor, Tensor, Tensor]
    """Near in space, similar in the image, near and similar: (m, n) each"""

_KEPT_TILES = 1024
"""Tiles whose weights are kept, a fifth of a megabyte each: enough for half a million spots."""
_KERNEL_GROUPS, _KERNEL_GROUPS_OF_MANY = 8, 4
"""Groups of components with similar covariances, computed together: up to ``n_exact`` spots, and beyond."""
_SPOTS_AT_ONCE = 4096
JITTER = 1e-4
_DRAWN_JITTER = 1e-3
"""Added to the covariance of the inducing points, in float64: some of them may be almost equal."""


def n_kernel_groups(n_spots: int, *, n_exact: int) -> int:
    """Choose how many covariances the components have: docs/benchmarks.md."""
    return _KERNEL_GROUPS if n_spots <= n_exact else _KERNEL_GROUPS_OF_MANY


def share_hyperparameters(shares: Tensor, n_groups: int) -> Tensor:
    """Replace similar shares (5, Q) of the variance by their mean; the shares of each component sum to 1.

    Components with equal shares are computed together. Predictions depend on the ratios of shares, hardly on their sum.
    """
    shares = shares / shares.sum(0)
    if shares.shape[1] <= n_groups:
        return shares
    # square roots: a difference between small shares matters more than one between large shares
    near = linkage(shares.T.cpu().double().sqrt().numpy(), "ward")
    label = torch.as_tensor(fcluster(near, n_groups, "maxclust"), device=shares.device)
    for group in label.unique():
        shares[:, label == group] = shares[:, label == group].mean(1, keepdim=True)
    return shares


@dataclass(frozen=True)
class Points:
    """Inputs of the covariance: spots or targets."""

    position: Tensor
    """(n, 2) in pitches, in the coordinates of their section"""
    section: Tensor
    """(n,)"""
    image: Tensor
    """(n, P) components of the embedding"""

    def __len__(self) -> int:
        return len(self.position)

    def take(self, rows: Tensor | slice) -> Points:
        """Return some of the points."""
        return Points(self.position[rows], self.section[rows], self.image[rows])

    def and_(self, other: Points) -> Points:
        """Append other points."""
        pairs = ((self.position, other.position), (self.section, other.section), (self.image, other.image))
        return Points(*(torch.cat(pair) for pair in pairs))


@dataclass(frozen=True)
class Covariance:
    """Near in space + similar in the image + both + linear in the image, in shares that differ between groups."""

    lengths: tuple[float, float, float, float]
    """Lengths of near, of similar, and of the two factors of their product"""
    shares: Tensor
    """(5, Q) share of each term, and of the noise, in the variance"""
    kernel_groups: tuple[Tensor, ...]
    """Columns of the components that have equal shares"""

    @classmethod
    def of(cls, lengths: Tensor, shares: Tensor) -> Covariance:
        """Find the components that have equal shares: see :func:`share_hyperparameters`."""
        _, label = shares.unique(dim=1, return_inverse=True)
        groups = tuple((label == group).nonzero()[:, 0] for group in range(int(label.max()) + 1))
        return cls(tuple(lengths.tolist()), shares, groups)

    def decays(self, rows: Points, columns: Points) -> Decays:
        """Compute near, similar, near and similar of m and n points, (m, n) each; 0 for near across sections."""
        near, similar, both_near, both_similar = self.lengths
        x, y = columns.position.T.contiguous()  # (n,) each: strided vectors take several times as long
        distance = (rows.position[:, :1] - x).square_()
        other = rows.position[:, 1:] - y
        distance.addcmul_(other, other).sqrt_()
        apart = _in_other_sections(rows.section, columns.section)
        if apart is not None:
            distance.masked_fill_(apart, torch.inf)
        image, images = rows.image, columns.image
        # minus half the square of the difference, by one product: a b - a a / 2 - b b / 2
        a = torch.cat([image, image.square().sum(1, keepdim=True) / -2, image.new_ones(len(image), 1)], 1)
        b = torch.cat([images, images.new_ones(len(images), 1), images.square().sum(1, keepdim=True) / -2], 1)
        unlike = torch.mm(a, b.T, out=other).clamp_max_(0)
        both = _exp(torch.mul(unlike, 1 / both_similar**2).add_(distance, alpha=-1 / both_near))
        return _exp(distance.mul_(-1 / near)), _exp(unlike.mul_(1 / similar**2)), both

    def mix(self, group: int, decays: Decays, rows: Points, columns: Points, *, out: Tensor | None = None) -> Tensor:
        """Sum all terms (m, n) for a group of components."""
        of_near, of_similar, of_both, linear, _ = self.of_group(group)
        near, similar, both = decays
        total = torch.mul(near, of_near, out=out).add_(similar, alpha=of_similar).add_(both, alpha=of_both)
        return total.addmm_(rows.image, columns.image.T, alpha=linear)

    def of_group(self, group: int) -> list[float]:
        """Shares of a group, noise last."""
        return self.shares[:, self.kernel_groups[group][0]].tolist()

    def noise(self, group: int) -> float:
        """Variance of the noise of a group."""
        return self.of_group(group)[4] + JITTER

    def at_itself(self, group: int, points: Points) -> Tensor:
        """Variance (n,) at points, without noise."""
        *decaying, linear, _ = self.of_group(group)
        return sum(decaying) + linear * points.image.square().sum(1)


@dataclass(frozen=True)
class Weights:
    """Weights of spots: a prediction is the product of these with the covariances of the target and the spots."""

    weight: Tensor
    """(n, Q) of the spots and, after them, of the inducing points"""
    slope: Tensor
    """(P, Q) sum of the linear covariance over the spots"""
    spots: Tensor | None
    """(k,) rows of the spots in the context, in order; ``None`` for all"""
    left_out: Tensor | None
    """(k, Q) components at each spot, given all others"""


@dataclass(frozen=True)
class InducingPoints:
    """Information of all spots on the m inducing points, for one group of q components."""

    white: Tensor
    """(m, m) transforms the inducing points to independent variables of unit variance"""
    precision: Tensor
    """(m, m) float64, precision of the independent variables, given all spots"""
    information: Tensor
    """(m, q) float64, precision times mean"""
    variance: Tensor
    """(n,) variance of each spot with its noise, given the inducing points"""


class Conditioned:
    """The spots of a context; their weights are computed when they are needed.

    Parameters
    ----------
    points
        The n spots.
    response
        (n, Q) their components.
    covariance
        Between all points.
    pitch_um
        Unit of positions.
    n_exact, n_inducing, n_tile, n_near
        As of :class:`Kriging`.
    run
        Computes independent pieces.
    """

    kept_tiles = 1024
    """Tiles whose weights are kept, a fifth of a megabyte each: those of half a million spots"""

    def __init__(
        self,
        points: Points,
        response: Tensor,
        covariance: Covariance,
        *,
        pitch_um: float,
        n_exact: int,
        n_inducing: int,
        n_tile: int,
        n_near: int,
        run: Run = map,
    ) -> None:
        self.points, self.response, self.covariance, self.pitch_um = points, response, covariance, pitch_um
        self._kept: OrderedDict[int, Weights] = OrderedDict()
        self._tiles: Tiles | None = None
        if len(points) > n_exact:
            xy, section = _rounded(points.position), points.section.cpu().numpy()
            self._tiles = Tiles.of(xy, section, n_tile=n_tile, n_near=n_near)
            rows = np.random.default_rng(0).choice(len(points), min(n_inducing, len(points)), replace=False)
            self._drawn_spots = torch.as_tensor(np.sort(rows), device=response.device)
            self._drawn = points.take(self._drawn_spots)
            self._inducing = self._sum_up(run)

    def tiles(self, points: Points, spot_index: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        """Return the tiles that predict at m points: number, rows of points, and share of the tile in each, (k,) each.

        A point that is a spot belongs to the tiles of its spot. The shares at a point sum to 1.
        """
        if self._tiles is None:
            everywhere = torch.arange(len(points), device=spot_index.device)
            return [(0, everywhere, points.position.new_ones(len(points)))]
        is_spot, spot = spot_index >= 0, spot_index.clamp_min(0)
        position = torch.where(is_spot[:, None], self.points.position[spot], points.position)
        section = torch.where(is_spot, self.points.section[spot], points.section)
        return [
            (
                tile,
                torch.as_tensor(rows, device=position.device),
                torch.as_tensor(share, dtype=position.dtype).to(position.device),
            )
            for tile, rows, share in self._tiles.shares(_rounded(position), section.cpu().numpy())
        ]

    def weights(self, tile: int, *, leave_out: bool) -> Weights:
        """Return the weights for the targets of a tile; the last ones are kept."""
        found = self._kept.get(tile)
        if found is None or (leave_out and found.left_out is None):
            condition = self._condition if self._tiles is None else self._condition_tile
            found = condition(tile, leave_out=leave_out)
        self._kept.pop(tile, None)  # other threads may remove it at any time
        self._kept[tile] = found
        while len(self._kept) > self.kept_tiles:
            self._kept.popitem(last=False)
        return found

    def _condition(self, _: int, *, leave_out: bool) -> Weights:
        """Compute the weights of all spots, exactly."""
        points, covariance = self.points, self.covariance
        decays = covariance.decays(points, points)
        weight = torch.empty_like(self.response)
        left_out = torch.empty_like(self.response) if leave_out else None
        matrix = torch.empty_like(decays[0])  # memory is enough for one: covariance, factor and inverse share it
        for group, columns in enumerate(covariance.kernel_groups):
            covariance.mix(group, decays, points, points, out=matrix).diagonal().add_(covariance.noise(group))
            weight[:, columns], without = _solve(matrix, self.response[:, columns], leave_out=leave_out)
            if left_out is not None and without is not None:
                left_out[:, columns] = without
        return Weights(weight, covariance.shares[3] * (points.image.T @ weight), None, left_out)

    def sources(self, weights: Weights) -> Points:
        """Return the points (n,) of ``weights``."""
        return self.points if weights.spots is None else self.points.take(weights.spots).and_(self._drawn)

    # ------------------------------------------------------------------------------------------------- large contexts

    def _sum_up(self, run: Run) -> list[InducingPoints]:
        """Sum up information on the inducing points: their prior, and that of each spot as if it were the only one."""
        drawn, covariance = self._drawn, self.covariance
        within = covariance.decays(drawn, drawn)
        found: dict[int, InducingPoints] = {}

        @torch.inference_mode()
        def sum_up(group: int) -> None:
            columns = covariance.kernel_groups[group]
            matrix = _precise(covariance.mix(group, within, drawn, drawn))
            matrix.diagonal().add_(_DRAWN_JITTER)
            unit = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
            white = _like(drawn.image, torch.linalg.solve_triangular(torch.linalg.cholesky(matrix), unit, upper=False))
            information = unit.new_zeros(len(unit), len(columns))
            variance = []
            for rows in torch.arange(len(self.points), device=self.response.device).split(_SPOTS_AT_ONCE):
                some = self.points.take(rows)
                seen = white @ covariance.mix(group, covariance.decays(drawn, some), drawn, some)  # (m, n')
                rest = (covariance.at_itself(group, some) - seen.square().sum(0)).clamp_min_(0)
                variance.append(rest + covariance.noise(group))
                weighed = seen / variance[-1]
                unit += _precise(weighed @ seen.T)
                information += _precise(weighed) @ _precise(self.response[rows][:, columns])
            found[group] = InducingPoints(white, unit, information, torch.cat(variance))

        groups = range(len(covariance.kernel_groups))
        list(run(sum_up, groups))
        return [found[group] for group in groups]

    def _condition_tile(self, tile: int, *, leave_out: bool) -> Weights:
        """Compute the weights of the spots in and around a tile, and of the inducing points for all other spots."""
        spots = torch.as_tensor(self._tiles.near(tile), device=self.response.device)  # type: ignore[union-attr]
        points, response = self.points.take(spots), self.response[spots]
        covariance, drawn = self.covariance, self._drawn
        to_drawn, within = covariance.decays(drawn, points), covariance.decays(points, points)
        n = len(points)
        weight = response.new_empty(n + len(drawn), response.shape[1])
        left_out = torch.empty_like(response) if leave_out else None
        matrix = torch.empty_like(within[0])
        for group, (columns, inducing) in enumerate(zip(covariance.kernel_groups, self._inducing, strict=True)):
            seen = inducing.white @ covariance.mix(group, to_drawn, drawn, points)  # (m, k)
            weighed = seen / inducing.variance[spots]
            values = response[:, columns]
            # information of the other spots: that of all, less that of these
            factor = torch.linalg.cholesky(inducing.precision - _precise(weighed @ seen.T))
            variance = torch.cholesky_inverse(factor)  # (m, m) of the inducing points
            # (in double precision, so that nothing of a hidden spot remains)
            information = inducing.information - _precise(weighed) @ _precise(values)  # (m, q)
            others = _like(values, variance @ information)  # (m, q)
            # these spots, given the others: their own covariance, with that of the inducing points given the others
            change = _like(seen, variance)
            change.diagonal().sub_(1)
            change = change @ seen  # (m, k)
            covariance.mix(group, within, points, points, out=matrix).addmm_(seen.T, change)
            matrix.diagonal().add_(covariance.noise(group))
            expected = seen.T @ others  # (k, q)
            weight[:n, columns], without = _solve(matrix, values - expected, leave_out=leave_out)
            weight[n:, columns] = inducing.white.T @ (others + change @ weight[:n, columns])
            if left_out is not None and without is not None:
                left_out[:, columns] = expected + without
        slope = points.image.T @ weight[:n] + drawn.image.T @ weight[n:]
        return Weights(weight, covariance.shares[3] * slope, spots, left_out)


def _rounded(position: Tensor) -> NDArray[np.float64]:
    """Round positions (n, 2) in pitches to a thousandth: spots of a row are then in one row on every device.

    Devices divide with different rounding, which must not decide where tiles are cut.
    """
    return position.cpu().double().numpy().round(3)


def _in_other_sections(rows: Tensor, columns: Tensor) -> Tensor | None:
    """Whether pairs (m, n) lie in different sections; ``None`` if all lie in one, the usual case."""
    if len(rows) == 0 or len(columns) == 0 or bool(((rows == rows[0]).all()) & (columns == rows[0]).all()):
        return None
    return rows[:, None] != columns


def _solve(matrix: Tensor, values: Tensor, *, leave_out: bool) -> tuple[Tensor, Tensor | None]:
    """Solve for values (n, q), and predict each row from all others; the matrix is overwritten.

    Rasmussen and Williams (2006), equation 5.12, but the row's own term is left out instead of subtracted from itself:
    not even a rounding error of its value remains.
    """
    factor = torch.linalg.cholesky(matrix.T, out=matrix.T)  # column by column, the order of LAPACK: nothing is copied
    half = torch.linalg.solve_triangular(factor, values, upper=False)
    solved = torch.linalg.solve_triangular(factor.T, half, upper=True)
    if not leave_out:
        return solved, None
    inverse = torch.cholesky_inverse(factor, out=factor)
    precision = inverse.diagonal().clone()
    inverse.diagonal().zero_()
    return solved, -(inverse @ values) / precision[:, None]


def _precise(values: Tensor) -> Tensor:
    """Convert to double precision, on the processor where the device has none."""
    return values.cpu().double() if values.device.type == "mps" else values.double()


def _like(other: Tensor, values: Tensor) -> Tensor:
    """Convert back from double precision: first the type, then the device, which may have no double precision."""
    return values.to(other.dtype).to(other.device)


def _exp(values: Tensor) -> Tensor:
    """Exponential in place; on a processor with numpy, in half the time of torch."""
    if values.device.type != "cpu":
        return values.exp_()
    array = values.numpy()
    np.exp(array, out=array)
    return values
