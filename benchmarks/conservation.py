"""Does it pay to make the parts of a spot agree with what was measured on it? Judged on split counts.

    python benchmarks/conservation.py [--first-seed 20] [--seeds 3] [--only synthetic poisson colon]

colon: spots of `mouse_colon_visium` merged into big ones of half the counts; the other half of each spot is the truth
(pseudo-spots of sge.tl.evaluate). The default head predicts the members; then these are made to average to a target for
their big spot. Variants were chosen on seeds 10 to 12; docs/benchmarks.md reports seeds 20 to 22. Members are forced to
- exact: what was measured
- reading: what the head says of the big spot after reading it; no residual added (the control of the next)
- shrunk reading: that, and the share of the residual that counting noise does not explain
- shrunk reading, clean: the share estimated with networks that were not trained on the spot, though they read it
- shrunk hidden: prediction with the spot hidden (networks not trained on it) and the share of the residual from it
"shrunk reading, log space" adds that share to log values instead of scaling rates; "own counts left out" scales every
member by a target that its own counts had no part in.

poisson: the same on a synthetic section. synthetic: noise and spread found, against those of the truth, which is known.
"""

from __future__ import annotations

import argparse

import numpy as np
import pandas as pd
import torch
from accuracy import HEAD, measure, seurat_genes
from scipy import sparse
from sections import require_data

import histosge as sge
from histosge import datasets, settings
from histosge._heads import Queries
from histosge._model import Measured, Plan, fit_model, predict_trial, stack_sections, trials
from histosge._section import per_target_sum, read_section
from histosge._statistics import block_folds, conserve, correlation, noise_variance, pseudo_spots, shrinkage, thin

CPU = torch.device("cpu")
N_FOLDS = 5


def fit(sections, embeddings, config, genes, seed: int):
    return fit_model(
        sections, embeddings, config=config, head=HEAD, genes=genes, n_folds=N_FOLDS, rng=np.random.default_rng(seed),
        device=CPU, baselines=(), progress=False,
    )  # fmt: skip


def at_spots(model, spots, seed: int) -> dict[str, np.ndarray]:
    """What heads say of measured spots: having read them, the same by networks not trained on them, and not having."""
    fold = block_folds(spots.xy_um.numpy().astype(float), n_folds=N_FOLDS, rng=np.random.default_rng(seed))
    n = len(spots)
    columns = model.context_genes.get_indexer(model.genes)
    networks = [h for _, h in model.heads if h.ensembles_folds]
    other = next(h for _, h in model.heads if not h.ensembles_folds)  # kriging: leaves a spot out by formula
    found = {
        "reading": model.predict_from(
            model.condition(spots, device=CPU),
            embedding=spots.embedding.numpy(),
            xy_um=spots.xy_um.numpy(),
            spot_index=np.full(n, -1),
        )
    }
    for name, hidden in (("clean", False), ("hidden", True)):
        places = Queries.of(spots, hidden=hidden)
        said = other.predict(places, context=spots).clamp_min(0).numpy() / 2
        for f, network in enumerate(networks):
            rows = torch.as_tensor(np.flatnonzero(fold == f))
            said[rows] += network.predict(places.take(rows), context=spots).clamp_min(0).numpy() / 2
        found[name] = said[:, columns]
    return found


def colon(seeds: range) -> None:
    one, config = measure("mouse_colon_visium")
    members_of_big_spots(one, config, seeds, seurat_genes)


def poisson(seeds: range) -> None:
    """The same where counts are Poisson for sure, so that no noise can be in both halves."""
    sdata = sge.datasets.synthetic(n_rows=40, n_cols=40, mpp=2.0)
    section = read_section(sdata, report=False)
    one = Measured("synthetic, 40 x 40", section, embedding_of(section))
    members_of_big_spots(one, None, seeds, lambda _: "all")


def members_of_big_spots(one: Measured, config, seeds: range, choose) -> None:
    tables = []
    for seed in seeds:
        (trial,) = trials([one], Plan("pseudo-spots", "held-out", 1, 1), rng=np.random.default_rng(seed))
        again = np.random.default_rng(seed)  # the same draws as in the trial, which does not keep counts
        group = pseudo_spots(one.section.lattice, rng=again)
        half, _ = thin(one.section.counts, rng=again)
        own = group[trial.rows]
        sums = sparse.csr_matrix((np.ones(len(own)), (own, trial.rows)), shape=(own.max() + 1, len(group)))
        counts = sparse.csr_matrix(sums @ half)
        section = trial.sections[0]
        if abs(per_target_sum(counts) - section.expression).max() > 1e-5:
            msg = "these are not the counts of the trial's big spots: the draws of histosge have changed."
            raise RuntimeError(msg)

        model = fit(trial.sections, trial.embeddings, config, choose(trial.sections), seed)
        members, truth = predict_trial(model, trial, device=CPU)
        spots = stack_sections(trial.sections, trial.embeddings, model.context_genes)
        said = at_spots(model, spots, seed)
        measured = section.dense(model.genes)
        columns = section.genes.get_indexer(model.genes)
        noise = noise_variance(counts[:, columns], total=np.asarray(counts.sum(1)).ravel())
        found = {name: shrinkage(measured, value, noise=noise) for name, value in said.items()}
        even = shrinkage(measured, said["reading"], noise=np.broadcast_to(noise.mean(0), noise.shape))

        window = sparse.csr_matrix((np.ones(len(own)), (np.arange(len(own)), own)))
        share = sparse.diags(1 / np.asarray(window.sum(0)).ravel()) @ window.T
        reading = said["reading"]
        clean = np.maximum(reading + found["clean"].weight * (measured - reading), 0)
        targets = {
            "exact": measured,
            "reading": reading,
            "shrunk reading": found["reading"].mean,
            "shrunk reading, one noise a gene": even.mean,
            "shrunk reading, clean": clean,
            "shrunk hidden": found["hidden"].mean,
        }
        variants = {"head as it is": members}
        for name, target in targets.items():
            rates = conserve(np.expm1(members), coverage=share, target=np.expm1(target), window=window)
            variants[name] = np.log1p(rates)
        added = found["reading"].weight * (measured - reading)
        variants["shrunk reading, log space"] = np.maximum(members + added[own], 0)

        # the member's own counts taken out of its target: noise that both its halves might share cannot help
        rest = per_target_sum(counts[own] - half[trial.rows])[:, columns].toarray()
        weight = found["reading"].weight[own]
        target = np.maximum(reading[own] + weight * (rest - reading[own]), 0)
        rates = np.expm1(members)
        variants["shrunk reading, own counts left out"] = np.log1p(
            rates * np.expm1(target) / np.maximum((share @ rates)[own], 1e-9)
        )

        weights = {name: np.median(f.weight.mean(0)) for name, f in found.items()}
        print(f"seed {seed}: median weight of a gene", {k: round(float(w), 3) for k, w in weights.items()}, flush=True)
        ceiling = trial.ceiling.reindex(model.genes).to_numpy().mean()
        for name, value in variants.items():
            scores = {"pcc": correlation(value, truth).mean(), "mse": ((value - truth) ** 2).mean()}
            tables.append({"members": name, "seed": seed, "ceiling": ceiling, **scores})
    report(one.name, pd.DataFrame(tables))


