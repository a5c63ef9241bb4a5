"""Us and the alternatives side by side: one process, interleaved, medians, ratios.

    python benchmarks/side_by_side.py reader            # tiles out of zarr
    python benchmarks/side_by_side.py tiff              # tiles out of a JPEG-compressed TIFF
    python benchmarks/side_by_side.py embed             # tl.embed against a bare loop and LazySlide
    python benchmarks/side_by_side.py heads             # the published network against the default head
    python benchmarks/side_by_side.py memory            # peak memory of tl.embed as the image grows

Other packages are measured where they are installed (`pip install lazyslide`, `pip install squidpy`) and said to be
left out where not. Files go to --work, some gigabytes, and are found again; those of `memory` are removed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))  # also when it is imported

import numpy as np
import slides
from readers import TILE_PX, in_rows, installed, one_by_one, reader, tiff
from timing import Contender, interleave, table

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


# -------------------------------------------------------------------------------------------------------------- embed


class Counted:
    """Wrap a module: count its tiles, see in which type it computes."""

    def __init__(self, module: Any) -> None:
        import torch

        class Inner(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.module, self.n, self.dtype = module, 0, torch.float32

            def forward(self, tiles: Any) -> Any:
                self.n += len(tiles)
                kind = tiles.device.type
                on = torch.is_autocast_enabled(kind)
                self.dtype = torch.get_autocast_dtype(kind) if on else next(module.parameters()).dtype
                return module(tiles)

        self.module = Inner().eval()

    def taken(self) -> int:
        """Tiles since the last time."""
        n, self.module.n = self.module.n, 0
        return n


def embed(options: argparse.Namespace) -> None:
    """`tl.embed` of random-weight encoders against a bare loop of forward passes, and against LazySlide."""
    from spatialdata import read_zarr

    import histosge as sge

    sge.settings.verbosity = 0
    slides.no_cache()
    if options.precision is not None:
        sge.settings.precision = options.precision
    lazyslide = installed("lazyslide", "wsidata")
    print("squidpy has no path from tiles to a network: its image features call a function of yours per crop")
    for name, n in zip(options.models, options.tiles, strict=True):
        sdata = read_zarr(slides.store(options.work, edge_px=slides.edge_for(n)))
        _embed_with(sdata, name, n, options=options, lazyslide=lazyslide)


def _embed_with(sdata: Any, name: str, n: int, *, options: argparse.Namespace, lazyslide: bool) -> None:
    import timm
    import torch

    import histosge as sge

    torch.manual_seed(0)
    counted = Counted(timm.create_model(name, pretrained=False, num_classes=0).eval())
    # the image's own scale: nothing is resampled, so that all contenders see the same pixels
    spec = sge.EncoderSpec(name="random", mpp=slides.MPP, tile_px=TILE_PX, embed_dim=counted.module.module.num_features)
    encoder = sge.load_encoder(counted.module, spec=spec)
    # a large network is measured on part of a small section, others on a whole one
    sdata.shapes["some"] = slides.first_spots(sdata, n if n < slides.FEWEST else None)
    n, batch = len(sdata["some"]), options.batch
    what: dict[str, Any] = {"target_key": "some" if n < len(sdata["spots"]) else None, "batch_size": batch}
    kept: dict[str, Any] = {}

    def by_us() -> int:
        made = sge.tl.embed(sdata, encoder=encoder, device="cpu", progress=False, inplace=False, **what)
        kept["ours"] = np.asarray(made.obsm["X_random"], np.float32)
        taken = counted.taken()
        if taken != n:
            msg = f"tl.embed sent {taken} of {n} tiles through the encoder: a cache answered, so nothing was measured."
            raise RuntimeError(msg)
        return n

    by_us()
    dtype = counted.module.dtype
    centres = np.column_stack([sdata["some"].geometry.x, sdata["some"].geometry.y])
    pixels = np.concatenate([in_rows(t) for t in one_by_one(sdata["he"].data, centres)])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (spec.mean, spec.std))
    ready = (torch.from_numpy(np.moveaxis(pixels, -1, 1).copy()).float() / 255 - mean) / std  # (n, 3, 224, 224)

    def bare() -> int:
        half = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
        with torch.inference_mode(), half:
            kept["bare"] = torch.cat([counted.module(part).float() for part in ready.split(batch)]).numpy()
        counted.taken()
        return n

    contenders = [Contender("tl.embed", by_us), Contender("bare loop of forward passes on ready tensors", bare)]
    if lazyslide:
        same: dict[str, Any] = {"spec": spec, "centres": centres, "dtype": dtype, "batch": batch, "kept": kept}
        contenders += [
            Contender(f"LazySlide, num_workers={k}", _lazyslide(sdata, counted, n_workers=k, **same))
            for k in options.workers
        ]
    with torch.inference_mode():
        plain = torch.cat([counted.module.module(part) for part in ready.split(batch)]).numpy()  # float32
    measured = interleave(contenders, repeats=options.repeats)
    title = f"{name}, {n} tiles, batches of {batch}, {dtype}, {torch.get_num_threads()} threads"
    table(title, measured, reference="tl.embed")
    spread = plain.std()
    for who, values in kept.items():
        gap = np.abs(values - plain).max()
        print(f"largest difference from the plain float32 path, {who}: {gap:.2e} ({gap / spread:.2e} of their spread)")


def _lazyslide(
    sdata: Any,
    counted: Counted,
    *,
    spec: Any,
    centres: NDArray[np.float64],
    dtype: Any,
    batch: int,
    n_workers: int,
    kept: dict[str, Any],
) -> Callable[[], int]:
    """LazySlide's extraction of the same tiles, with its own chain of transforms less the resizing that nobody needs."""
    import geopandas as gpd
    import lazyslide
    import shapely
    import torch
    from spatialdata import SpatialData
    from spatialdata.models import ShapesModel
    from torchvision.transforms.v2 import Compose, Normalize, ToDtype, ToImage
    from wsidata import open_wsi

    half = TILE_PX // 2
    squares = shapely.box(*(centres - half).T, *(centres + half).T)
    tiles = ShapesModel.parse(gpd.GeoDataFrame({"tile_id": np.arange(len(centres))}, geometry=squares))
    wsi = open_wsi(SpatialData(images={"he": sdata["he"]}, shapes={"tiles": tiles}), image_key="he")
    chain = Compose([ToImage(), ToDtype(torch.float32, scale=True), Normalize(spec.mean, spec.std)])

    def run() -> int:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="TileSpec not found")
            values = lazyslide.tl.feature_extraction(
                wsi,
                counted.module,
                model_name="random",
                transform=chain,
                device="cpu",
                amp=dtype == torch.bfloat16,
                autocast_dtype=torch.bfloat16,
                batch_size=batch,
                num_workers=n_workers,
                pbar=False,
                return_features=True,
            )
        counted.taken()
        kept["LazySlide"] = np.asarray(values, np.float32)
        return len(values)

    return run


