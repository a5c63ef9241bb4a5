"""Splits into training spots and test spots: at random, in blocks, on a coarser lattice, by section.

Positions are in µm. No function here gets measurements, so splits do not depend on them.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from histosge._geometry import Lattice, nearest_spots, upright

if TYPE_CHECKING:
    from collections.abc import Sequence

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BLOCKS_PER_FOLD = 6
"""Approximate number of blocks in a fold, where their size is not given."""
MIN_TRAIN = 10
"""Smallest number of training spots of a split."""

_SMALLEST_UM = 1e-3
"""Smallest edge of a block: spots nearer to each other have the same location."""

_STEPS = {
    "hexagonal": {3: (1, 1), 4: (2, 0), 7: (2, 1)},
    "square": {2: (1, 1), 4: (2, 0), 5: (2, 1)},
}
"""First step (columns, rows) of the sublattice that keeps 1 in so many sites; the second is the first, rotated."""
_FLOWER = {"hexagonal": (7, 5), "square": (5, 4)}
"""Sites of a spot and its ring of neighbours, and how many of them must have a spot by default."""


@dataclass(frozen=True)
class Split:
    """Training spots and test spots; no spot is in both."""

    train: Ints
    """(n_train,) sorted rows of training spots"""
    test: Ints
    """(n_test,) sorted rows of test spots"""
    fold: int
    """Number of the split, from 0."""


# ---------------------------------------------------------------------------------------------------- random


def random_folds(n_spots: int, *, n_folds: int, rng: np.random.Generator) -> Ints:
    """Assign spots to folds of equal size at random."""
    return rng.permutation(np.arange(n_spots) % n_folds)


def random_splits(n_spots: int, *, n_splits: int, rng: np.random.Generator, share: float = 0.5) -> list[Split]:
    """Draw a ``share`` of the spots for training, ``n_splits`` times independently; the others are test spots."""
    if n_splits < 1:
        msg = f"n_splits={n_splits}: at least 1 is needed."
        raise ValueError(msg)
    n_train = round(share * n_spots) if 0 < share < 1 else 0
    if not 0 < n_train < n_spots:
        msg = (
            f"share={share!r} of {n_spots} spots leaves none to learn from or none to score: "
            f"choose a share between 0 and 1 (0.5 learns from half of the spots)."
        )
        raise ValueError(msg)
    order = [rng.permutation(n_spots) for _ in range(n_splits)]
    return [Split(np.sort(o[:n_train]), np.sort(o[n_train:]), i) for i, o in enumerate(order)]


# ---------------------------------------------------------------------------------------------------- blocks


def block_folds(
    xy_um: Floats,
    *,
    n_folds: int,
    rng: np.random.Generator,
    block_um: float | None = None,
    groups: Ints | None = None,
) -> NDArray[np.int64]:
    """Assign spots to folds of about equal size by whole square blocks of a randomly rotated and shifted grid.

    Neighbours are similar. In a fold of blocks few test spots have neighbours in the training set (Roberts et al.,
    2017). Blocks are assigned largest first, each to the smallest fold, so that no two folds differ by more spots than
    the largest block has.

    Parameters
    ----------
    xy_um
        (n_spots, 2) positions.
    n_folds
        Number of folds; none is empty.
    rng
        Rotates and shifts the grid, and orders blocks of equal size.
    block_um
        Edge of a block; smaller where there are fewer blocks than folds. By default the edge of about six blocks a
        fold, where the area of the spots is their number times the square of the median distance to the nearest one.
    groups
        (n_spots,) section of each spot, each in its own coordinates; sections share no block. By default there is
        one section.

    Returns
    -------
    (n_spots,) fold of each spot.
    """
    return _block_folds(xy_um, n_folds=n_folds, rng=rng, block_um=block_um, name="n_folds", groups=groups)


def block_splits(
    xy_um: Floats, *, n_splits: int, rng: np.random.Generator, buffer_um: float, block_um: float | None = None
) -> list[Split]:
    """Hold out each fold of blocks once; no training spot is nearer to a held-out spot than the buffer.

    Parameters
    ----------
    xy_um
        (n_spots, 2) positions, of one section.
    n_splits
        Number of folds; each spot is scored in one of them.
    rng
        Makes and assigns the blocks.
    buffer_um
        Spots nearer than this to a held-out spot are neither training nor test spots of that split.
    block_um
        Edge of a block, as for :func:`block_folds`.
    """
    if not 0 <= buffer_um < np.inf:
        msg = f"buffer_um={buffer_um!r}: give a distance in µm, 0 for no buffer."
        raise ValueError(msg)
    xy_um = np.asarray(xy_um, np.float64)
    fold = _block_folds(xy_um, n_folds=n_splits, rng=rng, block_um=block_um, name="n_splits")
    splits = []
    for number in range(n_splits):
        test, rest = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        far, _ = cKDTree(xy_um[test]).query(xy_um[rest])
        train = rest[far >= buffer_um]
        if len(train) < MIN_TRAIN:
            msg = (
                f"buffer_um={buffer_um:g} leaves {len(train)} of {len(fold)} spots to learn from when fold {number} of "
                f"{n_splits} is held out (at least {MIN_TRAIN} are needed): "
                f'take a smaller buffer_um=, larger sections, or split="random".'
            )
            raise ValueError(msg)
        splits.append(Split(train, test, number))
    return splits


def _block_folds(
    xy_um: Floats,
    *,
    n_folds: int,
    rng: np.random.Generator,
    block_um: float | None,
    name: str,
    groups: Ints | None = None,
) -> Ints:
    """Make blocks, smaller ones until there is one for every fold, and assign them to folds."""
    if n_folds < 2:
        msg = f"{name}={n_folds}: at least 2 are needed, or nothing is left to learn from."
        raise ValueError(msg)
    if block_um is not None and not 0 < block_um < np.inf:
        msg = f"block_um={block_um!r}: give the edge of a block in µm, above 0, or None to have it chosen."
        raise ValueError(msg)
    xy_um = np.asarray(xy_um, np.float64)
    section = (
        np.zeros(len(xy_um), np.int64) if groups is None else np.unique(groups, return_inverse=True)[1].reshape(-1)
    )
    placed = np.empty_like(xy_um)
    for number in range(section.max() + 1):  # the same blocks however a section lies on its slide
        placed[section == number] = upright(xy_um[section == number])
    xy_um = placed
    turn, shift = rng.uniform(0, np.pi / 2), rng.random((section.max() + 1, 2))
    edge = _edge_um(xy_um, section=section, n_blocks=BLOCKS_PER_FOLD * n_folds) if block_um is None else block_um
    block = _blocks(xy_um, section=section, edge_um=edge, turn=turn, shift=shift)
    while block.max() + 1 < n_folds and edge > _SMALLEST_UM:
        edge = max(0.8 * edge, _SMALLEST_UM)
        block = _blocks(xy_um, section=section, edge_um=edge, turn=turn, shift=shift)
    size = np.bincount(block)
    if len(size) < n_folds:
        msg = (
            f"{name}={n_folds} is more than the {len(size)} different locations of the {len(block)} spots: "
            f"take a smaller {name}= or larger sections."
        )
        raise ValueError(msg)
    return _deal(size, n_folds=n_folds, rng=rng)[block]


def _edge_um(xy_um: Floats, *, section: Ints, n_blocks: int) -> float:
    """Edge of the squares of which ``n_blocks`` cover the area of the spots."""
    sites = np.unique(np.column_stack([section, xy_um]), axis=0)  # spots that share a site cover it once
    number, sites = sites[:, 0].astype(np.int64), sites[:, 1:]
    of = {"groups": number, "spot_groups": number}
    _, near, _ = nearest_spots(sites, sites, k=1, exclude=np.arange(len(sites)), **of)
    return max(float(np.median(near)) * np.sqrt(len(sites) / n_blocks), _SMALLEST_UM)


def _blocks(xy_um: Floats, *, section: Ints, edge_um: float, turn: float, shift: Floats) -> Ints:
    """Number the squares of a grid that have spots; each section has a grid of its own, shifted by parts of an edge."""
    corner = np.full((len(shift), 2), np.inf)
    np.minimum.at(corner, section, xy_um)
    axes = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    cell = np.floor((xy_um - corner[section]) @ axes / edge_um + shift[section]).astype(np.int64)
    _, block = np.unique(np.column_stack([section, cell]), axis=0, return_inverse=True)
    return block.reshape(-1)


def _deal(size: Ints, *, n_folds: int, rng: np.random.Generator) -> Ints:
    """Deal blocks into folds, largest block first, each to the smallest fold (Graham, 1969)."""
    fold = np.empty(len(size), np.int64)
    heap = [(0, number) for number in range(n_folds)]
    for block in np.lexsort((rng.random(len(size)), -size)).tolist():
        n_spots, number = heap[0]
        fold[block] = number
        heapq.heapreplace(heap, (n_spots + int(size[block]), number))
    return fold


# --------------------------------------------------------------------------------------------------- lattice


def lattice_splits(lattice: Lattice, *, keep: int, n_splits: int, rng: np.random.Generator) -> list[Split]:
    """Learn from a regular 1 in ``keep`` of the spots and score the others: what super-resolution faces.

    The spots kept are a lattice of the same kind, √keep times as coarse and turned. Such sublattices exist for the
    numbers a² + ab + b² on the hexagonal lattice and a² + b² on the square one (Bernstein, Sloane and Wright, 1997).

    Parameters
    ----------
    lattice
        Lattice of the spots of one section.
    keep
        3, 4 or 7 on a hexagonal lattice; 2, 4 or 5 on a square one.
    n_splits
        Number of splits, at most ``keep``: each learns from another phase of the sublattice.
    rng
        Draws the phases.
    """
    valid = _STEPS[lattice.kind]
    if keep not in valid:
        msg = f"keep={keep!r}: on a {lattice.kind} lattice choose one of {tuple(valid)} (1 in so many spots is kept)."
        raise ValueError(msg)
    phase = _phase(lattice.index, kind=lattice.kind, keep=keep)
    phases = np.unique(phase)
    if not 1 <= n_splits <= len(phases):
        msg = f"n_splits={n_splits}: keep={keep} has {len(phases)} different splits; choose from 1 to {len(phases)}."
        raise ValueError(msg)
    drawn = rng.permutation(phases)[:n_splits]
    return [Split(np.flatnonzero(phase == kept), np.flatnonzero(phase != kept), i) for i, kept in enumerate(drawn)]


def pseudo_spots(lattice: Lattice, *, rng: np.random.Generator, min_members: int | None = None) -> Ints:
    """Merge spots into big ones, so that what lies below a big spot was measured.

    Every site of a sublattice is merged with its ring of neighbours: 7 sites on a hexagonal lattice, 5 on a square
    one. These flowers tile the plane without overlap.

    Parameters
    ----------
    lattice
        Lattice of the spots of one section.
    rng
        Draws the phase of the sublattice.
    min_members
        Flowers with fewer spots, at the border or around holes, are left out. By default 5 of 7 and 4 of 5.

    Returns
    -------
    (n_spots,) number of the big spot of each spot, from 0 without gaps; -1 for spots of flowers left out.
    """
    n_places, default = _FLOWER[lattice.kind]
    min_members = default if min_members is None else min_members
    if not 1 <= min_members <= n_places:
        msg = (
            f"min_members={min_members!r}: a big spot on a {lattice.kind} lattice has {n_places} sites; "
            f"choose from 1 to {n_places}."
        )
        raise ValueError(msg)
    box = np.stack(np.meshgrid(*[np.arange(-1, 2)] * 2, indexing="ij"), -1).reshape(-1, 2)
    flower = box[_squared_length(box, kind=lattice.kind) <= 1]  # (n_places, 2), the centre among them
    # the sites of a flower have all phases, each once: just one of them leads from a spot back to a centre
    wanted = rng.choice(_phase(flower, kind=lattice.kind, keep=n_places))
    phase = _phase(lattice.index[:, None] - flower, kind=lattice.kind, keep=n_places)
    own = flower[(phase == wanted).argmax(axis=1)]
    _, big, size = np.unique(lattice.index - own, axis=0, return_inverse=True, return_counts=True)
    enough = size >= min_members
    if not enough.any():
        msg = (
            f"min_members={min_members}: no big spot has so many of the {len(lattice.index)} spots, the fullest has "
            f"{size.max()}; take a smaller min_members= or a larger section."
        )
        raise ValueError(msg)
    return np.where(enough, np.cumsum(enough) - 1, -1)[big.reshape(-1)]


def _squared_length(index: Ints, *, kind: str) -> Ints:
    """Squared length of steps (..., 2) in pitches; neighbours of a hexagonal lattice's origin are 60 degrees apart."""
    col, row = index[..., 0], index[..., 1]
    return col**2 + row**2 + (col * row if kind == "hexagonal" else 0)


def _phase(index: Ints, *, kind: str, keep: int) -> Ints:
    """Label of the coset that each site (..., 2) is in, of the sublattice that keeps 1 in ``keep`` sites.

    A site is in the sublattice of the rows of V if its index times V⁻¹ is whole, so the index times the adjugate
    of V, modulo det V = keep, tells the cosets apart.
    """
    a, b = _STEPS[kind][keep]
    c, d = (-b, a + b) if kind == "hexagonal" else (-b, a)
    rest = index @ np.array([[d, -b], [-c, a]]) % keep
    return rest[..., 0] * keep + rest[..., 1]


# -------------------------------------------------------------------------------------------------- sections


def group_splits(groups: Sequence[object] | NDArray[np.generic]) -> list[Split]:
    """Leave out each group once, sections as a rule; ``groups`` (n_spots,) names the group of each spot."""
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2:
        msg = (
            f"groups={names.tolist()!r}: at least 2 are needed to leave one out; "
            f"give more sections or hold out blocks of spots."
        )
        raise ValueError(msg)
    return [Split(np.flatnonzero(group != left), np.flatnonzero(group == left), left) for left in range(len(names))]
