"""Files that are replaced in one step, so that nobody ever finds half of one; errors of the disk that name a path."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the name of a draft in the same folder; it becomes ``path`` at the end, and is removed after an error."""
    draft = path.with_name(f"{path.name}.tmp")
    try:
        with naming(path):
            yield draft
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give errors of the disk a path where they have none: a full disk is noticed when a file is written or closed."""
    try:
        yield
    except OSError as err:
        if err.errno is not None and err.filename is None:
            err.filename = str(path)
        raise
