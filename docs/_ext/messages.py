"""The error messages of the package, read from its source. Nothing but the standard library, so that the tests use it too."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[2] / "src" / "histosge"
_FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
_DEEPEST = 2  # a part of a message that is itself put together of parts, and no further
_AROUND = {"str", "repr", "list", "sorted", "tuple", "set", "map", "type", "int", "float", "abs"}


class UnknownFormError(ValueError):
    """A ``raise`` that is written in a way that is not read here."""


@dataclass(frozen=True)
class Message:
    """One error message. What is filled in when it is raised stands in ‹ ›, one of several wordings in [ | ]."""

    module: str
    """Without the package: ``_section._read``"""
    line: int
    error: str
    text: str


@cache
def messages() -> tuple[Message, ...]:
    """Every message of the package, by module and line; those that a module words alike, once."""
    found: dict[tuple[str, str, str], Message] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        for message in read(path.read_text(encoding="utf-8"), module):
            found.setdefault((message.module, message.error, message.text), message)
    return tuple(found.values())


def read(source: str, module: str = "module") -> list[Message]:
    """Messages of one module; :class:`UnknownFormError` for a ``raise`` that cannot be read."""
    tree = ast.parse(source)
    known = {node.name: node for node in ast.walk(tree) if isinstance(node, _FUNCTION)}
    found = []
    for scope in (tree, *(node for node in ast.walk(tree) if isinstance(node, _FUNCTION))):
        reader = _Reader(scope, known)
        for node in _own(scope):
            if isinstance(node, ast.Raise) and node.exc is not None:
                try:
                    said = dict.fromkeys(reader.raised(node.exc, node))
                except UnknownFormError as err:
                    msg = f"{module}, line {node.lineno}: {err}. Write `msg = ...; raise ERROR(msg)`."
                    raise UnknownFormError(msg) from None
                found += [Message(module, node.lineno, error, text) for error, text in said]
    return sorted(found, key=lambda message: message.line)


class _Reader:
    """Reads expressions of one function."""

    def __init__(self, scope: ast.AST, known: dict[str, Any]) -> None:
        self.known = known
        self.assigned: list[tuple[str, ast.expr, tuple[int, ...], int]] = []
        self.place: dict[int, tuple[int, ...]] = {}
        self.left: set[int] = set()
        """Branches that are left by their last statement, so that nothing in them is known below"""
        self._walk(scope, ())

    def _walk(self, node: ast.AST, path: tuple[int, ...]) -> None:
        """Note what is assigned, and in which branches everything lies."""
        for field, value in ast.iter_fields(node):
            inner = path
            if isinstance(node, ast.If | ast.Try | ast.For | ast.While | ast.ExceptHandler) and field != "test":
                inner = (*path, hash((id(node), field)))
                if isinstance(value, list) and value and isinstance(value[-1], ast.Raise | ast.Return | ast.Continue):
                    self.left.add(inner[-1])
            for child in value if isinstance(value, list) else [value]:
                if not isinstance(child, ast.AST) or isinstance(child, _FUNCTION | ast.ClassDef):
                    continue
                self.place[id(child)] = inner
                if isinstance(child, ast.Assign | ast.AnnAssign) and child.value is not None:
                    targets = child.targets if isinstance(child, ast.Assign) else [child.target]
                    names = [target.id for target in targets if isinstance(target, ast.Name)]
                    self.assigned += [(name, child.value, inner, child.lineno) for name in names]
                self._walk(child, inner)

    def raised(self, exc: ast.expr, at: ast.AST) -> Iterator[tuple[str, str]]:
        """Exception and text, for each wording."""
        if isinstance(exc, ast.Name) and (exc.id.startswith("_") or not exc.id[0].isupper()):
            return  # one that was caught before, or that never leaves its module
        if not isinstance(exc, ast.Call):
            msg = f"`raise {ast.unparse(exc)}` has no message"
            raise UnknownFormError(msg)
        error = ast.unparse(exc.func)
        if error in self.known:  # a function that makes the exception
            maker = self.known[error]
            for value in _returned(maker):
                yield from _Reader(maker, {}).raised(value, value)
            return
        if len(exc.args) != 1:
            msg = f"`{ast.unparse(exc)}` has not one argument, the message"
            raise UnknownFormError(msg)
        for text in self.wordings(exc.args[0], at):
            yield error.rpartition(".")[2], " ".join(text.split())

    def wordings(self, value: ast.expr, at: ast.AST) -> Iterator[str]:
        """Texts that a message may have."""
        if isinstance(value, ast.Name):
            options = self.values(value.id, at)
            if not options:
                msg = f"`{value.id}` is set nowhere above"
                raise UnknownFormError(msg)
            for option in options:
                yield from self.wordings(option, option)
        elif isinstance(value, ast.Call) and ast.unparse(value.func) in self.known:
            maker = self.known[ast.unparse(value.func)]
            reader = _Reader(maker, {})
            for text in _returned(maker):
                if not (isinstance(text, ast.Constant) and text.value is None):
                    yield reader.text(text, text)
        else:
            yield self.text(value, at)

    def values(self, name: str, at: ast.AST) -> list[ast.expr]:
        """What a name may stand for: the assignment next above that is passed on every way, and those since."""
        here, found = self.place.get(id(at), ()), []
        for other, value, path, line in sorted(self.assigned, key=lambda one: one[3], reverse=True):
            way = next((block for nth, block in enumerate(path) if here[nth : nth + 1] != (block,)), None)
            if other != name or line > at.lineno or way in self.left:  # type: ignore[attr-defined]
                continue
            found.append(value)
            if way is None:
                break
        return found[::-1]

    def text(self, value: ast.expr | None, at: ast.AST, depth: int = 0) -> str:
        """An expression as it reads."""
        if isinstance(value, ast.Constant):
            return str(value.value)
        if isinstance(value, ast.JoinedStr):
            return "".join(self.text(part, at, depth) for part in value.values)
        if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
            return self.text(value.left, at, depth) + self.text(value.right, at, depth)
        if isinstance(value, ast.FormattedValue):
            inner = value.value
            if isinstance(inner, ast.IfExp) and depth < _DEEPEST:
                return self.text(inner, at, depth)
            if isinstance(inner, ast.Name) and depth < _DEEPEST:
                options = self.values(inner.id, at)
                if options and all(_is_text(option) for option in options):
                    return _one_of([self.text(option, option, depth + 1) for option in options])
            return f"‹{_name(inner)}›"
        if isinstance(value, ast.IfExp):
            return _one_of([self.text(option, at, depth) for option in (value.body, value.orelse)])
        return f"‹{_name(value)}›"


def _own(node: ast.AST) -> Iterator[ast.AST]:
    """What lies in a function, and not in a function inside it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, _FUNCTION):
            yield child
            yield from _own(child)


