"""Holding out: what a trial knows and does not know, scores by hand, and every impossible request."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from scipy import sparse, stats
from scipy.spatial import cKDTree
from spatialdata import SpatialData

import histosge as sge
from histosge._embedding import Embedder
from histosge._geometry import estimate_lattice
from histosge._model import SPLITS, Measured, Plan, Trial, fit_model, predict_trial, pseudo_trial, trials
from histosge._model import evaluate as hold_out
from histosge._section import per_target_sum, read_section
from histosge._statistics import SPATIAL_WEIGHT, agreement, find_domains, morans_i, noise_ceiling, pseudo_spots, thin

CPU = torch.device("cpu")
CHEAP = ["ridge", "nearest", "mean"]
COLUMNS = {
    "section": "O",
    "split": "O",
    "protocol": "O",
    "repeat": "i",
    "fold": "i",
    "head": "O",
    "gene": "O",
    "n_train": "i",
    "n_test": "i",
    **dict.fromkeys(
        [
            *("pcc", "spearman", "mse", "mae", "mse_mean", "skill", "morans_i", "morans_i_measured"),
            *("gene_agreement", "ssim", "coverage", "width", "coverage_2", "coverage_4", "coverage_8", "ceiling"),
        ],
        "f",
    ),
}


def embedded(sdata):
    """The section with its embeddings, so that they are made once."""
    sge.tl.embed(sdata, encoder="stain-texture", progress=False)
    return sdata


def copy(s):
    tables = {name: table.copy() for name, table in s.tables.items()}
    return SpatialData(images=dict(s.images), shapes=dict(s.shapes), tables=tables)


@pytest.fixture(scope="module")
def _ready_once(_section_once):
    return embedded(copy(_section_once))


@pytest.fixture(scope="module")
def _second_once():
    return embedded(sge.datasets.synthetic(n_rows=10, n_cols=12, n_genes=20, mpp=2.0, rng=1))


@pytest.fixture
def ready(_ready_once):
    return copy(_ready_once)


@pytest.fixture
def second(_second_once):
    return copy(_second_once)


def score(sdata, **changes):
    run = {"encoder": "stain-texture", "heads": CHEAP, "genes": 20, "n_splits": 2, "n_folds": 2, "progress": False}
    if changes.get("split", "blocks") == "blocks":
        run["buffer_um"] = 150
    return sge.tl.evaluate(sdata, **run | changes)


def measured_of(sdata, name="spots", labels=None):
    section = read_section(sdata, report=False)
    embedder = Embedder.open(section, "stain-texture", device=CPU, progress=False)
    return Measured(name, section, embedder.embed_spots(), labels), embedder.config


@pytest.fixture(scope="module")
def room(_ready_once):
    return measured_of(_ready_once)


@pytest.fixture(scope="module")
def other_room(_second_once):
    return measured_of(_second_once, "second")[0]


def plan(split, **changes):
    given = {"split": split, "protocol": "held-out", "n_splits": 2, "n_repeats": 1, "buffer_um": 150.0}
    return Plan(**given | changes)


def fit(trial, config, **changes):
    given = {"head": "ridge", "genes": 20, "n_folds": 2, "baselines": (), "progress": False}
    rng = np.random.default_rng(changes.pop("seed", 0))
    return fit_model(trial.sections, trial.embeddings, config=config, rng=rng, device=CPU, **given | changes)


# --------------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_gives_the_documented_table(ready, split):
    several = [ready, ready] if split == "sections" else ready
    heads = ["ridge", "mean"] if split == "sections" else CHEAP
    scores = score(several, split=split, heads=heads)
    assert list(scores.columns) == list(COLUMNS)
    assert {c: scores[c].dtype.kind for c in scores} == COLUMNS
    documented = sge.tl.evaluate.__doc__
    assert [c for c in scores if f"``{c}``" not in documented] == []
    assert len(scores) == 2 * len(heads) * 20
    assert not scores.duplicated(["section", "repeat", "fold", "head", "gene"]).any()
    assert set(scores["split"]) == {split}
    assert set(scores["protocol"]) == {"held-out"}
    assert list(dict.fromkeys(scores["head"])) == heads
    assert np.isfinite(scores.select_dtypes("number")).all(axis=None)
    assert scores["ceiling"].between(0, 1).all()
    mean = scores.groupby("head")["pcc"].mean()
    assert mean["ridge"] > 0.3
    assert mean["mean"] == 0


def test_scores_are_those_of_a_hand(ready, room):
    """Random split, ridge: the split, the fit and every score done again without the room."""
    one, config = room
    scores = score(ready, split="random", n_splits=1, heads=["ridge"], rng=3, n_folds=3)
    rng = np.random.default_rng(3)
    order = rng.permutation(len(one.section.xy_px))
    train, test = np.sort(order[: round(len(order) / 2)]), np.sort(order[round(len(order) / 2) :])
    seed = rng.integers(2**63 - 1, size=1)[0]
    known = one.section.take(train)
    model = fit_model(
        [known], [one.embedding[train]], config=config, head="ridge", genes=20, n_folds=3, baselines=(),
        rng=np.random.default_rng(seed), device=CPU, progress=False,
    )  # fmt: skip
    context = model.context(known, one.embedding[train], device=CPU)
    at = {"embedding": one.embedding[test], "xy_um": one.section.xy_um[test], "spot_index": np.full(len(test), -1)}
    predicted = model.predict_from(context, **at)
    measured, learnt = one.section.dense(model.genes)[test], one.section.dense(model.genes)[train]
    assert scores["gene"].tolist() == list(model.genes)
    assert (scores["n_train"] == len(train)).all()
    assert (scores["n_test"] == len(test)).all()
    pairs = list(zip(predicted.T, measured.T, strict=True))
    close = {"rel": 1e-4, "abs": 1e-6}
    assert scores["pcc"].tolist() == pytest.approx([stats.pearsonr(p, m).statistic for p, m in pairs], **close)
    assert scores["spearman"].tolist() == pytest.approx([stats.spearmanr(p, m).statistic for p, m in pairs], **close)
    mse, mse_mean = ((predicted - measured) ** 2).mean(0), ((measured - learnt.mean(0)) ** 2).mean(0)
    assert scores["mse"].tolist() == pytest.approx(mse, **close)
    assert scores["mae"].tolist() == pytest.approx(np.abs(predicted - measured).mean(0), **close)
    assert scores["mse_mean"].tolist() == pytest.approx(mse_mean, **close)
    assert scores["skill"].tolist() == pytest.approx(1 - mse / mse_mean, **close)
    lower, upper = model.intervals.interval(predicted, level=0.9)
    assert scores["coverage"].tolist() == pytest.approx(((lower <= measured) & (measured <= upper)).mean(0))
    assert scores["width"].tolist() == pytest.approx((upper - lower).mean(0), **close)
    xy = one.section.xy_um[test]
    assert scores["morans_i_measured"].tolist() == pytest.approx(morans_i(measured, xy), **close)
    ceiling = pd.Series(noise_ceiling(one.section.counts), one.section.genes)
    assert scores["ceiling"].tolist() == pytest.approx(ceiling[scores["gene"]].tolist())


def test_intervals_hold_about_their_level_at_random_spots(ready):
    """Random halves are exchangeable: no gene's intervals can be far off. The level is always 0.9."""
    scores = score(ready, split="random", heads=["ridge"], n_splits=3, n_folds=5)
    assert scores["coverage"].mean() == pytest.approx(0.9, abs=0.05)
    assert (scores["width"] > 0).all()
    assert "at level 0.9" in sge.tl.evaluate.__doc__


