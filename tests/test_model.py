"""Fitting, saving and loading models; settings and names of elements."""

from __future__ import annotations

import dataclasses
import json
import logging

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from tests import rounding

import histosge as sge
from histosge import _keys
from histosge._embedding import EmbeddingConfig, EncoderConfig
from histosge._encoders import EncoderSpec
from histosge._geometry import nearest_spots
from histosge._heads import HEADS, Queries, get_head
from histosge._model import Model, check_arguments, fit_model, score, stack_sections
from histosge._model import _fit as _fitting
from histosge._section import read_section
from histosge._settings import Settings, logger, progress_bar
from histosge._statistics import block_folds, calibrate, random_folds

CPU = torch.device("cpu")
SPEC = EncoderSpec(name="by-hand", mpp=0.5, tile_px=224, embed_dim=10)
CONFIG = EmbeddingConfig((EncoderConfig(SPEC, 0.5),))
OPTIONS = {"published": {"n_steps": 3}, "in-context": {"n_steps": 30}, "aggregate": {"n_steps": 30}}
"""What is tested here is what reaches what, and not how good a network gets."""
FILE = "histosge.safetensors"
every_head = pytest.mark.parametrize("head", sorted(HEADS))


@pytest.fixture(scope="module")
def section(_section_once):
    return read_section(_section_once)


@pytest.fixture(scope="module")
def embedding(_section_once, section):
    """What the image could tell at best: mixtures of the true expression, and noise."""
    truth = sge.datasets.synthetic_truth(_section_once).loc[section.instances].to_numpy()
    return embed_by_hand(truth)


def embed_by_hand(truth):
    rng = np.random.default_rng(0)
    mixed = (truth - truth.mean(0)) @ rng.standard_normal((truth.shape[1], 8)) / 4
    return np.column_stack([mixed, rng.standard_normal((len(truth), 2))]).astype(np.float32)


def fit(section, embedding, *, head="ridge", genes=8, n_folds=3, seed=0, **kwargs):
    sections, embeddings = (section, embedding) if isinstance(section, list) else ([section], [embedding])
    options = OPTIONS.get(head) if isinstance(head, str) else None
    if isinstance(head, str) and "+" in head:
        options = {part: OPTIONS[part] for part in head.split("+") if part in OPTIONS}
    return fit_model(
        sections,
        embeddings,
        config=CONFIG,
        head=head,
        genes=genes,
        n_folds=n_folds,
        rng=np.random.default_rng(seed),
        device=CPU,
        progress=False,
        **{"head_options": options} | kwargs,
    )


def check(*sections, head="ridge", genes=8, n_folds=3, head_options=None):
    check_arguments(head=head, genes=genes, n_folds=n_folds, sections=sections, head_options=head_options)


def at_spots(model, section, embedding, *, hidden=True):
    own = np.arange(len(embedding)) if hidden else np.full(len(embedding), -1)
    return predict(model, section, embedding, places=embedding, xy_px=section.xy_px, spot_index=own)


def predict(model, section, embedding, *, places, xy_px, spot_index):
    """Predict at places of a section whose spots have the given embedding."""
    context = model.context(section, embedding, device=CPU)
    return model.predict_from(context, embedding=places, xy_um=xy_px * section.mpp, spot_index=spot_index)


def with_genes(section, names, columns=None):
    columns = np.arange(len(names)) if columns is None else columns
    return dataclasses.replace(section, expression=section.expression[:, columns], genes=pd.Index(names))


# ---------------------------------------------------------------------------------------------------------- fit


@pytest.fixture(scope="module")
def ridge(section, embedding):
    return fit(section, embedding)


def test_what_a_model_holds(ridge, section):
    assert ridge.head == "ridge"
    assert len(ridge.genes) == 8
    assert ridge.genes.isin(section.genes).all()
    assert ridge.genes.isin(ridge.context_genes).all()
    assert [(weight, h.name) for weight, h in ridge.heads] == [(1.0, "ridge")]  # one, fitted on all spots
    assert list(ridge.scores.columns) == ["highly_variable", "held_out_pcc", "held_out_mse", "predictable"]
    assert ridge.scores.index.equals(ridge.genes)
    assert set(ridge.held_out) == {"ridge", "nearest"}
    assert ridge.info["n_folds"] == 3
    assert ridge.info["n_spots"] == len(section.xy_px)
    assert ridge.info["n_sections"] == 1
    assert ridge.info["pitch_um"] == pytest.approx(100)
    assert "never saw it" in ridge.info["split"]
    assert repr(ridge).startswith("Model: ridge on by-hand, 8 genes, held-out PCC 0.")


def test_a_model_finds_what_can_be_known(section, embedding, ridge):
    """The embedding holds the truth; scores are held-out, so that counting noise keeps them below 1."""
    assert ridge.held_out["ridge"]["pcc"] > 0.5
    assert ridge.held_out["ridge"]["pcc"] > ridge.held_out["nearest"]["pcc"] > 0
    assert ridge.scores["predictable"].all()
    assert ridge.scores["held_out_pcc"].mean() == pytest.approx(ridge.held_out["ridge"]["pcc"], abs=0.1)
    variance = section.dense(ridge.genes).var(0)
    assert (ridge.scores["held_out_mse"] < variance).all()


