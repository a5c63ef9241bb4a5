"""The heads on sections whose expression has a known cause, and the training loop under them."""

from __future__ import annotations

import copy
import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Kernel
from sklearn.linear_model import RidgeCV
from tests import rounding
from torch import nn

from histosge._heads import (
    DEFAULT_HEAD,
    HEADS,
    N_POSITION,
    Attention,
    Dense,
    Dropout,
    Gathered,
    Queries,
    Schedule,
    Spots,
    Tiles,
    encode_position,
    get_head,
    in_context,
    kriging,
    n_kernel_groups,
    one_thread,
    parts_of,
    principal,
    seeded,
    share_hyperparameters,
    side_by_side,
    standardise,
    standardiser,
    stopping_spots,
    train,
)
from histosge._heads import published as published_file
from histosge._model import cross_fit, score
from histosge._statistics import correlation

CPU = torch.device("cpu")
PITCH = 100.0
N_GENES = 8
# genes: 0-2 follow the image, 3-5 a smooth field that the image does not show, 6 is constant, 7 is noise
IMAGE, SPACE, CONSTANT, NOISE = slice(0, 3), slice(3, 6), 6, 7
FEW_STEPS = {
    **{"published": {"n_steps": 4}, "coordinates": {"n_steps": 40}},
    **{"in-context": {"n_steps": 30}, "aggregate": {"n_steps": 30}},
}
SEES_NEIGHBOURS = ("in-context", "aggregate", "kriging", "nearest")
NETWORKS = ("in-context", "published", "coordinates")
ANSWER = rounding.of_sum(500, scale=4)
"""Of a head's few products one after another, over a hundred numbers each, none beyond 4."""
every_head = pytest.mark.parametrize("name", sorted(HEADS))


def section(n_rows=12, n_cols=12, *, seed=0, n_embedding=12):
    """A hexagonal array; the embedding holds three hidden values of each spot among noise."""
    rng = np.random.default_rng(seed)
    row, col = (a.ravel() for a in np.meshgrid(np.arange(n_rows), np.arange(n_cols), indexing="ij"))
    xy = PITCH * np.column_stack([col + 0.5 * (row % 2), row * np.sqrt(0.75)])
    n = len(xy)
    hidden = rng.standard_normal((n, 3))
    embedding = np.column_stack([hidden * [1, 3, 0.7], 0.3 * rng.standard_normal((n, n_embedding - 3))])
    embedding = embedding @ np.linalg.qr(rng.standard_normal((n_embedding, n_embedding)))[0] + 3
    x, y = xy.T / PITCH
    expression = np.zeros((n, N_GENES))
    expression[:, IMAGE] = 2 + 0.6 * hidden
    expression[:, SPACE] = 2 + np.column_stack([np.sin(x / 2.2), np.cos(y / 2.0), np.sin((x + y) / 3)])
    expression[:, CONSTANT] = 1.5
    expression[:, NOISE] = 2 + rng.standard_normal(n)
    expression += 0.1 * rng.standard_normal(expression.shape) * (np.arange(N_GENES) != CONSTANT)
    expression = expression.clip(0)
    return spots_of(embedding, expression, xy)


def spots_of(embedding, expression, xy):
    """Spots of one section."""
    tensors = (torch.as_tensor(a, dtype=torch.float32) for a in (embedding, expression, xy))
    return Spots(*tensors, torch.zeros(len(xy), dtype=torch.int64), PITCH)


@pytest.fixture(scope="module")
def spots():
    return section()


@pytest.fixture(scope="module")
def small():
    """70 spots: where only what reaches what is tested, not how good it is."""
    return section(7, 10)


def fit(name, spots, *, seed=0, **options):
    """A head, its networks hardly trained unless options say otherwise."""
    return get_head(name)(**FEW_STEPS.get(name, {}) | options).fit(
        spots, rng=np.random.default_rng(seed), progress=False
    )


def split(spots, *, seed=0):
    """Three quarters to learn from, the rest to predict."""
    order = torch.as_tensor(np.random.default_rng(seed).permutation(len(spots)))
    quarter = len(spots) // 4
    return spots.take(order[quarter:].sort().values), spots.take(order[:quarter].sort().values)


@pytest.fixture(scope="module")
def trained(spots):
    """The default head, trained in full, with the spots it knows and those it does not."""
    known, held_out = split(spots)
    return fit("in-context", known, n_steps=300), known, held_out


def with_expression(spots, expression):
    return dataclasses.replace(spots, expression=expression)


def scores(head, known, held_out):
    predicted = head.predict(Queries.of(held_out, hidden=False), context=known)
    return correlation(predicted.numpy(), held_out.expression.numpy())


# ------------------------------------------------------------------------------------------------- all of them


def test_registry():
    assert set(HEADS) == {"in-context", "aggregate", "kriging", "published", "ridge", "coordinates", "nearest", "mean"}
    for name, head in HEADS.items():
        assert get_head(name) is head
        assert head.name == name


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("in_context", "in-context"), ("rigde", "ridge"), ("Nearest", "nearest"), ("publish", "published")],
)
def test_unknown_head_names_the_closest(wrong, meant):
    with pytest.raises(ValueError, match=rf"head='{wrong}' is unknown\. Did you mean '{meant}'\? Choose one of \["):
        get_head(wrong)


def test_unknown_head_without_a_closest():
    with pytest.raises(
        ValueError,
        match=r"head='xyz' is unknown\. Choose one of \['aggregate', 'coordinates', .*'in-context', .* with '\+'",
    ):
        get_head("xyz")
    with pytest.raises(TypeError, match=r"head=None is no head: it lacks \['name', .*subclass of histosge\.Head"):
        get_head(None)


def test_parts_are_named_in_the_order_given():
    assert parts_of("ridge") == ("ridge",)
    assert parts_of("ridge+in-context + mean") == ("ridge", "in-context", "mean")
    assert parts_of(DEFAULT_HEAD) == ("in-context", "kriging")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("ridge+krigin", r"head='krigin' is unknown\. Did you mean 'kriging'\?"),
        ("ridge+", "head='' is unknown"),
        ("+", "head='' is unknown"),
        ("", "head='' is unknown"),
        ("ridge+mean+ridge", r"head='ridge\+mean\+ridge' names a head twice\. Name each once"),
    ],
)
def test_impossible_parts_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        parts_of(wrong)


@every_head
def test_shape_dtype_and_range(name, small):
    head = fit(name, small)
    for places in (Queries.of(small), Queries.of(small).take(slice(3, 4))):
        out = head.predict(places, context=small)
        assert out.shape == (len(places), N_GENES)
        assert out.dtype == torch.float32
        assert torch.isfinite(out).all()
        assert not out.requires_grad
    assert (Queries.of(small).spot_index == torch.arange(70)).all()
    assert (Queries.of(small, hidden=False).spot_index == -1).all()


