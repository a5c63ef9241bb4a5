"""Shares known in closed form, and shapely's own intersections as an oracle."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from shapely.affinity import rotate, scale
from tests import rounding

from histosge._geometry import Footprints, Grid, _areas, area_fractions, block_order, divide, padded, spot_by_bin

properties = settings(deadline=None, max_examples=40)
KINDS = ["disc", "square", "polygon"]


def star(rng, *, size, n=12, hole=False):
    """A star-shaped outline around 0, up to about ``size`` across, concave here and there."""
    angle = (np.arange(n) + 0.9 * rng.random(n)) * 2 * np.pi / n
    radius = size / 2 * rng.uniform(0.3, 1, n)
    spikes = np.column_stack([radius * np.cos(angle), radius * np.sin(angle)])
    holes = [0.2 * spikes[::-1]] if hole else None
    return shapely.Polygon(spikes, holes)


def lay(kind, *, n, seed, grid, largest=4.0):
    """Footprints of all sizes, from a hundredth of a cell to ``largest`` cells, somewhere inside the grid."""
    rng = np.random.default_rng(seed)
    size = grid.cell_px * largest * 10 ** rng.uniform(-2.5, 0, n)
    room = np.array([grid.n_cols, grid.n_rows]) * grid.cell_px - size[:, None]
    xy = np.array([grid.x0, grid.y0]) + size[:, None] / 2 + rng.random((n, 2)) * room
    if kind == "disc":
        return Footprints.discs(xy, diameter_px=size)
    if kind == "square":
        return Footprints.squares(xy, edge_px=size)
    stars = [star(rng, size=s, hole=bool(i % 2)) for i, s in enumerate(size)]
    return Footprints.of_polygons(
        [shapely.transform(p, lambda q, at=at: q + at) for p, at in zip(stars, xy, strict=True)]
    )


def outlines(footprints, *, quad_segs=256):
    """The footprints as shapely polygons; discs as inscribed polygons of ``4 * quad_segs`` corners."""
    if footprints.kind == "polygon":
        return footprints.polygons
    if footprints.kind == "square":
        return shapely.box(*footprints.bounds().T)
    return shapely.buffer(shapely.points(footprints.xy_px), footprints.size_px / 2, quad_segs=quad_segs)


def cells(grid):
    row, col = (a.ravel() for a in np.indices((grid.n_rows, grid.n_cols)))
    x, y = grid.x0 + col * grid.cell_px, grid.y0 + row * grid.cell_px
    return shapely.box(x, y, x + grid.cell_px, y + grid.cell_px)


def oracle(footprints, grid):
    shapes = outlines(footprints)
    overlap = shapely.area(shapely.intersection(shapes[:, None], cells(grid)[None]))
    return overlap / shapely.area(shapes)[:, None]


grids = st.builds(
    Grid,
    x0=st.floats(-1e4, 1e4),
    y0=st.floats(-1e4, 1e4),
    cell_px=st.floats(0.5, 60),
    n_rows=st.integers(5, 8),
    n_cols=st.integers(5, 8),
)
kinds = st.sampled_from(KINDS)
seeds = st.integers(0, 9999)
OFF = rounding.of_sum(16, 1.05e4 / (0.5 * 4 * 10**-2.5), dtype=np.float64)
"""How far a share may be off, 4e-9: a corner is known to the last digit of its coordinate, at most 1e4 px from zero, over
the size of the footprint, at least 0.006 px (``grids``, ``lay``), and a share is a sum over up to 16 corners."""


# --------------------------------------------------------------------------------------------- known by hand


def as_map(footprints, grid):
    return area_fractions(footprints, grid).toarray().reshape(-1, grid.n_rows, grid.n_cols)


@pytest.mark.parametrize(
    "footprint",
    [
        Footprints.discs([[20, 30]], diameter_px=13),
        Footprints.squares([[20, 30]], edge_px=13),
        Footprints.of_polygons([rotate(shapely.box(15, 25, 25, 35), 45)]),
    ],
    ids=KINDS,
)
def test_on_the_corner_of_four_cells_each_has_a_quarter(footprint):
    found = as_map(footprint, Grid(0, 0, 10, 5, 4))[0]
    wanted = np.zeros((5, 4))
    wanted[2:4, 1:3] = 0.25
    np.testing.assert_allclose(found, wanted, atol=1e-14)
    assert np.count_nonzero(found) == 4


@pytest.mark.parametrize("cell", [8.0, 0.1, 29.304, 1 / 3])
@pytest.mark.parametrize("kind", ["square", "polygon"])
def test_square_on_a_cell_is_that_cell_alone(kind, cell):
    row, col = np.divmod(np.arange(600), 30)
    xy = 1234.5 + (np.column_stack([col, row]) + 0.5) * cell
    squares = Footprints.squares(xy, edge_px=cell)
    if kind == "polygon":
        squares = Footprints.of_polygons(outlines(squares))
    found = area_fractions(squares, Grid(1234.5, 1234.5, cell, 20, 30))
    assert found.nnz == 600
    np.testing.assert_array_equal(found.indices, np.arange(600))
    np.testing.assert_array_equal(found.data, 1.0)
    assert found.dtype == np.float64


def test_on_the_corner_of_four_cells_however_small():
    """What crosses a line by a billionth of a cell crosses it by half of itself here."""
    found = as_map(Footprints.discs([[0, 0]], diameter_px=1e-9), Grid(-1, -1, 1, 2, 2))
    np.testing.assert_allclose(found, 0.25)


def test_square_over_parts_of_cells():
    # 20 px from x = 5 to 25 and from y = 2 to 22
    found = as_map(Footprints.squares([[15, 12]], edge_px=20), Grid(0, 0, 10, 3, 3))[0]
    np.testing.assert_allclose(found, np.outer([8, 10, 2], [5, 10, 5]) / 400, atol=1e-15)


def test_columns_are_x_and_rows_are_y():
    found = area_fractions(Footprints.discs([[25, 5]], diameter_px=4), Grid(0, 0, 10, 2, 4))
    assert found.indices.tolist() == [2]
    assert found.data.tolist() == [1.0]


def test_cell_inside_a_disc():
    found = as_map(Footprints.discs([[45, 45]], diameter_px=80), Grid(0, 0, 10, 9, 9))[0]
    assert found[4, 4] == pytest.approx(100 / (np.pi * 40**2), rel=1e-12)
    np.testing.assert_allclose(found, found.T, atol=1e-15)
    np.testing.assert_allclose(found, found[::-1], atol=1e-15)
    assert found[0, 0] == 0


@given(st.floats(-0.999, 0.999))
@properties
def test_disc_cut_by_a_line_is_a_circular_segment(distance):
    radius = 7.0
    found = as_map(Footprints.discs([[20 - distance * radius, 10]], diameter_px=2 * radius), Grid(0, -10, 20, 2, 2))[0]
    segment = (np.arccos(distance) - distance * np.sqrt(1 - distance**2)) / np.pi  # right of x = 20
    np.testing.assert_allclose(found.sum(axis=0), [1 - segment, segment], atol=1e-12)


def test_diamond_around_a_cell():
    diamond = shapely.Polygon([(25, 15), (35, 25), (25, 35), (15, 25)])
    found = as_map(Footprints.of_polygons([diamond]), Grid(0, 0, 10, 5, 5))[0]
    wanted = np.zeros((5, 5))
    wanted[2, 2] = 0.5
    wanted[[1, 2, 2, 3], [2, 1, 3, 2]] = 0.125
    np.testing.assert_allclose(found, wanted, atol=1e-14)


def test_holes_and_islands():
    ring = shapely.box(5, 5, 35, 35).difference(shapely.box(10, 10, 30, 30))
    two = shapely.MultiPolygon([shapely.box(0, 0, 10, 10), ring.intersection(shapely.box(20, 0, 40, 40))])
    grid = Grid(0, 0, 10, 4, 4)
    found = as_map(Footprints.of_polygons([ring, two]), grid)
    side = np.array([5, 10, 10, 5])
    hollow = np.outer(side, side) - np.outer([0, 10, 10, 0], [0, 10, 10, 0])
    np.testing.assert_allclose(found[0], hollow / hollow.sum(), atol=1e-15)
    island = np.where(np.arange(4) >= 2, hollow, 0)
    island[0, 0] = 100
    np.testing.assert_allclose(found[1], island / island.sum(), atol=1e-15)


def test_direction_start_and_doubled_corners_of_an_outline_do_not_matter():
    ring = star(np.random.default_rng(3), size=40, hole=True)
    corners = np.array(ring.exterior.coords)[:-1]
    holes = [np.array(hole.coords) for hole in ring.interiors]
    doubled = np.repeat(np.roll(corners, 5, axis=0), 2, axis=0)
    same = [
        ring,
        shapely.Polygon(corners[::-1], holes),
        shapely.Polygon(doubled, [hole[::-1] for hole in holes]),
        shapely.MultiPolygon([ring]),
    ]
    found = area_fractions(Footprints.of_polygons(same), Grid(-24.7, -25.1, 5, 10, 10)).toarray()
    np.testing.assert_allclose(found, found[[0]].repeat(4, axis=0), atol=1e-14)


# ------------------------------------------------------------------------------------------------- properties


@given(kind=kinds, grid=grids, seed=seeds)
@properties
def test_agrees_with_shapely(kind, grid, seed):
    footprints = lay(kind, n=6, seed=seed, grid=grid)
    found = area_fractions(footprints, grid).toarray()
    # the inscribed polygon of 1024 corners lacks (2 pi^2 / 3) / 1024^2 of the disc
    np.testing.assert_allclose(found, oracle(footprints, grid), atol=1e-5 if kind == "disc" else OFF)


@given(
    seed=seeds, share=st.floats(0.05, 0.95), per_cell=st.sampled_from([1, 2, 5]), at=st.sampled_from([0.0, 0.1, 4321.7])
)
@properties
def test_outlines_along_the_lines_of_the_grid(seed, share, per_cell, at):
    """Pieces of a chequered board, with holes and islands: most edges and corners lie on the lines themselves."""
    board = np.random.default_rng(seed).random((6 * per_cell, 4 * per_cell)) < share
    board[0, 0] = True
    y, x = np.nonzero(board)
    board_at = at + np.column_stack([x, y]) * (10 / per_cell)
    pieces = shapely.union_all(shapely.box(*board_at.T, *(board_at + 10 / per_cell).T), grid_size=0.1)
    found = as_map(Footprints.of_polygons([pieces]), Grid(at, at, 10, 6, 4))[0]
    wanted = board.reshape(6, per_cell, 4, per_cell).sum(axis=(1, 3)) / board.sum()
    np.testing.assert_allclose(found, wanted, atol=OFF)


@given(kind=kinds, grid=grids, seed=seeds)
@properties
def test_rows_sum_to_one(kind, grid, seed):
    footprints = lay(kind, n=20, seed=seed, grid=grid)
    found = area_fractions(footprints, grid)
    assert found.shape == (20, grid.n_rows * grid.n_cols)
    assert found.has_canonical_format
    assert found.data.min() > 0
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=0, atol=rounding.of_sum(found.shape[1], dtype=np.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_sum_to_one_before_they_are_made_to(kind):
    grid = Grid(0, 0, 7.3, 40, 50)
    footprints = lay(kind, n=500, seed=1, grid=grid, largest=8)
    first, count = _areas._cells_around(footprints, grid)
    pairs = _areas._Pairs.lay(first, count, grid)
    share = _areas._SHARES[kind](footprints, pairs)
    assert share.min() > -1e-12
    size_cells = footprints.size_px / grid.cell_px
    # a footprint of a hundredth of a cell has that much fewer digits for its size than for its place
    off = np.abs(np.bincount(pairs.own, share) - 1) * np.minimum(size_cells, 1)
    assert off.max() < 1e-12


@given(kind=kinds, grid=grids, seed=seeds)
@properties
def test_a_finer_grid_adds_up_to_the_coarser(kind, grid, seed):
    footprints = lay(kind, n=10, seed=seed, grid=grid)
    fine = Grid(grid.x0, grid.y0, grid.cell_px / 3, 3 * grid.n_rows, 3 * grid.n_cols)
    parts = area_fractions(footprints, fine).toarray().reshape(10, grid.n_rows, 3, grid.n_cols, 3)
    np.testing.assert_allclose(
        parts.sum(axis=(2, 4)).reshape(10, -1), area_fractions(footprints, grid).toarray(), atol=OFF
    )


@given(kind=kinds, grid=grids, seed=seeds, by=st.tuples(st.integers(-9, 9), st.integers(-9, 9)))
@properties
def test_moving_footprints_by_whole_cells_moves_their_shares(kind, grid, seed, by):
    footprints = lay(kind, n=5, seed=seed, grid=grid)
    step = np.array(by) * grid.cell_px
    moved = shapely.transform(footprints.polygons, lambda q: q + step) if kind == "polygon" else None
    moved = Footprints(footprints.xy_px + step, kind, footprints.size_px, moved)
    wide = Grid(
        grid.x0 - 9 * grid.cell_px, grid.y0 - 9 * grid.cell_px, grid.cell_px, grid.n_rows + 18, grid.n_cols + 18
    )
    before, after = as_map(footprints, wide), as_map(moved, wide)
    np.testing.assert_allclose(after, np.roll(before, (by[1], by[0]), axis=(1, 2)), atol=OFF)


@given(kind=kinds, grid=grids, seed=seeds, factor=st.floats(0.05, 20))
@properties
def test_scaling_footprints_and_grid_changes_nothing(kind, grid, seed, factor):
    footprints = lay(kind, n=5, seed=seed, grid=grid)
    scaled = Grid(grid.x0 * factor, grid.y0 * factor, grid.cell_px * factor, grid.n_rows, grid.n_cols)
    found = area_fractions(footprints.scaled(factor), scaled).toarray()
    np.testing.assert_allclose(found, area_fractions(footprints, grid).toarray(), atol=OFF)


@given(kind=kinds, grid=grids, seed=seeds)
@properties
def test_centre_of_mass_of_shares_is_near_the_centre(kind, grid, seed):
    footprints = lay(kind, n=10, seed=seed, grid=grid, largest=5)
    at = shapely.get_coordinates(shapely.centroid(cells(grid)))
    off = np.hypot(*(area_fractions(footprints, grid) @ at - footprints.xy_px).T)
    assert off.max() <= grid.cell_px / np.sqrt(2)


@pytest.mark.parametrize("turn", [0.0, 0.3, -2.0, np.pi / 2])
def test_turned_squares_are_the_polygons_of_their_corners(turn):
    """Sizes and centres stay; shapely's rotation says where the corners are."""
    xy, edge = np.array([[30.0, 40.0], [55.5, 20.25]]), np.array([8.0, 3.0])
    turned = Footprints.squares(xy, edge_px=edge, turn=turn)
    upright = shapely.box(*np.column_stack([xy - edge[:, None] / 2, xy + edge[:, None] / 2]).T)
    wanted = Footprints.of_polygons([rotate(square, turn, use_radians=True) for square in upright])
    np.testing.assert_allclose(turned.bounds(), wanted.bounds(), atol=OFF)
    np.testing.assert_allclose(turned.extent, shapely.total_bounds(wanted.polygons), atol=OFF)
    made = turned.as_polygons()
    np.testing.assert_allclose(shapely.area(shapely.symmetric_difference(made.polygons, wanted.polygons)), 0, atol=OFF)
    np.testing.assert_allclose(made.size_px, wanted.size_px)
    grid = Grid(0, 0, 2.5, 40, 40)
    for some in (turned, turned.take([1, 0]).take([1, 0]), turned.scaled(2).scaled(0.5)):
        found = area_fractions(some, grid).toarray()
        np.testing.assert_allclose(found, area_fractions(wanted, grid).toarray(), atol=OFF)
    assert (turned.digest() == Footprints.squares(xy, edge_px=edge).digest()) == (turn == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_many_are_worked_on_in_parts_and_it_is_the_same(kind):
    """Enough footprints, each over many cells, for several parts."""
    grid = Grid(-3, 5, 4, 90, 80)
    footprints = lay(kind, n=2700, seed=2, grid=grid, largest=60)
    whole = area_fractions(footprints, grid)
    few = [area_fractions(footprints.take(slice(start, start + 100)), grid) for start in range(0, 2700, 100)]
    assert whole.nnz > 300_000
    apart = sparse.vstack(few).tocsr()
    np.testing.assert_array_equal(apart.indices, whole.indices)
    np.testing.assert_array_equal(apart.indptr, whole.indptr)
    np.testing.assert_allclose(apart.data, whole.data, rtol=1e-9)


@pytest.mark.parametrize(
    "none",
    [Footprints.discs(np.zeros((0, 2)), diameter_px=3), Footprints.of_polygons([])],
    ids=["disc", "polygon"],
)
def test_no_footprints(none):
    assert len(none) == 0
    assert none.bounds().shape == (0, 4)
    assert area_fractions(none, Grid(0, 0, 1, 3, 4)).shape == (0, 12)


def test_a_grid_of_more_cells_than_int32_counts():
    found = area_fractions(Footprints.discs([[9e4, 8e4]], diameter_px=2), Grid(0, 0, 1, 100_000, 100_000))
    assert found.indices.tolist() == [r * 100_000 + c for r in (79_999, 80_000) for c in (89_999, 90_000)]
    np.testing.assert_allclose(found.data, 0.25)


# ------------------------------------------------------------------------------------------------- footprints


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_take_and_scaled(kind):
    grid = Grid(0, 0, 10, 9, 9)
    footprints = lay(kind, n=9, seed=5, grid=grid)
    x0, y0, x1, y1 = footprints.bounds().T
    np.testing.assert_allclose(footprints.bounds(), shapely.bounds(outlines(footprints)), atol=OFF)
    assert (x0 < x1).all()
    assert (y0 < y1).all()

    whole = area_fractions(footprints, grid).toarray()
    for rows in (np.array([4, 0, 4]), np.arange(9) % 2 == 0, slice(2, 5)):
        taken = footprints.take(rows)
        assert len(taken) == len(np.arange(9)[rows])
        np.testing.assert_array_equal(taken.xy_px, footprints.xy_px[rows])
        np.testing.assert_allclose(area_fractions(taken, grid).toarray(), whole[rows], atol=1e-12)

    twice = footprints.scaled(2.0)
    np.testing.assert_allclose(twice.bounds(), 2 * footprints.bounds(), atol=1e-12)
    np.testing.assert_allclose(twice.size_px, 2 * footprints.size_px)
    np.testing.assert_allclose(twice.xy_px, 2 * footprints.xy_px)
    assert twice.kind == kind


def test_polygons_know_their_centroid_and_size():
    square, bow = shapely.box(10, 20, 14, 24), shapely.MultiPolygon([shapely.box(0, 0, 1, 1), shapely.box(3, 0, 4, 1)])
    found = Footprints.of_polygons([square, bow])
    np.testing.assert_allclose(found.xy_px, [[12, 22], [2, 0.5]])
    np.testing.assert_allclose(np.pi * (found.size_px / 2) ** 2, [16, 2])
    assert found.kind == "polygon"


def test_one_size_or_one_each():
    xy = [[10.0, 10.0], [20.0, 10.0]]
    np.testing.assert_array_equal(Footprints.discs(xy, diameter_px=3).size_px, [3, 3])
    np.testing.assert_array_equal(Footprints.squares(xy, edge_px=[3, 4]).size_px, [3, 4])


@pytest.mark.parametrize("kind", KINDS)
def test_digests_differ_wherever_areas_do(kind):
    def made(*, at=3.0, size=2.0, tilt=0.0, reverse=False):
        xy = np.array([[0.0, 0.0], [at, 7.0]])[:: -1 if reverse else 1]
        if kind == "disc":
            return Footprints.discs(xy, diameter_px=size)
        if kind == "square":
            return Footprints.squares(xy, edge_px=size, turn=tilt)
        edge = size * np.array([1 + tilt, 1 / (1 + tilt)])  # of the same area and centre
        return Footprints.of_polygons(shapely.box(*np.hstack([xy - edge / 2, xy + edge / 2]).T))

    other = [made(), made(at=3.0000001), made(size=2.0000001), made(reverse=True)]
    other += [] if kind == "disc" else [made(tilt=0.1)]
    assert len({footprints.digest() for footprints in other}) == len(other)
    assert made().digest() == made().digest()
    strided = replace(made(), xy_px=np.repeat(made().xy_px, 2, axis=0)[::2])
    assert strided.digest() == made().digest()
    assert Footprints.discs([[1, 1]], diameter_px=2).digest() != Footprints.squares([[1, 1]], edge_px=2).digest()


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(("n", "rows"), [(1, "0"), (5, "0, 1, 2, 3, 4"), (6, "0, 1, 2, 3, 4, ...")])
def test_the_first_five_are_named(n, rows):
    with pytest.raises(ValueError, match=rf"^{n} of {n} footprints \(rows {re.escape(rows)}\) have no area"):
        Footprints.discs(np.zeros((n, 2)), diameter_px=0)


def test_outside_the_grid_is_an_error_that_names_a_grid_to_hold_all():
    discs = Footprints.discs([[10, 10], [1, 10], [33, 95], [20, 20]], diameter_px=6)
    with pytest.raises(
        ValueError, match=r"2 of 4 footprints \(rows 1, 2\) reach outside the grid .*lay a larger"
    ) as told:
        area_fractions(discs, Grid(0, 0, 5, 8, 7))
    x0, y0, n_rows, n_cols = re.search(
        r"one; x0=(\S+), y0=(\S+), n_rows=(\d+), n_cols=(\d+) would", str(told.value)
    ).groups()
    larger = Grid(float(x0), float(y0), 5, int(n_rows), int(n_cols))
    assert larger == Grid(-5, 0, 5, 20, 9)
    np.testing.assert_allclose(area_fractions(discs, larger).sum(axis=1), 1)


def test_touching_the_edge_of_the_grid_is_inside():
    grid = Grid(0.3, 0.1, 0.7, 3, 3)
    all_of_it = Footprints.squares([[0.3 + 1.05, 0.1 + 1.05]], edge_px=3 * 0.7)
    np.testing.assert_allclose(area_fractions(all_of_it, grid).toarray(), 1 / 9)
    np.testing.assert_allclose(area_fractions(Footprints.of_polygons(outlines(all_of_it)), grid).toarray(), 1 / 9)


@pytest.mark.parametrize("make", [Footprints.discs, Footprints.squares])
@pytest.mark.parametrize(
    ("xy", "size", "message"),
    [
        (
            [[0, 0], [np.nan, 1], [1, np.inf]],
            1,
            r"2 of 3 footprints \(rows 1, 2\) have a centre or size that is not fin",
        ),
        ([[0, 0], [1, 1]], [np.inf, 1], r"1 of 2 footprints \(rows 0\) have a centre or size that is not finite"),
        ([[0, 0], [1, 1]], [1, 0], r"1 of 2 footprints \(rows 1\) have no area: give every footprint a size above 0"),
        (np.zeros((9, 2)), -1, r"9 of 9 footprints \(rows 0, 1, 2, 3, 4, ...\) have no area"),
        ([[0, 0, 0]], 1, r"xy_px has shape \(1, 3\): 1 footprints of kind '\w+' need \(1, 2\)"),
        ([[0, 0]], [1, 2], r"size_px has shape \(2,\): 1 footprints of kind '\w+' need \(1,\)"),
    ],
)
def test_unsound_discs_and_squares(make, xy, size, message):
    keyword = "diameter_px" if make == Footprints.discs else "edge_px"
    with pytest.raises(ValueError, match=message):
        make(xy, **{keyword: size})


BOW = shapely.Polygon([(0, 0), (3, 2), (3, 0), (0, 1)])


@pytest.mark.parametrize(
    ("polygon", "message"),
    [
        (BOW, r"1 of 2 footprints \(rows 1\) are not valid polygons.*Self-intersection.*make_valid"),
        (scale(BOW, 0.01, 0.01), r"1 of 2 footprints \(rows 1\) are not valid polygons"),
        (shapely.Polygon(), r"1 of 2 footprints \(rows 1\) have no area"),
        (shapely.Polygon([(0, 0), (1, 1), (2, 2)]), r"1 of 2 footprints \(rows 1\) have no area"),
        (
            shapely.transform(
                shapely.box(0, 0, 1, 1), lambda q: np.where(q.sum(axis=1, keepdims=True) == 2, np.nan, q)
            ),
            r"1 of 2 footprints \(rows 1\) have a centre or size that is not",
        ),
        (shapely.Point(0, 0), r"1 of 2 footprints \(rows 1\) are no Polygon or MultiPolygon but Point: leave them out"),
        (None, r"1 of 2 footprints \(rows 1\) are no Polygon or MultiPolygon but None: leave them out"),
    ],
)
def test_unsound_polygons(polygon, message):
    with pytest.raises(ValueError, match=message):
        Footprints.of_polygons([shapely.box(0, 0, 1, 1), polygon])


def test_polygons_must_be_given():
    with pytest.raises(ValueError, match=r"polygons has shape \(\): 1 footprints of kind 'polygon' need \(1,\)"):
        Footprints(np.zeros((1, 2)), "polygon", np.ones(1))


@pytest.mark.parametrize("factor", [0, -1.0, np.nan, np.inf])
def test_factor_must_be_positive(factor):
    with pytest.raises(ValueError, match=r"factor=.*: give a finite number above 0"):
        Footprints.discs([[0, 0]], diameter_px=1).scaled(factor)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"cell_px": 0}, "x0 and y0 must be finite, cell_px finite and above 0"),
        ({"x0": np.nan}, "x0 and y0 must be finite"),
        ({"n_rows": 0}, "at least one row and one column"),
        ({"n_cols": 0}, "at least one row and one column"),
    ],
)
def test_grid_must_be_one(grid, message):
    with pytest.raises(ValueError, match=message):
        Grid(**{"x0": 0, "y0": 0, "cell_px": 1, "n_rows": 2, "n_cols": 2, **grid})


