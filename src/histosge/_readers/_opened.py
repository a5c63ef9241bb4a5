"""A section, or where it lies → an open ``SpatialData``, for doors that take both."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

from histosge._readers._open import open_section
from histosge._remote import Remote, is_url, located

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from histosge._remote import Place

Source: TypeAlias = "SpatialData | Place"
"""A section in memory, or the path or URL of anything that :func:`histosge.io.read` reads without further arguments."""


def opened(source: Source) -> SpatialData:
    """Return the section itself, or read it from its path or URL; images stay there.

    Nothing is kept: drop the result to free it.
    """
    return open_section(source) if _place(source) is not None and not _is_section(source) else source


def are_many(sdata: object) -> bool:
    """Whether it is a list of sections (or a dict, or anything to iterate over), not one section or path."""
    return isinstance(sdata, Iterable) and not _is_section(sdata) and not _is_place(sdata)


def name_of(source: Source) -> str | None:
    """Name of a section: that of its file or folder, without ending; ``None`` where it is only in memory."""
    place = _place(source)
    return None if place is None else place.name.removesuffix(place.suffix)


def path_of(source: Source) -> str | None:
    """Where a section lies, as text without credentials; ``None`` where it is only in memory."""
    place = _place(source)
    return None if place is None else str(place)


def _place(source: Source) -> Path | Remote | None:
    """Where a section lies; raise where it is neither a section nor a place."""
    if _is_place(source):
        place = located(source)
        return place if isinstance(place, Remote) else place.absolute()
    if not _is_section(source):
        msg = f"sdata holds a {type(source).__name__}: pass SpatialData objects, or paths or URLs of sections."
        raise TypeError(msg)
    path = cast("SpatialData", source).path
    return None if path is None else Path(path).absolute()


def _is_place(source: object) -> bool:
    return isinstance(source, str | PathLike) or is_url(source)


def _is_section(source: object) -> bool:
    from spatialdata import SpatialData

    return isinstance(source, SpatialData)