@every_head
def test_same_seed_same_head(name, small):
    """Whatever torch's own state is, and without touching it."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = fit(name, small, seed=5).predict(Queries.of(small), context=small)
    assert (torch.get_rng_state() == before).all()
    torch.manual_seed(2)
    assert (fit(name, small, seed=5).predict(Queries.of(small), context=small) == one).all()
    if name in NETWORKS:
        assert (fit(name, small, seed=6).predict(Queries.of(small), context=small) != one).any()


@every_head
def test_state_round_trip(name, small):
    import json

    from safetensors.torch import load, save

    head = fit(name, small)
    places = Queries.of(small)
    config, weights = head.state()
    stored = load(save({n: t.contiguous() for n, t in weights.items()})) if weights else {}
    restored = get_head(name).from_state(json.loads(json.dumps(config)), stored)
    one, other = (h.predict(places, context=small) for h in (restored, head))
    assert torch.allclose(one, other, atol=kriging_rounding(head, small) if name == "kriging" else ANSWER)
    again, _ = restored.state()
    assert again == config


@every_head
def test_a_restored_head_gives_the_very_same_numbers(name, small):
    head = fit(name, small)
    config, weights = head.state()
    assert all(t.is_contiguous() for t in weights.values())
    restored = get_head(name).from_state(config, {n: t.clone() for n, t in weights.items()})
    one, other = (h.predict(Queries.of(small), context=small) for h in (head, restored))
    assert (one == other).all()


@pytest.mark.parametrize("name", sorted(set(HEADS) - {"nearest"}))
def test_not_fitted(name, small):
    head = get_head(name)()
    for use in (lambda: head.predict(Queries.of(small), context=small), head.state):
        with pytest.raises(RuntimeError, match=rf"head '{name}' is not fitted: call fit\(\) first"):
            use()


@every_head
def test_a_place_does_not_see_its_own_measurement(name, small):
    """Change what was measured at a spot: nothing changes there, while around it something may."""
    head = fit(name, small)
    before = head.predict(Queries.of(small), context=small)
    expression = small.expression.clone()
    expression[33] = 9.0
    after = head.predict(Queries.of(small), context=with_expression(small, expression))
    assert (after[33] == before[33]).all()
    neighbours = (small.xy_um - small.xy_um[33]).norm(dim=1).argsort()[1:7]
    seen = (after[neighbours] != before[neighbours]).any(1)
    assert seen.all() if name in SEES_NEIGHBOURS else not seen.any()
    # without the mask it does see it: the mask is what hides it
    open_ = Queries.of(small, hidden=False)
    unmasked = [head.predict(open_, context=c)[33] for c in (small, with_expression(small, expression))]
    assert (unmasked[0] != unmasked[1]).any() == (name in SEES_NEIGHBOURS)


@pytest.mark.parametrize("name", [*sorted(HEADS), DEFAULT_HEAD])
def test_nothing_of_a_held_out_spot_reaches_its_fold(name, small):
    """The leak that makes scores worthless: held-out measurements changed, held-out predictions must not."""
    fold = np.arange(len(small)) % 2
    inside = torch.as_tensor(fold == 0)
    expression = torch.where(inside[:, None], small.expression.flip(0) * 3 + 1, small.expression)

    def held_out(s):
        options = FEW_STEPS.get(name)
        rng = np.random.default_rng(0)
        return cross_fit(s, head=name, fold=fold, rng=rng, options=options, progress=False, final=False).held_out

    before, after = held_out(small), held_out(with_expression(small, expression))
    assert (after[fold == 0] == before[fold == 0]).all()
    assert (after[fold == 1] != before[fold == 1]).any()  # which were learnt from the changed ones


@every_head
def test_order_of_the_context_does_not_matter(name, small):
    # no two neighbours equally far, of which either may be the last one looked at
    aside = torch.as_tensor(np.random.default_rng(1).random((70, 2)), dtype=torch.float32)
    small = dataclasses.replace(small, xy_um=small.xy_um + aside)
    head = fit(name, small)
    order = torch.as_tensor(np.random.default_rng(0).permutation(len(small)))
    places = Queries.of(small)
    shuffled = dataclasses.replace(places, spot_index=order.argsort())
    one, other = head.predict(places, context=small), head.predict(shuffled, context=small.take(order))
    assert torch.allclose(one, other, atol=kriging_rounding(head, small) if name == "kriging" else ANSWER)


@every_head
def test_no_places_no_rows(name, small):
    none = Queries.of(small).take(slice(0, 0))
    assert fit(name, small).predict(none, context=small).shape == (0, N_GENES)


@every_head
def test_constant_gene_and_constant_column(name, small):
    """Neither divides by a spread of zero; a gene that never varies is predicted as it is."""
    embedding = small.embedding.clone()
    embedding[:, 4] = 7.0
    flat = dataclasses.replace(small, embedding=embedding)
    out = fit(name, flat).predict(Queries.of(flat), context=flat)
    assert torch.isfinite(out).all()
    assert out[:, CONSTANT] == pytest.approx(1.5, abs=0.3 if name == "published" else 1e-3)


@every_head
def test_one_gene_and_fewest_spots(name):
    """15 spots are left where half of the fewest allowed are held out."""
    one = section(3, 5)
    one = with_expression(one, one.expression[:, :1])
    out = fit(name, one).predict(Queries.of(one), context=one)
    assert out.shape == (15, 1)
    assert torch.isfinite(out).all()


@every_head
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")  # scikit-learn's, ridge
def test_nothing_to_learn_from(name, small):
    """Every gene and every column constant: a head may say the mean, and nothing that is not a number."""
    blank = spots_of(torch.full((40, 5), 2.0), torch.full((40, 3), 1.0), small.xy_um[:40])
    out = fit(name, blank).predict(Queries.of(blank), context=blank)
    assert torch.allclose(out, torch.ones(40, 3), atol=0.3)


@pytest.mark.parametrize(
    "name",
    [
        DEFAULT_HEAD,
        *sorted(set(HEADS) - {*parts_of(DEFAULT_HEAD), "published"}),
        pytest.param("published", marks=pytest.mark.slow),
    ],
)
def test_permuted_labels_are_not_predicted(name, spots):
    """Expression of another spot: what is left is noise, of 1 / sqrt(n) for each gene, twice its variance in folds."""
    options = {"n_steps": 20} if name == "published" else None
    rng = np.random.default_rng(7)
    order, fold = torch.as_tensor(rng.permutation(len(spots))), np.arange(len(spots)) % 2
    noise, truth = with_expression(spots, spots.expression[order]), spots
    varies = np.arange(N_GENES) != CONSTANT
    limit = 3 * np.sqrt(2 / (len(spots) * varies.sum()))

    def found(s):
        fitted = cross_fit(s, head=name, fold=fold, rng=rng, options=options, progress=False, final=False)
        said = {"all": fitted.held_out, **fitted.parts}
        return {n: score(p, s.expression.numpy(), fold=fold).pcc[varies].mean() for n, p in said.items()}

    assert all(abs(pcc) < limit for pcc in found(noise).values())
    if name != "mean":  # … which is not because it cannot predict
        assert all(pcc > limit for pcc in found(truth).values())


@every_head
def test_places_are_predicted_the_same_in_whatever_company(name, small):
    """Alone, in any order, and split into calls in any way."""
    head = fit(name, small)
    places = Queries.of(small).take(torch.as_tensor(np.random.default_rng(0).permutation(70)))
    at_once = head.predict(places, context=small)
    tolerance = kriging_rounding(head, small) if name == "kriging" else ANSWER
    for n in (1, 33):
        parts = [head.predict(places.take(slice(i, i + n)), context=small) for i in range(0, 70, n)]
        assert torch.allclose(torch.cat(parts), at_once, atol=tolerance)


def test_spots_and_queries_move_together(small):
    moved = small.to("meta")
    assert {t.device.type for t in (moved.embedding, moved.expression, moved.xy_um, moved.section)} == {"meta"}
    assert moved.pitch_um == PITCH
    for hidden in (True, False):
        assert Queries.of(moved, hidden=hidden).spot_index.device.type == "meta"


@every_head
def test_a_fitted_head_moves_and_stays_where_it_was(name, small):
    head = fit(name, small)
    assert head.to("cpu") is head
    moved = head.to("meta")
    assert all(tensor.device.type == "meta" for tensor in moved.state()[1].values())
    assert all(tensor.device.type == "cpu" for tensor in head.state()[1].values())
    assert (moved is head) == (not head.state()[1])  # only what has weights


@every_head
def test_prediction_changes_nothing_in_a_head(name, small):
    """Predict with one context and then another: as a head that has never seen the first."""
    head = fit(name, small)
    before = {n: tensor.clone() for n, tensor in head.state()[1].items()}
    places = Queries.of(small, hidden=False)
    for shift in (0, 1, 2):
        context = with_expression(small, small.expression.roll(shift, 0))
        fresh = get_head(name).from_state(*head.state())
        assert (head.predict(places, context=context) == fresh.predict(places, context=context)).all()
    assert all(torch.equal(tensor, before[n]) for n, tensor in head.state()[1].items())


# --------------------------------------------------------------------------------------------- several sections


def two_sections(one, other, *, numbers=(0, 1)):
    """Both in their own coordinates, so that one lies on the other."""
    pairs = ((getattr(one, n), getattr(other, n)) for n in ("embedding", "expression", "xy_um"))
    number = torch.tensor(numbers).repeat_interleave(torch.tensor([len(one), len(other)]))
    return Spots(*(torch.cat(pair) for pair in pairs), number, PITCH)


@pytest.mark.parametrize("name", SEES_NEIGHBOURS)
def test_neighbours_are_of_the_section(name, small):
    """What is measured on another section at the same places reaches no place as a neighbour."""
    head, other = fit(name, small), section(7, 10, seed=9)
    places = Queries.of(small)
    both = two_sections(small, other)
    raised = two_sections(small, with_expression(other, other.expression + 3))
    before, after = (head.predict(places, context=c) for c in (both, raised))
    if name == "kriging":  # which reads spots that look alike, wherever they are
        assert (before - after).abs().max() > 0.01
        flat = dataclasses.replace(head.space, image_axes=torch.zeros_like(head.space.image_axes))
        shares = head.parameters["shares"].clone()
        shares[1] = shares[3] = -torch.inf
        head.space, head.parameters = flat, head.parameters | {"shares": shares}
        before, after = (head.predict(places, context=c) for c in (both, raised))
        assert torch.allclose(before, after, atol=1e-4)
    else:
        assert (before == after).all()
        assert torch.allclose(before, head.predict(places, context=small), atol=ANSWER)
    # … but places of the other section do see it
    there = dataclasses.replace(places, section=places.section + 1, spot_index=torch.full_like(places.spot_index, -1))
    assert (head.predict(there, context=both) != head.predict(there, context=raised)).any(1).all()


@pytest.mark.parametrize("name", SEES_NEIGHBOURS)
def test_a_spot_is_hidden_in_its_own_section(name, small):
    other = section(7, 10, seed=9)
    head, both = fit(name, small), two_sections(other, small)
    places = Queries.of(both)
    before = head.predict(places, context=both)
    expression = both.expression.clone()
    expression[70 + 33] = 9.0
    after = head.predict(places, context=with_expression(both, expression))
    assert (after[70 + 33] == before[70 + 33]).all()
    assert (after[70:] != before[70:]).any()


@pytest.mark.parametrize("name", sorted(set(HEADS) - {"nearest"}))
def test_a_section_without_measured_spots(name, small):
    """No context spot has its number: the same as if all of them were too far away to be neighbours."""
    head = fit(name, small)
    alone = dataclasses.replace(Queries.of(small, hidden=False), section=torch.full((70,), -1))
    found = head.predict(alone, context=small)
    assert torch.isfinite(found).all()
    if name in ("in-context", "aggregate", "kriging"):
        far = dataclasses.replace(Queries.of(small, hidden=False), xy_um=small.xy_um + 1e6)
        assert torch.allclose(found, head.predict(far, context=small), atol=1e-4)
        assert (found - head.predict(Queries.of(small, hidden=False), context=small)).abs().max() > 0.05


def test_nearest_of_a_section_without_measured_spots(small):
    alone = dataclasses.replace(Queries.of(small, hidden=False), section=torch.full((70,), -1))
    with pytest.raises(ValueError, match="needs measured spots around every target"):
        fit("nearest", small).predict(alone, context=small)


@pytest.mark.parametrize("name", sorted(set(HEADS) - {"published", "coordinates"}))
def test_numbers_of_sections_are_only_names(name, small):
    other = section(7, 10, seed=9)
    found = []
    for numbers in ((0, 1), (7, 3)):
        both = two_sections(small, other, numbers=numbers)
        found.append(fit(name, both).predict(Queries.of(both), context=both))
    assert torch.allclose(*found, atol=1e-3)


@pytest.mark.parametrize("name", ["published", "coordinates"])
def test_positions_are_those_of_the_section(name, small):
    """Heads that see absolute positions see the same for the same place of any section."""
    head, both = fit(name, small), two_sections(small, small)
    out = head.predict(Queries.of(both), context=both)
    assert torch.allclose(out[:70], out[70:], atol=ANSWER)


# ---------------------------------------------------------------------------------------------- the simple ones


def test_mean_is_the_mean(small):
    out = fit("mean", small).predict(Queries.of(small), context=small)
    assert torch.allclose(out, small.expression.mean(0).expand(70, -1))


def test_nearest_against_brute_force(small):
    rng = np.random.default_rng(0)
    xy = torch.as_tensor(rng.random((25, 2)) * 700, dtype=torch.float32)
    own = torch.as_tensor(np.where(rng.random(25) < 0.5, rng.integers(0, 70, 25), -1))
    out = fit("nearest", small).predict(Queries(small.embedding[:25], xy, small.section[:25], own), context=small)
    for i in range(25):
        far = (small.xy_um.double() - xy[i].double()).norm(dim=1)
        if own[i] >= 0:
            far[own[i]] = torch.inf
        rows = far.argsort()[:20]
        weight = 1 / far[rows]
        expected = (weight[:, None] * small.expression[rows].double()).sum(0) / weight.sum()
        assert torch.allclose(out[i].double(), expected, atol=1e-4)


def test_nearest_on_top_of_a_spot_takes_its_value(small):
    out = fit("nearest", small).predict(Queries.of(small, hidden=False), context=small)
    assert (out - small.expression).abs().max() < 0.05
    assert scores(fit("nearest", small), small, small).min() >= 0  # no division by a distance of zero


def test_nearest_without_context(small):
    head = fit("nearest", small)
    with pytest.raises(ValueError, match="needs measured spots around every target"):
        head.predict(Queries.of(small, hidden=False), context=small.take(torch.arange(0)))
    with pytest.raises(ValueError, match="needs measured spots around every target"):
        head.predict(Queries.of(small.take(torch.arange(1))), context=small.take(torch.arange(1)))


def test_nearest_works_with_fewer_spots_than_it_asks_for(small):
    few = small.take(torch.arange(3))
    out = fit("nearest", small).predict(Queries.of(small, hidden=False), context=few)
    assert (out >= few.expression.min(0).values - 1e-5).all()
    assert (out <= few.expression.max(0).values + 1e-5).all()


def test_ridge_against_leave_one_out_by_hand(small):
    """Standardise, rotate, and choose the penalty by refitting without each spot in turn."""
    from scipy.linalg import svd

    x = small.embedding.double().numpy()
    x = np.clip((x - x.mean(0)) / x.std(0, ddof=1), -5, 5)
    y = small.expression.double().numpy()
    middle = x.mean(0)
    axes = svd(x - middle, full_matrices=False)[2][: min(70 // 4, 12)]
    z = (x - middle) @ axes.T

    def solve(z, y, penalty):
        zc, yc = z - z.mean(0), y - y.mean(0)
        slope = np.linalg.solve(zc.T @ zc + penalty * np.eye(z.shape[1]), zc.T @ yc)
        return slope, y.mean(0) - z.mean(0) @ slope

    def left_out(penalty):
        error = 0.0
        for i in range(len(z)):
            rest = np.arange(len(z)) != i
            slope, offset = solve(z[rest], y[rest], penalty)
            error += ((z[i] @ slope + offset - y[i]) ** 2).sum()
        return error

    penalty = min(np.logspace(-1, 7, 25), key=left_out)
    assert 0.1 < penalty < 1e7
    slope, offset = solve(z, y, penalty)
    out = fit("ridge", small).predict(Queries.of(small), context=small)
    assert np.abs(out.numpy() - (z @ slope + offset)).max() < 1e-4


@pytest.mark.parametrize(("n", "d", "n_genes"), [(90, 12, 7), (60, 200, 1), (90, 3, 40)])
def test_ridge_against_scikit_learn(n, d, n_genes):
    """Principal components and penalty, more columns than spots too."""
    rng = np.random.default_rng(n + d)
    x = rng.standard_normal((n, d)) * 0.9 ** np.arange(d) + 2
    y = x[:, :3] @ rng.standard_normal((3, n_genes)) + 0.5 * rng.standard_normal((n, n_genes)) + 5
    s = spots_of(x, y, rng.random((n, 2)))
    scaled = standardise(s.embedding, *standardiser(s.embedding)).double().numpy()
    pca = PCA(min(n // 4, d), svd_solver="full").fit(scaled)
    ridge = RidgeCV(np.logspace(-1, 7, 25)).fit(pca.transform(scaled), s.expression.double().numpy())
    expected = ridge.predict(pca.transform(scaled)).reshape(n, n_genes)
    assert 0.1 < ridge.alpha_ < 1e7
    assert np.abs(fit("ridge", s).predict(Queries.of(s), context=s).numpy() - expected).max() < 1e-4


def test_ridge_finds_what_the_image_shows_and_nothing_else(spots):
    known, held_out = split(spots)
    found = scores(fit("ridge", known), known, held_out)
    assert found[IMAGE].min() > 0.9
    assert np.abs(found[SPACE]).max() < 0.5


def test_one_wild_embedding_does_not_run_away(spots):
    """A pen mark: a thousand spreads away, clipped at five."""
    mean, spread = standardiser(spots.embedding)
    wild = standardise(spots.embedding * 1000, mean, spread)
    assert wild.abs().max() == 5
    known, held_out = split(spots)
    marked = dataclasses.replace(held_out, embedding=held_out.embedding * 1000)
    assert fit("ridge", known).predict(Queries.of(marked, hidden=False), context=known).abs().max() < 30


# ---------------------------------------------------------------------------------------------------- in context


def test_in_context_uses_image_and_neighbours(trained):
    """Each simple head is blind to one cause; the default head sees both."""
    head, known, held_out = trained
    found = scores(head, known, held_out)
    ridge, nearest = (scores(fit(name, known), known, held_out) for name in ("ridge", "nearest"))
    assert found[IMAGE].mean() > 0.7
    assert nearest[IMAGE].mean() < 0.4
    assert found[SPACE].mean() > 0.8
    assert ridge[SPACE].mean() < 0.4
    predicted = head.predict(Queries.of(held_out, hidden=False), context=known)
    error = ((predicted - held_out.expression) ** 2).mean(0)
    assert (error[:6] < 0.6 * held_out.expression.var(0)[:6]).all()  # … and beats the mean


def test_in_context_reads_the_context_it_is_given(trained):
    """Measured somewhere else: add one to a gene of all neighbours, and the prediction follows."""
    head, known, held_out = trained
    places = Queries.of(held_out, hidden=False)
    before = head.predict(places, context=known)
    raised = known.expression.clone()
    raised[:, SPACE] += 1
    after = head.predict(places, context=with_expression(known, raised))
    assert (after - before)[:, SPACE].mean() > 0.3


def test_in_context_works_with_thinned_context(trained):
    """One head for every distance: worse with fewer neighbours, useful down to none."""
    head, known, held_out = trained
    places = Queries.of(held_out, hidden=False)
    order = torch.as_tensor(np.random.default_rng(0).permutation(len(known)))
    found = {}
    for n in (len(known), 27, 1):
        context = known.take(order[:n])
        out = head.predict(places, context=context)
        assert torch.isfinite(out).all()
        found[n] = correlation(out.numpy(), held_out.expression.numpy())
    assert found[27][SPACE].mean() > 0.2
    assert found[len(known)][SPACE].mean() > found[27][SPACE].mean() > found[1][SPACE].mean()
    assert found[1][IMAGE].mean() > 0.6  # the image is still there


def test_in_context_without_any_visible_neighbour(trained):
    """The only spot of the context is the place itself, and hidden: nothing of it is read."""
    head, known, _ = trained
    one = known.take(torch.arange(1))
    places = Queries.of(one)
    out = head.predict(places, context=one)
    other = head.predict(places, context=with_expression(one, one.expression + 5))
    assert torch.isfinite(out).all()
    assert (out == other).all()
    with pytest.raises(ValueError, match="no measured spots as context"):
        head.predict(places, context=known.take(torch.arange(0)))


def test_in_context_does_not_read_spots_beyond_twenty_pitches(trained):
    """Other sections, and the far side of a hole."""
    head, known, held_out = trained
    place = Queries.of(held_out, hidden=False).take(slice(0, 1))

    def said(pitches, *, raised=0.0):
        one = known.take(torch.arange(1))
        one = dataclasses.replace(one, xy_um=place.xy_um + torch.tensor([pitches * PITCH, 0.0]))
        return head.predict(place, context=with_expression(one, one.expression + raised))

    assert (said(20.1) == said(20.1, raised=5)).all()
    assert (said(19.9) != said(19.9, raised=5)).any()
    assert (said(20.1) == said(3000)).all()


def test_in_context_far_from_all_spots_answers_as_without_any(trained):
    head, known, held_out = trained
    places = Queries.of(dataclasses.replace(held_out, xy_um=held_out.xy_um + 1e5), hidden=False)
    far = head.predict(places, context=known)
    one = held_out.take(torch.arange(1))  # … of which the only one is the place itself
    alone = [head.predict(dataclasses.replace(p, spot_index=torch.tensor([0])), context=one) for p in each(places)]
    assert torch.allclose(far, torch.cat(alone), atol=ANSWER)
    near = head.predict(Queries.of(held_out, hidden=False), context=known)
    assert (far - near).abs().mean() > 0.05


def each(places):
    return [places.take(slice(i, i + 1)) for i in range(len(places))]


@pytest.mark.parametrize("shift", [(12_345.0, -678.0), (2e5, 0.0)])
def test_in_context_is_the_same_anywhere(trained, shift):
    """Only relative positions are seen."""
    head, known, held_out = trained
    moved = [dataclasses.replace(s, xy_um=s.xy_um + torch.tensor(shift)) for s in (known, held_out)]
    # to the last micrometre: a float32 at 2e5 µm has a hundredth
    one = head.predict(Queries.of(held_out, hidden=False), context=known)
    other = head.predict(Queries.of(moved[1], hidden=False), context=moved[0])
    assert (one - other).abs().median() < 1e-3
    far = Queries.of(dataclasses.replace(held_out, xy_um=moved[1].xy_um), hidden=False)
    assert (head.predict(far, context=known) - one).abs().median() > 0.01  # unless only the places move


def test_in_context_sees_distances_in_pitches(trained):
    """The same section at twice the pitch is the same section."""
    head, known, held_out = trained
    one = head.predict(Queries.of(held_out, hidden=False), context=known)
    wide = [dataclasses.replace(s, xy_um=s.xy_um * 2, pitch_um=2 * PITCH) for s in (known, held_out)]
    assert torch.allclose(head.predict(Queries.of(wide[1], hidden=False), context=wide[0]), one, atol=1e-3)


def slow_attention(network, place, spots, components, position, present):
    """Attention written plainly: each place (B) computes keys and values of its own neighbours (B, K), positions too."""
    b, k, _ = spots.shape
    x = network.embed(place)
    each = network.norm_spot(network.embed(spots) + network.express(components))
    both = network.key_value(each) + network.position(position)
    key, value = both.view(b, k, 2, network.n_heads, x.shape[1] // network.n_heads).unbind(2)
    query = network.query(network.norm_place(x)).view(b, network.n_heads, -1)
    score = torch.einsum("bhc,bkhc->bhk", query, key) / query.shape[-1] ** 0.5
    weight = score.masked_fill(~present[:, None], torch.finfo(score.dtype).min).softmax(-1) * present[:, None]
    neighbours = torch.einsum("bhk,bkq,hq->bq", weight, components, network.mix.softmax(0))
    x = x + network.merge(torch.einsum("bhk,bkhc->bhc", weight, value).flatten(1))
    x = x + network.mlp(network.norm_mlp(x))
    return network.image_path(place) + neighbours * network.neighbour_path + network.correction(x)


def slow_prediction(head, places, context):
    """What in-context predicts, its neighbours found and its attention computed place by place."""
    k, scale = head.config["n_neighbours"], 3 / head.space.image_spread[0]
    image, spots = (head.space.image(w.embedding) * scale for w in (places, context))
    components, out = head.space.components(context.expression), []
    for i in range(len(places)):
        step = (context.xy_um - places.xy_um[i]) / PITCH
        distance = step.norm(dim=1).index_fill(0, places.spot_index[i : i + 1].clamp_min(0), torch.inf)
        distance = distance if places.spot_index[i] >= 0 else step.norm(dim=1)
        rows = distance.argsort()[:k]
        rows = rows[distance[rows] <= 20]
        seen = torch.ones(1, len(rows), dtype=torch.bool)
        around = spots[rows][None], components[rows][None], encode_position(step[rows])[None], seen
        out.append(slow_attention(head.network, image[i : i + 1], *around))
    return head.space.genes(torch.cat(out))


@pytest.mark.parametrize("n_context", [108, 12, 1])
@pytest.mark.parametrize("at_once", [512, 10])
def test_in_context_in_prediction_is_what_was_trained(trained, n_context, at_once):
    """Keys and values once a spot, the position taken apart: the same sums; with few neighbours and none, far and near."""
    head, known, held_out = trained

    def predict(places):
        def run(predict_some, pieces):
            return map(predict_some, [some for piece in pieces for some in piece.split(at_once)])

        return head.space.genes(head.components([head], [head.condition(context)], places, run=run)[0])

    # no two neighbours equally far, of which either may be the last one that is read
    aside = torch.as_tensor(np.random.default_rng(1).random((len(known), 2)), dtype=torch.float32)
    context = dataclasses.replace(known, xy_um=known.xy_um + aside).take(torch.arange(n_context))
    far = dataclasses.replace(held_out, xy_um=held_out.xy_um * 3 - 500)
    own = torch.arange(n_context)
    for places in (Queries.of(held_out, hidden=False), Queries.of(far, hidden=False), Queries.of(context)):
        out = predict(places)
        with torch.inference_mode():
            assert torch.allclose(out, slow_prediction(head, places, context), atol=ANSWER)
    shuffled = own.flip(0).repeat(-(-1100 // n_context))  # more than are predicted together
    assert torch.allclose(head.predict(places.take(shuffled), context=context), out[shuffled], atol=ANSWER)


@pytest.mark.parametrize("m", [1, 3])
def test_attention_in_training_is_the_plain_one(m):
    """Keys and values once a spot, the position taken apart: predictions and slopes as if each place computed its own."""
    torch.manual_seed(0)
    n, b, k = 40, 12, 6
    network = Attention(5, 3, 16, 4, 0.2).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    place, spots, components = torch.randn(b, m, 5), torch.randn(n, 5), torch.randn(n, 3)
    near, position = torch.randint(n, (b, k)), torch.randn(b, m, k, N_POSITION)
    present = torch.rand(b, m, k) > 0.5
    found = []
    for seen in (present, torch.zeros_like(present)):  # and with no context at all
        seen[0] = False
        slow = [
            slow_attention(network, place[:, j], spots[near], components[near], position[:, j], seen[:, j])
            for j in range(m)
        ]
        fast = network(place, spots, components, near=near, position=position, present=seen)
        for predicted in (torch.stack(slow, 1), fast):
            slopes = torch.autograd.grad(predicted.square().sum(), list(network.parameters()))
            found.append((predicted, torch.cat([slope.flatten() for slope in slopes])))
        torch.testing.assert_close(*found[-2:], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[0][0], found[2][0])


def test_dense_and_gathered_neighbours_are_the_same():
    torch.manual_seed(0)
    network = Attention(5, 3, 16, 4, 0.2).eval()
    place, spots, components = torch.randn(12, 5), torch.randn(9, 5), torch.randn(9, 3)
    at, position, present = torch.randint(9, (12, 6)), torch.randn(12, 6, N_POSITION), torch.rand(12, 6) > 0.5
    with torch.inference_mode():
        known = network.keys_values(spots, components)
        found = [network.attend(place, position, present, way(known, components, at)) for way in (Dense, Gathered)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["in-context", "kriging"])
def test_one_condition_serves_any_number_of_calls(name, trained, kriged):
    head, known, held_out = trained if name == "in-context" else kriged
    places, condition = Queries.of(held_out, hidden=False), head.condition(known)
    parts = [head.components([head], [condition], places.take(slice(i, i + 7)))[0] for i in range(0, len(places), 7)]
    (at_once,) = head.components([head], [head.condition(known)], places)
    tolerance = kriging_rounding(head, known) if name == "kriging" else ANSWER
    assert torch.allclose(torch.cat(parts), at_once, atol=tolerance)


def test_places_that_are_predicted_together_lie_together():
    """A plane of 40 x 40 pitches in any order, 100 places at once: about their share of the plane, and not all of it."""
    xy = np.random.default_rng(0).random((3200, 2)) * 40 * PITCH
    order = in_context._along_strips(xy, np.zeros(3200, np.int64), width_um=5 * PITCH)
    assert sorted(order) == list(range(3200))
    wide = [np.ptp(xy[rows], axis=0) / PITCH for rows in np.split(order, 32)]
    assert np.max(wide, axis=0)[1] <= 10
    assert np.median(wide, axis=0).prod() < 150


@settings(deadline=None, max_examples=25)
@given(st.floats(-30, 30), st.floats(-30, 30))
def test_position_code_is_continuous(x, y):
    a = torch.tensor([[x, y]], dtype=torch.float64)
    code = encode_position(a)
    assert code.shape == (1, N_POSITION)
    assert (encode_position(a + 1e-6) - code).abs().max() < 1e-4
    published = published_file.encode_position(a)
    assert published.shape == (1, 24)
    assert (published_file.encode_position(a + 1e-6) - published).abs().max() < 1e-4


def test_position_code_tells_directions_apart():
    steps = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1], [2, 0], [0.5, 0.5]])
    code = encode_position(steps)
    assert torch.cdist(code, code).add(torch.eye(6)).min() > 0.3


def test_principal_components_against_exact_svd():
    values = torch.as_tensor(np.random.default_rng(0).standard_normal((60, 30)) @ np.diag(0.8 ** np.arange(30.0)))
    torch.manual_seed(0)
    mean, axes, spread = principal(values, 5)
    _, size, exact = torch.linalg.svd(values - values.mean(0), full_matrices=False)
    assert torch.allclose(mean, values.mean(0))
    assert torch.allclose(spread, size[:5] / 59**0.5, rtol=1e-4)
    assert torch.allclose((axes * exact[:5]).sum(1).abs(), torch.ones(5, dtype=values.dtype), atol=1e-3)
    # the sign is fixed by the largest entry
    assert (axes.gather(1, axes.abs().argmax(1, keepdim=True)) > 0).all()


# ------------------------------------------------------------------------------------------------------- kriging


class Covariance(Kernel):
    """Kriging's covariance in float64: positions in pitches are the first two columns, the image is the others."""

    def __init__(self, lengths, shares):
        self.lengths, self.shares = lengths, shares

    def __call__(self, a, b=None, eval_gradient=False):
        b = a if b is None else b
        apart = np.hypot(*(a[:, None, :2] - b[None, :, :2]).transpose(2, 0, 1))
        unlike = ((a[:, None, 2:] - b[None, :, 2:]) ** 2).sum(-1)
        near, image, both_near, both_image = self.lengths
        return (
            self.shares[0] * np.exp(-apart / near)
            + self.shares[1] * np.exp(-unlike / (2 * image**2))
            + self.shares[2] * np.exp(-apart / both_near) * np.exp(-unlike / (2 * both_image**2))
            + self.shares[3] * a[:, 2:] @ b[:, 2:].T
        )

    def diag(self, a):
        return self.shares[:3].sum() + self.shares[3] * (a[:, 2:] ** 2).sum(1)

    def is_stationary(self):
        return False


