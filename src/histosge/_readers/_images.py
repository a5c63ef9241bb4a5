"""Files of images → lazy RGB arrays (c, y, x), and images of a ``SpatialData``."""

from __future__ import annotations

import contextlib
import mmap
from typing import TYPE_CHECKING, Any

import numpy as np

from histosge._image import ImageError, Samples, bits, largest, spread, white_value
from histosge._readers._orientation import Turn
from histosge._readers._parts import not_rgb, valid_name
from histosge._readers._tiff import LARGEST_PIECE, open_tiff, tiff_orientation, tiff_size
from histosge._settings import logger

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import dask.array as da
    from numpy.typing import NDArray
    from spatialdata import SpatialData
    from xarray import DataArray, DataTree

_TIFFS = (".tif", ".tiff", ".btf", ".svs", ".ndpi", ".qptiff")
_PICTURES = (".jpg", ".jpeg", ".png")
_OTHERS = {
    ".afi": "Aperio", ".bif": "Ventana", ".bmp": "BMP", ".czi": "Zeiss", ".dcm": "DICOM", ".dicom": "DICOM",
    ".gif": "GIF", ".ims": "Imaris", ".isyntax": "Philips", ".j2k": "JPEG 2000", ".jp2": "JPEG 2000",
    ".jpx": "JPEG 2000", ".jxl": "JPEG XL", ".jxr": "JPEG XR", ".lif": "Leica", ".lsm": "Zeiss", ".mrxs": "3DHISTECH",
    ".nd2": "Nikon", ".oib": "Olympus", ".oif": "Olympus", ".oir": "Olympus", ".pdf": "PDF", ".qpi": "PerkinElmer",
    ".scn": "Leica", ".svslide": "Sakura", ".tmap": "UNIC", ".vms": "Hamamatsu", ".vmu": "Hamamatsu",
    ".vsi": "Olympus", ".webp": "WebP", ".heic": "HEIC", ".avif": "AVIF", ".xcf": "GIMP", ".psd": "Photoshop",
    ".zarr": "OME-Zarr", ".zvi": "Zeiss",
}  # fmt: skip
"""Formats of images that are not read"""
_BEGINNINGS = (
    (b"\xff\xd8\xff", "JPEG"), (b"\x89PNG", "PNG"), (b"II*\0", "TIFF"), (b"MM\0*", "TIFF"), (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"), (b"ZISRAW", "Zeiss"), (b"GIF8", "GIF"), (b"BM", "BMP"), (b"\0\0\0\x0cjP", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"), (b"%PDF", "PDF"), (b"\xd0\xcf\x11\xe0", "Olympus or Zeiss"),
    (b"\x89HDF", "HDF5"), (b"\xda\xce\xbe\x0a", "Nikon"), (b"PK\x03\x04", "ZIP"), (b"\x1f\x8b", "gzip"),
    (b"8BPS", "Photoshop"),
)  # fmt: skip
_CHUNK_PX = 1024
_SMALLEST_CHUNK_PX = 256
_SMALLEST_LEVEL_PX = 1000


def is_image(path: Path) -> bool:
    return path.suffix.lower() in (*_TIFFS, *_PICTURES) and path.is_file() and not path.name.startswith(".")


def names_other_image(path: Path) -> bool:
    """Whether a name is of an image format that is not read; :func:`open_pixels` then raises, and says what to do."""
    return path.suffix.lower() in _OTHERS


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the file in errors of libraries that cannot read it."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Exception as err:
        if isinstance(err, OSError) and err.errno is not None:  # errors of the system name the file
            raise
        raise _unreadable(path, str(err)) from err


def image_size(path: Path, *, oriented: bool = True) -> tuple[int, int]:
    """Width and height in pixels, as the image is shown, or as it is stored."""
    with _named(path):
        if _kind(path) == "TIFF":
            size, number = tiff_size(path), tiff_orientation(path)
        else:
            with _picture(path) as picture:
                size, number = picture.size, _exif_orientation(picture, path)
    return Turn(number).swapped(size) if oriented else size


def orientation(path: Path) -> int:
    """Orientation of the stored image, 1 (as it is shown) to 8, by the tag of EXIF or TIFF."""
    with _named(path):
        if _kind(path) == "TIFF":
            return tiff_orientation(path)
        with _picture(path) as picture:
            return _exif_orientation(picture, path)


def open_pixels(path: Path, *, oriented: bool = True, largest_piece: int = LARGEST_PIECE) -> da.Array:
    """Open an image as RGB of 8 bits, (3, y, x): a TIFF lazily in pieces, other formats at once.

    ``oriented`` follows its tag of orientation, as viewers do; else pixels are as they are stored. A TIFF compressed in
    pieces of more than ``largest_piece`` bytes is read at once as well.
    """
    with _named(path):
        if _kind(path) == "TIFF":
            pixels = open_tiff(path, oriented=oriented, largest_piece=largest_piece)
        else:
            pixels = _open_picture(path, oriented=oriented)
    stored = orientation(path) if oriented else 1
    if stored != 1:
        logger.info("%s is stored %s (orientation %d): read upright", path, Turn(stored).words, stored)
    return pixels


