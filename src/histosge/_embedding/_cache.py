"""Embeddings on disk: a group for each config, a file for each block, named by a digest of its input.

The caller passes a config, which is all that the values depend on except the pixels, and a digest of the pixels and the
locations in them. The same config and digest return the same values, others nothing. Groups and blocks are created and
removed by renaming, so that processes that share the folder do not see half of one. The folder is pruned when it is
opened: a run may exceed the limit by what it writes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

import numpy as np

from histosge._embedding._block_file import checksum, header, read
from histosge._settings import logger, settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

_MARKER = "histosge-cache.json"
"""Marks a folder as ours. Nothing is removed from other folders."""
_CONFIG = "config.json"
_FORMAT = 1
"""Part of every group's name, so that blocks of another format are not read."""
_PRUNE_TO = 0.9
"""Old blocks are removed down to this share of the limit, so that this happens seldom."""
_MADE_BY_OTHER = (errno.ENOTEMPTY, errno.EEXIST)
"""Errors of a rename to a folder that exists"""
_TURNS = 8
"""Attempts to write a block while other processes clear its group."""

# files that the cache makes and may remove; `.part` is being written or removed
_GROUP_NAME = re.compile(r"[0-9a-f]{64}(\.[0-9a-f]{16}\.part)?")
_BLOCK_NAME = re.compile(r"[0-9a-f]+(\.npy|\.[0-9a-f]{16}\.part)")
_DIGEST = re.compile(r"[0-9a-f]{16,128}")

_WARNED: set[Path] = set()
"""Folders with a warning in this process"""


@dataclass(frozen=True)
class CacheGroupInfo:
    """Description of one group: an entry of :meth:`EmbeddingCache.groups`."""

    folder: Path
    config: dict[str, Any]
    """Empty where it cannot be read"""
    n_blocks: int
    n_bytes: int
    last_used: datetime

    @property
    def encoder(self) -> str | None:
        """Name of the encoder."""
        return _encoder_name(self.config)

    def value(self, name: str) -> Any:
        """Return a value of the config, else of its encoder's spec."""
        spec = self.config.get("encoder")
        return self.config.get(name, spec.get(name) if isinstance(spec, dict) else None)


@dataclass(frozen=True)
class EmbeddingCache:
    """A folder of groups, pruned to a limit."""

    root: Path
    limit_bytes: int

    @classmethod
    def from_settings(cls) -> EmbeddingCache:
        """Take folder and limit from the settings, also where the cache is turned off, to list or clear it.

        Raises
        ------
        ValueError
            The folder is not empty and not histosge's.
        OSError
            It is no folder, or cannot be read.
        """
        root = cache_folder()
        _refuse_foreign(root)
        return cls(root, int(settings.cache_gb * 1e9))

    def group(self, config: dict[str, Any]) -> CacheGroup:
        """Return the group for the blocks of a config. Its folder is made with the first block.

        Parameters
        ----------
        config
            All that values depend on except pixels and locations, in JSON values. ``"encoder"`` is a name, or a dict
            with a ``"name"``.
        """
        text = _canonical(config)
        if _encoder_name(config) is None:
            msg = (
                f"config={config!r} does not name its encoder, by which the cache is listed and cleared. Pass "
                "config['encoder'], a name or a dict with a 'name'."
            )
            raise ValueError(msg)
        name = hashlib.sha256(f"{_FORMAT}\n{text}".encode()).hexdigest()
        return CacheGroup(self, config, self.root / name)

    def groups(self, *, encoder: str | None = None) -> list[CacheGroupInfo]:
        """Describe the groups of all encoders or of one, last used first."""
        found = [info for folder in self._folders() if "." not in folder.name and (info := _info(folder))]
        if encoder is not None:
            there = sorted({info.encoder for info in found if info.encoder})
            if encoder not in there:
                have = f"there are {', '.join(map(repr, there))}" if there else "there is nothing"
                msg = f"encoder={encoder!r}: {self.root} has no embeddings by it; {have}."
                raise ValueError(msg)
            found = [info for info in found if info.encoder == encoder]
        return sorted(found, key=lambda info: info.last_used, reverse=True)

    def clear(self, *, encoder: str | None = None) -> int:
        """Remove all blocks, or those of one encoder; return the number of freed bytes."""
        folders = list(self._folders()) if encoder is None else [info.folder for info in self.groups(encoder=encoder)]
        freed = 0
        for folder in folders:
            with suppress(FileNotFoundError):  # removed by another process
                freed += _remove(folder)
        return freed

    def prune(self) -> None:
        """Remove the least recently used blocks where all together exceed the limit."""
        blocks = sorted(block for folder in self._folders() for block in _blocks(folder))
        before = left = sum(size for _, size, _ in blocks)
        if before <= self.limit_bytes:
            return
        for _, size, path in blocks:
            if left <= _PRUNE_TO * self.limit_bytes:
                break
            with suppress(OSError):  # it is being read, on Windows, or is another user's
                Path(path).unlink(missing_ok=True)
                left -= size
        logger.debug("the cache is full: %d bytes of the oldest embeddings are removed", before - left)

    def _folders(self) -> Iterator[Path]:
        """Yield the folders of groups, including those that are, or were left, half made or half removed."""
        with suppress(FileNotFoundError), os.scandir(self.root) as entries:
            for entry in entries:
                if _GROUP_NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                    yield Path(entry.path)