def test_footprint_smaller_than_the_last_digit_of_its_place():
    far = Footprints.discs([[0.5, 0.5], [1e9, 1e9], [1e9, 1e9]], diameter_px=[1, 1e-9, 1e-9])
    with pytest.raises(ValueError, match=r"shares of footprint 1 sum to .* instead of 1: it is too small for its dist"):
        area_fractions(far, Grid(0, 0, 1e6, 1001, 1001))


# ------------------------------------------------------------------------------------------------ spot_by_bin


def lay_bins(*, n_rows, n_cols, bin_px, corner, first):
    """A full grid of bins, the first at row and column ``first`` with its corner at ``corner``, in a random order."""
    row, col = (a.ravel() for a in np.indices((n_rows, n_cols)))
    xy = np.array(corner) + (np.column_stack([col, row]) + 0.5) * bin_px
    order = np.random.default_rng(0).permutation(len(xy))
    return {"bins_xy_px": xy[order], "bin_px": bin_px, "row": row[order] + first, "col": col[order] + first}, order


@given(kind=kinds, bin_px=st.floats(0.3, 30), first=st.integers(-50, 5000), seed=seeds)
@properties
def test_bins_under_spots_are_the_cells_under_spots(kind, bin_px, first, seed):
    bins, order = lay_bins(n_rows=7, n_cols=9, bin_px=bin_px, corner=(411.3, -70.9), first=first)
    grid = Grid(411.3, -70.9, bin_px, 7, 9)
    spots = lay(kind, n=8, seed=seed, grid=grid)
    found = spot_by_bin(spots, **bins)
    assert found.shape == (8, 63)
    assert found.has_canonical_format
    np.testing.assert_allclose(found.toarray(), area_fractions(spots, grid).toarray()[:, order], atol=OFF)


