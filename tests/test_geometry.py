"""Lattices of known pitch, turn and gaps: what is found is compared with what was laid."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from tests import rounding

from histosge._geometry import (
    UPSAMPLE,
    NotALattice,
    Targets,
    estimate_lattice,
    in_mask,
    lattice_of_array,
    lay_around,
    lay_over,
    nearest_spots,
    occupied_share,
    optical_density,
    refine,
    similarity_scale,
    square_bins,
    tissue_mask,
    upright,
)

CELL = {"hexagonal": np.sqrt(3) / 2, "square": 1.0}
UNIT = {"hexagonal": np.array([[1.0, 0.0], [0.5, np.sqrt(0.75)]]), "square": np.eye(2)}
properties = settings(deadline=None, max_examples=25)


def turned(degrees):
    a = np.deg2rad(degrees)
    return np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])  # rows are vectors: xy @ turned(d)


def lay(kind, *, n=12, pitch=1.0, degrees=0.0, shift=(0.0, 0.0), missing=0.0, jitter=0.0, seed=0):
    """An n x n array as printed: rows of a hexagonal one are offset by half a step in turn, so that it stays upright."""
    rng = np.random.default_rng(seed)
    row, col = (a.ravel() for a in np.meshgrid(np.arange(n), np.arange(n), indexing="ij"))
    if kind == "hexagonal":
        xy = np.column_stack([col + 0.5 * (row % 2), row * np.sqrt(0.75)])
    else:
        xy = np.column_stack([col, row]).astype(float)
    xy = xy[rng.random(len(xy)) >= missing]
    angle, length = rng.random(len(xy)) * 2 * np.pi, np.sqrt(rng.random(len(xy))) * jitter
    xy = xy + np.column_stack([np.cos(angle), np.sin(angle)]) * length[:, None]
    return pitch * xy @ turned(degrees) + shift


lattices = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["hexagonal", "square"]),
        "n": st.integers(7, 25),
        "pitch": st.floats(0.7, 900),
        "degrees": st.floats(-180, 180),
        "shift": st.tuples(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4)),
        "missing": st.floats(0, 0.3),
        "seed": st.integers(0, 999),
    }
)


def same_places(a, b, *, tolerance):
    """Whether two sets of places are equal, in any order, one to one."""
    if len(a) != len(b):
        return False
    dist, index = cKDTree(b).query(a)
    return dist.max() <= tolerance and len(np.unique(index)) == len(b)


def affine_of(index, xy):
    """Least-squares map from whole-number index to place, and the largest distance from it."""
    design = np.column_stack([np.ones(len(index)), index])
    fitted, *_ = np.linalg.lstsq(design, xy, rcond=None)
    return fitted[1:], np.hypot(*(xy - design @ fitted).T).max()


# ------------------------------------------------------------------------------------------------------ lattice


@properties
@given(lattices)
def test_lattice_is_recovered_exactly(given_):
    xy = lay(**given_)
    found = estimate_lattice(xy)
    pitch = given_["pitch"]
    assert found.kind == given_["kind"]
    assert found.pitch_px == pytest.approx(pitch, rel=1e-6)
    assert np.abs(found.origin + found.index @ found.basis - xy).max() < 1e-6 * pitch + 1e-9
    assert found.residual < 1e-6
    assert len(np.unique(found.index, axis=0)) == len(xy)
    # the basis is that of the lattice that was laid: every step of it is a step between neighbours
    whole = found.basis @ np.linalg.inv(pitch * UNIT[given_["kind"]] @ turned(given_["degrees"]))
    assert np.allclose(whole, np.rint(whole), atol=1e-5)
    assert abs(np.linalg.det(whole)) == pytest.approx(1)
    assert np.allclose(np.hypot(*found.basis.T), pitch, rtol=1e-6)


@properties
@given(lattices, st.floats(0.01, 0.12))
def test_lattice_survives_jitter(given_, jitter):
    xy = lay(**given_, jitter=jitter)
    found = estimate_lattice(xy)
    ideal = lay(**given_)
    assert found.kind == given_["kind"]
    assert found.pitch_px == pytest.approx(given_["pitch"], rel=0.02)
    assert found.residual < jitter
    # every spot has the index of its true place, up to the choice of origin and axes
    exact = estimate_lattice(ideal)
    step = (
        found.index
        - found.index[0]
        - (exact.index - exact.index[0]) @ (np.rint(exact.basis @ np.linalg.inv(found.basis)).astype(int))
    )
    assert not step.any()


@pytest.mark.parametrize("kind", ["hexagonal", "square"])
def test_lattice_of_a_whole_slide_does_not_drift(kind):
    """71 rows: the first guess of the step is 0.4 % too long, which would add up to a quarter of a pitch."""
    xy = lay(kind, n=71, pitch=137.3, degrees=1.7, missing=0.4, jitter=0.12, seed=3)
    found = estimate_lattice(xy)
    assert found.pitch_px == pytest.approx(137.3, rel=1e-3)
    assert found.residual < 0.09  # a jitter of 0.12 at most is 0.085 in root mean square
    assert np.ptp(found.index[:, 1]) == 70


def test_lattice_does_not_depend_on_the_order_of_spots():
    xy = lay("hexagonal", degrees=20, missing=0.2, pitch=50)
    order = np.random.default_rng(1).permutation(len(xy))
    a, b = estimate_lattice(xy), estimate_lattice(xy[order])
    assert np.allclose(a.basis, b.basis)
    assert (a.index[order] == b.index).all()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "um"), [("hexagonal", 100.0), ("square", 200.0)])
def test_pitch_agrees_with_squidpy(kind, um):
    squidpy_utils = pytest.importorskip("squidpy.experimental.utils")
    import geopandas as gpd
    import shapely
    from spatialdata import SpatialData
    from spatialdata.models import ShapesModel
    from spatialdata.transformations import Identity

    xy = lay(kind, n=20, pitch=137.9, degrees=33, missing=0.1, shift=(500, 900))
    circles = ShapesModel.parse(
        gpd.GeoDataFrame({"radius": np.full(len(xy), 40.0)}, geometry=shapely.points(xy)),
        transformations={"px": Identity()},
    )
    oracle = squidpy_utils.derive_mpp_from_shapes(SpatialData(shapes={"s": circles}), "s", "px", um_between_centers=um)
    assert um / estimate_lattice(xy).pitch_px == pytest.approx(oracle, rel=1e-6)


def test_cells_are_not_a_lattice():
    xy = np.random.default_rng(0).random((400, 2)) * 1000
    with pytest.raises(NotALattice, match=r"no hexagonal or square order .*order parameters 0\.\d\d and 0\.\d\d"):
        estimate_lattice(xy)


def test_places_without_a_common_distance_are_not_a_lattice():
    """Half of the spots have their neighbour at 1, half at 3: at the median distance, 2, there is none."""
    pair = np.array([[0.0, 0.0], [1.0, 0.0]])
    xy = np.vstack([pair * (1 + 2 * (i % 2)) + [100.0 * i, 0] for i in range(20)])
    with pytest.raises(NotALattice, match="no neighbours at a common distance"):
        estimate_lattice(xy)


def test_shared_places_are_not_a_lattice():
    with pytest.raises(NotALattice, match="share positions"):
        estimate_lattice(np.repeat(lay("square", n=6), 2, axis=0))


def test_a_wavy_array_is_not_a_lattice():
    """Each step is nearly right, and far away the lattice is out of step."""
    xy = lay("square", n=30)
    wavy = xy + np.column_stack([np.sin(xy[:, 1] / 5), np.sin(xy[:, 0] / 5)])
    with pytest.raises(
        NotALattice, match=r"the best square lattice \(pitch .* px\) misses the spots by 0\.\d\d pitches"
    ):
        estimate_lattice(wavy)


def test_doubled_spots_are_not_a_lattice():
    """Two sections in one table, laid over each other with a small shift in a corner."""
    xy = lay("hexagonal", n=12, pitch=10)
    corner = xy[(xy < 30).all(1)]
    with pytest.raises(NotALattice, match=r"puts \d+\.\d% of them on another spot's site"):
        estimate_lattice(np.vstack([xy, corner + [2.0, 1.0]]))


def stretch(xy, *, factor, direction):
    along = np.array([np.cos(np.deg2rad(direction)), np.sin(np.deg2rad(direction))])
    return xy + np.outer(xy @ along, along) * (factor - 1)


@pytest.mark.parametrize("kind", ["hexagonal", "square"])
@pytest.mark.parametrize("degrees", [0, 25])
def test_stretched_lattice_is_refused(kind, degrees):
    xy = stretch(lay(kind, n=14, pitch=80), factor=1.12, direction=0) @ turned(degrees)
    with pytest.raises(NotALattice, match=r"is stretched: neighbours lie .* px apart in one direction"):
        estimate_lattice(xy)


@pytest.mark.parametrize(("kind", "direction"), [("square", 45), ("hexagonal", 30)])
def test_lattice_stretched_along_its_diagonal_is_refused(kind, direction):
    """Both steps stay equally long, and yet one direction is 12 % longer than the other."""
    with pytest.raises(NotALattice, match="stretched"):
        estimate_lattice(stretch(lay(kind, n=14, pitch=80), factor=1.12, direction=direction))


def test_pairs_scattered_over_a_lattice_are_chance():
    """Sixty pairs on ten thousand sites, in all directions: each spot has one neighbour, and hardly any site has one."""
    rng = np.random.default_rng(0)
    corner = 10 * np.stack(np.meshgrid(np.arange(10), np.arange(10)), -1).reshape(-1, 2) + rng.integers(0, 9, (100, 2))
    step = np.array([[1, 0], [0, 1], [-1, 1]])[np.arange(100) % 3]
    xy = np.vstack([corner, corner + step]) @ (20.0 * UNIT["hexagonal"])
    with pytest.raises(
        NotALattice, match=r"best hexagonal lattice \(pitch 20\.0 px\) has spots on only [12]\.\d% of its sites"
    ):
        estimate_lattice(xy)


@pytest.mark.parametrize("kind", ["hexagonal", "square"])
@pytest.mark.parametrize("period", [2, 3])
def test_a_lattice_without_one_class_of_its_sites_is_refused(kind, period):
    """As of several arrays over one another: every second or third site of every second or third row is empty."""
    site = np.stack(np.meshgrid(np.arange(18), np.arange(18)), -1).reshape(-1, 2)
    there = site[(site % period != 1).any(axis=1)]
    with pytest.raises(NotALattice, match="on every second or third"):
        estimate_lattice(20.0 * there @ UNIT[kind])
    some = np.random.default_rng(0).random(len(site)) < len(there) / len(site)  # as many, but any
    assert estimate_lattice(20.0 * site[some] @ UNIT[kind]).pitch_px == pytest.approx(20)


def test_share_of_occupied_sites_is_exact_by_picks_theorem():
    site = np.stack(np.meshgrid(np.arange(6.0), np.arange(5.0)), -1).reshape(-1, 2)
    inner = ((site > 1) & (site < [4, 3])).all(axis=1)  # the hull does not need them
    assert inner.sum() == 2
    assert occupied_share(site[~inner] * 3, cell_px2=9) == pytest.approx(28 / 30, abs=1e-4)


@pytest.mark.parametrize("stretch", [(1.5, 1.0), (1.0, 1.5), (1.08, 1.0), (1.0, 1.08)])
@pytest.mark.parametrize("half_steps", [False, True])
def test_a_stretched_array_is_refused(stretch, half_steps):
    row, col = (a.ravel() for a in np.indices((8, 9)))
    col = 2 * col + row % 2 if half_steps else col
    xy = np.column_stack([col / 2, row * np.sqrt(0.75)] if half_steps else [col, row]) * 20 * stretch
    with pytest.raises(NotALattice, match=r"^rows of the array lie .* neither hexagonal nor square"):
        lattice_of_array(xy, row, col)


def test_the_array_is_numbered_from_its_own_first_row_and_column():
    row, col = (a.ravel() for a in np.indices((6, 5)))
    found = lattice_of_array(np.column_stack([col, row]) * 20.0 + 7, row + 40, col + 13)
    np.testing.assert_array_equal(found.index, np.column_stack([col, row]))
    np.testing.assert_allclose(found.origin, 7)
    assert found.residual < 1e-12


@properties
@given(lattices, st.floats(0, 180))
def test_a_stretch_of_one_percent_is_no_reason_to_refuse(given_, direction):
    xy = stretch(lay(**given_), factor=1.01, direction=direction)
    assert estimate_lattice(xy).pitch_px == pytest.approx(given_["pitch"], rel=0.01)


# ------------------------------------------------------------------------------------------------------- refine


@properties
@given(lattices, st.sampled_from(UPSAMPLE))
def test_refine_lays_a_finer_lattice(given_, upsample):
    given_ |= {"missing": min(given_["missing"], 0.1), "n": min(given_["n"], 12)}
    xy, pitch = lay(**given_), given_["pitch"]
    lattice = estimate_lattice(xy)
    places = refine(lattice, xy, upsample=upsample)

    # the spots' own places, exactly and once each
    assert sorted(places.spot_index[places.spot_index >= 0]) == list(range(len(xy)))
    own = np.flatnonzero(places.spot_index >= 0)
    assert (places.xy_px[own] == xy[places.spot_index[own]]).all()

    # nothing laid twice; the distance that is stated is the least one, and occurs
    dist = cKDTree(places.xy_px).query(places.xy_px, k=2)[0][:, 1]
    assert dist.min() == pytest.approx(places.step_px, rel=1e-5)

    # whole rows and columns, from 0, one place each, and affine to the positions
    index = np.column_stack([places.array_col, places.array_row])
    assert (index.min(0) == 0).all()
    assert len(np.unique(index, axis=0)) == len(places)
    basis, error = affine_of(index, places.xy_px)
    assert error < 1e-5 * pitch

    # `upsample` places for every spot: the cell of the fine lattice is that much smaller
    assert abs(np.linalg.det(basis)) == pytest.approx(CELL[given_["kind"]] * pitch**2 / upsample, rel=1e-5)
    # … and none is missing around a spot
    fine = {tuple(i) for i in index.tolist()}
    reach = int(np.ceil(0.7 * pitch / places.step_px)) + 1
    offset = np.stack(np.meshgrid(*[np.arange(-2 * reach, 2 * reach + 1)] * 2, indexing="ij"), -1).reshape(-1, 2)
    offset = offset[np.hypot(*(offset @ basis).T) <= 0.55 * pitch]
    assert {tuple(i) for i in (index[own][:, None] + offset).reshape(-1, 2).tolist()} <= fine
    # … nor laid farther away than a spot's own cell reaches (a hole that was filled counts as a spot)
    assert cKDTree(xy).query(places.xy_px)[0].max() < 1.75 * pitch


@pytest.mark.parametrize("kind", ["hexagonal", "square"])
@pytest.mark.parametrize("upsample", UPSAMPLE)
def test_refine_gives_every_interior_spot_its_share(kind, upsample):
    """Share places between the spots nearest to them: inside the array each spot has exactly ``upsample``."""
    xy = lay(kind, n=9, pitch=100, degrees=17)
    places = refine(estimate_lattice(xy), xy, upsample=upsample)
    dist = np.hypot(*(places.xy_px[:, None] - xy[None]).transpose(2, 0, 1))  # (places, spots)
    nearest = dist <= dist.min(1, keepdims=True) + 1e-6
    share = (nearest / nearest.sum(1, keepdims=True)).sum(0)
    neighbours = (np.hypot(*(xy[:, None] - xy[None]).transpose(2, 0, 1)) < 150).sum(1) - 1
    interior = neighbours == {"hexagonal": 6, "square": 8}[kind]
    assert interior.sum() > 20
    assert share[interior] == pytest.approx(upsample)


@properties
@given(lattices, st.sampled_from(UPSAMPLE), st.integers(0, 99))
def test_refine_does_not_depend_on_the_order_of_spots(given_, upsample, seed):
    given_ |= {"n": 8}
    xy = lay(**given_)
    order = np.random.default_rng(seed).permutation(len(xy))
    a = refine(estimate_lattice(xy), xy, upsample=upsample)
    b = refine(estimate_lattice(xy[order]), xy[order], upsample=upsample)
    assert same_places(a.xy_px, b.xy_px, tolerance=1e-6 * given_["pitch"])
    own = b.spot_index >= 0
    assert (b.xy_px[own] == xy[order[b.spot_index[own]]]).all()


@properties
@given(lattices, st.sampled_from(UPSAMPLE), st.floats(-180, 180), st.floats(0.1, 10))
def test_refine_moves_turns_and_scales_with_the_spots(given_, upsample, degrees, scale):
    if upsample in (2, 8) and given_["kind"] == "hexagonal":
        # the one more family of places lies along the row nearest to the x axis: turn by less than half a step of 60°
        given_ |= {"degrees": 0.0}
        degrees = degrees / 180 * 25
    given_ |= {"n": 8}
    xy = lay(**given_)
    moved = scale * xy @ turned(degrees) + [1000.0, -300.0]
    a = refine(estimate_lattice(xy), xy, upsample=upsample)
    b = refine(estimate_lattice(moved), moved, upsample=upsample)
    expected = scale * a.xy_px @ turned(degrees) + [1000.0, -300.0]
    assert b.step_px == pytest.approx(scale * a.step_px, rel=1e-6)
    assert same_places(b.xy_px, expected, tolerance=1e-5 * scale * given_["pitch"])


@pytest.mark.parametrize("kind", ["hexagonal", "square"])
@pytest.mark.parametrize("upsample", UPSAMPLE)
def test_refine_fills_single_holes(kind, upsample):
    whole = lay(kind, n=9, pitch=10, degrees=5)
    middle = int(np.argmin(((whole - whole.mean(0)) ** 2).sum(1)))
    xy = np.delete(whole, middle, axis=0)
    filled, full = (refine(estimate_lattice(p), p, upsample=upsample) for p in (xy, whole))
    assert same_places(filled.xy_px, full.xy_px, tolerance=1e-6)
    at = cKDTree(filled.xy_px).query(whole[middle])[1]
    assert filled.spot_index[at] == -1


def test_refine_leaves_large_holes_open():
    whole = lay("hexagonal", n=15, pitch=10)
    centre = whole.mean(0)
    xy = whole[np.hypot(*(whole - centre).T) > 40]
    places = refine(estimate_lattice(xy), xy, upsample=4)
    assert np.hypot(*(places.xy_px - centre).T).min() > 20


@pytest.mark.parametrize("kind", ["hexagonal", "square"])
@pytest.mark.parametrize("upsample", UPSAMPLE)
def test_no_target_lies_beyond_the_cells_of_the_spots(kind, upsample):
    """The corners of a spot's own cell, of a hexagon or a square, are the farthest from it."""
    xy = lay(kind, n=9)
    far = cKDTree(xy).query(refine(estimate_lattice(xy), xy, upsample=upsample).xy_px)[0]
    assert far.max() <= {"hexagonal": np.sqrt(1 / 3), "square": np.sqrt(1 / 2)}[kind] * (1 + 1e-5)