def report(name: str, table: pd.DataFrame) -> None:
    head = table[table["members"] == "head as it is"].set_index("seed")
    table["gain"] = table["pcc"] - table["seed"].map(head["pcc"])
    print(f"\n{name}, pseudo-spots on split counts, seeds {table['seed'].unique().tolist()}")
    print("| members | PCC | of ceiling | gain, each seed | MSE |\n|---|---|---|---|---|")
    for variant, rows in table.groupby("members", sort=False):
        pcc, spread = rows["pcc"].mean(), rows["pcc"].std()
        gain = " ".join(f"{g:+.4f}" for g in rows["gain"])
        of = pcc / rows["ceiling"].mean()
        print(f"| {variant} | {pcc:.4f} ± {spread:.4f} | {of:.0%} | {gain} | {rows['mse'].mean():.4f} |")


def synthetic(seeds: range) -> None:
    """Noise and spread estimated, against the truth; the mean of the spot's disc is the truth of a spot."""
    print("\nsge.datasets.synthetic(), mean over genes: found / true (relative error)")
    print("| seed | noise variance | tau2, spot hidden | weight, spot hidden | tau2, spot read | MSE: measured | hidden "
          "| reading | shrunk hidden | shrunk reading |")  # fmt: skip
    print("|---" * 10 + "|")
    for seed in seeds:
        sdata = sge.datasets.synthetic(rng=seed)
        section = read_section(sdata, report=False)
        counts, embedding = section.counts, embedding_of(section)
        model = fit([section], [embedding], None, "all", seed)
        spots = stack_sections([section], [embedding], model.context_genes)
        said = at_spots(model, spots, seed)
        params = {k: int(v) for k, v in sdata.tables["table"].uns["synthetic"].items()}
        fields, _ = datasets._fields(params)
        disc = datasets._disc_points(datasets._SPOT_UM / 2)
        xy = section.xy_um  # the synthetic image starts at the origin of its µm
        rate = (
            datasets._rates(fields, params, (xy[:, None] + disc).reshape(-1, 2)).reshape(len(xy), len(disc), -1).mean(1)
        )
        rate = rate[:, section.genes.get_indexer(model.genes)]
        truth = np.log1p(1e4 * rate / rate.sum(1, keepdims=True))
        measured = section.dense(model.genes)
        noise = noise_variance(counts[:, section.genes.get_indexer(model.genes)])
        found = {name: shrinkage(measured, value, noise=noise) for name, value in said.items()}
        cells = [versus(noise.mean(), (measured - truth).var(0).mean())]
        true = {name: (truth - value).var(0) for name, value in said.items()}
        cells.append(versus(found["hidden"].tau2.mean(), true["hidden"].mean()))
        best = true["hidden"] / (true["hidden"] + (measured - truth).var(0))
        cells.append(versus(found["hidden"].weight.mean(), best.mean()))
        cells.append(versus(found["clean"].tau2.mean(), true["clean"].mean()))
        values = measured, said["hidden"], said["reading"], found["hidden"].mean, found["reading"].mean
        cells += [f"{((v - truth) ** 2).mean():.4f}" for v in values]
        print("| " + " | ".join([str(seed), *cells]) + " |", flush=True)


def versus(found: float, true: float) -> str:
    return f"{found:.4f} / {true:.4f} ({found / true - 1:+.0%})"


def embedding_of(sdata, section) -> np.ndarray:
    """Embedding of the spots, in the order of the section."""
    table = sge.tl.embed(sdata, encoder="stain-texture", inplace=False, progress=False)
    order = pd.Index(table.obs[table.uns["spatialdata_attrs"]["instance_key"]]).get_indexer(section.instances)
    return table.obsm["X_stain-texture"][order]


RUNS = {"synthetic": synthetic, "poisson": poisson, "colon": colon}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--first-seed", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    settings.verbosity = 1
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    for name in options.only:
        if name == "colon":
            require_data()
        RUNS[name](seeds)


if __name__ == "__main__":
    main()
