"""What instruments write → ``SpatialData`` with one image, one set of spots, one table and one coordinate system."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from histosge import _keys
from histosge._geometry import nearest_spots
from histosge._section._pixels import image_size, is_image, parse_image
from histosge._section._read import centroids
from histosge._settings import logger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData
    from geopandas import GeoDataFrame
    from numpy.typing import NDArray
    from spatialdata import SpatialData

_COUNTS = "filtered_feature_bc_matrix"
_DEFAULT_BIN_UM = 8
_SPOT_PER_PITCH = 0.55
"""Of Visium; all that matters of it is that spots do not touch."""
_BARCODE_OF_BIN = re.compile(r"s_(\d{3})um_\d{5}_\d{5}")
_SAME_SIZE = 0.01


@dataclass(frozen=True)
class _Found:
    """A section without its full-resolution image."""

    name: str
    shapes_key: str
    shapes: GeoDataFrame
    table_key: str
    table: AnnData
    hires: Any
    """Space Ranger's thumbnail; ``None`` where there is none"""
    size_px: tuple[float, float] | None
    """(width, height) of the full-resolution image, where it is known"""
    folders: tuple[Path, ...]
    """Where the full-resolution image may lie"""
    attrs: dict[str, Any]


def open_section(
    source: str | Path,
    *,
    image: str | Path | None = None,
    bin_size: int | None = None,
    dataset_id: str | None = None,
) -> SpatialData:
    """Read a section; see :func:`histosge.io.read`."""
    from spatialdata import SpatialData

    source = Path(source).expanduser()
    if not source.exists():
        msg = f"source={str(source)!r} does not exist: check the path."
        raise FileNotFoundError(msg)
    if dataset_id is not None:
        _keys.check("dataset_id", dataset_id)
    if is_image(source):
        if image is not None or bin_size is not None:
            msg = f"source={str(source)!r} is an image, of which nothing was measured. Leave image= and bin_size= out."
            raise ValueError(msg)
        name = dataset_id or _valid(source.name.partition(".")[0])
        return SpatialData(images={f"{name}_full_image": parse_image(source, name)})
    outs = next((folder for folder in (source, source / "outs") if _is_outs(folder)), None)
    hd = outs is not None and (outs / "binned_outputs").is_dir()
    if bin_size is not None and not hd:
        msg = f"bin_size={bin_size!r}, but {str(source)!r} is no output of Visium HD. Leave bin_size= out."
        raise ValueError(msg)
    if outs is not None:
        found = _visium_hd(outs, dataset_id, bin_size) if hd else _visium(outs, dataset_id)
        return _with_image(found, source, image)
    if source.suffix == ".h5ad":
        return _with_image(_h5ad(source, dataset_id), source, image)
    if source.name.endswith((".tsv", ".tsv.gz")):
        return _with_image(_st(source, dataset_id), source, image)
    if any((source / name).is_file() for name in ("zarr.json", ".zattrs", ".zgroup")):
        given = {k: v for k, v in {"image": image, "dataset_id": dataset_id}.items() if v is not None}
        if given:
            msg = f"{' and '.join(f'{k}={v!r}' for k, v in given.items())}: a SpatialData holds its image and names. Leave out."
            raise ValueError(msg)
        return _zarr(source)
    holds = (
        sorted(path.name for path in source.iterdir())[:8]
        if source.is_dir()
        else f"a {source.suffix or 'nameless'} file"
    )
    msg = (
        f"source={str(source)!r} is no section that can be read; it holds {holds}. Pass the `outs` folder of Space Ranger "
        "(Visium: with `spatial/tissue_positions*.csv`; Visium HD: with `binned_outputs/`), a SpatialData `.zarr`, an `.h5ad` "
        'with obsm["spatial"] in pixels of an image beside it, the `.tsv` of counts of an ST array, or an image alone.'
    )
    raise ValueError(msg)


# -- counts and places


def _zarr(source: Path) -> SpatialData:
    import spatialdata as sd

    try:
        return sd.read_zarr(source)
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        msg = f"{str(source)!r} cannot be read as a SpatialData ({type(err).__name__}: {err}). Is it whole? Write or copy it again."
        raise ValueError(msg) from err


def _is_outs(folder: Path) -> bool:
    return (folder / "binned_outputs").is_dir() or any((folder / "spatial").glob("tissue_positions*.csv"))