def test_the_same_seed_gives_the_same_scores(ready):
    first, again = (score(ready, split="random", rng=5) for _ in range(2))
    assert_frame_equal(first, again)
    assert_frame_equal(first, score(ready, split="random", rng=np.random.default_rng(5)))
    assert not first["pcc"].equals(score(ready, split="random", rng=6)["pcc"])


def test_repeats_are_dealt_anew(ready):
    scores = score(ready, heads=["ridge"], n_repeats=2)
    assert scores.groupby(["repeat", "fold"]).size().to_dict() == {(r, f): 20 for r in (0, 1) for f in (0, 1)}
    by_repeat = scores.pivot_table(index=["fold", "gene"], columns="repeat", values="pcc")
    assert (by_repeat[0] != by_repeat[1]).all()


def test_a_list_of_one_section_is_that_section(ready):
    assert_frame_equal(score(ready, split="random"), score([ready], split="random"))


def test_sections_of_a_list_are_scored_one_by_one(ready, second):
    both = score([ready, second], split="lattice", heads=["ridge"])
    assert both.groupby("section", sort=False)["fold"].nunique().to_dict() == {"0: spots": 2, "1: spots": 2}
    alone = score(ready, split="lattice", heads=["ridge"])
    mine = both[both["section"] == "0: spots"]
    assert mine["n_train"].tolist() == alone["n_train"].tolist()


