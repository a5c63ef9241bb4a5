"""What users do next with a predicted table: docs/ecosystem.md as it stands, and what its steps must give."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import anndata as ad
import geopandas as gpd
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import shapely
import spatialdata as sd
import torch
from scipy import sparse
from sklearn.preprocessing import normalize
from spatialdata import SpatialData
from spatialdata.models import ShapesModel, TableModel, get_table_keys
from spatialdata.transformations import get_transformation

import histosge as sge
from histosge.datasets import hidden_fields, sample

pytestmark = pytest.mark.slow  # numba compiles scanpy's neighbours

PAGE = Path(__file__).parents[1] / "docs" / "ecosystem.md"
NOT_RUN = "*Not run here*"
MPP, BIN_UM, STEP_UM = 2.0, 16.0, 50.0
AXES = ("x", "y")
QUICK = {"encoder": "stain-texture", "head": "ridge", "genes": 20, "n_folds": 2}


def copy_of(sdata):
    """Holders and tables of its own; elements are shared."""
    tables = {name: table.copy() for name, table in sdata.tables.items()}
    return SpatialData(images=dict(sdata.images), shapes=dict(sdata.shapes), tables=tables)


def blocks():
    """Python of the page with the line it stands on, and whether it is run."""
    text = PAGE.read_text(encoding="utf-8")
    last = 0
    for found in re.finditer(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        line = text[: found.start(1)].count("\n")
        yield line, found[1], NOT_RUN not in text[last : found.start()]
        last = found.end()


@pytest.fixture(autouse=True)
def _one_thread():
    """scanpy's neighbours set torch's threads to all cores, which other tests run on."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """All that the page's blocks leave behind, run in order, each as if it stood in the page's own file."""
    names = {}
    with contextlib.chdir(tmp_path_factory.mktemp("page")):
        for line, code, run in blocks():
            if run:
                exec(compile("\n" * line + code, str(PAGE), "exec"), names)
            if "first" not in names:
                names["first"] = copy_of(names["sdata"])
        names["folder"] = Path.cwd()
    plt.close("all")
    return names


@pytest.fixture
def predicted(page):
    """Lattice and bins, before any other tool has seen them; add, replace and delete as you like."""
    return copy_of(page["first"])


def matrix_of(element):
    return np.asarray(get_transformation(element, to_coordinate_system="synthetic").to_affine_matrix(AXES, AXES))


def outlines_um(element):
    matrix = matrix_of(element)
    return shapely.transform(element.geometry.to_numpy(), lambda xy: xy @ matrix[:2, :2].T + matrix[:2, 2])


def truth_of(sdata, table):
    """Truth at the rows of a table, (n, genes)."""
    region = table.obs["region"].iloc[0]
    truth = sge.datasets.synthetic_truth(sdata, target_key=region)
    return truth.loc[table.obs["instance_id"], table.var_names].to_numpy()


def correlation(a, b):
    """Of columns, (k,)."""
    return np.array([np.corrcoef(x, y)[0, 1] for x, y in zip(np.asarray(a).T, np.asarray(b).T, strict=True)])


def box(low, high):
    how = {"axes": AXES, "min_coordinate": [low, low], "max_coordinate": [high, high]}
    return how | {"target_coordinate_system": "synthetic"}


def test_what_is_run_of_the_page():
    run = [code for _, code, is_run in blocks() if is_run]
    left_out = [code for _, code, is_run in blocks() if not is_run]
    assert len(run) == 14
    assert [re.search(r"\b(rsc|sopa|Interactive|dc\.op)\b", code)[0] for code in left_out] == [
        "dc.op",
        "sopa",
        "Interactive",
        "rsc",
    ]
    for code in left_out:
        compile(code, str(PAGE), "exec")


# ------------------------------------------------------------------------------------------------------ spatialdata


@pytest.mark.parametrize("key", ["histosge", "bins"])
def test_a_crop_keeps_places_and_rows_together(page, predicted, key):
    crop, whole = page["crop"], predicted.tables[key]
    table, element = crop.tables[key], crop.shapes[f"{key}_targets"]
    assert sorted(table.obs["instance_id"]) == sorted(element.index)
    um = whole.obsm["spatial"] * MPP
    kept = whole.obs["instance_id"].isin(table.obs["instance_id"]).to_numpy()
    inside_by = np.minimum(um - 420, 1120 - um).min(1)
    assert kept[inside_by > STEP_UM / 2].all()
    assert not kept[inside_by < -STEP_UM / 2].any()
    rows = pd.Index(whole.obs["instance_id"]).get_indexer(table.obs["instance_id"])
    np.testing.assert_array_equal(table.X, whole.X[rows])
    assert sd.get_pyramid_levels(crop.images["he"], n=0).shape == (3, 350, 350)


def test_predict_goes_on_after_a_crop(predicted):
    """The tables of earlier runs do not stand in the way, and what is learnt from a part is like what the whole says."""
    crop = sd.bounding_box_query(predicted, **box(420, 1120))
    sge.tl.predict(crop, key_added="again", **QUICK)
    again, whole = crop.tables["again"], predicted.tables["histosge"]
    um = [shapely.points(centre_um(s, t)) for s, t in ((crop, again), (predicted, whole))]
    at, near = shapely.STRtree(um[1]).query(um[0], predicate="dwithin", distance=1.0)
    assert len(at) > 150
    assert correlation(again.X[at], whole.X[near]).mean() > 0.9
    # all rules of the whole hold: no place off the crop
    assert ((again.obsm["spatial"] >= 0) & (again.obsm["spatial"] <= 350)).all()


def centre_um(sdata, table):
    region = table.obs["region"].iloc[0]
    centres = sd.get_centroids(sdata[region], coordinate_system="synthetic").compute()
    return centres.loc[table.obs["instance_id"].to_numpy(), list(AXES)].to_numpy()


@pytest.mark.parametrize(
    "how",
    ["box", "polygon"],
)
def test_a_crop_through_spots(predicted, how):
    """A query keeps spots whose centre lies on its border, and a polygon those that it only touches."""
    if how == "box":
        crop = sd.bounding_box_query(predicted, **box(400, 1100))
    else:
        outline = shapely.Polygon([(400, 400), (1200, 450), (1100, 1200), (450, 1100)])
        crop = sd.polygon_query(predicted, outline, target_coordinate_system="synthetic")
    sge.tl.predict(crop, key_added="again", **QUICK)
    assert len(crop.tables["again"]) > 150


def test_too_small_a_crop_is_refused(predicted):
    crop = sd.bounding_box_query(predicted, **box(420, 720))
    with pytest.raises(ValueError, match="measured spots are too few to learn from; at least 30"):
        sge.tl.predict(crop, key_added="again", **QUICK)


def test_a_model_of_the_whole_on_a_part(predicted):
    """Away from the cut by as much as the encoder sees, nothing has changed."""
    model = sge.tl.fit(predicted, **QUICK)
    crop = sd.bounding_box_query(predicted, **box(368, 1268))  # a whole number of the encoder's cells
    sge.tl.predict(crop, model=model, target_key="histosge_targets", key_added="again")
    sge.tl.predict(predicted, model=model, target_key="histosge_targets", key_added="again")
    table, whole = crop.tables["again"], predicted.tables["again"]
    rows = pd.Index(whole.obs["instance_id"]).get_indexer(table.obs["instance_id"])
    far = (np.abs(table.obsm["spatial"] * MPP - 450) < 200).all(1)
    assert far.sum() > 20
    np.testing.assert_allclose(table.X[far], whole.X[rows][far], atol=1e-3)


def test_a_polygon_crops_too(predicted):
    outline = shapely.Polygon([(420, 420), (1200, 470), (1120, 1180), (470, 1120)])
    crop = sd.polygon_query(predicted, outline, target_coordinate_system="synthetic")
    table, whole = crop.tables["histosge"], predicted.tables["histosge"]
    assert sorted(table.obs["instance_id"]) == sorted(crop.shapes["histosge_targets"].index)
    inside = shapely.contains(outline, shapely.points(whole.obsm["spatial"] * MPP))
    assert set(whole.obs["instance_id"][inside]) <= set(table.obs["instance_id"])
    assert len(table) < 1.3 * inside.sum()


def test_rows_and_outlines_of_a_shuffled_table(predicted):
    whole = predicted.tables["bins"]
    predicted.tables["bins"] = whole[np.random.default_rng(0).permutation(whole.n_obs)].copy()
    found, rows = sd.join_spatialelement_table(
        sdata=predicted, spatial_element_names="bins_targets", table_name="bins", how="inner", match_rows="left"
    )
    assert list(rows.obs["instance_id"]) == list(found["bins_targets"].index) == list(whole.obs["instance_id"])
    np.testing.assert_array_equal(rows.X, whole.X)


def test_centres_and_values_of_the_page(page, predicted):
    table = predicted.tables["bins"]
    centres = page["centres"].loc[table.obs["instance_id"].to_numpy()]
    np.testing.assert_allclose(centres[list(AXES)], table.obsm["spatial"] * MPP, atol=1e-6)
    gene = page["gene"].loc[table.obs["instance_id"].to_numpy(), "GENE000"]
    np.testing.assert_allclose(gene, table[:, "GENE000"].X[:, 0], rtol=1e-6)
    assert list(page["rows"].obs["instance_id"]) == list(page["shapes"]["bins_targets"].index)


@pytest.mark.parametrize("key", ["bins", "histosge"])
def test_rasters_hold_each_value_where_it_lies(page, predicted, key, tmp_path):
    """Bins along the image, and the oblique lattice; the shapes' own coordinates are turned by 20 degrees. From disk too."""
    table, genes = predicted.tables[key], ["GENE000", "GENE001"]
    if key == "bins":
        raster = page["raster"]
    else:
        ask = {"col_key": "array_col", "row_key": "array_row", "value_key": genes}
        raster = sd.rasterize_bins(predicted, f"{key}_targets", key, **ask)
    SpatialData(images={"raster": raster}).write(tmp_path / "raster.zarr")
    for image in (raster, sd.read_zarr(tmp_path / "raster.zarr")["raster"]):
        values = np.asarray(image.transpose("y", "x", "c"))
        row, col = (table.obs[c].to_numpy() - table.obs[c].min() for c in ("array_row", "array_col"))
        np.testing.assert_allclose(values[row, col], table[:, genes].X, rtol=1e-6)
        empty = np.ones(values.shape[:2], bool)
        empty[row, col] = False
        assert (values[empty] == 0).all()
        # spatialdata takes a pixel's corner or its middle for the place: half a step at most
        matrix = matrix_of(image)
        corner = np.column_stack([col, row]) @ matrix[:2, :2].T + matrix[:2, 2]
        away = corner - table.obsm["spatial"] * MPP
        assert np.abs(away - away.mean(0)).max() < 0.5
        assert np.abs(away.mean(0)).max() < 0.75 * (BIN_UM if key == "bins" else STEP_UM)


