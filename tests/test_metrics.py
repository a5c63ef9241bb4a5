"""Scores of genes against scipy and sums by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats
from skimage import metrics
from spatialdata.models import ShapesModel
from spatialdata.transformations import Scale

from histosge import datasets
from histosge._statistics import (
    better_baselines,
    correlation,
    gene_agreement,
    morans_i,
    neighbour_mean,
    noise_ceiling,
    rank_correlation,
    similarity_map,
    structural_similarity,
    thin,
)

properties = settings(deadline=None, max_examples=25)


def grid(n=10):
    """Jittered, so that no two neighbours are equally far."""
    xy = np.stack(np.meshgrid(np.arange(float(n)), np.arange(float(n))), -1).reshape(-1, 2)
    return 100 * (xy + np.random.default_rng(0).random(xy.shape) * 0.2)


# -------------------------------------------------------------------------------------------------- correlation


@properties
@given(st.integers(3, 60), st.floats(1e-3, 1e3), st.floats(-100, 100), st.sampled_from([np.float32, np.float64]))
def test_correlation_against_scipy(n, scale, shift, dtype):
    rng = np.random.default_rng(n)
    measured = rng.standard_normal((n, 5))
    predicted = 0.5 * measured + rng.standard_normal((n, 5))
    predicted, measured = (scale * predicted + shift).astype(dtype), measured.astype(dtype)
    expected = [stats.pearsonr(p, m).statistic for p, m in zip(predicted.T, measured.T, strict=True)]
    assert correlation(predicted, measured) == pytest.approx(expected, abs=2e-3 if dtype == np.float32 else 1e-9)


@pytest.mark.parametrize("value", [0.0, 0.1, 3.3, 1e6, -2.7])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_constant_scores_zero(value, dtype):
    """In the reference it scores NaN and is dropped from the mean."""
    varying = np.random.default_rng(0).random((41, 2)).astype(dtype)
    constant = np.full((41, 2), value, dtype)
    for p, m in ((constant, varying), (varying, constant), (constant, constant)):
        assert correlation(p, m).tolist() == [0.0, 0.0]


def test_correlation_of_one_spot_is_zero():
    assert correlation(np.ones((1, 3)), np.ones((1, 3))).tolist() == [0, 0, 0]


def test_correlation_of_small_wobbles_is_seen():
    """A gene that varies by a millionth still varies."""
    rng = np.random.default_rng(0)
    signal = rng.random((50, 1))
    assert correlation(1 + 1e-6 * signal, signal) == pytest.approx(1, abs=1e-6)


# ---------------------------------------------------------------------------------------------------- Moran's I


def moran_by_hand(values, xy, k):
    n = len(xy)
    z = values - values.mean()
    total, weights = 0.0, 0.0
    for i in range(n):
        far = np.hypot(*(xy - xy[i]).T)
        far[i] = np.inf
        for j in np.argsort(far)[:k]:
            total += z[i] * z[j] / k
            weights += 1 / k
    return n / weights * total / (z**2).sum()


@pytest.mark.parametrize("k", [4, 6])
@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_morans_i_against_the_formula(k, form):
    xy, rng = grid(), np.random.default_rng(1)
    values = np.column_stack([rng.random(100), np.sin(xy[:, 0] / 200), rng.poisson(0.3, 100)]).astype(np.float32)
    found = morans_i(form(values), xy, n_neighbours=k)
    assert found == pytest.approx([moran_by_hand(v.astype(float), xy, k) for v in values.T], abs=1e-5)


def test_morans_i_of_known_patterns():
    side = np.arange(12)
    xy = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2).astype(float)
    checkers, halves = xy.sum(1) % 2, (xy[:, 0] < 6).astype(float)
    found = morans_i(np.column_stack([checkers, halves, np.full(144, 2.3)]).astype(np.float32), xy, n_neighbours=4)
    assert found[0] < -0.8
    assert found[1] > 0.85
    assert found[2] == 0  # not NaN


def test_morans_i_of_sections_that_lie_on_one_another():
    """Neighbours are of one section: as if the sections lay far apart."""
    xy, rng = grid(), np.random.default_rng(1)
    values = np.column_stack([rng.random(200), np.tile(np.sin(xy[:, 0] / 200), 2)]).astype(np.float32)
    group = np.repeat([4, 2], 100)
    apart = morans_i(values, np.vstack([xy, xy + 1e6]))
    np.testing.assert_allclose(morans_i(values, np.vstack([xy, xy]), groups=group), apart, atol=1e-6)


def test_a_spot_without_neighbours_has_an_empty_row():
    """Alone in its section, and the neighbour of none: the matrix still has its row and column."""
    xy = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [50.0, 50.0]])
    alone = neighbour_mean(xy, n_neighbours=2, itself=False, groups=np.array([0, 0, 0, 1])).toarray()
    assert alone.tolist() == [[0, 0.5, 0.5, 0], [0.5, 0, 0.5, 0], [0.5, 0.5, 0, 0], [0, 0, 0, 0]]
    assert neighbour_mean(xy, n_neighbours=2, itself=False)[[3]].sum() == pytest.approx(1)
    assert neighbour_mean(xy, n_neighbours=2, itself=False).shape == (4, 4)


def test_morans_i_of_many_genes():
    """More than one part's worth of columns, each in its place."""
    xy, rng = grid(), np.random.default_rng(0)
    values = rng.random((100, 1100)).astype(np.float32)
    found = morans_i(values, xy)
    for gene in (0, 511, 512, 1023, 1024, 1099):
        assert found[gene] == pytest.approx(moran_by_hand(values[:, gene].astype(float), xy, 6), abs=1e-5)