def _returned(function: ast.AST) -> list[ast.expr]:
    return [node.value for node in _own(function) if isinstance(node, ast.Return) and node.value is not None]


def _is_text(value: ast.expr) -> bool:
    if isinstance(value, ast.IfExp):
        return _is_text(value.body) and _is_text(value.orelse)
    return isinstance(value, ast.JoinedStr) or (isinstance(value, ast.Constant) and isinstance(value.value, str))


def _one_of(options: list[str]) -> str:
    said = list(dict.fromkeys(option for option in options if option))
    return said[0] if len(said) == 1 and all(options) else f"[{' | '.join(said)}]" if said else ""


def _name(value: ast.AST | None) -> str:
    """Word for what is filled in."""
    if isinstance(value, ast.Name):
        return value.id
    if isinstance(value, ast.Attribute):
        return value.attr
    if isinstance(value, ast.Subscript):
        return _name(value.value)
    if isinstance(value, ast.Call):
        function = value.func
        if isinstance(function, ast.Attribute) and function.attr == "join" and value.args:
            return _name(value.args[-1])
        if isinstance(function, ast.Name) and function.id == "len":
            return "number"
        if isinstance(function, ast.Name) and function.id in _AROUND and value.args:
            return _name(value.args[-1])
        return _name(function)
    return "…"
