"""Domains of which the truth is known, scanpy by hand as the oracle, and every message."""

from __future__ import annotations

import re

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.metrics import adjusted_rand_score
from tests import rounding

import histosge as sge
from histosge._statistics import (
    MAX_RUNS,
    SPATIAL_NEIGHBOURS,
    agreement,
    cut,
    domain_graph,
    find_domains,
    leiden,
    spatial_graph,
)

properties = settings(deadline=None, max_examples=25)
DEFAULT = {"resolution": 1.0, "n_domains": None, "n_pcs": 30, "n_neighbours": 15, "spatial_weight": 0.2, "rng": 0}


def square(n=20):
    return np.stack(np.meshgrid(np.arange(float(n)), np.arange(float(n))), -1).reshape(-1, 2)


def hexagonal(n=12):
    xy = square(n)
    return np.column_stack([xy[:, 0] + 0.5 * (xy[:, 1] % 2), xy[:, 1] * np.sqrt(0.75)])


def blobs(*, noise, n_genes=40, seed=0):
    """Four fields of unequal size on a square array, each with its own mean expression, and noise."""
    xy, rng = square(), np.random.default_rng(seed)
    truth = 2 * (xy[:, 0] >= 12) + (xy[:, 1] >= 13)
    mean = 2 + rng.standard_normal((4, n_genes)) * 0.5
    return (mean[truth] + noise * rng.standard_normal((len(xy), n_genes))).astype(np.float32), xy, truth


def table(*, noise=0.3, seed=0):
    expression, xy, truth = blobs(noise=noise, seed=seed)
    adata = ad.AnnData(expression, obs=pd.DataFrame({"truth": truth.astype(str)}, index=[f"s{i}" for i in range(400)]))
    adata.obsm["spatial"] = xy * 100
    return adata


def alike(domain, xy):
    """Share of neighbours in space that are of the same domain."""
    graph = spatial_graph(xy).tocoo()
    return (domain[graph.row] == domain[graph.col]).mean()


# ------------------------------------------------------------------------------------------------------- finding


@pytest.mark.parametrize("weight", [0, 0.2, 0.4])
def test_clear_domains_are_found(weight):
    expression, xy, truth = blobs(noise=0.3)
    domain = find_domains(expression, xy, **(DEFAULT | {"spatial_weight": weight, "n_domains": 4}))
    assert adjusted_rand_score(truth, domain) > 0.95
    assert np.bincount(domain).tolist() == sorted(np.bincount(domain), reverse=True)  # 0 is the largest


@pytest.mark.parametrize("noise", [0.3, 1.0, 1.5])
def test_no_weight_in_space_is_scanpy_by_hand(noise):
    """To the last place, also where another scale of the same graph would give other domains."""
    import scanpy as sc

    adata = table(noise=noise)
    found = sge.tl.domains(adata, spatial_weight=0, resolution=0.8, n_pcs=10, n_neighbours=9, rng=3, inplace=False)
    sc.pp.pca(adata, n_comps=10, random_state=3)
    sc.pp.neighbors(adata, n_neighbors=9, use_rep="X_pca", random_state=3)  # by itself it skips few genes' components
    sc.tl.leiden(adata, 0.8, flavor="igraph", n_iterations=2, directed=False, random_state=3)
    assert adata.obs["leiden"].nunique() >= 4
    assert adjusted_rand_score(adata.obs["leiden"], found) == 1


def test_weight_in_space_makes_noisy_domains_smoother_and_truer():
    expression, xy, truth = blobs(noise=2.0)
    found = [find_domains(expression, xy, **(DEFAULT | {"spatial_weight": w, "n_domains": 4})) for w in (0, 0.2, 0.5)]
    share = [alike(domain, xy) for domain in found]
    assert share[0] + 0.05 < share[1]
    assert share[1] < share[2]
    assert adjusted_rand_score(truth, found[1]) > adjusted_rand_score(truth, found[0]) + 0.05


def test_sparse_expression_gives_the_same_domains():
    expression, xy, _ = blobs(noise=1.0)
    expression[expression < 1.5] = 0
    dense = find_domains(expression, xy, **DEFAULT)
    assert adjusted_rand_score(dense, find_domains(sparse.csr_matrix(expression), xy, **DEFAULT)) > 0.99


