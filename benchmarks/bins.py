"""Bins below the spot: accuracy against a known truth, pictures and seams, memory and resuming, speed. docs/benchmarks.md.

    python benchmarks/bins.py synthetic [--seeds 3] [--first-seed 0]
    python benchmarks/bins.py colon            # a picture and the seams; reads ../shared/data
    python benchmarks/bins.py scale [--side-mm 6.5] [--genes 1000] [--kill]
    python benchmarks/bins.py speed

Pseudo-spots, trained on merged spots and compared at the original ones, are in accuracy.py (--only colon-pseudo).
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from time import sleep, time

import numpy as np
import pandas as pd

OUT = Path(__file__).resolve().parent / "out"
SPOT_UM = 55.0


def correlations(a, b):
    from histosge._statistics import correlation

    return correlation(a, b)


# ------------------------------------------------------------------------------------------------------------ synthetic


def synthetic(options) -> None:
    """Bins of 8 µm against the truth, mean over the genes that follow anything."""
    rows = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for gland_um in (None, 40.0, 24.0):
            rows.append(one_section(seed, gland_um))
            print(rows[-1].round(3).to_string(index=False), flush=True)
    table = pd.concat(rows)
    by = table.groupby(["glands", "method"], sort=False, dropna=False)
    print(by[["pcc", "fine", "below", "mse", "spots"]].agg(["mean", "std"]).round(3).to_string())


def one_section(seed: int, gland_um: float | None) -> pd.DataFrame:
    import histosge as sge
    from histosge._geometry import spot_by_bin
    from histosge._section import read_section, read_targets
    from histosge._statistics import correlation

    sge.settings.verbosity, sge.settings.progress = 0, False
    sdata = sge.datasets.synthetic(gland_um=gland_um, rng=seed, n_rows=24, n_cols=24)
    section = read_section(sdata, report=False)
    sge.pp.targets(sdata, bin_um=8)
    targets = read_targets(sdata, section, "histosge_targets")
    truth = sge.datasets.synthetic_truth(sdata, target_key="histosge_targets")
    genes = list(truth.columns[: -(truth.shape[1] // 5)])  # the last fifth follows nothing
    truth = truth[genes].to_numpy()
    places = {"bin_px": 8.0 / section.mpp, "row": targets.array_row, "col": targets.array_col}
    share = spot_by_bin(section.footprints, targets.xy_px, **places)
    at_spots = np.log1p(share @ np.expm1(truth))
    mean_px = SPOT_UM / 2 / section.mpp
    blurred = local_means(targets.xy_px, truth, radius_px=mean_px)
    fine = correlation(blurred, truth) < 0.9  # genes of which a quarter or so of the truth lies below a spot
    found = []

    def score(method: str, values) -> None:
        whole = correlation(values, truth)
        below = correlation(values - local_means(targets.xy_px, values, radius_px=mean_px), truth - blurred)
        found.append(
            {
                "glands": gland_um or 0.0, "seed": seed, "method": method, "pcc": whole.mean(),
                "fine": whole[fine].mean() if fine.any() else np.nan, "below": below.mean(),
                "mse": ((values - truth) ** 2).mean(),
                "spots": correlation(np.log1p(share @ np.expm1(values)), at_spots).mean(),
            }
        )  # fmt: skip

    def ask(layer=None, **how):
        table = sge.tl.predict(
            sdata, target_key="histosge_targets" if "bin_um" not in how else None, encoder="stain-texture",
            genes="all", key_added="bins", inplace=False, **how,
        )  # fmt: skip
        return table[:, genes]

    ours = ask(bin_um=8, conserve=True)
    score("ours: aggregate+kriging, areas", np.asarray(ours.X))
    score("ours, conserved", np.asarray(ours.layers["conserved"]))
    score("areas, no aggregate: in-context+kriging", np.asarray(ask(head="in-context+kriging").X))
    score("spot head: in-context+kriging, tiles", np.asarray(ask(head="in-context+kriging", dense=False).X))
    score("inverse distance", np.asarray(ask(head="nearest", dense=False).X))
    from histosge._geometry import nearest_spots

    own, _, _ = nearest_spots(targets.xy_px, section.xy_px, k=1)
    score("its spot's value", section.dense(genes)[own[:, 0]])
    return pd.DataFrame(found)


def local_means(xy_px, values, *, radius_px):
    """Mean over the bins within a spot's radius of each."""
    from scipy import sparse
    from scipy.spatial import cKDTree

    near = cKDTree(xy_px).sparse_distance_matrix(cKDTree(xy_px), radius_px, output_type="coo_matrix")
    n = len(xy_px)
    graph = sparse.csr_matrix((np.ones(near.nnz), (near.row, near.col)), shape=(n, n)) + sparse.identity(n)
    graph.data[:] = 1
    return (graph @ values) / np.asarray(graph.sum(1))


