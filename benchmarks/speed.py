"""Fit and predict (4x) of the default head after embedding, on mouse_colon_visium: seconds and peak memory.

python benchmarks/speed.py [--repeats 3] [--head in-context+kriging]
"""

from __future__ import annotations

import argparse
import resource
from time import perf_counter

import numpy as np
from sections import load, require_data


def main() -> None:
    require_data()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", default="mouse_colon_visium")
    parser.add_argument("--head", default="in-context+kriging")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    import histosge as sge

    sdata = load(options.section)
    sge.pp.targets(sdata)
    sge.tl.embed(sdata, encoder="stain-texture", target_key="histosge_targets")
    sge.tl.embed(sdata, encoder="stain-texture")
    seconds = []
    for _ in range(options.repeats):
        start = perf_counter()
        sge.tl.predict(sdata, encoder="stain-texture", head=options.head)
        seconds.append(perf_counter() - start)
    table = sdata["histosge"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{options.section}, {options.head}: {table.n_obs} targets x {table.n_vars} genes after embedding, ", end="")
    print(f"median {np.median(seconds):.1f} s of {sorted(round(s, 1) for s in seconds)}, peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    main()