def test_nothing_is_written_into_sdata(ready):
    before = copy(ready)
    score(ready)
    assert {k: list(getattr(ready, k)) for k in ("images", "shapes", "tables", "labels", "points")} == {
        k: list(getattr(before, k)) for k in ("images", "shapes", "tables", "labels", "points")
    }
    for name, table in ready.tables.items():
        old = before.tables[name]
        assert_frame_equal(table.obs, old.obs)
        assert_frame_equal(table.var, old.var)
        assert set(table.obsm) == set(old.obsm)
        assert set(table.uns) == set(old.uns)
        assert set(table.layers) == set(old.layers)
    assert abs(ready["table"].X - before["table"].X).sum() == 0


@pytest.mark.parametrize(
    ("split", "heads"),
    [
        ("blocks", ["in-context+kriging", "kriging", "ridge", "nearest", "mean"]),
        ("sections", ["in-context+kriging", "kriging", "ridge", "mean"]),
    ],
)
def test_default_heads_are_ours_and_its_rivals(ready, split, heads):
    with pytest.raises(ValueError, match=re.escape(f"which are not among the heads {heads}.")):
        score([ready, ready], heads=None, split=split, head_options={"none": {}})


def test_head_options_reach_their_head(ready):
    plain = score(ready, split="random", n_splits=1, heads=["nearest", "ridge"])
    changed = score(
        ready, split="random", n_splits=1, heads=["nearest", "ridge"], head_options={"nearest": {"n_neighbours": 1}}
    )
    same = plain["pcc"] == changed["pcc"]
    assert same[plain["head"] == "ridge"].all()
    assert not same[plain["head"] == "nearest"].any()


# ------------------------------------------------------------------------------------------- nothing leaks


def tampered(one: Measured, rows) -> Measured:
    """The same section, had something else been measured at some of its spots."""
    rng = np.random.default_rng(99)
    counts = one.section.counts.tolil(copy=True)
    counts[rows] = rng.poisson(rng.gamma(0.5, 40, (len(rows), counts.shape[1])))
    counts = sparse.csr_matrix(counts)
    expression = one.section.expression.tolil(copy=True)
    expression[rows] = per_target_sum(counts)[rows]
    return replace(one, section=replace(one.section, expression=sparse.csr_matrix(expression), counts=counts))


def drawn(one: Measured, *, seed: int):
    """Groups of spots and the two halves of their counts, as the first trial with pseudo-spots draws them."""
    rng = np.random.default_rng(seed)
    group = pseudo_spots(one.section.lattice, rng=rng)
    return group, *thin(one.section.counts, rng=rng)


def two_worlds(room, other_room, split) -> tuple[Trial, Trial]:
    """The first trial of a split, and the same one had something else been measured at the spots it scores."""
    if split == "pseudo-spots":
        group, half, other = drawn(room, seed=1)
        another = np.random.default_rng(9).permutation(other.toarray().ravel()).reshape(other.shape)
        first = next(trials([room], plan(split), rng=np.random.default_rng(1)))
        same = pseudo_trial(room, group, half, other)
        np.testing.assert_array_equal(first.truth.toarray(), same.truth.toarray())
        return first, pseudo_trial(room, group, half, sparse.csr_matrix(another))
    several = [room, other_room] if split == "sections" else [room]
    first = next(trials(several, plan(split), rng=np.random.default_rng(1)))
    several = [tampered(room, first.rows), *several[1:]]
    return first, next(trials(several, plan(split), rng=np.random.default_rng(1)))


@pytest.mark.parametrize("split", SPLITS)
def test_held_out_measurements_reach_no_prediction(room, other_room, split):
    """Neither values nor the choice of genes, with and without spots as context."""
    room, config = room
    first, second = two_worlds(room, other_room, split)
    np.testing.assert_array_equal(first.rows, second.rows)
    for head in ("ridge", "mean") if split == "sections" else CHEAP:
        one, other = (fit(trial, config, head=head, genes=8) for trial in (first, second))
        assert list(one.genes) == list(other.genes)
        assert list(one.context_genes) == list(other.context_genes)
        (predicted, measured), (same, changed) = (
            predict_trial(m, t, device=CPU) for m, t in ((one, first), (other, second))
        )
        np.testing.assert_array_equal(predicted, same)
        assert (measured != changed).mean() > 0.5


