"""Working folders in which one process works at a time, on this machine or another that shares the disk.

A working folder has one run folder, ``run-ID``, and a file ``run-ID.json`` next to it, which names the process that owns
it and is touched twice a minute. Without this file the run folder is free. The run folder of a dead process is taken
over by renaming it. A rename succeeds for one process only, on every file system. It also locks the former owner out:
if that process only slept, the paths that it writes to are gone. So this needs no lock of the operating system, which
network file systems often lack. Nor does it need clocks that agree: the age of a file is its distance to one that was
just written to the same disk.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import threading
import time
import uuid
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Self

import psutil

from histosge._atomic import naming, replacing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

_BEAT_S = 30.0
_DEAD_AFTER_S = 300.0
"""A process of another machine that gave no sign for so long is dead: network file systems may be a minute late."""
_SAME_START_S = 2.0
_RUN = "run-"
_OURS = re.compile(r"run-[0-9a-f]{12}(\.json(\.[0-9]+-[0-9a-f]{8}\.tmp)?)?")
LABEL = "histosge-run.txt"
"""In every run folder that was claimed; a process that lost its folder may leave one without it."""
_TEXT = "Unfinished work of histosge: the next run with the same arguments continues it, or remove the folder.\n"
_OTHER_WAS_FASTER = (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST)


@dataclass(frozen=True)
class _Owner:
    """The process that works in a run folder."""

    pid: int
    start: float
    """Time at which it started: numbers of processes are used again."""
    host: str
    namespace: str
    """Of the numbers of processes: containers may have one host name, and numbers of their own."""
    since: str

    @classmethod
    def here(cls) -> Self:
        pid = os.getpid()
        try:
            namespace = os.readlink("/proc/self/ns/pid")  # noqa: PTH115  a link that leads nowhere
        except OSError:
            namespace = ""
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        return cls(pid, psutil.Process(pid).create_time(), socket.gethostname(), namespace, since)

    def is_alive(self, *, age_s: float, here: _Owner) -> bool:
        """Whether it still runs, by its number where that means something here, else by its last sign."""
        if (self.host, self.namespace) == (here.host, here.namespace):
            try:
                process = psutil.Process(self.pid)
                same = abs(process.create_time() - self.start) < _SAME_START_S
                return same and process.status() != psutil.STATUS_ZOMBIE
            except psutil.NoSuchProcess:
                return False
        return age_s < _DEAD_AFTER_S

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host!r}"


class Claim:
    """The run folder of a working folder; as a context, it is free again at the end.

    Parameters
    ----------
    home
        The working folder. It is made, and nothing else may be in it.
    what
        What is worked on, for messages: ``"store='x.zarr'"``.
    remedy
        What else to do than to wait, for messages: ``"choose another store="``.
    """

    def __init__(self, home: Path, *, what: str, remedy: str) -> None:
        self._home, self._what, self._remedy = home, what, remedy
        self._id = uuid.uuid4().hex[:12]
        self._file = home / f"{_RUN}{self._id}.json"
        self._stop = threading.Event()
        self.folder = home / f"{_RUN}{self._id}"
        """The run folder: empty, or with what an unfinished run has left."""
        with naming(home):
            self._take()
        threading.Thread(target=_beat, args=(self._file, self._stop), daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def check(self) -> None:
        """Raise where another process has taken the run folder over."""
        try:
            os.utime(self._file)
            if self.folder.is_dir():
                return
        except FileNotFoundError:
            pass
        self._stop.set()
        shutil.rmtree(self.folder, ignore_errors=True)  # made anew by a library that makes missing folders
        files = list(self._home.glob(f"{_RUN}*.json"))
        with suppress(OSError):
            self._home.rmdir()  # only if it is empty
        other = _read(files[0]) if files else None
        msg = (
            f"{self._what}: this process is no longer the one that writes it. It gave no sign for "
            f"{_DEAD_AFTER_S / 60:g} minutes or more, and {other or 'another one'} has taken the work over. Let that "
            f"one finish, or {self._remedy}."
        )
        raise RuntimeError(msg)

    def release(self) -> None:
        """Leave the run folder as it is to the next process."""
        self._stop.set()
        self._file.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the working folder: the work is done."""
        self.check()
        self._sweep(_Owner.here())
        (self.folder / LABEL).unlink()  # in one step: what is left is nobody's
        self.release()
        _remove(self.folder)
        with suppress(OSError):
            self._home.rmdir()  # another process may have come

    def _take(self) -> None:
        self._home.parent.mkdir(parents=True, exist_ok=True)
        here = _Owner.here()
        for _ in range(20):
            there = self._entries()
            folders = [path for path in there if path.suffix != ".json" and path.is_dir()]
            try:
                if folders:
                    self._take_over(folders, here)
                else:
                    self._make(there, here)
                break
            except OSError as err:
                if err.errno not in _OTHER_WAS_FASTER:
                    raise
                time.sleep(0.01)
        else:
            msg = f"{self._what}: several processes start to write it at this moment. Wait, or {self._remedy}."
            raise RuntimeError(msg)
        self._sweep(here)

    def _sweep(self, here: _Owner) -> None:
        """Remove what is left of processes that were killed or that lost their folder: nobody but us works here."""
        for left in self._entries():
            if left not in (self.folder, self._file):
                _remove(left)
        now, beside = self._file.stat().st_mtime, f".{self._home.name}."
        for left in self._home.parent.iterdir():
            if left.name.startswith(beside) and _OURS.fullmatch(_RUN + left.name.removeprefix(beside)):
                file = left / f"{_RUN}{left.name.removeprefix(beside)}.json"
                with suppress(FileNotFoundError):  # just finished
                    if not _is_alive(file if file.exists() else left, now=now, here=here):
                        _remove(left)

    def _entries(self) -> list[Path]:
        """What is in the working folder; raise where it is not ours."""
        try:
            there = sorted(self._home.iterdir())
        except FileNotFoundError:
            return []
        except NotADirectoryError:
            there = [self._home]
        if not all(_OURS.fullmatch(path.name) for path in there):
            msg = (
                f"{self._what}: the work would be done in {str(self._home)!r}, which exists and is not histosge's. "
                f"Move it away, or {self._remedy}."
            )
            raise FileExistsError(msg)
        return there

    def _make(self, there: list[Path], here: _Owner) -> None:
        """Make the working folder, with our run folder in it, in one step: it fails where there is one that is not empty."""
        draft = self._home.with_name(f".{self._home.name}.{self._id}")
        try:
            (draft / self.folder.name).mkdir(parents=True)
            (draft / self.folder.name / LABEL).write_text(_TEXT, encoding="utf-8")
            _write(draft / self._file.name, here)
            now = (draft / self._file.name).stat().st_mtime
            for file in there:
                if not _is_alive(file, now=now, here=here):
                    file.unlink()
            draft.rename(self._home)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _take_over(self, folders: list[Path], here: _Owner) -> None:
        """Take the run folder if its owner is dead, else raise."""
        try:
            _write(self._file, here)
            now = self._file.stat().st_mtime
            for folder in folders:
                file = folder.with_name(f"{folder.name}.json")
                with suppress(FileNotFoundError):  # without the file it is free
                    if _is_alive(file, now=now, here=here):
                        raise RuntimeError(self._busy(_read(file), file.stat().st_mtime, here))
            next((folder for folder in folders if (folder / LABEL).exists()), folders[0]).rename(self.folder)
            if not (self.folder / LABEL).exists():  # half removed
                for left in self.folder.iterdir():
                    _remove(left)
                (self.folder / LABEL).write_text(_TEXT, encoding="utf-8")
            os.utime(self._file)
        except BaseException:
            self._file.unlink(missing_ok=True)
            raise

    def _busy(self, owner: _Owner | None, last: float, here: _Owner) -> str:
        since = "" if owner is None else f" since {datetime.fromisoformat(owner.since):%Y-%m-%d %H:%M}"
        whose = "another process" if owner is None else str(owner)
        own = " (this process itself)" if owner and (owner.pid, owner.host) == (here.pid, here.host) else ""
        sign = datetime.fromtimestamp(last).astimezone()
        return (
            f"{self._what}: {whose}{own} writes it{since} (last sign {sign:%H:%M}). Wait for it, end it, or "
            f"{self._remedy}."
        )