def _visium(outs: Path, dataset_id: str | None) -> _Found:
    import spatialdata_io

    counts = _named(outs, f"{_COUNTS}.h5") or _named(outs, _COUNTS)
    factors = outs / "spatial" / "scalefactors_json.json"
    if counts is None or not factors.is_file():
        missing = factors.relative_to(outs) if counts else f"{_COUNTS}.h5, or the folder {_COUNTS}"
        msg = f"{str(outs)!r} looks like an output of Space Ranger, but has no {missing}. Copy it there."
        raise FileNotFoundError(msg)
    name = dataset_id or _name_of(outs, counts, _COUNTS)
    with _quiet():
        sdata = spatialdata_io.visium(
            outs, dataset_id=name, counts_file=f"{counts.name}/matrix.mtx.gz" if counts.is_dir() else counts.name
        )
    return _found(sdata, name, outs, factors)


def _visium_hd(outs: Path, dataset_id: str | None, bin_size: int | None) -> _Found:
    import spatialdata_io

    feature_slice = _named(outs, "feature_slice.h5")
    if feature_slice is None:
        msg = f"{str(outs)!r} looks like an output of Visium HD, but has no feature_slice.h5. Copy it there."
        raise FileNotFoundError(msg)
    prefix = feature_slice.name.removesuffix("feature_slice.h5").removesuffix("_")
    if prefix and dataset_id not in (None, prefix):
        msg = f"dataset_id={dataset_id!r}, but the files of {str(outs)!r} are named {prefix}_…. Leave dataset_id= out."
        raise ValueError(msg)
    there = sorted(
        int(m[1]) for p in (outs / "binned_outputs").iterdir() if (m := re.fullmatch(r"square_(\d{3})um", p.name))
    )
    wanted = bin_size or (_DEFAULT_BIN_UM if len(there) != 1 else there[0])
    if wanted not in there:
        msg = f"bin_size={bin_size!r}: {str(outs)!r} holds bins of {there} µm. Pass one of them."
        raise ValueError(msg)
    name = prefix or dataset_id or _name_of(outs, feature_slice, "feature_slice")
    with _quiet(), contextlib.redirect_stdout(io.StringIO()):  # it prints
        sdata = spatialdata_io.visium_hd(
            outs,
            dataset_id=name,
            bin_size=wanted,
            load_segmentations_only=False,
            gex_only=True,
            fullres_image_file=outs / "none",  # ours is read in pieces, theirs in one
        )
    bins = f"square_{wanted:03d}um"
    return _found(sdata, name, outs, outs / "binned_outputs" / bins / "spatial" / "scalefactors_json.json", bins=bins)


def _found(sdata: SpatialData, name: str, outs: Path, factors: Path, *, bins: str = "") -> _Found:
    shapes_key = f"{name}_{bins}" if bins else name
    table_key = bins or "table"
    lost = int((~np.isfinite(centroids(sdata.shapes[shapes_key])).all(axis=1)).sum())
    if lost:
        n = len(sdata.shapes[shapes_key])
        msg = (
            f"{lost} of {n} barcodes of {str(outs)!r} have no place in its tissue_positions: are the files of one run?"
        )
        raise ValueError(msg)
    return _Found(
        name=name,
        shapes_key=shapes_key,
        shapes=sdata.shapes[shapes_key],
        table_key=table_key,
        table=sdata.tables[table_key],
        hires=sdata.images.get(f"{name}_hires_image"),
        size_px=_full_size(factors),
        folders=(outs, outs / "microscope_image", *((outs.parent,) if outs.name == "outs" else ())),
        attrs=sdata.attrs,
    )


def _h5ad(path: Path, dataset_id: str | None) -> _Found:
    import anndata as ad

    with _quiet():
        table = ad.read_h5ad(path)
    xy_px = np.asarray(table.obsm["spatial"], float) if "spatial" in table.obsm else np.empty((0, 0))
    if xy_px.shape[1] != 2 or len(xy_px) < 2 or not np.isfinite(xy_px).all():
        msg = (
            f'{str(path)!r} needs obsm["spatial"], (n, 2): x and y of each spot in pixels of the image, none missing, of two '
            f"spots or more; it has {list(table.obsm)}, of shape {xy_px.shape}. Write it there first."
        )
        raise ValueError(msg)
    return _of_table(table, xy_px, path, dataset_id)