@pytest.mark.parametrize("split", SPLITS)
def test_held_out_measurements_do_not_reach_the_default_head(room, other_room, split):
    room, config = room
    first, second = two_worlds(room, other_room, split)
    few = {"in-context": {"n_steps": 10}, "kriging": {"n_steps": 2}}
    quick = {"genes": 8, "head": "in-context+kriging", "head_options": few}
    predicted, same = (predict_trial(fit(t, config, **quick), t, device=CPU)[0] for t in (first, second))
    assert predicted.std(0).min() > 0
    np.testing.assert_array_equal(predicted, same)


def test_spots_learnt_from_do_reach_predictions(room):
    """The other side of the tests above: had they compared nothing, this one would fail."""
    room, config = room
    first = next(trials([room], plan("random"), rng=np.random.default_rng(1)))
    learnt = np.setdiff1d(np.arange(len(room.section.xy_px)), first.rows)
    second = next(trials([tampered(room, learnt)], plan("random"), rng=np.random.default_rng(1)))
    for head in CHEAP:
        one, other = (predict_trial(fit(t, config, head=head), t, device=CPU)[0] for t in (first, second))
        assert (one != other).all(axis=0).any()


class Witness(sge.Head):
    """Predicts nothing, and keeps what it learns from: in each fold, and for each split."""

    seen: ClassVar[list[sge.Spots]]

    def fit(self, spots, *, rng, progress=None):
        self.seen.append(spots)
        return self

    def predict(self, queries, *, context):
        return torch.zeros(len(queries), context.expression.shape[1])

    def state(self):
        return {}, {}

    @classmethod
    def from_state(cls, config, weights):
        return cls()


def test_all_heads_of_a_split_see_the_same_spots_genes_and_folds(ready):
    first, second = (type("One", (Witness,), {"name": name, "seen": []}) for name in ("first", "second"))
    scores = score(ready, genes=8, heads=[first, second, *CHEAP])
    assert len(first.seen) == len(second.seen) == 2 * 3  # two splits, of two folds and all spots
    for witness in (first, second):  # fits run side by side, in any order
        witness.seen.sort(key=lambda spots: spots.xy_um.ravel().tolist())
    for one, other in zip(first.seen, second.seen, strict=True):
        assert torch.equal(one.expression, other.expression)
        assert torch.equal(one.xy_um, other.xy_um)
    assert len({tuple(spots.xy_um.ravel().tolist()) for spots in first.seen}) == 6
    chosen = scores.groupby(["fold", "head"])["gene"].agg(tuple).unstack("head")
    assert (chosen["ridge"] == chosen["nearest"]).all()
    assert (chosen["ridge"] == chosen["mean"]).all()


@pytest.mark.slow
def test_of_permuted_counts_nothing_is_predicted(ready):
    """140 spots and correlated genes: the mean over genes and splits strays by some hundredths."""
    table = ready.tables["table"]
    table.X = table.X[np.random.default_rng(0).permutation(table.n_obs)]
    heads = [*CHEAP, "coordinates", "kriging"]
    for split in ("random", "lattice"):
        scores = score(ready, split=split, n_splits=4, heads=heads, head_options={"kriging": {"n_steps": 5}})
        mean = scores.groupby("head")["pcc"].mean()
        assert len(mean) == len(heads)
        assert mean.abs().max() < 0.12, mean
        assert (scores.groupby("head")["skill"].mean() < 0.03).all()


# ------------------------------------------------------------------------------------------------------ splits


def distances(trial, one):
    """From every spot scored to the nearest one learnt from, µm."""
    return cKDTree(trial.sections[0].xy_um).query(one.section.xy_um[trial.rows])[0]


@pytest.mark.parametrize(("buffer_um", "wanted"), [(0.0, 0.0), (150.0, 150.0), (None, 250.0)])
def test_no_spot_within_the_buffer_is_learnt_from(room, buffer_um, wanted):
    one, _ = room
    found = list(trials([one], plan("blocks", buffer_um=buffer_um, n_splits=3), rng=np.random.default_rng(0)))
    assert np.sort(np.concatenate([t.rows for t in found])).tolist() == list(range(len(one.section.xy_px)))
    near = min(distances(t, one).min() for t in found)
    assert near >= wanted
    assert near < wanted + 110  # and no wider than asked for


