"""Common parts of commands: output and exit codes, reading and writing of files, options."""

from __future__ import annotations

import json
import math
import re
import sys
import traceback
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from histosge import _keys
from histosge._atomic import naming
from histosge._options import Argument, Embedding, Learning, Reading, Running, arguments
from histosge._remote import Remote, is_url, located, shown
from histosge._settings import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from spatialdata import SpatialData

_EXPECTED = (ValueError, KeyError, RuntimeError, OSError, ImportError, MemoryError)
"""Errors whose message has a remedy; other errors are bugs of histosge, which are reported with a traceback"""
ZARR_MARKS = ("zarr.json", ".zgroup", ".zattrs")
"""A folder that may be overwritten contains one of them"""


def _set_verbosity(level: int) -> Callable[[click.Context, click.Parameter, bool], None]:
    def callback(_context: click.Context, _option: click.Parameter, value: bool) -> None:  # noqa: FBT001  by click
        if value:
            settings.verbosity = level

    return callback


class Command(click.Command):
    """A command that prints the result of its function; an error ends it with one line on standard error.

    The function returns text, text and an exit code, or nothing.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for flags, level, text in (
            (["-q", "--quiet"], 1, "Show warnings and errors only."),
            (["-v", "--verbose"], 3, "Show details, and where an error comes from."),
        ):
            self.params.append(
                click.Option(flags, is_flag=True, expose_value=False, callback=_set_verbosity(level), help=text)
            )

    def invoke(self, ctx: click.Context) -> None:
        """Run the command."""
        try:
            with redirect_stdout(sys.stderr):  # libraries print, such as the log of spatialdata
                message = super().invoke(ctx)
        except (click.Abort, click.exceptions.Exit):  # these are RuntimeErrors
            raise
        except _EXPECTED as err:
            if settings.verbosity > 2:
                traceback.print_exception(err)
            text: Any = err
            if isinstance(err, KeyError) and err.args:  # str() puts its message in quotes
                text = err.args[0]
            elif isinstance(err, OSError) and err.strerror and err.filename:
                text = f"{err.filename}: {err.strerror}. Correct that, or choose another place."
            click.echo(f"histosge: {' '.join(str(text).split()) or type(err).__name__}", err=True)
            sys.exit(1)
        message, code = message if isinstance(message, tuple) else (message, 0)
        if message is not None:
            click.echo(message)
        ctx.exit(code)


def as_json(value: Any) -> str:
    """Write valid JSON: numbers of numpy as numbers, NaN and infinity as null."""
    return json.dumps(_plain(value), indent=1, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path | Remote) else value


def as_table(names: Iterable[Any], rows: Sequence[Sequence[Any]], *, decimals: int | None = None) -> str:
    """Write a table with a header; numbers are right-aligned, missing values are dashes."""
    cells = [list(map(str, names)), *([_cell(value, decimals) for value in row] for row in rows)]
    columns = []
    for i, column in enumerate(zip(*cells, strict=True)):
        width = max(map(len, column))
        numbers = any(isinstance(row[i], int | float) for row in rows)
        columns.append([cell.rjust(width) if numbers else cell.ljust(width) for cell in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def readable_size(n_bytes: float) -> str:
    """Write a number of bytes with three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 999.5:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"


def _cell(value: Any, decimals: int | None) -> str:
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if decimals is None else f"{round(value, decimals) + 0.0:.{decimals}f}"  # and no -0


# ------------------------------------------------------------------------------------------------ in and out


def read_sections(
    sources: Sequence[Path | Remote], *, images: Sequence[Path], bin_size: int | None, dataset_id: str | None = None
) -> list[SpatialData]:
    """Read each section, with its image where images are given."""
    import histosge as sge

    if images and len(images) != len(sources):
        msg = f"--image is given {len(images)} times for {len(sources)} sections: give one for each, in the same order."
        raise click.UsageError(msg)
    given: Sequence[Path | None] = images or [None] * len(sources)
    places: Sequence[Any] = sources
    return [
        sge.io.read(source, image=image, bin_size=bin_size, dataset_id=dataset_id)
        for source, image in zip(places, given, strict=True)
    ]


