"""Embeddings kept on disk: a group for each recipe, a file for each block, named by what was embedded.

Nothing here knows what an embedding is. The caller passes a recipe, which is all that the values depend on except the
pixels, and a digest of the pixels and the places in them: the same two give the same values back, anything else nothing.
Groups and blocks appear and disappear by being renamed, so that processes that share the folder never see half of one.
The folder is pruned when it is opened: a run may exceed the limit by what it writes.
"""

from __future__ import annotations

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
"""Marks a folder as ours: nothing is removed from any other."""
_RECIPE = "recipe.json"
_FORMAT = 1
"""Part of every group's name: blocks of another format are never read."""
_PRUNE_TO = 0.9
"""Share of the limit that is left after old blocks are removed, so that this is seldom."""
_TURNS = 8
"""Times a block is written while other processes keep clearing its group."""

# what the cache makes and may remove; `.part` is not yet, or no longer, in use
_GROUP_NAME = re.compile(r"[0-9a-f]{64}(\.[0-9a-f]{16}\.part)?")
_BLOCK_NAME = re.compile(r"[0-9a-f]+(\.npy|\.[0-9a-f]{16}\.part)")
_DIGEST = re.compile(r"[0-9a-f]{16,128}")

_WARNED: set[Path] = set()
"""Folders that a warning was logged about in this process"""


@dataclass(frozen=True)
class CacheGroupInfo:
    """What is kept of one recipe: an entry of :meth:`EmbeddingCache.groups`."""

    folder: Path
    recipe: dict[str, Any]
    """Empty where it cannot be read"""
    n_blocks: int
    n_bytes: int
    last_used: datetime

    @property
    def encoder(self) -> str | None:
        """Name of the encoder."""
        return _encoder_name(self.recipe)

    def value(self, name: str) -> Any:
        """Value from the recipe or, if it is not there, from its encoder's spec."""
        spec = self.recipe.get("encoder")
        return self.recipe.get(name, spec.get(name) if isinstance(spec, dict) else None)


@dataclass(frozen=True)
class EmbeddingCache:
    """A folder of groups, pruned to a limit."""

    root: Path
    limit_bytes: int

    @classmethod
    def from_settings(cls) -> EmbeddingCache:
        """Take folder and limit from the settings, to list or clear it even where the cache is turned off.

        Raises
        ------
        ValueError
            The folder holds something and is not histosge's.
        OSError
            It is no folder, or cannot be read.
        """
        root = cache_folder()
        _refuse_foreign(root)
        return cls(root, int(settings.cache_gb * 1e9))

    def group(self, recipe: dict[str, Any]) -> CacheGroup:
        """Group for the blocks of a recipe; no file is made before the first block is put.

        Parameters
        ----------
        recipe
            All that values depend on except pixels and places, in JSON values. ``"encoder"`` is a name, or a dict with a
            ``"name"``.
        """
        text = _canonical(recipe)
        if _encoder_name(recipe) is None:
            msg = (
                f"recipe={recipe!r} does not name its encoder, by which the cache is listed and cleared. Pass "
                "recipe['encoder'], a name or a dict with a 'name'."
            )
            raise ValueError(msg)
        name = hashlib.sha256(f"{_FORMAT}\n{text}".encode()).hexdigest()
        return CacheGroup(self, recipe, self.root / name)

    def groups(self, *, encoder: str | None = None) -> list[CacheGroupInfo]:
        """What is kept, of all encoders or of one, last used first."""
        found = [info for folder in self._folders() if "." not in folder.name and (info := _info(folder))]
        if encoder is not None:
            there = sorted({info.encoder for info in found if info.encoder})
            if encoder not in there:
                have = f"there are {', '.join(map(repr, there))}" if there else "there is nothing"
                msg = f"encoder={encoder!r}: nothing is kept of it in {self.root}; {have}."
                raise ValueError(msg)
            found = [info for info in found if info.encoder == encoder]
        return sorted(found, key=lambda info: info.last_used, reverse=True)

    def clear(self, *, encoder: str | None = None) -> int:
        """Remove all blocks, or those of one encoder, and return how many bytes that freed."""
        folders = list(self._folders()) if encoder is None else [info.folder for info in self.groups(encoder=encoder)]
        freed = 0
        for folder in folders:
            with suppress(FileNotFoundError):  # another process was faster
                freed += _remove(folder)
        return freed

    def prune(self) -> None:
        """Remove the blocks that were not used for longest, where all together exceed the limit."""
        blocks = sorted(block for folder in self._folders() for block in _blocks(folder))
        before = left = sum(size for _, size, _ in blocks)
        if before <= self.limit_bytes:
            return
        for _, size, path in blocks:
            if left <= _PRUNE_TO * self.limit_bytes:
                break
            with suppress(OSError):  # being read, on Windows, or another user's
                Path(path).unlink(missing_ok=True)
                left -= size
        logger.debug("the cache is full: %d bytes of the oldest embeddings are removed", before - left)

    def _folders(self) -> Iterator[Path]:
        """Folders of groups, including those that are being made or removed, or were left so."""
        with suppress(FileNotFoundError), os.scandir(self.root) as entries:
            for entry in entries:
                if _GROUP_NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                    yield Path(entry.path)