def test_missing_bins_leave_their_share_to_the_others():
    bins, _ = lay_bins(n_rows=3, n_cols=3, bin_px=10, corner=(0, 0), first=4)
    there = ~((bins["row"] == 4) & (bins["col"] < 6)) & (bins["row"] < 6)
    kept = {key: value if key == "bin_px" else value[there] for key, value in bins.items()}
    # from x = 5 to 15 and from y = 6 to 16; then outside all bins but one corner; then on missing ones; then far off
    spots = Footprints.squares([[10, 11], [33, -3], [7, 25], [-500, 900]], edge_px=10)
    found = spot_by_bin(spots, **kept)
    place = {(r, c): i for i, (r, c) in enumerate(zip(kept["row"], kept["col"], strict=True))}
    wanted = np.zeros((4, there.sum()))
    wanted[0, [place[5, 4], place[5, 5]]] = 0.5  # 0.2 each in row 4, which is missing, 0.3 each in row 5
    wanted[1, place[4, 6]] = 1
    np.testing.assert_allclose(found.toarray(), wanted, atol=1e-14)
    assert np.diff(found.indptr).tolist() == [2, 1, 0, 0]


def test_no_bins_or_no_spots():
    bins, _ = lay_bins(n_rows=2, n_cols=2, bin_px=10, corner=(0, 0), first=0)
    none = {key: value if key == "bin_px" else value[:0] for key, value in bins.items()}
    spots = Footprints.discs([[10, 10]], diameter_px=5)
    assert spot_by_bin(spots, **none).shape == (1, 0)
    assert spot_by_bin(spots.take(slice(0, 0)), **bins).shape == (0, 4)


