"""How much of `tl.embed` is the encoder? A random-weight ViT of UNI's shape (ViT-L/16, 224 px).

    python benchmarks/embed_vit.py [--tiles 48] [--batch 8] [--model vit_large_patch16_224]

Time in the forward pass over time of the whole call, on the device at hand; and tiles per second.
"""

from __future__ import annotations

import argparse
from time import perf_counter

import numpy as np
import torch


class Timed(torch.nn.Module):
    """Count the time inside the wrapped module."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.seconds, self.tiles = inner, 0.0, 0

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        _wait(tiles.device)
        start = perf_counter()
        out = self.inner(tiles)
        _wait(tiles.device)
        self.seconds += perf_counter() - start
        self.tiles += len(tiles)
        return out


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    import timm

    import histosge as sge

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8, help="rows and columns of the synthetic section")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="vit_large_patch16_224")
    options = parser.parse_args()
    torch.manual_seed(0)
    module = Timed(timm.create_model(options.model, pretrained=False, num_classes=0).eval())
    spec = sge.EncoderSpec(name="random", mpp=0.5, tile_px=224, embed_dim=module.inner.num_features)
    sdata = sge.datasets.synthetic(n_rows=options.rows, n_cols=options.rows, mpp=0.5)
    encoder = sge.load_encoder(module, spec=spec)
    shares = []
    for _ in range(options.repeats):
        module.seconds, module.tiles = 0.0, 0
        start = perf_counter()
        sge.tl.embed(sdata, encoder=encoder, batch_size=options.batch, inplace=False)
        whole = perf_counter() - start
        shares.append(module.seconds / whole)
        print(f"{module.tiles} tiles, {whole:.2f} s, {module.tiles / whole:.2f} tiles/s, forward {shares[-1]:.1%}")
    print(f"{options.model}: median share of the forward pass {np.median(shares):.1%}")


if __name__ == "__main__":
    main()
