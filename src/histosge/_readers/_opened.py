"""A section, or where it lies → an open ``SpatialData``, for doors that take both."""

from __future__ import annotations

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
    from spatialdata import SpatialData

    if isinstance(source, SpatialData):
        return source
    if isinstance(source, str | PathLike):
        return open_section(Path(source))
    msg = f"sdata holds a {type(source).__name__}: pass SpatialData objects, or paths of sections."
    raise TypeError(msg)


def name_of(source: Source) -> str | None:
    """Name of a section: that of its file or folder, without ending; ``None`` where it is only in memory."""
    path = path_of(source)
    return None if path is None else Path(path).name.removesuffix(Path(path).suffix)


def path_of(source: Source) -> str | None:
    """Where a section lies, as text; ``None`` where it is only in memory."""
    if isinstance(source, str | PathLike):
        return str(Path(source).expanduser().absolute())
    return None if source.path is None else str(Path(source.path).absolute())