# ------------------------------------------------------------------------------------------------- rank correlation


@properties
@given(st.integers(3, 60), st.integers(2, 9))
def test_rank_correlation_against_scipy_with_ties(n, n_values):
    rng = np.random.default_rng(n)
    measured = rng.integers(0, n_values, (n, 4)).astype(float)
    predicted = np.exp(measured + rng.integers(0, n_values, (n, 4)))
    measured[0], measured[1], predicted[0], predicted[1] = 0, 1, 1, 2  # never constant
    expected = [stats.spearmanr(p, m).statistic for p, m in zip(predicted.T, measured.T, strict=True)]
    assert rank_correlation(predicted, measured) == pytest.approx(expected, abs=1e-9)


def test_rank_correlation_of_a_constant_is_zero():
    varying = np.random.default_rng(0).random((30, 2)).astype(np.float32)
    constant = np.full((30, 2), 0.1, np.float32)
    for p, m in ((constant, varying), (varying, constant), (constant, constant)):
        assert rank_correlation(p, m).tolist() == [0, 0]


def test_rank_correlation_sees_order_only():
    x = np.random.default_rng(0).random((30, 2))
    assert rank_correlation(np.exp(9 * x), x) == pytest.approx([1, 1])
    assert rank_correlation(-(x**3), x) == pytest.approx([-1, -1])


# --------------------------------------------------------------------------------------------------- gene agreement


def agreement_by_hand(predicted, measured):
    p, m = np.corrcoef(predicted.T), np.corrcoef(measured.T)
    genes = np.arange(len(p))
    return [stats.pearsonr(p[i, genes != i], m[i, genes != i]).statistic for i in genes]


@pytest.mark.parametrize("n_genes", [3, 40, 530])  # also more than one block
def test_gene_agreement_against_the_two_matrices(n_genes):
    rng = np.random.default_rng(0)
    measured = rng.standard_normal((80, 5)) @ rng.standard_normal((5, n_genes)) + rng.standard_normal((80, n_genes))
    predicted = 0.4 * measured + rng.standard_normal((80, n_genes))
    assert gene_agreement(predicted, measured) == pytest.approx(agreement_by_hand(predicted, measured), abs=1e-4)


def test_gene_agreement_is_kept_by_any_scale_and_lost_by_shuffling():
    rng = np.random.default_rng(0)
    measured = rng.standard_normal((200, 4)) @ rng.standard_normal((4, 60))
    assert gene_agreement(3 * measured + 7, measured) == pytest.approx(np.ones(60), abs=1e-5)
    shuffled = np.column_stack([rng.permutation(column) for column in measured.T])
    assert abs(gene_agreement(shuffled, measured).mean()) < 0.1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_constant_gene_correlates_with_none(dtype):
    rng = np.random.default_rng(0)
    measured = rng.standard_normal((50, 3)) @ rng.standard_normal((3, 8))
    predicted = (measured + rng.standard_normal((50, 8))).astype(dtype)
    predicted[:, 2] = 1e3 / 3  # the mean of it need not be it
    found = gene_agreement(predicted, measured)
    assert found[2] == 0
    kept = np.arange(8) != 2
    p, m = np.zeros((8, 8)), np.corrcoef(measured.T)
    p[np.ix_(kept, kept)] = np.corrcoef(predicted[:, kept].T)
    for gene in np.flatnonzero(kept):
        others = np.arange(8) != gene
        assert found[gene] == pytest.approx(stats.pearsonr(p[gene, others], m[gene, others]).statistic, abs=1e-4)


