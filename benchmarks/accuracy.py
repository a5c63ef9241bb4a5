"""Held-out accuracy of the default head and every rival on real sections: the tables of docs/benchmarks.md.

    python benchmarks/accuracy.py [--only colon-random colon-blocks her2st ...] [--seeds 5] [--first-seed 0] [--heads published] [--permute]

Reads ../shared/data. Every number is of spots that nothing of the model has seen: genes, scalings, components, stopping
and prediction intervals are chosen on the training spots of each split. Genes: "dispersion" are those of scanpy's
highly_variable_genes(flavor="seurat") among genes seen in a tenth of the training spots; "default" are ours; "all-spots"
are as "dispersion", but chosen on all spots of the section, the scored ones too, as in the first trials (../shared/METHOD.md):
the same for every head, for comparison with those figures only.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from time import time
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from sections import load, require_data

from histosge import settings
from histosge._embedding import Embedder
from histosge._model import Measured, Plan, fit_model, predict_trial, score_genes, trials
from histosge._section import read_section
from histosge._statistics import noise_ceiling

if TYPE_CHECKING:
    from histosge._model import Model

HEAD = "in-context+kriging"
BASELINES = ("ridge", "coordinates", "nearest", "mean")
HER2ST = [f"her2st/{c}" for c in ("C2", "C3", "C4", "C5")]
_HALVES = {"n_splits": 2, "buffer_um": 0.0, "block_um": 1000.0}
RUNS: dict[str, tuple[list[str], str, dict, list[str]]] = {
    # name: sections, split, plan, genes
    "colon-random": (["mouse_colon_visium"], "random", {"n_splits": 1}, ["dispersion", "default"]),
    "colon-blocks": (["mouse_colon_visium"], "blocks", _HALVES, ["dispersion"]),
    "colon-buffer": (["mouse_colon_visium"], "blocks", {"n_splits": 5}, ["default"]),
    "colon-lattice": (["mouse_colon_visium"], "lattice", {"n_splits": 1}, ["default"]),
    "colon-pseudo": (["mouse_colon_visium"], "pseudo-spots", {"n_splits": 1}, ["dispersion", "all-spots"]),
    "her2st": (HER2ST, "random", {"n_splits": 1}, ["default"]),
    "her2st-blocks": (HER2ST, "blocks", {"n_splits": 5}, ["default"]),
    "her2st-sections": (HER2ST, "sections", {"n_splits": 1}, ["default"]),
    "coarse": (["mob_st/Rep1", "her2st/A1"], "random", {"n_splits": 1}, ["default"]),
    "coarse-blocks": (["mob_st/Rep1", "her2st/A1"], "blocks", {"n_splits": 5}, ["default"]),
}


def measure(name: str, *, permute: bool = False) -> tuple[Measured, object]:
    """Read and embed a section; with ``permute`` its spots change places with each other: nothing is left to find."""
    sdata = load(name)
    section = read_section(sdata)
    embedder = Embedder.open(section, "stain-texture", device="cpu", progress=False)
    values, counts = embedder.embed_spots(), section.counts
    if permute:
        order = np.random.default_rng(0).permutation(len(values))
        section, counts = replace(section, expression=section.expression[order]), counts[order]
    return Measured(name, section, values), embedder.config


def seurat_genes(sections, n_top: int = 1000) -> list[str]:
    """Genes of highest dispersion among the spots of some sections, from their log-normalised values."""
    import anndata as ad
    import scanpy as sc
    from scipy import sparse

    expression = sparse.vstack([s.expression for s in sections]).tocsr().astype(np.float32)
    known = ad.AnnData(expression, var=pd.DataFrame(index=sections[0].genes))
    sc.pp.filter_genes(known, min_cells=int(0.1 * known.n_obs))
    known.uns["log1p"] = {"base": None}
    sc.pp.highly_variable_genes(known, flavor="seurat", n_top_genes=min(n_top, known.n_vars))
    return list(known.var_names[known.var["highly_variable"]])


def parts(model: Model) -> list[Model]:
    """The model, and the heads whose mean it is, each as a model of its own."""
    models = [model]
    if "+" in model.head:
        for name in model.head.split("+"):
            heads = [(w, h) for w, h in model.heads if h.name == name]
            total = sum(w for w, _ in heads)
            heads = [(w / total, h) for w, h in heads]
            models.append(replace(model, head=name, heads=heads))
    return models


def run(name: str, *, seeds: range, heads: list[str], permute: bool = False) -> None:
    names, split, plan, choices = RUNS[name]
    several, config = [], None
    for one in names:
        measured, config = measure(one, permute=permute)
        several.append(measured)
    ceilings = {m.name: pd.Series(noise_ceiling(m.section.counts), m.section.genes) for m in several}
    device = torch.device("cpu")
    tables = []
    if split == "sections":
        seeds = range(1)
    for choice in choices:
        for seed in seeds:
            settled = Plan(split, "held-out", plan["n_splits"], 1, plan.get("buffer_um"), plan.get("block_um"))
            for trial in trials(several, settled, rng=np.random.default_rng(seed)):
                whole = [m.section for m in several if m.name == trial.name]
                genes = {
                    "dispersion": lambda t=trial: seurat_genes(t.sections),
                    "all-spots": lambda w=whole: seurat_genes(w),
                }
                wanted = genes[choice]() if choice in genes else 1000
                for head in heads:
                    if split == "sections" and head in ("nearest", "coordinates"):
                        continue
                    start = time()
                    model = fit_model(
                        trial.sections, trial.embeddings, config=config, sub_spots=trial.parts, head=head, genes=wanted, n_folds=5,
                        rng=np.random.default_rng(seed), device=device, baselines=(), progress=False,
                    )  # fmt: skip
                    for each in parts(model):
                        predicted, truth = predict_trial(each, trial, device=device)
                        table = score_genes(predicted, truth, each, trial, settled)
                        table["seconds"] = time() - start
                        table["predictable"] = each.scores["predictable"].reindex(table["gene"]).to_numpy(float)
                        ceiling = ceilings[trial.name] if trial.ceiling is None else trial.ceiling
                        table["ceiling"] = ceiling.reindex(table["gene"]).to_numpy()
                        width = np.nan
                        if each is model:  # intervals of one width for all places, same spots
                            width = constant_width(predicted, truth, table["coverage"].to_numpy())
                        else:  # the intervals are those of the whole model
                            table = table.drop(columns=[c for c in table if c.startswith(("coverage", "width"))])
                        tables.append(table.assign(genes=choice, seed=seed, constant_width=width))
    report(name, pd.concat(tables, ignore_index=True))


def constant_width(predicted, truth, coverage) -> float:
    """Mean width of intervals of one width per gene that would hold the same share of these spots; cut off at 0 as ours."""
    error = np.abs(predicted - truth)
    reach = np.array([np.quantile(e, c) for e, c in zip(error.T, coverage, strict=True)])
    return float((predicted + reach - np.maximum(predicted - reach, 0)).mean())


def report(name: str, table: pd.DataFrame) -> None:
    """Mean over genes, folds and sections for each seed; then mean and spread over seeds."""
    scores = ["pcc", "mse", "spearman", "mae", "skill", "ssim", "gene_agreement", "morans_i", "morans_i_measured"]
    scores += [
        "ceiling",
        "coverage",
        "width",
        "constant_width",
        "coverage_2",
        "coverage_4",
        "coverage_8",
        "predictable",
        "seconds",
    ]
    scores = [s for s in scores if s in table]
    several = table["section"].nunique() > 1
    for keys in [["genes"], ["genes", "section"]] if several else [["genes"]]:
        each = table.groupby([*keys, "head", "seed"], sort=False)[scores].mean()
        by = each.groupby([*keys, "head"], sort=False)
        mean, spread = by.mean(), by.std()
        print(
            f"\n{name}, by {' and '.join(keys)}: {table['n_train'].mean():.0f} training spots, {table['seed'].nunique()} seeds"
        )
        print("| " + " | ".join([*keys, "head", "PCC", "share of ceiling", *scores[1:]]) + " |")
        print("|---" * (len(keys) + 2 + len(scores)) + "|")
        for index, row in mean.iterrows():
            cells = [f"{row['pcc']:.4f} ± {spread.loc[index, 'pcc']:.4f}", f"{row['pcc'] / row['ceiling']:.0%}"]
            print("| " + " | ".join([*index, *cells, *(f"{row[s]:.4f}" for s in scores[1:])]) + " |")
    print(flush=True)


def main() -> None:
    require_data()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--permute", action="store_true", help="the null: the spots permuted")
    parser.add_argument("--heads", nargs="+", default=[HEAD, *BASELINES], help="published too: some minutes a fit")
    options = parser.parse_args()
    settings.verbosity = 1
    for name in options.only:
        run(
            name,
            seeds=range(options.first_seed, options.first_seed + options.seeds),
            heads=options.heads,
            permute=options.permute,
        )


if __name__ == "__main__":
    main()