def test_labels_of_bins(predicted):
    """On a copy of the table, as the page says."""
    table = predicted.tables["bins"].copy()
    predicted.tables["linked"] = table
    labels = sd.rasterize_bins(
        predicted, "bins_targets", "linked", "array_col", "array_row", return_region_as_labels=True
    )
    predicted["bins_labels"] = labels
    sd.rasterize_bins_link_table_to_labels(predicted, "linked", "bins_labels")
    region, _, instance_key = get_table_keys(table)
    assert region == "bins_labels"
    row, col = (table.obs[c].to_numpy() - table.obs[c].min() for c in ("array_row", "array_col"))
    np.testing.assert_array_equal(np.asarray(labels)[row, col], table.obs[instance_key])
    assert get_table_keys(predicted.tables["bins"])[0] == "bins_targets"


@pytest.mark.filterwarnings("ignore:Did not read zarr as consolidated:UserWarning")  # spatialdata writes it so
def test_lazy_tables_have_to_be_loaded(page):
    lazy = ad.experimental.read_lazy(page["folder"] / "section.zarr" / "tables" / "bins")
    assert not isinstance(lazy.X, np.ndarray)
    loaded = lazy.to_memory()
    assert isinstance(loaded.X, np.ndarray)
    np.testing.assert_array_equal(loaded.X, page["bins"].X)