@dataclass(frozen=True)
class CacheGroup:
    """The blocks of one recipe."""

    cache: EmbeddingCache
    recipe: dict[str, Any]
    folder: Path

    def get(self, digest: str) -> NDArray[Any] | None:
        """Return (m, d) values as they were put, the caller's to change, or ``None``. A damaged block counts as absent."""
        path = self._path(digest)
        try:
            values = read(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as err:
            logger.debug("%s cannot be read (%s): it is computed again", path, err)
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):  # a cache that is only read stays useful
            os.utime(path)
        return values

    def put(self, digest: str, values: NDArray[Any]) -> None:
        """Keep (m, d) values, wholly or not at all. Never fails for lack of space or permission, but warns once.

        A block that exists under this digest stays: it is the same, or :meth:`get` removes it.
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
            msg = f"digest={digest!r}: pass 16 to 128 hexadecimal digits, such as those of hashlib.blake2b(...).hexdigest()."
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
            except FileExistsError:  # Windows does not rename over what another process put
                fresh.unlink()
                return
            except BaseException:
                with suppress(OSError):
                    fresh.unlink()
                raise
            else:
                return

    def _set_up(self) -> None:
        """Make the folder, with its recipe in it from the first moment."""
        if self.folder.is_dir():
            return
        root = self.cache.root
        root.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError), (root / _MARKER).open("x", encoding="utf-8") as file:
            json.dump({"what": "embeddings kept by histosge; see `histosge cache --help`", "format": _FORMAT}, file)
        fresh = _part(self.folder)
        fresh.mkdir()
        try:
            text = json.dumps(self.recipe, sort_keys=True, indent=1, ensure_ascii=False)
            (fresh / _RECIPE).write_text(text + "\n", encoding="utf-8")
            fresh.rename(self.folder)
        except OSError:
            shutil.rmtree(fresh, ignore_errors=True)
            if not self.folder.is_dir():  # else another process made it at the same time
                raise


def cache_folder() -> Path:
    """Where embeddings are kept: ``settings.cache_dir``, else ``HISTOSGE_CACHE``, else in the system's cache folder."""
    chosen = settings.cache_dir or os.environ.get("HISTOSGE_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    from platformdirs import user_cache_path

    return user_cache_path("histosge", appauthor=False) / "embeddings"


def open_cache() -> EmbeddingCache | None:
    """Open the cache that the settings name and prune it; ``None`` where it is turned off or cannot be used.

    Raises
    ------
    ValueError
        The folder holds something and is not histosge's.
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
    """Raise where a folder is not empty and was not made by the cache."""
    try:
        with os.scandir(root) as entries:
            names = [entry.name for entry in entries]
    except FileNotFoundError:
        return
    if names and _MARKER not in names:
        msg = (
            f"{root} would be the folder that embeddings are kept in, but it holds something that is not histosge's "
            f"(there is no {_MARKER} in it). Set settings.cache_dir or HISTOSGE_CACHE to a new or an empty folder, or "
            "turn the cache off with settings.cache_gb=0."
        )
        raise ValueError(msg)


def _warn(root: Path, err: OSError) -> None:
    """Warn once in a process that a folder cannot be used; after that, log it as a detail."""
    if root in _WARNED:
        logger.debug("not kept: %s", err)
        return
    _WARNED.add(root)
    logger.warning(
        "embeddings cannot be kept in %s and will be computed again next time (%s). Free space, set settings.cache_dir "
        "or HISTOSGE_CACHE to another folder, or turn the cache off with settings.cache_gb=0",
        root, err,
    )  # fmt: skip


def _canonical(recipe: dict[str, Any]) -> str:
    """Write a recipe in the one way that equal recipes have."""
    for key, value in recipe.items():
        try:
            json.dumps(value, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as err:
            msg = (
                f"recipe[{key!r}]={value!r} cannot be written as JSON ({err}): pass finite numbers, strings, booleans, "
                "None, and lists and dicts of them."
            )
            raise TypeError(msg) from err
    return json.dumps(recipe, sort_keys=True)


def _encoder_name(recipe: dict[str, Any]) -> str | None:
    """Name of a recipe's encoder."""
    encoder = recipe.get("encoder")
    name = encoder.get("name") if isinstance(encoder, dict) else encoder
    return name if isinstance(name, str) and name else None


def _touch(path: Path) -> bool:
    """Mark a block as used now, if it is there: in one step, as another process may remove it between two."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _part(folder: Path) -> Path:
    return folder.with_name(f"{folder.name[:64]}.{token_hex(8)}.part")


def _blocks(folder: Path) -> Iterator[tuple[int, int, str]]:
    """Time of the last use in ns, bytes, path of each block, unfinished ones included."""
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if _BLOCK_NAME.fullmatch(entry.name):
                with suppress(FileNotFoundError):  # removed by another process meanwhile
                    found = entry.stat(follow_symlinks=False)
                    yield found.st_mtime_ns, found.st_size, entry.path


def _info(folder: Path) -> CacheGroupInfo | None:
    """Describe a group; ``None`` where it is no longer there."""
    recipe = folder / _RECIPE
    try:
        made_ns = recipe.stat().st_mtime_ns
        values = json.loads(recipe.read_text(encoding="utf-8"))
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
    folder.rename(gone)  # from here on no process finds half a group
    freed = 0
    for _, size, path in list(_blocks(gone)):
        Path(path).unlink(missing_ok=True)
        freed += size
    (gone / _RECIPE).unlink(missing_ok=True)
    with suppress(OSError):
        gone.rmdir()
    return freed
