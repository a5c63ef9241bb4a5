"""The first call of somebody who has just installed histosge: `sge.tl.predict(sdata)` and nothing else.

    python benchmarks/first_call.py                               # 30 spots, to the end
    python benchmarks/first_call.py --rows 54 --cols 48 --stop  # 1,824 spots, until the forecast

The default encoder, midnight, is loaded by its real code from a cache of the Hugging Face hub whose weights are random:
same architecture, size and layout, no download. The call runs in a fresh process; its log and its table are printed.
`--depth 1` tries the script out.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

# kaiko-ai/midnight: 40 blocks of 1536, SwiGLU, patches of 14 px (config.json: that of facebook/dinov2-giant)
SHAPE = {"hidden_size": 1536, "num_attention_heads": 24, "mlp_ratio": 4, "use_swiglu_ffn": True, "image_size": 224}
COMMIT = "0" * 40


def write_weights(hub: Path, *, depth: int) -> int:
    """Write random weights as the hub's client lays them out, and give the number of parameters."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    repo = hub / "models--kaiko-ai--midnight"
    snapshot = repo / "snapshots" / COMMIT
    for folder in (repo / "blobs", repo / "refs", snapshot):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**SHAPE, num_hidden_layers=depth))
    model.save_pretrained(snapshot, max_shard_size="10GB")
    for i, path in enumerate(sorted(snapshot.iterdir())):
        blob = repo / "blobs" / f"{i:064x}"
        path.rename(blob)
        path.symlink_to(Path("../../blobs") / blob.name)
    return sum(p.numel() for p in model.parameters())


def call(rows: int, cols: int) -> None:
    """What the user does."""
    import histosge as sge

    sdata = sge.datasets.synthetic(n_rows=rows, n_cols=cols, mpp=0.5)
    start = perf_counter()
    sge.tl.predict(sdata)
    print(f"{perf_counter() - start:.0f} s", flush=True)
    table = sdata.tables["histosge"]
    print(table)
    print(table.to_df().iloc[:5, :5].round(3))
    print({k: table.uns["histosge"][k] for k in ("encoder", "mpp", "stack", "dense") if k in table.uns["histosge"]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=6, help="rows of spots of the synthetic section")
    parser.add_argument("--cols", type=int, default=5, help="and columns")
    parser.add_argument("--depth", type=int, default=40, help="blocks of the network")
    parser.add_argument("--stop", action="store_true", help="stop at the forecast")
    parser.add_argument("--call", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.call:
        call(options.rows, options.cols)
        return
    with tempfile.TemporaryDirectory() as folder:
        n = write_weights(Path(folder) / "hub", depth=options.depth)
        print(f"random weights of {n / 1e9:.2f} billion parameters are in the hub's cache", flush=True)
        env = os.environ | {"HF_HOME": folder, "HISTOSGE_CACHE": f"{folder}/embeddings"}
        command = [sys.executable, __file__, "--call", "--rows", str(options.rows), "--cols", str(options.cols)]
        start = perf_counter()
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            for line in process.stdout or ():
                print(f"{perf_counter() - start:6.1f} s  {line}", end="", flush=True)
                if options.stop and re.search(r" locations with \S+ on .*: ", line):
                    process.terminate()


if __name__ == "__main__":
    main()
