"""A section as readers find it, before its full-resolution image is there; names of files, elements and columns."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from histosge import _keys

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    from anndata import AnnData
    from geopandas import GeoDataFrame
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Found:
    """A section without its full-resolution image."""

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
    """Who says so"""
    attrs: dict[str, Any] = field(default_factory=dict)


def named(folder: Path, tail: str) -> Path | None:
    """The only file or folder that is called so, or ``PREFIX_`` and so."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    names = [path for path in paths if path.name == tail or path.name.endswith(f"_{tail}")]
    if len(names) > 1:
        msg = f"{str(folder)!r} holds {[path.name for path in names]}: of which section? Put each into a folder of its own."
        raise ValueError(msg)
    return names[0] if names else None


def valid_name(name: str) -> str:
    return _keys.slug(name).strip("_.") or "section"


def free_name(wanted: str, taken: Collection[Any]) -> str:
    """``wanted``, or with the first number that is not taken."""
    names = (wanted, *(f"{wanted}_{i}" for i in range(1, len(taken) + 2)))
    return next(name for name in names if name not in taken)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what spatialdata-io and scanpy say of things that are put right here."""
    with warnings.catch_warnings():
        for message in ("File .* does not exist", "No image path", "Converting `region_key", ".* names are not unique"):
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        yield