@contextmanager
def written(*targets: Path | None, overwrite: bool, marks: Sequence[str] = ZARR_MARKS) -> Iterator[list[Path]]:
    """Yield temporary names next to the targets; they become the targets at the end, and are removed after an error.

    Parameters
    ----------
    targets
        Files and folders; ``None`` for no output.
    overwrite
        Replace an existing file, or an existing folder that contains one of ``marks``.
    marks
        Names that only folders written by histosge contain.
    """
    from histosge._section import scratch

    wanted = [target for target in targets if target is not None]
    for target in wanted:
        _refuse_foreign(target, overwrite=overwrite, marks=marks)
    with ExitStack() as folders:
        fresh = {}
        for target in wanted:
            try:  # raise before the work, not after it
                fresh[target] = folders.enter_context(scratch(target, what=str(target))) / target.name
            except OSError as err:
                msg = f"{target} cannot be written: {err.strerror or err}. Choose another folder."
                raise OSError(msg) from err
        with naming(wanted[0]) if wanted else nullcontext():
            yield [Path() if target is None else fresh[target] for target in targets]
        for target, new in fresh.items():
            old = new.with_name(f"old.{target.name}")
            if target.is_dir():  # a file is replaced in one step
                target.rename(old)
            try:
                new.replace(target)
            except BaseException:
                if old.exists():
                    old.rename(target)
                raise


def _refuse_foreign(path: Path, *, overwrite: bool, marks: Sequence[str]) -> None:
    """Raise where the path exists; with ``overwrite``, where it does not look like results of histosge."""
    if not path.exists():
        return
    of_ours = any((path / mark).exists() for mark in marks) if path.is_dir() else path.suffix not in ("", ".zarr")
    if not overwrite or not of_ours:
        hint = "pass --overwrite to replace it" if not overwrite else "it does not look like results of histosge"
        msg = f"{path} exists already: {hint}, or choose another name."
        raise FileExistsError(msg)


def refuse_input_as_output(sources: Sequence[Path | Remote], target: Path | Remote, *, name: str) -> None:
    """Raise where an output is the input, or contains it."""
    for source in sources:
        if isinstance(source, Remote) or isinstance(target, Remote):
            same = isinstance(source, Remote) and isinstance(target, Remote) and f"{source}/".startswith(f"{target}/")
        else:
            same = source.resolve().is_relative_to(target.resolve())
        if same:
            msg = f"{name} is or holds IN ({target}): choose another name, the input is not overwritten."
            raise ValueError(msg)


def held_out_lines(held_out: dict[str, Any]) -> list[str]:
    """One line for each head, best first."""
    ranked = sorted(held_out.items(), key=lambda item: -item[1]["pcc"])
    width = max(len(name) for name in held_out)
    return [
        f"  {name:<{width}}  {score['pcc']:.3f}   (mean squared error {score['mse']:.3f})" for name, score in ranked
    ]


# ---------------------------------------------------------------------------------------------------- options


class Genes(click.ParamType):
    """A number, ``all``, ``union``, or names with commas."""

    name = "genes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str | list[str]:
        """Read it."""
        if not isinstance(value, str) or value in ("all", "union"):
            return value
        return int(value) if value.isdigit() else _names(value)


class Names(click.ParamType):
    """Names with commas."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Read it."""
        return tuple(_names(value)) if isinstance(value, str) else value


class JsonObject(click.ParamType):
    """An object in JSON."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        """Read it."""
        try:
            read = json.loads(value)
        except ValueError:
            read = None
        if not isinstance(read, dict):
            self.fail(f"{value!r} is no object in JSON, such as '{{\"n_neighbours\": 30}}'.", param, ctx)
        return read


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


class OutPath(click.Path):
    """A file or folder to write, whose name is possible and has one of the endings."""

    def __init__(self, *endings: str, remote: bool = False) -> None:
        super().__init__(path_type=Path)
        self.endings = endings
        self.remote = remote
        """Whether it may be a URL"""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read it."""
        if value == "-" and "-" in self.endings:
            return Path(value)
        if is_url(value):
            if self.remote:
                return located(value)
            self.fail(f"{shown(value)!r} is a URL: name a path on this machine.", param, ctx)
        try:
            name = param.human_readable_name if param is not None else "path"
            _keys.check_output(name, value, endings=tuple(e for e in self.endings if e != "-"))
        except ValueError as err:
            self.fail(str(err), param, ctx)
        return super().convert(value, param, ctx)