def test_sparse_values_have_to_be_by_columns(predicted):
    ask = {"bins": "bins_targets", "table_name": "bins", "col_key": "array_col", "row_key": "array_row"}
    wanted = np.asarray(sd.rasterize_bins(predicted, **ask, value_key="GENE000"))
    predicted.tables["bins"].X = sparse.csr_matrix(predicted.tables["bins"].X)
    with pytest.raises(ValueError, match="csc_matrix"):
        sd.rasterize_bins(predicted, **ask, value_key="GENE000")
    predicted.tables["bins"].X = predicted.tables["bins"].X.tocsc()
    np.testing.assert_array_equal(np.asarray(sd.rasterize_bins(predicted, **ask, value_key="GENE000")), wanted)


def test_means_over_regions(page, predicted):
    """Against shapely and numpy: all bins that touch a region, as rates."""
    means, bins = page["means"], predicted.tables["bins"]
    where = outlines_um(predicted.shapes["bins_targets"].loc[bins.obs["instance_id"]])
    assert list(means.obs["instance_id"]) == ["left", "right"]
    for i, region in enumerate(page["outlines"].geometry):
        touched = shapely.intersects(where, region)
        assert 500 < touched.sum() < len(bins)
        wanted = np.expm1(bins.X[touched].astype(float)).mean(0)
        found = means[:, bins.var_names].X
        found = np.asarray(found.todense() if sparse.issparse(found) else found)[i]
        np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_spatialdata_plot_draws_the_values(predicted):
    import spatialdata_plot  # noqa: F401

    drawn = predicted.pl.render_shapes("histosge_targets", color="GENE000", table_name="histosge")
    ax = drawn.pl.show(coordinate_systems="synthetic", return_ax=True)
    table = predicted.tables["histosge"]
    assert sum(len(c.get_paths()) for c in ax.collections) == len(table)
    um = centre_um(predicted, table)
    assert ax.get_xlim()[0] <= um[:, 0].min() < um[:, 0].max() <= ax.get_xlim()[1]
    bar = next(a for a in ax.figure.axes if a is not ax)
    np.testing.assert_allclose(
        sorted(bar.get_ylim()), np.ptp(table[:, "GENE000"].X) * np.arange(2) + table[:, "GENE000"].X.min(), rtol=1e-3
    )
    plt.close("all")


