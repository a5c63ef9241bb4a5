"""Size and shape of the package: lines, rooms, floors, arrows, circles. Nothing is imported or run.

    python benchmarks/house.py                    # this checkout
    python benchmarks/house.py OTHER_CHECKOUT     # another one, to compare

A room is a package or module directly under `histosge`; an arrow is a pair of rooms of which one imports the other when
it runs (imports for annotations do not count). A floor is the longest way down from a room. docs/design.md.
"""

from __future__ import annotations

import ast
import statistics
import sys
from pathlib import Path


def lines_of(source: str) -> tuple[int, int, int, int]:
    """Lines of code, of docstrings and comments, blank ones, and all."""
    docs: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        for inner in getattr(node, "body", []) if isinstance(getattr(node, "body", None), list) else []:
            if (
                isinstance(inner, ast.Expr)
                and isinstance(inner.value, ast.Constant)
                and isinstance(inner.value.value, str)
            ):
                docs |= set(range(inner.lineno, (inner.end_lineno or inner.lineno) + 1))
    code = blank = 0
    lines = source.splitlines()
    for number, line in enumerate(lines, 1):
        if number not in docs and not line.strip().startswith("#"):
            blank, code = (blank + 1, code) if not line.strip() else (blank, code + 1)
    return code, len(lines) - code - blank, blank, len(lines)


def imports_of(tree: ast.Module, modules: set[str]) -> set[str]:
    """Modules of the package that a file imports when it runs."""
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped or not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        base = getattr(node, "module", None)
        for alias in node.names:
            name = f"{base}.{alias.name}" if base else alias.name
            found |= {name} if name in modules else {base} if base in modules else set()
    return found


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other."""
    reach: dict[str, set[str]] = {}
    for start in arrows:
        seen: set[str] = set()
        todo = [start]
        while todo:
            todo += [n for n in arrows.get(todo.pop(), ()) if n not in seen and not seen.add(n)]  # type: ignore[func-returns-value]
        reach[start] = seen
    groups = {tuple(sorted(b for b in reach[a] if a in reach.get(b, ()))) for a in arrows if a in reach[a]}
    return [list(group) for group in sorted(groups) if len(group) > 1]


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]) / "src" / "histosge"
    files = {
        ".".join(("histosge", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in sorted(root.rglob("*.py"))
    }
    counts = {name: lines_of(path.read_text(encoding="utf-8")) for name, path in files.items()}
    of_files = {
        name: imports_of(ast.parse(path.read_text(encoding="utf-8")), set(files)) - {name, "histosge"}
        for name, path in files.items()
        if name != "histosge"
    }

    def room(name: str) -> str:
        return name.split(".")[1]

    rooms: dict[str, set[str]] = {room(name): set() for name in of_files}
    for name, wanted in of_files.items():
        rooms[room(name)] |= {room(other) for other in wanted} - {room(name)}

    def floor(name: str) -> int:
        return 1 + max((floor(other) for other in rooms[name]), default=0)

    sizes = sorted((count[3], name) for name, count in counts.items())
    total = [sum(count[i] for count in counts.values()) for i in range(4)]
    print(
        f"files {len(files)}, lines {total[3]:,}: code {total[0]:,}, docstrings and comments {total[1]:,}, blank {total[2]:,}"
    )
    print(f"longest {sizes[-1][1]} {sizes[-1][0]}, median {statistics.median(size for size, _ in sizes):g}")
    print(f"over 400 lines: {[name for size, name in sizes if size > 400]}")
    circular = circles(rooms)
    floors = "none, there is a circle" if circular else max(floor(name) for name in rooms)
    print(f"rooms {len(rooms)}, floors {floors}, arrows {sum(map(len, rooms.values()))}, circles of rooms {circular}")
    inside = {name: {w for w in wanted if w not in ("histosge", name)} for name, wanted in of_files.items()}
    print(f"circles of files: {circles(inside)}")


if __name__ == "__main__":
    main()
