"""Download the files of a section into a folder, once, and compare them with their hashes at every call.

Each file has a ``NAME.sha256`` next to it, which ``sha256sum -c`` reads. Where no hash is published, the hash of the
first download is recorded and compared from then on. Files that the user puts into the folder are accepted.
"""

from __future__ import annotations

import os
import re
import shutil
import tarfile
import zlib
from contextlib import contextmanager, nullcontext
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from histosge._atomic import replacing
from histosge._settings import logger, progress_bar

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from histosge.datasets._registry import RemoteFile

# the servers of 10x Genomics and of spatialLIBD refuse programs without a user agent
_HEADERS = {"User-Agent": "Mozilla/5.0 (compatible; histosge)", "Accept-Encoding": "identity"}
_TIMEOUT_S = (15, 60)
_CHUNK_BYTES = 1 << 20


class DownloadError(OSError):
    """A file of a published section cannot be downloaded, or has changed; the message has the remedy."""


def data_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Folder of published sections: ``HISTOSGE_DATA``, else in the system's cache folder."""
    if chosen := environ.get("HISTOSGE_DATA"):
        return Path(chosen).expanduser().absolute()
    from platformdirs import user_cache_path

    return user_cache_path("histosge", appauthor=False) / "datasets"


def missing(folder: Path, files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """Files that are not in the folder yet, neither packed nor unpacked."""
    return [file for file in files if not (_unpacked(folder, file) or (folder / file.path).is_file())]


def fetch_files(folder: Path, files: Sequence[RemoteFile], *, retries: int = 2) -> None:
    """Download the files that the folder lacks; compare the others with their hashes.

    Parameters
    ----------
    folder
        Where to put them.
    files
        All files of the section.
    retries
        How often a failed download is tried again.

    Raises
    ------
    DownloadError
        A file cannot be downloaded, or differs from its hash, or the folder cannot be written to.
    """
    try:
        left = [file for file in files if file.unpack and not _unpacked(folder, file)] or missing(folder, files)
        with _locked(folder) if left else nullcontext():  # a complete folder may be read-only
            for file in files:
                if _unpacked(folder, file):
                    continue
                target = folder / file.path
                if not target.is_file():
                    _download(folder, file, missing(folder, files), retries=retries)
                _compare(target, file)
                if file.unpack:
                    _unpack(folder, file)
    except OSError as err:
        if isinstance(err, DownloadError):
            raise
        msg = (
            f"the folder {folder} cannot be used: {err.strerror or err}. Correct that, or set the environment "
            "variable HISTOSGE_DATA to another one."
        )
        raise DownloadError(msg) from err


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time download to a folder: the jobs of an array start together and need the same files."""
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


def _download(folder: Path, file: RemoteFile, left: Sequence[RemoteFile], *, retries: int) -> None:
    """Download one file; the message of an error lists all files that are still missing, ``left``."""
    import pooch
    import requests

    target = folder / file.path
    known = file.sha256 or _recorded(target)
    for old in target.parent.glob("tmp*"):  # pooch's, of a process that was killed: this one holds the lock
        if re.fullmatch("tmp[a-z0-9_]{8}", old.name) and old.is_file():
            old.unlink()
    logger.info("downloading %s to %s", file.url, target)
    try:
        with _quiet_pooch():
            pooch.create(
                path=target.parent,
                base_url="",
                registry={target.name: f"sha256:{known}" if known else None},
                urls={target.name: file.url},
                retry_if_failed=retries,
            ).fetch(target.name, downloader=partial(_download_once, verified=bool(known)))
    except requests.RequestException as err:
        addresses = "\n".join(f"  {other.url}\n    → {folder / other.path}" for other in left)
        msg = (
            f"could not download {file.url}: {_reason(err)}. Files that are complete are kept: the same call downloads "
            "the others.\n"
            f"Without a network, download these {len(left)} files by other means, put each at its path, "
            f"and make the same call again:\n{addresses}\nFor another folder, set the environment variable "
            "HISTOSGE_DATA."
        )
        raise DownloadError(msg) from err
    except ValueError as err:  # from pooch, which has removed the file
        msg = (
            f"{file.url} has sent another file than expected: sha256 {known} was {_origin(file)}. The file was "
            "damaged on the way, or changed by its owner. Try again; if the error stays, get the right file by other "
            f"means, put it at {target} and make the same call again{_or_accept(target, file)}."
        )
        raise DownloadError(msg) from err


def _download_once(url: str, output_file: str, _: Any, *, verified: bool) -> None:
    """Download a file with a progress bar; pooch calls it, and calls it again after an error.

    What is not ``verified`` by a hash afterwards must be known to be complete: its length is stated, or its last chunk
    is marked.
    """
    import requests

    path = Path(output_file)
    path.unlink()  # pooch's empty file, which only its owner may read; the new one has the usual permissions
    with requests.get(url, headers=_HEADERS, stream=True, timeout=_TIMEOUT_S) as answer:
        answer.raise_for_status()
        if answer.status_code != HTTPStatus.OK:
            msg = f"the server answers {answer.status_code} {answer.reason} instead of the whole file"
            raise requests.RequestException(msg)
        if "text/html" in answer.headers.get("Content-Type", ""):
            msg = "the server answers with a web page instead of the file"
            raise requests.RequestException(msg)
        stated = answer.headers.get("Content-Length", "")
        length = int(stated) if stated.isascii() and stated.isdigit() else None
        if length is None and not verified and answer.headers.get("Transfer-Encoding", "").lower() != "chunked":
            msg = "the server states no length, so that a file that is cut short would not be noticed"
            raise requests.RequestException(msg)
        with path.open("wb") as out, progress_bar(desc=url.rpartition("/")[2], total=length, unit="B") as bar:
            bar.unit_scale = True
            bar.refresh()
            for chunk in answer.iter_content(_CHUNK_BYTES):
                bar.update(out.write(chunk))
            n_bytes = out.tell()
    if n_bytes == 0:
        msg = "the server sends an empty file"
        raise requests.RequestException(msg)
    if length is not None and n_bytes != length:  # urllib3 1 does not notice it
        msg = f"the connection broke off after {n_bytes} of {length} bytes"
        raise requests.ConnectionError(msg)


def _compare(target: Path, file: RemoteFile) -> None:
    """Compare a file with its hash, or record it."""
    from pooch import file_hash

    is_now, known = file_hash(str(target)), file.sha256 or _recorded(target)
    if known and is_now != known:
        msg = (
            f"{target} is not the expected file: its sha256 is {is_now}, but {known} was {_origin(file)}. Remove the "
            f"file, and the same call downloads it again{_or_accept(target, file)}."
        )
        raise DownloadError(msg)
    if not known:
        logger.info("%s: unverified, recorded on first download: sha256 %s", target.name, is_now)
    record = _beside(target, ".sha256")
    if not record.exists():
        with replacing(record) as draft:
            draft.write_text(f"{is_now}  {target.name}\n", encoding="utf-8")


def _unpack(folder: Path, file: RemoteFile) -> None:
    """Unpack an archive into the folder, and remove the archive, which may be large."""
    archive, unpacking = folder / file.path, _beside(folder / file.path, ".unpacking")
    shutil.rmtree(unpacking, ignore_errors=True)
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(unpacking, filter="data")  # nothing outside the folder, no links out of it, no devices
        if not unpacking.is_dir() or (unpacking / str(file.unpack)).is_file():
            msg = f"it holds no folder {file.unpack}"
            raise tarfile.ReadError(msg)
    except (tarfile.TarError, zlib.error, EOFError, OSError) as err:
        shutil.rmtree(unpacking, ignore_errors=True)
        if isinstance(err, OSError) and not isinstance(err, tarfile.TarError) and err.errno is not None:
            raise  # an error of the disk, not of the archive
        reason = " ".join(str(err).split()).rstrip(".")
        msg = (
            f"{archive} cannot be unpacked: {reason}. Remove it and {_beside(archive, '.sha256').name}, and the same "
            f"call downloads it again from {file.url}."
        )
        raise DownloadError(msg) from err
    inside = unpacking / str(file.unpack)
    (inside if inside.is_dir() else unpacking).replace(
        folder / str(file.unpack)
    )  # in one step: it is complete, or missing
    shutil.rmtree(unpacking, ignore_errors=True)
    archive.unlink()


def _unpacked(folder: Path, file: RemoteFile) -> bool:
    return file.unpack is not None and (folder / file.unpack).is_dir()


def _recorded(target: Path) -> str | None:
    """Hash that was recorded after the first download."""
    record = _beside(target, ".sha256")
    if not record.exists():
        return None
    found = re.match(r"[0-9a-fA-F]{64}(?=\s|$)", record.read_text(encoding="utf-8", errors="replace"))
    if found is None:
        msg = f"{record} is damaged: it does not begin with a sha256 of 64 digits. Remove it to accept {target.name}."
        raise DownloadError(msg)
    return found[0].lower()


def _origin(file: RemoteFile) -> str:
    return "published for it" if file.sha256 else "recorded after the first download"


def _or_accept(target: Path, file: RemoteFile) -> str:
    return "" if file.sha256 else f"; to accept it as it is, remove {_beside(target, '.sha256').name} next to it"


def _reason(err: Exception) -> str:
    import requests

    if isinstance(err, requests.HTTPError) and err.response is not None:
        return f"the server answers {err.response.status_code} {err.response.reason}"
    inner = getattr(err.args[0], "reason", err) if err.args else err  # urllib3's error of the last attempt
    return str(inner).rpartition("): ")[2].rstrip(".") or type(err).__name__


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


@contextmanager
def _quiet_pooch() -> Iterator[None]:
    """Silence pooch's log: histosge logs downloads itself."""
    import pooch

    log = pooch.get_logger()
    before = log.level
    log.setLevel("WARNING")
    try:
        yield
    finally:
        log.setLevel(before)