# ----------------------------------------------------------------------------------------- scanpy, squidpy, decoupler


def test_clusters_and_their_genes(page):
    """On what was written and read again: the first gene of a cluster is higher there in truth as well."""
    adata = page["adata"]
    truth = pd.DataFrame(truth_of(page["sdata"], adata), columns=adata.var_names, index=adata.obs_names)
    groups = adata.obs["leiden"]
    assert 3 <= groups.nunique() <= 12
    for group in groups.cat.categories:
        first = sc.get.rank_genes_groups_df(adata, group=group)["names"].iloc[0]
        inside = (groups == group).to_numpy()
        assert truth.loc[inside, first].mean() > truth.loc[~inside, first].mean() + 0.1
    between = truth.groupby(groups.to_numpy()).transform("mean").to_numpy()
    assert (between.var(0) / truth.var().to_numpy()).mean() > 0.35  # share of the truth's variance; 0.01 by chance
    assert list(adata.obs["domain"].cat.categories) == ["0", "1", "2", "3"]


def test_embedding_plot_on_the_image(page):
    adata = page["adata"].copy()
    ax = sc.pl.embedding(adata, basis="spatial", color="leiden", show=False)
    np.testing.assert_allclose(np.sort(ax.collections[0].get_offsets(), 0), np.sort(adata.obsm["spatial"], 0))
    assert len(adata.uns["leiden_colors"]) == adata.obs["leiden"].nunique()
    plt.close("all")


def test_carried_clusters(page):
    bins, few = page["bins"], page["few"]
    assert not bins.obs["leiden"].isna().any()
    assert set(bins.obs["leiden"]) == set(few.obs["leiden"])
    assert (bins.obs["leiden"].iloc[page["some"]].astype(str).to_numpy() == few.obs["leiden"].astype(str)).mean() > 0.85


def test_neighbours_in_space(page, predicted):
    import squidpy as sq

    graph, px = page["adata"].obsp["spatial_connectivities"].tocoo(), page["adata"].obsm["spatial"]
    degree = np.diff(graph.tocsr().indptr)
    assert degree.max() == np.median(degree) == 6
    np.testing.assert_allclose(np.linalg.norm(px[graph.row] - px[graph.col], axis=1), STEP_UM / MPP, rtol=1e-3)
    bins = predicted.tables["bins"]
    sq.gr.spatial_neighbors_grid(bins, n_neighs=4)
    where, grid = bins.obsp["spatial_connectivities"].tocoo(), bins.obs[["array_row", "array_col"]].to_numpy()
    assert (np.abs(grid[where.row] - grid[where.col]).sum(1) == 1).all()
    assert np.median(np.diff(where.tocsr().indptr)) == 4
    # the same by way of the shapes
    sq.gr.spatial_neighbors_grid(
        predicted, elements_to_coordinate_systems={"bins_targets": "synthetic"}, table_key="bins", n_neighs=4
    )
    assert (bins.obsp["spatial_connectivities"] != where.tocsr()).nnz == 0