@pytest.mark.parametrize("n_genes", [1, 2])
def test_gene_agreement_needs_three_genes(n_genes):
    x = np.random.default_rng(0).random((20, n_genes))
    assert gene_agreement(x, x).tolist() == [0] * n_genes


# -------------------------------------------------------------------------------------------- structural similarity


def test_structural_similarity_against_skimage_inside_a_square_grid():
    """Eight neighbours and the spot itself are its window of 3 x 3."""
    side, rng = 14, np.random.default_rng(0)
    y, x = np.indices((side, side))
    measured = np.stack([np.sin(x / 3) + 0.3 * rng.random((side, side)), 5 + rng.poisson(2, (side, side))], -1)
    predicted = 0.6 * measured + 0.2 * rng.random(measured.shape)
    xy = 100.0 * np.column_stack([x.ravel(), y.ravel()])
    window = neighbour_mean(xy, n_neighbours=8, itself=True)
    found = similarity_map(predicted.reshape(-1, 2), measured.reshape(-1, 2), mean=window).reshape(side, side, 2)
    for gene in range(2):
        _, expected = metrics.structural_similarity(
            predicted[..., gene],
            measured[..., gene],
            win_size=3,
            gaussian_weights=False,
            use_sample_covariance=False,
            data_range=np.ptp(measured[..., gene]),
            full=True,
        )
        assert found[1:-1, 1:-1, gene] == pytest.approx(expected[1:-1, 1:-1], abs=1e-9)
    whole = structural_similarity(predicted.reshape(-1, 2), measured.reshape(-1, 2), xy=xy, n_neighbours=8)
    assert whole == pytest.approx(found.mean((0, 1)))


def test_structural_similarity_of_known_predictions():
    xy, rng = grid(12), np.random.default_rng(0)
    measured = 3 + np.sin(xy[:, :1] / 200) + rng.random((144, 600))
    same = structural_similarity(measured, measured, xy=xy)
    assert same == pytest.approx(np.ones(600))
    flat = structural_similarity(np.broadcast_to(measured.mean(0), measured.shape), measured, xy=xy)
    shrunk = structural_similarity(0.5 * (measured + measured.mean(0)), measured, xy=xy)
    shuffled = structural_similarity(rng.permutation(measured), measured, xy=xy)
    assert (flat < 0.2).all()
    assert (shuffled < 0.3).all()
    assert ((shrunk > 0.5) & (shrunk < 0.95)).all()  # right in all but how much it varies: that costs
    one = structural_similarity(0.5 * measured[:, [599]], measured[:, [599]], xy=xy)  # the second block is in its place
    assert structural_similarity(0.5 * measured, measured, xy=xy)[599] == pytest.approx(one[0])


@pytest.mark.parametrize("unit", [1e-3, 1e3])
def test_structural_similarity_has_no_unit(unit):
    """The dynamic range is the measurement's own; float32 is computed as float64 is, and six neighbours are usual."""
    xy, rng = grid(), np.random.default_rng(0)
    measured = (100 + rng.random((100, 3))).astype(np.float32)
    predicted = measured + rng.random((100, 3), np.float32)
    wanted = structural_similarity(predicted.astype(float), measured.astype(float), xy=xy, n_neighbours=6)
    assert ((wanted > 0) & (wanted < 0.9)).all()
    np.testing.assert_array_equal(structural_similarity(predicted, measured, xy=xy), wanted)  # the same operations
    assert structural_similarity(unit * predicted.astype(float), unit * measured.astype(float), xy=xy) == pytest.approx(
        wanted, abs=1e-6
    )


def test_structural_similarity_of_a_constant_measurement_is_zero():
    x = np.random.default_rng(0).random((100, 2))
    assert structural_similarity(x, np.full((100, 2), 0.1), xy=grid()).tolist() == [0, 0]
    assert structural_similarity(x[:1], x[:1], xy=grid()[:1]).tolist() == [0, 0]


# ------------------------------------------------------------------------------------------------------------- thin


@properties
@given(st.integers(1, 40), st.integers(1, 20), st.sampled_from([np.float32, np.float64, np.int32]), st.integers(0, 99))
def test_the_halves_add_up_to_the_counts(n, n_genes, dtype, seed):
    rng = np.random.default_rng(seed)
    counts = sparse.csr_matrix(rng.poisson(1.5, (n, n_genes)).astype(dtype))
    before = counts.toarray()
    half, other = thin(counts, rng=np.random.default_rng(seed))
    assert ((half + other).toarray() == before).all()
    assert (counts.toarray() == before).all()
    for part in (half, other):
        assert part.dtype == dtype
        assert part.format == "csr"
        assert (part.data > 0).all()
    assert (thin(counts, rng=np.random.default_rng(seed))[0] != half).nnz == 0