def test_scores_are_held_out(section):
    """More numbers than spots fit anything they have seen: on the spots of training, not on those held out."""
    noise = np.random.default_rng(0).standard_normal((len(section.xy_px), 300)).astype(np.float32)
    model = fit(section, noise)
    assert abs(model.held_out["ridge"]["pcc"]) < 0.12
    assert not model.scores["predictable"].any()


def test_expression_of_other_spots_is_not_predicted(section, embedding):
    order = np.random.default_rng(1).permutation(len(embedding))
    model = fit(dataclasses.replace(section, expression=section.expression[order]), embedding)
    assert abs(model.held_out["ridge"]["pcc"]) < 0.2  # all genes follow the same few fields, and are wrong together


def test_a_better_rival_is_named(section, embedding, log):
    model = fit(section, embedding, head="nearest")
    assert set(model.held_out) == {"nearest", "ridge"}
    (warning,) = [r.getMessage() for r in log.records if r.levelno == logging.WARNING]
    assert warning.startswith("head 'nearest' does not beat ridge on held-out spots")
    assert warning.endswith("consider head='ridge'")


@pytest.mark.parametrize(
    ("embedded", "better"),
    [
        ("truth", "ridge"),  # the image says all: what the neighbours add is noise
        ("noise", "nearest"),  # and the other way round
    ],
)
def test_a_better_part_is_named(section, embedding, log, embedded, better):
    noise = np.random.default_rng(0).standard_normal(embedding.shape).astype(np.float32)
    model = fit(section, embedding if embedded == "truth" else noise, head="ridge+nearest")
    pcc = {name: scores["pcc"] for name, scores in model.held_out.items()}
    assert max(pcc, key=pcc.get) == better
    (warning,) = [r.getMessage() for r in log.records if r.levelno == logging.WARNING]
    told = f"head 'ridge+nearest' does not beat {better} on held-out spots (PCC {pcc['ridge+nearest']:.3f})"
    assert warning == f"{told}: consider head={better!r}"


@pytest.mark.parametrize(("lead", "told"), [(0.005, 0), (0.02, 1)])
def test_a_part_is_better_only_by_more_than_chance(log, lead, told):
    held_out = {"in-context+kriging": {"pcc": 0.3}, "in-context": {"pcc": 0.2}, "kriging": {"pcc": 0.3 + lead}}
    _fitting._report("in-context+kriging", held_out)
    assert len([r for r in log.records if r.levelno == logging.WARNING]) == told


def test_a_head_that_is_best_is_not_warned_about(section, embedding, log):
    model = fit(section, embedding, head="ridge")
    assert model.held_out["ridge"]["pcc"] > model.held_out["nearest"]["pcc"]
    assert [r.getMessage() for r in log.records if r.levelno == logging.WARNING] == []


@pytest.mark.parametrize(
    ("head", "scored"),
    [
        ("ridge+nearest", {"ridge+nearest", "ridge", "nearest"}),
        ("mean + nearest", {"mean + nearest", "mean", "nearest", "ridge"}),
        ("nearest", {"nearest", "ridge"}),
        ("mean", {"mean", "nearest", "ridge"}),
    ],
)
def test_the_whole_its_parts_and_the_rivals_are_scored(section, embedding, head, scored):
    model = fit(section, embedding, head=head, genes="all")
    assert set(model.held_out) == scored
    # the same folds for all: what needs no chance scores the same, whoever is asked
    assert model.held_out["nearest"] == fit(section, embedding, head="nearest", genes="all").held_out["nearest"]


@pytest.mark.parametrize(("head", "n_folds"), [("nearest", 3), ("nearest", 5)])
def test_held_out_scores_are_blockwise(section, embedding, head, n_folds):
    """Inverse distance by hand on blocks: the scores of the model, and worse ones than on random folds."""
    model = fit(section, embedding, head=head, genes="all", n_folds=n_folds)
    measured, xy = (
        section.dense(model.genes),
        section.xy_um.astype(np.float32).astype(float),
    )  # the same of equally far ones
    blocks = block_folds(section.xy_um, n_folds=n_folds, rng=np.random.default_rng(0))
    pcc = {}
    for name, fold in (
        ("blocks", blocks),
        ("random", random_folds(len(xy), n_folds=n_folds, rng=np.random.default_rng(0))),
    ):
        said = np.zeros_like(measured)
        for one in range(n_folds):
            index, dist, _ = nearest_spots(
                xy[fold == one], xy[fold != one], k=20, exclude=np.full((fold == one).sum(), -1)
            )
            weight = (1 / dist) / (1 / dist).sum(1, keepdims=True)
            said[fold == one] = np.einsum("mk,mkg->mg", weight, measured[fold != one][index])
        pcc[name] = score(said, measured, fold=fold)
    assert np.abs(pcc["blocks"].pcc - model.scores["held_out_pcc"]).max() < 1e-3
    assert np.abs(pcc["blocks"].mse - model.scores["held_out_mse"]).max() < 1e-3
    assert pcc["blocks"].mse.mean() > pcc["random"].mse.mean()
    assert model.info["split"].startswith(f"blocks, {n_folds} folds")