# ---------------------------------------------------------------------------------------------------------------- colon


def colon(options) -> None:
    """Three genes at 8 µm over the H&E, and how much values jump across the borders of blocks and tiles."""
    from sections import load, require_data

    import histosge as sge

    require_data()
    sge.settings.progress = False
    sdata = load("mouse_colon_visium")
    start = time()
    sge.tl.predict(sdata, encoder="stain-texture", bin_um=8)
    print(f"predict: {time() - start:.0f} s, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    table = sdata.tables["histosge"]
    wanted = {
        "epithelium": ["Krt8", "Muc2", "Car1"],
        "muscle": ["Myh11", "Acta2", "Des"],
        "lymphoid": ["Cd74", "Ighm", "Cd79a"],
    }
    genes = {kind: next(g for g in names if g in table.var_names) for kind, names in wanted.items()}
    draw(sdata, table, genes)
    mpp = float(table.uns["histosge"]["mpp"])
    edge = 2048.0 / mpp  # blocks of stain-texture: 1024 px of 2 µm
    for kind, gene in genes.items():
        values = np.asarray(table[:, gene].X).ravel()
        print(
            f"{kind} {gene}: jump across blocks over jump elsewhere {jump(table, values, edge_px=edge, bin_px=8 / mpp):.3f}"
        )
    every = [jump(table, np.asarray(table.X[:, g]), edge_px=edge, bin_px=8 / mpp) for g in range(0, table.n_vars, 20)]
    print(f"all genes (every 20th): {np.mean(every):.3f} ± {np.std(every):.3f}")
    tiles_of_a_vit(sdata)


def jump(table, values, *, edge_px, bin_px):
    """Mean absolute step between neighbouring bins across borders over that elsewhere, both directions."""
    row, col = table.obs["array_row"].to_numpy(), table.obs["array_col"].to_numpy()
    grid = np.full((row.max() + 1, col.max() + 1), np.nan)
    grid[row, col] = values
    x, y = table.obsm["spatial"][:, 0], table.obsm["spatial"][:, 1]
    x0, y0 = x[0] - col[0] * bin_px, y[0] - row[0] * bin_px  # centres of column and row 0
    ratio = []
    for axis, first in ((1, x0), (0, y0)):
        step = np.abs(np.diff(grid, axis=axis))
        centre = first + np.arange(grid.shape[axis]) * bin_px
        block = np.floor(centre / edge_px)
        across = np.diff(block) != 0
        step = step if axis == 1 else step.T
        ratio.append(np.nanmean(step[:, across]) / np.nanmean(step[:, ~across]))
    return float(np.mean(ratio))


def draw(sdata, table, genes) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    image = np.moveaxis(np.asarray(sdata.images["he"].data), 0, -1)
    row, col = table.obs["array_row"].to_numpy(), table.obs["array_col"].to_numpy()
    xy = table.obsm["spatial"]
    half = 4.0 / float(table.uns["histosge"]["mpp"])
    extent = [xy[:, 0].min() - half, xy[:, 0].max() + half, xy[:, 1].max() + half, xy[:, 1].min() - half]
    measured = sdata.tables["table"]
    spots = measured.obsm["spatial"]
    for name, box in (("whole", None), ("detail", detail(table, genes))):
        fig, axes = plt.subplots(2, 1 + len(genes), figsize=(5.2 * (1 + len(genes)), 10.4), layout="constrained")
        for top, ax in zip((False, True), axes[:, 0], strict=True):
            ax.imshow(image[::4, ::4] if box is None else image, extent=[0, image.shape[1], image.shape[0], 0])
            ax.set_title("H&E")
            del top
        for j, (kind, gene) in enumerate(genes.items(), start=1):
            values = np.asarray(table[:, gene].X).ravel()
            grid = np.full((row.max() + 1, col.max() + 1), np.nan)
            grid[row, col] = values
            low, high = np.nanpercentile(values, [1, 99.5])
            shown = axes[0, j].imshow(grid, extent=extent, cmap="magma", vmin=low, vmax=high, interpolation="nearest")
            axes[0, j].set_title(f"{gene} ({kind}), predicted, 8 µm bins")
            fig.colorbar(shown, ax=axes[0, j], shrink=0.6)
            counts = np.asarray(measured[:, gene].X.todense()).ravel() / np.asarray(measured.X.sum(1)).ravel()
            size = 6 if box is None else 330
            axes[1, j].scatter(*spots.T, c=np.log1p(1e4 * counts), s=size, cmap="magma", linewidths=0)
            axes[1, j].set_title(f"{gene}, measured spots")
        for ax in axes.ravel():
            ax.set_xlim((0, image.shape[1]) if box is None else box[:2])
            ax.set_ylim((image.shape[0], 0) if box is None else (box[3], box[2]))
            ax.set_aspect("equal")
            ax.set_xticks([])
            ax.set_yticks([])
        OUT.mkdir(exist_ok=True)
        fig.savefig(OUT / f"colon_8um_{name}.png", dpi=75)
        plt.close(fig)
        print(OUT / f"colon_8um_{name}.png")


def detail(table, genes):
    """1.2 mm where the lymphoid gene is highest."""
    from scipy.spatial import cKDTree

    values = np.asarray(table[:, genes["lymphoid"]].X).ravel()
    xy, half = table.obsm["spatial"], 600 / float(table.uns["histosge"]["mpp"])
    some = np.arange(0, len(xy), 50)
    mean = [values[near].mean() for near in cKDTree(xy).query_ball_point(xy[some], 60)]
    x, y = xy[some[int(np.argmax(mean))]]
    return x - half, x + half, y - half, y + half


def tiles_of_a_vit(sdata) -> None:
    """Seams of dense embeddings by a ViT-S with random weights, at the borders of its overlapping tiles."""
    from histosge._embedding import embed, step_tokens
    from histosge._geometry import Footprints
    from histosge._section import read_section

    section = read_section(sdata, report=False)
    encoder = vit_small()
    bin_px = 8 / section.mpp
    side = 100
    corner = np.array([3500.0, 3500.0])
    col, row = (a.ravel() for a in np.meshgrid(np.arange(side), np.arange(side)))
    xy = corner + (np.column_stack([col, row]) + 0.5) * bin_px
    import torch

    areas = Footprints.squares(xy, edge_px=bin_px)
    values = embed(
        section.image,
        xy,
        mpp=section.mpp,
        encoder=encoder,
        footprints=areas,
        device=torch.device("cpu"),
        progress=False,
    )
    n_tokens = 384
    scale = encoder.spec.mpp / section.mpp
    spec = encoder.spec
    for name, step_px in (
        ("starts of our overlapping tiles", step_tokens(spec.tile_px // spec.token_px) * spec.token_px * scale),
        ("the same lines, moved by half a step (nothing is there)", None),
    ):
        step = step_tokens(spec.tile_px // spec.token_px) * spec.token_px * scale
        shift = 0 if step_px else step / 2
        ratios = []
        for axis, centre in ((1, xy[:side, 0]), (0, xy[::side, 1])):
            grid = values[:, :n_tokens].reshape(side, side, n_tokens)
            jumps = np.abs(np.diff(grid, axis=axis)).mean((1 - axis, 2))
            across = np.diff(np.floor((centre + shift) / step)) != 0
            ratios.append(jumps[across].mean() / jumps[~across].mean())
        print(f"ViT-S, random weights, {name}: {np.mean(ratios):.3f}")


def vit_small():
    """A random-weight ViT-S/16 as an encoder."""
    import timm
    import torch

    import histosge as sge

    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=0)
    return sge.load_encoder(model, spec=sge.EncoderSpec(name="vit-s", mpp=0.5, tile_px=224, embed_dim=384))


# ---------------------------------------------------------------------------------------------------------------- scale


_RUN = """
import sys, resource, time
import spatialdata
import histosge as sge
source, target, n_genes = sys.argv[1], sys.argv[2], int(sys.argv[3])
sge.settings.progress = False
sdata = spatialdata.read_zarr(source)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
start = time.time()
sge.tl.predict(sdata, encoder="stain-texture", bin_um=8, genes=n_genes, store=target)
print(f"RESULT {time.time() - start:.0f} s, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB (before predict {before:.2f})")
"""


def scale(options) -> None:
    """Whole areas to a store, in a process of their own: time and peak memory; twice the area; killed and run again."""
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        for times in (1, 2) if options.twice else (1,):
            source = folder / f"section{times}.zarr"
            side = options.side_mm * 10
            make = (
                "import histosge as sge; sge.datasets.synthetic("
                f"n_rows={round(side * 1.1547)}, n_cols={round(side * times)}, n_genes={options.genes}).write({str(source)!r})"
            )
            subprocess.run([sys.executable, "-c", make], check=True)
            whole = folder / f"whole{times}.zarr"
            print(
                f"area {options.side_mm} x {options.side_mm * times} mm:", run(source, whole, options.genes), flush=True
            )
            if options.kill and times == 1:
                killed(source, folder, whole, options.genes)
    finally:
        shutil.rmtree(folder)


def run(source: Path, target: Path, n_genes: int) -> str:
    command = [sys.executable, "-c", _RUN, str(source), str(target), str(n_genes)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    print(done.stderr, flush=True)
    return next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))


def killed(source: Path, folder: Path, whole: Path, n_genes: int) -> None:
    """SIGKILL once half of the parts are there, run again, compare with the uninterrupted run."""
    import zarr

    target = folder / "killed.zarr"
    parts = folder / "killed.zarr.partial" / "parts"
    n_rows = zarr.open_group(whole / "tables" / "histosge", mode="r")["X"].shape[0]
    half = -(-n_rows // 32768) // 2
    start = time()
    process = subprocess.Popen(
        [sys.executable, "-c", _RUN, str(source), str(target), str(n_genes)], stderr=subprocess.DEVNULL
    )
    while len(list(parts.glob("*.done"))) < half:
        sleep(0.2)
        if process.poll() is not None:
            sys.exit("the run ended before it was killed")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    print(f"killed after {time() - start:.0f} s with {len(list(parts.glob('*.done')))} parts done")
    stamps = {p.name: p.stat().st_mtime_ns for p in parts.glob("*.done")}
    print("again:", run(source, target, n_genes), f"({len(stamps)} parts not repeated)")
    a, b = (zarr.open_group(s / "tables" / "histosge", mode="r") for s in (whole, target))
    same = True
    for key in ("X", "layers/sd", "layers/lower", "layers/upper", "obsm/spatial", "obs/instance_id"):
        for start_row in range(0, n_rows, 65536):
            rows = slice(start_row, start_row + 65536)
            same &= bool(np.array_equal(a[key][rows], b[key][rows]))
    print("identical to the uninterrupted run:", same)


# ---------------------------------------------------------------------------------------------------------------- speed


def speed(options) -> None:
    """Dense tokens against one tile for every bin: a random-weight ViT-S on the CPU, bins of 8 µm."""
    import torch

    from histosge._embedding import embed
    from histosge._geometry import Footprints
    from histosge._image import LazyImage

    encoder = vit_small()
    image = LazyImage(np.random.default_rng(0).integers(0, 255, (3, 5000, 5000), np.uint8))
    how = {"mpp": 0.5, "encoder": encoder, "device": torch.device("cpu"), "progress": False}
    ratios = []
    for _ in range(options.repeats):
        edge = np.arange(250) * 16.0 + 500  # 2 x 2 mm of bins
        xy = np.stack(np.meshgrid(edge, edge), -1).reshape(-1, 2)
        areas = Footprints.squares(xy, edge_px=16.0)
        start = time()
        embed(image, xy, footprints=areas, **how)
        dense = len(xy) / (time() - start)
        start = time()
        embed(image, xy[:200], **how)
        tiles = 200 / (time() - start)
        ratios.append(dense / tiles)
        print(f"dense {dense:.0f} bins/s, one tile a bin {tiles:.1f} bins/s: {ratios[-1]:.0f} times", flush=True)
    print(f"median {np.median(ratios):.0f} times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["synthetic", "colon", "scale", "speed"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--side-mm", type=float, default=6.5)
    parser.add_argument("--genes", type=int, default=1000)
    parser.add_argument("--twice", action="store_true", help="scale: twice the area as well")
    parser.add_argument("--kill", action="store_true", help="scale: kill a run in the middle, run it again and compare")
    parser.add_argument("--folder", default=None, help="scale: where to write (tens of GB)")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    {"synthetic": synthetic, "colon": colon, "scale": scale, "speed": speed}[options.what](options)


if __name__ == "__main__":
    main()
