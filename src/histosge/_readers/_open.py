"""What instruments write → ``SpatialData`` with one image, one set of spots, one table and one coordinate system."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from histosge import _keys
from histosge._readers._images import image_size, is_image, names_other_image, open_pixels, orientation, parse_image
from histosge._readers._parts import valid_name
from histosge._readers._spaceranger import bins_of, find_outs, is_hd, read_visium, read_visium_hd
from histosge._readers._tables import read_h5ad, read_st
from histosge._section import centroids, check_image, compare, lazy_image
from histosge._settings import logger

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from histosge._readers._parts import Found

_SAME_SIZE = 0.01


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
        name = dataset_id or valid_name(source.name.partition(".")[0])
        return SpatialData(images={f"{name}_full_image": parse_image(source, name)})
    outs = find_outs(source)
    hd = outs is not None and is_hd(outs)
    if bin_size is not None and not hd:
        msg = f"bin_size={bin_size!r}, but {str(source)!r} is no output of Visium HD. Leave bin_size= out."
        raise ValueError(msg)
    if outs is not None:
        found = read_visium_hd(outs, dataset_id, bin_size or bins_of(source)) if hd else read_visium(outs, dataset_id)
        return _with_image(found, source, image)
    if source.suffix == ".h5ad":
        return _with_image(read_h5ad(source, dataset_id), source, image)
    if source.name.endswith((".tsv", ".tsv.gz")):
        return _with_image(read_st(source, dataset_id), source, image)
    if any((source / name).is_file() for name in ("zarr.json", ".zattrs", ".zgroup")):
        given = {k: v for k, v in {"image": image, "dataset_id": dataset_id}.items() if v is not None}
        if given:
            msg = f"{' and '.join(f'{k}={v!r}' for k, v in given.items())}: a SpatialData holds its image and names. Leave out."
            raise ValueError(msg)
        return _zarr(source)
    if names_other_image(source):
        open_pixels(source)
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


def _zarr(source: Path) -> SpatialData:
    import spatialdata as sd

    try:
        return sd.read_zarr(source)
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        msg = f"{str(source)!r} cannot be read as a SpatialData ({type(err).__name__}: {err}). Is it whole? Write or copy it again."
        raise ValueError(msg) from err


# -- the image


def _with_image(found: Found, source: Path, given: str | Path | None) -> SpatialData:
    from spatialdata import SpatialData
    from spatialdata.transformations import Identity, get_transformation, set_transformation

    path = _choose_image(found, source, given)
    images: dict[str, Any] = {}
    if path is not None:
        images[f"{found.name}_full_image"] = _aligned_image(found, path)
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


def _choose_image(found: Found, source: Path, given: str | Path | None) -> Path | None:
    """The image named, or the only one beside that has the spots in it."""
    high = centroids(found.shapes).max(axis=0)

    def fits(path: Path) -> bool:
        sizes = np.array([image_size(path), image_size(path, oriented=False)])
        if found.size_px is None:
            return bool((high <= sizes[0]).all())
        return bool((np.abs(sizes / found.size_px - 1) < _SAME_SIZE).all(axis=1).any())

    if found.size_px is None:
        wanted = f"the spots reach to x = {high[0]:.0f}, y = {high[1]:.0f} px"
    else:
        wanted = f"{found.size_source} of about {found.size_px[0]:.0f} x {found.size_px[1]:.0f} px"
    stale = ', or remove uns["spatial"] if it is of another image' if found.size_source.startswith("uns") else ""
    if given is not None:
        path = Path(given).expanduser()
        if names_other_image(path):
            open_pixels(path)
        if not path.is_file():
            msg = f"image={str(given)!r} is no file: check the path."
            raise FileNotFoundError(msg)
        if not fits(path):
            msg = (
                f"image={str(given)!r} has {' x '.join(map(str, image_size(path)))} px, but {wanted}.{_resized(found, path)} "
                f"Pass the image that the spots were aligned to{stale}."
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


def _resized(found: Found, path: Path) -> str:
    """What was done to an image of another size, where that is plain."""
    if found.size_px is None:
        return ""
    size = np.array(image_size(path))
    for stored, turned in ((size, ""), (size[::-1], "turned by 90 degrees or with rows and columns swapped")):
        factor = stored / found.size_px
        if abs(factor[0] / factor[1] - 1) < _SAME_SIZE:
            scaled = "" if abs(factor[0] - 1) < _SAME_SIZE else f"exported at {factor.mean():.3g} times its size"
            return f" It has the shape of that one, {' and '.join(what for what in (scaled, turned) if what)}."
    return ""


def _aligned_image(found: Found, path: Path) -> Any:
    """Read the image, and compare it with the small copy of the one that the spots were aligned to.

    Programs differ in whether they follow a tag of orientation: of an image that has one, the copy decides.
    """
    element = parse_image(path, found.name)
    if found.small is None:
        return element
    image = lazy_image(element, path.name)
    if orientation(path) != 1:
        shown, element_stored = compare(image, found.small), parse_image(path, found.name, oriented=False)
        stored = compare(lazy_image(element_stored, path.name), found.small)
        if stored is not None and stored.fits and not (shown is not None and shown.fits):
            logger.info("%s is read as it is stored: so it agrees with the thumbnail", path)
            return element_stored
    check_image(image, found.small, str(path))
    return element
