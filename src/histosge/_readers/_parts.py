"""What readers share: the kinds of sources, a section before its image is read, names, and messages."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from histosge import _keys
from histosge._image import ImageError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path

    from anndata import AnnData
    from geopandas import GeoDataFrame
    from numpy.typing import NDArray
    from spatialdata import SpatialData


@dataclass(frozen=True)
class Reader:
    """A kind of source, and how it is read."""

    what: str
    """What such a source is, in words for messages"""
    owns: Callable[[Path], bool]
    """Whether a source is of this kind"""
    read: Callable[..., Found | SpatialData]
    """Reads a source; called with those of the arguments in :attr:`takes` that the user gives, except ``image``"""
    takes: tuple[str, ...] = ("image", "dataset_id")
    """Arguments of :func:`histosge.io.read` that apply to it"""


@dataclass(frozen=True)
class Found:
    """A section without its full-resolution image, which is found, compared and read here for all readers."""

    name: str
    shapes_key: str
    shapes: GeoDataFrame
    table_key: str
    table: AnnData
    folders: tuple[Path, ...]
    """Where the full-resolution image may lie"""
    hires: Any = None
    """Space Ranger's thumbnail as an element; ``None`` where there is none"""
    small: NDArray[Any] | None = None
    """(h, w, 3) a small copy of the image that the spots were aligned to"""
    size_px: tuple[float, float] | None = None
    """(width, height) of the image that the spots were aligned to, where it is known"""
    size_source: str = ""
    """What states that size, in words for messages"""
    attrs: dict[str, Any] = field(default_factory=dict)


def named(folder: Path, tail: str) -> Path | None:
    """The only file or folder whose name is ``tail`` or ``PREFIX_tail``; ``None`` where there is none."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    names = [path for path in paths if path.name == tail or path.name.endswith(f"_{tail}")]
    if len(names) > 1:
        msg = (
            f"{str(folder)!r} holds {[path.name for path in names]}: of which section? Move each to a folder of its "
            "own."
        )
        raise ValueError(msg)
    return names[0] if names else None


def valid_name(name: str) -> str:
    return _keys.slug(name).strip("_.") or "section"


def free_name(wanted: str, taken: Collection[Any]) -> str:
    """``wanted``, or with the first number that is not taken."""
    names = (wanted, *(f"{wanted}_{i}" for i in range(1, len(taken) + 2)))
    return next(name for name in names if name not in taken)


def not_rgb(path: Path, what: str) -> ImageError:
    """The error for an image that is no RGB image."""
    msg = (
        f"{str(path)!r} {what}; an H&E image has red, green and blue, of 8 or 16 bits. Pass the brightfield image, or "
        "save this one as an RGB TIFF of 8 bits, for example in QuPath or ImageJ."
    )
    return ImageError(msg)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings of spatialdata-io and scanpy about what is put right here."""
    with warnings.catch_warnings():
        for message in ("File .* does not exist", "No image path", "Converting `region_key", ".* names are not unique"):
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        yield
