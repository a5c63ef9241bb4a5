"""What CUDA computes, against the processor. `make gpu` runs these tests where there is a GPU, with few packages.

Figures that a test records go into the JSON of `benchmarks/gpu.py`.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import histosge as sge
from histosge._heads import HEADS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
GPU = "cuda"

RUN = {"genes": 12, "rng": 0, "progress": False}
TRAINED = {"in-context", "aggregate", "published", "coordinates"}
"""Heads that are trained in steps: their noise is drawn on the device, so that CUDA trains another network."""
QUICK = {"published": {"n_steps": 30}}
BY_TILES = {"n_exact": 60, "n_inducing": 40, "n_tile": 40, "n_near": 80}


@pytest.fixture
def section():
    return sge.datasets.synthetic(n_rows=20, n_cols=20, n_genes=20, mpp=2.0)


@pytest.fixture
def figure(record_property):
    """``figure("gap", value)`` records a number."""
    return lambda name, value: record_property(name, float(value))


def vit(name="test_vit", **options):
    """A vision transformer of timm with random weights."""
    import timm

    torch.manual_seed(0)
    module = timm.create_model(name, pretrained=False, num_classes=0, **options)
    tile_px = module.patch_embed.img_size[0]
    spec = sge.EncoderSpec(name=name, mpp=2.0, tile_px=tile_px, embed_dim=module.num_features, coarsest_mpp=2.0)
    return sge.load_encoder(module, spec=spec)


def noise(tile_px, *, n):
    """(n, 3, tile, tile) uint8 of coarse patterns, so that embeddings differ."""
    random = np.random.default_rng(0)
    coarse = random.uniform(60, 250, (n, 3, tile_px // 16, tile_px // 16)).repeat(16, 2).repeat(16, 3)
    return torch.from_numpy(np.clip(coarse + random.normal(0, 20, coarse.shape), 0, 255).astype(np.uint8))


def table_of(section, *, device, **options):
    options = {"encoder": "stain-texture", "upsample": 2, "inplace": False, "progress": False} | options
    return sge.tl.predict(section, device=device, **options)


# ------------------------------------------------------------------------------------------------------- encoders


def test_stain_texture():
    """To a thousandth of what a feature varies by, as its docstring says."""
    encoder = sge.load_encoder("stain-texture")
    random = np.random.default_rng(0)
    block = noise(640, n=1)[0]
    centres = torch.from_numpy(random.uniform(encoder.halo_px, 640 - encoder.halo_px, (300, 2)))
    cpu = encoder.to("cpu").embed_block(block, centres)
    gpu = encoder.to(GPU).embed_block(block, centres).cpu()
    assert ((cpu - gpu).abs() / cpu.std(0).clamp_min(1e-6)).max() < 1e-3


@pytest.mark.parametrize("name", ["test_vit", "vit_small_patch16_224"])
def test_bfloat16_against_float32(name, figure):
    """CUDA computes in bfloat16; in float32 both devices agree.

    bfloat16 rounds to 2^-9 of a value. Each block adds its own rounding, and these add up like a random walk.
    """
    encoder = vit(name)
    some = noise(encoder.spec.tile_px, n=32)
    cpu, cpu_tokens = encoder.to("cpu").embed(some), encoder.embed_tokens(some)[0]
    half, tokens = encoder.to(GPU).embed(some.to(GPU)).cpu(), encoder.embed_tokens(some.to(GPU))[0].cpu()
    with sge.settings.override(precision="float32"):
        whole = encoder.embed(some.to(GPU)).cpu()
    assert half.dtype == tokens.dtype == torch.float32
    gaps = {"embedding": (half, cpu), "tokens": (tokens, cpu_tokens), "float32": (whole, cpu)}
    gap = {key: ((a - b).square().mean() / b.square().mean()).sqrt() for key, (a, b) in gaps.items()}
    for key, value in gap.items():
        figure(f"{key}: difference, root mean square, of the values", value)
    figure(
        "embedding: median difference of the spread between tiles", ((half - cpu).abs().mean(0) / cpu.std(0)).median()
    )
    rounding = 2**-9 * len(encoder.module.blocks) ** 0.5
    assert max(gap["embedding"], gap["tokens"]) < 4 * rounding
    assert gap["float32"] < 16 * rounding * 2**-15  # of 2^-24, and sums in another order


class Hungry(nn.Module):
    """Takes 64 MiB a tile, and returns means of it."""

    def forward(self, x):
        copies = x.mean((1, 2, 3), keepdim=True).expand(-1, 1, 4096, 4096).contiguous()  # (n, 1, 4096, 4096)
        return copies[:, 0, :8, 0].float()


@pytest.fixture
def little_memory():
    """2 GiB of the device for this process."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2 * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("little_memory")
