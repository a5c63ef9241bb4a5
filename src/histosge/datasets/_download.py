"""Files over the network into a folder: once, resumed where they broke off, and the same ever after.

Beside each file lies ``NAME.sha256``, as ``sha256sum -c`` reads it. Files of which nobody has published a hash are
trusted at first sight and compared from then on. A file that somebody has put there by other means is as good as a
downloaded one.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import time
import zlib
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from histosge._settings import logger, progress_bar

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import requests

    from histosge.datasets._registry import RemoteFile

# the servers of 10x Genomics and of spatialLIBD turn programs away that do not say so
_HEADERS = {"User-Agent": "Mozilla/5.0 (compatible; histosge)", "Accept-Encoding": "identity"}
_TIMEOUT_S = (15, 60)
_ATTEMPTS = 3
"""In a row without a single new byte"""
_PAUSE_S = 1.0
_CHUNK_BYTES = 1 << 20


class DownloadError(OSError):
    """A file of a published section cannot be had, or is not what it was; the message says what to do."""


def data_folder() -> Path:
    """Where published sections lie: ``HISTOSGE_DATA``, else in the system's cache folder."""
    if chosen := os.environ.get("HISTOSGE_DATA"):
        return Path(chosen).expanduser().absolute()
    from platformdirs import user_cache_path

    return user_cache_path("histosge", appauthor=False) / "datasets"