def oracle(head, spots, q):
    """scikit-learn's Gaussian process of component ``q``, lengths and shares as they are."""
    lengths, shares = (head.parameters[name].double().exp().numpy() for name in ("lengths", "shares"))
    process = GaussianProcessRegressor(Covariance(lengths, shares[:4, q]), alpha=shares[4, q] + 1e-4, optimizer=None)
    return process.fit(inputs(head, spots), components(head, spots)[:, q])


def inputs(head, where):
    """Positions in pitches, and image components over their common spread, in float64."""
    s = {name: tensor.double() for name, tensor in head.space.state().items()}
    scaled = ((where.embedding.double() - s["mean"]) / s["spread"]).clamp(-5, 5)
    image = (scaled - s["image_mean"]) @ s["image_axes"].T / s["image_spread"].norm()
    return np.hstack([where.xy_um.double().numpy() / PITCH, image.numpy()])


def components(head, spots):
    s = {name: tensor.double() for name, tensor in head.space.state().items()}
    return ((spots.expression.double() - s["gene_mean"]) @ s["gene_axes"].T / s["gene_spread"]).numpy()


def kriging_rounding(head, spots):
    """How far rounding may move what is said of a gene, given these spots."""
    lengths, shares = (head.parameters[name].double().exp().numpy() for name in ("lengths", "shares"))
    at, target = inputs(head, spots), components(head, spots)
    moved = [
        rounding.of_solve(Covariance(lengths, share[:4])(at) + (share[4] + 1e-4) * np.eye(len(at)), target[:, q])
        for q, share in enumerate(shares.T)
    ]
    return float(np.linalg.norm(moved * head.space.state()["gene_spread"].numpy()))