def test_out_of_memory_halves_the_batch(section, log):
    """48 tiles take 3 GiB and do not fit; half of them do."""
    encoder = sge.load_encoder(
        Hungry(), spec=sge.EncoderSpec(name="hungry", mpp=2.0, tile_px=32, embed_dim=8, coarsest_mpp=2.0)
    )
    how = {"encoder": encoder, "device": GPU, "progress": False, "inplace": False}
    with sge.settings.override(precision="float32"):
        halved = sge.tl.embed(section, batch_size=48, **how)
        assert "out of memory with batch_size=48: continuing with 24" in log.text
        fits = sge.tl.embed(section, batch_size=8, **how)
        np.testing.assert_array_equal(halved.X, fits.X)
        with pytest.raises(RuntimeError, match=r"ran out of memory with 64 tiles of 32 px for encoder 'hungry'\. Pass"):
            sge.tl.embed(section, batch_size=128, **how)


# ------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("head", [*HEADS, "in-context+kriging"])
def test_fit_and_predict(section, head, tmp_path, figure):
    """A model that was fitted on CUDA predicts the same on the processor; its scores are those of the processor."""
    options = {"encoder": "stain-texture", "head": head, "head_options": QUICK.get(head)} | RUN
    here, there = (sge.tl.fit(section, device=device, **options) for device in ("cpu", GPU))
    there.save(tmp_path)
    loaded = sge.Model.load(tmp_path)
    gpu, cpu = (table_of(section, model=loaded, device=device).X for device in (GPU, "cpu"))
    gap = np.abs(gpu - cpu).max()
    scores = [model.held_out[head]["pcc"] for model in (here, there)]
    figure("largest gap of a prediction", gap)
    figure("held-out PCC, processor", scores[0])
    figure("held-out PCC, CUDA", scores[1])
    assert gap < 0.01
    # other noise in training: as far as another seed
    assert abs(scores[0] - scores[1]) < (0.05 if TRAINED & set(head.split("+")) else 0.002)


@pytest.mark.parametrize("head", ["in-context+kriging", "aggregate"])
def test_the_same_seed_again(section, head, figure):
    """CUDA may add in another order, which training magnifies: close, not equal."""
    first, second = (table_of(section, head=head, device=GPU, **RUN).X for _ in range(2))
    figure("largest gap", np.abs(first - second).max())
    assert np.abs(first - second).mean() < 0.05


def test_kriging_by_tiles(section, tmp_path, figure):
    """More spots than ``n_exact``: tiles are conditioned on CUDA as on the processor."""
    options = {"head": "kriging", "encoder": "stain-texture", "head_options": BY_TILES}
    model = sge.tl.fit(section, device=GPU, **options, **RUN)
    model.save(tmp_path)
    loaded = sge.Model.load(tmp_path)
    gpu, cpu = (table_of(section, model=loaded, device=device).X for device in (GPU, "cpu"))
    figure("largest gap of a prediction", np.abs(gpu - cpu).max())
    assert np.abs(gpu - cpu).max() < 0.01


def test_dense_tokens(section, figure):
    """Areas from tokens, with the head that learns from sub-spots: encoder in bfloat16, so only close."""
    options = {"encoder": vit(), "bin_um": 50, "upsample": None, "dense": True, "head": "aggregate+kriging"}
    gpu, cpu = (table_of(section, device=device, **options, **RUN) for device in (GPU, "cpu"))
    assert gpu.uns["histosge"]["dense"]
    figure("correlation of predictions", np.corrcoef(gpu.X.ravel(), cpu.X.ravel())[0, 1])
    assert np.corrcoef(gpu.X.ravel(), cpu.X.ravel())[0, 1] > 0.95


def test_parts_of_a_store(section, tmp_path, figure):
    """Part by part as all at once."""
    model = sge.tl.fit(section, encoder="stain-texture", device=GPU, **RUN)
    with sge.settings.override(part_rows=300):
        parts = table_of(section, model=model, device=GPU, store=tmp_path / "s.zarr")
    whole = table_of(section, model=model, device=GPU)
    gap = np.abs(parts[whole.obs_names].X.compute() - whole.X).max()
    figure("largest gap", gap)
    assert gap < 1e-3


def test_evaluation(section):
    found = sge.tl.evaluate(section, encoder="stain-texture", heads=["kriging", "ridge"], device=GPU, **RUN)
    here = sge.tl.evaluate(section, encoder="stain-texture", heads=["kriging", "ridge"], device="cpu", **RUN)
    np.testing.assert_allclose(found["pcc"], here["pcc"], atol=0.002)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_two_devices(section):
    """Everything is computed on the device that is named, whichever is the default."""
    model = sge.tl.fit(section, encoder="stain-texture", device="cuda:1", **RUN)
    one, other = (table_of(section, model=model, device=f"cuda:{i}").X for i in range(2))
    np.testing.assert_allclose(one, other, atol=1e-3)