def folds_of(section, embedding):
    """Which of three folds each spot is in, by the spots that a head of each fold is given."""
    given = []

    class Given(get_head("mean")):
        name = "given"

        def fit(self, spots, **options):
            given.append({(int(number), *xy) for number, xy in zip(spots.section, spots.xy_um.tolist(), strict=True)})
            return super().fit(spots, **options)

    model = fit(section, embedding, n_folds=3, head=Given)
    every = [(int(number), *xy) for number, xy in zip(model.spots.section, model.spots.xy_um.tolist(), strict=True)]
    left_out = [set(every) - spots for spots in given if len(spots) < len(every)]
    assert len(left_out) == 3
    assert sum(map(len, left_out)) == len(every) == len(set().union(*left_out))
    return np.array([next(i for i, spots in enumerate(left_out) if spot in spots) for spot in every])


def test_folds_are_contiguous(section, embedding):
    fold = folds_of(section, embedding)
    index, _, _ = nearest_spots(section.xy_um, section.xy_um, k=1, exclude=np.arange(len(fold)))
    assert np.mean(fold[index[:, 0]] == fold) > 0.6  # at random, a third
    assert np.bincount(fold).min() > 0.5 * len(fold) / 3


def test_folds_of_two_sections_are_contiguous_in_each(section, other, embedding):
    """Each section has blocks of its own; folds hold spots of both."""
    fold = folds_of([section, other], [embedding, embedding])
    n = len(embedding)
    index, _, _ = nearest_spots(section.xy_um, section.xy_um, k=1, exclude=np.arange(n))
    for part in (fold[:n], fold[n:]):
        assert np.mean(part[index[:, 0]] == part) > 0.6
        assert (np.bincount(part, minlength=3) > 0).all()
    assert (fold[:n] != fold[n:]).any()  # the grid of the other section is shifted


def test_options_by_name_of_the_head(section, embedding):
    model = fit(section, embedding, head="ridge+nearest", head_options={"nearest": {"n_neighbours": 3}})
    assert model.heads[1][1].n_neighbours == 3
    alone = fit(section, embedding, head="nearest", head_options={"n_neighbours": 3})
    assert model.held_out["nearest"] == alone.held_out["nearest"]
    assert model.held_out["nearest"] != fit(section, embedding, head="nearest").held_out["nearest"]


@pytest.mark.parametrize(
    ("head", "options", "match"),
    [
        (
            "ridge+nearest",
            {"n_neighbours": 3},
            r"head_options of \['n_neighbours'\]: .*by name of its parts, for example \{'ridge': \{\.\.\.\}\}",
        ),
        (
            "ridge+nearest",
            {"kriging": {}},
            r"head_options of \['kriging'\]: head 'ridge\+nearest' takes options by name",
        ),
        ("ridge+nearest", {"nearest": 3}, r"head_options\['nearest'\]=3: pass a dict of arguments"),
        (
            "nearest",
            {"n_neighbors": 3},
            r"head_options: head 'nearest' has no option 'n_neighbors'.*\['n_neighbours'\]",
        ),
        ("in-context+kriging", {"kriging": {"width": 3}}, "head 'kriging' has no option 'width'"),
        ("nearest", 3, r"head_options=3: pass a dict of arguments"),
        ("nearest", {"n_neighbours": 0}, "n_neighbours=0 of head 'nearest' must be a whole number from 1 to 10000"),
        ("kriging", {"n_components": 2.5}, "n_components=2.5 of head 'kriging' must be a whole number from 1, or None"),
        ("in-context", {"dropout": 2}, "dropout=2 of head 'in-context' must be a number from 0 to 1"),
    ],
)
def test_wrong_options_are_said_first(head, options, match):
    with pytest.raises(ValueError, match=match):
        check(head=head, head_options=options)


# ------------------------------------------------------------------------------------------------ nothing to find


@pytest.mark.parametrize("head", ["ridge", "ridge+nearest"])
def test_permuted_expression_is_not_predictable(section, embedding, head):
    """With spots and measurements torn apart there is nothing to find: one table in twenty may find something."""
    found, pcc = [], []
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(len(embedding))
        torn = dataclasses.replace(section, expression=section.expression[order])
        model = fit(torn, embedding, head=head, genes="all", n_folds=5, seed=seed, baselines=())
        found.append(int(model.scores["predictable"].sum()))
        pcc.append(model.scores["held_out_pcc"].mean())
    assert np.count_nonzero(found) <= 3  # of 20 tables at 5 %, 4 or more come in 1.6 % of such tests
    assert np.mean(pcc) < 0.03
    assert np.abs(pcc).max() < 0.2  # all genes follow the same few fields, and are wrong together


