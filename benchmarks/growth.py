"""What a million targets cost, and how costs grow with targets and with spots: prediction and writing, not embedding.

    python benchmarks/growth.py store [--n 1000000] [--head in-context+kriging]   # reads ../shared/data
    python benchmarks/growth.py targets [--largest 1000000]                       # reads ../shared/data
    python benchmarks/growth.py spots [--largest 100000] [--heads in-context kriging ...]
    python benchmarks/growth.py sections [--n-sections 12]

The model is fitted on mouse_colon_visium with `stain-texture`. Targets are small bins over the section; each has the
embedding of a spot drawn at random, so that no image is read. `spots` works on synthetic arrays, `sections` on synthetic
sections of one tissue, first with as many steps of training as few spots get. docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from histosge import Model
    from histosge._embedding import Embedder

N_GENES = 1000


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def exponent(sizes, seconds) -> float:
    """Slope of a straight line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


# ---------------------------------------------------------------------------------------------------- a fitted section


@dataclass(frozen=True)
class Fitted:
    """A section, its model and the embeddings of its spots."""

    embedder: Embedder
    at_spots: np.ndarray
    model: Model


def fitted(options) -> Fitted:
    from sections import load, require_data

    require_data()
    import histosge as sge
    from histosge import Model
    from histosge._embedding import Embedder
    from histosge._model import fit_model
    from histosge._section import read_section

    sge.settings.progress = False
    section = read_section(load("mouse_colon_visium"), report=False)
    dense = "aggregate" in options.head
    embedder = Embedder.open(section, "stain-texture", dense=dense, device="cpu", batch_size=32, progress=False)
    kept = None if options.keep is None else Path(options.keep) / options.head
    if kept is not None and (kept / "histosge.safetensors").exists():
        return Fitted(embedder, np.load(kept / "spots.npy"), Model.load(kept))
    at_spots = embedder.embed_spots()
    parts = [embedder.embed_parts()] if dense else None
    model = fit_model(
        [section], [at_spots], config=embedder.config, head=options.head, genes=N_GENES, n_folds=5,
        rng=np.random.default_rng(0), device=embedder.device, sub_spots=parts, progress=False,
    )  # fmt: skip
    if kept is not None:
        model.save(kept, overwrite=True)
        np.save(kept / "spots.npy", at_spots)
    return Fitted(embedder, at_spots, model)


