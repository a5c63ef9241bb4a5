"""Places that are no local path: URLs of a web server, of object stores, and of anything else that fsspec knows.

A URL may hold a password or a token. It is split once, here: what is shown, logged or stored is :attr:`Remote.label`,
and errors of libraries, which quote the URL, are replaced.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import re
import threading
import time
from base64 import b64encode
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit
from uuid import uuid4

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from upath import UPath

logger = logging.getLogger("histosge")

Place: TypeAlias = "str | os.PathLike[str] | UPath | Remote"
"""A path, a URL, or a ``UPath``, which may hold options such as ``anon=True``"""

_URL = re.compile(r"[a-z][a-z0-9+.\-]*(://|::)", re.IGNORECASE)
_SHORTENED = re.compile(r"(https?|s3|gs|gcs|abfs|az|memory|sftp|ftp):/[^/]")
"""A URL that went through ``pathlib``"""
_TRIES = 5
_WAIT_S = 0.5
"""Before the second try; twice as long before each further one"""
_CONNECT_S, _SILENT_S = 30, 60
"""Most seconds until a web server answers, and between two pieces of its answer"""
_PASSING = (408, 425, 429)
"""Refusals of a web server that may pass; those from 500 on do as well"""
_PROBING = threading.Lock()
_OURS = (TypeError, AttributeError, NotImplementedError, AssertionError)
"""Errors of code, not of a network: another try does not help"""

Found = TypeVar("Found")


@dataclass(frozen=True, repr=False)
class Remote:
    """A file or folder at a URL."""

    url: str
    """Without credentials"""
    options: dict[str, Any] = field(default_factory=dict, compare=False)
    """Options of the file system, credentials among them"""

    @classmethod
    def of(cls, url: str, options: dict[str, Any] | None = None) -> Remote:
        """Split a URL into what may be shown and what may not."""
        options = dict(options or {})
        parts = urlsplit(url)
        if parts.scheme.lower() not in ("http", "https"):
            if "?" in url or ("::" in url and "@" in url):
                start = re.split(r"[?]|(?<=://)[^/]*@", url)[0]
                msg = (
                    f"{start!r}…: only URLs of a web server have a query, and no chain of file systems has a password. "
                    "Pass a upath.UPath with options."
                )
                raise ValueError(msg)
            plain = re.sub(r"//([^/@:]*):[^/@]*@", r"//\1@", url)
            return cls(re.sub(r"(?<![:/])/+$", "", plain), _with_password(url, options))
        import aiohttp

        how = {"trust_env": True, "timeout": aiohttp.ClientTimeout(None, sock_connect=_CONNECT_S, sock_read=_SILENT_S)}
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
            options["headers"] = {"Authorization": f"Basic {b64encode(pair).decode()}"} | options.get("headers", {})
        options["client_kwargs"] = how | options.get("client_kwargs", {})
        if parts.query:
            options["params"] = dict(parse_qsl(parts.query, keep_blank_values=True)) | options.get("params", {})
        host = parts.netloc.rpartition("@")[2]
        return cls(urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", "")), options)

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return repr(self.url)

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.url}/{name}", self.options)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.url.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """Ending of the name."""
        return Path(self.name).suffix

    @property
    def protocol(self) -> str:
        """Such as ``"s3"``; of a chain the first."""
        return re.split("::?", self.url)[0].lower()

    @functools.cached_property
    def fs(self) -> Any:
        """The file system."""
        return self._open()[0]

    @functools.cached_property
    def path(self) -> str:
        """The path in the file system."""
        return str(self._open()[1])

    def _open(self) -> tuple[Any, Any]:
        from fsspec import available_protocols
        from fsspec.core import url_to_fs

        try:
            return url_to_fs(self.url, **self.options)
        except ImportError as err:
            msg = f"{self.url!r} needs a package that is not installed ({err}): install it."
            raise ImportError(msg) from None
        except ValueError as err:
            if "rotocol not known" not in str(err):
                raise _failure(self, err, "opened") from None
            some = [name for name in ("https", "s3", "gs", "abfs", "sftp", "memory") if name in available_protocols()]
            msg = f"{self.url!r} has a protocol that fsspec does not know: choose one of {some}, or a path."
            raise ValueError(msg) from None

    @property
    def hides_missing(self) -> bool:
        """Whether the server refuses access to files that do not exist, as to buckets that must not be listed."""
        with _PROBING:  # by one thread, once
            return self._hides_missing

    @functools.cached_property
    def _hides_missing(self) -> bool:
        nowhere = self / f"histosge-{uuid4().hex}"
        try:
            again(lambda: self.fs.cat_file(nowhere.path), nowhere, "read")
        except PermissionError:
            logger.warning(
                "%s: the server refuses access to files that do not exist. Chunks that it refuses are read as empty.",
                self,
            )
            return True
        except FileNotFoundError:
            pass
        return False

    def has(self, *names: str) -> bool:
        """Whether there is a file of one of these names in the folder."""
        return any(again(functools.partial(self.fs.exists, f"{self.path}/{n}"), self / n, "read") for n in names)

    def exists(self) -> bool:
        """Whether there is a file of this name, or a zarr store."""
        self.fs.invalidate_cache()
        return bool(again(lambda: self.fs.isfile(self.path), self, "read")) or self.has(*ZARR_MARKS)

    def read_bytes(self) -> bytes | None:
        """Content of the file; ``None`` where it does not exist."""
        self.fs.invalidate_cache()
        try:
            return bytes(again(lambda: self.fs.cat_file(self.path), self, "read"))
        except FileNotFoundError:
            return None

    def write_bytes(self, content: bytes) -> None:
        """Write the file in one step."""
        again(lambda: self.fs.pipe_file(self.path, content), self, "written")


ZARR_MARKS = ("zarr.json", ".zgroup", ".zattrs")
"""Files of which every zarr store has one"""
ABOUT = (*ZARR_MARKS, ".zarray", ".zmetadata", ".parquet")
"""Endings of files that are no chunks"""


def located(place: Place) -> Path | Remote:
    """Return a path as a path, and a URL as a :class:`Remote`."""
    if isinstance(place, Remote):
        return place
    if isinstance(place, str | os.PathLike) and not _URL.match(os.fspath(place)):
        if _SHORTENED.match(os.fspath(place)):
            msg = f"{os.fspath(place)!r} is a URL of which pathlib has removed a slash: pass it as text."
            raise ValueError(msg)
        return Path(place).expanduser()
    remote = Remote.of(str(place), dict(getattr(place, "storage_options", {})))
    return Path(remote.path) if remote.protocol in ("file", "local") else remote


def is_url(place: object) -> bool:
    """Whether it is a URL, as text or as a ``UPath``, and not a path or something else."""
    if isinstance(place, Remote):
        return True
    if isinstance(place, str):
        return _URL.match(place) is not None
    return hasattr(place, "storage_options") and hasattr(place, "protocol") and not isinstance(place, os.PathLike)


def shown(place: Place) -> str:
    """Return a path or URL as text without credentials, for messages, logs and files."""
    return str(located(place)) if is_url(place) else str(place)


def again(action: Callable[[], Found], remote: Remote, done: str) -> Found:
    """Do something with a remote file, several times where it fails in a way that may pass.

    ``FileNotFoundError`` is the caller's. Other errors become one that names the URL, without credentials.

    Parameters
    ----------
    action
        What to do.
    remote
        The file.
    done
        The participle for messages: ``"read"``.
    """
    for attempt in range(_TRIES):
        try:
            return action()
        except (FileNotFoundError, *_OURS):
            raise
        except Exception as err:  # noqa: BLE001  every library has errors of its own
            time.sleep(_wait_or_raise(err, attempt, remote, done))
    raise AssertionError


async def again_async(action: Callable[[], Awaitable[Found]], remote: Remote, done: str) -> Found:
    """Do the same as :func:`again`, for a coroutine."""
    for attempt in range(_TRIES):
        try:
            return await action()
        except (FileNotFoundError, *_OURS):
            raise
        except Exception as err:  # noqa: BLE001  every library has errors of its own
            await asyncio.sleep(_wait_or_raise(err, attempt, remote, done))
    raise AssertionError


def _wait_or_raise(err: Exception, attempt: int, remote: Remote, done: str) -> float:
    """Seconds until the next try; raise where there is none."""
    status = getattr(err, "status", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in _PASSING
    if attempt + 1 == _TRIES or refused or isinstance(err, PermissionError | ImportError) or _no_credentials(err):
        raise _failure(remote, err, done, tries=attempt + 1) from None
    logger.debug("%s: try %d of %d failed (%s)", remote, attempt + 1, _TRIES, type(err).__name__)
    return float(_WAIT_S * 2**attempt)


def _no_credentials(err: Exception) -> bool:
    return "Credential" in type(err).__name__ or "Unable to locate credentials" in str(err)


def _failure(remote: Remote, err: Exception, done: str, *, tries: int = 1) -> OSError:
    """Error that names the URL and a remedy; the text of a library may hold credentials."""
    status = getattr(err, "status", None)
    what = type(err).__name__ + (f", status {status}" if isinstance(status, int) else "")
    if isinstance(err, PermissionError) or status in (401, 403) or _no_credentials(err):
        remedy = {
            "s3": " AWS_PROFILE or AWS_ACCESS_KEY_ID names whose; for a public bucket set FSSPEC_S3_ANON=true.",
            "gs": " GOOGLE_APPLICATION_CREDENTIALS names whose; for a public bucket set FSSPEC_GS_TOKEN=anon.",
        }.get(remote.protocol, "")
        return PermissionError(
            f"{remote.url!r} cannot be {done}: access is refused ({what}). Check the URL and the credentials.{remedy}"
        )
    after = f" after {tries} tries" if tries > 1 else ""
    return OSError(
        f"{remote.url!r} cannot be {done}{after} ({what}). Check the URL, the network and the server, and start again."
    )


def _with_password(url: str, options: dict[str, Any]) -> dict[str, Any]:
    """Add the password in a URL to the options of a file system that takes one."""
    found = re.search(r"//([^/@:]*):([^/@]*)@", url)
    return options if found is None else {"username": found[1], "password": found[2]} | options


def stores_folder() -> Path:
    """Folder of stores that are being made for a URL: ``HISTOSGE_STORES``, else in the system's cache folder."""
    chosen = os.environ.get("HISTOSGE_STORES")
    if chosen:
        return Path(chosen).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("histosge", appauthor=False) / "stores"
