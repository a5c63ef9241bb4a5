"""µm per pixel of sections that others bring: from what their files say, right or refused, never by chance."""

from __future__ import annotations

import anndata as ad
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
from scipy import sparse
from spatialdata import SpatialData, to_circles
from spatialdata.models import Image2DModel, Labels2DModel, PointsModel, ShapesModel, TableModel
from spatialdata.transformations import Affine, Identity, Scale, Translation
from tests.listed import read_as_listed

import histosge as sge
from histosge._geometry import NotALattice, estimate_lattice, lattice_of_array, occupied_share
from histosge._section import read_section

PITCH_PX = 20.0


def hexagonal(n_rows=8, n_cols=9, *, pitch=PITCH_PX):
    """Centres, and row and column counted in half steps as Space Ranger does."""
    row, i = (a.ravel() for a in np.indices((n_rows, n_cols)))
    col = 2 * i + row % 2
    return np.column_stack([col / 2, row * np.sqrt(0.75)]) * pitch + 30, row, col


def square(n_rows=8, n_cols=9, *, pitch=PITCH_PX):
    row, col = (a.ravel() for a in np.indices((n_rows, n_cols)))
    return np.column_stack([col, row]) * pitch + 30.0, row, col


def table_of(xy, names, *, obs=None, uns=None, key="spots"):
    random = np.random.default_rng(0)
    frame = pd.DataFrame({"region": pd.Categorical([key] * len(xy)), "instance": np.arange(len(xy)), **(obs or {})})
    frame.index = pd.Index([str(name) for name in names])
    counts = sparse.csr_matrix(random.poisson(3.0, (len(xy), 6)).astype(np.float32) + 1)
    table = ad.AnnData(counts, obs=frame, uns=dict(uns or {}))
    table.obsm["spatial"] = np.asarray(xy, float)
    return table


def section(
    xy, names=None, *, obs=None, uns=None, key="spots", drawn_px=0.55 * PITCH_PX, attrs=None, places=None, side=900
):
    names = [f"spot{i}" for i in range(len(xy))] if names is None else names
    table = table_of(xy, names, obs=obs, uns=uns, key=key)
    places = np.asarray(xy if places is None else places, float)
    circles = gpd.GeoDataFrame({"radius": np.full(len(places), drawn_px / 2)}, geometry=shapely.points(places))
    pixels = np.broadcast_to(np.array([220, 170, 200], np.uint8)[:, None, None], (3, side, side))
    return SpatialData(
        images={"he": Image2DModel.parse(pixels.copy(), dims=("c", "y", "x"), c_coords=["r", "g", "b"])},
        shapes={key: ShapesModel.parse(circles)},
        tables={"table": TableModel.parse(table, region=key, region_key="region", instance_key="instance")},
        attrs=attrs or {},
    )


def barcodes(n):
    """Sixteen bases each, all different."""
    return ["".join("ACGT"[(i >> (2 * k)) % 4] for k in range(16)) for i in range(n)]


def bin_names(row, col, *, um=8, before="", after="-1"):
    return [f"{before}s_{um:03d}um_{r:05d}_{c:05d}{after}" for r, c in zip(row, col, strict=True)]


def warnings_in(log):
    return [r.getMessage() for r in log.records if r.levelname == "WARNING"]


# ---------------------------------------------------------------------------------------- squares with gaps


@pytest.mark.parametrize("n", [50, 30])
def test_square_spots_with_gaps_are_not_taken_for_st(n):
    """DBiT-seq has 10 to 50 µm squares at twice that pitch; so have bins with some left out."""
    xy, _, _ = square(n, n, pitch=10.0)
    sdata = section(xy, drawn_px=5.0)
    with pytest.raises(
        ValueError, match=r"square lattice of 10\.0 px with gaps, and no name.*DBiT-seq.*Pass mpp=: .* divided by 10 px"
    ):
        read_section(sdata)
    assert read_section(sdata, mpp=5.0).pitch_um == pytest.approx(50.0)  # mpp= is enough


def test_names_of_a_larger_grid_are_not_those_of_st():
    xy, row, col = square(50, 50, pitch=10.0)
    sdata = section(xy, [f"{c + 1}x{r + 1}" for r, c in zip(row, col, strict=True)], drawn_px=5.0)
    with pytest.raises(ValueError, match="no name or scale factor says of which technology"):
        read_section(sdata)


