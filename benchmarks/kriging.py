"""Kriging of a large context by tiles against the exact answer, and its few groups of covariances against many.

    python benchmarks/kriging.py tiles [--n 12000]       # made spots: takes minutes and 4 GiB for the exact answer
    python benchmarks/kriging.py kinds [--seeds 8]       # reads ../shared/data

`tiles` asks at 2,000 places among the spots, at the same ones a metre away, where only the image tells anything, and
along a line through them, where a step from one place to the next is one from tile to tile.
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from time import perf_counter

import numpy as np
import torch

from histosge._heads import Queries, Spots, _conditioning, get_head, workers

PITCH_UM = 100.0


def rms(a, b) -> float:
    return float((a - b).square().mean().sqrt())


def made(n: int, *, n_genes: int = 200, n_places: int = 2_000, seed: int = 0):
    """Spots and places; expression follows fields that the image shows, bends of these, and some that it does not show."""
    rng = np.random.default_rng(seed)
    side = int(np.ceil(np.sqrt(n)))
    xy = PITCH_UM * np.stack(np.divmod(np.arange(n), side), 1)

    def field(length_um, n_fields):
        waves = rng.normal(0, 1 / length_um, (n_fields, 64, 2))
        phases, sizes = rng.uniform(0, 2 * np.pi, (n_fields, 64)), rng.normal(size=(n_fields, 64)) * np.sqrt(2) / 8
        return lambda at: np.stack(
            [np.cos(at @ w.T + p) @ s for w, p, s in zip(waves, phases, sizes, strict=True)], 1
        ).astype(np.float32)

    shown, fine, coarse = field(400, 6), field(400, 4), field(1500, 2)
    to_image, to_genes = (rng.standard_normal(shape).astype(np.float32) for shape in ((6, 120), (18, n_genes)))

    def seen(at):
        values = shown(at)
        bent = np.tanh(2 * values * np.roll(values, -1, 1))
        image = values @ to_image + rng.standard_normal((len(at), 120)).astype(np.float32)
        return image, np.concatenate([values, bent, fine(at), coarse(at)], 1) @ to_genes + 8

    image, truth = seen(xy)
    counts = np.maximum(truth + 6 * rng.standard_normal(truth.shape), 0)
    at = xy[rng.integers(n, size=n_places)] + rng.uniform(-PITCH_UM / 2, PITCH_UM / 2, (n_places, 2))
    image_there, truth_there = seen(at)
    image, counts, xy, image_there, at, truth_there = (
        torch.from_numpy(a.astype(np.float32)) for a in (image, counts, xy, image_there, at, truth_there)
    )
    one, there = torch.zeros(n, dtype=torch.int64), torch.zeros(n_places, dtype=torch.int64)
    places = Queries(image_there, at, there, there - 1)
    return Spots(image, counts, xy, one, PITCH_UM), places, truth_there.clamp_min(0)


def tiles(options) -> None:
    known, places, truth = made(options.n)
    head = get_head("kriging")().fit(known, rng=np.random.default_rng(0), progress=False)
    truth, far = head.space.components(truth), replace(places, xy_um=places.xy_um - 1e6)
    along = torch.arange(0, float(known.xy_um[:, 0].max()), 5)
    line = torch.stack([along, along * 0.37 + 1000], 1)
    there = torch.zeros(len(line), dtype=torch.int64)
    line = Queries(places.embedding[:1].expand(len(line), -1), line, there, there - 1)

    config, weights = head.state()

    def ask(**sizes):
        sized = get_head("kriging").from_state(config | sizes, weights)
        start = perf_counter()
        with workers(torch.device("cpu")) as run:
            conditions = [sized.condition(known, run=run)]
            found = [sized.components([sized], conditions, where, run=run)[0] for where in (places, far, line)]
        return *found, perf_counter() - start

    exact = ask(n_exact=10**9)
    print(f"{options.n:,} spots, spread of the answer {float(exact[0].std(0).square().mean().sqrt()):.2f}")
    print("drawn | from exact, there and far | from the truth, there and far | largest step | all, s")
    for n_drawn in (None, *options.drawn):
        there, away, walked, seconds = exact if n_drawn is None else ask(n_inducing=n_drawn)
        gaps = [rms(there, exact[0]), rms(away, exact[1]), rms(there, truth), rms(away, truth)]
        gaps.append(float(walked.diff(dim=0).abs().max()))
        print(n_drawn or "exact", *(f"{gap:.3f}" for gap in gaps), f"{seconds:.1f}", sep=" | ", flush=True)


def kinds(options) -> None:
    from growth import fitted

    section = fitted(argparse.Namespace(head="ridge", keep=None))
    model, xy_px = section.model, section.section.xy_px
    values = (section.at_spots, section.section.dense(model.context_genes), xy_px * section.section.mpp)
    number = torch.zeros(len(xy_px), dtype=torch.int64)
    spots = Spots(*(torch.as_tensor(np.asarray(v, np.float32)) for v in values), number, section.section.pitch_um)
    block = np.floor(spots.xy_um.numpy() / 1000) @ [1, 1000]
    found = []
    for seed in range(options.seeds):
        rng = np.random.default_rng(seed)
        inside = rng.permutation(len(spots)) < len(spots) // 2
        if seed % 2:  # half of the blocks of a millimetre
            inside = np.isin(block, rng.permutation(np.unique(block))[: len(np.unique(block)) // 2])
        known, held_out = (spots.take(torch.from_numpy(np.flatnonzero(rows))) for rows in (inside, ~inside))
        places = Queries.of(held_out, hidden=False)
        found.append([])
        for n_groups in (16, 8, 4, 2):
            _conditioning._KERNEL_GROUPS = n_groups
            head = get_head("kriging")().fit(known, rng=np.random.default_rng(seed), progress=False)
            for where in (places, replace(places, xy_um=places.xy_um - 1e6)):
                said, true = head.predict(where, context=known), held_out.expression
                a, b = said - said.mean(0), true - true.mean(0)
                pcc = (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp_min(1e-9)
                found[-1] += [float(pcc.mean()), float((said - true).square().mean())]
    print("kinds | PCC and MSE | the same, seen from afar: by the image alone")
    for n_groups, row in zip((16, 8, 4, 2), np.mean(found, 0).reshape(4, 4), strict=True):
        print(n_groups, *(f"{value:.4f}" for value in row), sep=" | ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(required=True)
    command = jobs.add_parser("tiles")
    command.set_defaults(job=tiles)
    command.add_argument("--n", type=int, default=12_000)
    command.add_argument("--drawn", type=int, nargs="+", default=[512, 1000, 1500])
    command = jobs.add_parser("kinds")
    command.set_defaults(job=kinds)
    command.add_argument("--seeds", type=int, default=8)
    options = parser.parse_args()
    options.job(options)


if __name__ == "__main__":
    main()
