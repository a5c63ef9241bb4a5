"""The head that learns through the mean of a spot's parts, where the truth of every part is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from histosge._heads import N_POSITION, Aggregate, Parts, Queries, Schedule, Spots, aggregate
from histosge._heads.in_context import _Network

N_PARTS, N_GENES, PITCH = 5, 6, 100.0


@pytest.fixture(scope="module")
def bed():
    """200 spots of 5 parts each; log rates are straight lines in what the image shows, so that means are not."""
    rng = np.random.default_rng(0)
    row, col = (a.ravel() for a in np.meshgrid(np.arange(10), np.arange(20), indexing="ij"))
    xy = PITCH * np.column_stack([col + 0.5 * (row % 2), row * np.sqrt(0.75)])
    n = len(xy)
    step = 20 * np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
    xy_parts = (xy[:, None] + step).reshape(-1, 2)
    hidden = rng.standard_normal((n * N_PARTS, 2))
    loading = rng.uniform(0.7, 1.0, (2, N_GENES)) * rng.choice([-1, 1], (2, N_GENES))
    rate = 10 * np.exp(hidden @ loading)
    embedding = np.column_stack([hidden, 0.3 * rng.standard_normal((n * N_PARTS, 6))]) @ rng.standard_normal((8, 8))
    index = np.arange(n * N_PARTS).reshape(n, N_PARTS)
    measured = np.log1p(rate[index].mean(1))

    def tensor(values):
        return torch.as_tensor(values, dtype=torch.float32)

    parts = Parts(tensor(embedding), tensor(xy_parts), torch.as_tensor(index), torch.full(index.shape, 1 / N_PARTS))
    spots = Spots(tensor(embedding[index].mean(1)), tensor(measured), tensor(xy), PITCH, parts)
    return spots, np.log1p(rate)


def fit(spots, *, n_steps=150, seed=0, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aggregate, "Schedule", lambda **kwargs: Schedule(**kwargs | {"n_steps": n_steps}))
        return Aggregate(**options).fit(spots, rng=np.random.default_rng(seed), progress=False)


def at_parts(head, spots):
    return head.predict(
        Queries(spots.parts.embedding, spots.parts.xy_um, spots.parts.index.new_full((1000,), -1)), context=spots
    )


@pytest.fixture(scope="module")
def fitted(bed):
    return fit(bed[0])


def test_parts_are_found_better_than_from_mean_features(bed, fitted):
    spots, truth = bed
    whole = Spots(spots.embedding, spots.expression, spots.xy_um, spots.pitch_um)
    through, mean = (((at_parts(h, spots).numpy() - truth) ** 2).mean() for h in (fitted, fit(whole)))
    assert through < 0.6 * mean
    assert through < 0.25 * truth.var(axis=0).mean()


def test_the_mean_of_the_parts_is_what_was_measured(bed, fitted):
    spots, _ = bed
    mean = torch.log1p(torch.expm1(at_parts(fitted, spots)).view(-1, N_PARTS, N_GENES).mean(1))
    assert ((mean - spots.expression) ** 2).mean() < 0.3 * spots.expression.var(0).mean()


def test_places_asked_together_get_what_the_network_of_in_context_gives_each():
    torch.manual_seed(0)
    b, m, k, n = 3, 4, 6, 9
    sizes = (5, 2, 16, 4, 0.2)
    head = Aggregate(width=16)
    head.space = type("", (), {"gene_mean": torch.zeros(N_GENES)})()
    together, alone = head._build(5, 2).eval(), _Network(*sizes).eval()
    alone.load_state_dict(together.state_dict(), strict=False)
    for network in (together, alone):  # a fresh network's correction is zero
        torch.manual_seed(1)
        torch.nn.init.normal_(network.correction[1].weight)
    place, spots, components = torch.randn(b, m, 5), torch.randn(n, 5), torch.randn(n, 2)
    near, position, present = torch.randint(n, (b, k)), torch.randn(b, m, k, N_POSITION), torch.rand(b, m, k) > 0.3
    present[0, 0] = False  # no context at all
    with torch.inference_mode():
        got = together.ask_together(place, spots, components, near=near, position=position, present=present)
        for j in range(m):
            one = alone(place[:, j], spots[near], components[near], position[:, j], present[:, j])
            torch.testing.assert_close(got[:, j], one, rtol=1e-4, atol=1e-5)


def test_a_place_does_not_see_its_own_spot(bed, fitted):
    spots, _ = bed
    changed = spots.expression.clone()
    changed[7] = 9.0
    other = Spots(spots.embedding, changed, spots.xy_um, spots.pitch_um, spots.parts)
    before, after = (fitted.predict(Queries.of(s), context=s) for s in (spots, other))
    torch.testing.assert_close(before[7], after[7], rtol=0, atol=0)
    assert (before != after).any(dim=1).sum() > 1  # its neighbours do


def test_what_fills_up_is_not_learnt_from(bed):
    spots, _ = bed
    parts = spots.parts
    index = torch.cat([parts.index, parts.index.new_full((len(spots), 1), 3)], 1)
    weight = torch.cat([parts.weight, parts.weight.new_zeros(len(spots), 1)], 1)
    filled = Parts(parts.embedding, parts.xy_um, index, weight)
    each = (spots.embedding, spots.expression, spots.xy_um, spots.pitch_um)
    head, same = (fit(Spots(*each, p), n_steps=10, dropout=0.0, thinning=0.0) for p in (parts, filled))
    # sums of other lengths round otherwise, and training carries it on
    torch.testing.assert_close(at_parts(head, spots), at_parts(same, spots), rtol=0, atol=1e-3)


def test_the_same_seed_gives_the_same_and_a_stored_head_too(bed, fitted):
    spots, _ = bed
    assert torch.equal(*(at_parts(fit(spots, n_steps=10), spots) for _ in range(2)))
    said = at_parts(fitted, spots)
    assert torch.equal(said, at_parts(Aggregate.from_state(*fitted.state()), spots))
    assert (said >= 0).all()


def test_parts_follow_their_spots(bed):
    spots, _ = bed
    few = spots.take(torch.tensor([5, 2]))
    centre = few.parts.xy_um[few.parts.index].mean(1)
    torch.testing.assert_close(centre, few.xy_um)
    assert spots.to("cpu") is spots
    assert len(few.parts.to("cpu").weight) == 2


def test_errors_name_the_remedy(bed):
    spots, _ = bed
    each = (spots.embedding, spots.expression, spots.xy_um, spots.pitch_um)
    half = Parts(spots.parts.embedding, spots.parts.xy_um, spots.parts.index, spots.parts.weight / 2)
    with pytest.raises(ValueError, match=r"weights of 200 of 200 spots do not sum to 1.*Divide"):
        fit(Spots(*each, half))
    with pytest.raises(ValueError, match=r"must both have a row for each of the 200 spots"):
        fit(Spots(*each, spots.parts.take(torch.arange(3))))
    with pytest.raises(RuntimeError, match=r"'aggregate' is not fitted"):
        at_parts(Aggregate(), spots)
    with pytest.raises(RuntimeError, match=r"'aggregate' is not fitted"):
        Aggregate().state()


def test_no_context_is_refused(bed, fitted):
    spots, _ = bed
    with pytest.raises(ValueError, match=r"no measured spots as context"):
        fitted.predict(Queries.of(spots), context=spots.take(torch.arange(0)))
