"""A ``SpatialData`` store at a URL → ``SpatialData``, with images left there.

spatialdata (0.7) reads local folders only. So all but the pixels is copied to a temporary folder and read from there by
spatialdata itself: metadata, tables and shapes, which it holds in memory anyway. Then the arrays of images and labels
are replaced by those at the URL, which are read chunk by chunk.
"""

from __future__ import annotations

import itertools
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zarr

from histosge._remote import ABOUT, ZARR_MARKS, again
from histosge._section import open_group
from histosge._settings import logger

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from spatialdata import SpatialData

    from histosge._remote import Remote

_RASTER = ("images", "labels")
_WHOLE = ("shapes", "tables")
_AT_ONCE = 16
"""Files that are copied at the same time"""


def read_remote_zarr(remote: Remote) -> SpatialData:
    """Read a section from a URL."""
    import spatialdata as sd

    root = _open_root(remote)
    nodes = dict(root.members(max_depth=None))
    left_out = sorted(name for name in nodes if name.startswith("points/") and name.count("/") == 1)
    if left_out:
        logger.warning("%s: left out %s, which are not read from a URL", remote, ", ".join(left_out))
    with tempfile.TemporaryDirectory(prefix="histosge-") as folder:
        _copy(remote, _files(nodes, root.metadata.zarr_format), Path(folder))
        found = sd.read_zarr(folder, selection=(*_RASTER, *_WHOLE))  # type: ignore[arg-type]
    raster = {
        kind: {name: _from_url(element, root[f"{kind}/{name}"]) for name, element in getattr(found, kind).items()}
        for kind in _RASTER
    }
    return sd.SpatialData(**raster, shapes=dict(found.shapes), tables=dict(found.tables), attrs=found.attrs)


def _open_root(remote: Remote) -> zarr.Group:
    """Open the root; raise where there is no zarr store, or where its elements cannot be known."""
    try:
        root = open_group(remote)
    except (FileNotFoundError, zarr.errors.GroupNotFoundError) as err:
        msg = (
            f"source={remote.url!r} is no zarr store: there is none of {', '.join(ZARR_MARKS)}. Check the URL; of other "
            "files, only those on a disk are read: download them first."
        )
        raise FileNotFoundError(msg) from err
    if root.metadata.consolidated_metadata is None and remote.protocol in ("http", "https"):
        msg = (
            f"source={remote.url!r} has no consolidated metadata, and a web server does not list what is in a folder. "
            "Write it where the store is: `spatialdata.read_zarr(path).write_consolidated_metadata()`."
        )
        raise ValueError(msg)
    return root


def _files(nodes: dict[str, Any], zarr_format: int) -> Iterator[str]:
    """Files of a store but for pixels and points. Not all need exist: chunks of fill values do not."""
    about = ("zarr.json",) if zarr_format == 3 else (".zgroup", ".zarray", ".zattrs")
    for name, node in {"": None, **nodes}.items():
        if name.startswith("points"):
            continue
        at = f"{name}/" if name else ""
        yield from (f"{at}{file}" for file in about)
        if name.startswith("shapes/") and name.count("/") == 1:
            yield f"{name}/shapes.parquet"
        if isinstance(node, zarr.Array) and name.startswith(_WHOLE):
            yield from (at + key for key in _chunks(node))


def _chunks(array: zarr.Array[Any]) -> Iterator[str]:
    """Names of the files of an array."""
    step: Sequence[int] = array.shards or array.chunks
    grid = (range(-(-n // k)) for n, k in zip(array.shape, step, strict=True))
    return (array.metadata.encode_chunk_key(at) for at in itertools.product(*grid))


def _copy(remote: Remote, files: Iterator[str], folder: Path) -> None:
    """Copy files that exist."""

    def copy(name: str) -> None:
        try:
            content = again(lambda: remote.fs.cat_file(f"{remote.path}/{name}"), remote / name, "read")
        except FileNotFoundError:
            return
        except PermissionError:
            if name.endswith(ABOUT) or not remote.hides_missing:
                raise
            return
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(copy, files))


def _from_url(element: Any, group: Any) -> Any:
    """Replace the arrays of an image, of which only the metadata was copied, by those at the URL."""
    import dask.array as da
    from xarray import DataTree

    attributes = group.attrs.asdict()
    [scales] = attributes.get("ome", attributes)["multiscales"]
    levels = [da.from_zarr(group[each["path"]]) for each in scales["datasets"]]
    if not isinstance(element, DataTree):
        return element.copy(data=levels[0])
    for name, level in zip(element.children, levels, strict=True):
        scale = element[name].to_dataset()
        [variable] = map(str, scale.data_vars)
        element[name] = scale.assign({variable: scale[variable].copy(data=level)})
    return element
