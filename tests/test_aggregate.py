"""The head that learns through the mean of a spot's sub-spots, where the truth of every sub-spot is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from histosge._heads import Aggregate, Queries, Spots, SubSpots

N_PARTS, N_GENES, PITCH = 5, 6, 100.0


@pytest.fixture(scope="module")
def bed():
    """200 spots of 5 sub-spots each; log rates are straight lines in what the image shows, so that means are not."""
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

    below = SubSpots(tensor(embedding), tensor(xy_parts), torch.as_tensor(index), torch.full(index.shape, 1 / N_PARTS))
    number = torch.zeros(n, dtype=torch.int64)
    spots = Spots(tensor(embedding[index].mean(1)), tensor(measured), tensor(xy), number, PITCH, below)
    return spots, np.log1p(rate)


def fit(spots, *, n_steps=150, seed=0, **options):
    head = Aggregate(n_steps=n_steps, **options)
    return head.fit(spots, rng=np.random.default_rng(seed), progress=False)


def at_sub_spots(head, spots):
    below, number = spots.sub_spots, torch.zeros(1000, dtype=torch.int64)
    return head.predict(Queries(below.embedding, below.xy_um, number, number - 1), context=spots)


@pytest.fixture(scope="module")
def fitted(bed):
    return fit(bed[0])


def test_sub_spots_are_found_better_than_from_mean_features(bed, fitted):
    spots, truth = bed
    whole = replace(spots, sub_spots=None)
    through, mean = (((at_sub_spots(h, spots).numpy() - truth) ** 2).mean() for h in (fitted, fit(whole)))
    assert through < 0.6 * mean
    assert through < 0.25 * truth.var(axis=0).mean()


def test_the_mean_of_the_sub_spots_is_what_was_measured(bed, fitted):
    spots, _ = bed
    mean = torch.log1p(torch.expm1(at_sub_spots(fitted, spots)).view(-1, N_PARTS, N_GENES).mean(1))
    assert ((mean - spots.expression) ** 2).mean() < 0.3 * spots.expression.var(0).mean()


def test_a_place_does_not_see_its_own_spot(bed, fitted):
    spots, _ = bed
    changed = spots.expression.clone()
    changed[7] = 9.0
    other = replace(spots, expression=changed)
    before, after = (fitted.predict(Queries.of(s), context=s) for s in (spots, other))
    torch.testing.assert_close(before[7], after[7], rtol=0, atol=0)
    assert (before != after).any(dim=1).sum() > 1  # its neighbours do


def test_padding_is_not_learnt_from(bed):
    spots, _ = bed
    below = spots.sub_spots
    index = torch.cat([below.index, below.index.new_full((len(spots), 1), 3)], 1)
    weight = torch.cat([below.weight, below.weight.new_zeros(len(spots), 1)], 1)
    padded = replace(spots, sub_spots=SubSpots(below.embedding, below.xy_um, index, weight))
    head, same = (fit(s, n_steps=10, dropout=0.0, thinning=0.0) for s in (spots, padded))
    # sums of other lengths round otherwise, and training carries it on
    torch.testing.assert_close(at_sub_spots(head, spots), at_sub_spots(same, spots), rtol=0, atol=1e-3)


def test_the_same_seed_gives_the_same_and_a_stored_head_too(bed, fitted):
    spots, _ = bed
    assert torch.equal(*(at_sub_spots(fit(spots, n_steps=10), spots) for _ in range(2)))
    said = at_sub_spots(fitted, spots)
    assert torch.equal(said, at_sub_spots(Aggregate.from_state(*fitted.state()), spots))
    assert (said >= 0).all()


def test_sub_spots_follow_their_spots(bed):
    spots, _ = bed
    few = spots.take(torch.tensor([5, 2]))
    centre = few.sub_spots.xy_um[few.sub_spots.index].mean(1)
    torch.testing.assert_close(centre, few.xy_um)
    assert len(few.to("cpu").sub_spots.weight) == 2


def test_errors_name_the_remedy(bed):
    spots, _ = bed
    below = spots.sub_spots
    half = replace(below, weight=below.weight / 2)
    with pytest.raises(ValueError, match=r"weights of 200 of 200 spots do not sum to 1.*Divide"):
        fit(replace(spots, sub_spots=half))
    with pytest.raises(ValueError, match=r"must both have a row for each of the 200 spots"):
        fit(replace(spots, sub_spots=below.take(torch.arange(3))))
    with pytest.raises(RuntimeError, match=r"'aggregate' is not fitted"):
        at_sub_spots(Aggregate(), spots)
    with pytest.raises(RuntimeError, match=r"'aggregate' is not fitted"):
        Aggregate().state()


def test_no_context_is_refused(bed, fitted):
    spots, _ = bed
    with pytest.raises(ValueError, match=r"no measured spots as context"):
        fitted.predict(Queries.of(spots), context=spots.take(torch.arange(0)))