def test_halves_of_poisson_counts_are_independent():
    rng = np.random.default_rng(0)
    half, other = (part.toarray() for part in thin(sparse.csr_matrix(rng.poisson(4, (3000, 40))), rng=rng))
    assert half.mean() == pytest.approx(2, abs=0.02)
    assert half.var() == pytest.approx(2, abs=0.04)
    assert abs(correlation(half, other).mean()) < 0.01


def test_entries_stored_twice_are_split_as_one():
    counts = sparse.csr_matrix((np.array([3.0, 4.0]), np.array([1, 1]), np.array([0, 2])), shape=(1, 3))
    half, other = thin(counts, rng=np.random.default_rng(0))
    assert (half + other).toarray().tolist() == [[0, 7, 0]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.5, r"counts hold 1 values that are not whole numbers \(for example 0\.5\).*Pass raw counts: not normalised"),
        (-2.0, r"counts hold 1 values that are negative, NaN or infinite \(for example -2\)\. Pass raw counts"),
        (np.nan, r"counts hold 1 values that are negative, NaN or infinite \(for example nan\)"),
        (np.inf, r"counts hold 1 values that are negative, NaN or infinite \(for example inf\)"),
    ],
)
def test_only_counts_can_be_split(value, message):
    with pytest.raises(ValueError, match=message):
        thin(sparse.csr_matrix([[1.0, value], [0.0, 2.0]]), rng=np.random.default_rng(0))


# ---------------------------------------------------------------------------------------------------- noise ceiling


def poisson_genes(n, mean, spread, *, n_genes=150, follows=0.0, seed=0):
    """Counts with library sizes from 500 to 20,000 and log-normal rates, and the true ceiling of every gene."""
    rng = np.random.default_rng(seed)
    total = np.exp(rng.uniform(np.log(500), np.log(20_000), n))
    z = rng.standard_normal((n, n_genes))
    z = follows * stats.zscore(np.log(total))[:, None] + np.sqrt(1 - follows**2) * z
    rate = np.exp(np.broadcast_to(spread, n_genes) * z)
    rate *= mean / total.mean() / rate.mean(0)
    counts = rng.poisson(rate * total[:, None])
    measured = np.log1p(1e4 * counts / total[:, None])
    return sparse.csr_matrix(counts), total, correlation(np.log1p(1e4 * rate), measured)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_noise_ceiling_of_the_synthetic_section(seed):
    """The mean over its genes, a fifth of them without a pattern, and that of single genes."""
    sdata = datasets.synthetic(rng=seed, mpp=4.0)
    table = sdata.tables["table"]
    # a spot catches the mean of its disc, not what is expected at its centre
    angle = np.arange(19) * np.pi * (3 - np.sqrt(5))
    disc = 27.5 * np.sqrt((np.arange(19) + 0.5) / 19)[:, None] * np.column_stack([np.cos(angle), np.sin(angle)])
    places = (table.obsm["spatial"][:, None] + disc / 4.0).reshape(-1, 2)
    sdata.shapes["places"] = ShapesModel.parse(
        places, geometry=0, radius=1.0, transformations={"synthetic": Scale([4.0, 4.0], axes=("x", "y"))}
    )
    rate = np.expm1(datasets.synthetic_truth(sdata, target_key="places").to_numpy()) / 1e4
    rate = rate.reshape(table.n_obs, 19, -1).mean(1)

    counts = table.X
    measured = np.log1p(1e4 * counts.toarray() / counts.sum(1).A1[:, None])
    true = correlation(np.log1p(1e4 * rate), measured)
    found = noise_ceiling(counts)
    assert found.mean() == pytest.approx(true.mean(), abs=0.03)
    assert np.sqrt(((found - true) ** 2).mean()) < 0.05
    assert correlation(found[:, None], true[:, None])[0] > 0.95