def to_genes(head, components):
    s = {name: tensor.double().numpy() for name, tensor in head.space.state().items()}
    return (components * s["gene_spread"]) @ s["gene_axes"] + s["gene_mean"]


def resized(head, **sizes):
    """The same head, which conditions on other numbers of spots."""
    config, weights = head.state()
    return get_head("kriging").from_state({**config, **sizes}, weights)


@pytest.fixture(scope="module")
def kriged(spots):
    """Kriging, with the spots it knows and those it does not."""
    known, held_out = split(spots)
    return resized(fit("kriging", known, n_exact=50), n_exact=6000), known, held_out  # as of many, predicted as of few


def test_kriging_against_scikit_learn_at_new_places(kriged):
    head, known, held_out = kriged
    moved = dataclasses.replace(held_out, xy_um=held_out.xy_um + torch.tensor([31.0, -17.0]))
    out = head.predict(Queries.of(moved, hidden=False), context=known)
    n = len(head.space.gene_axes)
    expected = np.column_stack([oracle(head, known, q).predict(inputs(head, moved)) for q in range(n)])
    assert np.abs(expected).max() > 1
    assert np.abs(out.numpy() - to_genes(head, expected)).max() < 1e-3


def test_kriging_of_another_context_against_scikit_learn(kriged):
    """Lengths and shares are of the spots learnt from, and what is measured is of the context alone."""
    head, known, held_out = kriged
    out = head.predict(Queries.of(known, hidden=False), context=held_out)
    n = len(head.space.gene_axes)
    expected = np.column_stack([oracle(head, held_out, q).predict(inputs(head, known)) for q in range(n)])
    assert np.abs(out.numpy() - to_genes(head, expected)).max() < 1e-3