def test_refine_does_not_grow_the_edge():
    """What lies beyond the edge of the array is no hole."""
    xy = lay("hexagonal", n=9, pitch=10)
    places = refine(estimate_lattice(xy), xy, upsample=4)
    assert cKDTree(xy).query(places.xy_px)[0].max() <= 10 / np.sqrt(3) + 1e-6


def test_refine_follows_a_deformed_array():
    """Each place is anchored to the spots next to it, not to one ideal lattice."""
    ideal = lay("hexagonal", n=14, pitch=100)

    def bend(p):
        return p + np.column_stack([6 * np.sin(p[:, 1] / 500), 6 * np.cos(p[:, 0] / 500)])

    xy = bend(ideal)
    places = refine(estimate_lattice(xy), xy, upsample=4)
    expected = bend(refine(estimate_lattice(ideal), ideal, upsample=4).xy_px)
    assert len(places) == len(expected)
    inside = ((expected > 100) & (expected < [1200, 1000])).all(1)
    assert cKDTree(places.xy_px).query(expected[inside])[0].max() < 0.6


@pytest.mark.parametrize("upsample", [0, 1, 3, 32, 4.5, None, "4"])
def test_refine_refuses_other_numbers(upsample):
    xy = lay("square", n=6)
    with pytest.raises(ValueError, match=r"upsample=.* choose one of \(2, 4, 8, 16\)"):
        refine(estimate_lattice(xy), xy, upsample=upsample)