# -------------------------------------------------------------------------------------------------------------- heads


def heads(options: argparse.Namespace) -> None:
    """Seconds of fit and predict, and held-out correlation, of the published network and of the default head."""
    import sections

    import histosge as sge

    sge.settings.verbosity = 1

    sections.require_data()
    slides.no_cache()
    half, held_out = sections.split(sections.load(options.section), rng=0)
    for key in (None, "held_out"):  # both embedded before: the encoder is not what is compared
        sge.tl.embed(half, target_key=key, encoder="stain-texture", progress=False)
    settings: dict[str, dict[str, Any]] = {
        "in-context+kriging": {},
        **{f"published, {n} steps": {"head": "published", "head_options": {"n_steps": n}} for n in options.steps},
    }
    print(
        f"\n{options.section}: half of the spots at random, {options.genes} genes, {options.folds} folds. The paper trains "
        "1000 epochs; ours stops early on held-out spots and takes at most the steps named.\n"
    )
    print(
        "| head | fit + predict s | held-out PCC | s per 0.01 of PCC | s as multiple of the default |\n|---|---|---|---|---|"
    )
    first = None
    for name, chosen in settings.items():
        start = perf_counter()
        made = sge.tl.predict(
            half,
            target_key="held_out",
            encoder="stain-texture",
            genes=options.genes,
            n_folds=options.folds,
            progress=False,
            inplace=False,
            **chosen,
        )
        seconds = perf_counter() - start
        first = seconds if first is None else first
        pcc = _held_out_pcc(made, held_out)
        print(
            f"| {name} | {seconds:.1f} | {pcc:.3f} | {seconds / (100 * pcc):.2f} | {seconds / first:.2f} |", flush=True
        )


def _held_out_pcc(made: Any, held_out: Any) -> float:
    """Mean over genes of the correlation with what was measured; a constant scores 0."""
    import scanpy as sc

    truth = held_out.copy()
    sc.pp.normalize_total(truth, target_sum=1e4)
    sc.pp.log1p(truth)
    by_id = {value: i for i, value in enumerate(truth.obs["instance_id"])}
    rows = [by_id[value] for value in made.obs["instance_id"]]
    measured = np.asarray(truth[rows, made.var_names].X.todense(), float)
    said = np.asarray(made.X, float)
    a, b = measured - measured.mean(0), said - said.mean(0)
    norm = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return float(np.where(norm > 0, (a * b).sum(0) / np.where(norm > 0, norm, 1), 0).mean())