def test_domains_keep_to_themselves(page):
    z = page["adata"].uns["domain_nhood_enrichment"]["zscore"]
    assert (np.diag(z) > 10).all()
    assert (z.argmax(1) == np.arange(4)).all()


def test_morans_i_of_prediction_and_measurement(page):
    """By the formula, and as a rule higher than that of the noisy measurement at the same places."""
    import squidpy as sq

    adata, measured = page["adata"], page["sdata"].tables["table"].copy()
    weight = normalize(adata.obsp["spatial_connectivities"], norm="l1")  # each place's neighbours weigh 1 together
    z = adata.X - adata.X.mean(0)
    wanted = len(z) / weight.sum() * (z * (weight @ z)).sum(0) / (z**2).sum(0)
    np.testing.assert_allclose(adata.uns["moranI"].loc[adata.var_names, "I"], wanted, rtol=1e-3)

    sc.pp.normalize_total(measured, target_sum=1e4)
    sc.pp.log1p(measured)
    spots = adata[adata.obs["is_spot"]].copy()
    found = {}
    for name, table in (("predicted", spots), ("measured", measured)):
        sq.gr.spatial_neighbors_grid(table, n_neighs=6)
        sq.gr.spatial_autocorr(table, mode="moran", genes=list(adata.var_names), show_progress_bar=False)
        found[name] = table.uns["moranI"]["I"].loc[adata.var_names]
    assert len(spots) == len(measured)
    assert found["predicted"].mean() > found["measured"].mean() + 0.03
    assert not (found["predicted"] > found["measured"]).all()  # a strong gene may lose


def test_planted_programmes_are_found(page):
    """Genes that follow a hidden field, by the truth: their score is high where the field is, and that of others not."""
    import decoupler as dc

    assert page["scores"].shape == (page["adata"].n_obs, 2)
    np.testing.assert_array_equal(page["scores"].X, page["adata"].obsm["score_ulm"])
    adata = page["adata"].copy()
    params = page["sdata"].tables["table"].uns["synthetic"]
    whole = {name: int(params[name]) for name in ("n_rows", "n_cols", "seed")}
    fields, _ = hidden_fields(whole | {"detail_um": float(params["detail_um"])})
    field = sample(fields, adata.obsm["spatial"] * MPP)  # (n, 5)
    truth = truth_of(page["sdata"], adata)
    follows = np.array([correlation(truth, np.repeat(f[:, None], adata.n_vars, 1)) for f in field.T])
    net = [(f"field {k}", adata.var_names[g], follows[k, g]) for k, g in np.argwhere(np.abs(follows) > 0.5)]
    net = pd.DataFrame(net, columns=["source", "target", "weight"])
    adata.obsm.clear()
    dc.mt.ulm(adata, net, tmin=2)
    scores = adata.obsm["score_ulm"]
    assert len(scores.columns) >= 3
    agree = {name: np.corrcoef(scores[name], field[:, int(name[-1])])[0, 1] for name in scores}
    assert min(agree.values()) > 0.6
    assert np.mean(list(agree.values())) > 0.75


# ---------------------------------------------------------------------------------------- cells of other segmentations


