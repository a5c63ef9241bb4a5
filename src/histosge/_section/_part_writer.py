"""Parts of an unfinished store, written by the process that began it or by others that see its folder."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import zarr

from histosge._atomic import naming
from histosge._image import with_zarrs
from histosge._section._claim import LABEL

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

STORE, PARTS = "store.zarr", "parts"
"""In the run folder: the store that is written, and the marks of its parts"""


@dataclass(frozen=True)
class PartWriter:
    """Writes the matrices of a table part by part: a chunk belongs to one part, and a part is marked at the end.

    Two processes may write the same part, since dask repeats the task of a worker that it takes for dead: both write the
    same values, and each chunk in one step.
    """

    path: Path
    """Of the store when it is finished, for messages"""
    run_folder: Path
    """Where it is written"""
    name: str
    """Name of the table"""
    n_rows: int
    part_rows: int

    def rows(self, part: int) -> slice:
        """Rows of a part in the table."""
        return slice(part * self.part_rows, min((part + 1) * self.part_rows, self.n_rows))

    def write(self, part: int, matrices: dict[str, NDArray[np.float32]]) -> None:
        """Write the rows of a part and mark it: all matrices that the store was begun with, by name."""
        self.check()
        rows = self.rows(part)
        n = rows.stop - rows.start
        found = {key: f"{values.dtype} {values.shape}" for key, values in matrices.items()}
        wanted = {key: f"{array.dtype} {(n, *array.shape[1:])}" for key, array in self._matrices.items()}
        if found != wanted:
            msg = f"part {part}: the matrices are {found}, but this part of the store needs {wanted}."
            raise ValueError(msg)
        with naming(self.path):
            for key, values in matrices.items():
                self._matrices[key][rows] = values
        self.check()
        (self.run_folder / PARTS / f"{part:06d}.done").touch()

    def check(self) -> None:
        """Raise where the run folder is not there: on another machine, or since another process has taken it over."""
        if (self.run_folder / LABEL).is_file():
            return
        shutil.rmtree(self.run_folder, ignore_errors=True)  # zarr makes missing folders
        msg = (
            f"store={str(self.path)!r}: its working folder {str(self.run_folder)!r} is not there. On a worker of dask, "
            "the store must lie on a disk that all workers see: choose another store=. Otherwise another process has "
            "taken the work over: let that one finish."
        )
        raise RuntimeError(msg)

    @cached_property
    def _matrices(self) -> dict[str, zarr.Array[Any]]:
        """Arrays to write to: ``zarrs`` encodes them, and nothing looks for empty chunks (docs/benchmarks.md)."""
        group = zarr.open_group(self.run_folder / STORE / "tables" / self.name, mode="r+", use_consolidated=False)
        return {key: with_zarrs(array, write_empty_chunks=True) for key, array in matrices_of(group).items()}


def matrices_of(table: zarr.Group) -> dict[str, Any]:
    """``X`` and layers by name."""
    found = {"X": table["X"]} if "X" in table else {}
    return found | dict(table["layers"].arrays() if "layers" in table else ())  # type: ignore[union-attr]
