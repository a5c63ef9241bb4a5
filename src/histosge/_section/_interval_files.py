"""Prediction intervals of a table on disk, computed a few rows at a time: memory does not grow with the table."""

from __future__ import annotations

import json
import shutil
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from histosge import _keys
from histosge._atomic import replacing
from histosge._section._claim import scratch
from histosge._section._intervals import columns_of, intervals_of, predicted_values, refuse_foreign_layers
from histosge._settings import progress_bar, settings
from histosge._statistics import interval_around

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

_ENCODING: dict[str, Any] = {"encoding-type": "array", "encoding-version": "0.2.0"}
"""What anndata writes with an array."""
_LEVEL = f"uns/{_keys.UNS}/intervals/level"


def write_interval_layers(
    path: Path, *, key: str, level: float, genes: str | Sequence[str] | None = None, progress: bool | None = None
) -> tuple[float, int]:
    """Write the layers ``sd``, ``lower`` and ``upper`` into a zarr store or an h5ad file.

    They are computed outside first, in a folder next to a store or in a copy of a file, so that an interrupted run
    leaves the input as it was.

    Parameters
    ----------
    path
        A ``SpatialData`` store, or a store or file of one table.
    key
        Table of a ``SpatialData``; not used for one table.
    level, genes
        See :func:`histosge.tl.intervals`.
    progress
        Whether to show a progress bar.

    Returns
    -------
    The level that was used, and the number of genes.
    """
    from h5py import is_hdf5

    write = _write_zarr if path.is_dir() else _write_h5ad
    if not path.is_dir() and not is_hdf5(path):
        msg = f"{path} is neither a zarr store nor an HDF5 file: pass what `histosge predict` wrote, .zarr or .h5ad."
        raise ValueError(msg)
    with _quiet(), scratch(path, what=f"{path}: intervals") as folder:
        job = write(path, folder / path.name, key=key, level=level, genes=genes, progress=progress)
    return job.level, job.n_genes