def test_some_of_the_targets():
    xy = lay("square", n=6)
    places = refine(estimate_lattice(xy), xy, upsample=4)
    mask = places.array_row == 3
    kept = places.take(mask)
    assert isinstance(kept, Targets)
    assert len(kept) == mask.sum() > 0
    assert (kept.array_row == 3).all()
    assert (kept.xy_px == places.xy_px[mask]).all()
    assert (kept.spot_index == places.spot_index[mask]).all()


# --------------------------------------------------------------------------------------------------------- bins


@properties
@given(st.floats(3, 40), st.floats(5, 60), st.integers(0, 99))
def test_square_bins_cover_what_is_near_a_spot(bin_px, margin, seed):
    xy = np.random.default_rng(seed).random((15, 2)) * 300 - 40
    bins = square_bins(xy, bin_px=bin_px, margin_px=margin)
    assert bins.step_px == bin_px
    assert (bins.spot_index == -1).all()
    index = np.column_stack([bins.array_col, bins.array_row])
    assert len(np.unique(index, axis=0)) == len(bins)
    assert (index >= 0).all()
    # edges lie on multiples of the bin's size: the same bins whichever spots there are
    assert np.allclose(bins.xy_px / bin_px % 1, 0.5)
    if len(bins) > 1:
        assert np.allclose(np.diff(bins.xy_px, axis=0), np.diff(index, axis=0) * bin_px)
    # exactly those within the margin, by brute force over a wide grid
    wide = np.arange(np.floor((-50 - margin) / bin_px), np.ceil((320 + margin) / bin_px))
    grid = (np.stack(np.meshgrid(wide, wide), -1).reshape(-1, 2) + 0.5) * bin_px
    near = np.hypot(*(grid[:, None] - xy[None]).transpose(2, 0, 1)).min(1) < margin
    assert same_places(bins.xy_px, grid[near], tolerance=1e-6) if near.any() else len(bins) == 0