def test_random_halves_leave_no_spot_out(room):
    one, _ = room
    n = len(one.section.xy_px)
    found = list(trials([one], plan("random"), rng=np.random.default_rng(0)))
    assert [len(t.rows) + len(t.sections[0].xy_px) for t in found] == [n, n]
    assert all(distances(t, one).min() > 90 for t in found)
    assert found[0].rows.tolist() != found[1].rows.tolist()


@pytest.mark.parametrize("keep", [3, 4, 7])
def test_thinned_lattices_have_the_pitch_of_what_is_left(room, keep):
    """Heads see distances in pitches: on a coarser array these are longer."""
    one, _ = room
    for trial in trials([one], plan("lattice", keep=keep), rng=np.random.default_rng(0)):
        left = trial.sections[0]
        near = cKDTree(left.xy_um).query(left.xy_um, k=2)[0][:, 1]
        assert left.pitch_um == pytest.approx(np.median(near), rel=0.01)
        assert left.pitch_um == pytest.approx(100 * np.sqrt(keep), rel=0.01)
        assert len(left.xy_um) == pytest.approx(len(one.section.xy_um) / keep, abs=8)


def test_no_more_lattice_phases_than_there_are(room):
    one, _ = room
    assert len(list(trials([one], plan("lattice", n_splits=10, keep=3), rng=np.random.default_rng(0)))) == 3


def squared(one: Measured) -> Measured:
    """Spots of the section moved onto a square array, 11 by 11."""
    rows = np.arange(121)
    xy = np.stack(np.meshgrid(np.arange(11.0), np.arange(11.0)), -1).reshape(-1, 2) * 50 + 100
    section = replace(one.section.take(rows), xy_px=xy, lattice=estimate_lattice(xy))
    return Measured(one.name, section, one.embedding[rows])


@pytest.mark.parametrize(("kind", "places"), [("hexagonal", 7), ("square", 5)])
def test_big_spots_and_truth_are_made_of_different_counts(room, kind, places):
    one = room[0] if kind == "hexagonal" else squared(room[0])
    assert one.section.lattice.kind == kind
    (trial,) = trials([one], plan("pseudo-spots", n_splits=1), rng=np.random.default_rng(2))
    group, half, other = drawn(one, seed=2)
    assert abs(half + other - one.section.counts).sum() == 0
    assert half.sum() == pytest.approx(one.section.counts.sum() / 2, rel=0.01)

    members = np.flatnonzero(group >= 0)
    np.testing.assert_array_equal(trial.rows, members)
    np.testing.assert_allclose(trial.truth.toarray(), per_target_sum(other[members]).toarray(), rtol=1e-5)
    np.testing.assert_allclose(trial.xy_um, one.section.xy_um[members])
    assert (trial.spot_index == -1).all()
    (big,) = trial.sections
    for i in range(group.max() + 1):
        mine = group == i
        np.testing.assert_allclose(big.xy_px[i], one.section.xy_px[mine].mean(0))
        np.testing.assert_allclose(trial.embeddings[0][i], one.embedding[mine].mean(0), rtol=1e-4, atol=1e-5)
        total = np.asarray(half[mine].sum(0)).ravel()
        wanted = np.log1p(total / total.sum() * 1e4)
        np.testing.assert_allclose(big.expression[i].toarray()[0], wanted, rtol=1e-5)
    assert big.pitch_um == pytest.approx(one.section.pitch_um * np.sqrt(places))
    full = big.xy_um[np.bincount(group[members]) == places]
    near = cKDTree(full).query(full, k=2)[0][:, 1]
    assert big.pitch_um == pytest.approx(np.median(near), rel=0.02)


def test_ceiling_of_pseudo_spots_is_that_of_half_the_counts(ready):
    """Half as many counts say less: seen where counts are few."""
    table = ready.tables["table"]
    counts = table.X.tocsr().astype(int)
    counts.data = np.random.default_rng(0).binomial(counts.data, 0.02)
    table.X = counts.astype(np.float32)
    whole, half = (
        score(ready, split=split, heads=["mean"]).groupby("gene")["ceiling"].mean().mean()
        for split in ("random", "pseudo-spots")
    )
    assert 0.3 < half < whole - 0.03


# ----------------------------------------------------------------------------------------------------- sections


def reordered(one: Measured, genes) -> Measured:
    return replace(one, section=one.section.with_genes(pd.Index(genes)))