# ------------------------------------------------------------------------------------------- prediction intervals


def test_intervals_by_hand(section, embedding, ridge):
    """Calibrated on what no head saw, gene by gene of the model."""
    assert ridge.intervals.n_spots == 138
    assert len(ridge.intervals.numbers) == 8
    measured = section.dense(ridge.genes)
    fold = block_folds(section.xy_um, n_folds=3, rng=np.random.default_rng(0))
    said = np.zeros_like(measured)
    everything = stack_sections([section], [embedding], ridge.genes)
    for one in range(3):
        known, unknown = (everything.take(torch.as_tensor(np.flatnonzero(m))) for m in (fold != one, fold == one))
        fitted = get_head("ridge")().fit(known, rng=np.random.default_rng(0))
        said[fold == one] = fitted.predict(Queries.of(unknown, hidden=False), context=known).clamp_min(0).numpy()
    wanted = calibrate(said, measured, fold=fold)
    np.testing.assert_allclose(ridge.intervals.numbers, wanted.numbers, rtol=1e-3, atol=1e-4)


def test_intervals_hold_their_level_on_spots_left_out(section, embedding):
    """Blocks taken away before anything is fitted; a lower level has narrower intervals."""
    fold = block_folds(section.xy_um, n_folds=4, rng=np.random.default_rng(9))
    held = {0.9: [], 0.6: []}
    for one in range(4):
        rows, left = np.flatnonzero(fold != one), np.flatnonzero(fold == one)
        known = section.take(rows)
        model = fit(known, embedding[rows], genes="all", n_folds=5)
        at = {"places": embedding[left], "xy_px": section.xy_px[left], "spot_index": np.full(len(left), -1)}
        out = predict(model, known, embedding[rows], **at)
        for level, within in held.items():
            lower, upper = model.intervals.interval(out, level=level)
            measured = section.dense(model.genes)[left]
            within.append((lower <= measured) & (measured <= upper))
    share = {level: np.concatenate(within).mean() for level, within in held.items()}
    # 138 spots x 20 genes with errors in common: a standard error of about 0.015
    assert share[0.9] == pytest.approx(0.9, abs=0.04)
    assert share[0.6] == pytest.approx(0.6, abs=0.06)


@every_head
def test_same_seed_same_model(section, embedding, head):
    one, other = (fit(section, embedding, head=head, n_folds=2) for _ in range(2))
    assert one.held_out == other.held_out
    pd.testing.assert_frame_equal(one.scores, other.scores)
    assert (at_spots(one, section, embedding) == at_spots(other, section, embedding)).all()
    assert not fit(section, embedding, head=head, n_folds=2, seed=1).scores.equals(one.scores)


def test_genes_of_a_fold_are_chosen_without_its_spots(section, embedding, monkeypatch):
    """Whatever is measured at held-out spots, their fold is scored on the same genes."""
    seen, original = [], _fitting.summary

    def recording(predicted, measured, *, fold, chosen):
        seen.append((fold, [chosen(f) for f in range(3)]))
        return original(predicted, measured, fold=fold, chosen=chosen)

    monkeypatch.setattr(_fitting, "summary", recording)
    model = fit(section, embedding)
    fold, chosen = seen[0]
    names = [set(model.context_genes[c]) for c in chosen]
    assert [len(n) for n in names] == [8, 8, 8]
    # measured at the spots of fold 0: a strong pattern in genes that had none
    dense = section.expression.toarray()
    pattern = (section.xy_px[:, :1] > np.median(section.xy_px[:, 0])) * 9.0
    dense[fold == 0, 10:] = pattern[fold == 0]
    changed = dataclasses.replace(section, expression=sparse.csr_matrix(dense.astype(np.float32)))
    model = fit(changed, embedding)
    fold, chosen = seen[1]
    again = [set(model.context_genes[c]) for c in chosen]
    assert again[0] == names[0]
    assert again[1] != names[1]


# -------------------------------------------------------------------------------------------------------- genes


def test_genes_as_a_number(section, embedding):
    assert len(fit(section, embedding, genes=3).genes) == 3
    assert len(fit(section, embedding, genes=np.int64(3)).genes) == 3
    assert len(fit(section, embedding, genes=10_000).genes) == 20  # more than there are
    assert fit(section, embedding, genes=5).scores["highly_variable"].all()


def test_all_genes(section, embedding):
    dense = section.expression.toarray()
    dense[:, 4] = 0
    model = fit(dataclasses.replace(section, expression=sparse.csr_matrix(dense)), embedding, genes="all")
    assert list(model.genes) == [g for i, g in enumerate(section.genes) if i != 4]  # … that were seen at all


def test_genes_as_a_list(section, embedding):
    for genes in (["GENE007", "GENE002"], pd.Index(["GENE007", "GENE002"]), ("GENE007", "GENE002", "GENE002")):
        model = fit(section, embedding, genes=genes)
        assert sorted(model.genes) == ["GENE002", "GENE007"]
        assert list(model.scores.index) == list(model.genes)
        assert model.scores["highly_variable"].any()  # or scanpy's PCA has nothing to work on
    one = fit(section, embedding, genes=["GENE007"])
    assert at_spots(one, section, embedding).shape == (len(embedding), 1)


