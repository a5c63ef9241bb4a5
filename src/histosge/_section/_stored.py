"""Finished stores, on this machine or at a URL, opened for reading."""

from __future__ import annotations

import asyncio
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import zarr
from zarr.storage import FsspecStore

from histosge import _keys
from histosge._remote import ABOUT, Remote, again_async, located, shown
from histosge._section._part_writer import matrices_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from anndata import AnnData
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

    from histosge._remote import Place


class RetryingStore(FsspecStore):
    """A zarr store at a URL that is read several times where reading fails, and whose errors name the URL."""

    remote: Remote

    @classmethod
    def at(cls, remote: Remote) -> RetryingStore:
        """Open a store for reading."""
        _ = remote.fs  # raise where there is no such file system
        store = cast("RetryingStore", cls.from_url(remote.url, storage_options=remote.options, read_only=True))
        store.remote = remote
        return store

    def with_read_only(self, read_only: bool = False) -> RetryingStore:  # noqa: FBT001, FBT002  by zarr
        """Return the same store, for reading or not."""
        store = cast("RetryingStore", super().with_read_only(read_only))
        store.remote = self.remote
        return store

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Read a file, or a part of it."""
        try:
            return await again_async(
                lambda: super(RetryingStore, self).get(key, prototype, byte_range), self.remote / key, "read"
            )
        except PermissionError:
            if not key.endswith(ABOUT) and await asyncio.to_thread(lambda: self.remote.hides_missing):
                return None
            raise

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Read parts of files."""
        return await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges))


def open_group(place: Place, path: str = "") -> zarr.Group:
    """Open a group of a store for reading; ``FileNotFoundError`` where there is none."""
    where = located(place)
    if not isinstance(where, Remote):
        return zarr.open_group(where, mode="r", path=path)
    store = RetryingStore.at(where)
    try:  # one format after the other: some servers refuse access to files that do not exist
        return zarr.open_group(store, mode="r", path=path, zarr_format=3)
    except (FileNotFoundError, zarr.errors.GroupNotFoundError):
        return zarr.open_group(store, mode="r", path=path, zarr_format=2)


def open_table(place: Place, name: str) -> AnnData:
    """Open a table of a store with ``X`` and layers left where they are (dask), and all else in memory.

    Parameters
    ----------
    place
        The ``SpatialData`` store, or its URL.
    name
        Name of the table.
    """
    import anndata as ad
    import dask.array as da

    try:
        tables = dict(open_group(place, "tables").groups())
    except (FileNotFoundError, zarr.errors.GroupNotFoundError):
        tables = {}
    if name not in tables:
        msg = f"name={name!r} is not among the tables of {shown(place)!r}: {sorted(tables)}."
        raise KeyError(msg)
    table = open_group(place, f"tables/{name}")
    lazy = {key: da.from_zarr(array) for key, array in matrices_of(table).items()}
    rest = {key: ad.io.read_elem(table[key]) for key in ("obs", "var", "obsm", "varm", "uns")}
    return ad.AnnData(X=lazy.pop("X", None), layers=lazy, **rest)


@dataclass(frozen=True)
class StoredProvenance:
    """What a finished store says about its table."""

    n_targets: int
    n_genes: int
    uns: dict[str, Any]


def read_provenance(place: Place, name: str) -> StoredProvenance:
    """Read the shape and the provenance of a table of a finished store, and nothing else."""
    import anndata as ad

    with warnings.catch_warnings(action="ignore"):
        group = open_group(place, f"tables/{name}")
        n_targets, n_genes = matrices_of(group)["X"].shape
        return StoredProvenance(n_targets, n_genes, ad.io.read_elem(group[f"uns/{_keys.UNS}"]))