def _kind(path: Path) -> str:
    """``"TIFF"``, ``"JPEG"`` or ``"PNG"``, by the content of the file and not by its name."""
    found = _OTHERS.get(path.suffix.lower(), "")
    if not found:
        with path.open("rb") as file:
            start = file.read(132)
        found = next((kind for begins, kind in _BEGINNINGS if start.startswith(begins)), "")
        found = "WebP" if start[8:12] == b"WEBP" else "DICOM" if start[128:] == b"DICM" else found
    if found and found not in ("TIFF", "JPEG", "PNG"):
        msg = (
            f"{str(path)!r} is a file of {found}, which is not read. What can be read: TIFF ({', '.join(_TIFFS)}; "
            "OME-TIFF, too), JPEG and PNG. Convert it to OME-TIFF, as QuPath or Bio-Formats (`bfconvert IN "
            "OUT.ome.tif`) does."
        )
        raise ImageError(msg)
    return found


def parse_image(path: Path, name: str, *, oriented: bool = True) -> DataArray | DataTree:
    """Read an image in pieces, with a lazy pyramid of means."""
    import dask.array as da
    from spatialdata.models import Image2DModel
    from spatialdata.transformations import Identity

    pixels = open_pixels(path, oriented=oriented)
    n_halved = 0
    while max(pixels.shape[1:]) >> n_halved > _SMALLEST_LEVEL_PX:
        n_halved += 1
    image = Image2DModel.parse(
        pixels,
        dims=("c", "y", "x"),
        c_coords=["r", "g", "b"],
        scale_factors=[2] * n_halved or None,
        chunks=pixels.chunksize,
        transformations={name: Identity()},
    )
    # spatialdata resizes its levels chunk by chunk, which shifts them where chunks have odd sizes
    size, dtype = pixels.chunksize, pixels.dtype
    for i in range(1, n_halved + 1):
        size = (-1, *(max(edge // 2, _SMALLEST_CHUNK_PX) for edge in size[1:]))
        means = da.coarsen(np.mean, pixels, {1: 2, 2: 2}, trim_excess=True)
        pixels = (means if dtype.kind == "f" else means.round()).astype(dtype).rechunk(size)
        image[f"scale{i}"]["image"].data = pixels
    return image


def read_image_alone(path: Path, *, dataset_id: str | None = None) -> SpatialData:
    """Read an image of which nothing was measured."""
    from spatialdata import SpatialData

    name = dataset_id or valid_name(path.name.partition(".")[0])
    return SpatialData(images={f"{name}_full_image": parse_image(path, name)})


def _open_picture(path: Path, *, oriented: bool) -> da.Array:
    import dask.array as da

    with _picture(path) as picture:
        if picture.format == "PNG" and getattr(picture, "n_frames", 1) > 1:
            raise not_rgb(path, f"is an animation of {picture.n_frames} images")
        turn = Turn(_exif_orientation(picture, path) if oriented else 1)
        if picture.mode in ("P", "RGB") and "transparency" in picture.info:
            picture = picture.convert("RGBA")
        elif picture.mode == "P":
            picture = picture.convert("RGB")
        if picture.mode not in ("RGB", "RGBA"):
            raise not_rgb(path, f"is of mode {picture.mode!r}")
        n, (width, height) = len(picture.mode), picture.size
        deep = _deep_png(path)
        samples = Samples(alpha=3 if n == 4 else None)
        if deep is not None:  # pillow gives only the upper 8 bits
            values = spread(np.moveaxis(deep, -1, 0), range(3))
            white = white_value(repr(str(path)), deep.dtype, values)
            logger.info("%s: taken as %d bit: its largest values are %d", path, bits(white), largest(values))
            samples = Samples(white=white, alpha=samples.alpha, opaque=65535.0)
        whole = np.empty((3, height, width), np.uint8)
        seen = n == 3
        for y in range(0, height, _CHUNK_PX):  # strip by strip: a second copy of the whole image would not fit
            bottom = min(y + _CHUNK_PX, height)
            strip = np.asarray(picture.crop((0, y, width, bottom))) if deep is None else deep[y:bottom]
            seen |= bool(strip[..., -1].any())
            whole[:, y:bottom] = samples.rgb8(np.moveaxis(strip, -1, 0))
        if not seen:
            raise not_rgb(path, "is transparent everywhere")
    return da.from_array(turn.apply(whole), chunks=(-1, _CHUNK_PX, _CHUNK_PX), name=False)


def _deep_png(path: Path) -> NDArray[np.uint16] | None:
    """Pixels (y, x, c) of a PNG of 16 bits; ``None`` for others."""
    import imagecodecs

    with path.open("rb") as file:
        start = file.read(26)
        if not start.startswith(b"\x89PNG") or start[24] != 16:
            return None
        file.seek(0)
        return np.asarray(imagecodecs.png_decode(file.read()))


def _exif_orientation(picture: Any, path: Path) -> int:
    from PIL import Image

    late = False
    if picture.format == "PNG" and "exif" not in picture.info:  # it may follow the pixels, which pillow then decodes
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            late = content.find(b"eXIf") >= 0
    found = (picture.getexif() if late else Image.Image.getexif(picture)).get(274, 1)
    return int(found) if found in range(1, 9) else 1


@contextlib.contextmanager
def _picture(path: Path) -> Iterator[Any]:
    """Open with pillow without its limit of size, which slides exceed."""
    from PIL import Image

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path, formats=("JPEG", "PNG", "MPO")) as picture:
            yield picture
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _unreadable(path: Path, why: str) -> ImageError:
    msg = (
        f"{str(path)!r} cannot be read as an image ({why}). Is the file complete? Copy it again, or export it as an "
        "RGB TIFF."
    )
    return ImageError(msg)