@dataclass(frozen=True)
class _Job:
    """What is computed from what."""

    matrix: Any
    """``X`` on disk, (n, g)"""
    numbers: NDArray[np.float32]
    """(5, g) of the level, NaN for other genes"""
    level: float
    n_genes: int

    @classmethod
    def of(cls, group: Any, name: str, *, level: float, genes: str | Sequence[str] | None) -> Self:
        """Read what is needed of a table, and refuse what cannot be done."""
        import anndata as ad

        parts = {part: ad.io.read_elem(group[part]) for part in ("var", "varm") if part in group}
        uns = {_keys.UNS: ad.io.read_elem(group[f"uns/{_keys.UNS}"])} if f"uns/{_keys.UNS}" in group else {}
        table = ad.AnnData(**parts, uns=uns)
        kept = intervals_of(table, name)
        matrix = group.get("X")
        if getattr(matrix, "ndim", 0) != 2:
            msg = (
                f"{name} has no dense X, which intervals are computed around. Read it, and use sge.tl.intervals(table) "
                "in Python."
            )
            raise ValueError(msg)
        refuse_foreign_layers(group.get("layers", ()), uns, name)
        level = kept.choose_level(level)
        columns = columns_of(table, genes, name)
        numbers = np.full((5, table.n_vars), np.nan, np.float32)
        numbers[:, columns] = kept.at(level)[:, columns]
        return cls(matrix, numbers, level, len(columns))

    def fill(self, layers: Sequence[Any], *, progress: bool | None) -> None:
        """Compute the layers, a few rows at a time."""
        n = self.matrix.shape[0]
        of_chunk = (self.matrix.chunks or (1,))[0]
        step = max(settings.part_rows // of_chunk, 1) * of_chunk
        with progress_bar(desc="intervals", total=n, unit="row", show=progress) as bar:
            for start in range(0, n, step):
                rows = slice(start, min(start + step, n))
                for layer, values in zip(
                    layers, interval_around(predicted_values(self.matrix[rows]), self.numbers), strict=True
                ):
                    layer[rows] = values
                bar.update(rows.stop - start)


def _write_zarr(path: Path, draft: Path, *, key: str, progress: bool | None, **options: Any) -> _Job:
    import zarr

    inner = _find_table(path, key)
    group: Any = zarr.open_group(inner, mode="r+", use_consolidated=False)
    job = _Job.of(group, str(path) if inner == path else f"table {key!r} of {path}", **options)
    old = job.matrix
    like = {"shape": old.shape, "chunks": old.chunks, "dtype": np.float32, "compressors": old.compressors}
    fresh = zarr.open_group(draft, mode="w", zarr_format=group.metadata.zarr_format)
    layers = [fresh.create_array(name, attributes=_ENCODING, **like) for name in _keys.INTERVAL_LAYERS]
    job.fill(layers, progress=progress)
    _commit(path, inner, draft, group=group, level=job.level)
    return job


def _commit(path: Path, inner: Path, draft: Path, *, group: Any, level: float) -> None:
    """Put the layers in their place. A run that is killed in between leaves fewer layers, and none of another level.

    Every step takes something out of the draft or puts something into it: a process that lost it to another one stops.
    """
    import anndata as ad
    import zarr

    consolidated = [folder for folder in dict.fromkeys((inner, inner.parent, path)) if _is_consolidated(folder)]
    old = [name for name in _keys.INTERVAL_LAYERS if (inner / "layers" / name).exists()]
    if old:  # zarr reads zeros where the list of a folder names an array that is gone
        for folder in consolidated:
            _forget_below(folder)
    for name in old:
        (inner / "layers" / name).rename(draft / f"old-{name}")
    _write_level(group, level)  # first: layers without it would not be known as ours
    if "layers" not in group:
        ad.io.write_elem(group, "layers", {})
    for name in _keys.INTERVAL_LAYERS:
        (draft / name).rename(inner / "layers" / name)
    for folder in consolidated:  # each may list all that is below it
        zarr.consolidate_metadata(zarr.storage.LocalStore(folder))


def _write_h5ad(path: Path, draft: Path, *, key: str, progress: bool | None, **options: Any) -> _Job:
    import anndata as ad
    import h5py

    with h5py.File(path) as file:
        _Job.of(file, str(path), **options)  # refuse before the file is copied
    shutil.copyfile(path, draft)
    with h5py.File(draft, "r+") as file:
        job = _Job.of(file, str(path), **options)
        like = {"shape": job.matrix.shape, "chunks": job.matrix.chunks, "dtype": np.float32}
        if "layers" not in file:
            ad.io.write_elem(file, "layers", {})
        layers = []
        for name in _keys.INTERVAL_LAYERS:
            if name in file["layers"]:
                del file["layers"][name]
            layers.append(file["layers"].create_dataset(name, compression=job.matrix.compression, **like))
            layers[-1].attrs.update(_ENCODING)
        job.fill(layers, progress=progress)
        _write_level(file, job.level)
    draft.replace(path)
    return job


def _write_level(group: Any, level: float) -> None:
    """Write the level of the layers into ``uns``; anndata takes no path as a key."""
    import anndata as ad

    parent, _, name = _LEVEL.rpartition("/")
    ad.io.write_elem(group[parent], name, level)


def _find_table(path: Path, key: str) -> Path:
    """Folder of the table: that of a ``SpatialData``, or the store itself."""
    tables = path / "tables"
    if not tables.is_dir():
        return path
    there = sorted(folder.name for folder in tables.iterdir() if folder.is_dir())
    if key not in there:
        msg = f"key={key!r} is not among the tables of {path}: {there}."
        raise KeyError(msg)
    return tables / key


def _is_consolidated(folder: Path) -> bool:
    """Whether a group keeps a copy of the metadata of what is below it."""
    file = folder / "zarr.json"
    new = file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("consolidated_metadata") is not None
    return new or (folder / ".zmetadata").is_file()


def _forget_below(folder: Path) -> None:
    """Remove a group's copy of the metadata of what is below it."""
    (folder / ".zmetadata").unlink(missing_ok=True)
    file = folder / "zarr.json"
    if file.is_file():
        own = json.loads(file.read_text(encoding="utf-8"))
        own.pop("consolidated_metadata", None)
        with replacing(file) as draft:
            draft.write_text(json.dumps(own, indent=2), encoding="utf-8")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what nobody can change: strings and metadata that zarr has no specification of, shards to come."""
    import zarr

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="zarr v3 autosharding")
        warnings.filterwarnings("ignore", category=zarr.errors.UnstableSpecificationWarning)
        warnings.filterwarnings("ignore", category=zarr.errors.ZarrUserWarning)
        yield