def test_bins_that_are_not_on_their_grid():
    bins, _ = lay_bins(n_rows=3, n_cols=4, bin_px=10, corner=(0, 0), first=0)
    spots = Footprints.discs([[10, 10]], diameter_px=5)
    with pytest.raises(ValueError, match=r"do not agree: .*of 12 bins .*lie up to .* bins from their row and column"):
        spot_by_bin(spots, **{**bins, "row": bins["col"], "col": bins["row"]})
    with pytest.raises(ValueError, match=r"row and col: 1 bins have the row and column of another"):
        spot_by_bin(spots, **{k: v if k == "bin_px" else np.concatenate([v, v[:1]]) for k, v in bins.items()})
    with pytest.raises(ValueError, match=r"bin_px=0: give a finite number of pixels above 0"):
        spot_by_bin(spots, **{**bins, "bin_px": 0})


# ----------------------------------------------------------------------------------------------------- divide


@given(kind=kinds, edge=st.floats(0.5, 30), seed=seeds, at=st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)))
@properties
def test_footprints_are_cut_into_the_squares_of_one_grid(kind, edge, seed, at):
    footprints = lay(kind, n=7, seed=seed, grid=Grid(*at, edge, 6, 5))
    xy, index, weight = divide(footprints, edge_px=edge)
    assert (index.dtype, index.shape) == (np.int64, weight.shape)
    whole = xy / edge - 0.5
    # a product, a sum and a quotient of numbers up to the largest index
    np.testing.assert_allclose(whole, np.rint(whole), atol=rounding.of_sum(3, np.abs(whole).max() + 1, dtype=float))
    assert len(np.unique(np.rint(whole), axis=0)) == len(xy)  # each square once,
    assert np.unique(index[weight > 0]).tolist() == list(range(len(xy)))  # and none that no footprint reaches
    np.testing.assert_allclose(weight.sum(axis=1), 1)
    assert (weight >= 0).all()
    squares = shapely.box(*np.hstack([xy - edge / 2, xy + edge / 2]).T)
    areas = outlines(footprints)
    wanted = shapely.area(shapely.intersection(areas[:, None], squares[index])) / shapely.area(areas)[:, None]
    # the oracle's discs are polygons of 1024 corners, 6e-6 smaller
    np.testing.assert_allclose(weight[weight > 0], wanted[weight > 0], atol=2e-5 if kind == "disc" else OFF)
    assert (weight > 0).any(axis=0).all()  # no more columns than the widest footprint needs


