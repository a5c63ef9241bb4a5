"""What commands share: how they end, what they read and write, and the options that several of them have."""

from __future__ import annotations

import json
import math
import shutil
import sys
import traceback
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from histosge._encoders import DEFAULT_ENCODER
from histosge._settings import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from spatialdata import SpatialData

_TOLD = (ValueError, KeyError, RuntimeError, OSError, ImportError, MemoryError)
"""Errors whose message says what to do; any other is a fault of histosge's, and its traceback is what to report."""
ZARR_MARKS = ("zarr.json", ".zgroup", ".zattrs")
"""One of them is in every store that may be overwritten."""


def _set_verbosity(level: int) -> Callable[[click.Context, click.Parameter, bool], None]:
    def callback(_context: click.Context, _option: click.Parameter, value: bool) -> None:  # noqa: FBT001  click's own
        if value:
            settings.verbosity = level

    return callback


class Command(click.Command):
    """A command that prints what its function returns, and nothing else, on standard output; an error ends it with one line.

    The function returns text, text and an exit code, or nothing.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for flags, level, text in (
            (["-q", "--quiet"], 1, "Say warnings and errors only."),
            (["-v", "--verbose"], 3, "Say details, and where an error comes from."),
        ):
            self.params.append(
                click.Option(flags, is_flag=True, expose_value=False, callback=_set_verbosity(level), help=text)
            )

    def invoke(self, ctx: click.Context) -> None:
        """Run the command."""
        try:
            with redirect_stdout(sys.stderr):  # libraries print, spatialdata's log among them
                told = super().invoke(ctx)
        except (click.Abort, click.exceptions.Exit):  # which are RuntimeErrors
            raise
        except _TOLD as err:
            if settings.verbosity > 2:
                traceback.print_exception(err)
            # a KeyError would print its message in quotes; an error of the system has its number first
            text = err.args[0] if isinstance(err, KeyError) and err.args else err
            click.echo(f"histosge: {' '.join(str(text).split()) or type(err).__name__}", err=True)
            sys.exit(1)
        told, code = told if isinstance(told, tuple) else (told, 0)
        if told is not None:
            click.echo(told)
        ctx.exit(code)


def as_json(told: Any) -> str:
    """Write as JSON that any reader takes: numbers of numpy as numbers, what is no number as null."""
    return json.dumps(_plain(told), indent=1, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def as_table(names: Iterable[Any], rows: Sequence[Sequence[Any]], *, decimals: int | None = None) -> str:
    """Write a table with a line of names; numbers are right-aligned, a dash is nothing."""
    cells = [list(map(str, names)), *([_cell(value, decimals) for value in row] for row in rows)]
    columns = []
    for i, column in enumerate(zip(*cells, strict=True)):
        width = max(map(len, column))
        numbers = any(isinstance(row[i], int | float) for row in rows)
        columns.append([cell.rjust(width) if numbers else cell.ljust(width) for cell in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


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
    sources: Sequence[Path], *, images: Sequence[Path], bin_size: int | None, dataset_id: str | None = None
) -> list[SpatialData]:
    """Read each section, with its image where images are given."""
    import histosge as sge

    if images and len(images) != len(sources):
        msg = f"--image is given {len(images)} times for {len(sources)} sections: give one for each, in the same order."
        raise click.UsageError(msg)
    given: Sequence[Path | None] = images or [None] * len(sources)
    return [
        sge.io.read(source, image=image, bin_size=bin_size, dataset_id=dataset_id)
        for source, image in zip(sources, given, strict=True)
    ]


@contextmanager
def written(*targets: Path | None, overwrite: bool, marks: Sequence[str] = ZARR_MARKS) -> Iterator[list[Path]]:
    """Give names to write to, beside the targets; they become the targets when all is written, and go after an error.

    Parameters
    ----------
    targets
        Files and folders; ``None`` is one that is not asked for, whose name is of no use.
    overwrite
        Replace what is there: a file, or a folder with one of ``marks`` in it, if such was to be written.
    marks
        Names in a folder that make it one of ours.
    """
    wanted = [target for target in targets if target is not None]
    if len({target.resolve() for target in wanted}) < len(wanted):
        msg = f"two of the outputs have one name: {', '.join(map(str, wanted))}. Choose different ones."
        raise ValueError(msg)
    for target in wanted:
        _refuse_foreign(target, overwrite=overwrite, marks=marks)
    fresh = [Path() if target is None else target.with_name(f".part.{target.name}") for target in targets]
    pairs = [(new, target) for new, target in zip(fresh, targets, strict=True) if target is not None]
    try:
        for new, target in pairs:
            try:  # before the work, and not after it
                target.parent.mkdir(parents=True, exist_ok=True)
                _remove(new)  # of a run that was killed
                new.touch()
                _remove(new)
            except OSError as err:
                msg = f"{target} cannot be written: {err.strerror or err}. Choose another folder."
                raise OSError(msg) from err
        yield fresh
        for new, target in pairs:
            # what was there stays until there is something better
            old = target.with_name(f".old.{target.name}")
            _remove(old)
            if target.exists():
                target.rename(old)
            try:
                new.rename(target)
            except BaseException:
                if old.exists():
                    old.rename(target)
                raise
            _remove(old)
    finally:
        for new, _ in pairs:
            with suppress(OSError):  # what went wrong before is what to tell
                _remove(new)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _refuse_foreign(path: Path, *, overwrite: bool, marks: Sequence[str]) -> None:
    """Refuse to write where something is; with ``overwrite``, where that does not look like results of ours."""
    if not path.exists():
        return
    of_ours = any((path / mark).exists() for mark in marks) if path.is_dir() else path.suffix not in ("", ".zarr")
    if not overwrite or not of_ours:
        hint = "pass --overwrite to replace it" if not overwrite else "it does not look like results of histosge"
        msg = f"{path} exists already: {hint}, or choose another name."
        raise FileExistsError(msg)


def refuse_input_as_output(sources: Sequence[Path], target: Path, *, name: str) -> None:
    """Refuse to write over, or around, what is read."""
    for source in sources:
        if source.resolve().is_relative_to(target.resolve()):
            msg = f"{name} is or holds IN ({target}): choose another name, nothing of the input is overwritten."
            raise ValueError(msg)


def held_out_lines(held_out: dict[str, Any]) -> list[str]:
    """Scores of heads, best first, a line each."""
    ranked = sorted(held_out.items(), key=lambda item: -item[1]["pcc"])
    width = max(len(name) for name in held_out)
    return [
        f"  {name:<{width}}  {score['pcc']:.3f}   (mean squared error {score['mse']:.3f})" for name, score in ranked
    ]


# ---------------------------------------------------------------------------------------------------- options


class Level(click.ParamType):
    """A share, or ``none``."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        """Read it."""
        if isinstance(value, float) or value is None:
            return value
        if str(value).lower() == "none":
            return None
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number between 0 and 1, such as 0.9, nor 'none'.", param, ctx)


class Genes(click.ParamType):
    """A number, ``all``, or names with commas."""

    name = "genes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str | list[str]:
        """Read it."""
        if not isinstance(value, str) or value == "all":
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


SOURCE_PATH = click.Path(exists=True, path_type=Path)
OUT_PATH = click.Path(path_type=Path)


def taking(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Give a command these options, in this order."""

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def heads_option(text: str) -> tuple[Callable[[Any], Any], ...]:
    """Arguments of heads."""
    return (click.option("--head-options", type=JsonObject(), metavar="JSON", help=text),)