@pytest.mark.parametrize(
    ("genes", "message"),
    [
        (0, r"genes=0: pass a number above 0, a list of gene names, 'all' or 'union'"),
        (-5, r"genes=-5: pass a number above 0"),
        ("BRCA1", r"genes='BRCA1': pass a number, a list .*\(one gene: genes=\['BRCA1'\]\)"),
        (
            ["GENE001", "GENE0O2"],
            r"genes: 1 of 2 names are not in the table \(\['GENE0O2'\]\)\. Similar names: \['GENE0",
        ),
        (["BRCA1"] * 2, r"names are not in the table \(\['BRCA1'\]\)"),
    ],
)
def test_wrong_genes(section, genes, message):
    with pytest.raises(ValueError, match=message):
        check(section, genes=genes)


@pytest.mark.parametrize("genes", [True, None, 2.5])
def test_genes_of_another_type(section, genes):
    with pytest.raises(ValueError, match=rf"genes={genes}: pass a number"):
        check(section, genes=genes)


def test_an_empty_list_of_genes(section):
    with pytest.raises(ValueError, match=r"genes=\[\]|genes is empty"):
        check(section, genes=[])


@pytest.mark.parametrize("n_folds", [1, 0, 21, -3, 2.0, "5", None, True])
def test_wrong_folds(section, n_folds):
    with pytest.raises(ValueError, match=r"n_folds=.*: choose a whole number from 2 to 20"):
        check(section, n_folds=n_folds)


@pytest.mark.parametrize("n_folds", [2, 20])
@pytest.mark.parametrize(
    ("head", "options"), [("ridge", {}), ("in-context", {"width": 8, "n_neighbours": 4, "n_steps": 30})]
)
def test_fewest_and_most_folds(section, embedding, n_folds, head, options):
    """Networks go on as the mean of all folds; other heads are fitted once more, on all spots."""
    model = fit(
        section, embedding, head=head, n_folds=n_folds, genes=["GENE001", "GENE002"], head_options=options, baselines=()
    )
    n_heads = n_folds if get_head(head).ensembles_folds else 1
    assert [weight for weight, _ in model.heads] == pytest.approx([1 / n_heads] * n_heads)
    assert model.info["n_folds"] == n_folds
    assert np.isfinite(model.scores[["held_out_pcc", "held_out_mse"]]).all(axis=None)


def test_unknown_head_is_said_first():
    with pytest.raises(ValueError, match="Did you mean 'ridge'"):
        check(head="rigde")


# ------------------------------------------------------------------------------------------------------ predict


@every_head
def test_predictions_are_expression_of_the_genes_in_order(section, embedding, head):
    """Shape, dtype, sign, and that column i is gene i."""
    model = fit(section, embedding, head=head, genes=8, n_folds=2)
    out = at_spots(model, section, embedding)
    assert out.shape == (len(embedding), 8)
    assert out.dtype == np.float32
    assert np.isfinite(out).all()
    assert out.min() >= 0
    # levels of genes differ by far more than what a head gets wrong
    assert np.corrcoef(out.mean(0), section.dense(model.genes).mean(0))[0, 1] > 0.9


def test_column_of_every_gene(section, embedding):
    """Inverse distance by hand on the model's own genes; the heads see more genes than those."""
    model = fit(section, embedding, head="nearest")
    assert len(model.context_genes) > len(model.genes)
    xy_px = section.xy_px[:50] + 13.7
    places = np.zeros((50, 10), np.float32)
    own = np.where(np.arange(50) % 2, np.arange(50), -1)
    out = predict(model, section, embedding, places=places, xy_px=xy_px, spot_index=own)
    index, dist, _ = nearest_spots(xy_px * section.mpp, section.xy_um, k=20, exclude=own)
    weight = 1 / dist
    expected = np.einsum("mk,mkg->mg", weight / weight.sum(1, keepdims=True), section.dense(model.genes)[index])
    assert np.abs(out - expected).max() < 1e-3


@pytest.mark.parametrize(
    ("head", "weights"),
    [
        ("ridge", [1]),
        ("in-context", [1 / 3] * 3),
        ("in-context+ridge", [1 / 6] * 3 + [1 / 2]),
        ("ridge+nearest+mean", [1 / 3] * 3),
    ],
)
def test_a_model_is_the_weighted_mean_of_its_heads(section, embedding, head, weights):
    """All folds of a network count as much as one other head; negative expression is cut off head by head."""
    model = fit(section, embedding, head=head)
    assert [weight for weight, _ in model.heads] == pytest.approx(weights)
    context = stack_sections([section], [embedding], model.context_genes)
    said = [h.predict(Queries.of(context), context=context).clamp_min(0).numpy() for _, h in model.heads]
    columns = model.context_genes.get_indexer(model.genes)
    expected = np.tensordot(weights, np.stack(said), axes=1)[:, columns]
    assert np.abs(at_spots(model, section, embedding) - expected).max() < 1e-4


