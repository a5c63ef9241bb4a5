"""A section, or where it lies → an open ``SpatialData``, for doors that take both."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from histosge._readers._open import open_section

if TYPE_CHECKING:
    from spatialdata import SpatialData

Source: TypeAlias = "SpatialData | str | PathLike[str]"
"""A section in memory, or the path of anything that :func:`histosge.io.read` reads without further arguments."""


def opened(source: Source) -> SpatialData:
    """Return the section itself, or read it from its path; images stay on disk.

    Nothing is kept: drop the result to free it.
    """
    path_of(source)  # raise where it is no section
    return open_section(Path(source)) if isinstance(source, str | PathLike) else source


def are_many(sdata: object) -> bool:
    """Whether it is a list of sections (or a dict, or anything to iterate over), not one section or path."""
    from spatialdata import SpatialData

    return isinstance(sdata, Iterable) and not isinstance(sdata, SpatialData | str | PathLike)


def name_of(source: Source) -> str | None:
    """Name of a section: that of its file or folder, without ending; ``None`` where it is only in memory."""
    path = path_of(source)
    return None if path is None else Path(path).name.removesuffix(Path(path).suffix)


def path_of(source: Source) -> str | None:
    """Where a section lies, as text; ``None`` where it is only in memory. Raise where it is no section."""
    from spatialdata import SpatialData

    if isinstance(source, str | PathLike):
        return str(Path(source).expanduser().absolute())
    if not isinstance(source, SpatialData):
        msg = f"sdata holds a {type(source).__name__}: pass SpatialData objects, or paths of sections."
        raise TypeError(msg)
    return None if source.path is None else str(Path(source.path).absolute())