@pytest.mark.parametrize("n_genes", [1, 3, 30])
def test_fewer_genes_than_components(n_genes):
    xy = square()
    truth = (xy[:, 0] >= 12).astype(int)
    expression = truth[:, None] * 3 + np.random.default_rng(0).random((400, n_genes)).astype(np.float32)
    domain = find_domains(expression, xy, **(DEFAULT | {"n_domains": 2}))
    assert adjusted_rand_score(truth, domain) == 1


def test_fewer_rows_than_components():
    expression, xy, truth = blobs(noise=0.1, n_genes=80)
    rows = np.flatnonzero((xy % 3 == 0).all(1))
    assert len(rows) == 49
    how = DEFAULT | {"n_pcs": 60, "n_neighbours": 5, "n_domains": 4, "spatial_weight": 0}
    assert adjusted_rand_score(truth[rows], find_domains(expression[rows], xy[rows], **how)) == 1


def test_the_same_seed_gives_the_same_domains_whatever_the_global_one():
    expression, xy, _ = blobs(noise=2.5)
    found = []
    for seed, around in ((0, 1), (0, 2), (1, 1)):
        np.random.seed(around)  # noqa: NPY002
        found.append(find_domains(expression, xy, **(DEFAULT | {"rng": seed})))
    assert (found[0] == found[1]).all()
    assert (found[0] != found[2]).any()


# --------------------------------------------------------------------------------------------------------- graphs


@pytest.mark.parametrize(("xy", "n_around"), [(hexagonal(), 6), (square(12), 8)])
@pytest.mark.parametrize("turn_deg", [0, 17])
def test_a_place_inside_an_array_is_joined_to_all_around_it(xy, n_around, turn_deg):
    turn = np.deg2rad(turn_deg)
    graph = spatial_graph(xy @ np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]))
    inside = ((xy > 2.5) & (xy < xy.max(axis=0) - 2.5)).all(1)
    assert inside.sum() > 20
    assert set(graph.sum(1)[inside].ravel().tolist()[0]) == {n_around}
    row, column = graph[np.flatnonzero(inside)].nonzero()
    assert np.hypot(*(xy[np.flatnonzero(inside)[row]] - xy[column]).T).max() < 1.5


@properties
@given(st.integers(0, 10_000), st.integers(3, 60), st.floats(0.01, 100), st.floats(0, 360))
def test_the_graph_in_space_does_not_change_when_places_are_moved_turned_scaled_or_shuffled(seed, n, scale, turn_deg):
    rng, turn = np.random.default_rng(seed), np.deg2rad(turn_deg)
    xy, order = rng.random((n, 2)), rng.permutation(n)
    matrix = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    graph = spatial_graph(xy)
    assert (graph != graph.T).nnz == 0
    assert graph.diagonal().sum() == 0
    assert graph.sum(1).min() >= min(SPATIAL_NEIGHBOURS, n - 1)
    assert (graph[order][:, order] != spatial_graph((xy @ matrix + [3, -7])[order])).nnz == 0


@pytest.mark.parametrize("weight", [0.1, 0.3, 0.9])
def test_weight_is_the_share_in_space(weight):
    expression, xy, _ = blobs(noise=1.0)
    how = {"n_pcs": 10, "n_neighbours": 10, "rng": 0}
    graph = domain_graph(expression, xy, spatial_weight=weight, **how)
    alone = domain_graph(expression, xy, spatial_weight=0, **how)
    in_space = domain_graph(expression, xy, spatial_weight=1, **how)
    assert abs(graph - graph.T).max() < 1e-6
    close = rounding.of_sum(graph.nnz)  # weights in float32
    assert graph.sum() == pytest.approx(alone.sum(), rel=close)  # as much weight as scanpy's graph
    rest = graph - (1 - weight) * alone
    assert rest.sum() == pytest.approx(weight * graph.sum(), rel=close / weight)
    assert abs(rest - in_space * (rest.sum() / in_space.sum())).max() < close / weight
    assert (in_space != spatial_graph(xy)).nnz == 0


# -------------------------------------------------------------------------------------------------- so many domains


@pytest.mark.parametrize("n_domains", [2, 3, 6, 9])
@pytest.mark.parametrize("start", [0.05, 1.0, 20.0])
def test_as_many_domains_as_asked_for(n_domains, start, log):
    expression, xy, _ = blobs(noise=1.5)
    graph = domain_graph(expression, xy, n_pcs=10, n_neighbours=15, spatial_weight=0.2, rng=0)
    domain, used = cut(graph, resolution=start, n_domains=n_domains, rng=0)
    assert sorted(set(domain.tolist())) == list(range(n_domains))
    assert (cut(graph, resolution=used, n_domains=None, rng=0)[0] == domain).all()  # by hand, without the search
    assert not log.records


