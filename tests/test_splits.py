"""Splits on lattices that were laid here: every promise is checked by brute force over all pairs of spots."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist, pdist

from histosge._geometry import estimate_lattice
from histosge._statistics import (
    MIN_TRAIN,
    block_folds,
    block_splits,
    group_splits,
    lattice_splits,
    pseudo_spots,
    random_folds,
    random_splits,
)
from histosge._statistics._splits import _blocks, _deal

KEEP = {"hexagonal": (3, 4, 7), "square": (2, 4, 5)}
PLACES = {"hexagonal": 7, "square": 5}
KINDS = [(kind, keep) for kind in KEEP for keep in KEEP[kind]]
properties = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**32 - 1)


def make_rng(seed=0):
    return np.random.default_rng(seed)


def lay(kind="hexagonal", *, n=14, pitch=100.0, degrees=0.0, missing=0.0, jitter=0.0, seed=0):
    """An n x n array as printed, turned, with spots missing and out of place by up to ``jitter`` pitches."""
    rng = make_rng(seed)
    row, col = (a.ravel() for a in np.meshgrid(np.arange(n), np.arange(n), indexing="ij"))
    xy = np.column_stack([col + 0.5 * (row % 2), row * np.sqrt(0.75)]) if kind == "hexagonal" else np.c_[col, row]
    xy = xy[rng.random(len(xy)) >= missing]
    angle, length = rng.random(len(xy)) * 2 * np.pi, rng.random(len(xy)) * jitter
    xy = xy + np.column_stack([np.cos(angle), np.sin(angle)]) * length[:, None]
    a = np.deg2rad(degrees)
    return pitch * xy @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])


arrays = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["hexagonal", "square"]),
        "n": st.integers(9, 20),
        "pitch": st.floats(2, 300),
        "degrees": st.floats(-180, 180),
        "missing": st.floats(0, 0.25),
        "jitter": st.floats(0, 0.08),
        "seed": st.integers(0, 999),
    }
)


def assert_partition(splits, n):
    """Each split uses every spot just once, and each spot is scored in just one split."""
    for i, split in enumerate(splits):
        assert split.fold == i
        assert np.sort(np.concatenate([split.train, split.test])).tolist() == list(range(n))
    assert np.sort(np.concatenate([s.test for s in splits])).tolist() == list(range(n))


def same(a, b):
    return all(np.array_equal(x.train, y.train) and np.array_equal(x.test, y.test) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------------------- random


@properties
@given(st.integers(1, 500), st.integers(1, 20), seeds)
def test_random_folds_are_equal_but_for_one_spot(n, n_folds, seed):
    fold = random_folds(n, n_folds=n_folds, rng=make_rng(seed))
    size = np.bincount(fold, minlength=n_folds)
    assert (size.sum(), len(size)) == (n, n_folds)
    assert np.ptp(size) <= 1
    assert fold.dtype == np.int64


@properties
@given(st.integers(10, 300), st.integers(1, 6), st.floats(0.1, 0.9), seeds)
def test_random_splits_use_every_spot_once(n, n_splits, share, seed):
    splits = random_splits(n, n_splits=n_splits, share=share, rng=make_rng(seed))
    assert [s.fold for s in splits] == list(range(n_splits))
    for split in splits:
        assert np.sort(np.concatenate([split.train, split.test])).tolist() == list(range(n))
        assert abs(len(split.train) - share * n) <= 0.5
        assert (np.diff(split.train) > 0).all()
        assert (np.diff(split.test) > 0).all()


def test_random_splits_are_independent():
    """Two halves drawn anew have a quarter of all spots in common; dealt folds would have none."""
    a, b = random_splits(10_000, n_splits=2, rng=make_rng())
    assert len(np.intersect1d(a.train, b.train)) == pytest.approx(2500, abs=150)


@pytest.mark.parametrize("share", [0, 1, -0.5, 1.5, 0.01, 0.99, float("nan")])
def test_a_share_that_leaves_nothing_is_refused(share):
    with pytest.raises(ValueError, match=rf"^share={share} of 10 spots leaves none to .* a share between 0 and 1"):
        random_splits(10, n_splits=2, share=share, rng=make_rng())


def test_no_random_split_is_refused():
    with pytest.raises(ValueError, match=r"^n_splits=0: at least 1 is needed"):
        random_splits(10, n_splits=0, rng=make_rng())


# ------------------------------------------------------------------------------------------------------- blocks


@properties
@given(arrays, st.floats(1.5, 8), st.floats(0, np.pi / 2), st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_blocks_are_squares_of_their_edge(array, pitches, turn, shift):
    xy, edge = lay(**array), pitches * array["pitch"]
    block = _blocks(xy, section=np.zeros(len(xy), int), edge_um=edge, turn=turn, shift=np.array([shift]))
    assert np.unique(block).tolist() == list(range(block.max() + 1))
    axes = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    for one in range(block.max() + 1):
        inside = xy[block == one]
        assert len(inside) == 1 or pdist(inside).max() <= edge * np.sqrt(2) * (1 + 1e-9)
        # along the axes of the grid no block is wider than its edge
        assert np.ptp(inside @ axes, axis=0).max() <= edge * (1 + 1e-9)
    # and no square is divided: there are no more blocks than squares that the spots can reach into
    assert block.max() + 1 <= (np.ceil(np.ptp(xy @ axes, axis=0) / edge) + 1).prod()


@properties
@given(st.lists(st.integers(1, 200), min_size=8, max_size=80), st.integers(2, 8), seeds)
def test_blocks_are_dealt_evenly(size, n_folds, seed):
    fold = _deal(np.array(size), n_folds=n_folds, rng=make_rng(seed))
    dealt = np.bincount(fold, weights=size, minlength=n_folds)
    assert dealt.min() > 0
    assert np.ptp(dealt) <= max(size)


def test_equal_blocks_are_dealt_in_random_order():
    dealt = {tuple(_deal(np.full(12, 7), n_folds=3, rng=make_rng(seed))) for seed in range(20)}
    assert len(dealt) == 20


@properties
@given(arrays, st.integers(2, 8), seeds, st.none() | st.floats(1.5, 5))
def test_no_two_block_folds_differ_by_more_than_a_block(array, n_folds, seed, pitches):
    xy, pitch = lay(**array), array["pitch"]
    fold = block_folds(xy, n_folds=n_folds, rng=make_rng(seed), block_um=pitches and pitches * pitch)
    size = np.bincount(fold)
    assert (size.sum(), len(size)) == (len(xy), n_folds)
    assert fold.dtype == np.int64
    edge = pitches or np.sqrt(len(xy) / (6 * n_folds))  # in pitches
    # spots that a square of that edge can hold, whichever way it lies: those whose cells overlap it
    cell = np.sqrt(0.75) if array["kind"] == "hexagonal" else 1
    assert np.ptp(size) <= (edge + 1.5) ** 2 / cell


def test_block_folds_of_a_section_are_equal_within_a_tenth():
    for seed in range(10):
        size = np.bincount(block_folds(lay(n=50), n_folds=5, rng=make_rng(seed)))
        assert size.min() >= 0.9 * 500
        assert size.max() <= 1.1 * 500


@pytest.mark.parametrize("kind", ["hexagonal", "square"])
@pytest.mark.parametrize("n_folds", [2, 5, 10])
def test_a_fold_has_about_six_blocks(kind, n_folds):
    """By the area of the spots; those cut by the border are more."""
    xy = lay(kind, n=60)
    edge = 100 * np.sqrt(len(xy) / (6 * n_folds))
    chosen, given_ = (block_folds(xy, n_folds=n_folds, rng=make_rng(3), block_um=block_um) for block_um in (None, edge))
    assert chosen.tolist() == given_.tolist()
    one_grid = _blocks(xy, section=np.zeros(len(xy), int), edge_um=edge, turn=0.3, shift=np.array([[0.4, 0.6]]))
    assert 6 * n_folds * 0.8 <= one_grid.max() + 1 <= 6 * n_folds * 1.8


def test_spots_that_share_a_place_make_no_block_smaller():
    xy = lay(n=12)
    twice = block_folds(np.repeat(xy, 2, axis=0), n_folds=3, rng=make_rng())
    assert twice.tolist() == np.repeat(block_folds(xy, n_folds=3, rng=make_rng()), 2).tolist()


def test_neighbours_are_mostly_in_one_block_fold():
    xy = lay(n=40)
    _, near = cKDTree(xy).query(xy, k=7)
    together = {}
    for name, fold in {
        "blocks": block_folds(xy, n_folds=5, rng=make_rng()),
        "random": random_folds(len(xy), n_folds=5, rng=make_rng()),
    }.items():
        together[name] = (fold[near[:, 1:]] == fold[:, None]).mean()
    assert together["blocks"] > 0.8
    assert together["random"] == pytest.approx(0.2, abs=0.03)


@properties
@given(st.integers(2, 30), seeds, st.none() | st.floats(1, 1e6))
def test_no_block_fold_is_empty(n_folds, seed, block_um):
    """Twenty folds of thirty spots too, whatever edge was asked for."""
    xy = make_rng(seed).random((30, 2)) * 1000
    fold = block_folds(xy, n_folds=n_folds, rng=make_rng(seed), block_um=block_um)
    assert np.bincount(fold, minlength=n_folds).min() > 0


@properties
@given(arrays, st.integers(2, 4), st.floats(-1e6, 1e6), st.none() | st.floats(1, 1e7), seeds)
def test_where_sections_lie_changes_no_fold(array, n_sections, shift, block_um, seed):
    """In coordinates of their own: on one another, or anywhere; and whatever their numbers are."""
    one, number = lay(**array), np.repeat(np.arange(n_sections), len(lay(**array)))
    here, there = (np.vstack([one + [by * i, -by * i] for i in range(n_sections)]) for by in (0.0, round(shift)))
    more = {"n_folds": 5, "block_um": block_um}
    a = block_folds(here, rng=make_rng(seed), groups=number, **more)
    b = block_folds(there, rng=make_rng(seed), groups=3 * number + 7, **more)
    assert np.mean(a == b) > 0.99  # a spot on the edge of a block may be on either side of it


def test_one_group_is_a_section():
    xy = lay(n=20, missing=0.1)
    alone, grouped = (
        block_folds(xy, n_folds=4, rng=make_rng(3), groups=groups) for groups in (None, np.full(len(xy), 5))
    )
    assert alone.tolist() == grouped.tolist()


def test_no_block_spans_two_sections():
    """Two sections on one another and two folds of huge blocks: each section is one block."""
    one = lay(n=8)
    number = np.repeat([0, 1], len(one))
    fold = block_folds(np.vstack([one, one]), n_folds=2, rng=make_rng(), block_um=1e9, groups=number)
    assert len(np.unique(fold[: len(one)])) == len(np.unique(fold[len(one) :])) == 1
    assert fold[0] != fold[-1]


def test_the_grid_of_blocks_is_turned_and_shifted():
    folds = [block_folds(lay("square", n=40), n_folds=4, rng=make_rng(seed), block_um=500) for seed in range(20)]
    assert len({tuple(fold) for fold in folds}) == 20
    # blocks of 5 x 5 spots along the axes end at every fifth column; those of a turned grid end at nearly all
    ends = [(np.diff(fold.reshape(40, 40), axis=1) != 0).any(axis=0).sum() for fold in folds]
    assert np.median(ends) > 30


@pytest.mark.parametrize("n_folds", [-1, 0, 1])
def test_a_single_fold_is_refused(n_folds):
    with pytest.raises(ValueError, match=rf"^n_folds={n_folds}: at least 2 are needed"):
        block_folds(lay(), n_folds=n_folds, rng=make_rng())
    with pytest.raises(ValueError, match=rf"^n_splits={n_folds}: at least 2 are needed"):
        block_splits(lay(), n_splits=n_folds, buffer_um=0, rng=make_rng())


@pytest.mark.parametrize("block_um", [0, -5.0, float("nan"), float("inf")])
def test_an_impossible_block_is_refused(block_um):
    with pytest.raises(ValueError, match=rf"^block_um={block_um}: give the edge of a block in µm, above 0, or None"):
        block_folds(lay(), n_folds=2, rng=make_rng(), block_um=block_um)


@pytest.mark.parametrize("copies", [1, 3])
def test_more_folds_than_places_are_refused(copies):
    xy = np.repeat(lay(n=3), copies, axis=0)
    want = rf"=10 is more than the 9 different locations of the {9 * copies} spots: take a smaller "
    with pytest.raises(ValueError, match="^n_folds" + want + "n_folds= or larger sections"):
        block_folds(xy, n_folds=10, rng=make_rng())
    with pytest.raises(ValueError, match="^n_splits" + want + "n_splits= or larger sections"):
        block_splits(xy, n_splits=10, buffer_um=0, rng=make_rng())
    assert np.bincount(block_folds(xy, n_folds=9, rng=make_rng())).tolist() == [copies] * 9


# ------------------------------------------------------------------------------------------------------- buffer


@properties
@given(arrays, st.integers(2, 6), st.floats(0, 3), seeds)
def test_no_training_spot_is_within_the_buffer(array, n_splits, pitches, seed):
    xy, buffer_um = lay(**array), pitches * array["pitch"]
    try:
        splits = block_splits(xy, n_splits=n_splits, buffer_um=buffer_um, rng=make_rng(seed))
    except ValueError:
        assume(False)  # a small array under a wide buffer
    assert np.sort(np.concatenate([s.test for s in splits])).tolist() == list(range(len(xy)))
    for i, split in enumerate(splits):
        assert split.fold == i
        rest = np.setdiff1d(np.arange(len(xy)), split.test)
        far = cdist(xy[rest], xy[split.test]).min(axis=1)
        clear = np.abs(far - buffer_um) > 1e-6  # whichever way rounding falls
        assert np.intersect1d(split.train, rest[clear]).tolist() == rest[clear & (far >= buffer_um)].tolist()
        assert len(split.train) >= MIN_TRAIN


def test_without_a_buffer_every_spot_is_used():
    xy = lay()
    assert_partition(block_splits(xy, n_splits=4, buffer_um=0, rng=make_rng()), len(xy))


def test_a_spot_as_far_as_the_buffer_is_trained_on():
    """Only nearer ones are left out: on a line of spots 100 µm apart none is nearer than 100 µm."""
    xy = np.column_stack([np.arange(60) * 100.0, np.zeros(60)])
    assert_partition(block_splits(xy, n_splits=3, buffer_um=100, rng=make_rng()), 60)
    assert sum(len(s.train) for s in block_splits(xy, n_splits=3, buffer_um=100.01, rng=make_rng())) < 120


def test_ten_spots_are_enough_to_learn_from():
    splits = block_splits(lay("square", n=20)[:20], n_splits=2, buffer_um=0, rng=make_rng(), block_um=10)
    assert [len(split.train) for split in splits] == [MIN_TRAIN, MIN_TRAIN]


def test_spots_a_fraction_of_a_micrometre_apart_are_different_locations():
    xy = np.column_stack([np.arange(12) * 0.05, np.zeros(12)])
    assert np.bincount(block_folds(xy, n_folds=12, rng=make_rng())).tolist() == [1] * 12


def test_a_buffer_that_leaves_nothing_is_refused():
    want = (
        r"^buffer_um=1e\+06 leaves 0 of 196 spots to learn from when fold 0 of 5 is held out \(at least 10 are needed\)"
        r': take a smaller buffer_um=, larger sections, or split="random"\.$'
    )
    with pytest.raises(ValueError, match=want):
        block_splits(lay(), n_splits=5, buffer_um=1e6, rng=make_rng())


def test_a_buffer_that_leaves_next_to_nothing_is_refused():
    """Eleven spots far from the one that is held out, nine of them out of reach."""
    xy = np.column_stack([np.arange(12) * 100.0, np.zeros(12)])
    with pytest.raises(ValueError, match=r"^buffer_um=150 leaves \d of 12 spots to learn from"):
        block_splits(xy, n_splits=2, buffer_um=150, rng=make_rng())


@pytest.mark.parametrize("buffer_um", [-1.0, float("nan"), float("inf")])
def test_an_impossible_buffer_is_refused(buffer_um):
    with pytest.raises(ValueError, match=rf"^buffer_um={buffer_um}: give a distance in µm, 0 for no buffer"):
        block_splits(lay(), n_splits=2, buffer_um=buffer_um, rng=make_rng())


# ------------------------------------------------------------------------------------------------------ lattice


@pytest.mark.parametrize(("kind", "keep"), KINDS)
@pytest.mark.parametrize("degrees", [0, 17.0, -68.0])
def test_kept_spots_are_a_coarser_lattice_of_the_same_kind(kind, keep, degrees):
    xy = lay(kind, n=45, degrees=degrees)
    lattice = estimate_lattice(xy)
    middle = xy.mean(axis=0)
    coarse = np.sqrt(keep) * 100
    splits = lattice_splits(lattice, keep=keep, n_splits=keep, rng=make_rng())
    for split in splits:
        assert len(split.train) == pytest.approx(len(xy) / keep, rel=0.05)
        kept = xy[split.train]
        n_near = 6 if kind == "hexagonal" else 4
        dist, near = cKDTree(kept).query(kept, k=n_near + 2)
        inside = np.hypot(*(kept - middle).T) < 45 * 100 * 0.43 - 1.1 * coarse
        assert inside.sum() > 50
        # all of its neighbours are √keep pitches away and the next ones are farther: same kind, no hole, no clump
        assert dist[inside, 1 : n_near + 1] == pytest.approx(coarse, rel=1e-6)
        assert dist[inside, n_near + 1].min() > 1.3 * coarse
        found = estimate_lattice(kept)
        assert found.kind == kind
        assert found.pitch_px == pytest.approx(coarse, rel=1e-6)
    # the phases are all there are: each spot is learnt from in one of the splits
    assert np.sort(np.concatenate([s.train for s in splits])).tolist() == list(range(len(xy)))


@properties
@given(arrays, st.integers(0, 2), seeds)
def test_kept_spots_are_at_least_the_coarse_pitch_apart(array, which, seed):
    """Whatever is missing or out of place, and however the lattice was found to lie."""
    xy, keep = lay(**array), KEEP[array["kind"]][which]
    lattice = estimate_lattice(xy)
    assume(lattice.kind == array["kind"])
    splits = lattice_splits(lattice, keep=keep, n_splits=keep, rng=make_rng(seed))
    kept_in = np.concatenate([s.train for s in splits])
    assert np.sort(kept_in).tolist() == list(range(len(xy)))  # phases without repetition, nothing lost
    for i, split in enumerate(splits):
        assert split.fold == i
        assert np.sort(np.concatenate([split.train, split.test])).tolist() == list(range(len(xy)))
        if len(split.train) > 1:
            assert pdist(xy[split.train]).min() >= (np.sqrt(keep) - 0.17) * array["pitch"]


def test_the_phase_of_the_sublattice_is_drawn():
    lattice = estimate_lattice(lay())
    phases = [tuple(lattice_splits(lattice, keep=7, n_splits=1, rng=make_rng(seed))[0].train) for seed in range(80)]
    assert len(set(phases)) == 7


@pytest.mark.parametrize("kind", ["hexagonal", "square"])
@pytest.mark.parametrize("keep", [0, 1, 6, 8, -3])
def test_a_wrong_keep_lists_the_valid_ones(kind, keep):
    valid = ", ".join(map(str, KEEP[kind]))
    with pytest.raises(ValueError, match=rf"^keep={keep}: on a {kind} lattice choose one of \({valid}\)"):
        lattice_splits(estimate_lattice(lay(kind)), keep=keep, n_splits=1, rng=make_rng())


def test_valid_keeps_of_one_kind_are_refused_on_the_other():
    for kind, keep in (("square", 3), ("square", 7), ("hexagonal", 2), ("hexagonal", 5)):
        with pytest.raises(ValueError, match=rf"^keep={keep}: on a {kind} lattice"):
            lattice_splits(estimate_lattice(lay(kind)), keep=keep, n_splits=1, rng=make_rng())


@pytest.mark.parametrize("n_splits", [0, 4, 100])
def test_more_splits_than_phases_are_refused(n_splits):
    want = rf"^n_splits={n_splits}: keep=3 has 3 different splits; choose from 1 to 3\.$"
    with pytest.raises(ValueError, match=want):
        lattice_splits(estimate_lattice(lay()), keep=3, n_splits=n_splits, rng=make_rng())


# ------------------------------------------------------------------------------------------------- pseudo-spots


@properties
@given(arrays, seeds, st.integers(1, 5))
def test_big_spots_are_a_spot_and_its_ring(array, seed, min_members):
    xy = lay(**array)
    lattice = estimate_lattice(xy)
    assume(lattice.kind == array["kind"])
    big = pseudo_spots(lattice, rng=make_rng(seed), min_members=min_members)
    assert big.dtype == np.int64
    size = np.bincount(big[big >= 0])
    assert size.min() >= min_members  # and so no number is left out
    assert size.max() <= PLACES[lattice.kind]
    for one in np.flatnonzero(size == PLACES[lattice.kind]):
        members = xy[big == one]
        far = cdist(members, members)
        middle = far.max(axis=1).argmin()
        ring = np.delete(far[middle], middle)
        assert ring == pytest.approx(array["pitch"], rel=0.17)
    # members of one that has lost some are no farther apart than the ring is wide
    for one in np.flatnonzero(size > 1):
        assert pdist(xy[big == one]).max() <= 2.17 * array["pitch"]


@pytest.mark.parametrize("kind", ["hexagonal", "square"])
def test_big_spots_tile_the_plane(kind):
    xy = lay(kind, n=40, degrees=25)
    lattice = estimate_lattice(xy)
    big = pseudo_spots(lattice, rng=make_rng(2))
    n_places = PLACES[kind]
    inside = np.hypot(*(xy - xy.mean(axis=0)).T) < 1400
    size = np.bincount(big[big >= 0])
    assert (big[inside] >= 0).all()
    assert (size[big[inside]] == n_places).all()
    assert len(size) == pytest.approx(len(xy) / n_places, rel=0.08)
    centres = np.column_stack([np.bincount(big[big >= 0], xy[big >= 0, i]) / size for i in (0, 1)])
    whole = centres[size == n_places]
    assert cKDTree(xy).query(whole)[0].max() < 1e-6  # the mean of a whole one is a spot
    dist, _ = cKDTree(whole).query(whole, k=2)
    assert dist[:, 1] == pytest.approx(np.sqrt(n_places) * 100, rel=1e-6)


@pytest.mark.parametrize(("kind", "default"), [("hexagonal", 5), ("square", 4)])
def test_incomplete_big_spots_are_left_out(kind, default):
    lattice = estimate_lattice(lay(kind, n=16, missing=0.2, seed=1))
    every = pseudo_spots(lattice, rng=make_rng(), min_members=1)
    assert (every >= 0).all()
    size = np.bincount(every)
    assert size.min() == 1
    by_default = pseudo_spots(lattice, rng=make_rng())
    assert ((by_default >= 0) == (size[every] >= default)).all()
    assert by_default.min() == -1
    assert by_default.max() + 1 == (size >= default).sum()
    assert len(np.unique(np.column_stack([by_default, every])[by_default >= 0], axis=0)) == (size >= default).sum()


def test_a_big_spot_may_have_a_hole_in_its_middle():
    xy = lay(n=14)
    whole = pseudo_spots(estimate_lattice(xy), rng=make_rng(), min_members=7)
    one = whole[np.hypot(*(xy - xy.mean(axis=0)).T).argmin()]
    members = np.flatnonzero(whole == one)
    middle = members[cdist(xy[members], xy[members]).max(axis=1).argmin()]
    left = np.delete(np.arange(len(xy)), middle)
    rings = set()
    for seed in range(40):  # the index may start elsewhere without that spot: try all phases
        big = pseudo_spots(estimate_lattice(xy[left]), rng=make_rng(seed))
        rings |= {frozenset(left[big == b].tolist()) for b in range(big.max() + 1)}
    assert frozenset(members.tolist()) - {middle} in rings


@pytest.mark.parametrize("kind", ["hexagonal", "square"])
def test_the_phase_of_big_spots_is_drawn(kind):
    lattice = estimate_lattice(lay(kind))
    assert len({tuple(pseudo_spots(lattice, rng=make_rng(seed))) for seed in range(80)}) == PLACES[kind]


@pytest.mark.parametrize(("kind", "n_places"), PLACES.items())
@pytest.mark.parametrize("wrong", [0, -1, 8])
def test_impossible_members_are_refused(kind, n_places, wrong):
    want = rf"^min_members={wrong}: a big spot on a {kind} lattice has {n_places} sites; choose from 1 to {n_places}"
    with pytest.raises(ValueError, match=want):
        pseudo_spots(estimate_lattice(lay(kind)), rng=make_rng(), min_members=wrong)


def test_a_section_without_a_big_spot_is_refused():
    want = r"^min_members=4: no big spot has so many of the 4 spots, the fullest has [23]; take a smaller min_members="
    with pytest.raises(ValueError, match=want):
        pseudo_spots(estimate_lattice(lay("square", n=2)), rng=make_rng())


# ----------------------------------------------------------------------------------------------------- sections


@pytest.mark.parametrize(
    "groups", [["b", "a", "b", "c"], np.array([7, 3, 7, 9]), np.array(["s2", "s1", "s2", "s3"], object)]
)
def test_each_group_is_left_out_once(groups):
    splits = group_splits(groups)
    assert_partition(splits, 4)
    assert [s.test.tolist() for s in splits] == [[1], [0, 2], [3]]


@pytest.mark.parametrize(("groups", "names"), [(["a", "a"], r"\['a'\]"), ([], r"\[\]")])
def test_a_single_group_is_refused(groups, names):
    with pytest.raises(ValueError, match=rf"^groups={names}: at least 2 are needed to leave one out; give more sec"):
        group_splits(groups)


# ------------------------------------------------------------------------------------------------- same, and other


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng: random_splits(196, n_splits=3, rng=rng),
        lambda rng: block_splits(lay(), n_splits=3, buffer_um=150, rng=rng),
        lambda rng: lattice_splits(estimate_lattice(lay()), keep=7, n_splits=3, rng=rng),
    ],
    ids=["random", "blocks", "lattice"],
)
def test_the_same_rng_draws_the_same_splits(draw):
    assert same(draw(make_rng(5)), draw(make_rng(5)))
    assert not same(draw(make_rng(5)), draw(make_rng(6)))


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng: random_folds(196, n_folds=3, rng=rng),
        lambda rng: block_folds(lay(), n_folds=3, rng=rng),
        lambda rng: pseudo_spots(estimate_lattice(lay()), rng=rng),
    ],
    ids=["random", "blocks", "pseudo-spots"],
)
def test_the_same_rng_draws_the_same_folds(draw):
    assert draw(make_rng(5)).tolist() == draw(make_rng(5)).tolist()
    assert draw(make_rng(5)).tolist() != draw(make_rng(6)).tolist()


@pytest.mark.parametrize(("turns", "mirror"), [(1, False), (2, False), (3, True)])
def test_blocks_turn_with_the_section(turns, mirror):
    """A section that lies another way on the slide gets the same folds, and each of several sections does."""
    random = np.random.default_rng(0)
    xy = random.gamma(2.0, 100.0, (300, 2)) * [1.0, 2.0]
    turned = xy
    for _ in range(turns):
        turned = np.column_stack([turned[:, 1], -turned[:, 0]])
    turned = turned * ([-1, 1] if mirror else 1) + [5000.0, 700.0]
    folds = [
        block_folds(where, n_folds=4, rng=np.random.default_rng(3), groups=np.repeat([0, 1], [300, 300]))
        for where in (np.vstack([xy, xy]), np.vstack([xy, turned]))
    ]
    np.testing.assert_array_equal(*folds)
    assert (folds[0][:300] != folds[0][300:]).any()  # grids of their own
