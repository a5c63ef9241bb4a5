"""Files that are replaced in one step, so that nobody ever finds half of one; errors of the disk that name a path."""

from __future__ import annotations

import os
import secrets
from contextlib import contextmanager, suppress
from time import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_ABANDONED_S = 3600
"""Age of a draft that no process writes any more"""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the name of a draft in the same folder; it becomes ``path`` at the end, and is removed after an error.

    The name belongs to this call alone, so that processes that write one file do not share a draft.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with naming(path, instead_of=draft):
            _remove_abandoned(path)
            yield draft
            draft.replace(path)
    except BaseException:
        with suppress(OSError):  # do not hide the error
            draft.unlink(missing_ok=True)
        raise


@contextmanager
def naming(path: Path, *, instead_of: Path | None = None) -> Iterator[None]:
    """Give errors of the disk a path where they have none, or have that of a draft.

    A full disk is noticed when a file is written or closed, and its error has no path.
    """
    try:
        yield
    except OSError as err:
        if err.errno is not None and (err.filename is None or str(err.filename) == str(instead_of)):
            err.filename, err.filename2 = str(path), None
        raise


def _remove_abandoned(path: Path) -> None:
    """Remove drafts of processes that were killed long ago."""
    for draft in path.parent.glob(f"{path.name}.*-*.tmp"):
        try:
            if time() - draft.stat().st_mtime > _ABANDONED_S:
                draft.unlink()
        except FileNotFoundError:  # another process was faster
            continue
