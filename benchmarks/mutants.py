"""Mutation testing: change one thing in a file, run the tests that reach it, and see whether one of them fails.

    python benchmarks/mutants.py                              # 60 mutants of each file below, drawn with seed 0
    python benchmarks/mutants.py --sample 0 _areas.py         # all mutants of one file
    python benchmarks/mutants.py "_areas.py:120: 1 → 2"       # one of them; "_areas.py:120:" are all of its line

A mutant is a fork of a process that has imported all packages but histosge. The tests that reach the changed statement
run in it, the fastest first, up to the first failure. Hypothesis draws the same examples each time, so that a run can
be repeated. Survivors are printed, then the counts. Needs `coverage`, and Linux or macOS.
"""

from __future__ import annotations

import argparse
import ast
import copy
import gc
import importlib.machinery
import math
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

import coverage
import pytest
from hypothesis import HealthCheck, Phase, settings

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src" / "histosge"
FILES = sorted((SRC / "_geometry").glob("_[a-z]*.py"))
FILES += [SRC / "_statistics" / f"_{name}.py" for name in ("intervals", "metrics", "splits")]
TESTS = [
    ROOT / "tests" / f"test_{name}.py"
    for name in ("calibration", "coverage", "foreign_scale", "geometry", "metrics", "splits", "targets")
]
LONGEST = 40
"""Seconds that the tests of one mutant may take together; slower ones are left out."""
OTHERS = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,), ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.Div,), ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Div,), ast.Mod: (ast.Mult,), ast.Pow: (ast.Mult,), ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,), ast.And: (ast.Or,), ast.Or: (ast.And,),
}  # fmt: skip
SYMMETRIC = {"max", "min", "maximum", "minimum", "hypot", "clip"}


def instead(node: ast.AST, parent: ast.AST) -> list[ast.AST]:
    """What may stand in the place of a node."""

    def but(**fields) -> ast.AST:
        new = copy.copy(node)
        new.__dict__.update(fields)
        return new

    found: list[ast.AST] = []
    match node:
        case ast.Compare():
            for i, op in enumerate(node.ops):
                found += [but(ops=[*node.ops[:i], new(), *node.ops[i + 1 :]]) for new in OTHERS[type(op)]]
        case ast.BinOp() | ast.AugAssign() | ast.BoolOp():
            found += [but(op=new()) for new in OTHERS.get(type(node.op), ())]
        case ast.UnaryOp():
            found += [node.operand]
        case ast.Constant(value=bool()):
            found += [but(value=not node.value)]
        case ast.Constant(value=int() | float()):
            found += [but(value=node.value + 1), but(value=node.value - 1)]
        case ast.Constant(value=str()) if not isinstance(parent, ast.JoinedStr | ast.Expr):
            found += [but(value=node.value + "?")]
        case ast.Slice():
            found += [but(**{end: None}) for end in ("lower", "upper") if getattr(node, end) is not None]
        case ast.Call():
            found += node.args[:1] or ([node.func.value] if isinstance(node.func, ast.Attribute) else [])
            found += [but(keywords=[other for other in node.keywords if other is not one]) for one in node.keywords]
            if len(node.args) > 1 and ast.unparse(node.func).split(".")[-1] not in SYMMETRIC:
                found += [but(args=[node.args[1], node.args[0], *node.args[2:]])]
    called = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    if called or isinstance(node, ast.AugAssign | ast.Raise | ast.Break):
        found += [ast.copy_location(ast.Pass(), node)]
    if node is getattr(parent, "test", None) and not isinstance(node, ast.Compare):
        found += [ast.copy_location(ast.UnaryOp(ast.Not(), node), node)]
    return found


def mutants(tree: ast.AST, statement: ast.AST | None = None):
    """Change the tree in one place after the other; yield the lines to be reached, and the change in words."""
    test, targets = getattr(tree, "test", None), getattr(tree, "targets", [None])
    if isinstance(tree, ast.Import | ast.ImportFrom) or "TYPE_CHECKING" in (getattr(test, "id", ""),):
        return
    if getattr(targets[0], "id", "") == "msg":  # the words of an error
        return
    for field, value in ast.iter_fields(tree):
        if field in {"annotation", "returns", "decorator_list"}:
            continue
        for place, node in enumerate(value if isinstance(value, list) else [value]):
            inside = node if isinstance(node, ast.stmt) else statement
            # a statement of one piece is reached as a whole, of an `if` only the node itself
            first = node if inside is None or hasattr(inside, "body") else inside
            for new in instead(node, tree) if hasattr(node, "lineno") else ():
                put(tree, field, place, new)
                yield (
                    range(first.lineno, first.end_lineno + 1),
                    f"{node.lineno}: {ast.unparse(node)} → {ast.unparse(new)}",
                )
                put(tree, field, place, node)
            if isinstance(node, ast.AST):
                yield from mutants(node, inside)


def put(tree: ast.AST, field: str, place: int, node: ast.AST) -> None:
    value = getattr(tree, field)
    if isinstance(value, list):
        value[place] = node
    else:
        setattr(tree, field, node)