def test_square_bins_over_an_image():
    bins = lay_over(70.0, 45.0, step_px=20, hexagonal=False, diameter_px=7)
    assert bins.xy_px.tolist() == [[10, 10], [30, 10], [50, 10], [10, 30], [30, 30], [50, 30]]
    assert bins.array_row.tolist() == [0, 0, 0, 1, 1, 1]
    assert bins.array_col.tolist() == [0, 1, 2, 0, 1, 2]
    assert bins.footprints.size_px.tolist() == [20] * 6  # side by side, whatever the diameter of a disc
    assert (bins.are_bins, bins.step_px, bins.laid) == (True, 20.0, True)
    assert bins.spot_index.tolist() == [-1] * 6
    assert bins.instances.tolist() == list(range(6))
    assert {bins.array_row.dtype, bins.array_col.dtype, bins.spot_index.dtype} == {np.dtype(np.int64)}


@pytest.mark.parametrize("diameter_px", [None, 7.0])
def test_a_hexagonal_lattice_over_an_image(diameter_px):
    """Rows are 17.3 px apart, and 2.7 of them fit; each second one is half a step to the right."""
    places = lay_over(70.0, 47.0, step_px=20, hexagonal=True, diameter_px=diameter_px)
    np.testing.assert_allclose(places.xy_px[:, 0], [10, 30, 50, 20, 40, 60])
    np.testing.assert_allclose(places.xy_px[:, 1], [10 * np.sqrt(0.75)] * 3 + [30 * np.sqrt(0.75)] * 3)
    assert places.array_row.tolist() == [0, 0, 0, 1, 1, 1]
    assert places.array_col.tolist() == [0, 2, 4, 1, 3, 5]
    assert places.footprints.size_px.tolist() == [diameter_px or 20.0] * 6
    assert (places.footprints.kind, places.step_px) == ("disc", 20.0)