def sopa_like(sdata, n=120):
    """Cells, and their table, as sopa names and links them."""
    random = np.random.default_rng(0)
    centre = random.uniform(220, 540, (n, 2))
    corner = np.linspace(0, 2 * np.pi, 13)[:-1]
    ring = np.stack([np.cos(corner), np.sin(corner)], 1) * random.uniform(2.0, 4.0, (n, 12, 1))
    names = [f"{'a' * 7}{chr(97 + i % 16)}-{1 + i // 16}" for i in range(n)]
    cells = gpd.GeoDataFrame(geometry=shapely.polygons(centre[:, None] + ring), index=names)
    sdata["cellpose_boundaries"] = ShapesModel.parse(
        cells, transformations=get_transformation(sdata["he"], get_all=True)
    )
    obs = pd.DataFrame({"region": pd.Categorical(["cellpose_boundaries"] * n), "cell_id": names}, index=names)
    obs["slide"], obs["area"] = pd.Categorical(["he"] * n), cells.area.to_numpy()
    table = ad.AnnData(random.uniform(0, 255, (n, 3)).astype(np.float32), obs=obs, var=pd.DataFrame(index=list("rgb")))
    table.obsm["spatial"] = centre
    return TableModel.parse(table, region="cellpose_boundaries", region_key="region", instance_key="cell_id")


def test_cells_of_the_page(page):
    cells = page["sdata"].tables["cells"]
    assert list(cells.obs["instance_id"]) == [f"cell-{i}" for i in range(200)]
    np.testing.assert_allclose(cells.obsm["spatial"], page["nuclei"], atol=1e-6)
    assert cells.uns["histosge"]["dense"]
    assert np.median(correlation(cells.X, truth_of(page["sdata"], cells))) > 0.75


def test_a_table_of_cells_beside_that_of_spots(predicted, tmp_path):
    cells = sopa_like(predicted)
    model = sge.tl.fit(predicted, dense=True, **QUICK)
    sge.tl.predict(predicted, model=model, target_key="cellpose_boundaries", key_added="alone")
    predicted.tables["cell_table"] = cells
    ask = {"target_key": "cellpose_boundaries", "key_added": "cells", "model": model}
    message = r"several spots or tables.*spots_key= one of \['cellpose_boundaries', 'spots'\], table_key= one of \['cell_table', 'table'\]"
    for call, rest in ((sge.tl.predict, ask), (sge.tl.fit, QUICK), (sge.pp.targets, {"bin_um": 16})):
        with pytest.raises(ValueError, match=message):
            call(predicted, **rest)
    for one in ({"spots_key": "spots"}, {"table_key": "table"}):
        sge.tl.predict(predicted, **one, **ask)
        np.testing.assert_array_equal(predicted.tables["cells"].X, predicted.tables["alone"].X)
    predicted.write(tmp_path / "cells.zarr")
    back = sd.read_zarr(tmp_path / "cells.zarr")
    # the two tables of the cells join by their names
    ours, theirs = (back.tables[k].obs.set_index(c) for k, c in (("cells", "instance_id"), ("cell_table", "cell_id")))
    assert sorted(ours.index) == sorted(theirs.index)


# ------------------------------------------------------------------------------------------------------------- napari


@pytest.mark.parametrize("key", ["histosge", "bins", "cells"])
def test_viewers_find_table_and_colours(page, key, tmp_path):
    """What napari-spatialdata 0.7.2 reads: the link to the shapes, and an array of one colour a category."""
    sdata = page["sdata"]
    region, region_key, instance_key = get_table_keys(sdata.tables[key])
    element, table = sdata.shapes[region], sdata.tables[key]
    assert isinstance(table.obs[region_key].dtype, pd.CategoricalDtype)
    assert set(table.obs[region_key]) == {region}
    ids = pd.Index(table.obs[instance_key].to_numpy())
    assert ids.is_unique
    assert ids.isin(element.index).all()
    assert (ids.dtype.kind == "i") == (element.index.dtype.kind == "i")
    assert set(element.geom_type) <= {"Point", "Polygon"}
    if key == "histosge":
        sdata.tables[key].write_h5ad(tmp_path / "t.h5ad")
        back = ad.read_h5ad(tmp_path / "t.h5ad")
        colours = dict(zip(back.obs["leiden"].cat.categories, back.uns["leiden_colors"].tolist(), strict=True))
        assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in colours.values())


def test_a_file_for_cellxgene(page):
    back, adata = ad.read_h5ad(page["folder"] / "section.h5ad"), page["sdata"].tables["histosge"]
    assert list(back.obs_names) == list(adata.obs_names)
    np.testing.assert_array_equal(back.X, adata.X)
    np.testing.assert_allclose(back.obsm["X_spatial"], adata.obsm["spatial"] * [1, -1], rtol=1e-6)
    assert {"leiden", "domain"} <= set(back.obs)