class SourcePath(click.Path):
    """A file or folder that exists, or a URL."""

    def __init__(self) -> None:
        super().__init__(exists=True, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read it."""
        return located(value) if is_url(value) else super().convert(value, param, ctx)


SOURCE_PATH = SourcePath()
OUT_PATH = OutPath()
OUT_PLACE = OutPath(remote=True)
OUT_STORE = OutPath("", ".zarr")
OUT_FIGURE = OutPath(".png", ".pdf", ".svg")


def taking(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Add options to a command, in this order."""

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def heads_option(text: str) -> tuple[Callable[[Any], Any], ...]:
    """Arguments of heads."""
    return (click.option("--head-options", type=JsonObject(), metavar="JSON", help=text),)


_OF_THE_SHELL: dict[str, dict[str, Any]] = {
    "encoder": {"help": "Encoder; see `histosge encoders`."},
    "genes": {"type": Genes(), "help": "Number of genes, 'all', 'union', or names with commas."},
    "device": {"help": "Where to compute: cpu, cuda, cuda:1 or mps. By default a GPU if there is one."},
    "progress": {"help": "Progress bars. By default where a terminal shows them."},
    "rng": {"param_decls": ("--rng", "--seed"), "type": int, "help": "Seed."},
}
"""Texts and types that differ from Python"""


def from_python(group: type) -> tuple[Callable[[Any], Any], ...]:
    """Make options with the names, types, defaults and texts of a group of arguments."""
    return tuple(_option(name, hint, argument) for name, (hint, argument) in arguments(group).items())


def _option(name: str, hint: Any, argument: Argument) -> Callable[[Any], Any]:
    flag = f"--{name.replace('_', '-')}"
    kinds = [kind for kind in (bool, float, int, str) if kind in (hint, *get_args(hint))]
    text = argument.text.replace("``None`` takes", "By default")
    given: dict[str, Any] = {
        "param_decls": (f"{flag}/--no-{flag[2:]}" if bool in kinds else flag, name),
        "type": kinds[0] if kinds else str,
        "default": argument.default,
        "show_default": argument.default is not None,
        "help": re.sub(r":\w+:(?=`)|``", "", text),
    }
    given |= _OF_THE_SHELL.get(name, {})
    return click.option(*given.pop("param_decls"), **given)


RAW = (
    click.option(
        "--image",
        "images",
        type=SOURCE_PATH,
        multiple=True,
        metavar="FILE",
        help="The microscope's image, where IN lacks it; once for each IN.",
    ),
    click.option("--bin-size", type=int, help="Bins of a Visium HD folder to learn from, in µm: 2, 8 or 16."),
)
KEYS = from_python(Reading)
ENCODER = (
    *from_python(Embedding),
    click.option(
        "--weights", type=click.Path(exists=True), metavar="FOLDER", help="Local weights, for machines without network."
    ),
    click.option(
        "--trust-remote-code",
        is_flag=True,
        help="Allow code of others, which some encoders run when they are loaded; see `histosge encoders`.",
    ),
)
LEARN = (*from_python(Learning),)
COMPUTE = (
    *from_python(Running),
    click.option("--no-cache", is_flag=True, help="Neither read nor store embeddings; see `histosge cache`."),
)
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace the output of an earlier run.")
JSON = click.option("--json", "as_json_", is_flag=True, help="Print the result on standard output, as JSON.")


def cache_setting(*, no_cache: bool) -> dict[str, Any]:
    """Settings for ``settings.override``."""
    return {"cache_gb": 0} if no_cache else {}


def loaded_encoder(encoder: str, *, weights: str | None, trust_remote_code: bool) -> Any:
    """Load an encoder that needs more than its name, or return its name."""
    if weights is None and not trust_remote_code:
        return encoder
    import histosge as sge

    return sge.load_encoder(encoder, weights=weights, trust_remote_code=trust_remote_code)