def test_genes_in_another_order_are_matched_by_name(room, other_room):
    one, config = room
    mixed = reordered(other_room, list(np.random.default_rng(0).permutation(other_room.section.genes)))
    for several in ([one, mixed], [mixed, one]):
        for trial in trials(several, plan("sections"), rng=np.random.default_rng(0)):
            model = fit(trial, config)
            _, measured = predict_trial(model, trial, device=CPU)
            scored = one if trial.name == one.name else mixed
            np.testing.assert_array_equal(measured, scored.section.dense(model.genes))
            assert [len(s.xy_px) for s in trial.sections] == [len((mixed if scored is one else one).section.xy_px)]


def test_a_gene_that_a_section_lacks_is_not_scored(room, other_room):
    """It is no zero: as one, it would score 0 whatever is predicted."""
    one, config = room
    lacking = reordered(other_room, list(other_room.section.genes[3:]))
    for several in ([one, lacking], [lacking, one]):
        scores = hold_out(
            several, plan("sections"), heads=["ridge"], config=config, genes=20, n_folds=2,
            rng=np.random.default_rng(0), device=CPU, progress=False,
        )  # fmt: skip
        for _, part in scores.groupby("section"):
            assert sorted(part["gene"]) == sorted(other_room.section.genes[3:])
        assert (scores["pcc"] != 0).all()


def test_a_section_left_out_is_not_measured(room, other_room):
    one, _ = room
    third = replace(one, name="third")
    found = list(trials([one, other_room, third], plan("sections"), rng=np.random.default_rng(0)))
    assert [t.name for t in found] == [one.name, "second", "third"]
    for trial in found:
        assert len(trial.sections) == 2
        assert not trial.measured
        assert (trial.spot_index == -1).all()


def test_sections_of_the_same_name_are_told_apart(ready, second):
    scores = score([ready, second], split="sections", heads=["ridge"])
    assert scores.groupby("section")["n_test"].first().to_dict() == {
        "0: spots": ready["table"].n_obs,
        "1: spots": second["table"].n_obs,
    }
    assert scores.groupby("section")["n_train"].first().to_dict() == {
        "0: spots": second["table"].n_obs,
        "1: spots": ready["table"].n_obs,
    }


# ----------------------------------------------------------------------------------------- published protocol


def test_published_protocol_measures_memory_and_says_so(ready, log):
    """Counts are permuted: there is nothing to predict, but something to remember."""
    table = ready.tables["table"]
    table.X = table.X[np.random.default_rng(0).permutation(table.n_obs)]
    run = {"split": "random", "heads": ["ridge"], "n_splits": 2}
    held_out = score(ready, **run)
    assert not [r for r in log.records if "measures memory" in r.getMessage()]
    published = score(ready, protocol="published", **run)
    assert [r.levelname for r in log.records if "measures memory" in r.getMessage()] == ["WARNING"]
    assert set(published["protocol"]) == {"published"}
    assert (published["n_test"] == ready["table"].n_obs).all()
    assert (published["n_train"] == held_out["n_train"]).all()
    assert published["pcc"].mean() > held_out["pcc"].mean() + 0.08


def test_published_protocol_hides_a_spot_from_itself(room):
    one, _ = room
    trial = next(trials([one], plan("random", protocol="published"), rng=np.random.default_rng(0)))
    learnt = np.flatnonzero(trial.spot_index >= 0)
    np.testing.assert_array_equal(trial.sections[0].xy_px[trial.spot_index[learnt]], one.section.xy_px[learnt])
    assert len(learnt) == len(trial.sections[0].xy_px)


# ------------------------------------------------------------------------------------------------------ labels


def halves_of(sdata):
    """Left and right half of the section; a tenth of the spots without a word."""
    x = sdata["table"].obsm["spatial"][:, 0]
    words = np.where(x > np.median(x), "right", "left").astype(object)
    words[::10] = np.nan
    sdata["table"].obs["domain"] = pd.Categorical(words)
    return sdata