@properties
@given(st.integers(1, 30), st.floats(1, 300), st.sampled_from(UPSAMPLE), st.integers(0, 999))
def test_a_lattice_around_irregular_spots(n, pitch, upsample, seed):
    """All sites of one hexagonal lattice that are nearer than a pitch to a spot, and no other."""
    xy = np.random.default_rng(seed).uniform(-5, 5, (n, 2)) * pitch
    places = lay_around(xy, pitch_px=pitch, upsample=upsample)
    step = pitch / np.sqrt(upsample)
    assert places.step_px == pytest.approx(step)
    np.testing.assert_allclose(places.footprints.size_px, step)
    assert lay_around(xy, pitch_px=pitch, upsample=upsample, diameter_px=3).footprints.size_px.tolist() == [3] * len(
        places
    )
    index = np.column_stack([places.array_col, places.array_row])
    assert index.min(axis=0).tolist() == [0, 0]
    assert len(np.unique(index, axis=0)) == len(places)
    basis = step * UNIT["hexagonal"]
    origin = (places.xy_px - index @ basis).mean(axis=0)
    # origin is a mean over all places; each place is a sum of two products
    off = rounding.of_sum(len(places) + 4, np.abs(places.xy_px).max() + np.abs(index @ basis).max(), dtype=float)
    np.testing.assert_allclose(places.xy_px, origin + index @ basis, atol=off)
    assert (places.spot_index == -1).all()
    reach = np.arange(-9, index.max() + 9)
    sites = origin + np.stack(np.meshgrid(reach, reach), -1).reshape(-1, 2) @ basis
    far = cKDTree(xy).query(sites)[0]
    clear = cKDTree(xy).query(places.xy_px)[0] < pitch * (1 - 1e-9)  # rounding decides on the others
    assert cKDTree(xy).query(places.xy_px)[0].max() <= pitch * (1 + 1e-9)
    assert same_places(places.xy_px[clear], sites[far < pitch * (1 - 1e-9)], tolerance=1e-6 * pitch)