def missing(folder: Path, files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """Files that are not in the folder yet, neither as such nor unpacked."""
    return [file for file in files if not (_unpacked(folder, file) or (folder / file.path).is_file())]


def fetch_files(folder: Path, files: Sequence[RemoteFile]) -> None:
    """Bring all files into the folder; what is there already is compared with its hash and kept.

    Raises
    ------
    DownloadError
        A file could not be downloaded, or is not what was recorded, or the folder cannot be written to.
    """
    try:
        left = [file for file in files if file.unpack and not _unpacked(folder, file)] or missing(folder, files)
        with _alone(folder) if left else nullcontext():  # a folder that is whole may be read-only
            for file in files:
                if _unpacked(folder, file):
                    continue
                target = folder / file.path
                if not target.is_file():
                    _download(folder, file, missing(folder, files))
                _compare(target, file)
                if file.unpack:
                    _unpack(folder, file)
    except OSError as err:
        if isinstance(err, DownloadError):
            raise
        msg = (
            f"the folder {folder} cannot be used: {err.strerror or err}. Mend that, or set the environment variable "
            "HISTOSGE_DATA to another one."
        )
        raise DownloadError(msg) from err


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time download to a folder: two that append to one part make a file that is neither's."""
    from filelock import FileLock, Timeout

    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(_beside(folder, ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("another process downloads to %s: waiting for it", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _download(folder: Path, file: RemoteFile, left: Sequence[RemoteFile]) -> None:
    """Download one file; ``left`` are all that have still to come, for the message."""
    import pooch
    import requests

    target = folder / file.path
    target.parent.mkdir(parents=True, exist_ok=True)
    known = file.sha256 or _recorded(target)
    logger.info("downloading %s to %s", file.url, target)
    try:
        with _quiet_pooch():
            pooch.retrieve(
                file.url,
                known_hash=f"sha256:{known}" if known else None,
                fname=target.name,
                path=target.parent,
                downloader=_Resuming(_beside(target, ".part")),
            )
    except requests.RequestException as err:
        places = "\n".join(f"  {other.url}\n    → {folder / other.path}" for other in left)
        msg = (
            f"could not download {file.url}: {_reason(err)}. What has come is kept: the same call goes on from there.\n"
            f"Without a network, download these {len(left)} files by other means, put each at the place after its arrow, "
            f"and make the same call again:\n{places}\n"
            "For another folder, set the environment variable HISTOSGE_DATA."
        )
        raise DownloadError(msg) from err
    except ValueError as err:  # of pooch, which has removed the file
        msg = (
            f"{file.url} has sent something else than it should: sha256 {known} was {_origin(file)}. The file was "
            "damaged on the way, or changed by its owner. Try again; if it stays so, get the right file by other means, "
            f"put it at {target} and make the same call again{_or_accept(target, file)}."
        )
        raise DownloadError(msg) from err


class _Resuming:
    """What pooch calls to download: goes on with what an earlier call has left, where the server can."""

    def __init__(self, part: Path) -> None:
        self.part = part
        self.version = _beside(part, ".version")
        """Holds what the server calls this version of the file: half of one and half of another is neither"""

    def __call__(self, url: str, output_file: str, pooch: Any) -> None:
        import requests

        idle = 0
        while True:
            before = _size(self.part)
            try:
                self._append(url)
                break
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError):
                idle = 0 if _size(self.part) > before else idle + 1
                if idle >= _ATTEMPTS:
                    raise
                time.sleep(_PAUSE_S * 2**idle)
        self.part.replace(output_file)
        self.version.unlink(missing_ok=True)

    def _append(self, url: str) -> None:
        import requests

        start, version = _size(self.part), self.version.read_text() if self.version.exists() else ""
        headers = dict(_HEADERS)
        if start and version:
            headers |= {"Range": f"bytes={start}-", "If-Range": version}
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT_S) as answer:
            if answer.status_code == requests.codes.requested_range_not_satisfiable:
                if answer.headers.get("Content-Range") == f"bytes */{start}":
                    return  # all of it was here already
                self.part.unlink()
                msg = "the server has no such part of the file"
                raise requests.ConnectionError(msg)
            answer.raise_for_status()
            if "text/html" in answer.headers.get("Content-Type", ""):
                msg = "the server answers with a web page instead of the file"
                raise requests.RequestException(msg)
            resumed = answer.status_code == requests.codes.partial_content
            start = start if resumed else 0
            length = answer.headers.get("Content-Length")
            total = start + int(length) if length else None
            with (
                self.part.open("ab" if resumed else "wb") as out,
                progress_bar(desc=url.rpartition("/")[2], total=total, unit="B") as bar,
            ):
                self.version.write_text(_version(answer))
                bar.unit_scale = True
                bar.update(start)
                bar.refresh()
                for chunk in answer.iter_content(_CHUNK_BYTES):
                    bar.update(out.write(chunk))
        if total is not None and _size(self.part) != total:
            msg = f"the connection broke off after {_size(self.part)} of {total} bytes"
            raise requests.ConnectionError(msg)


def _version(answer: requests.Response) -> str:
    """Name of the file's version that a server promises to be exact; empty where it does not."""
    etag = answer.headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified", "")


def _compare(target: Path, file: RemoteFile) -> None:
    """Compare a file with its hash, or record it."""
    from pooch import file_hash

    is_now, known = file_hash(str(target)), file.sha256 or _recorded(target)
    if known and is_now != known:
        msg = (
            f"{target} is not what it should be: its sha256 is {is_now}, but {known} was {_origin(file)}. Remove the "
            f"file, and the same call downloads it again{_or_accept(target, file)}."
        )
        raise DownloadError(msg)
    if not known:
        logger.info("%s: unverified, recorded on first download: sha256 %s", target.name, is_now)
    record = _beside(target, ".sha256")
    if not record.exists():
        record.write_text(f"{is_now}  {target.name}\n", encoding="utf-8")


def _unpack(folder: Path, file: RemoteFile) -> None:
    """Lay what is in an archive into the folder, and remove the archive: it may be large."""
    archive, room = folder / file.path, _beside(folder / file.path, ".unpacking")
    shutil.rmtree(room, ignore_errors=True)
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(room, filter="data")  # nothing outside the room, no links out of it, no devices
    except (tarfile.TarError, zlib.error, EOFError, OSError) as err:
        shutil.rmtree(room, ignore_errors=True)
        if isinstance(err, OSError) and not isinstance(err, tarfile.TarError) and err.errno is not None:
            raise  # of the disk, not of the archive
        reason = " ".join(str(err).split()).rstrip(".")
        msg = (
            f"{archive} cannot be unpacked: {reason}. Remove it and {_beside(archive, '.sha256').name}, and the same "
            f"call downloads it again from {file.url}."
        )
        raise DownloadError(msg) from err
    inside = room / str(file.unpack)
    (inside if inside.is_dir() else room).replace(folder / str(file.unpack))  # in one step: it is whole, or not there
    shutil.rmtree(room, ignore_errors=True)
    archive.unlink()


def _unpacked(folder: Path, file: RemoteFile) -> bool:
    return file.unpack is not None and (folder / file.unpack).is_dir()


def _recorded(target: Path) -> str | None:
    """Hash that was recorded when the file was first there."""
    with suppress(FileNotFoundError):
        return _beside(target, ".sha256").read_text(encoding="utf-8").split()[0]
    return None


def _origin(file: RemoteFile) -> str:
    return "published for it" if file.sha256 else "recorded when it was first here"


def _or_accept(target: Path, file: RemoteFile) -> str:
    return "" if file.sha256 else f"; to accept it as it is, remove {_beside(target, '.sha256').name} beside it"


def _reason(err: Exception) -> str:
    import requests

    if isinstance(err, requests.HTTPError) and err.response is not None:
        return f"the server answers {err.response.status_code} {err.response.reason}"
    inner = getattr(err.args[0], "reason", err) if err.args else err  # what urllib3 says of the last of its attempts
    return str(inner).rpartition("): ")[2].rstrip(".") or type(err).__name__


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@contextmanager
def _quiet_pooch() -> Iterator[None]:
    """We say ourselves what is downloaded, and in our own words."""
    import pooch

    log = pooch.get_logger()
    before = log.level
    log.setLevel("WARNING")
    try:
        yield
    finally:
        log.setLevel(before)
