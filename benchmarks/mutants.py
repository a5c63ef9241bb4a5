"""Mutation testing: change one thing in a file, run the tests that reach it, and see whether one of them fails.

    python benchmarks/mutants.py                              # 100 mutants of each file below, drawn with seed 0
    python benchmarks/mutants.py _areas.py --sample 0         # all mutants of one file
    python benchmarks/mutants.py _areas.py --line 120         # those of one line, or of a range such as 120-140

Each mutant is a fork of a process that has imported all packages but histosge. The tests that reach the changed
statement run there, the fastest first, up to the first failure. Hypothesis draws the same examples each time.
Survivors are printed; the exit status does not tell. Needs coverage and the tests' packages; Linux or macOS.
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
import time
from collections import Counter
from pathlib import Path

import coverage
import pytest
from hypothesis import HealthCheck, Phase, settings

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src" / "histosge"
FILES = [*sorted((SRC / "_geometry").glob("_[a-z]*.py"))]
FILES += [SRC / "_statistics" / f"_{name}.py" for name in ("intervals", "metrics", "splits")]
TESTS = [
    ROOT / "tests" / f"test_{name}.py"
    for name in "geometry coverage splits calibration metrics targets foreign_scale".split()
]
SLOWEST_S = 40  # of the tests of one mutant, taken together
OTHERS = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,), ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.Div,), ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Div,), ast.Mod: (ast.Mult,), ast.Pow: (ast.Mult,), ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,), ast.And: (ast.Or,), ast.Or: (ast.And,),
}  # fmt: skip
SYMMETRIC = {"max", "min", "maximum", "minimum", "hypot", "clip"}
PASSIVE = (ast.AugAssign, ast.Raise, ast.Break, ast.Continue)


def instead(node: ast.AST, parent: ast.AST) -> list[ast.AST]:
    """What may stand in the place of a node."""

    def but(**fields):
        new = copy.copy(node)
        new.__dict__.update(fields)
        return new

    found: list[ast.AST] = []
    match node:
        case ast.Compare():
            found += [but(ops=[new(), *node.ops[1:]]) for new in OTHERS[type(node.ops[0])]]
            found += [but(ops=[node.ops[0], new()]) for op in node.ops[1:] for new in OTHERS[type(op)]]
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
            if len(node.args) > 1 and ast.unparse(node.func).split(".")[-1] not in SYMMETRIC:
                found += [but(args=[node.args[1], node.args[0], *node.args[2:]])]
            found += [but(keywords=[other for other in node.keywords if other is not one]) for one in node.keywords]
    if isinstance(node, PASSIVE) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        found += [ast.Pass()]
    if isinstance(parent, ast.If | ast.While | ast.IfExp) and node is parent.test and not isinstance(node, ast.Compare):
        found += [ast.UnaryOp(ast.Not(), node)]
    return [ast.copy_location(new, node) if isinstance(new, ast.Pass | ast.UnaryOp) else new for new in found]


def mutants(tree: ast.AST, statement: ast.AST | None = None):
    """Change the tree in one place after the other; yield the lines of the statement and the change in words."""
    if (
        isinstance(tree, ast.Import | ast.ImportFrom)
        or getattr(getattr(tree, "test", None), "id", "") == "TYPE_CHECKING"
    ):
        return
    if isinstance(tree, ast.Assign) and getattr(tree.targets[0], "id", "") == "msg":
        return  # texts of messages
    for field, value in ast.iter_fields(tree):
        if field in {"annotation", "returns", "decorator_list"}:
            continue
        for place, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(node, ast.AST) or not hasattr(node, "lineno"):
                if isinstance(node, ast.arguments | ast.comprehension | ast.match_case):
                    yield from mutants(node, statement)
                continue
            inside = node if isinstance(node, ast.stmt) else statement
            for new in instead(node, tree):
                value.__setitem__(place, new) if place is not None else setattr(tree, field, new)
                first = inside if isinstance(inside, ast.stmt) and not hasattr(inside, "body") else node
                yield (
                    range(first.lineno, first.end_lineno + 1),
                    f"{node.lineno}: {ast.unparse(node)} → {ast.unparse(new)}",
                )
                value.__setitem__(place, node) if place is not None else setattr(tree, field, node)
            yield from mutants(node, inside)


class Chosen:
    """Run the chosen tests, fastest first; or all of them, and note what each takes and reaches."""

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


def run_tests(files, plugin: Chosen, *extra: str) -> int:
    quiet = "-x -q --tb=no --assert=plain -p no:cacheprovider -p no:xdist --hypothesis-profile=mutants -W ignore::pytest.PytestAssertRewriteWarning"
    return pytest.main([*quiet.split(), "-m", "not slow", *extra, *map(str, files)], plugins=[plugin])


def forget_house() -> None:
    """Forget histosge and its tests, so that a fork imports them again; other packages stay."""
    for name in [n for n in sys.modules if n.split(".")[0] in {"histosge", "tests", "conftest"} or "test_" in n]:
        del sys.modules[name]


def fork(work) -> int:
    """Run `work` in a child that prints nothing; return its process."""
    process = os.fork()
    if process == 0:
        sink = os.open(os.devnull if not os.environ.get("LOUD") else "/dev/stderr", os.O_WRONLY)
        os.dup2(sink, 1), os.dup2(sink, 2)
        code = 3
        try:
            code = work()
        finally:
            os._exit(code)
    return process


def baseline(files: list[Path]) -> tuple[dict[str, float], dict[str, dict[int, set[str]]]]:
    """How long each test takes, and which tests reach each line of each file."""
    kept = Path(tempfile.gettempdir()) / "baseline"

    def work() -> int:
        watch = coverage.Coverage(data_file=None, config_file=False, include=[str(file) for file in files])
        watch.start()
        plugin = Chosen(watch=watch)
        code = run_tests(TESTS, plugin)
        watch.stop()
        reached = {str(file): watch.get_data().contexts_by_lineno(str(file)) for file in files}
        kept.write_bytes(pickle.dumps((dict(plugin.took), reached)))
        return int(code)

    if os.waitpid(fork(work), 0)[1]:
        sys.exit("The tests fail without any mutant: run them with pytest first. LOUD=1 shows what they print.")
    return pickle.loads(kept.read_bytes())


def try_mutant(file: Path, code, seconds: dict[str, float]) -> int:
    """Start the tests of one mutant in a fork; its exit status is 0 if the mutant survives."""
    limit = 10 + 5 * sum(seconds.values())
    read = importlib.machinery.SourceFileLoader.get_code

    def work() -> int:
        signal.alarm(int(10 * limit))  # a mutant may never end, or ask for all memory
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 1))
        resource.setrlimit(resource.RLIMIT_DATA, (2**33, 2**33))
        importlib.machinery.SourceFileLoader.get_code = lambda self, name: (
            code if self.path == str(file) else read(self, name)
        )
        return int(run_tests(sorted({ROOT / test.split("::")[0] for test in seconds}), Chosen(seconds)))

    return fork(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="*", help="name of a file among those above; all by default")
    parser.add_argument("--sample", type=int, default=100, help="mutants of each file; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--line", default="", help="one line, or a range such as 120-140")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    given = parser.parse_args()
    files = [file for file in FILES if not given.file or file.name in given.file]
    os.chdir(ROOT)
    sys.path.insert(0, str(SRC.parent))
    settings.register_profile(
        "mutants", deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    run_tests(TESTS, Chosen(), "--collect-only", "-qqq")  # imports what the forks share
    forget_house()
    gc.freeze()  # or each fork collects what it shares
    seconds, reached = baseline(files)
    print(f"{len(seconds)} tests, {sum(seconds.values()):.0f} s", flush=True)
    running: dict[int, tuple[str, str]] = {}
    counts: dict[str, Counter[str]] = {file.name: Counter() for file in files}

    def wait() -> None:
        process, status = os.wait()
        name, what = running.pop(process)
        outcome = "survived" if status == 0 else "killed" if os.WIFEXITED(status) else "out of time"
        counts[name][outcome] += 1
        if outcome == "survived":
            print(f"{name}:{what}", flush=True)

    first, _, last = given.line.partition("-")
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        places = [
            n
            for n, (_, what) in enumerate(mutants(tree))
            if not first or int(first) <= int(what.split(":")[0]) <= int(last or first)
        ]
        drawn = random.Random(given.seed).sample(places, min(given.sample or len(places), len(places)))
        counts[file.name]["all"] = len(places)
        for n, (lines, what) in enumerate(mutants(tree)):
            if n not in drawn:
                continue
            tests = {test for line in lines for test in reached[str(file)].get(line, ())}
            if "" in tests:  # runs when it is imported: what reaches the file
                tests = {test for some in reached[str(file)].values() for test in some}
            chosen, total = {}, 0.0
            for test in sorted(tests - {""}, key=seconds.__getitem__):
                total += seconds[test]
                if total < SLOWEST_S:
                    chosen[test] = seconds[test]
            if not chosen:
                counts[file.name]["survived"] += 1
                print(f"{file.name}:{what} (no test)", flush=True)
                continue
            try:
                code = compile(ast.fix_missing_locations(copy.deepcopy(tree)), str(file), "exec")
            except SyntaxError:
                continue
            running[try_mutant(file, code, chosen)] = (file.name, what)
            if len(running) >= given.jobs:
                wait()
    while running:
        wait()
    print(f"{'file':20}{'mutants':>10}{'tried':>10}{'killed':>10}{'of time':>10}{'survived':>10}   killed, 95 %")
    for name, found in counts.items():
        dead, tried = found["killed"] + found["out of time"], sum(found.values()) - found["all"]
        share = dead / max(tried, 1)
        wide = 1.96 * math.sqrt(share * (1 - share) / max(tried, 1))
        print(
            f"{name:20}{found['all']:10}{tried:10}{found['killed']:10}{found['out of time']:10}{found['survived']:10}   {share:.1%} ± {wide:.1%}"
        )


if __name__ == "__main__":
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as tempfile.tempdir:  # forks leave things behind
        main()
    print(f"{time.perf_counter() - began:.0f} s")