RAW = (
    click.option(
        "--image",
        "images",
        type=SOURCE_PATH,
        multiple=True,
        metavar="FILE",
        help="The microscope's image, where IN does not hold it; once for each IN.",
    ),
    click.option("--bin-size", type=int, help="Bins of a Visium HD folder to learn from, in µm: 2, 8 or 16."),
)
KEYS = (
    click.option("--image-key", help="H&E image. By default the only one."),
    click.option("--spots-key", help="Measured spots. By default the only ones that a table annotates."),
    click.option("--table-key", help="Table with the counts. By default the only one."),
    click.option("--layer", help="Layer with the counts, or raw. By default X."),
    click.option("--coordinate-system", help="Coordinate system that aligns image and spots."),
    click.option("--mpp", type=float, help="µm per pixel of the image. By default from the pitch of the spots."),
    click.option("--pitch-um", type=float, help="Distance of neighbouring spots in µm. By default the technology's."),
)
ENCODER = (
    click.option(
        "--encoder",
        default=DEFAULT_ENCODER,
        show_default=True,
        help="Encoder, or several as uni+rgb; see `histosge encoders`.",
    ),
    click.option(
        "--weights", type=click.Path(exists=True), metavar="FOLDER", help="Local weights, for machines without network."
    ),
    click.option("--tile-um", type=float, help="Edge of a tile in µm. By default the encoder's own."),
)
LEARN = (
    click.option(
        "--genes", type=Genes(), default=1000, show_default=True, help="Number of genes, 'all', or names with commas."
    ),
    click.option("--n-folds", type=int, default=5, show_default=True, help="Folds of the spots, 2 to 20."),
    click.option(
        "--level",
        type=Level(),
        default=0.9,
        show_default=True,
        help="Share of measurements that the error bars hold, or 'none' for no error bars.",
    ),
)
COMPUTE = (
    click.option("--device", help="cpu, cuda, cuda:1, mps. By default a GPU if there is one."),
    click.option("--batch-size", type=int, default=64, show_default=True, help="Tiles per forward pass."),
    click.option("--rng", "--seed", "rng", type=int, default=0, show_default=True, help="Seed."),
    click.option(
        "--progress/--no-progress", default=None, help="Progress bars. By default where a terminal shows them."
    ),
    click.option("--no-cache", is_flag=True, help="Neither read nor keep embeddings; see `histosge cache`."),
)
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace what an earlier run wrote there.")
JSON = click.option("--json", "as_json_", is_flag=True, help="Tell the result on standard output, as JSON.")


def cache_setting(*, no_cache: bool) -> dict[str, Any]:
    """Settings for ``settings.override``."""
    return {"cache_gb": 0} if no_cache else {}


def with_weights(encoder: str, weights: str | None) -> Any:
    """Load an encoder from a folder, or leave it to be loaded by name."""
    if weights is None:
        return encoder
    import histosge as sge

    return sge.load_encoder(encoder, weights=weights)
