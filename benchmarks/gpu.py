"""How much of a GPU's arithmetic our embedding reaches, reading included, against the usual way. Random weights.

    python benchmarks/gpu.py                              # ViT-L/16 (UNI's shape) and ViT-g/14 (H-optimus-0's)
    python benchmarks/gpu.py --compile                    # torch.compile as well
    python benchmarks/gpu.py --device cpu --quick         # a tiny network: does it run?
    make gpu                                              # all of it, and tests/test_gpu.py, into gpu.json

Runs from a checkout: nothing has to be installed. The encoders need numpy, scipy, shapely, pillow, zarr, torch,
torchvision, timm and our source; fit, predict and the tests (`--all`) also spatialdata, anndata, scanpy and pytest.
Wheels of what a machine without network lacks go into a folder: see README.md.

The usual way is what the reference and most pipelines do: the slide in memory, a crop of Pillow for each place, torchvision's
transforms on the processor, float32, nothing at the same time. It is measured on fewer tiles.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

CHUNK_PX, MPP, PITCH_PX = 256, 0.5, 200


@dataclass(frozen=True)
class Shape:
    """A network of timm."""

    name: str
    like: str
    options: dict[str, Any]
    batch_size: int

    def build(self) -> torch.nn.Module:
        import timm

        return timm.create_model(self.name, pretrained=False, num_classes=0, **self.options).eval()


# H-optimus-0: 40 blocks of 1536, SwiGLU, 14-px patches, four registers
_OPTIMUS = {"img_size": 224, "init_values": 1e-5, "dynamic_img_size": False, "reg_tokens": 4}
SHAPES = {
    "vit-l": Shape("vit_large_patch16_224", "UNI", {"init_values": 1e-5, "dynamic_img_size": True}, 256),
    "vit-g": Shape("vit_giant_patch14_reg4_dinov2", "H-optimus-0", _OPTIMUS, 128),
    "tiny": Shape("test_vit", "nothing", {}, 16),
}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(device: torch.device, *, edge: int, repeats: int) -> float:
    """Measured operations per second of a bfloat16 product of two square matrices; the best edge is the device's rate."""
    a, b = (torch.randn(edge, edge, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = 20 if device.type == "cuda" else 1
    seconds = []
    for _ in range(repeats + 1):
        wait(device)
        start = perf_counter()
        for _ in range(times):
            a @ b
        wait(device)
        seconds.append((perf_counter() - start) / times)
    return 2 * edge**3 / float(np.median(seconds[1:]))


def operations(shape: Shape, *, tile_px: int) -> float:
    """Operations (two for a multiplication and its addition) for one tile, counted on a batch of one without data."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        module = shape.build()
        tile = torch.empty(1, 3, tile_px, tile_px)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention is not counted on every device
        module(tile)
    return float(counter.get_total_flops())


def slide(folder: Path, *, edge_px: int) -> tuple[Any, NDArray[np.uint8]]:
    """A zarr array on disk (3, edge, edge) uint8 of stained-tissue colours, in 256-px chunks, and the same in memory."""
    import zarr

    rng = np.random.default_rng(0)
    small = rng.normal(size=(3, edge_px // 16 + 2, edge_px // 16 + 2))
    coarse = np.kron(small, np.ones((1, 16, 16)))[:, :edge_px, :edge_px]
    pixels = np.empty((3, edge_px, edge_px), np.uint8)
    for top in range(0, edge_px, 1024):
        part = coarse[:, top : top + 1024]
        noise = rng.integers(-12, 12, part.shape, dtype=np.int8)
        pixels[:, top : top + 1024] = np.clip(np.array([200, 150, 190])[:, None, None] + 25 * part + noise, 0, 255)
    shape, chunks = pixels.shape, (3, CHUNK_PX, CHUNK_PX)
    array = zarr.create_array(folder / "slide.zarr", shape=shape, chunks=chunks, dtype="uint8")
    array[:] = pixels
    return array, pixels


def places(n: int, *, pitch_px: int, margin_px: int) -> tuple[NDArray[np.float64], int]:
    """(n, 2) places of a square array, and the edge of the image that holds them."""
    side = int(np.ceil(np.sqrt(n)))
    row, col = np.divmod(np.arange(n), side)
    edge_px = 2 * margin_px + (side - 1) * pitch_px + 1
    return np.column_stack([col, row]) * pitch_px + float(margin_px), -(-edge_px // CHUNK_PX) * CHUNK_PX


def by_us(array: Any, xy_px: NDArray[np.float64], encoder: Any, *, device: torch.device, batch_size: int) -> Any:
    """Embed with the package's own pipeline, at the image's scale."""
    from histosge._embedding import embed
    from histosge._image import LazyImage

    options: dict[str, Any] = {"device": device, "batch_size": batch_size, "progress": False}
    return embed(LazyImage(array), xy_px, mpp=MPP, encoder=encoder, **options)


def usual_way(
    pixels: NDArray[np.uint8],
    xy_px: NDArray[np.float64],
    module: Any,
    *,
    tile_px: int,
    device: torch.device,
    batch_size: int,
) -> NDArray[np.float32]:
    """Crop, transform and embed, one after the other, in float32."""
    from PIL import Image
    from torchvision import transforms

    Image.MAX_IMAGE_PIXELS = None
    whole = Image.fromarray(np.ascontiguousarray(np.moveaxis(pixels, 0, -1)))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    steps = [transforms.Resize(tile_px), transforms.ToTensor(), transforms.Normalize(mean, std)]
    chain, half, found = transforms.Compose(steps), tile_px // 2, []
    with torch.inference_mode():
        for start in range(0, len(xy_px), batch_size):
            corners = (xy_px[start : start + batch_size].astype(int) - half).tolist()
            tiles = [chain(whole.crop((x, y, x + tile_px, y + tile_px))) for x, y in corners]
            found.append(module(torch.stack(tiles).to(device)).cpu().numpy())
    return np.concatenate(found)


def busy_s(intervals: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Time covered by intervals (begin, end), and from the first to the last, in their unit."""
    covered, first, until = 0.0, None, -np.inf
    for begin, end in sorted(intervals):
        first = begin if first is None else first
        covered += max(0.0, end - max(begin, until))
        until = max(until, end)
    return covered, 0.0 if first is None else until - first


def idle_share(run: Callable[[], Any], device: torch.device) -> float | None:
    """Share of the time, from its first kernel to its last, in which the GPU did nothing; ``None`` without a GPU.

    The profiler slows the launching side down a little: an upper bound.
    """
    if device.type != "cuda":
        return None
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        wait(device)
    kernels = [e.time_range for e in profiler.events() if e.device_type == DeviceType.CUDA]
    covered, whole = busy_s((k.start, k.end) for k in kernels)
    return 1 - covered / whole if whole else None


def clock(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    wait(device)
    start = perf_counter()
    out = run()
    wait(device)
    return perf_counter() - start, out


def measure(
    key: str, *, device: torch.device, options: argparse.Namespace, rate: float, folder: Path
) -> dict[str, float]:
    """Measure one network and print what came out."""
    import histosge as sge

    shape = SHAPES[key]
    torch.manual_seed(0)
    module = shape.build()
    tile_px = int(module.patch_embed.img_size[0])
    flops = operations(shape, tile_px=tile_px)
    n, batch_size = options.tiles, options.batch or shape.batch_size
    xy, edge_px = places(n, pitch_px=max(1, PITCH_PX * tile_px // 224), margin_px=tile_px)
    array, pixels = slide(folder / key, edge_px=edge_px)
    spec = sge.EncoderSpec(name=key, mpp=MPP, tile_px=tile_px, embed_dim=module.num_features)
    print(
        f"\n{key}: {shape.name}, {shape.like}'s shape, {sum(p.numel() for p in module.parameters()) / 1e6:.0f} M parameters,",
        end=" ",
    )
    print(f"{flops / 1e9:.1f} GFLOP a tile, {n} tiles of {tile_px} px from {edge_px} px zarr, batches of {batch_size}")

    module = module.to(device)
    few = xy[: max(1, min(n, options.slow))]
    how: dict[str, Any] = {"tile_px": tile_px, "device": device, "batch_size": min(batch_size, 64)}

    def slow() -> Any:
        return usual_way(pixels, few, module, **how)

    slow()  # not counted, as ours is not the first time either
    found: dict[str, float] = {}
    ways = {"ours": module} | ({"ours, compiled": torch.compile(module)} if options.compile else {})
    encoders = {name: sge.load_encoder(one, spec=spec) for name, one in ways.items()}
    runs = {name: _ours(array, xy, encoder, device, batch_size) for name, encoder in encoders.items()}
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in (*runs, "the usual way")}
    kept: dict[str, Any] = {}
    for _ in range(options.repeats):
        for name, run in (runs | {"the usual way": slow}).items():
            spent, kept[name] = clock(run, device)
            seconds[name].append(spent)
    usual = len(few) / float(np.median(seconds["the usual way"]))
    print(
        "\n| way | tiles/s | of the matrix rate | of the usual way | GPU idle | difference from float32 |\n|---|---|---|---|---|---|"
    )
    spread = float(kept["the usual way"].std())
    for name, spent in seconds.items():
        n_tiles = len(few) if name == "the usual way" else n
        speed = n_tiles / float(np.median(spent))
        idle = idle_share(slow if name == "the usual way" else runs[name], device)
        gap = float(np.abs(kept[name][: len(few)] - kept["the usual way"]).max()) / spread
        print(
            f"| {name} | {speed:,.1f} | {speed * flops / rate:.1%} | {speed / usual:.2f} x "
            f"| {'not measured' if idle is None else f'{idle:.1%}'} | {gap:.1e} of the spread |",
            flush=True,
        )
        found |= {f"{name}: tiles/s": speed, f"{name}: share": speed * flops / rate, f"{name}: gap": gap}
    return found


def _ours(
    array: Any, xy_px: NDArray[np.float64], encoder: Any, device: torch.device, batch_size: int
) -> Callable[[], Any]:
    return lambda: by_us(array, xy_px, encoder, device=device, batch_size=batch_size)


def fit_and_predict(device: torch.device, *, quick: bool) -> dict[str, float]:
    """Seconds of a fit with the default heads, and of predicting at many places, on the device and on the processor."""
    import histosge as sge

    n, n_genes, bin_um = (10, 20, 50.0) if quick else (64, 500, 8.0)
    section = sge.datasets.synthetic(n_rows=n, n_cols=n, n_genes=n_genes, mpp=2.0)
    found: dict[str, float] = {}
    print(
        f"\n{n * n} spots x {n_genes} genes, bins of {bin_um:g} µm, stain-texture\n\n| head | device | fit, s | predict, s | bins |"
    )
    print("|---|---|---|---|---|")
    for head, dense in (("in-context+kriging", False), ("aggregate+kriging", True)):
        how: dict[str, Any] = {"encoder": "stain-texture", "progress": False}
        sge.tl.fit(section, head=head, dense=dense, genes=n_genes, rng=0, **how)  # embeds, so that only heads are timed
        for where in dict.fromkeys([device.type, "cpu"]):
            each = how | {"device": where}
            fit_s, model = clock(
                lambda h=head, d=dense, e=each: sge.tl.fit(section, head=h, dense=d, genes=n_genes, rng=0, **e), device
            )
            predict_s, table = clock(
                lambda m=model, e=each: sge.tl.predict(section, model=m, bin_um=bin_um, inplace=False, **e), device
            )
            print(f"| {head} | {where} | {fit_s:.1f} | {predict_s:.1f} | {table.n_obs:,} |", flush=True)
            found |= {f"{head}, {where}: fit, s": fit_s, f"{head}, {where}: predict, s": predict_s}
    return found


def run_tests() -> list[dict[str, Any]]:
    """Run the tests marked ``gpu`` in a process of their own: outcome, seconds and recorded figures of each."""
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "tests/test_gpu.py",
            "-m",
            "gpu",
            "-q",
            "--tb=short",
            "-p",
            "no:cacheprovider",
        ]
        subprocess.run([*command, f"--junitxml={report}", "-o", "junit_family=xunit1"], cwd=root, check=False)
        if not report.exists():
            return [{"test": "tests/test_gpu.py", "outcome": "did not run"}]
        cases = ET.parse(report).iter("testcase")  # our own file
        return [_case(case) for case in cases]


def _case(case: ET.Element) -> dict[str, Any]:
    outcome = next((kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), "passed")
    figures = {p.get("name", ""): float(p.get("value", "nan")) for p in case.iter("property")}
    return {"test": case.get("name"), "outcome": outcome, "s": float(case.get("time", 0)), "figures": figures}


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=["vit-l", "vit-g"])
    parser.add_argument("--tiles", type=int, default=8192)
    parser.add_argument("--slow", type=int, default=512, help="tiles for the usual way")
    parser.add_argument("--batch", type=int, help="tiles of a forward pass; by default what suits an 80 GB card")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="measure torch.compile as well")
    parser.add_argument("--quick", action="store_true", help="a tiny network and few tiles: does it run?")
    parser.add_argument("--all", action="store_true", help="fit, predict and tests/test_gpu.py as well")
    parser.add_argument("--json", type=Path, help="write everything that was found to this file")
    options = parser.parse_args(arguments)
    edges = [4096, 8192, 16_384]
    if options.quick:
        options.models, options.tiles, options.slow, options.repeats, edges = ["tiny"], 24, 8, 1, [256]
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; pass --device cpu --quick to try the script out.")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    rates = {edge: matrix_rate(device, edge=edge, repeats=options.repeats) for edge in edges}
    rate = max(rates.values())
    print(f"{device.type}, {where}, torch {torch.__version__}; bfloat16 products of square matrices:", end=" ")
    print(", ".join(f"{edge}: {one / 1e12:.3g} TFLOP/s" for edge, one in rates.items()))
    about = {"device": where, "torch": torch.__version__, "python": sys.version.split()[0], "TFLOP/s": rate / 1e12}
    everything: dict[str, Any] = {"machine": about}

    def keep(**found: Any) -> None:  # after each step, so that a run that is cut off leaves what it found
        everything.update(found)
        if options.json is not None:
            options.json.write_text(json.dumps(everything, indent=1))

    if options.all:
        keep(tests=run_tests())
    with tempfile.TemporaryDirectory() as folder:
        found = {
            key: measure(key, device=device, options=options, rate=rate, folder=Path(folder)) for key in options.models
        }
    keep(encoders=found)
    if options.all:
        keep(fit_and_predict=fit_and_predict(device, quick=options.quick))
    failed = [t["test"] for t in everything.get("tests", ()) if t["outcome"] not in ("passed", "skipped")]
    if failed:
        parser.exit(1, f"failed: {', '.join(failed)}\n")
    return found


if __name__ == "__main__":
    main()