@every_head
def test_own_measurements_are_hidden_all_the_way(section, embedding, head):
    """A spot's own place in the fine lattice is predicted without what was measured there."""
    model = fit(section, embedding, head=head, n_folds=2)
    dense = section.expression.toarray()
    dense[17] += 5
    changed = dataclasses.replace(section, expression=sparse.csr_matrix(dense))
    one, other = at_spots(model, section, embedding), at_spots(model, changed, embedding)
    # kriging leaves a spot out by algebra, on a measurement that is 5 higher: not to the last bit
    assert np.abs(one[17] - other[17]).max() < (1e-3 if head == "kriging" else 1e-30)
    assert (np.abs(one - other).max() > 0.01) == (head in ("aggregate", "in-context", "kriging", "nearest"))


def test_many_places_are_predicted_in_parts(section, embedding, ridge):
    n = 16_384 + 500
    rows = np.random.default_rng(0).integers(0, len(embedding), n)
    for model in (ridge, fit(section, embedding, head="nearest", n_folds=2)):
        out = predict(model, section, embedding, places=embedding[rows], xy_px=section.xy_px[rows], spot_index=rows)
        assert np.abs(out - at_spots(model, section, embedding)[rows]).max() < rounding.of_sum(500, scale=out.max())


@pytest.mark.parametrize("head", ["in-context+kriging", "aggregate"])
def test_threads_do_not_change_a_digit(section, embedding, head):
    """Of what is asked: a factorisation by LAPACK, kept with the context, may depend on its threads."""
    model = fit(section, embedding, head=head, n_folds=2)
    context = model.context(section, embedding, device=CPU)
    own = np.arange(len(embedding))
    n = torch.get_num_threads()
    said = {}
    try:
        for threads in (2, 1):
            torch.set_num_threads(threads)
            said[threads] = model.predict_from(context, embedding=embedding, xy_um=section.xy_um, spot_index=own)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(n)
    np.testing.assert_array_equal(said[1], said[2])


def test_predicting_a_section_without_the_genes(section, embedding, ridge):
    gone = ridge.context_genes[0]
    other = with_genes(section, [f"{g}-x" if g == gone else g for g in section.genes])
    with pytest.raises(ValueError, match=rf"1 of the \d+ genes of this model are not in the table .*'spots' .*{gone}"):
        at_spots(ridge, other, embedding)


def test_predicting_a_section_with_other_columns(section, embedding, ridge):
    """Genes are found by name; more genes than the model's do no harm."""
    order = np.random.default_rng(0).permutation(20)
    shuffled = with_genes(section, section.genes[order], order)
    for model in (ridge, fit(section, embedding, head="nearest")):
        assert (at_spots(model, shuffled, embedding) == at_spots(model, section, embedding)).all()


# ------------------------------------------------------------------------------------------------- two sections


@pytest.fixture(scope="module")
def other(section):
    """Another section in the same place, its genes shuffled, one more and one fewer, and all twice as high."""
    order = np.random.default_rng(3).permutation(19)
    names = [*section.genes[order], "ONLY-HERE"]
    twice = sparse.hstack([section.expression[:, order] * 2, section.expression[:, :1]]).tocsr()
    return dataclasses.replace(section, expression=twice, genes=pd.Index(names))


def test_two_sections(section, other, embedding):
    model = fit([section, other], [embedding, embedding + 3], genes="all")
    assert list(model.genes) == list(section.genes[:19])  # those that both have, in order of the first
    assert model.info["n_sections"] == 2
    assert model.info["n_spots"] == 2 * len(embedding)
    low, high = at_spots(model, section, embedding), at_spots(model, other, embedding + 3)
    assert np.corrcoef(low.mean(0), section.dense(model.genes).mean(0))[0, 1] > 0.95
    assert np.median(high.mean(0) / low.mean(0)) == pytest.approx(2, rel=0.1)


def test_neighbours_are_always_of_one_section(section, other, embedding):
    """The sections lie on top of each other in their own coordinates: mixed, half the neighbours were twice as high."""
    one = fit(section, embedding, head="nearest", genes="all")
    both = fit([section, other], [embedding, embedding], head="nearest", genes="all")
    assert (
        both.held_out["nearest"]["mse"] < 5 * one.held_out["nearest"]["mse"]
    )  # (1 + 2²) / 2, and fewer neighbours; mixed, 40


def test_sections_without_a_common_gene(section):
    strange = with_genes(section, [f"ENSG{i}" for i in range(20)])
    with pytest.raises(ValueError, match="gene"):
        check(section, strange)


def test_sections_keep_their_coordinates_and_have_numbers(section, other, embedding):
    genes = section.genes[:5]
    spots = stack_sections([section, other], [embedding, embedding], genes)
    n = len(embedding)
    for rows, number in ((slice(0, n), 0), (slice(n, None), 1)):
        assert torch.equal(spots.xy_um[rows], torch.as_tensor(section.xy_um, dtype=torch.float32))
        assert (spots.section[rows] == number).all()
    assert spots.pitch_um == pytest.approx(section.pitch_um)