def test_a_number_that_cannot_be_met_is_told(log):
    """Four islands can be cut further, but never joined."""
    runs = []

    def counted(graph, *, resolution, rng):
        runs.append(resolution)
        return leiden(graph, resolution=resolution, rng=rng)

    islands = sparse.csr_matrix(np.kron(np.eye(4), np.ones((10, 10)) - np.eye(10)))
    domain, used = cut(islands, resolution=1.0, n_domains=2, rng=0, partition=counted)
    assert adjusted_rand_score(np.repeat(range(4), 10), domain) == 1
    assert len(runs) == MAX_RUNS
    assert used == 1
    assert [r.getMessage() for r in log.records] == [
        "n_domains=2 was not found in 20 runs of leiden: the nearest number is 4 domains (resolution 1)"
    ]


@pytest.mark.parametrize("numbers", [[3, 9, 5, 9], [9, 3, 7, 3]])
def test_the_nearest_number_is_kept_where_the_search_goes_past_it(numbers, log):
    sizes = iter([*numbers, *[numbers[-1]] * MAX_RUNS])
    given = {"resolution": 1.0, "n_domains": 6, "rng": 0}
    domain, _ = cut(sparse.csr_matrix((10, 10)), **given, partition=lambda *_, **__: np.arange(next(sizes)))
    assert len(domain) == numbers[2]
    assert f"the nearest number is {numbers[2]} domains" in log.text


# ------------------------------------------------------------------------------------------------------ agreement


def test_agreement():
    labels = np.repeat(["a", "b", "c"], 100)
    assert agreement(np.repeat([2, 0, 1], 100), labels) == {"ari": 1.0, "nmi": pytest.approx(1.0)}
    assert agreement(np.zeros(300, int), labels) == {"ari": 0.0, "nmi": 0.0}
    chance = agreement(np.random.default_rng(0).integers(3, size=300), labels)
    assert abs(chance["ari"]) < 0.02
    assert chance["nmi"] < 0.03


# ------------------------------------------------------------------------------------------------------- the door


def test_a_table_gets_one_column_and_its_settings_and_nothing_else():
    adata = table()
    adata.layers["raw"] = adata.X.copy()
    adata.obsm["X_pca"] = np.zeros((400, 2))
    adata.obsp["connectivities"] = sparse.eye(400).tocsr()
    adata.uns["neighbors"] = {"params": {"n_neighbors": 3}}
    adata.obs["leiden"] = "mine"
    before = adata.copy()
    assert sge.tl.domains(adata, n_domains=4) is None
    column, params = adata.obs.pop("domain"), adata.uns.pop("domain")["params"]
    assert adjusted_rand_score(adata.obs["truth"], column) > 0.95
    assert column.dtype == "category"
    assert column.cat.categories.tolist() == ["0", "1", "2", "3"]
    assert column.value_counts().index.tolist() == ["0", "1", "2", "3"]
    assert params.pop("resolution") > 0
    assert params == {
        "method": "histosge.tl.domains",
        "random_state": 0,
        "n_iterations": 2,
        "n_pcs": 30,
        "n_neighbours": 15,
        "spatial_weight": 0.2,
        "spatial_neighbours": 6,
        "n_genes": 40,
        "n_domains": 4,
    }
    assert (adata.X == before.X).all()
    assert adata.obs.equals(before.obs)
    assert adata.var.equals(before.var)
    for name in ("layers", "obsm", "varm"):
        assert getattr(adata, name).keys() == getattr(before, name).keys()
        assert all((getattr(adata, name)[k] == v).all() for k, v in getattr(before, name).items() if k is not None)
    assert list(adata.obsp) == ["connectivities"]
    assert (adata.obsp["connectivities"] != before.obsp["connectivities"]).nnz == 0
    assert adata.uns == before.uns


def test_not_in_place_nothing_is_written():
    adata = table()
    adata.obs["domain"] = "mine"
    column = sge.tl.domains(adata, inplace=False)
    assert column.name == "domain"
    assert column.index.equals(adata.obs_names)
    assert (adata.obs["domain"] == "mine").all()
    assert "domain" not in adata.uns
    sge.tl.domains(adata, key_added="other")
    assert (adata.obs["other"] == column).all()
    assert "n_domains" not in adata.uns["other"]["params"]


