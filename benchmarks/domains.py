"""Spatial domains against a pathologist: measured expression, measured and averaged, predicted with every spot held out.

    python benchmarks/domains.py [--head in-context] [--seeds 5]

Section her2st/A1 of ../shared/data, 346 spots; the labels are looked at for scoring only, "undetermined" left out.
The 500 most expressed genes; the same settings for all three. A seed deals the folds, trains the heads and starts leiden.
"""

from __future__ import annotations

import argparse
import inspect
import logging
from time import time

import numpy as np
from scipy.spatial import cKDTree
from sections import load, require_data

SECTION = "her2st/A1"
RESOLUTIONS = (0.3, 0.5, 0.8, 1.0)
N_DOMAINS = 5
"""As many as the pathologist's classes."""


def inputs(n_genes: int):
    """Embeddings, log1p expression of the most expressed genes, places and labels, one row a spot."""
    import torch

    from histosge._embedding import Embedder
    from histosge._heads import Spots
    from histosge._section import read_section

    sdata = load(SECTION)
    section = read_section(sdata)
    embedding = Embedder.open(section, "stain-texture", device="cpu", progress=False).embed_spots()
    mean = np.asarray(section.expression.mean(axis=0)).ravel()
    genes = section.genes[np.sort(np.argsort(-mean, kind="stable")[:n_genes])]
    arrays = (np.asarray(a, np.float32) for a in (embedding, section.dense(genes), section.xy_um))
    spots = Spots(
        *(torch.as_tensor(a) for a in arrays), torch.zeros(len(arrays[0]), dtype=torch.int64), section.pitch_um
    )
    labels = sdata.tables["table"].obs.set_index("instance_id")["label"].astype(str).loc[section.instances]
    return spots, labels.to_numpy()


def main() -> None:
    require_data()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", default="in-context+kriging")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--genes", type=int, default=500)
    options = parser.parse_args()

    import histosge as sge
    from histosge._model import cross_fit
    from histosge._statistics import agreement, find_domains, random_folds

    logging.getLogger("histosge").setLevel(logging.WARNING)
    defaults = {k: p.default for k, p in inspect.signature(sge.tl.domains).parameters.items()}
    spots, labels = inputs(options.genes)
    measured, xy = spots.expression.numpy(), spots.xy_um.numpy()
    known = labels != "undetermined"
    around = cKDTree(xy).query(xy, k=7)[1]  # the spot and its six nearest
    averaged = measured[around].mean(axis=1)
    found: dict[tuple[str, float, str], list[tuple[float, float, int]]] = {}
    start = time()
    for seed in range(options.seeds):
        rng = np.random.default_rng(seed)
        fold = random_folds(len(spots), n_folds=options.folds, rng=rng)
        held_out = cross_fit(spots, head=options.head, fold=fold, rng=rng, progress=False).held_out
        predicted = f"predicted, every spot held out ({options.head})"
        for name, values in (("measured", measured), ("averaged over 7", averaged), (predicted, held_out)):
            for weight in (0.0, defaults["spatial_weight"]):
                for resolution, n_domains in [*((r, None) for r in RESOLUTIONS), (1.0, N_DOMAINS)]:
                    domain = find_domains(
                        values,
                        xy,
                        resolution=resolution,
                        n_domains=n_domains,
                        n_pcs=defaults["n_pcs"],
                        n_neighbours=defaults["n_neighbours"],
                        spatial_weight=weight,
                        rng=seed,
                    )
                    scores = agreement(domain[known], labels[known])
                    setting = f"{resolution}" if n_domains is None else "equal"
                    row = (scores["nmi"], scores["ari"], int(domain.max()) + 1)
                    found.setdefault((name, weight, setting), []).append(row)
    print(f"\n{SECTION}: {len(spots)} spots, {known.sum()} labelled, {len(set(labels[known]))} classes; ", end="")
    print(f"{options.genes} genes, {options.seeds} seeds, {time() - start:.0f} s; mean ± spread over seeds (domains)\n")
    heads = [f"NMI, resolution {r}" for r in RESOLUTIONS] + [f"NMI, {N_DOMAINS} domains", f"ARI, {N_DOMAINS} domains"]
    print(f"| expression | spatial_weight | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 2)}")
    for name, weight in dict.fromkeys(key[:2] for key in found):
        cells = []
        for setting, columns in [*((f"{r}", (0,)) for r in RESOLUTIONS), ("equal", (0, 1))]:
            rows = np.array(found[name, weight, setting])
            mean, spread = rows.mean(axis=0), rows.std(axis=0)
            cells += [f"{mean[c]:.3f} ± {spread[c]:.3f} ({mean[2]:.1f})" for c in columns]
        print(f"| {name} | {weight} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