@every_head
def test_a_section_looks_the_same_whichever_number_it_has(section, embedding, head):
    """Two copies of a section, learnt as the first and the second: predicted as one and the same."""
    both = stack_sections([section, section], [embedding, embedding], section.genes)
    fitted = get_head(head)(**OPTIONS.get(head, {})).fit(both, rng=np.random.default_rng(0), progress=False)
    predicted = fitted.predict(Queries.of(both), context=both)
    one, other = predicted.split(len(embedding))
    # float32, and a condition of 1e4: the two copies of a spot have the same image
    assert (one - other).abs().max() < 3e-3


# ------------------------------------------------------------------------------------------------ save and load


@every_head
def test_round_trip(section, embedding, head, tmp_path):
    model = fit(section, embedding, head=head, n_folds=2)
    model.save(tmp_path / "a" / "model")  # parents are made
    assert [p.name for p in (tmp_path / "a" / "model").iterdir()] == [FILE]
    loaded = Model.load(str(tmp_path / "a" / "model"))
    assert np.abs(at_spots(loaded, section, embedding) - at_spots(model, section, embedding)).max() < 1e-5
    assert (loaded.head, loaded.held_out, loaded.info) == (model.head, model.held_out, model.info)
    assert list(loaded.genes) == list(model.genes)
    assert list(loaded.context_genes) == list(model.context_genes)
    assert len(loaded.heads) == len(model.heads)
    assert loaded.config == model.config
    pd.testing.assert_frame_equal(loaded.scores, model.scores, check_dtype=False, check_names=False)
    assert (repr(loaded), loaded.fingerprint()) == (repr(model), model.fingerprint())
    pd.testing.assert_frame_equal(loaded.training, model.training)
    assert loaded.spots.pitch_um == model.spots.pitch_um
    for name in ("embedding", "expression", "xy_um", "section"):
        assert torch.equal(getattr(loaded.spots, name), getattr(model.spots, name))


def test_round_trip_keeps_the_pitch(section, embedding, tmp_path):
    """Heads see distances in pitches: a model of Spatial Transcriptomics predicts otherwise with the pitch of Visium."""
    wide = dataclasses.replace(section, pitch_um=217.0, mpp=section.mpp * 2.17)
    model = fit(wide, embedding, head="coordinates+nearest")
    model.save(tmp_path / "model")
    back = Model.load(tmp_path / "model")
    assert back.spots.pitch_um == model.spots.pitch_um == back.info["pitch_um"] == 217.0
    queries = Queries.of(model.spots)
    for (_, one), (_, other) in zip(model.heads, back.heads, strict=True):
        np.testing.assert_array_equal(
            one.predict(queries, context=model.spots), other.predict(queries, context=back.spots)
        )


def test_round_trip_keeps_dtypes_and_names(ridge, tmp_path):
    ridge.save(tmp_path)
    loaded = Model.load(tmp_path)
    pd.testing.assert_frame_equal(loaded.scores, ridge.scores)
    assert loaded.genes.name == ridge.genes.name


@pytest.mark.parametrize("head", ["ridge", "in-context+kriging", "nearest+mean"])
def test_intervals_survive(section, embedding, head, tmp_path):
    model = fit(section, embedding, head=head, n_folds=2)
    model.save(tmp_path)
    loaded = Model.load(tmp_path)
    assert [(w, h.name) for w, h in loaded.heads] == [(w, h.name) for w, h in model.heads]
    assert loaded.held_out.keys() >= set(head.split("+"))
    for name, values in model.intervals.to_arrays().items():
        np.testing.assert_array_equal(getattr(loaded.intervals, name), values)
    out = at_spots(model, section, embedding)
    for a, b in zip(model.intervals.interval(out), loaded.intervals.interval(out), strict=True):
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_array_equal(a, b)


def test_a_head_without_tensors_survives(section, embedding, tmp_path):
    model = fit(section, embedding, head="nearest", n_folds=2)
    model.save(tmp_path)
    assert (at_spots(Model.load(tmp_path), section, embedding) == at_spots(model, section, embedding)).all()


def test_odd_names_of_genes_survive(section, embedding, tmp_path):
    """Names that a table reader takes for numbers, dates, booleans or nothing at all."""
    names = ["NA", "nan", "NULL", "1", "007", "1e5", "True", "MARCH1", 'a"b', "a,b", "ü", " x", *section.genes[12:]]
    odd = with_genes(section, names)
    model = fit(odd, embedding, genes="all")
    model.save(tmp_path)
    loaded = Model.load(tmp_path)
    assert list(loaded.genes) == list(model.genes) == names
    assert (at_spots(loaded, odd, embedding) == at_spots(model, odd, embedding)).all()