@pytest.mark.parametrize("kind", ["square", "polygon"])
def test_a_footprint_that_is_a_square_of_the_grid_is_cut_once(kind):
    edge = 0.1  # three of it are not 0.3
    squares = Footprints.squares((np.array([[0, 0], [3, 7], [-4, 2]]) + 0.5) * edge, edge_px=edge)
    xy, index, weight = divide(squares if kind == "square" else squares.as_polygons(), edge_px=edge)
    assert weight.tolist() == [[1.0]] * 3
    np.testing.assert_allclose(xy[index[:, 0]], squares.xy_px)


def test_rows_of_unequal_length_are_padded():
    index, weight = padded(sparse.csr_matrix([[0, 0, 0.5, 0.5], [0, 0, 0, 0], [0, 1, 0, 0], [0.2, 0.3, 0, 0.5]]))
    assert index.tolist() == [[2, 3, 0], [0, 0, 0], [1, 0, 0], [0, 1, 3]]
    assert weight.tolist() == [[0.5, 0.5, 0], [0, 0, 0], [1, 0, 0], [0.2, 0.3, 0.5]]
    for nothing in padded(sparse.csr_matrix((0, 4))):
        assert nothing.shape == (0, 0)


# ------------------------------------------------------------------------------------------------ block_order


def runs(labels):
    """How many times the label changes, and how many labels there are."""
    return 1 + int((np.diff(labels, axis=0) != 0).any(axis=1).sum()), len(np.unique(labels, axis=0))