def _st(path: Path, dataset_id: str | None) -> _Found:
    """Counts and places as the ST pipeline and spot detector write them: rows are called ``XxY``."""
    import anndata as ad
    import pandas as pd
    from scipy import sparse

    files = [p for p in sorted(path.parent.iterdir()) if p.name.endswith((".tsv", ".tsv.gz")) and p.name != path.name]
    tables = {file.name: pd.read_csv(file, sep="\t", dtype=str) for file in files if _is_selection(file)}
    if len(tables) != 1:
        msg = (
            f"{str(path)!r} needs one file of spots beside it, a .tsv with columns x, y, pixel_x and pixel_y; there are "
            f"{list(tables) or [file.name for file in files]}."
        )
        raise ValueError(msg)
    (name, spots), counts = tables.popitem(), pd.read_csv(path, sep="\t", index_col=0)
    for x, y in (("x", "y"), ("new_x", "new_y")):  # rows are called by either
        known = spots.set_index(spots[x] + "x" + spots[y]) if x in spots else spots.iloc[:0]
        rows = counts.index.isin(known.index)
        if rows.any():
            break
    else:
        msg = f"no row of {str(path)!r} (for example {list(counts.index[:2])}) is a spot XxY of {name!r}. Use the spots of the same section."
        raise ValueError(msg)
    if not rows.all():
        logger.warning(
            "leaving out %d of %d rows of %s that have no place in %s", (~rows).sum(), len(rows), path.name, name
        )
    counts, known = counts[rows], known.loc[counts.index[rows]]
    if "selected" in known:  # on the tissue
        selected = (known["selected"] == "1").to_numpy()
        counts, known = counts[selected], known[selected]
    table = ad.AnnData(sparse.csr_matrix(counts.to_numpy(np.float32)), obs=known[[]].copy(), var=counts.T[[]])
    for field, axis in (("array_row", y), ("array_col", x)):
        table.obs[field] = known[axis].astype(float).round().astype(int)
    xy_px = known[["pixel_x", "pixel_y"]].astype(float).to_numpy()
    table.obsm["spatial"] = xy_px
    return _of_table(table, xy_px, path, dataset_id)


def _is_selection(path: Path) -> bool:
    import pandas as pd

    with contextlib.suppress(pd.errors.EmptyDataError):
        return {"x", "y", "pixel_x", "pixel_y"} <= set(pd.read_csv(path, sep="\t", nrows=0).columns)
    return False


def _of_table(table: AnnData, xy_px: NDArray[np.float64], path: Path, dataset_id: str | None) -> _Found:
    """Shapes for a table: circles that do not touch, or the squares that its barcodes name."""
    import geopandas as gpd
    import shapely
    from spatialdata.models import ShapesModel, TableModel

    name = dataset_id or _valid(path.name.partition(".")[0])
    pitch_px = float(np.median(nearest_spots(xy_px, xy_px, k=1, exclude=np.arange(len(xy_px)))[1]))
    if pitch_px <= 0:
        msg = f"most spots of {str(path)!r} lie at one place: are their x and y pixels of the image?"
        raise ValueError(msg)
    bins = _BARCODE_OF_BIN.match(str(table.obs_names[0]))
    key = f"{name}_square_{bins[1]}um" if bins else name
    shapes = gpd.GeoDataFrame(
        {"radius": _SPOT_PER_PITCH * pitch_px / 2}, geometry=shapely.points(xy_px), index=range(len(xy_px))
    )
    if bins:
        shapes = gpd.GeoDataFrame(geometry=shapes.buffer(pitch_px / 2, cap_style="square"))
    table.uns.pop("spatialdata_attrs", None)
    table.obs["spot_id"], table.obs["region"] = np.arange(len(xy_px)), key
    table.obs["region"] = table.obs["region"].astype("category")
    table.var_names_make_unique()
    return _Found(
        name=name,
        shapes_key=key,
        shapes=ShapesModel.parse(shapes),
        table_key="table",
        table=TableModel.parse(table, region=key, region_key="region", instance_key="spot_id"),
        hires=None,
        size_px=None,
        folders=(path.parent,),
        attrs={},
    )


