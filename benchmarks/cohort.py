"""Many sections: memory and time of a fit, accuracy with some of the spots, and a patient's last section. docs/benchmarks.md.

    python benchmarks/cohort.py many [--sections 1 10 50] [--folder FOLDER] [--head ridge] [--encoder rgb]
    python benchmarks/cohort.py spots [--sections 50] [--max-spots 10000 30000 100000 1000000] [--folder FOLDER]
    python benchmarks/cohort.py her2st [--seeds 3]                                   # reads ../shared/data
    python benchmarks/cohort.py union [--seeds 3]                                    # reads ../shared/data

Made sections have 3,282 spots, and sections of one kind of tissue (`sge.datasets.synthetic(genes_rng=0)`). `many` fits,
predicts one section and evaluates by sections, each number of sections in a process of its own. `spots` predicts a section
that no model has seen from its image alone, and compares with the truth. `her2st` fits on C2 to C4 and predicts half of the
spots of C5: from the image alone, and with a tenth and half of its spots as context. `union` hides half of 400 genes on C4
and C5, and predicts them there.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from time import process_time, time

import numpy as np


def paths(options, n: int) -> list[Path]:
    """Made sections on disk; the last one is for predictions."""
    import histosge as sge

    folder = Path(options.folder or tempfile.gettempdir())
    found = [folder / f"cohort_{options.rows}_{options.genes}_{i}.zarr" for i in range(n)]
    for i, path in enumerate(found):
        if not path.exists():
            how = {"n_rows": options.rows, "n_cols": options.rows, "n_genes": options.genes, "mpp": 4.0, "genes_rng": 0}
            sge.datasets.synthetic(**how, rng=i).write(path)
    return found


def many(options) -> None:
    paths(options, max(options.sections))
    for n in options.sections:
        ask = [sys.executable, __file__, "one", *sys.argv[2:], "--sections", str(n)]
        subprocess.run(ask, check=True)


def one(options) -> None:
    """Fit on the first sections, predict the first, evaluate by sections; time and peak after each."""
    import histosge as sge

    sge.settings.progress, sge.settings.verbosity = False, 1
    (n,) = options.sections
    sources, how = paths(options, n), {"encoder": options.encoder}
    print(f"{n} sections: before {peak():.2f} GiB", flush=True)
    start, busy = time(), process_time()
    model = sge.tl.fit(sources, **how, head=options.head, genes=300, max_spots=options.max_spots[-1])
    report(
        "fit", start, busy, f", {model.info['n_spots']:,} spots, held-out PCC {model.held_out[model.head]['pcc']:.3f}"
    )
    start, busy = time(), process_time()
    import spatialdata

    table = sge.tl.predict(spatialdata.read_zarr(sources[0]), model=model, inplace=False)
    report("predict", start, busy, f", {table.n_obs:,} targets")
    del table, model
    if 1 < n <= options.most_evaluated:
        start, busy = time(), process_time()
        scores = sge.tl.evaluate(
            sources, **how, heads=["ridge"], genes=300, split="sections", max_spots=options.max_spots[-1], n_folds=2
        )
        report("evaluate", start, busy, f", PCC {scores['pcc'].mean():.3f}")


def report(what: str, start: float, busy: float, more: str) -> None:
    took = f"{time() - start:.0f} s, {process_time() - busy:.0f} s of processor time"
    print(f"    {what}: {took}, peak {peak():.2f} GiB{more}", flush=True)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ---------------------------------------------------------------------------------------------------------------- spots


def spots(options) -> None:
    import spatialdata
    from spatialdata import SpatialData

    import histosge as sge
    from histosge._statistics import correlation

    sge.settings.progress, sge.settings.verbosity = False, 1
    (n,) = options.sections[-1:]
    *known, last = paths(options, n + 1)
    unseen = spatialdata.read_zarr(last)
    alone = SpatialData(images=dict(unseen.images), shapes=dict(unseen.shapes))
    truth = sge.datasets.synthetic_truth(unseen)
    for max_spots in options.max_spots:
        for head in options.heads:
            start, busy = time(), process_time()
            model = sge.tl.fit(known, encoder=options.encoder, head=head, genes="all", max_spots=max_spots)
            took = f"{time() - start:.0f} s, {process_time() - busy:.0f} s of processor time"
            found = sge.tl.predict(alone, model=model, target_key="spots", mpp=4.0, inplace=False)
            expected = truth.loc[found.obs["instance_id"], found.var_names].to_numpy()
            follow = [name < f"GENE{options.genes - options.genes // 5:03d}" for name in found.var_names]
            pcc = correlation(np.asarray(found.X), expected)[follow].mean()
            print(
                f"{n} sections, {model.info['n_spots']:,} of {model.info.get('n_measured', model.info['n_spots']):,} "
                f"spots, {head}: PCC with the truth {pcc:.4f}, held-out PCC {model.held_out[head]['pcc']:.4f}, {took}",
                flush=True,
            )


# --------------------------------------------------------------------------------------------------------------- her2st


def her2st(options) -> None:
    """C5 from C2 to C4, with more and more of its own spots; scored on the other half of its spots."""
    import torch
    from sections import load, require_data

    import histosge as sge
    from histosge._embedding import Embedder
    from histosge._model import UNMEASURED, fit_model
    from histosge._section import read_section
    from histosge._statistics import correlation

    require_data()
    sge.settings.progress, sge.settings.verbosity = False, 0
    cpu, heads = torch.device("cpu"), ("in-context+kriging", "ridge")
    sections = [read_section(load(f"her2st/C{i}"), report=False) for i in (2, 3, 4, 5)]
    embedders = [Embedder.open(section, "stain-texture", device="cpu", progress=False) for section in sections]
    values = [embedder.embed_spots() for embedder in embedders]
    (*known, section), (*at_known, at_spots) = sections, values
    n = len(section.xy_px)
    scores: dict[tuple[str, str], list[float]] = {}
    for seed in range(options.seeds):
        how = {"config": embedders[0].config, "device": cpu, "baselines": (), "progress": False}
        models = {
            head: fit_model(known, at_known, head=head, genes=1000, n_folds=5, rng=np.random.default_rng(seed), **how)
            for head in heads
        }
        genes = models["ridge"].genes
        order = np.random.default_rng(seed).permutation(n)
        test = np.sort(order[n // 2 :])
        measured = section.dense(genes)[test]
        for share in (0.0, 0.1, 0.5):
            rows = np.sort(order[: round(share * n)])
            made = {f"{head} of C2-C4": model for head, model in models.items()}
            for head in heads if share else ():
                try:
                    made[f"{head} of these spots alone"] = fit_model(
                        [section.take(rows)], [at_spots[rows]], head=head, genes=list(genes),
                        n_folds=5 if share > 0.2 else 2, rng=np.random.default_rng(seed), **how,
                    )  # fmt: skip
                except (ValueError, RuntimeError) as error:
                    print(f"{head}, {len(rows)} spots: {error}", flush=True)
            for name, model in made.items():
                context = (
                    model.context(section.take(rows), at_spots[rows], device=cpu)
                    if share
                    else model.condition(model.spots, section=UNMEASURED, device=cpu)
                )
                found = model.predict_from(
                    context, embedding=at_spots[test], xy_um=section.xy_um[test], spot_index=np.full(len(test), -1)
                )[:, model.genes.get_indexer(genes)]
                scores.setdefault((f"{share:4.0%}", name), []).append(float(correlation(found, measured).mean()))
        print(f"seed {seed}: {len(test)} of {n} spots scored", flush=True)
    for (share, name), found in sorted(scores.items()):
        print(f"{share} of C5 as context, {name}: PCC {np.mean(found):.3f} ± {np.std(found):.3f}")


# ---------------------------------------------------------------------------------------------------------------- union


def union(options) -> None:
    """Hide half of the genes on C4 and C5: what `genes="union"` says of them there, and what it costs the others."""
    import torch
    from scipy import sparse
    from sections import load, require_data

    import histosge as sge
    from histosge._embedding import Embedder
    from histosge._model import UNMEASURED, choose_genes, fit_model
    from histosge._section import read_section
    from histosge._statistics import correlation

    require_data()
    sge.settings.progress, sge.settings.verbosity = False, 0
    cpu = torch.device("cpu")
    sections = [read_section(load(f"her2st/C{i}"), report=False) for i in (2, 3, 4, 5)]
    embedders = [Embedder.open(section, "stain-texture", device="cpu", progress=False) for section in sections]
    values = [embedder.embed_spots() for embedder in embedders]
    genes = sections[0].genes
    for other in sections[1:]:
        genes = genes.intersection(other.genes, sort=False)
    everything = sparse.vstack([section.with_genes(genes).expression for section in sections]).tocsr()
    number = np.repeat(range(4), [len(section.xy_um) for section in sections])
    genes = genes[choose_genes(everything, np.vstack([s.xy_um for s in sections]), n_genes=400, groups=number)]
    scores: dict[tuple[str, str], list[float]] = {}
    for seed in range(options.seeds):
        drawn = np.random.default_rng(seed).permutation(len(genes))
        shared, hidden = genes[np.sort(drawn[:200])], genes[np.sort(drawn[200:])]
        known = [s.with_genes(genes if i < 2 else shared) for i, s in enumerate(sections)]
        how = {"config": embedders[0].config, "device": cpu, "baselines": (), "progress": False, "n_folds": 5}
        how |= {"head": options.head}

        def fit(n, genes, known=known, how=how, seed=seed):
            return fit_model(known[:n], values[:n], genes=genes, rng=np.random.default_rng(seed), **how)

        joined, apart = fit(4, "union"), fit(2, list(genes))
        of_shared = {"union": joined, "the shared genes alone": fit(4, list(shared))}
        for name, model in of_shared.items():
            add(scores, "shared genes, held out on C2-C5", name, model.scores["held_out_pcc"][shared].mean())
        for name, model in {"union": joined, "C2 and C3 alone": apart}.items():
            add(scores, "other genes, held out on C2 and C3", name, model.scores["held_out_pcc"][hidden].mean())
        for i in (2, 3):
            section, at_spots = known[i], values[i]
            measured, n = sections[i].dense(hidden), len(at_spots)
            contexts = {
                "union": (joined, joined.context(section, at_spots, device=cpu)),
                "image alone, of C2 and C3": (apart, apart.condition(apart.spots, section=UNMEASURED, device=cpu)),
            }
            for name, (model, context) in contexts.items():
                found = model.predict_from(context, embedding=at_spots, xy_um=section.xy_um, spot_index=np.full(n, -1))[
                    :, model.genes.get_indexer(hidden)
                ]
                add(scores, "other genes, on C4 and C5", name, correlation(found, measured).mean())
    for (what, name), found in scores.items():
        print(f"{what}: {name}: PCC {np.mean(found):.4f} ± {np.std(found):.4f}")


def add(scores: dict[tuple[str, str], list[float]], what: str, name: str, value: float) -> None:
    scores.setdefault((what, name), []).append(float(value))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(required=True)
    for job in (many, spots, one):
        command = jobs.add_parser(job.__name__)
        command.set_defaults(job=job)
        command.add_argument("--sections", type=int, nargs="+", default=[1, 10, 50])
        command.add_argument("--rows", type=int, default=70, help="rows and columns of a section")
        command.add_argument("--genes", type=int, default=300)
        command.add_argument("--folder", help="where made sections are kept")
        command.add_argument("--encoder", default="rgb")
        command.add_argument("--head", default="ridge")
        command.add_argument("--heads", nargs="+", default=["ridge", "in-context+kriging"])
        command.add_argument("--max-spots", type=int, nargs="+", default=[100_000])
        command.add_argument("--most-evaluated", type=int, default=10)
    for job in (her2st, union):
        command = jobs.add_parser(job.__name__)
        command.set_defaults(job=job)
        command.add_argument("--seeds", type=int, default=3)
        command.add_argument("--head", default="in-context+kriging")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of zarr, about its own plans
    options.job(options)


if __name__ == "__main__":
    main()