@pytest.mark.parametrize(
    ("name", "doubtful"), [("{c}x{r}", True), ("A1_{c}x{r}", True), ("{c}.013x{r}.98", False), ("{c}x{r}_2", True)]
)
def test_names_of_an_st_array(log, name, doubtful):
    """Whole numbers are of DBiT-seq as well: said, since nothing else can tell."""
    xy, row, col = square()
    section_ = read_section(section(xy, [name.format(c=c + 2, r=r + 4) for r, c in zip(row, col, strict=True)]))
    assert (section_.technology, section_.pitch_um, section_.mpp) == ("st", 200.0, pytest.approx(200 / PITCH_PX))
    said = [m for m in warnings_in(log) if "taken as Spatial Transcriptomics" in m and "DBiT-seq" in m]
    assert len(said) == doubtful


def test_a_reader_of_ours_says_what_it_read(log):
    xy, _, _ = square()
    assert read_section(section(xy, attrs={"histosge_reader": "st"})).technology == "st"
    assert not any("taken as" in m for m in warnings_in(log))


# ---------------------------------------------------------------------------------------- bins


@pytest.mark.parametrize(
    ("before", "after"), [("", "-1"), ("sampleA_", "-1"), ("P2-CRC-", "-1_3"), ("x:", ""), ("", "-1-batch0")]
)
@pytest.mark.parametrize("drawn", [1.0, 0.55])
def test_barcodes_of_bins_anywhere_in_a_name(before, after, drawn):
    xy, row, col = square()
    names = bin_names(row + 7, col + 3, before=before, after=after)
    found = read_section(section(xy, names, drawn_px=drawn * PITCH_PX))
    assert (found.technology, found.pitch_um, found.spot_um) == ("visium-hd", 8.0, 8.0)
    assert found.mpp == pytest.approx(8 / PITCH_PX)


def test_the_first_barcode_decides_nothing():
    xy, row, col = square()
    names = bin_names(row, col, um=16)
    names[0] = "renamed"
    assert read_section(section(xy, names)).pitch_um == 16


def test_barcodes_in_a_column(log):
    xy, row, col = square()
    found = read_section(section(xy, obs={"barcode_id": bin_names(row, col)}))
    assert (found.technology, found.pitch_um) == ("visium-hd", 8.0)


def test_every_second_bin_has_the_pitch_of_its_barcodes():
    xy, row, col = square(16, 16, pitch=10.0)
    keep = (row % 2 == 0) & (col % 2 == 0)
    names = np.array(bin_names(row, col))
    found = read_section(section(xy[keep], names[keep], drawn_px=10.0))
    assert found.mpp == pytest.approx(0.8)
    assert found.lattice.pitch_px == pytest.approx(10.0)


def test_bins_of_two_sizes():
    xy, row, col = square()
    names = bin_names(row, col)
    names[::2] = bin_names(row[::2], col[::2], um=16)
    with pytest.raises(ValueError, match=r"bins of \[8, 16\] µm .*Make a table of each size"):
        read_section(section(xy, names))


def test_scale_factors_of_bins():
    xy, _, _ = square()
    uns = {"spatial": {"s": {"scalefactors": {"bin_size_um": 16.0}}}}
    found = read_section(section(xy, uns=uns, drawn_px=PITCH_PX))
    assert (found.technology, found.mpp) == ("visium-hd", pytest.approx(16 / PITCH_PX))


def test_touching_bins_without_a_word(log):
    xy, _, _ = square()
    with pytest.raises(
        ValueError, match=r"touch each other on a square lattice.*no barcode, name or scale factor.*mpp="
    ):
        read_section(section(xy, drawn_px=PITCH_PX))


def test_contiguous_hexagons_are_not_visium():
    xy, _, _ = hexagonal()
    with pytest.raises(ValueError, match="touch each other on a hexagonal lattice.* spots of Visium do not.*mpp="):
        read_section(section(xy, drawn_px=PITCH_PX))


# ---------------------------------------------------------------------------------------- Visium