def test_a_lattice_around_irregular_spots_moves_with_them():
    xy = np.random.default_rng(0).uniform(0, 90, (20, 2))
    here, there = (lay_around(places, pitch_px=16, upsample=4) for places in (xy, xy + [63.3, -31.7]))
    np.testing.assert_allclose(there.xy_px, here.xy_px + [63.3, -31.7])


@pytest.mark.parametrize("upsample", [0, 3, None])
def test_a_lattice_around_spots_refuses_other_numbers(upsample):
    with pytest.raises(ValueError, match=rf"^upsample={upsample}: choose one of \(2, 4, 8, 16\)"):
        lay_around(np.zeros((1, 2)), pitch_px=10, upsample=upsample)


# ------------------------------------------------------------------------------------------------ nearest spots


@properties
@given(st.integers(1, 12), st.integers(1, 8), st.booleans(), st.integers(0, 999))
def test_nearest_spots_against_brute_force(n_spots, k, excluding, seed):
    rng = np.random.default_rng(seed)
    spots, places = rng.random((n_spots, 2)), rng.random((9, 2))
    exclude = rng.integers(-1, n_spots, 9) if excluding else None
    index, dist, present = nearest_spots(places, spots, k=k, exclude=exclude)
    assert index.shape == dist.shape == present.shape == (9, k)
    assert (index.dtype, present.dtype) == (np.int64, np.bool_)
    for i, place in enumerate(places):
        rows = [r for r in range(n_spots) if exclude is None or r != exclude[i]]
        far = np.hypot(*(spots[rows] - place).T)
        order = np.argsort(far)[:k]
        n = len(order)
        assert index[i, :n].tolist() == [rows[o] for o in order]
        assert dist[i, :n] == pytest.approx(far[order])
        assert present[i].tolist() == [True] * n + [False] * (k - n)
        assert not dist[i, n:].any()
        assert not index[i, n:].any()


def test_nearest_spots_leaves_out_one_spot_not_one_place():
    """Two spots at one place: only the one that is named is hidden."""
    spots = np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    index, dist, _ = nearest_spots(spots[:1], spots, k=2, exclude=np.array([0]))
    assert index.tolist() == [[1, 2]]
    assert dist.tolist() == [[0.0, 1.0]]


@properties
@given(st.integers(1, 30), st.integers(1, 8), st.booleans(), st.integers(0, 99))
def test_nearest_spots_of_a_group_against_brute_force(n_spots, k, excluding, seed):
    """As if the spots of other groups were not there, in rows of all spots; -1 is a group without spots."""
    rng = np.random.default_rng(seed)
    spots, places = rng.random((n_spots, 2)), rng.random((12, 2))
    exclude = rng.integers(-1, n_spots, 12) if excluding else None
    groups, spot_groups = rng.integers(-1, 3, 12), rng.integers(0, 3, n_spots)
    found = nearest_spots(places, spots, k=k, exclude=exclude, groups=groups, spot_groups=spot_groups)
    for i, (index, dist, present) in enumerate(zip(*found, strict=True)):
        rows = [r for r in np.flatnonzero(spot_groups == groups[i]) if exclude is None or r != exclude[i]]
        far = np.hypot(*(spots[rows] - places[i]).T)
        order = np.argsort(far)[:k]
        n = len(order)
        assert index.tolist() == [rows[o] for o in order] + [0] * (k - n)
        assert dist == pytest.approx([*far[order], *[0] * (k - n)])
        assert present.tolist() == [True] * n + [False] * (k - n)