def test_kriging_leaves_a_spot_out_as_if_it_had_never_been_there(kriged):
    """All at once, by one inverse, what refitting without each of the spots says, lengths and shares held."""
    head, known, _ = kriged
    at_once = head.predict(Queries.of(known), context=known).numpy()
    n = len(head.space.gene_axes)
    for i in range(0, len(known), 9):
        rest, alone = known.take(torch.arange(len(known)) != i), known.take(torch.tensor([i]))
        without = head.predict(Queries.of(alone, hidden=False), context=rest).numpy()[0]
        assert np.abs(at_once[i] - without).max() < kriging_rounding(head, known)
        if i < 20:
            expected = np.array([oracle(head, rest, q).predict(inputs(head, alone))[0] for q in range(n)])
            assert np.abs(at_once[i] - to_genes(head, expected)).max() < 1e-3


def test_kriging_marginal_likelihood_goes_up(spots):
    def likelihood(n_steps):
        head = fit("kriging", spots, n_steps=n_steps, n_components=6)
        return sum(oracle(head, spots, q).log_marginal_likelihood_value_ for q in range(6))

    found = [likelihood(n) for n in (0, 3, 10, 30)]
    assert found == sorted(found)
    assert found[-1] > found[0] + 100


@pytest.mark.parametrize(
    ("genes", "of_it"),
    [(IMAGE, (1, 3)), (SPACE, (0,)), (slice(NOISE, NOISE + 1), (4,))],
    ids=["image", "space", "noise"],
)
def test_kriging_finds_what_expression_comes_from(spots, genes, of_it):
    """Shares of space, image, both, linear image, noise: the cause of the expression has most of its variance."""
    only = with_expression(spots, spots.expression[:, genes])
    share = fit("kriging", only).parameters["shares"].exp()
    assert (share[list(of_it)].sum(0) > 0.6 * share.sum(0)).all()


def test_kriging_uses_image_and_neighbours(kriged):
    head, known, held_out = kriged
    found = scores(head, known, held_out)
    assert found[IMAGE].min() > 0.9
    assert found[SPACE].min() > 0.9


def test_kriging_without_context_says_the_prior_mean(kriged):
    head, known, held_out = kriged
    mean = known.expression.mean(0)
    none = head.predict(Queries.of(held_out, hidden=False), context=known.take(torch.arange(0)))
    assert torch.allclose(none, mean.expand(len(held_out), -1), atol=ANSWER)
    one = known.take(torch.arange(1))  # … and so do a hidden spot alone
    assert torch.allclose(head.predict(Queries.of(one), context=one), mean[None], atol=ANSWER)
    # far from everything and unlike nothing: back towards the mean in what the image does not show
    far = dataclasses.replace(held_out, xy_um=held_out.xy_um + 1e6)
    out = head.predict(Queries.of(far, hidden=False), context=known)
    assert out[:, SPACE].std(0).max() < 0.5 * held_out.expression[:, SPACE].std(0).min()


def test_kriging_reads_the_context_it_is_given(kriged):
    head, known, held_out = kriged
    places = Queries.of(held_out, hidden=False)
    before = head.predict(places, context=known)
    raised = with_expression(known, known.expression + torch.eye(N_GENES)[4])
    after = head.predict(places, context=raised)
    assert (after - before)[:, 4].mean() > 0.3
    assert (head.predict(places, context=known) == before).all()
    hidden, seen = (head.predict(Queries.of(known, hidden=h), context=known) for h in (True, False))
    assert (hidden - seen).abs().max() > 0.05


def test_kriging_learns_from_a_sample_of_the_spots(small):
    drawn = [fit("kriging", small, n_sample=25, seed=seed).parameters["lengths"] for seed in (0, 0, 1)]
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] != drawn[2]).any()


@pytest.mark.parametrize("n_steps", [1, 30])
def test_kriging_says_that_it_diverged(small, n_steps):
    """Counts are looked through before; what is not a number may still come about: in a length, then in a factor.

    Between spots as far apart as these there is an infinite distance, of which the gradient is not a number.
    """
    with pytest.raises(RuntimeError, match="kriging diverged: .* not a number.*NaN or infinite values"):
        fit("kriging", dataclasses.replace(small, xy_um=small.xy_um * 1e30), n_steps=n_steps, n_components=5)


def test_kriging_components_share_few_covariances(kriged):
    """So that a factorisation serves several of them."""
    head, _, _ = kriged
    shares = head.parameters["shares"].exp()
    assert shares.shape[1] > 4
    assert shares.unique(dim=1).shape[1] == 4
    assert torch.allclose(shares.sum(0), torch.ones(shares.shape[1]))


def test_fewer_covariances_where_spots_are_many():
    assert [n_kernel_groups(n, n_exact=6000) for n in (30, 6000, 6001, 10**6)] == [8, 8, 4, 4]


def test_only_similar_shares_are_made_equal():
    rng = np.random.default_rng(0)
    kinds = np.array(
        [[0.8, 0.1, 0.05, 0.0, 0.05], [0.1, 0.8, 0.0, 0.05, 0.05], [0, 0, 0.1, 0.1, 0.8], [0.1, 0.1, 0.5, 0.2, 0.1]]
    )
    which = np.array([0, 1, 2, 3, 0, 0, 3, 2, 1, 0])
    shares = kinds[which] * np.exp(0.02 * rng.standard_normal((10, 5)))
    tied = share_hyperparameters(torch.from_numpy(shares.T * rng.uniform(0.5, 2, 10)), 4).T.numpy()
    shares /= shares.sum(1, keepdims=True)
    for kind in range(4):
        assert np.allclose(tied[which == kind], shares[which == kind].mean(0))
    few = torch.from_numpy(shares[:4].T)
    assert torch.equal(share_hyperparameters(few, 4), few / few.sum(0))


def in_tiles(head, *, n_near, n_drawn, n_tile=60):
    """The same head, which predicts by tiles, each from so many spots in and around it and so many inducing points."""
    return resized(head, n_exact=50, n_inducing=n_drawn, n_tile=n_tile, n_near=n_near)


@pytest.fixture(scope="module")
def wide():
    """A head, the 675 spots it knows, and 150 others among them."""
    known, held_out = (s.take(torch.arange(n)) for s, n in zip(split(section(30, 30), seed=1), (675, 150), strict=True))
    return resized(fit("kriging", known, n_sample=150, n_exact=50), n_exact=6000), known, held_out