@pytest.mark.parametrize("name", ["{b}-1", "{b}-1_2", "S1_{b}-1", "{b}"])
def test_barcodes_of_visium(log, name):
    xy, _, _ = hexagonal()
    found = read_section(section(xy, [name.format(b=b) for b in barcodes(len(xy))]))
    assert (found.technology, found.mpp) == ("visium", pytest.approx(100 / PITCH_PX))
    assert warnings_in(log) == []


def test_hexagonal_spots_without_a_word_are_taken_for_visium_and_said(log):
    xy, row, col = hexagonal()
    assert read_section(section(xy)).technology == "visium"
    assert any("taken as visium, 100 µm apart" in m and "Pass mpp=" in m for m in warnings_in(log))
    log.clear()
    assert read_section(section(xy, obs={"array_row": row, "array_col": col})).technology == "visium"
    assert warnings_in(log) == []


def test_more_spots_than_any_visium_array():
    xy, _, _ = hexagonal(130, 130, pitch=4.0)
    with pytest.raises(ValueError, match=r"16900 spots, .* more than any Visium array has.*Pass mpp="):
        read_section(section(xy, drawn_px=2.0))


def test_places_on_the_array_are_no_pixels():
    xy, row, col = hexagonal()
    obs = {"array_row": row, "array_col": col}
    for places in (np.column_stack([col, row]), np.column_stack([row, col])):
        with pytest.raises(ValueError, match="are array_col and array_row, not pixels.*pxl_col_in_fullres"):
            read_section(section(xy, obs=obs, places=places, drawn_px=0.5))


def test_spots_of_an_st_array_a_pixel_apart():
    """Names and coordinates are the same numbers."""
    _, row, col = square()
    places = np.column_stack([col + 2.02, row + 3.98])
    sdata = section(places, [f"{x:.2f}x{y:.2f}" for x, y in places], drawn_px=0.5)
    with pytest.raises(
        ValueError, match=r"lie 1 px apart, which makes 200 µm per pixel.*rows and columns of the array.*mpp="
    ):
        read_section(sdata)


def visium_factors(**more):
    return {"spatial": {"s": {"scalefactors": {"spot_diameter_fullres": 0.65 * PITCH_PX, **more}}}}


@pytest.mark.parametrize("scale", [0.4, 0.05, 2.0])
def test_coordinates_in_pixels_of_another_image(scale):
    """The scale factors hold the size of a spot: coordinates of a thumbnail disagree with it."""
    xy, _, _ = hexagonal()
    names = [f"{b}-1" for b in barcodes(len(xy))]
    assert read_section(section(xy, names, uns=visium_factors())).mpp == pytest.approx(5.0)
    sdata = section(xy * scale, names, uns=visium_factors(), side=900)
    with pytest.raises(ValueError, match=r"spot of 'spots' is 13 px wide.*in pixels of another image.*or pass mpp="):
        read_section(sdata)
    assert read_section(sdata, mpp=5 / scale).pitch_um == pytest.approx(100)


def test_scale_factors_follow_the_image():
    """In a SpatialData the image may be the thumbnail, correctly placed: nothing to refuse."""
    xy, _, _ = hexagonal()
    sdata = section(xy, [f"{b}-1" for b in barcodes(len(xy))], uns=visium_factors(), side=400)
    small = Image2DModel.parse(np.full((3, 200, 200), 200, np.uint8), dims=("c", "y", "x"), c_coords=["r", "g", "b"])
    sdata.images["he"] = Image2DModel.parse(
        small.data,
        dims=("c", "y", "x"),
        c_coords=["r", "g", "b"],
        transformations={"global": Scale([2.0, 2.0], ("x", "y"))},
    )
    assert read_section(sdata).mpp == pytest.approx(10.0)


def test_stated_micrometres_per_pixel():
    xy, _, _ = square()
    uns = {"spatial": {"s": {"scalefactors": {"microns_per_pixel": 2.5}}}}
    found = read_section(section(xy, uns=uns))
    assert (found.mpp, found.pitch_um, found.mpp_source) == (2.5, pytest.approx(50.0), "stated by the file")
    _, row, col = square()
    with pytest.raises(
        ValueError, match=r"states 2\.5 µm per pixel, which makes the pitch of 'spots' 50 µm, but it is 8 µm"
    ):
        read_section(section(xy, bin_names(row, col), uns=uns))