def test_many_neighbours_stay_in_order_when_one_is_left_out():
    rng = np.random.default_rng(0)
    spots = rng.random((200, 2))
    index, dist, _ = nearest_spots(spots, spots, k=60, exclude=rng.integers(0, 200, 200))
    assert (np.diff(dist, axis=1) > 0).all()
    np.testing.assert_allclose(np.hypot(*(spots[index] - spots[:, None]).transpose(2, 0, 1)), dist)


def test_nearest_spots_where_a_group_has_none():
    """All locations of one section and all spots of another; and one location, or none."""
    spots = np.array([[0.0, 0.0], [1.0, 0.0]])
    for n in (0, 1, 3):
        groups = {"groups": np.full(n, 1), "spot_groups": np.full(2, 2)}
        for found in nearest_spots(np.zeros((n, 2)), spots, k=2, **groups):
            assert found.shape == (n, 2)
            assert not found.any()
        groups = {"groups": np.full(n, 1), "spot_groups": np.zeros(0, int)}
        assert not nearest_spots(np.zeros((n, 2)), spots[:0], k=2, **groups)[2].any()
    index, _, present = nearest_spots(spots[:1], spots, k=2, groups=np.array([2]), spot_groups=np.full(2, 2))
    assert (index.tolist(), present.tolist()) == ([[0, 1]], [[True, True]])


def test_nearest_spots_without_spots():
    index, dist, present = nearest_spots(np.zeros((3, 2)), np.zeros((0, 2)), k=4)
    assert index.shape == (3, 4)
    for found in (index, dist, present):
        assert not found.any()


# --------------------------------------------------------------------------------------------------------- mask


def test_in_mask():
    mask = np.zeros((3, 4), dtype=bool)
    mask[2, 1] = True  # x in [10, 20), y in [40, 60)
    inside = [[10, 40], [19.99, 59.99], [15, 50]]
    outside = [[9.99, 50], [20, 50], [15, 39.99], [15, 60], [-0.01, 50], [50, 20], [15, -5], [1e6, 1e6]]
    found = in_mask(np.array(inside + outside, dtype=float), mask, px_per_cell=(10.0, 20.0))
    assert found.tolist() == [True] * 3 + [False] * 8
    first = np.zeros((3, 4), dtype=bool)
    first[[0, 2], [0, 3]] = True
    assert in_mask(np.array([[0.0, 0.0], [9.99, 19.99], [39.99, 59.99]]), first, px_per_cell=(10.0, 20.0)).all()
    # a negative index would wrap around to the other side
    mask[:] = True
    assert not in_mask(np.array([[-0.5, 5.0], [5.0, -0.5], [40.0, 5.0]]), mask, px_per_cell=(10.0, 20.0)).any()


@properties
@given(st.floats(0.01, 100), st.floats(-180, 180), st.booleans())
def test_similarity_scale(scale, degrees, mirror):
    matrix = scale * turned(degrees) @ np.diag([1, -1 if mirror else 1])
    assert similarity_scale(matrix) == pytest.approx(scale)
    affine = np.eye(3)
    affine[:2, :2], affine[:2, 2] = matrix, [5e4, -3e3]
    assert similarity_scale(affine) == pytest.approx(scale)
    assert similarity_scale(matrix @ np.diag([1.0, 1.005])) == pytest.approx(scale, rel=0.005)
    assert similarity_scale(matrix @ np.diag([1.0, 1.03])) is None
    assert similarity_scale(matrix @ np.array([[1.0, 0.05], [0.0, 1.0]])) is None


@pytest.mark.parametrize("matrix", [np.zeros((2, 2)), np.diag([1.0, 0.0])])
def test_similarity_scale_of_a_flat_matrix(matrix):
    assert similarity_scale(matrix) is None


# ------------------------------------------------------------------------------------------------------- tissue


def disc(radius, *, tissue, glass, shape=(120, 150), noise=2, seed=0):
    """A round piece of tissue on glass, and where it is."""
    y, x = np.indices(shape)
    inside = np.hypot(x - 75, y - 60) < radius
    image = np.where(inside[..., None], tissue, glass) + np.random.default_rng(seed).normal(0, noise, (*shape, 3))
    return np.clip(image, 0, 255).astype(np.uint8), inside


def spots_in(mask, n=80, seed=0):
    row, col = np.nonzero(mask)
    take = np.random.default_rng(seed).choice(len(row), n)
    return np.column_stack([col[take], row[take]]) + 0.5