def test_only_highly_variable_genes_are_used():
    adata = table()
    loud = np.random.default_rng(1).standard_normal((400, 20)).astype(np.float32) * 20
    both = ad.AnnData(np.hstack([adata.X, loud]), obs=adata.obs.copy())
    both.obsm["spatial"] = adata.obsm["spatial"]
    deaf = sge.tl.domains(both, n_domains=4, spatial_weight=0, inplace=False)
    assert adjusted_rand_score(both.obs["truth"], deaf) < 0.5
    both.var["highly_variable"] = np.arange(60) < 40
    sge.tl.domains(both, n_domains=4, spatial_weight=0)
    assert adjusted_rand_score(both.obs["truth"], both.obs["domain"]) > 0.95
    assert both.uns["domain"]["params"]["n_genes"] == 40


def test_a_predicted_table_before_and_after_a_file(sdata, tmp_path, log):
    from spatialdata.models import TableModel

    sge.tl.predict(sdata, encoder="stain-texture", head="ridge", genes=20, n_folds=2)
    adata = sdata.tables["histosge"]
    keys = {name: list(getattr(adata, name)) for name in ("obsm", "obsp", "varm")}
    sge.tl.domains(sdata, n_domains=3)
    assert "added obs['domain'] to table 'histosge': 3 domains of" in log.text
    assert {name: list(getattr(adata, name)) for name in keys} == keys
    TableModel().validate(adata)
    domain = adata.obs["domain"].to_numpy()
    truth = sge.datasets.synthetic_truth(sdata, target_key="histosge_targets").loc[adata.obs["instance_id"]]
    # domains say something about the truth: they explain more of it than the same numbers dealt at random
    dealt = np.random.default_rng(0).permutation(domain)
    within = [truth.groupby(by).transform("mean").sub(truth).pow(2).to_numpy().sum() for by in (domain, dealt)]
    assert within[0] < 0.9 * within[1]

    adata.write_h5ad(tmp_path / "table.h5ad")
    back = ad.read_h5ad(tmp_path / "table.h5ad")
    assert (back.obs["domain"] == adata.obs["domain"]).all()
    assert back.uns["domain"]["params"] == adata.uns["domain"]["params"]
    log.clear()
    sge.tl.domains(back, n_domains=3)  # its own mark survived the file: it may be replaced
    assert "replacing obs['domain'] of an earlier run" in log.text
    assert (back.obs["domain"].to_numpy() == domain).all()


def test_domains_of_measured_spots(sdata):
    import scanpy as sc

    with pytest.raises(ValueError, match="the values of table 'table' are whole numbers"):
        sge.tl.domains(sdata, key="table")
    sc.pp.normalize_total(sdata.tables["table"], target_sum=1e4)
    sc.pp.log1p(sdata.tables["table"])
    sge.tl.domains(sdata, key="table", n_domains=3)
    assert sdata.tables["table"].obs["domain"].nunique() == 3


def test_antibodies_beside_genes_are_left_out(log):
    adata = table()
    wanted = list(sge.tl.domains(adata, inplace=False))
    genes = adata.X.toarray() if sparse.issparse(adata.X) else adata.X
    noise = np.random.default_rng(0).normal(20, 5, (adata.n_obs, 3))
    mixed = ad.AnnData(
        np.hstack([noise, genes]).astype(np.float32),
        obs=adata.obs.copy(),
        var=pd.DataFrame({"feature_types": ["Antibody Capture"] * 3 + ["Gene Expression"] * adata.n_vars}),
        obsm={"spatial": adata.obsm["spatial"]},
    )
    mixed.obs_names, mixed.var_names = adata.obs_names, [*("ab0", "ab1", "ab2"), *adata.var_names]
    assert list(sge.tl.domains(mixed, inplace=False)) == wanted
    assert "leaving out 3 features that are no gene expression: 3 Antibody Capture" in log.text


# ------------------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("resolution", 0, "resolution=0 must be a number above 0"),
        ("resolution", np.nan, "resolution=nan must be a number above 0"),
        ("spatial_weight", 1.5, "spatial_weight=1.5 must lie between 0"),
        ("spatial_weight", -0.1, "spatial_weight=-0.1 must lie between 0"),
        ("spatial_weight", np.nan, "spatial_weight=nan must lie between 0"),
        ("n_pcs", 0, "n_pcs=0 must be at least 1"),
        ("n_neighbours", 1, "n_neighbours=1 must be at least 2"),
        ("n_neighbours", 400, "n_neighbours=400 must be at least 2 and fewer than the 400 rows"),
        ("n_domains", 1, "n_domains=1 must lie between 2 and the number of locations, 400"),
        ("n_domains", 401, "n_domains=401 must lie between 2 and the number of locations, 400"),
        ("rng", np.random.default_rng(0), "rng=Generator(PCG64) at .*: choose a whole number from 0"),
        ("rng", -1, "rng=-1: choose a whole number from 0 to 4294967295"),
        ("key_added", "a b", "key_added='a b' is not a valid name"),
    ],
)
def test_arguments_out_of_range(argument, value, message):
    adata = table()
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        sge.tl.domains(adata, **{argument: value})
    assert list(adata.obs) == ["truth"]
    assert not adata.uns