def test_very_coarse_images_are_said(log):
    xy, _, _ = hexagonal(pitch=6.0)
    read_section(section(xy, [f"{b}-1" for b in barcodes(len(xy))], drawn_px=3.0))
    assert any("16.67 µm per pixel is coarser than any microscope image" in m for m in warnings_in(log))


# ---------------------------------------------------------------------------------------- parts of arrays


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("lay", [hexagonal, square])
def test_a_scattered_subset_has_the_pitch_of_its_array(lay, seed):
    xy, row, col = lay(30, 30)
    keep = np.random.default_rng(seed).random(len(xy)) < 0.06
    names = {hexagonal: "{b}-1", square: "{c}.02x{r}.97"}[lay]
    names = [names.format(b=b, r=r, c=c) for b, r, c in zip(barcodes(len(xy)), row, col, strict=True)]
    obs = {"array_row": row[keep], "array_col": col[keep]}
    found = read_section(section(xy[keep], np.array(names)[keep], obs=obs))
    assert found.lattice.pitch_px == pytest.approx(PITCH_PX)
    assert found.technology == {hexagonal: "visium", square: "st"}[lay]


@pytest.mark.parametrize("step", [(1, 2), (2, 1), (2, 2), (3, 1)])
def test_a_thinned_array(step):
    """Every second row is a lattice of its own, and not the array's."""
    xy, row, col = hexagonal(24, 24)
    keep = (row % step[0] == 0) & ((col // 2) % step[1] == 0)
    found = read_section(section(xy[keep], obs={"array_row": row[keep], "array_col": col[keep]}))
    assert found.lattice.kind == "hexagonal"
    assert found.lattice.pitch_px == pytest.approx(PITCH_PX)


def test_rows_and_columns_that_are_of_other_spots(log):
    """Rows and columns in another order do not fit the places: they are left alone."""
    xy, row, col = hexagonal()
    order = np.random.default_rng(0).permutation(len(xy))
    found = read_section(section(xy, obs={"array_row": row[order], "array_col": col[order]}))
    assert found.lattice.pitch_px == pytest.approx(PITCH_PX, rel=1e-6)


@pytest.mark.parametrize("lay", [hexagonal, square])
def test_sections_over_one_another_are_no_lattice(lay):
    """At any shift; but the middle of all squares, where two square arrays make one that nothing tells from a true one."""
    xy, _, _ = lay(20, 20, pitch=137.0)
    random = np.random.default_rng(0)
    unit = np.array([[1, 0], [0.5, np.sqrt(0.75)]]) if lay is hexagonal else np.eye(2)
    steps = [np.array([a, b]) / k for k in (2, 3, 4, 6) for a in range(k) for b in range(k) if a or b]
    shifts = [step @ unit * 137 for step in steps] + list(random.uniform(-137, 137, (100, 2)))
    for shift in shifts:
        rest = shift % 137 / 137
        if lay is square and np.abs(rest - 0.5).max() < 0.2:
            continue
        with pytest.raises(NotALattice):
            estimate_lattice(np.rint(np.vstack([xy, xy + shift])))


def test_small_pieces_far_apart_are_a_lattice():
    """Four cores of 19 spots on a whole array: few of its places, but with neighbours all around."""
    xy, _, _ = hexagonal(78, 64)
    corners = np.array([[9, 9], [9, 55], [70, 9], [70, 55]]) * [[np.sqrt(0.75), 1.0]] * PITCH_PX
    near = [np.hypot(*(xy - 30 - c[::-1]).T) < 2.3 * PITCH_PX for c in corners]
    found = estimate_lattice(xy[np.any(near, axis=0)])
    assert found.kind == "hexagonal"
    assert found.pitch_px == pytest.approx(PITCH_PX)
    assert occupied_share(xy[np.any(near, axis=0)], cell_px2=PITCH_PX**2 * np.sqrt(0.75)) < 0.05


def test_share_of_a_lattice_that_is_occupied():
    xy, _, _ = square(40, 40, pitch=1.0)
    assert occupied_share(xy, cell_px2=1.0) == pytest.approx(1.0, abs=0.06)  # the hull's border
    half = np.random.default_rng(0).random(len(xy)) < 0.5
    assert occupied_share(xy[half], cell_px2=1.0) == pytest.approx(half.mean(), abs=0.06)
    assert occupied_share(xy, cell_px2=0.01) == pytest.approx(0.01, abs=0.002)
    assert occupied_share(xy[:1], cell_px2=1.0) == 1.0
    line = np.column_stack([np.arange(50.0), np.zeros(50)])
    assert occupied_share(line, cell_px2=1.0) > 0.5


@pytest.mark.parametrize("angle", [0.0, 0.3, -2.0])
@pytest.mark.parametrize("mirrored", [False, True])
def test_the_lattice_of_rows_and_columns_is_exact(angle, mirrored):
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    for lay, kind in ((hexagonal, "hexagonal"), (square, "square")):
        xy, row, col = lay()
        xy = (xy * [-1, 1] if mirrored else xy) @ turn
        found = lattice_of_array(xy, row, col)
        assert found.kind == kind
        assert found.pitch_px == pytest.approx(PITCH_PX)
        # least squares in double precision, condition about 30: 1e-14 of the largest coordinate, with a wide margin
        np.testing.assert_allclose(found.origin + found.index @ found.basis, xy, atol=1e-9 * np.abs(xy).max())
        assert len(np.unique(found.index, axis=0)) == len(xy)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda xy, row, col: (xy * [1, 1.5], row, col), "neither hexagonal nor square"),
        (lambda xy, row, col: (xy @ [[1, 0.5], [0, 1]], row, col), "do not cross at right angles"),
        (lambda xy, row, col: (xy, row * 0, col), "a single line"),
        (lambda xy, row, col: (xy + np.random.default_rng(0).normal(0, 12, xy.shape), row, col), "pitches off"),
    ],
)
def test_rows_and_columns_of_no_lattice(change, why):
    with pytest.raises(NotALattice, match=why):
        lattice_of_array(*change(*square()))


