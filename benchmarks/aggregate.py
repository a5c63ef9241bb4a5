"""Does a head that learns through the mean of a spot's parts beat heads that learn on mean features? Split counts.

    python benchmarks/aggregate.py [--bed colon synthetic] [--seeds 20 21 22] [--heads default log-mean ...]

Pseudo-spots as in histosge._model (same draws for the same seed): big spots of half the counts are learnt from, and the
other half of each member is the truth. Genes: dispersion among the big spots. "mean": trained on mean features of the
members; "parts": trained through their rates. "log": squared error of log1p of the mean rate; "logspace": of the mean of log1p values; "poisson", "nb": likelihood of the raw
counts of the big spot, given its library size (nb: a dispersion for each gene). Each is five networks, of five folds of blocks, as the
product has; "single" is the mean score of one, "+kriging" the mean with kriging, as the product's default. "at depth": rates turned
into the log1p value expected at the depth of a member (C, known from the big spots alone), which removes what the curve of the
logarithm does to few counts. Variants were chosen on seeds 10 and 11.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from time import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from accuracy import measure, seurat_genes
from scipy import sparse, stats
from sections import require_data
from torch import nn

from histosge import datasets, settings
from histosge._embedding import Embedder
from histosge._heads import Aggregate, InContext, Kriging, Queries, Spots, SubSpots
from histosge._model import Measured
from histosge._section import per_target_sum, read_section
from histosge._statistics import block_folds, correlation, pseudo_spots, thin


@dataclass(frozen=True)
class CountedSpots(Spots):
    """Spots of known sub-spots and library sizes."""

    library: torch.Tensor | None = None
    """(n,) counts of a spot, of all genes"""

    def take(self, rows):
        return CountedSpots(**vars(super().take(rows)), library=self.library[rows])

    def counts(self, rows):
        """Raw counts (b, g): log1p of counts per 10,000 turned back."""
        return (torch.expm1(self.expression[rows]) * self.library[rows, None] / 1e4).round()


class LogSpace(Aggregate):
    """Aggregate head whose parts add up in log1p units: what METHOD tried first."""

    def _build(self, space):
        network = super()._build(space)
        straight = network.log_rate
        network.log_rate = lambda *each: torch.log1p(straight(*each))  # whose "rate" is the log1p value itself
        return network

    def _error(self, rate, spots, rows):
        return (rate - spots.expression[rows]).square().mean()

    def predict(self, places, *, context):
        return torch.expm1(super().predict(places, context=context))


class Poisson(Aggregate):
    """Aggregate head with the Poisson deviance of raw counts."""

    def _error(self, rate, spots, rows):
        y = spots.counts(rows)
        mean = (rate * spots.library[rows, None] / 1e4).clamp_min(1e-6)
        return 2 * (torch.xlogy(y, y) - y * mean.log() - (y - mean)).mean()


class NegativeBinomial(Aggregate):
    """Aggregate head with the negative binomial likelihood of raw counts, a dispersion for each gene."""

    def _build(self, space):
        network = super()._build(space)
        network.log_size = nn.Parameter(torch.zeros(len(space.gene_mean)))
        return network

    def _error(self, rate, spots, rows):
        y = spots.counts(rows)
        mean = (rate * spots.library[rows, None] / 1e4).clamp_min(1e-6)
        size = 10 * self.network.log_size.exp()
        likelihood = torch.lgamma(y + size) - torch.lgamma(size) - torch.lgamma(y + 1)
        likelihood = likelihood + size * (size / (size + mean)).log() + y * (mean / (size + mean)).log()
        return -likelihood.mean()


HEADS = {
    # name: head, through the parts
    "default": (InContext, False),
    "log-parts": (Aggregate, True),
    "log-mean": (Aggregate, False),
    "logspace-parts": (LogSpace, True),
    "nb-parts": (NegativeBinomial, True),
    "nb-mean": (NegativeBinomial, False),
    "poisson-parts": (Poisson, True),
    "poisson-mean": (Poisson, False),
}


@dataclass(frozen=True)
class Bed:
    """Big spots to learn from, their members, and what only scores may see."""

    spots: CountedSpots
    places: Queries
    truth: np.ndarray
    """(m, g) log1p expression of the other half of the counts"""
    counts: np.ndarray
    """(m, g) the other half"""
    library: np.ndarray
    """(m,)"""
    exact: np.ndarray | None
    """(m, g) the expected expression, where it is known"""


def lay(one: Measured, exact: pd.DataFrame | None, seed: int) -> Bed:
    """Draw big spots and halves as histosge does, and keep members and counts."""
    rng = np.random.default_rng(seed)
    section = one.section
    group = pseudo_spots(section.lattice, rng=rng)
    members = np.flatnonzero(group >= 0)
    big = sparse.csr_matrix((np.ones(len(members)), (group[members], members)), shape=(group.max() + 1, len(group)))
    size = np.asarray(big.sum(1)).ravel()
    half, other = thin(one.section.counts, rng=rng)
    merged, other = sparse.csr_matrix(big @ half), other[members]
    expression = per_target_sum(merged)
    known = [SimpleNamespace(expression=expression, genes=section.genes)]
    genes = seurat_genes(known) if exact is None else list(section.genes)
    columns = section.genes.get_indexer(genes)

    def tensor(values) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values), dtype=torch.float32)

    index = np.zeros((len(size), int(size.max())), np.int64)
    weight = np.zeros(index.shape, np.float32)
    for i in range(len(size)):
        mine = np.flatnonzero(group[members] == i)
        index[i, : len(mine)], weight[i, : len(mine)] = mine, 1 / len(mine)
    embedding, xy = tensor(one.embedding[members]), tensor(section.xy_um[members])
    spots = CountedSpots(
        tensor((big @ one.embedding) / size[:, None]),
        tensor(expression[:, columns].todense()),
        tensor((big @ section.xy_um) / size[:, None]),
        torch.zeros(len(size), dtype=torch.int64),
        section.pitch_um * np.sqrt(7),
        SubSpots(embedding, xy, torch.as_tensor(index), torch.as_tensor(weight)),
        tensor(merged.sum(1)).ravel(),
    )
    return Bed(
        spots,
        Queries(embedding, xy, torch.zeros(len(members), dtype=torch.int64), torch.full((len(members),), -1)),
        np.asarray(per_target_sum(other)[:, columns].todense()),
        np.asarray(other[:, columns].todense()),
        np.asarray(other.sum(1)).ravel(),
        None if exact is None else exact.to_numpy()[members],
    )


def at_depth(rate: np.ndarray, depth: float) -> np.ndarray:
    """log1p value per 10,000 that Poisson counts of ``rate`` per 10,000 have in the mean, at ``depth`` counts."""
    grid = np.concatenate([[0], np.geomspace(1e-4, 1e4, 200)])
    mean = grid * depth / 1e4
    y = np.arange(int(mean.max() + 10 * mean.max() ** 0.5) + 1)
    value = stats.poisson.pmf(y, mean[:, None]) @ np.log1p(y * 1e4 / depth)
    return np.interp(rate, grid, value)


def score(bed: Bed, predicted: np.ndarray) -> dict[str, float]:
    """Scores of log1p predictions (m, g), mean over genes."""
    rate = np.expm1(predicted)
    # a member has a seventh of its big spot's counts: known without looking at the truth
    depth = float((bed.spots.library * bed.spots.sub_spots.weight.max(1).values).median())
    expected = at_depth(rate, depth)
    mean = np.maximum(rate, 1e-3) * bed.library[:, None] / 1e4
    deviance = 2 * (
        np.where(bed.counts > 0, bed.counts * np.log(np.maximum(bed.counts, 1) / mean), 0) - bed.counts + mean
    )
    scores = {
        "PCC": correlation(predicted, bed.truth).mean(),
        "MSE": ((predicted - bed.truth) ** 2).mean(),
        "PCC at depth": correlation(expected, bed.truth).mean(),
        "MSE at depth": ((expected - bed.truth) ** 2).mean(),
        "deviance": deviance.mean(),
    }
    if bed.exact is not None:
        scores["PCC with the exact"] = correlation(predicted, bed.exact).mean()
        scores["MSE to the exact"] = ((predicted - bed.exact) ** 2).mean()
    return scores


def run(bed: Bed, *, heads: list[str], seed: int, name: str) -> list[dict]:
    """Five networks of every head, alone, together, and with kriging."""
    rng = np.random.default_rng(seed)
    fold = block_folds(bed.spots.xy_um.numpy().astype(float), n_folds=5, rng=rng)

    def say(head, spots) -> np.ndarray:
        return head.predict(bed.places, context=spots).clamp_min(0).numpy()

    rows = []

    def note(head: str, scores: dict, seconds: float) -> None:
        rows.append({"bed": name, "head": head, "seed": seed, **scores, "s a fit": seconds})
        print(name, seed, head, {k: round(float(v), 4) for k, v in scores.items()}, f"{seconds:.1f} s", flush=True)

    start = time()
    plain = replace(bed.spots, sub_spots=None)
    kriging = say(Kriging().fit(plain, rng=rng, progress=False), plain)
    note("kriging", score(bed, kriging), time() - start)
    for one in heads:
        make, through = HEADS[one]
        spots = bed.spots if through else replace(bed.spots, sub_spots=SubSpots.whole(bed.spots))
        start, said = time(), []
        for f in np.unique(fold):
            known = spots.take(torch.as_tensor(np.flatnonzero(fold != f)))
            # every head gets the same stopping spots and seeds
            head = make().fit(known, rng=np.random.default_rng([seed, int(f)]), progress=False)
            said.append(say(head, spots))
        seconds = (time() - start) / len(said)
        single = pd.DataFrame([score(bed, s) for s in said]).mean()
        note(f"{one}, single", single.to_dict(), seconds)
        note(one, score(bed, np.mean(said, 0)), seconds)
        note(f"{one}+kriging", score(bed, (np.mean(said, 0) + kriging) / 2), seconds)
    return rows


def synthetic(seed: int) -> tuple[Measured, pd.DataFrame]:
    """A section of known truth, large enough for big spots: its rows as the section has them."""
    sdata = datasets.synthetic(n_rows=40, n_cols=40, mpp=2.0, rng=seed)
    section = read_section(sdata)
    values = Embedder.open(section, "stain-texture", device="cpu", progress=False).embed_spots()
    exact = datasets.synthetic_truth(sdata).loc[section.instances, section.genes]
    return Measured("synthetic", section, values), exact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bed", nargs="+", default=["colon", "synthetic"], choices=["colon", "synthetic"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[20, 21, 22])
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=list(HEADS))
    options = parser.parse_args()
    settings.verbosity = 1
    torch.set_num_threads(1)
    rows = []
    for name in options.bed:
        if name == "colon":
            require_data()
            colon, exact = measure("mouse_colon_visium")[0], None
        for seed in options.seeds:
            one, exact = (colon, None) if name == "colon" else synthetic(seed)
            rows += run(lay(one, exact, seed), heads=options.heads, seed=seed, name=name)
    table = pd.DataFrame(rows).groupby(["bed", "head"], sort=False).agg(["mean", "std"])
    for bed, part in table.groupby(level="bed", sort=False):
        scores = [
            s for s in dict.fromkeys(part.columns.get_level_values(0)) if s != "seed" and part[s].notna().any(axis=None)
        ]
        print(
            f"\n{bed}, seeds {options.seeds}\n\n| head | "
            + " | ".join(scores)
            + " |\n|---"
            + "|---" * len(scores)
            + "|"
        )
        for (_, head), row in part.iterrows():
            cells = [f"{row[s, 'mean']:.4f} ± {row[s, 'std']:.4f}" for s in scores[:-1]]
            print(f"| {head} | " + " | ".join([*cells, f"{row['s a fit', 'mean']:.0f}"]) + " |")


if __name__ == "__main__":
    main()