class Chosen:
    """Run the tests of ``seconds``, the fastest first; or all of them, and note what each takes and reaches."""

    def __init__(self, seconds: dict[str, float] | None = None, watch: coverage.Coverage | None = None):
        self.seconds, self.watch, self.took = seconds, watch, Counter()

    def pytest_collection_modifyitems(self, items):
        if self.seconds is not None:
            items[:] = sorted((i for i in items if i.nodeid in self.seconds), key=lambda i: self.seconds[i.nodeid])

    def pytest_runtest_setup(self, item):
        if self.watch is not None:
            self.watch.switch_context(item.nodeid)

    def pytest_runtest_logreport(self, report):
        self.took[report.nodeid] += report.duration

    def run(self, files: list[Path], *extra: str) -> int:
        quiet = "-x -q --tb=no --assert=plain -p no:cacheprovider -p no:xdist --hypothesis-profile=mutants"
        quiet += " -W ignore::pytest.PytestAssertRewriteWarning"
        return int(pytest.main([*quiet.split(), "-m", "not slow", *extra, *map(str, files)], plugins=[self]))


def fork(work) -> int:
    """Run ``work`` in a child that prints nothing; return the number of its process."""
    process = os.fork()
    if process == 0:
        code = 3
        try:
            if not os.environ.get("LOUD"):
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = work()
        finally:
            os._exit(code)
    return process


def baseline() -> tuple[dict[str, float], dict[Path, dict[int, list[str]]]]:
    """How long each test takes, and which tests reach each line of each file; "" stands for the import."""
    kept = Path(tempfile.gettempdir()) / "baseline"

    def work() -> int:
        watch = coverage.Coverage(data_file=None, config_file=False, include=[str(file) for file in FILES])
        watch.start()
        plugin = Chosen(watch=watch)
        code = plugin.run(TESTS)
        watch.stop()
        reached = {file: watch.get_data().contexts_by_lineno(str(file)) for file in FILES}
        kept.write_bytes(pickle.dumps((dict(plugin.took), reached)))
        return code

    if os.waitpid(fork(work), 0)[1]:
        sys.exit("The tests fail as they are: run them with pytest first. With LOUD=1 they print here.")
    return pickle.loads(kept.read_bytes())


def attempt(file: Path, code, seconds: dict[str, float]) -> int:
    """Run the tests of one mutant in a fork, which ends with 0 if the mutant survives; return its process."""
    limit = int(10 + 5 * sum(seconds.values()))
    read = importlib.machinery.SourceFileLoader.get_code

    def work() -> int:
        signal.alarm(10 * limit)  # a mutant may never end, or ask for all memory
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        resource.setrlimit(resource.RLIMIT_DATA, (2**33, 2**33))
        importlib.machinery.SourceFileLoader.get_code = lambda self, name: (
            code if self.path == str(file) else read(self, name)
        )
        return Chosen(seconds).run(sorted({ROOT / test.split("::")[0] for test in seconds}))

    return fork(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mutant", nargs="*", default=[""], help="as survivors are printed, or the beginning of it")
    parser.add_argument("--sample", type=int, default=60, help="mutants of each file; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    given = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(SRC.parent))
    phases = [Phase.explicit, Phase.generate]
    settings.register_profile("mutants", phases=phases, derandomize=True, suppress_health_check=list(HealthCheck))
    Chosen().run(TESTS, "--collect-only", "-qqq")  # imports what the forks share
    for name in [n for n in sys.modules if n.split(".")[0] in {"histosge", "tests", "conftest"} or "test_" in n]:
        del sys.modules[name]  # a fork imports these itself
    gc.freeze()  # or each fork collects what it shares
    seconds, reached = baseline()
    print(f"{len(seconds)} tests, {sum(seconds.values()):.0f} s", flush=True)
    running: dict[int, tuple[Path, str]] = {}
    counts: dict[Path, Counter[str]] = {file: Counter() for file in FILES}

    def note(file: Path, what: str, status: int | None) -> None:
        survived = status is None or status == 0
        counts[file]["survived" if survived else "killed" if os.WIFEXITED(status) else "out of time"] += 1
        if survived:
            print(f"{file.name}:{what}" + " (no test reaches it)" * (status is None), flush=True)

    def wait() -> None:
        process, status = os.wait()
        note(*running.pop(process), status)

    for file in FILES:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        places = [
            n for n, (_, what) in enumerate(mutants(tree)) if f"{file.name}:{what}".startswith(tuple(given.mutant))
        ]
        drawn = set(random.Random(given.seed).sample(places, min(given.sample or len(places), len(places))))
        counts[file]["all"] = len(places)
        for n, (lines, what) in enumerate(mutants(tree)):
            if n not in drawn:
                continue
            tests = {test for line in lines for test in reached[file].get(line, ())}
            if "" in tests:
                tests = {test for some in reached[file].values() for test in some}
            chosen: dict[str, float] = {}
            for test in sorted(tests & set(seconds), key=seconds.__getitem__):
                if sum(chosen.values()) + seconds[test] < LONGEST:
                    chosen[test] = seconds[test]
            if not chosen:
                note(file, what, None)
                continue
            code = compile(ast.fix_missing_locations(copy.deepcopy(tree)), str(file), "exec")
            running[attempt(file, code, chosen)] = file, what
            while len(running) >= given.jobs:
                wait()
    while running:
        wait()
    print(f"{'file':16}{'mutants':>9}{'tried':>9}{'killed':>9}{'too long':>9}{'survived':>9}  killed, 95 %")
    for file, found in counts.items():
        dead, tried = found["killed"] + found["out of time"], found.total() - found["all"]
        share = dead / max(tried, 1)
        print(f"{file.name:16}{found['all']:9}{tried:9}{found['killed']:9}{found['out of time']:9}{found['survived']:9}"
              f"  {share:.1%} ± {1.96 * math.sqrt(share * (1 - share) / max(tried, 1)):.1%}")  # fmt: skip


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as tempfile.tempdir:  # forks leave things behind
        main()
