"""A table and its shapes in a ``SpatialData`` store, whose matrices are written part by part.

Only the matrices (``X`` and layers) are large. All else is written first, whole, by spatialdata itself, so that the
format is that of the installed version. The matrices are written by rows, so that memory does not grow with them: a
chunk belongs to one part, and a part is marked when all of it is on disk. The work is done in ``<store>.partial``, by
one process at a time, and the store gets its name last. A run that was killed continues after the parts that are
marked.
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import zarr

from histosge import _keys
from histosge._atomic import naming, replacing
from histosge._remote import Remote, located
from histosge._section._claim import Claim
from histosge._section._part_writer import PARTS, STORE, PartWriter
from histosge._section._upload import Upload
from histosge._settings import logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from geopandas import GeoDataFrame
    from numpy.typing import NDArray

    from histosge._remote import Place

_MARKER = "histosge-store.json"
"""Holds what the run depends on."""
_WORK = "work"
_FORMAT = 3

_CHUNK = (8192, 128)
"""Rows and genes of a chunk: 4 MB, so that reading one gene reads an eighth of a table of 1000 genes."""


@dataclass(frozen=True)
class TableStore:
    """A ``SpatialData`` store written part by part; it gets its name when it is complete.

    As a context, it lets the next process continue at the end, also after an error.
    """

    path: Path
    name: str
    """Name of the table"""
    n_rows: int
    part_rows: int
    _claim: Claim = field(repr=False, compare=False)
    upload: Upload | None = None
    """Where the store goes when it is complete, if not to ``path``"""
    done: set[int] = field(default_factory=set)
    """Parts that are on disk"""

    @classmethod
    def open(cls, path: Place, *, name: str, params: dict[str, Any], n_rows: int, part_rows: int) -> TableStore:
        """Start a store, or continue one with the same arguments that is not finished.

        Parameters
        ----------
        path
            The store, or its URL. There must be nothing yet.
        name
            Name of the table.
        params
            All that the content depends on: numbers, strings, arrays, nested.
        n_rows
            Rows of the table.
        part_rows
            Rows of a part; the last may have fewer.
        """
        for argument, value in (("n_rows", n_rows), ("part_rows", part_rows)):
            if value < 1:
                msg = f"{argument}={value!r}: a store needs at least one row; choose a number from 1."
                raise ValueError(msg)
        run = {"format": _FORMAT, "table": name, "n_rows": n_rows, "part_rows": part_rows, "params": params}
        text = json.dumps(run, default=_for_json, indent=1)
        place, upload = located(path), None
        if isinstance(place, Remote):
            upload = Upload.to(place)
            path = upload.local
        else:
            _keys.check_output("store", str(path), endings=("", ".zarr"))
            path = place
        _refuse_existing(path, upload)
        store = cls(path, name, n_rows, part_rows, _claim_of(path, upload), upload)
        try:
            _refuse_existing(path, upload)  # another process may just have finished it
            store._resume(text)
            if upload is not None:
                upload.reserve(store.folder)
        except BaseException as err:
            store.__exit__(type(err), err, None)
            raise
        return store

    def _resume(self, text: str) -> None:
        """Read what an unfinished run has left, or start."""
        marker = self._run_folder / _MARKER
        resumed = marker.is_file()
        if resumed:
            self._refuse_other_run(json.loads(text))
        else:
            with replacing(marker) as draft:
                draft.write_text(text, encoding="utf-8")
        if not self.begun:  # marks without arrays: the finished store was renamed, and is gone
            shutil.rmtree(self._run_folder / PARTS, ignore_errors=True)
        for folder in (self._run_folder / PARTS, self.folder):
            folder.mkdir(exist_ok=True)
        self.done.update(int(mark.stem) for mark in (self._run_folder / PARTS).glob("*.done"))
        if resumed:
            logger.info("resuming %s: %d of %d parts are there", self.path.name, len(self.done), self.n_parts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, at: object) -> None:
        try:
            if isinstance(err, Exception):
                self._claim.check()  # the reason of all other errors
        finally:
            self.close()

    def close(self) -> None:
        """Let the next process continue."""
        self._claim.release()

    @property
    def begun(self) -> bool:
        """Whether all but the matrices is on disk."""
        return self._zarr.exists()

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
        """A folder for what a resumed run needs; it is removed when the store is finished."""
        return self._run_folder / _WORK

    @property
    def _run_folder(self) -> Path:
        return self._claim.folder

    @property
    def _zarr(self) -> Path:
        return self._run_folder / STORE

    @cached_property
    def writer(self) -> PartWriter:
        """Writes parts, in this process or in another that sees the folder."""
        return PartWriter(self.path, self._run_folder, self.name, self.n_rows, self.part_rows)

    def rows(self, part: int) -> slice:
        """Rows of a part in the table."""
        return self.writer.rows(part)

    def begin(self, table: AnnData, *, shapes: dict[str, GeoDataFrame], matrices: Sequence[str]) -> None:
        """Write all but the matrices.

        Parameters
        ----------
        table
            The table of all rows, without ``X`` and layers.
        shapes
            The shapes that it annotates, by name.
        matrices
            ``"X"`` and names of layers: (n_rows, genes) float32 each, to be written part by part.
        """
        from spatialdata import SpatialData

        if table.n_obs != self.n_rows:
            msg = f"table: it has {table.n_obs} rows, but the store has {self.n_rows}. Pass the table of all parts."
            raise ValueError(msg)
        self._claim.check()
        draft = self._run_folder / f"{STORE}.tmp"
        shutil.rmtree(draft, ignore_errors=True)
        with (
            naming(self.path),
            warnings.catch_warnings(action="ignore"),
        ):  # of spatialdata, anndata and zarr, about their own formats
            SpatialData(shapes=shapes, tables={self.name: table}).write(
                draft, consolidate_metadata=False, update_sdata_path=False
            )
            group = zarr.open_group(draft / "tables" / self.name, mode="r+", use_consolidated=False)
            for key in matrices:
                self._create(group if key == "X" else group.require_group("layers"), key, n_genes=table.n_vars)
        draft.rename(self._zarr)

    def write(self, part: int, matrices: dict[str, NDArray[np.float32]]) -> None:
        """Write the rows of a part: all matrices that the store was begun with, by name."""
        if part in self.done:
            msg = f"part={part} is on disk already; write only parts that are not in `done`."
            raise ValueError(msg)
        self._claim.check()
        self.writer.write(part, matrices)
        self.written(part)

    def written(self, part: int) -> None:
        """Note that a part is on disk, by :attr:`writer` in this process or another."""
        self._claim.check()
        self.done.add(part)

    def finish(self, *, progress: bool | None = None) -> Path | Remote:
        """Give the complete store its name, or copy it to its URL, and remove what only the run needed."""
        missing = [part for part in range(self.n_parts) if part not in self.done]
        if missing:
            msg = (
                f"{self.path.name}: {len(missing)} of {self.n_parts} parts are missing (the first is {missing[0]}); "
                "write them before finish()."
            )
            raise RuntimeError(msg)
        _refuse_existing(self.path, self.upload)
        self._claim.check()
        for torn in self._zarr.rglob("*.partial"):  # zarr's own drafts of chunks, where a run was killed
            torn.unlink()
        with warnings.catch_warnings(action="ignore"):
            zarr.consolidate_metadata(zarr.storage.LocalStore(self._zarr))
        if self.upload is None:
            self._zarr.rename(self.path)
            self._claim.remove()
            return self.path
        self.upload.copy(self._zarr, self.folder, progress=progress)
        self._claim.remove()
        self.upload.release()
        return self.upload.remote

    def _create(self, parent: zarr.Group, key: str, *, n_genes: int) -> None:
        """Create an empty matrix, whose chunks belong to one part each."""
        import anndata as ad
        from zarr.codecs import BloscCodec

        # one row, for the attributes that the installed anndata writes
        ad.io.write_elem(parent, key, np.zeros((1, n_genes), np.float32))
        attributes = parent[key].attrs.asdict()
        del parent[key]
        # a whole number of chunks makes a part
        divisors = [n for n in range(1, self.part_rows + 1) if self.part_rows % n == 0]
        n_rows = min(min(divisors, key=lambda n: abs(math.log(n / _CHUNK[0]))), self.n_rows)
        parent.create_array(
            key,
            shape=(self.n_rows, n_genes),
            chunks=(n_rows, min(n_genes, _CHUNK[1], max(math.prod(_CHUNK) // n_rows, 1))),
            dtype=np.float32,
            fill_value=0,
            # measured on random float32: as small as zstd and half as fast again
            compressors=BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"),
            attributes=attributes,
        )

    def _refuse_other_run(self, run: dict[str, Any]) -> None:
        """Raise where the run that is not finished has other arguments or data."""
        old, new = _leaves(json.loads((self._run_folder / _MARKER).read_text(encoding="utf-8"))), _leaves(run)
        differs = [
            f"{key.removeprefix('params.')} is {_text(new, key)}, was {_text(old, key)}"
            for key in sorted(old | new)
            if key not in old or key not in new or old[key] != new[key]
        ]
        if differs:
            msg = (
                f"store={_shown(self.path, self.upload)!r}: {str(self._run_folder.parent)!r} holds an unfinished run with other arguments or "
                f"data ({'; '.join(differs)}). Finish that run with its own arguments, or remove the folder to start "
                "anew."
            )
            raise ValueError(msg)


def _claim_of(path: Path, upload: Upload | None) -> Claim:
    home = path.with_name(f"{path.name}.partial")
    return Claim(home, what=f"store={_shown(path, upload)!r}", remedy="choose another store=")


def _refuse_existing(path: Path, upload: Upload | None) -> None:
    """Raise where the store is there; first remove what a run has left that was killed just after it finished."""
    if not (path.exists() or path.is_symlink() if upload is None else upload.exists()):
        return
    if path.with_name(f"{path.name}.partial").is_dir():
        # else somebody works there, or it is not ours
        with suppress(OSError, RuntimeError), _claim_of(path, upload) as claim:
            unfinished = (claim.folder / STORE).exists() or not any(claim.folder.glob(f"{PARTS}/*.done"))
            copied = upload is not None and upload.is_ours(claim.folder / _WORK)
            if copied or not unfinished or not (claim.folder / _MARKER).exists():
                claim.remove()
                if upload is not None and copied:
                    upload.release()
    msg = f"store={_shown(path, upload)!r} exists already; choose another store=, or remove it first."
    raise FileExistsError(msg)


def _shown(path: Path, upload: Upload | None) -> str:
    return str(path) if upload is None else str(upload.remote)


def _leaves(nested: Any, at: str = "") -> dict[str, Any]:
    """Leaves of nested dictionaries by their dotted path."""
    if not isinstance(nested, dict) or not nested:
        return {at: nested}
    inner = [_leaves(value, f"{at}.{key}" if at else key) for key, value in nested.items()]
    return {path: leaf for leaves in inner for path, leaf in leaves.items()}


def _text(leaves: dict[str, Any], key: str) -> str:
    text = json.dumps(leaves[key]) if key in leaves else "absent"
    return text if len(text) <= 40 else f"{text[:37]}..."


def _for_json(value: Any) -> Any:
    """What JSON does not know: arrays become lists, paths text."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    msg = f"params: {value!r} is a {type(value).__name__}; params are numbers, strings, arrays, lists and dictionaries."
    raise TypeError(msg)