def test_optical_density_of_known_colours():
    """Light is divided by ten for each unit, from 256; what is below 8 in all colours was blacked out, not stained."""
    image = np.array([[[255, 127, 0], [7, 7, 7], [8, 7, 7], [0, 0, 0], [0, 0, 63]]], np.uint8)
    found = optical_density(image)[0]
    assert found.dtype == np.float32
    half = np.log10(2)
    np.testing.assert_allclose(found[0], [0, half, 8 * half], atol=1e-6)
    assert not found[[1, 3]].any()
    np.testing.assert_allclose(found[2], [np.log10(256 / 9), 5 * half, 5 * half], rtol=1e-6)
    np.testing.assert_allclose(found[4], [8 * half, 8 * half, 2 * half], rtol=1e-6)


@pytest.mark.parametrize("side", ["left", "right", "top", "bottom"])
def test_spots_beyond_the_thumbnail_are_of_the_pixel_next_to_them(side):
    """One dark line of pixels along one side, and only there spots: it is tissue, and nothing else is."""
    image, line = np.full((9, 12, 3), 240, np.uint8), np.zeros((9, 12), bool)
    line[{"left": np.s_[:, 0], "right": np.s_[:, 11], "top": np.s_[0], "bottom": np.s_[8]}[side]] = True
    image[line] = (150, 80, 140)
    at = {"left": [-1.5, 4], "right": [12.7, 4], "top": [5, -1.5], "bottom": [5, 9.7]}[side]
    for spots in ([at], [at, np.clip(at, 0, [11.9, 8.9])]):  # one spot counts, too
        mask, share = tissue_mask(image, np.array(spots, float), blur_cells=0)
        np.testing.assert_array_equal(mask, line)
        assert share == 1.0


def test_without_spots_the_threshold_is_otsus():
    image, truth = disc(45, tissue=(190, 120, 170), glass=(245, 245, 245))
    mask, share = tissue_mask(image, np.zeros((0, 2)), blur_cells=1.0)
    assert (mask == truth).mean() > 0.99
    assert np.isnan(share)


@pytest.mark.parametrize("glass", [(245, 245, 245), (225, 228, 222)], ids=["white", "grey"])
def test_tissue_of_known_outline(glass):
    image, truth = disc(45, tissue=(190, 120, 170), glass=glass)
    mask, share = tissue_mask(image, spots_in(truth), blur_cells=1.0)
    assert mask.shape == truth.shape
    assert (mask == truth).mean() > 0.99
    assert share == 1.0


def test_pale_tissue_keeps_its_spots():
    """A dark pen mark lifts Otsu's threshold above the tissue; the spots say that this is tissue."""
    image, truth = disc(45, tissue=(225, 200, 220), glass=(246, 246, 246))
    image[:, :12] = (20, 20, 60)
    spots = spots_in(truth)
    mask, share = tissue_mask(image, spots, blur_cells=1.0)
    assert share < 0.05  # what Otsu alone would have kept
    kept = mask[spots[:, 1].astype(int), spots[:, 0].astype(int)]
    assert kept.mean() >= 0.94
    off = ~truth
    off[:, :20] = False
    assert mask[off].mean() < 0.2


def test_inverted_image_keeps_its_spots():
    """Tissue brighter than the ground: the threshold from the image alone turns over."""
    image, truth = disc(45, tissue=(200, 190, 195), glass=(10, 10, 10))
    spots = spots_in(truth)
    mask, share = tissue_mask(image, spots, blur_cells=1.0)
    assert share < 0.1
    assert mask[spots[:, 1].astype(int), spots[:, 0].astype(int)].mean() >= 0.94


def test_blank_image_is_all_tissue():
    mask, share = tissue_mask(np.full((30, 40, 3), 255, np.uint8), np.array([[5.0, 5.0], [20.0, 10.0]]), blur_cells=1)
    assert mask.all()
    assert share == 1.0


def test_spots_at_the_border_of_the_thumbnail():
    """A spot on the last pixel of the image, x = width, does not fall out of the thumbnail."""
    image, truth = disc(200, tissue=(190, 120, 170), glass=(245, 245, 245))
    mask, _ = tissue_mask(image, np.array([[0.0, 0.0], [150.0, 120.0], [149.9, 119.9]]), blur_cells=1.0)
    assert mask.shape == truth.shape


def test_upright_is_one_way_of_eight():
    xy = np.random.default_rng(0).gamma(2.0, 1.0, (50, 2)) * [3, 1]
    wanted = upright(xy)
    assert np.ptp(wanted[:, 0]) > np.ptp(wanted[:, 1])
    assert ((wanted**3).sum(0) > 0).all()
    np.testing.assert_allclose(wanted, xy - xy.mean(0))
    for axes in ([0, 1], [1, 0]):
        for sign in ([1, 1], [1, -1], [-1, 1], [-1, -1]):
            np.testing.assert_allclose(upright(xy[:, axes] * sign + 7.0), wanted, atol=1e-12)


def test_upright_leaves_a_symmetric_section_as_it_is():
    xy = np.stack(np.meshgrid([-1.0, 0, 1], [-1.0, 0, 1]), -1).reshape(-1, 2)
    np.testing.assert_array_equal(upright(xy), xy)