@given(n=st.integers(1, 300), block=st.floats(1, 500), seed=seeds)
@properties
def test_order_is_a_permutation_in_blocks(n, block, seed):
    xy = np.random.default_rng(seed).uniform(-300, 300, (n, 2))
    order = block_order(xy, block_px=block)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(n))
    blocks = np.floor((xy - xy.min(axis=0)) / block)[order]
    n_runs, n_blocks = runs(blocks)
    assert n_runs == n_blocks
    inside = (np.diff(blocks, axis=0) == 0).all(axis=1)
    assert (np.diff(xy[order, 1])[inside] >= 0).all()
    np.testing.assert_array_equal(block_order(xy, block_px=block), order)


@pytest.mark.parametrize("bin_px", [8.0, 0.1, 1 / 3])
def test_order_of_a_full_grid(bin_px):
    row, col = (a.ravel() for a in np.indices((12, 20)))
    shuffled = np.random.default_rng(0).permutation(240)
    row, col = row[shuffled], col[shuffled]
    xy = 17.3 + np.column_stack([col + 0.5, row + 0.5]) * bin_px
    order = block_order(xy, block_px=4 * bin_px)
    blocks = np.column_stack([row // 4, col // 4])[order].reshape(15, 16, 2)
    assert (blocks == blocks[:, :1]).all()  # 16 bins to each block: none torn apart
    step = np.abs(np.diff(blocks[:, 0], axis=0)).sum(axis=1)
    assert step.tolist() == [1] * 14  # and the next one always touches
    first = np.column_stack([row, col])[order][:16]
    np.testing.assert_array_equal(first, np.column_stack(np.divmod(np.arange(16), 4)))


def test_runs_of_the_order_are_compact():
    xy = np.random.default_rng(0).random((10_000, 2)) * 1000
    parts = xy[block_order(xy, block_px=100)].reshape(100, 100, 2)
    # a run of a hundred of a hundred blocks' places lies in two blocks, or three
    assert np.ptp(parts, axis=1).max() <= 300
    assert np.median(np.ptp(parts, axis=1).prod(axis=1)) <= 2 * 100**2


def test_order_is_stable_and_goes_with_the_places():
    xy = np.repeat([[5.0, 5.0], [1.0, 2.0], [5.0, 5.0]], 3, axis=0)
    assert block_order(xy, block_px=2).tolist() == [3, 4, 5, 0, 1, 2, 6, 7, 8]
    many = np.random.default_rng(1).integers(0, 64, (200, 2)).astype(float)
    np.testing.assert_array_equal(block_order(many + [512, -64], block_px=8), block_order(many, block_px=8))
    assert block_order(np.zeros((0, 2)), block_px=2).tolist() == []


def test_order_needs_a_block_and_places():
    for wrong in (0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match=rf"block_px={wrong}: give a finite number of pixels above 0"):
            block_order(np.zeros((1, 2)), block_px=wrong)
    with pytest.raises(ValueError, match=r"xy_px: 1 of 2 positions \(rows 1\) are not finite: leave them out"):
        block_order(np.array([[0, 0], [np.nan, 0]]), block_px=1)