def tile_rounding(head, known, *, n_near=150):
    """How far rounding may move what a tile says, which conditions on so many spots."""
    around = (known.xy_um - known.xy_um[len(known) // 2]).norm(dim=1).argsort()[:n_near]
    return kriging_rounding(head, known.take(around))


TRACE = rounding.of_sum(80, scale=3 * np.sqrt(N_GENES / 1e-3))
"""Of a hidden spot raised by 3 in every gene, where 80 spots stand for all others.

Its part in what is said of those is a sum over them, worked out for all spots at once and again for a tile, and taken
out. It is multiplied by what makes the 80 independent, with entries up to one over the root of their jitter.
"""


def points(head, where):
    return kriging._points(where, head.space, PITCH)


def by_tile(head, conditioned, places):
    """For each place: spots that a tile conditions on exactly, and the tile's share."""
    found = [[] for _ in places.spot_index]
    for tile, rows, share in conditioned.tiles(points(head, places), places.spot_index):
        near = conditioned.weights(tile, leave_out=False).spots.numpy()
        for i, part in zip(rows.tolist(), share.tolist(), strict=True):
            found[i].append((near, part))
    assert [sum(part for _, part in each) for each in found] == pytest.approx([1] * len(found))
    return found


def dense(head, known, place, near, q, *, drawn, without=None):
    """Components at a place in float64, by one large system: covariances of spots far from it go through drawn ones."""
    lengths, shares = (head.parameters[name].double().exp().numpy() for name in ("lengths", "shares"))
    covariance, noise = Covariance(lengths, shares[:4, q]), shares[4, q] + 1e-4
    at, asked = inputs(head, known), inputs(head, place)
    drawn = inputs(head, known.take(drawn))
    inverse = np.linalg.inv(covariance(drawn) + 1e-3 * np.eye(len(drawn)))
    there, here = covariance(drawn, at), covariance(drawn, asked)
    matrix, row = there.T @ inverse @ there, here.T @ inverse @ there
    matrix[np.diag_indices(len(at))] = covariance.diag(at)
    matrix[np.ix_(near, near)] = covariance(at[near])
    row[:, near] = covariance(asked, at[near])
    matrix += noise * np.eye(len(at))
    kept = np.setdiff1d(np.arange(len(at)), [] if without is None else [without])
    return (row[:, kept] @ np.linalg.solve(matrix[np.ix_(kept, kept)], components(head, known)[kept, q])).item()


def test_kriging_by_tiles_against_one_dense_system(wide):
    exact, known, held_out = wide
    head = in_tiles(exact, n_near=150, n_drawn=80)
    places, conditioned = Queries.of(held_out, hidden=False), head.condition(known)
    (found,) = head.components([head], [conditioned], places)
    assert len(conditioned._tiles.spots) > 5
    tiles, drawn = by_tile(head, conditioned, places), conditioned._drawn_spots
    assert max(map(len, tiles)) > 1
    for i in range(0, len(places), 15):
        one = held_out.take(torch.tensor([i]))
        assert {len(near) for near, _ in tiles[i]} == {150}
        for q in range(0, found.shape[1], 3):
            expected = sum(share * dense(head, known, one, near, q, drawn=drawn) for near, share in tiles[i])
            assert abs(float(found[i, q]) - expected) < 2e-3
    # far away as well, where all is said by the image
    far = dataclasses.replace(places, xy_um=places.xy_um - 1e6).take(torch.arange(3))
    (found,) = head.components([head], [conditioned], far)
    ((near, _),) = by_tile(head, conditioned, far)[0]
    moved = dataclasses.replace(held_out, xy_um=held_out.xy_um - 1e6)
    for i in range(3):
        expected = dense(head, known, moved.take(torch.tensor([i])), near, 0, drawn=drawn)
        assert abs(float(found[i, 0]) - expected) < 2e-3


def test_kriging_by_tiles_leaves_a_spot_out_of_the_dense_system(wide):
    exact, known, _ = wide
    head = in_tiles(exact, n_near=150, n_drawn=80)
    places, conditioned = Queries.of(known), head.condition(known)
    (found,) = head.components([head], [conditioned], places)
    tiles, drawn = by_tile(head, conditioned, places), conditioned._drawn_spots
    for i in range(0, len(known), 60):
        one = known.take(torch.tensor([i]))
        seen = [(near, share) for near, share in tiles[i] if i in near]  # the others have no say
        total = sum(share for _, share in seen)
        for q in (0, 4):
            each = [share * dense(head, known, one, near, q, drawn=drawn, without=i) for near, share in seen]
            expected = sum(each) / total
            assert abs(float(found[i, q]) - expected) < 2e-3


@pytest.mark.parametrize(
    "how", [{"n_near": 1000, "n_drawn": 20}, {"n_near": 60, "n_drawn": 675}], ids=["near", "drawn"]
)
def test_kriging_by_tiles_that_see_all_spots_is_exact(wide, how):
    exact, known, held_out = wide
    head = in_tiles(exact, **how)
    assert head.condition(known)._tiles is not None
    for places in (Queries.of(held_out, hidden=False), Queries.of(known)):
        expected = exact.predict(places, context=known)
        found = head.predict(places, context=known)
        assert (found - expected).abs().max() < (kriging_rounding(exact, known) if how["n_drawn"] < 100 else 0.05)


def test_kriging_by_tiles_does_not_depend_on_the_last_digit(wide):
    """Devices divide with different rounding, and many spots of a lattice are equally far: tiles must stay the same."""
    exact, known, held_out = wide
    head = in_tiles(exact, n_near=80, n_drawn=40, n_tile=40)
    expected = head.predict(Queries.of(held_out, hidden=False), context=known)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        last = 1 + 1e-7 * torch.randn(known.xy_um.shape, generator=generator)
        moved = dataclasses.replace(known, xy_um=known.xy_um * last)
        found = head.predict(Queries.of(held_out, hidden=False), context=moved)
        assert (found - expected).abs().max() < 1e-3


def test_kriging_by_tiles_is_nearly_exact(wide):
    """The more, the more spots stand for all others."""
    exact, known, held_out = wide
    places = Queries.of(held_out, hidden=False)
    expected = exact.predict(places, context=known)
    errors = []
    for n_drawn in (5, 50, 200):
        head = in_tiles(exact, n_near=150, n_drawn=n_drawn)
        errors.append(float((head.predict(places, context=known) - expected)[:, :6].square().mean().sqrt()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05 * held_out.expression[:, :6].std(0).min()


def test_kriging_by_tiles_hides_what_was_measured(wide):
    """A hidden spot is also left out of what all spots say together: nothing but a rounding error of it is left."""
    exact, known, _ = wide
    head = in_tiles(exact, n_near=150, n_drawn=80)
    places = Queries.of(known)
    before = head.predict(places, context=known)
    drawn = int(head.condition(known)._drawn_spots[0])
    for i in (0, 97, 400, drawn):
        expression = known.expression.clone()
        expression[i] += 3
        after = head.predict(places, context=with_expression(known, expression))
        assert torch.allclose(after[i], before[i], rtol=0, atol=TRACE)
        nearest = (known.xy_um - known.xy_um[i]).norm(dim=1).argsort()[1]
        assert (after[nearest] - before[nearest]).abs().max() > 100 * TRACE
    open_ = head.predict(Queries.of(known, hidden=False), context=known)
    assert (open_ - before).abs().max() > 0.1


def test_kriging_by_tiles_tells_sections_apart(wide):
    """Two sections that lie on one another, the same spots measured on both: each as if it were alone, or better."""
    exact, known, held_out = wide
    places, both = Queries.of(two_sections(held_out, held_out), hidden=False), two_sections(known, known)
    expected = exact.predict(places, context=both)
    head = in_tiles(exact, n_near=150, n_drawn=300)
    conditioned = head.condition(both)
    found = head.predict(places, context=both)
    assert (found - expected).abs().mean() < 0.02
    for i, tiles in enumerate(by_tile(head, conditioned, places)):
        for near, _ in tiles:
            assert ((near >= len(known)) == (i >= len(held_out))).all()


def test_kriging_by_tiles_of_a_section_without_measured_spots(wide):
    """Nothing is near: all is predicted from the image, as nearly as by all spots at once."""
    exact, known, held_out = wide
    alone = dataclasses.replace(Queries.of(held_out, hidden=False), section=torch.full((len(held_out),), -1))
    expected = exact.predict(alone, context=known)
    head = in_tiles(exact, n_near=150, n_drawn=400)
    found = head.predict(alone, context=known)
    assert (found - expected)[:, :6].abs().mean() < 0.05
    both = Queries(*(torch.cat(pair) for pair in zip(vars(alone).values(), vars(alone).values(), strict=True)))
    assert torch.allclose(head.predict(both, context=known), found.repeat(2, 1), atol=tile_rounding(head, known))


def laid_down(xy, *, n_near):
    xy = np.asarray(xy, float)
    tiles = Tiles.of(xy, np.zeros(len(xy), np.int64), n_tile=20, n_near=n_near)
    assert sorted(np.concatenate(tiles.spots)) == list(range(len(xy)))
    return tiles


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31), st.sampled_from([1.0, 1e5]), st.integers(1, 60), st.booleans(), st.integers(31, 75))
def test_tiles_are_laid_down_by_the_spots_alone(seed, apart, n_call, lattice, n):
    """Two clumps of spots, near or far; places among them, between them and beyond: the same tile in any call."""
    rng = np.random.default_rng(seed)
    xy = np.repeat([[0.0, 0.0], [30 * apart, 3.0]], n, axis=0) + rng.random((2 * n, 2)) * [12, 10]
    xy = np.round(xy) if lattice else xy  # many spots on one line, and some on one another
    at = np.vstack([rng.random((40, 2)) * [45 * apart, 20], rng.normal(0, 1e4, (10, 2)), rng.random((10, 2)) * 9])
    tiles = laid_down(xy, n_near=40)
    sizes = [len(spots) for spots in tiles.spots]
    if not lattice:
        assert 20 * 2 / 3 - 1 <= min(sizes) <= max(sizes) <= 20 * 3 / 2 + 1

    def shares_of(places):
        of = np.zeros((len(places), len(tiles.spots)))
        for tile, rows, share in tiles.shares(places, np.zeros(len(places), np.int64)):
            assert (of[rows, tile] == 0).all()
            of[rows, tile] = share
        np.testing.assert_allclose(of.sum(1), 1)
        return of

    at_once, order = shares_of(at), rng.permutation(60)
    for rows in np.split(order, range(n_call, 60, n_call)):
        assert (shares_of(at[rows]) == at_once[rows]).all()
    # across a cut shares do not jump
    axis, where, *_ = tiles.cuts[0]
    line = np.repeat(xy[:1], 200, axis=0)
    line[:, axis] = where + 0.05 * np.arange(-100, 100)
    across = shares_of(line)
    assert np.abs(np.diff(across, axis=0)).max() < 0.05
    assert np.ptp(across, axis=0).max() > 0.5
    # a spot is in its own tile, and a tile has those around it
    of = shares_of(xy)
    for tile, spots in enumerate(tiles.spots):
        assert (of[spots, tile] > 0).all()
        near = tiles.near(tile)
        assert len(near) == max(40, len(spots))
        assert (np.diff(near) > 0).all()
        assert set(spots) <= set(near)
        beyond = np.hypot(*np.maximum(np.maximum(xy[spots].min(0) - xy, xy - xy[spots].max(0)), 0).T)
        # distances are compared to a thousandth of a pitch
        assert beyond[near].max() <= np.sort(beyond)[len(near) - 1 :].min() + 1e-3


def test_small_sections_share_a_tile_and_large_ones_have_several():
    """Spots near a tile are of its sections first; others fill up, evenly from all sections."""
    rng, sizes = np.random.default_rng(0), [6, 100, 6, 6, 12, 25]
    number = np.repeat([4, 1, 7, 2, 9, 5], sizes)
    xy = rng.random((len(number), 2)) * 20
    tiles = Tiles.of(xy, number, n_tile=20, n_near=60)
    assert sorted(np.concatenate(tiles.spots)) == list(range(len(xy)))
    sections = [set(number[spots]) for spots in tiles.spots]
    assert sum(s == {1} for s in sections) == 5
    assert {frozenset(s) for s in sections if s != {1}} == {frozenset(s) for s in ({2, 4}, {5}, {7, 9})}
    for tile, inside in enumerate(tiles.spots):
        near = tiles.near(tile)
        assert len(near) == 60
        assert set(inside) <= set(near)
        own = np.isin(number, list(sections[tile]))
        if own.sum() >= 60:
            assert own[near].all()
        else:
            assert set(np.flatnonzero(own)) <= set(near)
            assert len(set(number[near])) >= 5
    # places go to the tile of their section, wherever they lie
    for tile, rows, share in tiles.shares(xy, number):
        assert set(number[rows]) <= sections[tile]
        assert (share > 0).all()
    ((tile, rows, share),) = tiles.shares(xy[:3], np.full(3, -1))
    assert (tile, rows.tolist(), share.tolist()) == (0, [0, 1, 2], [1, 1, 1])


def test_tiles_end_where_spots_lie_on_one_another():
    """More of them in one place than a tile takes: no cut can bring them apart."""
    xy = np.vstack([np.zeros((60, 2)), np.random.default_rng(0).random((40, 2)) * 5000])
    tiles = laid_down(xy, n_near=20)
    (crowd,) = [spots for spots in tiles.spots if 0 in spots]
    assert set(range(60)) <= set(crowd)
    assert set(crowd) <= set(tiles.near(next(i for i, spots in enumerate(tiles.spots) if 0 in spots)))
    assert len(laid_down(xy * [1, 0], n_near=20).spots) > 1
    assert len(laid_down(np.zeros((100, 2)), n_near=20).spots) == 1
    ((tile, rows, share),) = laid_down(np.zeros((100, 2)), n_near=20).shares(np.ones((3, 2)), np.zeros(3, np.int64))
    assert (tile, rows.tolist(), share.tolist()) == (0, [0, 1, 2], [1, 1, 1])


def test_a_hidden_spot_is_told_nothing_by_a_tile_that_never_looked_at_it(wide):
    """Its value is among what such a tile knows of the others."""
    exact, known, _ = wide
    head = in_tiles(exact, n_near=70, n_drawn=80, n_tile=60)  # hardly any around a tile's own
    places = Queries.of(known)
    before, tiles_of = head.predict(places, context=known), by_tile(head, head.condition(known), places)
    alone = [i for i, tiles in enumerate(tiles_of) if not all(i in near for near, _ in tiles)]
    assert len(alone) > 20
    for i in alone[::10]:
        expression = known.expression.clone()
        expression[i] += 3
        after = head.predict(places, context=with_expression(known, expression))
        assert torch.allclose(after[i], before[i], rtol=0, atol=TRACE)
        assert (after - before).abs().max() > 100 * TRACE


def test_kriging_by_tiles_has_no_seams(wide):
    """Along a line over many tiles, under one image, the largest step is hardly larger than that of the exact answer.

    Places are a µm apart: steps of what is smooth are small there, and those at a seam are not.
    """
    exact, known, _ = wide
    head = in_tiles(exact, n_near=150, n_drawn=40)
    along = torch.arange(0, 2900, 1.0)
    line = Queries(
        known.embedding[:1].expand(len(along), -1),
        torch.stack([along, along * 0.6 + 400], 1),
        torch.zeros(len(along), dtype=torch.int64),
        torch.full((len(along),), -1),
    )
    expected = exact.predict(line, context=known)
    steps = {}
    for blended in (2.0, 1e-6):
        condition = head.condition(known)
        condition._tiles = dataclasses.replace(condition._tiles, blended=blended)
        (found,) = head.components([head], [condition], line)
        steps[blended] = float(head.space.genes(found).diff(dim=0).abs().max())
    smooth = float(expected.diff(dim=0).abs().max())
    assert steps[2.0] < 1.2 * smooth
    assert steps[1e-6] > 3 * smooth


def test_kriging_by_tiles_gives_a_place_the_same_in_whatever_company(wide):
    head, known, held_out = wide
    for places in (Queries.of(held_out, hidden=False), Queries.of(known).take(slice(0, 150))):
        at_once = in_tiles(head, n_near=150, n_drawn=80).predict(places, context=known)
        order = torch.as_tensor(np.random.default_rng(0).permutation(150))
        for n in (7, 64):
            fresh = in_tiles(head, n_near=150, n_drawn=80)
            out = torch.empty_like(at_once)
            for rows in order.split(n):
                out[rows] = fresh.predict(places.take(rows), context=known)
            assert torch.allclose(out, at_once, atol=tile_rounding(head, known))


def test_kriging_tiles_are_the_same_side_by_side(wide):
    exact, known, held_out = wide
    head, other = (in_tiles(exact, n_near=150, n_drawn=80) for _ in range(2))
    places = Queries.of(held_out, hidden=False)
    (alone,) = head.components([head], [head.condition(known)], places)
    with ThreadPoolExecutor(3, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in range(5):
            condition = other.condition(known, run=pool.map)
            condition.kept_tiles = 2  # each throws away what others may be about to read
            (together,) = other.components([other], [condition], places, run=pool.map)
            assert torch.allclose(alone, together, atol=tile_rounding(head, known))


def test_kriging_keeps_the_tiles_last_used(wide):
    """So few that they are thrown away and worked out again, with the same answer."""
    exact, known, held_out = wide
    head = in_tiles(exact, n_near=150, n_drawn=80)
    places = Queries.of(held_out, hidden=False)
    answers, counts = [], []
    for kept in (64, 2):
        condition, counted = head.condition(known), []
        condition.kept_tiles = kept

        def counting(tile, *, leave_out, work=condition._condition_tile, counted=counted):
            counted.append(tile)
            return work(tile, leave_out=leave_out)

        condition._condition_tile = counting
        answers += [head.components([head], [condition], places)[0] for _ in range(2)]
        counts.append(len(counted))
        n_tiles = len({tile for tile, *_ in condition.tiles(points(head, places), places.spot_index)})
        assert len(condition._kept) == min(kept, n_tiles)
    assert n_tiles > 5
    assert counts == [n_tiles, 2 * n_tiles]
    for other in answers[1:]:
        assert (other == answers[0]).all()


def test_kriging_however_many_covariances_at_once(kriged):
    """The sum over kernels as one stack of them gives it: for places one by one, and for more than go at once."""
    head, known, held_out = kriged
    places, space = Queries.of(held_out, hidden=False), head.space
    share, lengths = head.parameters["shares"].exp(), head.parameters["lengths"]

    def kernels(a, b):
        (at, image), (to, images) = a, b
        alike = image @ images.T
        return kriging._kernels(kriging._distances(at, to), kriging._squares(image, images), alike, lengths)

    known_, asked = ((p.position, p.image) for p in (points(head, known), points(head, places)))
    target = space.components(known.expression)
    covariance = torch.einsum("pq,pij->qij", share[:4], kernels(known_, known_))
    covariance = covariance + (share[4] + 1e-4)[:, None, None] * torch.eye(len(known))
    weight = torch.linalg.solve(covariance, target.T[..., None])[..., 0]  # (Q, n)
    slow = torch.einsum("pq,pij,qj->iq", share[:4], kernels(asked, known_), weight)
    expected, atol = space.genes(slow), kriging_rounding(head, known)
    many = torch.arange(len(places)).repeat(2 * 2**18 // (len(known) * len(places)) + 1)
    assert torch.allclose(head.predict(places.take(many), context=known), expected[many], atol=atol)
    one_by_one = [head.predict(places.take(slice(i, i + 1)), context=known) for i in range(len(places))]
    assert torch.allclose(torch.cat(one_by_one), expected, atol=atol)


# --------------------------------------------------------------------------------------------------- coordinates


def test_coordinates_learn_a_smooth_field_and_nothing_of_the_image(spots):
    known, held_out = split(spots)
    found = scores(fit("coordinates", known, n_steps=600), known, held_out)
    assert found[SPACE].mean() > 0.6
    assert np.abs(found[IMAGE]).max() < 0.5


def test_coordinates_look_at_neither_image_nor_context(small):
    head = fit("coordinates", small)
    places = Queries.of(small)
    before = head.predict(places, context=small)
    other = dataclasses.replace(places, embedding=places.embedding.flip(0) * 9)
    assert (head.predict(other, context=with_expression(small, small.expression + 5)) == before).all()
    assert (head.predict(places, context=small.take(torch.arange(0))) == before).all()
    blind = fit("coordinates", dataclasses.replace(small, embedding=torch.zeros_like(small.embedding)))
    assert (blind.predict(places, context=small) == before).all()
    moved = dataclasses.replace(places, xy_um=places.xy_um + PITCH)
    assert (head.predict(moved, context=small) != before).any(1).all()


def test_coordinates_far_away_are_finite(small):
    far = dataclasses.replace(Queries.of(small), xy_um=small.xy_um * 1e5 - 3e8)
    out = fit("coordinates", small).predict(far, context=small)
    assert torch.isfinite(out).all()


# ----------------------------------------------------------------------------------------------------- published


@pytest.mark.slow
def test_published_learns_from_the_image(spots):
    """The paper's network, trained in full."""
    known, held_out = split(spots)
    found = scores(get_head("published")().fit(known, rng=np.random.default_rng(0), progress=False), known, held_out)
    assert found[IMAGE].mean() > 0.5


def test_published_has_the_published_size():
    """8.4 million parameters for 1024 numbers and 1000 genes (METHOD §1): ours is within a few percent."""
    n = sum(p.numel() for p in published_file._Network(1024, 1000).parameters())
    assert n == pytest.approx(8.4e6, rel=0.05)


def test_published_answers_are_expression(small):
    """A final ReLU, as published: never negative."""
    head = fit("published", small)
    assert head.predict(Queries.of(small), context=small).min() >= 0


def test_published_with_a_single_step(small):
    assert torch.isfinite(fit("published", small, n_steps=1).predict(Queries.of(small), context=small)).all()


# ------------------------------------------------------------------------------------------------------ training


class Number(nn.Module):
    """A module that is one number."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))


def run(module, *, losses=None, n_steps=60, patience=4, n_spots=10, batch_size=5, seen=None, loss=None):
    """Train a number, with given losses on the stopping spots; also the number after each epoch."""
    after = []
    losses = iter(losses) if losses is not None else None

    def stopping_loss():
        assert not module.training
        assert torch.is_inference_mode_enabled()
        after.append(float(module.value.detach()))
        return torch.tensor(float(next(losses))) if losses is not None else (module.value - 3) ** 2

    def batch_loss(batch):
        assert module.training
        if seen is not None:
            seen.append(batch.tolist())
        return (module.value - 3) ** 2 if loss is None else loss(module)

    history = train(
        module,
        loss=batch_loss,
        stopping_loss=stopping_loss,
        n_spots=n_spots,
        schedule=Schedule(n_steps, batch_size, learning_rate=0.1, weight_decay=0.0, patience=patience),
        generator=torch.Generator().manual_seed(0),
        desc="training a number",
        progress=False,
    )
    return history, after


def test_training_finds_the_minimum():
    module = Number()
    history, after = run(module, n_steps=400)
    assert float(module.value.detach()) == pytest.approx(3, abs=0.05)
    assert len(history) == len(after)
    assert min(history) == pytest.approx((float(module.value.detach()) - 3) ** 2, abs=1e-6)


def test_early_stopping_restores_the_best_weights():
    module = Number()
    history, after = run(module, losses=[5, 3, 4, 2, 6, 6, 2.0, 6, 1, 1])
    assert history == [5, 3, 4, 2, 6, 6, 2, 6]  # the fourth is best; equal is not better; four epochs of patience
    assert float(module.value.detach()) == after[3]
    assert len(set(after)) == len(after)
    assert not module.training


def test_nan_after_a_good_epoch_is_survived():
    module = Number()
    history, after = run(module, losses=[5, 3, np.nan, np.nan, np.nan, np.nan, 1])
    assert len(history) == 6
    assert float(module.value.detach()) == after[1]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_training_that_never_gets_a_number(value):
    with pytest.raises(RuntimeError, match="training diverged: .* never a number.*NaN or infinite values"):
        run(Number(), losses=[value] * 50)


def test_every_spot_is_seen_once_an_epoch_in_a_new_order():
    seen = []
    history, _ = run(Number(), n_spots=11, batch_size=4, n_steps=9, seen=seen)
    assert len(history) == 3
    epochs = [sum(seen[i : i + 3], []) for i in (0, 3, 6)]
    assert [len(b) for b in seen] == [4, 4, 3] * 3
    assert all(sorted(e) == list(range(11)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3


def test_gradients_are_clipped():
    """A loss of a million does not throw the weights away."""
    module = Number()
    _, after = run(module, n_steps=2, loss=lambda m: 1e6 * m.value, losses=[1.0])
    assert abs(after[0]) < 0.5


def test_seeded_leaves_the_global_state_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    drawn = []
    for _ in range(2):
        with seeded(np.random.default_rng(1), CPU) as generator:
            drawn.append((torch.rand(3).tolist(), torch.rand(3, generator=generator).tolist()))
        assert (torch.get_rng_state() == state).all()
    assert drawn[0] == drawn[1]
    with pytest.raises(RuntimeError, match="cannot be multiplied"), seeded(np.random.default_rng(1), CPU):
        torch.rand(1) @ torch.rand(2, 3)
    assert (torch.get_rng_state() == state).all()


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_tasks_run_side_by_side_on_a_core_each():
    together = threading.Barrier(3, timeout=120)  # breaks unless all three are at work at once

    def task(i):
        together.wait()
        return i, torch.get_num_threads()

    found = side_by_side([partial(task, i) for i in range(3)], device=CPU, desc="", progress=False)
    assert found == [(0, 1), (1, 1), (2, 1)]
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_on_a_gpu_tasks_take_turns():
    here = [threading.current_thread().name] * 4
    tasks = [lambda: threading.current_thread().name] * 4
    assert side_by_side(tasks, device=torch.device("cuda"), desc="", progress=False) == here


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_the_first_error_of_a_task_ends_the_others(error):
    """Training for a million epochs ends at once, and what is queued never starts."""
    started = threading.Event()

    def fails():
        assert started.wait(120)
        msg = "the reason"
        raise error(msg)

    def endless():
        started.set()
        run(Number(), n_steps=10**6, losses=iter(range(10**6, 0, -1)))

    def never():
        pytest.fail("was started")

    with pytest.raises(error, match="the reason"):
        side_by_side([endless, endless, fails, never], device=CPU, desc="", progress=False)
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("n_threads", [1, 3])
def test_progress_bar_over_tasks(n_threads, capsys):
    """One for all of them where they run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        tasks = [lambda: run(Number(), n_steps=2)] * 3
        side_by_side(tasks, device=CPU, desc="all of it", progress=True)
    finally:
        torch.set_num_threads(before)
    shown = capsys.readouterr().err
    assert "all of it:" in shown
    assert "/3 [" in shown


def test_dropout_draws_from_its_generator():
    drop, x = Dropout(0.25), torch.ones(20_000)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    drawn = []
    for _ in range(2):
        drop.generator = torch.Generator().manual_seed(5)
        drawn.append(drop(x))
    assert torch.equal(*drawn)
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn[0].unique().tolist() == pytest.approx([0, 4 / 3])
    assert float(drawn[0].mean()) == pytest.approx(1, abs=0.02)
    assert torch.equal(drop.eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)


def test_many_spots_are_seen_as_often_as_few():
    one = Schedule(n_steps=300, batch_size=64, learning_rate=3e-3, weight_decay=0.5, patience=10)
    assert one.over(50) == one.over(2400) == one
    assert one.over(10**6) == one.over(20_000)  # beyond that each is seen less often
    for n in (3_000, 8_000, 20_000):
        many = one.over(n)
        assert many.n_steps * many.batch_size / n == pytest.approx(300 * 64 / 2400, rel=0.02)
        assert many.n_steps / many.batch_size == pytest.approx(300 / 64, rel=0.02)
        assert (many.learning_rate, many.weight_decay, many.patience) == (3e-3, 0.5, 10)


@pytest.mark.parametrize("name", ["in-context", "aggregate"])
def test_training_of_many_spots_takes_more_steps(name):
    """Nine tenths of the spots are learnt from, 2.25 times 2400: one and a half times the steps, of larger batches."""
    head = fit(name, section(80, 75), n_steps=100)
    assert 100 / (5400 / 64) < 1.2  # epochs, if nothing changed
    assert len(head.losses) == round(150 / (5400 / 96)) == 3


def test_training_is_adamw_with_clipped_gradients():
    """The steps that torch takes over the parameters one by one; each ends as a tensor of its own."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    theirs, unused = copy.deepcopy(ours), nn.Parameter(torch.ones(2))
    ours.register_parameter("unused", unused)  # as of a path that a network does not take
    x, y = torch.randn(8, 3), 30 * torch.randn(8, 2)
    schedule = Schedule(n_steps=6, batch_size=8, learning_rate=0.1, weight_decay=0.5, patience=9)

    def error(module, rows):
        return (module(x[rows]) - y[rows]).square().mean()

    epochs = iter(range(9, 0, -1))  # the last epoch is the best
    train(
        ours,
        loss=lambda rows: error(ours, rows),
        stopping_loss=lambda: torch.tensor(float(next(epochs))),
        n_spots=8,
        schedule=schedule,
        generator=torch.Generator().manual_seed(1),
        desc="",
        progress=False,
    )
    optimiser = torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.5)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, total_steps=6)
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        optimiser.zero_grad()
        error(theirs, torch.randperm(8, generator=generator)).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimiser.step()
        cycle.step()
    for one, other in zip(ours[0::2], theirs[0::2], strict=True):
        torch.testing.assert_close(one.weight, other.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.bias, other.bias, rtol=1e-4, atol=1e-5)
    places = [p.untyped_storage().data_ptr() for p in ours.parameters()]
    assert len(set(places)) == len(places)


def test_one_thread_gives_the_others_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with pytest.raises(KeyError), one_thread():
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@settings(deadline=None, max_examples=25)
@given(st.integers(15, 400), st.integers(0, 99))
def test_stopping_spots_are_a_tenth(n, seed):
    learn, stop = stopping_spots(n, rng=np.random.default_rng(seed))
    assert len(stop) == max(5, round(0.1 * n))
    assert sorted(learn.tolist() + stop.tolist()) == list(range(n))
    assert (learn.diff() > 0).all()
    assert (stop.diff() > 0).all()


def test_progress_bar_of_training(small, capsys):
    get_head("in-context")(n_steps=4).fit(small, rng=np.random.default_rng(0), progress=True)
    assert "training in-context head" in capsys.readouterr().err
