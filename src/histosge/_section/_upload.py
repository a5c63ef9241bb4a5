"""Stores at a URL: made in a local folder, and copied when they are complete.

Object stores cannot rename, so that a store cannot get its name last, as on a disk. Instead its root ``zarr.json`` is
copied last: without it there is no zarr store. A file next to it, which is written before the work starts and removed
after it, says which run the other files belong to; it also shows, before the work, that the place can be written.
"""

from __future__ import annotations

import hashlib
import json
import socket
import uuid
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING

from histosge._atomic import replacing
from histosge._remote import ZARR_MARKS, Remote, again, stores_folder
from histosge._settings import logger, progress_bar

if TYPE_CHECKING:
    from pathlib import Path

_MARKER = "histosge-upload.json"
_ROOT = ZARR_MARKS[0]
_BATCH = 32
"""Files that are copied by one call"""
_READ_ONLY = ("http", "https")


@dataclass(frozen=True)
class Upload:
    """A store at a URL that one run writes."""

    remote: Remote

    @classmethod
    def to(cls, remote: Remote) -> Upload:
        """Check the URL of a store."""
        refuse_read_only(remote)
        if remote.suffix not in ("", ".zarr") or not remote.path.strip("/"):
            msg = f"store={remote.url!r}: the name must end in .zarr."
            raise ValueError(msg)
        return cls(remote)

    @property
    def local(self) -> Path:
        """Where the store is made."""
        digest = hashlib.sha256(self.remote.url.encode()).hexdigest()[:16]
        return stores_folder() / digest / self.remote.name

    def exists(self) -> bool:
        """Whether the store is there, complete."""
        self.remote.fs.invalidate_cache()
        return self.remote.has(*ZARR_MARKS)

    def is_ours(self, folder: Path) -> bool:
        """Whether the run in a folder is the one that writes, or wrote, the store."""
        marked = self._marker()
        return marked is not None and marked.get("run") == _run_of(folder)

    def reserve(self, folder: Path) -> None:
        """Mark the place as that of the run in a folder; raise where it is another's."""
        marked = self._marker()
        if marked is not None and marked.get("run") == _run_of(folder):
            return
        if marked is not None:
            msg = (
                f"store={self.remote.url!r}: an unfinished run on host {marked.get('host')!r} writes it since "
                f"{marked.get('since')}. Let it finish, or start it there again; if it is lost, remove what is at the "
                "URL."
            )
            raise RuntimeError(msg)
        there = self._sizes()
        if there:
            msg = (
                f"store={self.remote.url!r}: there are other files, such as {min(there)!r}. Choose another store=, or "
                "remove them first."
            )
            raise FileExistsError(msg)
        run = {"run": _run_of(folder, new=True), "host": socket.gethostname()}
        run["since"] = datetime.now().astimezone().isoformat(timespec="seconds")
        (self.remote / _MARKER).write_bytes(json.dumps(run, indent=1).encode())
        logger.info("making the store in %s; it is copied to %s when it is complete", folder.parent.parent, self.remote)

    def copy(self, zarr: Path, folder: Path, *, progress: bool | None = None) -> None:
        """Copy the complete store; files that an interrupted copy has left are not copied again.

        Parameters
        ----------
        zarr
            The store on this machine.
        folder
            Folder of the run.
        progress
            Show a progress bar.
        """
        files = {path.relative_to(zarr).as_posix(): path.stat().st_size for path in zarr.rglob("*") if path.is_file()}
        there = self._sizes()
        left = sorted(name for name, size in files.items() if name != _ROOT and there.get(name) != size)
        fs, at = self.remote.fs, self.remote.path
        with progress_bar(desc="copying", total=len(left), unit="file", show=progress) as bar:
            for i in range(0, len(left), _BATCH):
                names = left[i : i + _BATCH]
                pairs = [str(zarr / name) for name in names], [f"{at}/{name}" for name in names]
                again(partial(fs.put, *pairs), self.remote, "written")
                bar.update(len(names))
        there = self._sizes()
        torn = sorted(name for name, size in files.items() if name != _ROOT and there.get(name) != size)
        if torn or not self.is_ours(folder):
            why = f"{len(torn)} files are not as they were written, such as {torn[0]!r}" if torn else "its mark is gone"
            msg = f"store={self.remote.url!r}: another process writes or removes it ({why}). Start again."
            raise RuntimeError(msg)
        (self.remote / _ROOT).write_bytes((zarr / _ROOT).read_bytes())

    def release(self) -> None:
        """Remove the mark of the run, and the folder on this machine where it is empty."""
        mark = self.remote / _MARKER
        try:
            again(lambda: self.remote.fs.rm_file(mark.path), mark, "removed")
        except FileNotFoundError:
            pass
        except OSError as err:
            logger.warning("the store is complete, but %s", err)
        with suppress(OSError):
            self.local.parent.rmdir()

    def _marker(self) -> dict[str, str] | None:
        found = (self.remote / _MARKER).read_bytes()
        if found is None:
            return None
        try:
            marked = json.loads(found)
        except ValueError:
            marked = None
        return marked if isinstance(marked, dict) else {}

    def _sizes(self) -> dict[str, int]:
        """Sizes of the files that are there, but for the mark."""
        fs, at = self.remote.fs, self.remote.path
        fs.invalidate_cache()
        try:
            found = again(lambda: fs.find(at, detail=True), self.remote, "read")
        except FileNotFoundError:
            return {}
        prefix = fs._strip_protocol(at).rstrip("/") + "/"
        names = {name.removeprefix(prefix): int(about["size"]) for name, about in found.items()}
        return {name: size for name, size in names.items() if name != _MARKER}


def refuse_read_only(remote: Remote) -> None:
    """Raise where nothing can be written to a URL."""
    if remote.protocol in _READ_ONLY:
        msg = (
            f"store={remote.url!r}: a web server can be read only. Name a path, or a URL that can be written, such as "
            "s3://BUCKET/NAME."
        )
        raise ValueError(msg)


def _run_of(folder: Path, *, new: bool = False) -> str | None:
    """Name of the run in a folder, which goes with the folder where another process takes it over."""
    file = folder / _MARKER
    if not file.exists():
        if not new:
            return None
        with replacing(file) as draft:
            draft.write_text(uuid.uuid4().hex, encoding="utf-8")
    return file.read_text(encoding="utf-8")