def bins(known: Fitted, n: int):
    """Lay ``n`` square bins over the section, and an embedder that takes their embeddings from the spots."""
    from dataclasses import fields, replace

    from histosge._embedding import Embedder
    from histosge._geometry import square_bins

    class Resampled(Embedder):
        def embed(self, targets, *, forecast=None, quiet=False):
            which = np.asarray(targets.instances, np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(33)
            return known.at_spots[(which % np.uint64(len(known.at_spots))).astype(np.int64)]

    section = known.embedder.section
    margin_px = section.pitch_um / 2 / section.mpp
    edge_px = 8.0 / section.mpp
    for _ in range(4):
        targets = square_bins(section.xy_px, bin_px=edge_px, margin_px=margin_px)
        if n <= len(targets) < 1.02 * n:
            break
        edge_px *= np.sqrt(len(targets) / (1.01 * n))
    targets = replace(targets.take(np.arange(n)), key="bins", instances=np.arange(n))
    return Resampled(**{f.name: getattr(known.embedder, f.name) for f in fields(Embedder)}), targets


# --------------------------------------------------------------------------------------------------------------- store


def predicted(known: Fitted, n: int, path: Path) -> float:
    """Seconds of predicting and writing."""
    from histosge._model import Predictor, open_store, write_parts

    embedder, targets = bins(known, n)
    start = perf_counter()
    parts = open_store(path, embedder, targets, name="predicted", params={})
    predictor = Predictor.of(known.model, embedder, targets, known.at_spots, provenance={"head": known.model.head})
    write_parts(predictor, parts)
    return perf_counter() - start


def random_numbers(like: Path, path: Path) -> float:
    """Seconds of writing random numbers into arrays of the same shapes, chunks and codecs; they are made beforehand."""
    import zarr

    from histosge import settings

    there = zarr.open_group(like / "tables" / "predicted", mode="r")
    layers = [f"layers/{name}" for name in there["layers"]] if "layers" in there else []
    arrays = {name: there[name] for name in ("X", *layers)}
    n, n_genes = arrays["X"].shape
    rng = np.random.default_rng(0)
    part = {name: rng.random((min(settings.part_rows, n), n_genes), np.float32) for name in arrays}
    start = perf_counter()
    group = zarr.open_group(path, mode="w")
    for name, array in arrays.items():
        group.create_array(
            name, shape=array.shape, chunks=array.chunks, dtype=array.dtype, compressors=array.compressors,
            fill_value=array.fill_value,
        )  # fmt: skip
    for first in range(0, n, settings.part_rows):
        last = min(first + settings.part_rows, n)
        for name in arrays:
            group[name][first:last] = part[name][: last - first]
    return perf_counter() - start


def size_gib(path: Path) -> float:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 2**30


def store(options) -> None:
    known = fitted(options)
    print(
        f"{options.head}: {len(known.at_spots)} spots, {options.n:,} targets x {len(known.model.genes)} genes",
        flush=True,
    )
    found = []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            os.sync()
            ours = predicted(known, options.n, Path(folder) / "ours.zarr")
            peak, size = peak_gib(), size_gib(Path(folder) / "ours.zarr")
            os.sync()
            theirs = random_numbers(Path(folder) / "ours.zarr", Path(folder) / "random.zarr")
            random_size = size_gib(Path(folder) / "random.zarr")
        found.append((ours, theirs, ours / theirs))
        print(
            f"predict and write {ours:.1f} s ({options.n / ours:,.0f} targets/s, {size:.2f} GiB), random numbers {theirs:.1f} s "
            f"({random_size:.2f} GiB), ratio {ours / theirs:.2f}, peak of predicting {peak:.2f} GiB",
            flush=True,
        )
    if options.repeats > 1:
        print("medians: {:.1f} s, {:.1f} s, ratio {:.2f}".format(*np.median(found, axis=0)))


# ------------------------------------------------------------------------------------------------------------- targets


def targets(options) -> None:
    """Predict parts as a store does and throw them away."""
    from histosge import settings
    from histosge._model import Predictor

    known = fitted(options)
    sizes = [n for n in (10_000, 32_000, 100_000, 320_000, 1_000_000) if n <= options.largest]
    seconds = []
    for n in sizes:
        embedder, some = bins(known, n)
        start = perf_counter()
        predictor = Predictor.of(known.model, embedder, some, known.at_spots, provenance={})
        for first in range(0, n, settings.part_rows):
            predictor.matrices(np.arange(first, min(first + settings.part_rows, n)))
        seconds.append(perf_counter() - start)
        print(
            f"{n:>9,} targets {seconds[-1]:7.2f} s  {1e6 * seconds[-1] / n:6.1f} µs each  peak {peak_gib():.2f} GiB",
            flush=True,
        )
    print(f"time grows with targets to the power of {exponent(sizes, seconds):.3f}")


# --------------------------------------------------------------------------------------------------------------- spots


def spots(options) -> None:
    """Fit and predict with more and more spots, every size and head in a process of its own."""
    sizes = [n for n in (1_000, 3_200, 10_000, 32_000, 100_000) if n <= options.largest]
    for head in options.heads:
        found = []
        for n in sizes:
            ask = [sys.executable, __file__, "one", "--head", head, "--n", str(n), "--places", str(options.places)]
            try:
                done = subprocess.run(ask, capture_output=True, text=True, timeout=options.seconds, check=False)
            except subprocess.TimeoutExpired:
                print(f"{head:12} {n:>8,} spots: not finished in {options.seconds} s", flush=True)
                break
            if done.returncode:
                print(f"{head:12} {n:>8,} spots: failed, {done.stderr.strip().splitlines()[-1]}", flush=True)
                break
            found.append({"n": n} | json.loads(done.stdout.strip().splitlines()[-1]))
            print(
                "{head:12} {n:>8,} spots: fit {fit:7.2f} s, first answer {first:6.2f} s, {places:,} places {again:6.2f} s, "
                "peak {peak:.2f} GiB (data {data:.2f})".format(head=head, places=options.places, **found[-1]),
                flush=True,
            )  # fmt: skip
        if len(found) > 2:
            large = found[-3:]
            slopes = {
                what: exponent([f["n"] for f in large], [f[what] for f in large])
                for what in ("fit", "first", "again", "peak")
            }
            print(f"{head:12} exponents over the last three: " + ", ".join(f"{k} {v:.2f}" for k, v in slopes.items()))


def one(options) -> None:
    """Fit and predict once; a line of JSON."""
    import torch

    from histosge._heads import LowRank, Queries, Spots, get_head

    rng = np.random.default_rng(0)
    side = int(np.ceil(np.sqrt(options.n)))
    xy_um = 100.0 * np.stack(np.divmod(np.arange(options.n), side), 1)
    latent = np.stack([np.sin(xy_um[:, i % 2] / (300 * (i + 1))) for i in range(8)], 1).astype(np.float32)

    def seen(values, width, noise):
        mixed = values @ rng.standard_normal((values.shape[1], width), np.float32)
        for start in range(0, len(mixed), 4096):  # noise of all at once would be the peak
            some = mixed[start : start + 4096]
            some += noise * rng.standard_normal(some.shape, np.float32)
        return mixed

    embedding = seen(latent, 120, 1.0)
    expression = seen(latent, N_GENES, 2.0)
    np.maximum(expression, 0, out=expression)
    number = torch.zeros(options.n, dtype=torch.int64)
    known = Spots(*map(torch.from_numpy, (embedding, expression, xy_um.astype(np.float32))), number, 100.0)
    which = rng.integers(options.n, size=options.places)
    at = xy_um[which] + rng.uniform(-50, 50, (options.places, 2))
    places = Queries(
        known.embedding[torch.from_numpy(which)],
        torch.from_numpy(at.astype(np.float32)),
        torch.zeros(options.places, dtype=torch.int64),
        torch.full((options.places,), -1),
    )
    head, data = get_head(options.head)(), peak_gib()
    times = [perf_counter()]
    head.fit(known, rng=np.random.default_rng(0), progress=False)
    times.append(perf_counter())
    condition = head.condition(known) if isinstance(head, LowRank) else None
    for rows in (slice(0, 256), slice(None)):
        if condition is None:
            head.predict(places.take(rows), context=known)
        else:
            (components,) = head.components([head], [condition], places.take(rows))
            head.expansion()(components)
        times.append(perf_counter())
    fit, first, again = np.diff(times)
    print(json.dumps({"fit": fit, "first": first, "again": again, "peak": peak_gib(), "data": data}))


# ------------------------------------------------------------------------------------------------------------ sections


def sections(options) -> None:
    """Fit on many sections together, predict one of them, and one of which there is an image only."""
    from spatialdata import SpatialData

    import histosge as sge
    from histosge._heads import _training

    sge.settings.progress = False
    sge.settings.verbosity = 1
    how = {"n_rows": options.rows, "n_cols": options.rows, "n_genes": options.genes, "mpp": 2.0, "genes_rng": 0}
    times = [perf_counter()]
    known = [sge.datasets.synthetic(**how, rng=i) for i in range(options.n_sections)]
    times.append(perf_counter())
    for sdata in known:
        sge.tl.embed(sdata, encoder="stain-texture")
    times.append(perf_counter())
    n_spots = sum(len(sdata.shapes["spots"]) for sdata in known)
    made, embedded = np.diff(times)
    print(
        f"{options.n_sections} sections, {n_spots:,} spots: made in {made:.0f} s, embedded in {embedded:.0f} s",
        flush=True,
    )
    few = _training._MANY_SPOTS
    for what, many in ("steps as for few spots", 10**12), ("as shipped", few):
        _training._MANY_SPOTS = many
        start = perf_counter()
        model = sge.tl.fit(known, encoder="stain-texture", genes="all")
        scores = ", ".join(f"{name} {score['pcc']:.3f}" for name, score in model.held_out.items())
        print(
            f"{what}: fit {perf_counter() - start:.0f} s, peak {peak_gib():.2f} GiB; held-out PCC {scores}", flush=True
        )
    unseen = SpatialData(images=sge.datasets.synthetic(**how, rng=10**6).images)
    for what, sdata, more in ("a measured section", known[0], {}), ("an image alone", unseen, {"mpp": 2.0}):
        start = perf_counter()
        found = sge.tl.predict(sdata, model=model, inplace=False, **more)
        print(f"{what}: {found.n_obs:,} places in {perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(required=True)
    for job in (store, targets):
        command = jobs.add_parser(job.__name__)
        command.set_defaults(job=job)
        command.add_argument("--head", default="in-context+kriging")
        command.add_argument("--keep", help="folder to keep the fitted model in, and to take it from")
    command.add_argument("--largest", type=int, default=1_000_000)
    command = jobs.choices["store"]
    command.add_argument("--n", type=int, default=1_000_000)
    command.add_argument("--repeats", type=int, default=1)
    command.add_argument("--folder", help="where to write: 16 GiB for a million targets, twice")
    command = jobs.add_parser("spots")
    command.set_defaults(job=spots)
    command.add_argument("--largest", type=int, default=100_000)
    command.add_argument("--heads", nargs="+", default=["in-context", "kriging", "aggregate", "ridge", "nearest"])
    command.add_argument("--places", type=int, default=20_000)
    command.add_argument("--seconds", type=int, default=600, help="limit of one size")
    command = jobs.add_parser("sections")
    command.set_defaults(job=sections)
    command.add_argument("--n-sections", type=int, default=12)
    command.add_argument("--rows", type=int, default=70)
    command.add_argument("--genes", type=int, default=600)
    command = jobs.add_parser("one")
    command.set_defaults(job=one)
    command.add_argument("--head", required=True)
    command.add_argument("--n", type=int, required=True)
    command.add_argument("--places", type=int, default=20_000)
    options = parser.parse_args()
    options.job(options)


if __name__ == "__main__":
    main()