@pytest.mark.slow
def test_labels_are_compared_and_teach_nothing(ready):
    run = {"heads": ["ridge", "nearest"]}
    plain = score(ready, **run)
    told = score(halves_of(ready), labels="domain", **run)
    assert list(told.columns) == [*COLUMNS, "ari", "nmi", "ari_measured", "nmi_measured"]
    assert_frame_equal(told[list(COLUMNS)], plain)
    by_head = told.groupby("head")[["ari", "nmi", "ari_measured", "nmi_measured"]]
    assert (by_head.nunique() == 1).all(axis=None)
    assert by_head.first()["ari_measured"].nunique() == 1
    assert by_head.first().to_numpy().max() <= 1
    assert {told[c].dtype.kind for c in ("ari", "nmi", "ari_measured", "nmi_measured")} == {"f"}


@pytest.mark.slow
def test_spots_without_a_label_are_left_out(ready):
    """By hand: every spot predicted once, by a model that has not seen it; domains of all spots, compared where labels are."""
    halves_of(ready)
    told = score(ready, labels="domain", heads=["ridge"], genes="all")
    one, config = measured_of(ready)
    rng = np.random.default_rng(0)
    several = list(trials([one], plan("blocks"), rng=rng))
    predicted = np.full((len(one.section.xy_px), 20), np.nan, np.float32)
    for trial, seed in zip(several, rng.integers(2**63 - 1, size=len(several)), strict=True):
        predicted[trial.rows] = predict_trial(fit(trial, config, genes="all", seed=seed), trial, device=CPU)[0]
    assert np.isfinite(predicted).all()
    words = ready["table"].obs.set_index("spot_id").loc[one.section.instances, "domain"]
    known = words.notna().to_numpy()
    assert 0.8 < known.mean() < 0.95
    for name, values in (("", predicted), ("_measured", one.section.dense(one.section.genes))):
        domains = find_domains(
            values, one.section.xy_px, resolution=1.0, n_domains=None, n_pcs=30, n_neighbours=15,
            spatial_weight=SPATIAL_WEIGHT, rng=0,
        )  # fmt: skip
        assert len(set(domains)) > 1
        wanted = agreement(domains[known], words[known].astype(str).to_numpy())
        for score_name in ("ari", "nmi"):
            assert told[f"{score_name}{name}"].to_numpy() == pytest.approx(wanted[score_name], abs=1e-6)


def test_no_gene_that_all_folds_chose(ready, log):
    """All genes are noise, so that another one has the strongest pattern in each fold."""
    halves_of(ready)
    table = ready["table"]
    table.X = sparse.csr_matrix(np.random.default_rng(0).poisson(5, table.shape).astype(np.float32))
    told = score(ready, labels="domain", heads=["mean"], genes=1)
    assert told["gene"].nunique() == 2
    assert told[["ari", "nmi", "ari_measured", "nmi_measured"]].isna().all(axis=None)
    assert "no gene was chosen in every fold of section 'spots': ari and nmi are NaN" in log.text


# ----------------------------------------------------------------------------------------------------- ceiling


def test_no_ceiling_without_counts(ready, log):
    table = ready["table"]
    table.layers["log"] = per_target_sum(table.X.tocsr())
    run = {"split": "random", "heads": ["ridge"]}
    raw, logged = score(ready, **run), score(ready, layer="log", **run)
    assert raw["ceiling"].notna().all()
    assert logged["ceiling"].isna().all()
    assert logged["ceiling"].dtype.kind == "f"
    assert logged["pcc"].tolist() == pytest.approx(raw["pcc"].tolist(), abs=1e-3)
    assert "no noise ceiling: the table of 'spots' holds no raw counts" in log.text


def test_no_head_is_better_than_the_ceiling(ready):
    table = ready.tables["table"]
    counts = table.X.tocsr().astype(int)
    counts.data = np.random.default_rng(0).binomial(counts.data, 0.03)
    table.X = counts.astype(np.float32)
    scores = score(ready, split="random")
    mean = scores.groupby("head")[["pcc", "ceiling"]].mean()
    assert (mean["pcc"] < mean["ceiling"] + 0.03).all()
    assert mean.loc["ridge", "pcc"] > 0.3 * mean.loc["ridge", "ceiling"]
    assert mean.loc["ridge", "ceiling"] < 0.9


# ----------------------------------------------------------------------------------------------------- refused


