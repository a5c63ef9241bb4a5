"""Folders of Space Ranger, as it writes them and as people share them: Visium and Visium HD."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from histosge._readers._images import image_size, open_pixels
from histosge._readers._parts import Found, named, quiet, valid_name
from histosge._section import centroids
from histosge._settings import logger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData
    from spatialdata import SpatialData

_COUNTS, _RAW = "filtered_feature_bc_matrix", "raw_feature_bc_matrix"
_FACTORS = "scalefactors_json.json"
_POSITIONS = ("tissue_positions.csv", "tissue_positions_list.csv")
_COLUMNS = ("barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")
_DEFAULT_BIN_UM = 8
_BINS = re.compile(r"square_(\d{3})um")


def is_visium(source: Path) -> bool:
    outs = _find_outs(source)
    return outs is not None and not _is_hd(outs)


def is_visium_hd(source: Path) -> bool:
    outs = _find_outs(source)
    return outs is not None and _is_hd(outs)


def _find_outs(source: Path) -> Path | None:
    """The folder with Space Ranger's files: ``source``, its ``outs``, or the one that ``source`` is a part of."""
    for folder in (source, source / "outs", *list(source.parents)[: 2 if _is_part(source) else 0]):
        if folder.is_dir() and (_is_hd(folder) or _holds_visium(folder)):
            return folder
    return None


def _holds_visium(folder: Path) -> bool:
    return _positions(folder) is not None and ((folder / "spatial").is_dir() or _counts(folder)[0] is not None)


def _is_hd(outs: Path) -> bool:
    return (outs / "binned_outputs").is_dir()


def _bins_of(source: Path) -> int | None:
    """Edge in µm of the bins in a folder ``square_NNNum``; ``None`` for others."""
    match = _BINS.fullmatch(source.name)
    return int(match[1]) if match else None


def _is_part(source: Path) -> bool:
    name = source.name.removesuffix(".h5")
    return name in ("spatial", "binned_outputs") or name.endswith((_COUNTS, _RAW)) or _bins_of(source) is not None


def read_visium(source: Path, *, dataset_id: str | None = None) -> Found:
    import dask.array as da
    import spatialdata_io

    outs = _find_outs(source) or source
    counts, raw = _counts(outs)
    factors, positions = _find(outs, _FACTORS), _positions(outs)
    if counts is None or factors is None or positions is None:
        missing = f"{_COUNTS}.h5, or the folder {_COUNTS}" if counts is None else f"spatial/{_FACTORS}"
        msg = f"{str(outs)!r} looks like an output of Space Ranger, but has no {missing}. Copy it there."
        raise FileNotFoundError(msg)
    name = dataset_id or _name_of(outs, counts, _RAW if raw else _COUNTS)
    with _canonical(outs, counts, positions, factors) as (folder, counts_file), quiet():
        sdata = spatialdata_io.visium(folder, dataset_id=name, counts_file=counts_file)
        hires = sdata.images.get(f"{name}_hires_image")
        if hires is not None and folder != outs:  # the copy is temporary
            hires.data = da.from_array(hires.data.compute())
    if raw:
        sdata = _on_tissue(sdata, "table", name, counts)
    return _found(sdata, name, outs, factors, hires=hires)