# ------------------------------------------------------------------------------------------------------------- memory


def memory(options: argparse.Namespace) -> None:
    """Peak memory of `tl.embed`, one process per size of the image; places per area stay the same."""
    options.work.mkdir(parents=True, exist_ok=True)
    print("\n| image px | places | s | before MiB | peak MiB | peak, of the smallest |\n|---|---|---|---|---|---|")
    first = None
    for edge_px in options.edges:
        folder = Path(tempfile.mkdtemp(dir=options.work))
        try:
            path = folder / "section.zarr"
            for step in ("build", "measure"):  # the builder's memory is not ours
                command = [
                    sys.executable,
                    __file__,
                    "memory",
                    "--step",
                    step,
                    "--path",
                    str(path),
                    "--edges",
                    str(edge_px),
                ]
                where = os.environ | {"HISTOSGE_CACHE": str(folder / "cache"), "PYTHONWARNINGS": "ignore"}
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=where)
            found = json.loads(done.stdout.splitlines()[-1])
        finally:
            shutil.rmtree(folder)
        first = found["peak"] if first is None else first
        print(
            f"| {edge_px} | {found['n']} | {found['s']:.1f} | {found['before']:.0f} | {found['peak']:.0f} "
            f"| {found['peak'] / first:.3f} |",
            flush=True,
        )


def memory_step(options: argparse.Namespace) -> None:
    import resource

    if options.step == "build":
        slides.cheap_store(options.path, edge_px=options.edges[0])
        return
    import timm
    import torch
    from spatialdata import read_zarr

    import histosge as sge

    sge.settings.verbosity = 0
    torch.manual_seed(0)
    module = timm.create_model("test_vit", pretrained=False, num_classes=0)
    tile_px = module.patch_embed.img_size[0]
    spec = sge.EncoderSpec(name="tiny", mpp=slides.MPP, tile_px=tile_px, embed_dim=module.num_features)
    encoder = sge.load_encoder(module, spec=spec)
    sdata = read_zarr(options.path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    start = perf_counter()
    made = sge.tl.embed(sdata, encoder=encoder, device="cpu", progress=False, inplace=False)
    found = {"s": perf_counter() - start, "n": made.n_obs, "before": before}
    print(json.dumps(found | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--work", type=Path, default=slides.WORK, help="folder of what is built")
    common.add_argument("--repeats", type=int, default=5)
    common.add_argument("--edge", type=int, default=slides.EDGE_PX, help="edge of the image in pixels")
    common.add_argument("--slow", type=int, default=64, help="tiles for those that read them one by one")
    which = made.add_subparsers(dest="which", required=True)
    one = which.add_parser("reader", parents=[common], help=reader.__doc__)
    one.add_argument("--scale", type=float, default=0.72, help="pixels of the image per pixel of a resampled tile")
    which.add_parser("tiff", parents=[common], help=tiff.__doc__)
    one = which.add_parser("embed", parents=[common], help=embed.__doc__)
    one.add_argument("--models", nargs="+", default=["vit_small_patch16_224", "vit_large_patch16_224"])
    one.add_argument("--tiles", nargs="+", type=int, default=[96, 16], help="about how many tiles for each model")
    one.add_argument("--batch", type=int, default=8)
    one.add_argument("--precision", help="of the encoder, as settings.precision; all contenders compute in it")
    one.add_argument("--workers", nargs="*", type=int, default=[0], help="num_workers= of LazySlide; 0 is its default")
    one = which.add_parser("heads", parents=[common], help=heads.__doc__)
    one.add_argument("--section", default="mouse_colon_visium")
    one.add_argument("--genes", type=int, default=200)
    one.add_argument("--folds", type=int, default=3)
    one.add_argument("--steps", nargs="+", type=int, default=[100, 300])
    one = which.add_parser("memory", parents=[common], help=memory.__doc__)
    one.add_argument("--edges", nargs="+", type=int, default=[8192, 16_384, 32_768])
    one.add_argument("--step", choices=["build", "measure"], help=argparse.SUPPRESS)
    one.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    return made


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if options.which == "memory" and options.step is not None:
        memory_step(options)
        return
    {"reader": reader, "tiff": tiff, "embed": embed, "heads": heads, "memory": memory}[options.which](options)


if __name__ == "__main__":
    main()