def test_two_sections_in_one_element():
    xy, row, col = hexagonal()
    both = np.vstack([xy, xy + [300, 0]])
    obs = {"array_row": np.tile(row, 2), "array_col": np.tile(col, 2)}
    names = [f"{c + 1}x{r + 1}-{i}" for i in (0, 1) for r, c in zip(row, col, strict=True)]
    with pytest.raises(ValueError, match=r"50% of the 144 spots of 'spots' have a position on the array"):
        read_section(section(both, names))
    with pytest.raises(
        ValueError, match=r"50% of the 144 spots of 'spots' have a position on the array .* that another"
    ):
        read_section(section(both, obs=obs))


def test_columns_of_the_array_that_hold_nothing(log):
    xy, _, _ = hexagonal()
    assert read_section(section(xy, obs={"array_row": 0, "array_col": 0})).technology == "visium"


# ---------------------------------------------------------------------------------------- coordinate systems


def two_systems(sdata, off):
    from spatialdata.transformations import set_transformation

    for element in (sdata.images["he"], sdata.shapes["spots"]):
        set_transformation(element, Identity(), "aligned")
    set_transformation(sdata.shapes["spots"], off, "zoomed")
    set_transformation(sdata.images["he"], Identity(), "zoomed")
    return sdata


@pytest.mark.parametrize(
    "off", [Translation([30.0, 0.0], ("x", "y")), Affine([[-1, 0, 300], [0, 1, 0], [0, 0, 1]], ("x", "y"), ("x", "y"))]
)
def test_coordinate_systems_that_disagree(off):
    xy, _, _ = hexagonal()
    sdata = two_systems(section(xy), off)
    with pytest.raises(
        ValueError,
        match=r"'aligned' and 'zoomed' differ by up to .* px .*coordinate_system= one of \['aligned', 'zoomed'\]",
    ):
        read_section(sdata)
    np.testing.assert_allclose(read_section(sdata, coordinate_system="aligned").xy_px, xy)
    other = read_section(sdata, coordinate_system="zoomed").xy_px
    assert np.abs(other - xy).max() > 20