def read_visium_hd(source: Path, *, dataset_id: str | None = None, bin_size: int | None = None) -> Found:
    import spatialdata_io

    outs, bin_size = _find_outs(source) or source, bin_size or _bins_of(source)
    feature_slice = named(outs, "feature_slice.h5")
    if feature_slice is None:
        msg = f"{str(outs)!r} looks like an output of Visium HD, but has no feature_slice.h5. Copy it there."
        raise FileNotFoundError(msg)
    prefix = feature_slice.name.removesuffix("feature_slice.h5").removesuffix("_")
    if prefix and dataset_id not in (None, prefix):
        msg = f"dataset_id={dataset_id!r}, but the files of {str(outs)!r} are named {prefix}_…. Leave dataset_id= out."
        raise ValueError(msg)
    there = sorted(n for path in (outs / "binned_outputs").iterdir() if (n := _bins_of(path)) is not None)
    wanted = bin_size or (_DEFAULT_BIN_UM if len(there) != 1 else there[0])
    if wanted not in there:
        msg = f"bin_size={bin_size!r}: {str(outs)!r} holds bins of {there} µm. Pass one of them."
        raise ValueError(msg)
    name = prefix or dataset_id or _name_of(outs, feature_slice, "feature_slice")
    bins = f"square_{wanted:03d}um"
    inner = outs / "binned_outputs" / bins
    counts, raw = _counts(inner)
    with quiet(), contextlib.redirect_stdout(io.StringIO()):  # it prints
        sdata = spatialdata_io.visium_hd(
            outs,
            dataset_id=name,
            bin_size=wanted,
            filtered_counts_file=not raw,
            load_segmentations_only=False,
            gex_only=True,
            fullres_image_file=outs / "none",  # read here in pieces, and not at once
        )
    if raw and counts is not None:
        sdata = _on_tissue(sdata, bins, f"{name}_{bins}", counts)
    hires = sdata.images.get(f"{name}_hires_image")
    return _found(sdata, name, outs, inner / "spatial" / _FACTORS, hires=hires, bins=bins)


# ------------------------------------------------------------------------------------------------------------- files


def _counts(folder: Path) -> tuple[Path | None, bool]:
    """Counts, and whether they are of all barcodes (raw) or only of those on the tissue."""
    for tail, raw in ((_COUNTS, False), (_RAW, True)):
        found = named(folder, f"{tail}.h5") or named(folder, tail)
        if found is not None:
            return found, raw
    return None, False


def _find(outs: Path, tail: str) -> Path | None:
    """A file of ``spatial``, in that folder or with the counts as in downloads from GEO, compressed or not."""
    tries = ((folder, name) for folder in (outs / "spatial", outs) for name in (tail, f"{tail}.gz"))
    return next((path for folder, name in tries if (path := named(folder, name)) is not None), None)


def _positions(outs: Path) -> Path | None:
    return next((path for tail in _POSITIONS if (path := _find(outs, tail)) is not None), None)


def _name_of(outs: Path, file: Path, tail: str) -> str:
    """Name a section by the prefix of its files, or by its folder."""
    prefix = file.name.partition(tail)[0].removesuffix("_")
    folder = outs.resolve()
    return valid_name(prefix or (folder.parent if folder.name == "outs" else folder).name)


@contextlib.contextmanager
def _canonical(outs: Path, counts: Path, positions: Path, factors: Path) -> Iterator[tuple[Path, str]]:
    """The folder as Space Ranger writes it, and its counts file; for other layouts, a temporary copy with links."""
    header = _has_header(positions)
    matrix = ("matrix.mtx.gz", "features.tsv.gz", "barcodes.tsv.gz")
    odd_counts = counts.is_dir() and not all((counts / name).is_file() for name in matrix)
    as_written = (
        positions.parent == factors.parent == outs / "spatial"
        and positions.name in _POSITIONS
        and (header or positions.name == _POSITIONS[1])
        and factors.name == _FACTORS
    )
    counts_file = f"{counts.name}/matrix.mtx.gz" if counts.is_dir() else counts.name
    if as_written and not odd_counts:
        yield outs, counts_file
        return
    with tempfile.TemporaryDirectory(prefix="histosge-") as temporary:
        folder = Path(temporary)
        (folder / "spatial").mkdir()
        if odd_counts:
            _pack_matrix(counts, folder / counts.name)
        else:
            (folder / counts.name).symlink_to(counts.resolve())
        lines = _text(positions)
        top = "" if header else ",".join(_COLUMNS) + "\n"
        (folder / "spatial" / _POSITIONS[0]).write_text(top + lines)
        (folder / "spatial" / _FACTORS).write_text(_text(factors))
        for kind in ("hires", "lowres"):
            image = _find(outs, f"tissue_{kind}_image.png")
            if image is not None:
                (folder / "spatial" / f"tissue_{kind}_image.png").write_bytes(_bytes(image))
        yield folder, counts_file


def _has_header(positions: Path) -> bool:
    first = _text(positions, n_bytes=200).partition("\n")[0].lower()
    return "in_tissue" in first or "barcode" in first


