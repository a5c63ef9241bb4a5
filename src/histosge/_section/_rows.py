"""What a table and its shapes are in zarr and parquet: arrays of rows, chunks, layouts, joined files. See ``_store.py``."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData
    from geopandas import GeoDataFrame


def open_table(path: str | Path, name: str) -> AnnData:
    """Open a table of a store with ``X`` and layers left on disk (dask), all else in memory.

    Parameters
    ----------
    path
        The ``SpatialData`` store.
    name
        Name of the table.
    """
    import anndata as ad
    import dask.array as da

    tables = Path(path) / "tables"
    if not (tables / name / "zarr.json").is_file():
        there = sorted(p.name for p in tables.iterdir() if p.is_dir()) if tables.is_dir() else []
        msg = f"name={name!r} is not among the tables of {str(path)!r}: {there}."
        raise KeyError(msg)
    group = zarr.open_group(tables / name, mode="r")
    lazy = {key: da.from_zarr(group[key]) for key in row_arrays(group) if is_matrix(key)}
    rest = {key: ad.io.read_elem(group[key]) for key in ("obs", "var", "obsm", "varm", "uns")}
    layers = {key.removeprefix("layers/"): array for key, array in lazy.items() if key != "X"}
    return ad.AnnData(X=lazy.get("X"), layers=layers, **rest)


def writable(tables: Path, name: str) -> dict[str, zarr.Array[Any]]:
    """``X`` and layers of a table by their paths, to be written fast.

    Encoded by ``zarrs``, and without a look whether a chunk is empty: half of the time (docs/benchmarks.md).
    """
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        group = zarr.open_group(tables / name, mode="r+", use_consolidated=False)
        arrays: dict[str, Any] = {key: group[key] for key in row_arrays(group) if is_matrix(key)}
    return {key: array.with_config({"write_empty_chunks": True}) for key, array in arrays.items()}


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what nobody can mend: parquet inside zarr, strings without a specification, shards to come."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="zarr v3 autosharding")
        warnings.filterwarnings("ignore", category=zarr.errors.UnstableSpecificationWarning)
        warnings.filterwarnings("ignore", category=zarr.errors.ZarrUserWarning)
        yield


def chunk_rows(part_rows: int, *, wanted: int, whole: bool) -> int:
    """Rows of a chunk near to those wanted; a whole number of chunks makes a part, unless there is but one."""
    if part_rows <= wanted or whole:
        return min(part_rows, wanted)
    small = [d for d in range(1, math.isqrt(part_rows) + 1) if part_rows % d == 0]
    return min({*small, *(part_rows // d for d in small)}, key=lambda d: abs(math.log(d / wanted)))


def is_matrix(key: str) -> bool:
    """Whether an array is rows by genes."""
    return key == "X" or key.startswith("layers/")


def matrices(table: AnnData) -> dict[str, Any]:
    """``X`` and layers by their paths; newer versions of anndata count ``X`` among the layers, as ``None``."""
    found = {} if table.X is None else {"X": table.X}
    return found | {f"layers/{key}": values for key, values in table.layers.items() if key is not None}


def first_row(table: AnnData) -> AnnData:
    """The first row as a table of its own, all categories kept (anndata's own slices drop them)."""
    import anndata as ad

    unfit = [f"{what}={list(held)}" for what in ("obsp", "varp") if len(held := getattr(table, what))]
    unfit += ["raw"] if table.raw is not None else []
    unfit += [f"{key} ({type(v).__name__})" for key, v in matrices(table).items() if not isinstance(v, np.ndarray)]
    if unfit or not table.n_obs:
        msg = (
            f"table: {', '.join(unfit) or '0 rows'} cannot be written in parts; a part has rows, and X, layers and "
            "obsm that are numpy arrays. Convert or remove them."
        )
        raise ValueError(msg)
    rows = {key: np.asarray(values)[:1] for key, values in matrices(table).items()}
    return ad.AnnData(
        X=rows.pop("X", None),
        layers={key.removeprefix("layers/"): values for key, values in rows.items()},
        obs=table.obs.iloc[:1],
        obsm={key: values.iloc[:1] if hasattr(values, "iloc") else values[:1] for key, values in table.obsm.items()},
        var=table.var,
        varm=dict(table.varm),
        uns=dict(table.uns),
    )


def held(table: AnnData) -> zarr.Group:
    """``obs`` and ``obsm`` as anndata would write them, in memory."""
    import anndata as ad

    group = zarr.open_group(zarr.storage.MemoryStore(), mode="w", zarr_format=3)
    with quiet():
        ad.io.write_elem(group, "obs", table.obs)
        ad.io.write_elem(group, "obsm", dict(table.obsm))
    return group


def row_arrays(group: zarr.Group) -> list[str]:
    """Paths of all arrays of a table whose first dimension is its rows."""
    found = ["X"] if "X" in group else []
    for name in ("layers", "obsm"):
        if name in group:
            found += [key for inner in group[name] for key in _arrays_of(group, f"{name}/{inner}")]  # type: ignore[union-attr]
    return found + _arrays_of(group, "obs")


def _arrays_of(group: zarr.Group, key: str) -> list[str]:
    """Paths of the arrays that an element with rows is made of, by anndata's encoding."""
    element = group[key]
    kind = str(element.attrs.get("encoding-type"))
    if isinstance(element, zarr.Array):
        return [key]
    if kind == "dataframe":
        return [path for inner in element for path in _arrays_of(group, f"{key}/{inner}")]
    if kind == "categorical":
        return [f"{key}/codes"]
    if kind.startswith("nullable"):
        return [f"{key}/values", f"{key}/mask"]
    msg = f"table: {key} is a {kind}, which cannot be written in parts; make it a numpy array or a column of obs."
    raise ValueError(msg)


def layout(table: AnnData, held: zarr.Group) -> dict[str, str]:
    """Describe all that must be the same in every part: names, types, widths, categories."""
    layout = {"var": _digest([str(name) for name in table.var_names])}
    layout["obs"] = _digest([str(name) for name in table.obs.columns])
    for key, values in matrices(table).items():
        layout[key] = f"{'dense' if isinstance(values, np.ndarray) else type(values).__name__} {values.dtype}"
    for key in row_arrays(held):
        array = held[key]
        layout[key] = f"{array.dtype} {'x'.join(map(str, array.shape[1:]))}".strip()  # type: ignore[union-attr]
        if key.endswith("/codes"):
            column = held[key.removesuffix("/codes")]
            values = np.asarray(column["categories"][:]).tolist()  # type: ignore[index]
            layout[key] = f"{_digest(values)}, {'' if column.attrs['ordered'] else 'not '}ordered"
    return layout


def _digest(values: list[Any]) -> str:
    """A few values as they are, many by their number and hash."""
    text = json.dumps(values)
    return text if len(text) <= 200 else f"{len(values)} names ({hashlib.sha256(text.encode()).hexdigest()[:8]})"


def refuse_other_layout(wanted: dict[str, str], found: dict[str, str], *, of: str) -> None:
    other = [key for key in sorted(wanted | found) if wanted.get(key) != found.get(key)]
    if other:
        told = "; ".join(f"{key} is {found.get(key, 'absent')}, not {wanted.get(key, 'absent')}" for key in other)
        msg = (
            f"{of} differs from the part that began the store: {told}. All parts need the same names, types and "
            "categories (of a categorical column: all that occur in any part)."
        )
        raise ValueError(msg)


# -- shapes


def geo(path: Path) -> dict[str, Any]:
    """GeoParquet's own metadata of a file."""
    import pyarrow.parquet as pq

    return dict(json.loads(pq.read_schema(path).metadata[b"geo"]))


def write_shapes(path: Path, shapes: GeoDataFrame, *, encoding: str) -> None:
    """Write shapes as spatialdata does, but with the index as a column of its own."""
    from spatialdata.models import ShapesModel

    frame = shapes.copy(deep=False)
    frame.attrs = {key: value for key, value in shapes.attrs.items() if key != ShapesModel.TRANSFORM_KEY}
    frame.to_parquet(path, geometry_encoding=encoding, index=True)


def join(parts: list[Path], *, sample: Path, target: Path) -> None:
    """Join the files of all parts, one part in memory at a time; the metadata speak of the whole."""
    import pyarrow.parquet as pq

    schema = pq.read_schema(sample)
    found = geo(sample)
    columns = [geo(path)["columns"][found["primary_column"]] for path in parts]
    whole = found["columns"][found["primary_column"]]
    whole["geometry_types"] = sorted({kind for column in columns for kind in column["geometry_types"]})
    boxes = np.array([column["bbox"] for column in columns])  # (n_parts, 4) xmin, ymin, xmax, ymax
    whole["bbox"] = [*boxes[:, :2].min(0).tolist(), *boxes[:, 2:].max(0).tolist()]
    schema = schema.with_metadata({**schema.metadata, b"geo": json.dumps(found).encode()})
    with pq.ParquetWriter(target, schema) as writer:
        for path in parts:
            file = pq.ParquetFile(path)
            for i in range(file.num_row_groups):
                writer.write_table(file.read_row_group(i).replace_schema_metadata(schema.metadata))