@dataclass(frozen=True)
class CacheGroup:
    """The blocks of one config."""

    cache: EmbeddingCache
    config: dict[str, Any]
    folder: Path

    def get(self, digest: str) -> NDArray[Any] | None:
        """Return a copy of the (m, d) values of a block, or ``None``. A damaged block counts as absent."""
        path = self._path(digest)
        try:
            values = read(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as err:
            logger.debug("%s cannot be read (%s): the block is computed again", path, err)
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):  # a read-only cache is still useful
            os.utime(path)
        return values

    def put(self, digest: str, values: NDArray[Any]) -> None:
        """Store (m, d) values, completely or not at all. Without space or permission it warns once and does not raise.

        An existing block of this digest is not replaced: it is the same, or :meth:`get` removes it.
        """
        path = self._path(digest)
        head, body = header(values), np.ascontiguousarray(values)
        try:
            if not _touch(path):
                self._write(path, head, body, checksum(head, body))
        except OSError as err:
            _warn(self.cache.root, err)

    def _path(self, digest: str) -> Path:
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            msg = f"digest={digest!r}: pass 16 to 128 hexadecimal digits, such as hashlib.blake2b(...).hexdigest()."
            raise ValueError(msg)
        return self.folder / f"{digest}.npy"

    def _write(self, path: Path, *parts: Any) -> None:
        """Write under another name, then rename."""
        for turn in range(_TURNS):
            fresh = path.with_name(f"{path.stem}.{token_hex(8)}.part")
            try:
                self._set_up()
                with fresh.open("xb") as file:
                    for part in parts:
                        file.write(part)
                fresh.rename(path)
            except FileNotFoundError:  # another process cleared the group meanwhile
                if turn == _TURNS - 1:
                    raise
            except FileExistsError:  # Windows does not rename over the file of another process
                fresh.unlink()
                return
            except BaseException:
                with suppress(OSError):
                    fresh.unlink()
                raise
            else:
                return

    def _set_up(self) -> None:
        """Make the folder, with its config in it from the start."""
        if self.folder.is_dir():
            return
        root = self.cache.root
        root.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError), (root / _MARKER).open("x", encoding="utf-8") as file:
            json.dump({"what": "embeddings of histosge; see `histosge cache --help`", "format": _FORMAT}, file)
        fresh = _part(self.folder)
        fresh.mkdir()
        try:
            text = json.dumps(self.config, sort_keys=True, indent=1, ensure_ascii=False)
            (fresh / _CONFIG).write_text(text + "\n", encoding="utf-8")
            fresh.rename(self.folder)
        except OSError as err:
            shutil.rmtree(fresh, ignore_errors=True)
            # Another process made the folder at the same time. A third one may have cleared it since: then the block
            # finds no folder, and `_write` comes here again.
            if err.errno not in _MADE_BY_OTHER and not self.folder.is_dir():
                raise


