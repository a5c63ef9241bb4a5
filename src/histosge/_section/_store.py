"""A table and its shapes written part by part into a ``SpatialData`` store, so that memory does not grow with the rows.

Work is done in ``<store>.partial``; chunks of arrays never straddle parts, and a part is marked only after all of it is
on disk. A run that was killed, however, goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from histosge._section import _rows
from histosge._settings import logger

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame

_MARKER = "histosge-store.json"
"""Says that a folder is ours, and what it is for."""
_SETUP = "setup.json"
_STORE = "store.zarr"
_PARTS = "parts"
_WORK = "work"
_SAMPLE = "sample.parquet"
_FORMAT = 1

_CHUNK = (8192, 128)
"""Rows and genes of a chunk: 4 MB, so that reading one gene reads an eighth of a table of 1000 genes."""
_CHUNK_VALUES = _CHUNK[0] * _CHUNK[1]


@dataclass(frozen=True)
class TableStore:
    """A ``SpatialData`` store written part by part; it gets its name when it is whole."""

    path: Path
    n_rows: int
    part_rows: int
    done: set[int] = field(default_factory=set)
    """Parts that are on disk"""
    _matrices: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """``X`` and layers, open: by ``begin``, since how zarr opens is a setting of all threads"""

    @classmethod
    def open(cls, path: str | Path, *, recipe: dict[str, Any], n_rows: int, part_rows: int) -> TableStore:
        """Begin a store, or go on with one of the same recipe that was left unfinished.

        Parameters
        ----------
        path
            Where the whole store will be. There must be nothing yet.
        recipe
            All that the content depends on: numbers, strings, arrays, nested.
        n_rows
            Rows of the whole table.
        part_rows
            Rows of a part; the last may have fewer.
        """
        path = Path(path)
        for argument, value in (("n_rows", n_rows), ("part_rows", part_rows)):
            if value < 1:
                msg = f"{argument}={value!r}: a store needs at least one row; choose a number from 1."
                raise ValueError(msg)
        _refuse_existing(path)
        store = cls(path, int(n_rows), int(part_rows))
        marker = store._partial / _MARKER
        mine = {"format": _FORMAT, "n_rows": store.n_rows, "part_rows": store.part_rows, "recipe": _plain(recipe)}
        resumed = _is_ours(store._partial, path)
        if resumed:
            _refuse_other(json.loads(marker.read_text(encoding="utf-8")), mine, path=path, partial=store._partial)
        else:
            store._partial.mkdir(parents=True, exist_ok=True)
            _write_json(marker, mine)
        if not store._zarr.exists():  # set up to the end or not at all: what is left of a beginning is worth nothing
            shutil.rmtree(store._partial / _PARTS, ignore_errors=True)
        (store._partial / _PARTS).mkdir(exist_ok=True)
        store.folder.mkdir(exist_ok=True)
        store.done.update(int(mark.stem) for mark in (store._partial / _PARTS).glob("*.done"))
        if resumed:
            logger.info("resuming %s: %d of %d parts are there", path.name, len(store.done), store.n_parts)
        return store

    @property
    def n_parts(self) -> int:
        """Number of parts."""
        return -(-self.n_rows // self.part_rows)

    @property
    def n_rows_left(self) -> int:
        """Rows of the parts that are not on disk."""
        left = [self.rows(part) for part in range(self.n_parts) if part not in self.done]
        return sum(rows.stop - rows.start for rows in left)

    @property
    def folder(self) -> Path:
        """A folder for what the run must find again; it goes when the store is finished."""
        return self._partial / _WORK

    @property
    def _partial(self) -> Path:
        return self.path.with_name(f"{self.path.name}.partial")

    @property
    def _zarr(self) -> Path:
        return self._partial / _STORE

    def rows(self, part: int) -> slice:
        """Rows of a part in the whole table."""
        if not 0 <= part < self.n_parts:
            msg = f"part={part!r}: this store has the parts 0 to {self.n_parts - 1}."
            raise IndexError(msg)
        return slice(part * self.part_rows, min((part + 1) * self.part_rows, self.n_rows))

    def begin(
        self,
        table: AnnData,
        *,
        name: str,
        shapes_key: str,
        shapes: GeoDataFrame | None = None,
        shapes_whole: GeoDataFrame | None = None,
    ) -> None:
        """Set the store up from one of its parts; where that was done before, only compare.

        Parameters
        ----------
        table
            Any part. Its ``var``, ``varm`` and ``uns`` are those of the whole, its columns, layers and types those of
            every part.
        name
            Name of the table.
        shapes_key
            Name of the shapes that the table annotates.
        shapes
            Shapes of the part, if they are written part by part.
        shapes_whole
            All shapes, if they are written now.
        """
        if (shapes is None) == (shapes_whole is None):
            given = "neither" if shapes is None else "both"
            msg = f"shapes=, shapes_whole=: pass one of them, not {given}; shapes= where each part brings its own."
            raise ValueError(msg)
        sample = _rows.first_row(table)
        setup: dict[str, Any] = {
            "name": name,
            "shapes_key": shapes_key,
            "shapes": "in parts" if shapes is not None else "whole",
            "layout": _rows.layout(sample, _rows.held(sample)),
        }
        if self._zarr.exists():
            before = self._setup()
            _rows.refuse_other_layout(before.pop("layout"), setup.pop("layout"), of="this run's table")
            other = [key for key, value in setup.items() if before[key] != value]
            if other:
                there = ", ".join(f"{key}={setup[key]!r} (there: {before[key]!r})" for key in other)
                msg = f"{self._partial} was begun otherwise: {there}. Finish that run, or remove the folder."
                raise ValueError(msg)
            self._matrices.update(_rows.writable(self._zarr / "tables", name))
            return
        from spatialdata import SpatialData

        draft = self._partial / f"{_STORE}.tmp"
        shutil.rmtree(draft, ignore_errors=True)
        # one row tells the installed version's format; every array of rows is replaced by one of full length
        element = shapes.iloc[:1] if shapes is not None else shapes_whole
        with _rows.quiet():
            SpatialData(shapes={shapes_key: element}, tables={name: sample}).write(
                draft, consolidate_metadata=False, update_sdata_path=False
            )
            group = zarr.open_group(draft / "tables" / name, mode="r+", use_consolidated=False)
            for key in _rows.row_arrays(group):
                self._lengthen(group, key)
        if shapes is not None:
            geo = _rows.geo(draft / "shapes" / shapes_key / "shapes.parquet")
            encoding = geo["columns"][geo["primary_column"]]["encoding"]
            setup["geometry_encoding"] = "WKB" if encoding == "WKB" else "geoarrow"
            _rows.write_shapes(self._partial / _SAMPLE, shapes.iloc[:1], encoding=setup["geometry_encoding"])
        _write_json(self._partial / _SETUP, setup)
        draft.rename(self._zarr)
        self._matrices.update(_rows.writable(self._zarr / "tables", name))

    def write(self, part: int, table: AnnData, *, shapes: GeoDataFrame | None = None) -> None:
        """Write the rows of a part, and its shapes if they are written part by part.

        Parameters
        ----------
        part
            Which part.
        table
            Its rows. ``uns``, ``var`` and ``varm`` are not read: those of the part that began the store hold.
        shapes
            Its shapes.
        """
        rows = self.rows(part)
        if part in self.done:
            msg = f"part={part} is written already; write only those that are not in `done`."
            raise ValueError(msg)
        setup = self._setup()
        wanted = rows.stop - rows.start
        for what, n in (("table", table.n_obs), ("shapes", wanted if shapes is None else len(shapes))):
            if n != wanted:
                msg = f"part {part}: its {what} has {n} rows, but the part has {wanted} ({rows.start} to {rows.stop - 1})."
                raise ValueError(msg)
        if (shapes is not None) != (setup["shapes"] == "in parts"):
            told = "are written in parts: pass" if shapes is None else "were written whole: leave out"
            msg = f"part {part}: the shapes {setup['shapes_key']!r} of this store {told} shapes=."
            raise ValueError(msg)
        held, matrices = _rows.held(table), _rows.matrices(table)
        layout = _rows.layout(table, held)
        _rows.refuse_other_layout(setup["layout"], layout, of=f"part {part}")
        group = zarr.open_group(self._zarr / "tables" / setup["name"], mode="r+", use_consolidated=False)
        for key in [key for key in layout if key not in {"obs", "var"}]:
            values: Any = matrices[key] if _rows.is_matrix(key) else held[key]
            target: Any = self._matrices.get(key, group[key])
            target[rows] = values[:]
        if shapes is not None:
            self._write_part_of_shapes(part, shapes, encoding=setup["geometry_encoding"])
        self._part(part, "done").touch()
        self.done.add(part)

    def finish(self) -> Path:
        """Give the whole store its name and remove what was only needed on the way."""
        missing = [part for part in range(self.n_parts) if part not in self.done]
        if missing:
            msg = (
                f"{self.path.name}: {len(missing)} of {self.n_parts} parts are missing (the first is {missing[0]}); "
                "write them before finish()."
            )
            raise RuntimeError(msg)
        _refuse_existing(self.path)
        setup = self._setup()
        if setup["shapes"] == "in parts":
            parts = [self._part(part, "parquet") for part in range(self.n_parts)]
            joined = self._partial / "shapes.parquet"
            _rows.join(parts, sample=self._partial / _SAMPLE, target=joined)
            joined.replace(self._zarr / "shapes" / setup["shapes_key"] / "shapes.parquet")
        for torn in self._zarr.rglob("*.partial"):  # zarr's own: chunks in the making when a run was killed
            if torn.is_file():
                torn.unlink()
        with _rows.quiet():
            zarr.consolidate_metadata(zarr.storage.LocalStore(self._zarr))
        self._zarr.rename(self.path)
        # the marker goes last, lest a run that is killed here leaves a folder that seems not ours
        for inside in self._partial.iterdir():
            if inside.is_dir():
                shutil.rmtree(inside)
            elif inside.name != _MARKER:
                inside.unlink()
        shutil.rmtree(self._partial)
        return self.path

    def _setup(self) -> dict[str, Any]:
        """What was fixed by ``begin``."""
        if not self._zarr.exists():
            msg = f"{self.path.name} is not set up; call begin() with a part first."
            raise RuntimeError(msg)
        return dict(json.loads((self._partial / _SETUP).read_text(encoding="utf-8")))

    def _part(self, part: int, suffix: str) -> Path:
        return self._partial / _PARTS / f"{part:06d}.{suffix}"

    def _lengthen(self, group: zarr.Group, key: str) -> None:
        """Replace an array of one row by one of all rows, whose chunks belong to one part each."""
        from zarr.codecs import BloscCodec, ZstdCodec

        old: Any = group[key]
        rows, width = min(self.part_rows, self.n_rows), max(math.prod(old.shape[1:]), 1)
        wanted = _CHUNK[0] if _rows.is_matrix(key) else _CHUNK_VALUES // width
        n_rows = _rows.chunk_rows(rows, wanted=max(wanted, 1), whole=self.n_parts == 1)
        rest = (min(width, _CHUNK[1], max(_CHUNK_VALUES // n_rows, 1)),) if _rows.is_matrix(key) else old.shape[1:]
        numeric = old.dtype.kind in "fiu" and old.dtype.itemsize > 1
        dtype, fill, attributes = old.metadata.data_type, old.fill_value, old.attrs.asdict()
        del group[key]
        group.create_array(
            key,
            shape=(self.n_rows, *old.shape[1:]),
            chunks=(n_rows, *rest),
            dtype=dtype,
            fill_value=fill,
            # measured on random float32: as small as zstd and half as fast again
            compressors=BloscCodec(cname="lz4", clevel=5, shuffle="shuffle") if numeric else ZstdCodec(level=1),
            attributes=attributes,
        )

    def _write_part_of_shapes(self, part: int, shapes: GeoDataFrame, *, encoding: str) -> None:
        """Write a part's shapes to a file of their own; all files are joined at the end."""
        import pyarrow.parquet as pq

        target = self._part(part, "parquet")
        draft = target.with_suffix(".tmp")
        _rows.write_shapes(draft, shapes, encoding=encoding)
        wanted, found = pq.read_schema(self._partial / _SAMPLE), pq.read_schema(draft)
        if not found.equals(wanted):
            columns = [dict(zip(schema.names, map(str, schema.types), strict=True)) for schema in (found, wanted)]
            msg = f"part {part}: its shapes have the columns {columns[0]}, but those that began the store {columns[1]}."
            raise ValueError(msg)
        draft.replace(target)