@contextmanager
def scratch(target: Path, *, what: str) -> Iterator[Path]:
    """Give an empty folder next to a target, to this process only; it is removed at the end, also after an error.

    Parameters
    ----------
    target
        What is moved out of the folder to its place.
    what
        What is worked on, for messages.
    """
    with Claim(target.with_name(f".part.{target.name}"), what=what, remedy="choose another name") as claim:
        for left in claim.folder.iterdir():  # of a run that was killed
            if left.name != LABEL:
                _remove(left)
        try:
            yield claim.folder
        except BaseException:
            with suppress(OSError, RuntimeError):  # do not hide the error
                claim.remove()
            raise
        claim.remove()


def _is_alive(file: Path, *, now: float, here: _Owner) -> bool:
    """Whether the owner that a file names still runs."""
    age_s, owner = now - file.stat().st_mtime, _read(file)
    return age_s < _DEAD_AFTER_S if owner is None else owner.is_alive(age_s=age_s, here=here)


def _write(file: Path, owner: _Owner) -> None:
    with replacing(file) as draft:
        draft.write_text(json.dumps(asdict(owner)), encoding="utf-8")


def _read(file: Path) -> _Owner | None:
    """Owner of a run folder; ``None`` where the file is damaged."""
    try:
        owner = _Owner(**json.loads(file.read_text(encoding="utf-8")))
        datetime.fromisoformat(owner.since)
        return owner
    except (ValueError, TypeError, IsADirectoryError):
        return None


def _beat(file: Path, stop: threading.Event) -> None:
    """Give a sign twice a minute; not a method, so that it does not keep the claim alive."""
    while not stop.wait(_BEAT_S):
        try:
            os.utime(file)
        except FileNotFoundError:
            return
        except OSError:  # of a network that is away
            continue


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