@pytest.mark.parametrize(("n", "n_genes"), [(200, 300), (2500, 60)])
@pytest.mark.parametrize("mean", [0.2, 1, 5, 50])
def test_noise_ceiling_at_any_depth(n, n_genes, mean):
    """Three genes in ten have no pattern: their true ceiling is 0."""
    spread = np.tile([0.0, 0.3, 0.7, 1.0, 0.7, 0.0, 0.3, 1.0, 0.0, 0.7], n_genes // 10)
    counts, total, true = poisson_genes(n, mean, spread, n_genes=n_genes)
    found = noise_ceiling(counts, total=total)
    assert (true[spread == 0] == 0).all()
    assert found.mean() == pytest.approx(true.mean(), abs=0.03)


def test_halves_stepped_up_to_full_depth_say_too_much():
    """Why the ceiling is not found by Spearman and Brown's formula."""
    counts, total, true = poisson_genes(2500, 5, np.tile([0.0, 0.7], 30), n_genes=60)
    halves = [np.log1p(2e4 * half.toarray() / total[:, None]) for half in thin(counts, rng=np.random.default_rng(0))]
    r = correlation(*halves)
    assert np.sqrt(2 * r / (1 + r)).mean() > true.mean() + 0.2
    assert noise_ceiling(counts, total=total).mean() == pytest.approx(true.mean(), abs=0.03)


@pytest.mark.parametrize("mean", [0.2, 5])
def test_noise_ceiling_of_genes_that_follow_library_size(mean):
    """Where cells are crowded there are more counts, and other genes."""
    counts, total, true = poisson_genes(2500, mean, 0.7, n_genes=60, follows=0.5)
    assert noise_ceiling(counts, total=total).mean() == pytest.approx(true.mean(), abs=0.03)


def test_noise_ceiling_of_genes_without_a_pattern_is_small():
    for n, n_genes, most in ((200, 300, 0.12), (2500, 60, 0.07)):
        for mean in (0.2, 5):
            counts, total, _ = poisson_genes(n, mean, 0.0, n_genes=n_genes)
            assert noise_ceiling(counts, total=total).mean() < most


def test_noise_ceiling_by_the_sum_that_counts_are_normalised_to():
    """Normalised to far below 1, log1p is a straight line; far above, a logarithm, and zeros stand out."""
    rng = np.random.default_rng(0)
    total = rng.lognormal(np.log(8000), 0.5, 2000)
    rate = np.exp(0.7 * rng.standard_normal((2000, 40))) * 20 / total.mean()
    counts = rng.poisson(rate * total[:, None])
    for target_sum in (1.0, 1e4, 1e6):
        true = correlation(np.log1p(target_sum * rate), np.log1p(target_sum * counts / total[:, None]))
        found = noise_ceiling(sparse.csr_matrix(counts), total=total, target_sum=target_sum)
        assert found.mean() == pytest.approx(true.mean(), abs=0.03)


def test_noise_ceiling_stays_in_range():
    """Genes never seen, seen once, or with many counts; a few genes with the total of all are as good as all."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(np.exp(rng.normal(0, 1, (100, 6))) * [0, 0.01, 0.1, 1, 100, 1e5])
    counts[:, 1] = np.arange(100) == 7
    found = noise_ceiling(sparse.csr_matrix(counts))
    assert found[0] == 0
    assert ((found >= 0) & (found <= 1)).all()
    assert found[4] > 0.9
    total = counts.sum(1)
    assert noise_ceiling(sparse.csr_matrix(counts[:, [4, 2]]), total=total) == pytest.approx(found[[4, 2]], abs=1e-5)
    assert noise_ceiling(sparse.csr_matrix((100, 3)), total=total).tolist() == [0, 0, 0]


def test_noise_ceiling_needs_counts_in_every_spot():
    counts = np.ones((5, 3))
    counts[2] = 0
    with pytest.raises(ValueError, match=r"total: 1 of 5 spots have no counts\. Leave them out first"):
        noise_ceiling(sparse.csr_matrix(counts))
    with pytest.raises(ValueError, match="counts hold 3 values that are negative"):
        noise_ceiling(sparse.csr_matrix(counts - [[0], [0], [1], [0], [0]]))


@pytest.mark.parametrize(
    ("head", "pcc", "better"),
    [
        ("a+b", {"a+b": 0.40, "a": 0.39, "ridge": 0.3}, []),
        ("a+b", {"a+b": 0.40, "a": 0.409, "b": 0.4101}, ["b"]),  # within a hundredth a part is no better
        ("a+b", {"a+b": 0.40, "ridge": 0.40, "nearest": 0.41}, ["nearest", "ridge"]),  # a rival is, at once
        ("ridge", {"ridge": 0.40, "nearest": 0.39}, []),
        ("a + b", {"a + b": 0.40, "a": 0.405}, []),
        ("a+mean", {"a+mean": -0.01, "mean": 0.0}, ["mean"]),
        ("a+ridge", {"a+ridge": 0.40, "ridge": 0.401, "a": 0.45}, ["a", "ridge"]),  # also where it is a part
    ],
)
def test_what_a_head_does_not_beat(head, pcc, better):
    assert better_baselines(head, pcc) == better
