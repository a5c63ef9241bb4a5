"""Processes that die, sleep or meet while they write a store: it ends bit for bit as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

DRIVER = """
import atexit, hashlib, json, os, random, resource, signal, sys, time, warnings
from pathlib import Path
warnings.simplefilter("ignore")
os.environ["OMP_NUM_THREADS"] = "1"
import torch
torch.set_num_threads(1)
import histosge as sge
from histosge._section import _claim
sge.settings.part_rows = 400
sge.settings.verbosity = 0
root, n_kills = Path(sys.argv[1]), int(sys.argv[2])
sdata = sge.datasets.synthetic(n_rows=8, n_cols=8, n_genes=8, mpp=2.0)
outcomes, hook = [], [None]
sys.addaudithook(lambda event, args: hook[0](event, args) if hook[0] else None)
WRITES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.truncate")

def counting(then):
    seen = [0]
    def look(event, args):
        path = str(args[0]) if args else ""
        opened = event == "open" and (isinstance(args[1], str) and set(args[1]) & set("wax+"))
        if (opened or event in WRITES) and path.startswith(str(root)):
            seen[0] += 1
            then(seen[0], path)
    return look, seen

def predict(store):
    os.environ["HISTOSGE_CACHE"] = str(store.parent / "cache")
    sge.tl.predict(sdata, store=store, bin_um=16, encoder="stain-texture", head="ridge", n_folds=2, progress=False)

def fork(work, out):
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        text = "done"
    except BaseException as err:
        text = f"{type(err).__name__}: {err}"
    hook[0] = None
    out.write_text(text)
    os._exit(0)

def wait(pid):
    return os.waitpid(pid, 0)[1]

def digest(store):
    found = hashlib.sha256()
    for file in sorted(p for p in store.rglob("*") if p.is_file()):
        found.update(str(file.relative_to(store)).encode() + b"\\0" + file.read_bytes())
    return found.hexdigest()

def judge(name, store, said, refused=()):
    extra = sorted(p.name for p in store.parent.iterdir() if p.name not in ("out.zarr", "cache") and p.suffix != ".txt")
    if not store.is_dir() or digest(store) != wanted:
        return [name, "another result", said]
    if extra:
        return [name, f"left {extra}", said]
    bad = [text for text in said if text != "done" and not any(part in text for part in refused)]
    return [name, "raw error" if bad else "same result", said]

def case(name):
    (root / name).mkdir()
    return root / name / "out.zarr"

store = case("whole")
def whole():
    hook[0], seen = counting(lambda n, path: None)
    predict(store)
    (root / "n.txt").write_text(str(seen[0]))
wait(fork(whole, root / "whole.txt"))
assert (root / "whole.txt").read_text() == "done", (root / "whole.txt").read_text()
wanted, n = digest(store), int((root / "n.txt").read_text())
print(n, "operations", file=sys.stderr)
EXISTS = "exists already; choose another store="

rng = random.Random(3)
points = sorted(rng.sample(range(1, n + 1), n_kills - 3)) + [n - 4, n - 1, n]
for point in points:
    store = case(f"kill{point}")
    def killed():
        hook[0], _ = counting(lambda n, path: os.kill(os.getpid(), signal.SIGKILL) if n == point else None)
        predict(store)
    wait(fork(killed, store.parent / "a.txt"))
    wait(fork(lambda: predict(store), store.parent / "b.txt"))
    outcomes.append(judge("kill", store, [(store.parent / "b.txt").read_text()], (EXISTS,)))

store = case("two")
pids = [fork(lambda: predict(store), store.parent / f"{i}.txt") for i in range(3)]
for pid in pids:
    wait(pid)
said = [(store.parent / f"{i}.txt").read_text() for i in range(3)]
outcomes.append(judge("writers at once", store, said, ("writes it since", EXISTS)))
if said.count("done") != 1:
    outcomes[-1][1] = "not one writer"

sleeping = []
atexit.register(lambda: [os.kill(pid, signal.SIGKILL) for pid in sleeping])
for where in ("X/c", "parts", "store.zarr.tmp", "work")[: n_kills // 4]:
    store = case("stop" + where.replace("/", ""))
    def slept():
        _claim.socket.gethostname = lambda: "node7"
        done = []
        def stop(n, path):
            if where in path.partition(".partial/")[2] and not done:
                done.append(n)
                os.kill(os.getpid(), signal.SIGSTOP)
        hook[0], _ = counting(stop)
        predict(store)
    pid = fork(slept, store.parent / "a.txt")
    assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
    sleeping.append(pid)
    [file] = Path(f"{store}.partial").glob("run-*.json")
    wait(fork(lambda: predict(store), store.parent / "b.txt"))
    early = (store.parent / "b.txt").read_text()
    os.utime(file, (1, 1))
    wait(fork(lambda: predict(store), store.parent / "c.txt"))
    os.kill(sleeping.pop(), signal.SIGCONT)
    wait(pid)
    said = [early, (store.parent / "c.txt").read_text(), (store.parent / "a.txt").read_text()]
    outcomes.append(judge("sleepers", store, said, ("writes it since", "no longer the one that writes it")))
    if [text == "done" for text in said] != [False, True, False]:
        outcomes[-1][1] = "not one writer"

for limit in (2000, 100, 20000)[: n_kills // 4]:
    store = case(f"full{limit}")
    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        predict(store)
    pid = fork(full, store.parent / "a.txt")
    wait(pid)
    resource_error = (store.parent / "a.txt").read_text() if (store.parent / "a.txt").exists() else ""
    wait(fork(lambda: predict(store), store.parent / "b.txt"))
    said = [(store.parent / "b.txt").read_text()]
    outcomes.append(judge("full disk", store, said))
    outcomes[-1][2] += [resource_error]
    if str(root) not in resource_error:
        outcomes[-1][1] = "an error without a path"
print(json.dumps(outcomes))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked, killed and stopped")
def test_writers(tmp_path, tries, tally):
    args = [sys.executable, "-W", "ignore", "-c", DRIVER, str(tmp_path), str(tries(4, 20))]
    done = subprocess.run(args, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout.strip().rpartition("\n")[2])
    for what, found, _ in outcomes:
        tally(f"stores: {what}")[found] += 1
    assert [case for case in outcomes if case[1] != "same result"] == []