def _bytes(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


def _text(path: Path, *, n_bytes: int | None = None) -> str:
    with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as file:
        return file.read(-1 if n_bytes is None else n_bytes).decode("utf-8-sig", errors="replace")


def _pack_matrix(folder: Path, to: Path) -> None:
    """Write a matrix folder as Space Ranger does: three compressed files, and the type of each feature."""
    to.mkdir()
    for tails in (("matrix.mtx",), ("barcodes.tsv",), ("features.tsv", "genes.tsv")):
        source = next((p for tail in tails for n in (tail, f"{tail}.gz") if (p := named(folder, n)) is not None), None)
        if source is None:
            msg = f"{str(folder)!r} has no {' or '.join(tails)} (or {tails[0]}.gz): copy it there."
            raise FileNotFoundError(msg)
        target = to / f"{tails[0]}.gz"
        if source.name.endswith(".gz") and "genes" not in source.name:
            target.symlink_to(source.resolve())
        elif tails[0] == "features.tsv":
            lines = [line + "\tGene Expression" * (line.count("\t") < 2) for line in _text(source).splitlines()]
            target.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode(), 1))
        else:
            with source.open("rb") as plain, gzip.open(target, "wb", compresslevel=1) as packed:
                shutil.copyfileobj(plain, packed)


# ----------------------------------------------------------------------------------------------------------- results


def _on_tissue(sdata: SpatialData, table_key: str, shapes_key: str, counts: Path) -> SpatialData:
    """Leave out barcodes that are off the tissue by ``tissue_positions``."""
    from spatialdata import SpatialData
    from spatialdata.models import get_table_keys

    table: AnnData = sdata.tables[table_key]
    keep = (table.obs["in_tissue"] == 1).to_numpy()
    logger.warning(
        "there is no %s, only %s: kept the %d of %d barcodes that are on the tissue by tissue_positions",
        _COUNTS, counts.name, keep.sum(), len(keep),
    )  # fmt: skip
    table = table[keep].copy()
    instances = table.obs[get_table_keys(table)[2]]
    shapes = {**sdata.shapes, shapes_key: sdata.shapes[shapes_key].loc[instances]}
    return SpatialData(images=dict(sdata.images), shapes=shapes, tables={table_key: table}, attrs=sdata.attrs)


def _found(sdata: SpatialData, name: str, outs: Path, factors: Path, *, hires: Any, bins: str = "") -> Found:
    shapes_key = f"{name}_{bins}" if bins else name
    table_key = bins or "table"
    lost = int((~np.isfinite(centroids(sdata.shapes[shapes_key])).all(axis=1)).sum())
    if lost:
        n = len(sdata.shapes[shapes_key])
        msg = (
            f"{lost} of {n} barcodes of {str(outs)!r} have no position in its tissue_positions: are the files of one "
            "run?"
        )
        raise ValueError(msg)
    small = _thumbnail(factors)
    return Found(
        name=name,
        shapes_key=shapes_key,
        shapes=sdata.shapes[shapes_key],
        table_key=table_key,
        table=sdata.tables[table_key],
        folders=(outs, outs / "microscope_image", *((outs.parent,) if outs.name == "outs" else ())),
        hires=hires,
        small=None if small is None else np.moveaxis(np.asarray(open_pixels(small[0])), 0, -1),
        size_px=None if small is None else small[1],
        size_source="Space Ranger was given one",
        attrs=sdata.attrs,
    )


def _thumbnail(factors: Path) -> tuple[Path, tuple[float, float]] | None:
    """A thumbnail that Space Ranger wrote, and the (width, height) of the image that it was made of."""
    scale = json.loads(_text(factors))
    for kind in ("hires", "lowres"):
        for suffix in (".png", ".jpg", ".jpeg"):
            path = named(factors.parent, f"tissue_{kind}_image{suffix}")
            if path is not None and f"tissue_{kind}_scalef" in scale:
                width, height = image_size(path)
                factor = scale[f"tissue_{kind}_scalef"]
                return path, (width / factor, height / factor)
    return None
