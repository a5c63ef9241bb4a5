"""A source → ``SpatialData`` with one image, one set of spots, one table and one coordinate system.

To read another instrument, add a file to this folder with two functions, and a line to :data:`_READERS`:

``is_NAME(source)``
    Whether a source (a file or folder) is of that instrument.
``read_NAME(source, *, dataset_id=None)``
    Reads it: a :class:`~histosge._readers._parts.Found`, that is shapes in pixels of the full-resolution image, and a
    table that annotates them. The image itself is found, compared and read here.

The line says in words what such a source is, for messages; the first reader that owns a source reads it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from histosge import _keys
from histosge._readers._images import (
    image_size,
    is_image,
    names_other_image,
    open_pixels,
    orientation,
    parse_image,
    read_image_alone,
)
from histosge._readers._parts import Found, Reader
from histosge._readers._remote_zarr import read_remote_zarr
from histosge._readers._spaceranger import is_visium, is_visium_hd, read_visium, read_visium_hd
from histosge._readers._tables import is_h5ad, is_st, read_h5ad, read_st
from histosge._remote import ZARR_MARKS, Remote, located
from histosge._section import centroids, check_image, compare, lazy_image
from histosge._settings import logger

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from histosge._remote import Place

_SAME_SIZE = 0.01


def _is_zarr(source: Path) -> bool:
    return any((source / name).is_file() for name in ZARR_MARKS)


def _read_zarr(source: Path) -> SpatialData:
    import spatialdata as sd

    try:
        return sd.read_zarr(source)
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        msg = (
            f"{str(source)!r} cannot be read as a SpatialData ({type(err).__name__}: {err}). Is it complete? Write or "
            "copy it again."
        )
        raise ValueError(msg) from err


_ZARR = Reader("a SpatialData `.zarr`, which holds its image and names", _is_zarr, _read_zarr, takes=())
_READERS = (
    Reader("an image alone, of which nothing was measured", is_image, read_image_alone, takes=("dataset_id",)),
    Reader(
        "Visium HD, a folder of Space Ranger with `binned_outputs/`",
        is_visium_hd,
        read_visium_hd,
        takes=("image", "bin_size", "dataset_id"),
    ),
    Reader("Visium, a folder of Space Ranger with `spatial/tissue_positions*.csv`", is_visium, read_visium),
    Reader('an `.h5ad` with obsm["spatial"] in pixels of an image in its folder', is_h5ad, read_h5ad),
    Reader("the `.tsv` of counts of an ST array", is_st, read_st),
    _ZARR,
)


def open_section(
    source: Place,
    *,
    image: str | Path | None = None,
    bin_size: int | None = None,
    dataset_id: str | None = None,
) -> SpatialData:
    """Read a section; see :func:`histosge.io.read`."""
    source = located(source)
    if isinstance(source, Remote):
        given = {"image": image, "bin_size": bin_size, "dataset_id": dataset_id}
        _refuse_unfit(given, source, _ZARR)
        return read_remote_zarr(source)
    if not source.exists():
        msg = f"source={str(source)!r} does not exist: check the path."
        raise FileNotFoundError(msg)
    if dataset_id is not None:
        _keys.check("dataset_id", dataset_id)
    reader = next((reader for reader in _READERS if reader.owns(source)), None)
    if reader is None:
        raise _unknown(source)
    given = {"image": image, "bin_size": bin_size, "dataset_id": dataset_id}
    given = _refuse_unfit(given, source, reader)
    found = reader.read(source, **{name: value for name, value in given.items() if name != "image"})
    return _with_image(found, source, image) if isinstance(found, Found) else found


def _refuse_unfit(arguments: dict[str, Any], source: Path | Remote, reader: Reader) -> dict[str, Any]:
    """Return the arguments that are given; raise where a reader does not take them."""
    given = {name: value for name, value in arguments.items() if value is not None}
    unfit = [name for name in given if name not in reader.takes]
    if unfit:
        msg = (
            f"{' and '.join(f'{name}={given[name]!r}' for name in unfit)}, but source={str(source)!r} is "
            f"{reader.what}. Leave {' and '.join(f'{name}=' for name in unfit)} out."
        )
        raise ValueError(msg)
    return given


def _unknown(source: Path) -> ValueError:
    """The error for a source that no reader owns."""
    if names_other_image(source):
        open_pixels(source)  # which raises, and says how to convert it
    if source.is_dir():
        holds = sorted(path.name for path in source.iterdir())[:8]
    else:
        holds = [f"a {source.suffix or 'nameless'} file"]
    msg = (
        f"source={str(source)!r} is no section that can be read; it holds {', '.join(holds) or 'nothing'}. Pass one "
        f"of: {'; '.join(reader.what for reader in _READERS)}."
    )
    return ValueError(msg)


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
    """The image that the user names, or the only one in the folders of the section that fits."""
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
            msg = f"image={str(given)!r} is not a file: check the path."
            raise FileNotFoundError(msg)
        if not fits(path):
            msg = (
                f"image={str(given)!r} has {' x '.join(map(str, image_size(path)))} px, but "
                f"{wanted}.{_resized(found, path)} Pass the image that the spots were aligned to{stale}."
            )
            raise ValueError(msg)
        return path
    there = [p for folder in found.folders if folder.is_dir() for p in sorted(folder.iterdir()) if is_image(p)]
    fitting: list[Path] = []
    others: list[Path] = []
    for path in there:
        try:
            (fitting if fits(path) else others).append(path)
        except ValueError as err:  # such as an incomplete download
            logger.warning("not used: %s", err)
    if len(fitting) > 1:
        msg = f"there are several images for {str(source)!r}; pass image= one of {[str(path) for path in fitting]}."
        raise ValueError(msg)
    for path in others:  # such as plots: reported only where the image is missing
        logger.log(
            logging.DEBUG if fitting else logging.WARNING,
            "%s has %s px, but %s: not used", path.name, " x ".join(map(str, image_size(path))), wanted,
        )  # fmt: skip
    if fitting:
        logger.info("image: %s", fitting[0])
        return fitting[0]
    logger.warning(
        "there is no full-resolution image for %s: the section has %s. To predict with a pathology encoder, pass "
        "image=, the microscope image that the spots were aligned to.",
        source, "no image" if found.hires is None else "Space Ranger's hires image only",
    )  # fmt: skip
    return None


def _resized(found: Found, path: Path) -> str:
    """Text for messages: what was done to an image of another size, where that is clear."""
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

    Programs differ in whether they follow a tag of orientation. For an image that has one, the copy decides.
    """
    element = parse_image(path, found.name)
    if found.small is None:
        return element
    image = lazy_image(element, path.name)
    if orientation(path) != 1:
        shown, element_stored = compare(image, found.small), parse_image(path, found.name, oriented=False)
        stored = compare(lazy_image(element_stored, path.name), found.small)
        if stored is not None and stored.fits and not (shown is not None and shown.fits):
            logger.info("%s is read as it is stored, since this agrees with the thumbnail", path)
            return element_stored
    check_image(image, found.small, str(path))
    return element