def cache_folder() -> Path:
    """Folder of embeddings: ``settings.cache_dir``, else ``HISTOSGE_CACHE``, else in the system's cache folder."""
    chosen = settings.cache_dir or os.environ.get("HISTOSGE_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    from platformdirs import user_cache_path

    return user_cache_path("histosge", appauthor=False) / "embeddings"


def open_cache() -> EmbeddingCache | None:
    """Open the cache of the settings and prune it; ``None`` where it is turned off or cannot be used.

    Raises
    ------
    ValueError
        The folder is not empty and not histosge's.
    """
    if settings.cache_gb == 0:
        return None
    try:
        cache = EmbeddingCache.from_settings()
        cache.prune()
    except OSError as err:
        _warn(cache_folder(), err)
        return None
    return cache


def _refuse_foreign(root: Path) -> None:
    """Raise where a folder is not empty and the cache did not make it."""
    try:
        with os.scandir(root) as entries:
            names = [entry.name for entry in entries]
    except FileNotFoundError:
        return
    if names and _MARKER not in names:
        msg = (
            f"{root} is set as the folder for embeddings, but it holds something that is not histosge's "
            f"(there is no {_MARKER} in it). Set settings.cache_dir or HISTOSGE_CACHE to a new or an empty folder, or "
            "turn the cache off with settings.cache_gb=0."
        )
        raise ValueError(msg)


def _warn(root: Path, err: OSError) -> None:
    """Warn once in a process that a folder cannot be used; later log it as a detail."""
    if root in _WARNED:
        logger.debug("not stored: %s", err)
        return
    _WARNED.add(root)
    logger.warning(
        "embeddings cannot be stored in %s and are computed again next time (%s). Free space, set settings.cache_dir "
        "or HISTOSGE_CACHE to another folder, or turn the cache off with settings.cache_gb=0",
        root, err,
    )  # fmt: skip


def _canonical(config: dict[str, Any]) -> str:
    """Write a config as JSON; equal configs give equal text."""
    for key, value in config.items():
        try:
            json.dumps(value, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as err:
            msg = (
                f"config[{key!r}]={value!r} cannot be written as JSON ({err}): pass finite numbers, strings, booleans, "
                "None, and lists and dicts of them."
            )
            raise TypeError(msg) from err
    return json.dumps(config, sort_keys=True)


def _encoder_name(config: dict[str, Any]) -> str | None:
    """Name of a config's encoder."""
    encoder = config.get("encoder")
    name = encoder.get("name") if isinstance(encoder, dict) else encoder
    return name if isinstance(name, str) and name else None


def _touch(path: Path) -> bool:
    """Mark a block as used now, if it exists; in one step, since another process may remove it."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _part(folder: Path) -> Path:
    return folder.with_name(f"{folder.name[:64]}.{token_hex(8)}.part")


def _blocks(folder: Path) -> Iterator[tuple[int, int, str]]:
    """Yield time of the last use in ns, bytes and path of each block, including unfinished ones."""
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if _BLOCK_NAME.fullmatch(entry.name):
                with suppress(FileNotFoundError):  # removed by another process meanwhile
                    found = entry.stat(follow_symlinks=False)
                    yield found.st_mtime_ns, found.st_size, entry.path


def _info(folder: Path) -> CacheGroupInfo | None:
    """Describe a group; ``None`` where it no longer exists."""
    config = folder / _CONFIG
    try:
        made_ns = config.stat().st_mtime_ns
        values = json.loads(config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not folder.is_dir():
            return None
        made_ns, values = folder.stat().st_mtime_ns, {}
    except ValueError:
        values = {}
    blocks = list(_blocks(folder))
    used_ns = max((used for used, _, _ in blocks), default=made_ns)
    return CacheGroupInfo(
        folder,
        values if isinstance(values, dict) else {},
        n_blocks=sum(path.endswith(".npy") for _, _, path in blocks),
        n_bytes=sum(size for _, size, _ in blocks),
        last_used=datetime.fromtimestamp(used_ns / 1e9, tz=UTC),
    )


def _remove(folder: Path) -> int:
    """Remove a group and return the bytes of its blocks; foreign files in its folder stay."""
    gone = _part(folder)
    folder.rename(gone)  # now no process finds half a group
    freed = 0
    for _, size, path in list(_blocks(gone)):
        Path(path).unlink(missing_ok=True)
        freed += size
    (gone / _CONFIG).unlink(missing_ok=True)
    with suppress(OSError):
        gone.rmdir()
    return freed