# -- the partial folder


def _refuse_existing(path: Path) -> None:
    if path.exists() or path.is_symlink():
        msg = f"store={str(path)!r} exists already; choose another store=, or remove it first."
        raise FileExistsError(msg)


def _is_ours(partial: Path, path: Path) -> bool:
    """Whether there is a run to go on with; a folder that is not ours is an error."""
    if (partial / _MARKER).is_file():
        return True
    if not partial.exists():
        return False
    if not partial.is_dir() or any(inside.name != f"{_MARKER}.tmp" for inside in partial.iterdir()):
        msg = (
            f"store={str(path)!r}: work would be done in {str(partial)!r}, which exists and is not histosge's "
            f"(there is no {_MARKER} in it). Move it away, or choose another store=."
        )
        raise FileExistsError(msg)
    return False


def _refuse_other(there: dict[str, Any], mine: dict[str, Any], *, path: Path, partial: Path) -> None:
    """Raise where an unfinished run was begun with another recipe."""
    before, now = _flat(there), _flat(mine)
    absent = "absent"
    other = [key for key in sorted(before | now) if before.get(key, absent) != now.get(key, absent)]
    if other:
        told = "; ".join(
            f"{key.removeprefix('recipe.')} is {_brief(now.get(key, absent))}, was {_brief(before.get(key, absent))}"
            for key in other
        )
        msg = (
            f"store={str(path)!r}: {str(partial)!r} holds an unfinished run of another recipe ({told}). "
            "Finish that run with its own arguments, or remove the folder to begin anew."
        )
        raise ValueError(msg)


def _brief(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."


def _flat(nested: Any, at: str = "") -> dict[str, str]:
    """Leaves of nested dictionaries as JSON, by their dotted path."""
    if not isinstance(nested, dict) or (at and not nested):
        return {at: json.dumps(nested)}
    leaves: dict[str, str] = {}
    for key, value in nested.items():
        leaves |= _flat(value, f"{at}.{key}" if at else key)
    return leaves


def _plain(value: Any) -> Any:
    """Reduce a recipe to what JSON knows, so that equal ones are equal text: 8.0 is 8, a tuple or an array is a list."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | int | float):
        return value
    msg = (
        f"recipe: {value!r} is a {type(value).__name__}; a recipe is made of numbers, strings, arrays, lists and "
        "dictionaries."
    )
    raise TypeError(msg)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is there wholly or not at all."""
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_text(json.dumps(content, indent=1), encoding="utf-8")
    draft.replace(path)