def test_a_saved_model_holds_no_pickles(ridge, tmp_path):
    """It is safetensors, and all that is no tensor is JSON in its header."""
    ridge.save(tmp_path)
    content = (tmp_path / FILE).read_bytes()
    size = int.from_bytes(content[:8], "little")
    about = json.loads(content[8 : 8 + size])["__metadata__"]
    assert about["histosge_format"] == "6"
    assert json.loads(about["text"])["genes"] == list(ridge.genes)
    assert about["sha256"].startswith(ridge.fingerprint())


def test_a_model_is_not_overwritten_by_accident(section, embedding, ridge, tmp_path):
    ridge.save(tmp_path)
    other = fit(section, embedding, head="mean", genes=3)
    with pytest.raises(FileExistsError, match="holds a model already. Pass overwrite=True"):
        other.save(tmp_path)
    assert Model.load(tmp_path).head == "ridge"
    other.save(tmp_path, overwrite=True)
    loaded = Model.load(tmp_path)
    assert loaded.head == "mean"
    assert (at_spots(loaded, section, embedding) == at_spots(other, section, embedding)).all()


def test_config_is_plain():
    """For JSON, and for ``uns``: no tuples, no None."""
    plain = CONFIG.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert EmbeddingConfig.from_dict(plain) == CONFIG
    uns = CONFIG.to_uns()
    assert (uns["tile_um"], uns["encoder"]["name"], uns["dense"]) == (112.0, "by-hand", False)
    assert all(value is not None for value in uns["encoder"].values())


# ------------------------------------------------------------------------------------------- settings and names


def test_settings_are_restored():
    before = dataclasses.asdict(sge.settings)
    level = logger.level
    with sge.settings.override(verbosity=0, progress=True, device="cpu") as inside:
        assert inside is sge.settings
        assert (inside.verbosity, inside.progress, inside.device) == (0, True, "cpu")
        assert logger.level == logging.ERROR
        with sge.settings.override(verbosity=3):
            assert logger.level == logging.DEBUG
        assert logger.level == logging.ERROR
    assert dataclasses.asdict(sge.settings) == before
    assert logger.level == level
    with pytest.raises(KeyError), sge.settings.override(verbosity=0, device="cuda"):
        raise KeyError
    assert dataclasses.asdict(sge.settings) == before


def test_unknown_setting():
    with pytest.raises(
        AttributeError, match="histosge has no setting 'devize'. Settings are: device, progress, verbosity"
    ):
        sge.settings.devize = "cpu"
    with pytest.raises(AttributeError, match="devize"), sge.settings.override(devize="cpu"):
        pass
    assert not hasattr(sge.settings, "devize")


@pytest.mark.parametrize(("value", "level"), [(0, 40), (1, 30), (2, 20), (3, 10)])
def test_verbosity(value, level):
    with sge.settings.override(verbosity=value):
        assert logger.level == level


def test_wrong_precision():
    with pytest.raises(ValueError, match=r"settings.precision='half': choose 'float32', 'bfloat16', or None"):
        sge.settings.precision = "half"
    assert sge.settings.precision is None


@pytest.mark.parametrize("value", [4, -1, None, "2", 1.5])
def test_wrong_verbosity(value):
    before = dataclasses.asdict(sge.settings)
    with pytest.raises(ValueError, match=r"settings\.verbosity=.*: choose one of 0 \(errors\)"):
        sge.settings.verbosity = value
    with pytest.raises(ValueError, match="verbosity"), sge.settings.override(device="cpu", verbosity=value):
        pass
    assert dataclasses.asdict(sge.settings) == before
    assert Settings().verbosity == 2


def test_the_level_is_said_only_where_it_matters(capsys):
    logger.info("read a section")
    logger.warning("left something out")
    assert capsys.readouterr().err == "read a section\nWARNING: left something out\n"


@pytest.mark.parametrize(
    ("setting", "argument", "shown"), [(True, None, True), (True, False, False), (False, True, True)]
)
def test_progress_bar_is_shown_as_asked(setting, argument, shown):
    with sge.settings.override(progress=setting), progress_bar(desc="x", total=1, show=argument) as bar:
        assert bar.disable is not shown


@pytest.mark.parametrize("key", ["a", "histosge_targets", "A-b.c_9", "_x"])
def test_valid_keys(key):
    assert _keys.check("key_added", key) == key


@pytest.mark.parametrize("key", ["", "a b", "a/b", "ä", "__x", ".", "..", "a\n", None, 3])
def test_invalid_keys(key):
    with pytest.raises(ValueError, match=r"key_added=.* is not a valid name for a SpatialData element"):
        _keys.check("key_added", key)


def test_names_of_what_is_written():
    assert _keys.targets("histosge") == "histosge_targets"
    assert _keys.embedding("hf-hub:a/b") == "X_hf-hub_a_b"
    assert _keys.embedding_table("spots", "hf-hub:a/b") == "spots_hf-hub_a_b"
    for name in ("hf-hub:a/b", "my model", "uni2"):
        _keys.check("key", _keys.embedding_table("spots", name))