def test_coordinate_systems_that_agree(log):
    """Through micrometres or rounded by a thousandth of a pitch: one alignment, and no word."""
    from spatialdata.transformations import set_transformation

    xy, row, col = hexagonal()
    sdata = two_systems(section(xy, obs={"array_row": row, "array_col": col}), Translation([0.01, 0.0], ("x", "y")))
    for element in (sdata.images["he"], sdata.shapes["spots"]):
        set_transformation(element, Scale([5.0, 5.0], ("x", "y")), "um")
    np.testing.assert_allclose(read_section(sdata).xy_px, xy)
    assert warnings_in(log) == []


def test_targets_that_coordinate_systems_place_differently():
    from spatialdata.transformations import set_transformation

    xy, _, _ = hexagonal()
    sdata = two_systems(section(xy), Identity())
    cells = ShapesModel.parse(gpd.GeoDataFrame({"radius": np.full(len(xy), 3.0)}, geometry=shapely.points(xy + 4)))
    set_transformation(cells, Identity(), "aligned")
    set_transformation(cells, Translation([40.0, 0.0], ("x", "y")), "zoomed")
    sdata.shapes["cells"] = cells
    options = {
        "encoder": "stain-texture",
        "head": "mean",
        "genes": 3,
        "n_folds": 2,
        "target_key": "cells",
        "dense": False,
    }
    with pytest.raises(ValueError, match="coordinate systems align 'cells' differently"):
        sge.tl.predict(sdata, **options)
    sge.tl.predict(sdata, coordinate_system="zoomed", **options)
    np.testing.assert_allclose(sdata.tables["histosge"].obsm["spatial"], xy + [44, 4])


# ---------------------------------------------------------------------------------------- no remedy before


@pytest.mark.parametrize(("n_far", "refused"), [(1, False), (3, False), (4, True)])
def test_a_few_spots_beyond_the_image(log, n_far, refused):
    xy, row, col = hexagonal()  # 72: 5 % are 3.6
    places = xy.copy()
    places[:n_far] = [5000, 100]
    sdata = section(xy, places=places, obs={"array_row": row, "array_col": col})
    if refused:
        with pytest.raises(ValueError, match="4 of 72 spots of 'spots' lie outside the image"):
            read_section(sdata)
        return
    found = read_section(sdata)
    assert len(found.xy_px) == 72 - n_far
    assert found.n_left_out == n_far
    assert any(f"leaving out {n_far} spots whose centre lies beyond" in m for m in warnings_in(log))


def test_y_that_runs_upwards():
    xy, _, _ = hexagonal()
    with pytest.raises(ValueError, match="All y are negative: does y run upwards"):
        read_section(section(xy, places=xy * [1, -1]))


@pytest.mark.parametrize("kind", ["points", "labels"])
def test_spots_as_points_or_labels_are_converted_as_the_message_says(kind):
    xy, row, col = hexagonal()
    sdata = section(xy, obs={"array_row": row, "array_col": col}, key="dots")
    table = sdata.tables["table"]
    del sdata.shapes["dots"]
    if kind == "points":
        sdata.points["dots"] = PointsModel.parse(pd.DataFrame(xy, columns=["x", "y"]), coordinates={"x": "x", "y": "y"})
        more = {"radius": 5.0}
    else:
        ys, xs = np.indices((300, 300))
        labels = np.zeros((300, 300), np.int64)
        for i, (x, y) in enumerate(xy):
            labels[np.hypot(xs + 0.5 - x, ys + 0.5 - y) < 5] = i + 1
        sdata.labels["dots"] = Labels2DModel.parse(labels, dims=("y", "x"))
        table.obs["instance"] = np.arange(1, len(xy) + 1)
        more = {}
    with pytest.raises(ValueError, match=f"'dots' are {kind}.*to_circles.*set_table_annotates_spatialelement"):
        read_section(sdata)
    sdata.shapes["spots"] = to_circles(sdata["dots"], **more)
    table.obs["region"] = pd.Categorical(["spots"] * len(xy))
    sdata.set_table_annotates_spatialelement("table", region="spots")
    np.testing.assert_allclose(read_as_listed(sdata).xy_px, xy, atol=0.5)  # labels are whole pixels