def test_an_unknown_table(sdata):
    with pytest.raises(KeyError, match=r"key='histosge' is not among the tables .*\['table'\].*Run `sge.tl.predict`"):
        sge.tl.domains(sdata)


def test_something_else_altogether():
    with pytest.raises(TypeError, match="data is a ndarray: pass a SpatialData, or one of its tables"):
        sge.tl.domains(np.zeros((3, 3)))


@pytest.mark.parametrize("name", ["domain", "Domain"])
def test_a_column_of_the_users_is_not_replaced(name):
    adata = table()
    adata.obs[name] = "mine"
    with pytest.raises(ValueError, match=rf"the AnnData holds obs\['{name}'\] already, .* did not write"):
        sge.tl.domains(adata)
    assert (adata.obs[name] == "mine").all()


@pytest.mark.parametrize("value", [{"encoder": "UNI"}, {"params": {"resolution": 1.0}}, {"params": "none"}, "text"])
def test_an_entry_of_uns_that_is_not_ours_is_not_replaced(value):
    adata = table()
    adata.uns["domain"] = value
    with pytest.raises(ValueError, match=r"key_added='domain': the AnnData holds uns\['domain'\] already"):
        sge.tl.domains(adata)
    assert adata.uns["domain"] == value
    assert "domain" not in adata.obs


def test_a_table_without_expression(sdata):
    sge.tl.embed(sdata, encoder="stain-texture")
    with pytest.raises(ValueError, match="table 'spots_stain-texture' has no expression in X"):
        sge.tl.domains(sdata, key="spots_stain-texture")


def test_no_gene_marked():
    adata = table()
    adata.var["highly_variable"] = False
    with pytest.raises(ValueError, match=r"var\['highly_variable'\] of the AnnData marks no gene"):
        sge.tl.domains(adata)


@pytest.mark.parametrize("as_matrix", [np.asarray, sparse.csr_matrix])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            np.random.default_rng(0).poisson(1.0, (400, 5)).astype(np.float32),
            "whole numbers, raw counts .*normalize_total",
        ),
        (np.random.default_rng(0).poisson(1.0, (400, 5)), "whole numbers, raw counts .*log1p"),
        (np.full((400, 5), 0.5, np.float32), "no gene of the AnnData varies"),
        (np.zeros((400, 5), np.float32), "no gene of the AnnData varies"),
        (np.where(np.eye(400, 5) > 0, np.nan, 0.5).astype(np.float32), "holds 5 values that are NaN or infinite"),
    ],
)
def test_values_that_are_no_logarithms(values, message, as_matrix):
    adata = ad.AnnData(as_matrix(values))
    with pytest.raises(ValueError, match=message):
        sge.tl.domains(adata, spatial_weight=0)


def test_places_are_needed_only_for_weight_in_space():
    adata = table()
    del adata.obsm["spatial"]
    with pytest.raises(KeyError, match=r"has no obsm\['spatial'\].*pass spatial_weight=0"):
        sge.tl.domains(adata)
    sge.tl.domains(adata, spatial_weight=0)
    assert "domain" in adata.obs


@pytest.mark.parametrize("xy", [np.ones((400, 1)), np.full((400, 2), np.nan)])
def test_places_that_are_none(xy):
    adata = table()
    adata.obsm["spatial"] = xy
    with pytest.raises(ValueError, match=re.escape(f"not an array of shape {xy.shape}")):
        sge.tl.domains(adata)


def test_sections_on_top_of_each_other_are_not_joined():
    adata = table()
    adata.uns["spatialdata_attrs"] = {"region": ["one", "two"], "region_key": "region", "instance_key": "instance_id"}
    with pytest.raises(ValueError, match=r"several regions \['one', 'two'\].*one section at a time"):
        sge.tl.domains(adata)
    sge.tl.domains(adata, spatial_weight=0)
    assert "domain" in adata.obs
