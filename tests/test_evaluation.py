"""Scores against scipy, sums by hand, and data of which it is known that nothing can be predicted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse, stats
from tests import rounding

from histosge._heads import HEADS, Queries, Spots, get_head
from histosge._model import MIN_SHARE, Scores, choose_genes, compare, cross_fit, score, summary
from histosge._statistics import morans_i, random_folds


def grid(n=10):
    """Jittered, so that no two neighbours are equally far."""
    xy = np.stack(np.meshgrid(np.arange(float(n)), np.arange(float(n))), -1).reshape(-1, 2)
    return 100 * (xy + np.random.default_rng(0).random(xy.shape) * 0.2)


# -------------------------------------------------------------------------------------------------------- genes


def counts(*, n_structured=10, n_noise=60, seed=0):
    """Genes that follow a pattern weakly, then genes of larger dispersion that follow none."""
    xy, rng = grid(14), np.random.default_rng(seed)
    pattern = 1 + 0.8 * np.sin(xy[:, :1] / 250) * np.cos(xy[:, 1:] / 250)
    structured = rng.poisson(3 * pattern * np.ones(n_structured))
    noise = rng.negative_binomial(0.5, 0.05, (len(xy), n_noise))
    return sparse.csr_matrix(np.log1p(np.hstack([structured, noise])).astype(np.float32)), xy


def test_genes_with_a_pattern_are_chosen_over_noise():
    expression, xy = counts()
    chosen = choose_genes(expression, xy, n_genes=10)
    assert chosen.dtype == bool
    assert np.flatnonzero(chosen).tolist() == list(range(10))


@pytest.mark.parametrize("n", [1, 7, 70])
def test_as_many_genes_as_asked_for(n):
    expression, xy = counts()
    assert choose_genes(expression, xy, n_genes=n).sum() == n


def test_rare_genes_are_not_chosen():
    """Two spots side by side make a strong pattern of nearly nothing."""
    expression, xy = counts()
    rare = np.zeros((len(xy), 1), np.float32)
    near = np.hypot(*(xy - xy[100]).T).argsort()[: int(MIN_SHARE * len(xy)) - 1]
    rare[near] = 3
    assert morans_i(rare, xy)[0] > morans_i(expression, xy)[:10].max()
    both = sparse.hstack([rare, expression]).tocsr()
    assert not choose_genes(both, xy, n_genes=20)[0]
    # a small panel takes it in turn, but never a gene that was not seen at all
    nothing = sparse.hstack([both, np.zeros((len(xy), 3), np.float32)]).tocsr()
    assert choose_genes(nothing, xy, n_genes=74).tolist() == [True] * 71 + [False] * 3


def test_stored_zeros_are_not_expression():
    """A sparse table may store zeros: after subtraction, thinning or a mask."""
    expression, xy = counts()
    dense = expression.toarray()
    dense[:, 3] = 0
    stored = expression.copy()
    stored.data[stored.indices == 3] = 0
    want = choose_genes(sparse.csr_matrix(dense), xy, n_genes=70)
    assert not want[3]
    assert (choose_genes(stored, xy, n_genes=70) == want).all()


# ----------------------------------------------------------------------------------------------------- cross-fit


def spots(expression, xy, embedding=None):
    embedding = np.random.default_rng(5).standard_normal((len(xy), 6)) if embedding is None else embedding
    tensors = (torch.as_tensor(np.asarray(a), dtype=torch.float32) for a in (embedding, expression, xy))
    return Spots(*tensors, torch.zeros(len(xy), dtype=torch.int64), 100.0)


CLOSE = rounding.of_sum(36)
"""Of a mean over the spots below, of values below 1."""


def noise_spots(n=6, n_genes=4):
    rng = np.random.default_rng(0)
    return spots(rng.random((n * n, n_genes)), grid(n)), np.arange(n * n) % 3


def fit(s, head, fold, **more):
    return cross_fit(s, head=head, fold=fold, rng=np.random.default_rng(0), progress=False, **more)


def test_cross_fit_predicts_each_spot_from_the_other_folds():
    """With the gene mean this is known exactly."""
    s, fold = noise_spots()
    found = fit(s, "mean", fold)
    expression = s.expression.numpy()
    assert (found.fold == fold).all()
    for one in range(3):
        assert np.allclose(found.held_out[fold == one], expression[fold != one].mean(0), atol=CLOSE)


def test_a_head_that_is_not_a_network_goes_on_fitted_on_all_spots():
    s, fold = noise_spots()
    [(weight, head)] = fit(s, "mean", fold).heads
    assert weight == 1
    assert np.allclose(head.mean, s.expression.mean(0), atol=CLOSE)


def test_networks_of_all_folds_go_on():
    """Each is the one that predicted its fold."""
    s, fold = noise_spots()
    found = fit(s, "coordinates", fold, options={"n_steps": 20})
    assert [weight for weight, _ in found.heads] == pytest.approx([1 / 3] * 3)
    for one, (_, head) in enumerate(found.heads):
        rows = torch.as_tensor(np.flatnonzero(fold == one))
        said = head.predict(_places(s.take(rows)), context=s.take(torch.as_tensor(np.flatnonzero(fold != one))))
        assert np.allclose(found.held_out[fold == one], said.clamp_min(0), atol=CLOSE)


def test_which_heads_are_networks():
    assert {name for name in HEADS if get_head(name).ensembles_folds} == {
        "in-context",
        "aggregate",
        "published",
        "coordinates",
    }


def test_held_out_of_joined_heads_is_the_mean_of_theirs():
    s, fold = noise_spots()
    found = fit(s, "ridge + nearest+mean", fold, options={"nearest": {"n_neighbours": 3}})
    assert list(found.parts) == ["ridge", "nearest", "mean"]
    for name, part in found.parts.items():
        alone = fit(s, name, fold, options={"n_neighbours": 3} if name == "nearest" else None)
        assert (part == alone.held_out).all()
        assert alone.parts.keys() == {name}
        assert (alone.parts[name] == alone.held_out).all()
    mean = (found.parts["ridge"] + found.parts["nearest"] + found.parts["mean"]) / 3
    assert np.allclose(found.held_out, mean, atol=CLOSE)
    assert not np.allclose(found.held_out, found.parts["ridge"], atol=0.01)
    assert found.held_out.dtype == np.float32


@pytest.mark.parametrize(
    ("head", "weights"),
    [
        ("ridge", [("ridge", 1)]),
        ("ridge+nearest", [("ridge", 1 / 2), ("nearest", 1 / 2)]),
        ("coordinates+kriging", [("coordinates", 1 / 6)] * 3 + [("kriging", 1 / 2)]),
        ("mean+coordinates+ridge", [("mean", 1 / 3), *[("coordinates", 1 / 9)] * 3, ("ridge", 1 / 3)]),
    ],
)
def test_every_name_weighs_the_same_however_many_heads_it_has(head, weights):
    s, fold = noise_spots()
    options = {"coordinates": {"n_steps": 5}} if "coordinates" in head else None
    found = fit(s, head, fold, options=options)
    assert [h.name for _, h in found.heads] == [name for name, _ in weights]
    assert [w for w, _ in found.heads] == pytest.approx([w for _, w in weights])
    assert sum(w for w, _ in found.heads) == pytest.approx(1)


@pytest.mark.parametrize("head", ["in-context+kriging", "aggregate+ridge+coordinates"])
def test_any_number_of_workers_gives_the_same_digits(head):
    """One worker or three, and whatever somebody else draws from torch meanwhile; other seeds give other digits."""
    s, fold = noise_spots()
    options = {name: {"n_steps": 4} for name in head.split("+") if name != "ridge"}
    before, said = torch.get_num_threads(), []
    try:
        for n_threads in (1, 3):
            torch.set_num_threads(n_threads)
            torch.manual_seed(n_threads)
            state = torch.get_rng_state()
            found = fit(s, head, fold, options=options)
            assert torch.equal(torch.get_rng_state(), state)
            assert torch.get_num_threads() == n_threads
            said.append([found.held_out, *(t.numpy() for _, h in found.heads for t in h.state()[1].values())])
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*said, strict=True):
        np.testing.assert_array_equal(one, three)
    other = cross_fit(s, head=head, fold=fold, rng=np.random.default_rng(1), progress=False, options=options)
    assert not np.array_equal(other.held_out, said[0][0])


def test_no_heads_for_new_places_unless_they_are_wanted():
    s, fold = noise_spots()
    options = {"coordinates": {"n_steps": 5}}
    wanted, not_wanted = (fit(s, "coordinates+ridge", fold, options=options, final=f) for f in (True, False))
    assert len(wanted.heads) == 4
    assert not_wanted.heads == []
    assert (wanted.held_out == not_wanted.held_out).all()


def test_cross_fit_is_never_negative():
    """Ridge of genes near zero goes below it; expression does not."""
    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((60, 4))
    expression = np.clip(embedding[:, :2] - 0.5, 0, None)
    s = spots(expression, rng.random((60, 2)) * 1000, embedding)
    found = cross_fit(s, head="ridge", fold=np.arange(60) % 3, rng=rng)
    raw = found.heads[0][1].predict(_places(s), context=s)
    assert raw.min() < -0.05
    assert found.held_out.min() == 0


def _places(s):
    return Queries.of(s, hidden=False)


def test_cross_fit_passes_options_on():
    s, fold = noise_spots()
    assert [h.n_neighbours for _, h in fit(s, "nearest", fold, options={"n_neighbours": 3}).heads] == [3]
    both = fit(s, "mean+nearest", fold, options={"nearest": {"n_neighbours": 4}})
    assert both.heads[1][1].n_neighbours == 4


def test_unknown_heads_are_refused_before_anything_is_fitted(monkeypatch):
    s, fold = noise_spots()

    def never(*_, **__):
        pytest.fail("was fitted")

    monkeypatch.setattr(get_head("mean"), "fit", never)
    with pytest.raises(ValueError, match="head='rigde' is unknown"):
        fit(s, "mean+rigde", fold)


# ------------------------------------------------------------------------------------------------------- scores


def test_score_against_scipy_fold_by_fold():
    rng = np.random.default_rng(0)
    fold = np.repeat([0, 1, 2], [20, 25, 30])
    measured = rng.standard_normal((75, 6))
    predicted = 0.4 * measured + rng.standard_normal((75, 6))
    predicted[:, 5] = 1.0
    predicted += fold[:, None] * 50  # heads of different folds need not agree about the mean
    found = score(predicted, measured, fold=fold)
    for gene in range(5):
        r = [stats.pearsonr(predicted[fold == f, gene], measured[fold == f, gene]).statistic for f in range(3)]
        mean = np.average(r, weights=[20, 25, 30])
        assert found.pcc[gene] == pytest.approx(mean)
        assert found.mse[gene] == pytest.approx(((predicted[:, gene] - measured[:, gene]) ** 2).mean())
    assert found.pcc[5] == 0
    assert found.p_value[5] == pytest.approx(0.5)


def test_score_of_a_single_fold_is_pearsonr():
    rng = np.random.default_rng(0)
    measured = rng.standard_normal((40, 3))
    predicted = measured + rng.standard_normal((40, 3))
    found = score(predicted, measured, fold=np.zeros(40, int))
    for gene in range(3):
        expected = stats.pearsonr(predicted[:, gene], measured[:, gene], alternative="greater")
        assert found.pcc[gene] == pytest.approx(expected.statistic)
        assert found.p_value[gene] == pytest.approx(expected.pvalue)


def test_perfect_prediction():
    measured = np.random.default_rng(0).random((30, 2))
    found = score(measured, measured, fold=np.arange(30) % 3)
    assert found.pcc == pytest.approx([1, 1])
    assert found.mse.tolist() == [0, 0]
    assert np.isfinite(found.p_value).all()
    assert found.predictable.all()
    assert not score(-measured, measured, fold=np.arange(30) % 3).predictable.any()  # the wrong way round is no skill


def test_nothing_is_predictable_where_there_is_nothing_to_predict():
    """2000 genes of noise in 5 folds: no more small p-values than there should be, and next to no gene passes."""
    rng = np.random.default_rng(0)
    fold = random_folds(100, n_folds=5, rng=rng)
    found = score(rng.standard_normal((100, 2000)), rng.standard_normal((100, 2000)), fold=fold)
    assert (found.p_value < 0.05).mean() < 0.065
    assert (found.p_value < 0.001).mean() < 0.003
    assert found.predictable.sum() <= 2
    assert found.p_value[found.pcc.argsort()].tolist() == sorted(found.p_value, reverse=True)


@pytest.mark.parametrize(("head", "n_folds"), [("ridge", 3), ("ridge", 10), ("nearest", 3)])
def test_cross_fitted_noise_is_no_more_significant_than_it_should_be(head, n_folds):
    """Fold A predicts B from what B says of A: their correlations go up and down together."""
    rng = np.random.default_rng(0)
    fold = random_folds(196, n_folds=n_folds, rng=rng)
    s = spots(2 + rng.standard_normal((196, 2000)).clip(-2, 2), grid(14), rng.standard_normal((196, 10)))
    found = score(cross_fit(s, head=head, fold=fold, rng=rng).held_out, s.expression.numpy(), fold=fold)
    assert abs(found.pcc.mean()) < 0.01
    assert (found.p_value < 0.05).mean() < 0.065
    assert (found.p_value < 0.001).mean() < 0.004
    assert found.predictable.sum() <= 2


def test_false_discoveries_are_few_among_the_genes_that_pass():
    rng = np.random.default_rng(1)
    measured = rng.standard_normal((150, 1000))
    predicted = rng.standard_normal((150, 1000))
    predicted[:, :300] += 0.4 * measured[:, :300]
    found = score(predicted, measured, fold=random_folds(150, n_folds=5, rng=rng))
    passed = np.flatnonzero(found.predictable)
    assert (passed < 300).sum() > 200
    assert (passed >= 300).mean() < 0.08
    assert (found.predictable == (stats.false_discovery_control(found.p_value) <= 0.05)).all()
    assert isinstance(found, Scores)


def test_held_out_scores_of_noise_are_zero():
    """End to end: heads fitted on noise predict noise."""
    rng = np.random.default_rng(0)
    fold = random_folds(144, n_folds=4, rng=rng)
    s = spots(2 + rng.standard_normal((144, 60)).clip(-2, 2), grid(12), rng.standard_normal((144, 10)))
    for head in ("ridge", "nearest", "mean"):
        found = score(cross_fit(s, head=head, fold=fold, rng=rng).held_out, s.expression.numpy(), fold=fold)
        assert abs(found.pcc.mean()) < 0.05, head
        assert found.predictable.sum() <= 2, head


# ------------------------------------------------------------------------------------------------------ summary


def test_summary_uses_the_genes_of_each_fold():
    rng = np.random.default_rng(0)
    fold = np.repeat([0, 1], [30, 10])
    measured = rng.standard_normal((40, 4))
    predicted = measured.copy()
    predicted[:30, 0] = rng.standard_normal(30)  # bad where fold 0 does not look
    predicted[30:, 1] = -predicted[30:, 1]  # and where fold 1 does
    chosen = {0: np.array([False, True, True, False]), 1: np.array([True, True, False, False])}
    found = summary(predicted, measured, fold=fold, chosen=chosen.__getitem__)
    # fold 0: 1 and 1; fold 1: 1 and -1
    assert found["pcc"] == pytest.approx((30 * 1 + 10 * 0) / 40)
    wrong = ((2 * measured[30:, 1]) ** 2).mean()
    assert found["mse"] == pytest.approx((30 * 0 + 10 * wrong / 2) / 40)
    assert all(isinstance(v, float) for v in found.values())


def test_compare_scores_every_head_on_the_same_folds():
    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((80, 6))
    s = spots(3 + embedding[:, :3] * 0.5, rng.random((80, 2)) * 1000, embedding)
    fold = random_folds(80, n_folds=4, rng=rng)

    def everything(_):
        return np.ones(3, bool)

    found = compare(s, heads=("ridge", "nearest", "mean"), fold=fold, chosen=everything, rng=rng)
    assert list(found) == ["ridge", "nearest", "mean"]
    assert found["ridge"]["pcc"] > 0.95
    assert abs(found["nearest"]["pcc"]) < 0.3
    assert found["mean"]["pcc"] == 0
    assert found["mean"]["mse"] == pytest.approx(0.25, rel=0.3)
    again = cross_fit(s, head="ridge", fold=fold, rng=rng)
    assert found["ridge"] == summary(again.held_out, s.expression.numpy(), fold=fold, chosen=everything)