@pytest.fixture
def nothing_embedded(log):
    """Mistakes are told before an hour of embedding."""
    yield
    assert "embedding" not in log.text


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"split": "kfold"}, r"split='kfold' is unknown\. Choose one of \('blocks', 'random', 'lattice', 'sections'"),
        ({"protocol": "cv"}, r"protocol='cv' is unknown\. Choose one of \('held-out', 'published'\)"),
        ({"n_splits": 1}, r"n_splits=1: pass a whole number of at least 2 and at most 1000"),
        ({"n_splits": 0, "split": "random"}, r"n_splits=0: pass a whole number of at least 1 and at most 1000"),
        ({"n_splits": 2.0}, r"n_splits=2\.0: pass a whole number of at least 2 and at most 1000"),
        ({"n_splits": True, "split": "random"}, r"n_splits=True: pass a whole number"),
        ({"n_repeats": 0}, r"n_repeats=0: pass a whole number of at least 1 and at most 1000"),
        ({"split": "sections"}, r"split='sections' leaves one section out, and there is only one: pass a list"),
        (
            {"protocol": "published", "split": "pseudo-spots"},
            r"protocol='published' scores training spots, which split='pseudo-spots' does not have\. Choose split='random'",
        ),
        (
            {"labels": "domain", "split": "random"},
            r"labels='domain' need held-out predictions of all spots.* split='blocks'",
        ),
        ({"labels": "domain", "protocol": "published"}, r"labels='domain' need .* protocol='held-out'"),
        ({"labels": "nothing"}, r"labels='nothing' has no value at any spot of \['spots'\]\. Name a column that"),
        ({"heads": []}, r"heads=\[\]: name at least one head, each once"),
        ({"heads": ["mean", "mean"]}, r"heads=\['mean', 'mean'\]: name at least one head, each once"),
        ({"heads": ["rigde"]}, r"head='rigde' is unknown\. Did you mean 'ridge'\?"),
        (
            {"head_options": {"nearst": {}}},
            r"head_options name \['nearst'\], which are not among the heads \['ridge', 'nearest', 'mean'\]\. Use the names",
        ),
        ({"n_folds": 1}, r"n_folds=1: choose a whole number from 2 to 20"),
        ({"genes": ["GENE999"]}, r"genes: 1 of 1 names are not in the table \(\['GENE999'\]\)"),
        ({"buffer_um": -1.0}, r"buffer_um=-1\.0: give a distance in µm, 0 for no buffer"),
        ({"buffer_um": 900.0}, r"buffer_um=900 leaves \d of 138 spots to learn from when fold 0 of 2 is held out"),
        ({"split": "lattice", "keep": 5}, r"keep=5: on a hexagonal lattice choose one of \(3, 4, 7\)"),
        (
            {"split": "pseudo-spots", "layer": "log"},
            r"split='pseudo-spots' needs raw counts \(whole numbers\), which 'spots' does not have\. Choose another split",
        ),
    ],
)
@pytest.mark.usefixtures("nothing_embedded")
def test_refused_before_anything_is_embedded(ready, wrong, match):
    ready["table"].layers["log"] = per_target_sum(ready["table"].X.tocsr())
    ready["table"].obs["nothing"] = np.nan
    with pytest.raises(ValueError, match=match):
        score(ready, **wrong)


@pytest.mark.parametrize("head", ["nearest", "coordinates", "ridge+nearest"])
@pytest.mark.usefixtures("nothing_embedded")
def test_heads_that_know_positions_only_are_refused_across_sections(ready, second, head):
    match = rf"heads \['{head.replace('+', '[+]')}'\] know positions only, and with split='sections' nothing is measured on .*\. Leave them out"
    with pytest.raises(ValueError, match=match):
        score([ready, second], split="sections", heads=["ridge", head])


@pytest.mark.usefixtures("nothing_embedded")
def test_no_section():
    with pytest.raises(ValueError, match=r"sdata is an empty list: pass at least one section\."):
        score([])


@pytest.mark.usefixtures("nothing_embedded")
def test_labels_that_are_no_column(ready):
    with pytest.raises(KeyError, match=r"labels='layer' is not a column of sdata\.tables\['table'\]\.obs: \['region'"):
        score(ready, labels="layer")


@pytest.mark.parametrize(
    ("split", "match"),
    [
        ("lattice", r"split='lattice': the spots of 'spots' lie on no lattice, .* Choose split='blocks' or 'random'"),
        (
            "pseudo-spots",
            r"split='pseudo-spots' needs spots on a lattice, which 'spots' does not have\. Choose another split",
        ),
    ],
)
def test_spots_on_no_lattice(room, split, match):
    one = replace(room[0], section=replace(room[0].section, lattice=None))
    with pytest.raises(ValueError, match=match):
        next(trials([one], plan(split), rng=np.random.default_rng(0)))