def _named(folder: Path, tail: str) -> Path | None:
    """The only file or folder that is called so, or ``PREFIX_`` and so."""
    names = [path for path in sorted(folder.iterdir()) if path.name == tail or path.name.endswith(f"_{tail}")]
    if len(names) > 1:
        msg = f"{str(folder)!r} holds {[path.name for path in names]}: of which section? Put each into a folder of its own."
        raise ValueError(msg)
    return names[0] if names else None


def _name_of(outs: Path, file: Path, tail: str) -> str:
    """Name a section after its files, or its folder."""
    prefix = file.name.partition(tail)[0].removesuffix("_")
    folder = outs.resolve()
    return _valid(prefix or (folder.parent if folder.name == "outs" else folder).name)


def _valid(name: str) -> str:
    return _keys.slug(name).strip("_.") or "section"


def _full_size(factors: Path) -> tuple[float, float] | None:
    """Width and height of the image that Space Ranger was given, from its thumbnail."""
    thumbnail = factors.with_name("tissue_hires_image.png")
    if not thumbnail.is_file():
        return None
    factor = json.loads(factors.read_text())["tissue_hires_scalef"]
    width, height = image_size(thumbnail)
    return width / factor, height / factor


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what spatialdata-io and scanpy say of things that are put right here."""
    with warnings.catch_warnings():
        for message in ("File .* does not exist", "No image path", "Converting `region_key", ".* names are not unique"):
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        yield


# -- the image


def _with_image(found: _Found, source: Path, given: str | Path | None) -> SpatialData:
    from spatialdata import SpatialData
    from spatialdata.transformations import Identity, get_transformation, set_transformation

    path = _choose_image(found, source, given)
    images: dict[str, Any] = {}
    if path is not None:
        images[f"{found.name}_full_image"] = parse_image(path, found.name)
    elif found.hires is not None:
        back = get_transformation(found.hires, to_coordinate_system=found.name)
        set_transformation(found.hires, {found.name: back}, set_all=True)
        images[f"{found.name}_hires_image"] = found.hires
    set_transformation(found.shapes, {found.name: Identity()}, set_all=True)
    return SpatialData(
        images=images,
        shapes={found.shapes_key: found.shapes},
        tables={found.table_key: found.table},
        attrs=found.attrs,
    )


def _choose_image(found: _Found, source: Path, given: str | Path | None) -> Path | None:
    """The image named, or the only one beside that has the spots in it."""
    high = centroids(found.shapes).max(axis=0)

    def fits(path: Path) -> bool:
        size = np.array(image_size(path))
        if found.size_px is None:
            return bool((high <= size).all())
        return bool((np.abs(size / found.size_px - 1) < _SAME_SIZE).all())

    if found.size_px is None:
        wanted = f"the spots reach to x = {high[0]:.0f}, y = {high[1]:.0f} px"
    else:
        wanted = f"Space Ranger was given one of about {found.size_px[0]:.0f} x {found.size_px[1]:.0f} px"
    if given is not None:
        path = Path(given).expanduser()
        if not path.is_file():
            msg = f"image={str(given)!r} is no file: check the path."
            raise FileNotFoundError(msg)
        if not fits(path):
            msg = (
                f"image={str(given)!r} has {' x '.join(map(str, image_size(path)))} px, but {wanted}. Pass the image that the "
                "spots were aligned to."
            )
            raise ValueError(msg)
        return path
    there = [p for folder in found.folders if folder.is_dir() for p in sorted(folder.iterdir()) if is_image(p)]
    fitting: list[Path] = []
    others: list[Path] = []
    for path in there:
        try:
            (fitting if fits(path) else others).append(path)
        except ValueError as err:  # half of a download, say
            logger.warning("left alone: %s", err)
    if len(fitting) > 1:
        msg = f"several images lie beside {str(source)!r}; pass image= one of {[str(path) for path in fitting]}."
        raise ValueError(msg)
    for path in others:  # our own pictures, say: worth a word only where the image is not there
        logger.log(
            logging.DEBUG if fitting else logging.WARNING,
            "%s has %s px, but %s: left alone", path.name, " x ".join(map(str, image_size(path))), wanted,
        )  # fmt: skip
    if fitting:
        logger.info("image: %s", fitting[0])
        return fitting[0]
    logger.warning(
        "no full-resolution image lies beside %s: the section has %s. Pass image= the microscope image that the spots were aligned "
        "to, to predict with a pathology encoder.",
        source, "no image" if found.hires is None else "Space Ranger's hires image only",
    )  # fmt: skip
    return None
