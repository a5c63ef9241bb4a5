"""What a change costs: seconds to import, fit, predict, save and load, of this checkout and of another, in turn.

    git worktree add ../other COMMIT
    python benchmarks/cost.py ../other --repeats 3

Printed are medians over processes; a process gives the least of several calls.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

STEPS = """
import json, sys, tempfile, time
start = time.perf_counter()
import histosge as sge
seconds = {"import": time.perf_counter() - start}
sge.settings.verbosity, sge.settings.progress, sge.settings.cache_gb = 0, False, 0
section, folder = sge.datasets.synthetic(n_rows=40, n_cols=40, n_genes=300, mpp=2.0), tempfile.mkdtemp()

def least(what, work, repeats):
    for _ in range(repeats):
        start = time.perf_counter()
        found = work()
        seconds[what] = min(seconds.get(what, 1e9), time.perf_counter() - start)
    return found

model = least("fit", lambda: sge.tl.fit(section, encoder="stain-texture", genes=300, rng=0), 2)
how = {"model": model, "encoder": "stain-texture", "bin_um": 16, "inplace": False}
least("predict", lambda: sge.tl.predict(section, **how), 3)
least("save", lambda: model.save(folder, overwrite=True), 5)
least("load", lambda: sge.Model.load(folder), 5)
print(json.dumps(seconds))
"""


def main() -> None:
    """Print the median of each step, and its ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="another checkout of histosge")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    roots = {"other": given.other.resolve(), "this": Path(__file__).resolve().parents[1]}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in roots}
    for _ in range(given.repeats):
        for name, root in roots.items():
            code = f"import sys; sys.path.insert(0, {str(root / 'src')!r})\n{STEPS}"
            command = [sys.executable, "-W", "ignore", "-c", code]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    print("| step | other, s | this, s | ratio |\n|---|---|---|---|")
    for step in found["this"][0]:
        other, this = (statistics.median(each[step] for each in found[name]) for name in roots)
        print(f"| {step} | {other:.3f} | {this:.3f} | {this / other:.2f} |")


if __name__ == "__main__":
    main()
