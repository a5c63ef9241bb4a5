"""Embeddings kept on disk: a shelf for each recipe, a file for each block, named by what was embedded.

Nothing here knows what an embedding is. Whoever asks gives a recipe, which is all that the values depend on but the
pixels, and a digest of the pixels and the places in them: the same two give the same values back, anything else nothing.
Shelves and blocks come and go by being renamed, so that processes that share the folder never see half of one.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import threading
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

import numpy as np

from histosge._settings import logger, settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

_MARKER = "histosge-cache.json"
"""Says that a folder is ours: from no other is anything removed."""
_RECIPE = "recipe.json"
_FORMAT = 1
"""Part of every shelf's name: blocks of another format are never read."""
_EVICT_TO = 0.9
"""Share of the limit that is left after old blocks went, so that this is seldom."""
_UNLISTED = 0.05
"""Share of the limit after which the folder is listed again: other processes may have filled it."""
_TURNS = 8
"""Times a block is written while other processes keep clearing its shelf."""
_DTYPES = ("float16", "float32")
_CHECKSUM_BYTES = 4

# what the cache makes and may remove; `.part` is not yet, or no longer, in use
_SHELF_NAME = re.compile(r"[0-9a-f]{64}(\.[0-9a-f]{16}\.part)?")
_BLOCK_NAME = re.compile(r"[0-9a-f]+(\.npy|\.[0-9a-f]{16}\.part)")
_DIGEST = re.compile(r"[0-9a-f]{16,128}")


@dataclass(eq=False)
class _Ledger:
    """What this process knows of a folder."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while something is put: the sum is exact, and threads do not evict at once"""
    n_bytes: int | None = None
    """In all blocks, as far as known; ``None`` before the first listing"""
    n_unlisted: int = 0
    """Bytes that were put since the last listing"""
    warned: bool = False


_LEDGERS: dict[Path, _Ledger] = {}


@dataclass(frozen=True)
class CacheGroupInfo:
    """What is kept of one recipe."""

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
    """A folder of shelves, kept below a limit."""

    root: Path
    limit_bytes: int

    @classmethod
    def from_settings(cls) -> EmbeddingCache:
        """Take folder and limit from the settings; to look at it or clear it, though it may be turned off.

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

    def shelf(self, recipe: dict[str, Any]) -> CacheGroup:
        """Shelf for the blocks of a recipe; nothing is made before the first block is put.

        Parameters
        ----------
        recipe
            All that values depend on but pixels and places, in JSON values. ``"encoder"`` is a name, or a dict with a
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

    def shelves(self, *, encoder: str | None = None) -> list[CacheGroupInfo]:
        """What is kept, by all encoders or by one, last used first."""
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
        folders = list(self._folders()) if encoder is None else [info.folder for info in self.shelves(encoder=encoder)]
        freed = 0
        with self._ledger.lock:
            self._ledger.n_bytes = None  # whatever happens now, it is to be listed again
            for folder in folders:
                with suppress(FileNotFoundError):  # another process was faster
                    freed += _remove(folder)
        return freed

    @property
    def _ledger(self) -> _Ledger:
        return _LEDGERS.setdefault(self.root, _Ledger())

    def _folders(self) -> Iterator[Path]:
        """Folders of shelves, those included that are being made or removed, or were left so."""
        with suppress(FileNotFoundError), os.scandir(self.root) as entries:
            for entry in entries:
                if _SHELF_NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                    yield Path(entry.path)

    def _make_room(self, n_bytes: int) -> bool:
        """Evict what was not used for longest if there is no room; return whether there is now. Needs the lock."""
        ledger, limit = self._ledger, self.limit_bytes
        if (
            ledger.n_bytes is not None
            and ledger.n_bytes + n_bytes <= limit
            and ledger.n_unlisted + n_bytes <= _UNLISTED * limit
        ):
            return True
        blocks = sorted(block for folder in self._folders() for block in _blocks(folder))
        left = sum(size for _, size, _ in blocks)
        if left + n_bytes > limit:
            before = left
            for _, size, path in blocks:
                if left + n_bytes <= _EVICT_TO * limit:
                    break
                with suppress(OSError):  # being read, on Windows, or another user's
                    Path(path).unlink(missing_ok=True)
                    left -= size
            logger.debug("the cache is full: %d bytes of the oldest embeddings are removed", before - left)
        ledger.n_bytes, ledger.n_unlisted = left, 0
        return left + n_bytes <= limit

    def _warn(self, err: OSError) -> None:
        _warn(self.root, err)


@dataclass(frozen=True)
class CacheGroup:
    """The blocks of one recipe."""

    cache: EmbeddingCache
    recipe: dict[str, Any]
    folder: Path

    def get(self, digest: str) -> NDArray[Any] | None:
        """(m, d) values as they were put, the caller's to change, or ``None``; a damaged block counts as absent."""
        path = self._path(digest)
        try:
            values = _read(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as err:
            logger.debug("%s cannot be read (%s): it is made again", path, err)
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):  # a cache that is only read stays useful
            os.utime(path)
        return values

    def put(self, digest: str, values: NDArray[Any]) -> None:
        """Keep (m, d) values, wholly or not at all; never fails for want of space or permission, but warns once.

        What is there under this digest stays: it is the same, or :meth:`get` removes it.
        """
        path = self._path(digest)
        head, body = _header(values), np.ascontiguousarray(values)
        n_bytes = len(head) + body.nbytes + _CHECKSUM_BYTES
        if n_bytes > self.cache.limit_bytes:
            logger.debug("a block of %d bytes is larger than the cache may grow: it is not kept", n_bytes)
            return
        ledger = self.cache._ledger
        with ledger.lock:
            try:
                if _touch(path):
                    return
                if self.cache._make_room(n_bytes):
                    checksum = zlib.crc32(body, zlib.crc32(head)).to_bytes(_CHECKSUM_BYTES, "little")
                    self._write(path, head, body, checksum)
                    ledger.n_bytes = (ledger.n_bytes or 0) + n_bytes
                    ledger.n_unlisted += n_bytes
                else:
                    logger.debug("a block of %d bytes is not kept: there is no room for it", n_bytes)
            except OSError as err:
                self.cache._warn(err)

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
            except FileNotFoundError:  # another process cleared the shelf, or made room, meanwhile
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
    """Open the cache that the settings name, or ``None`` where it is turned off or cannot be used.

    Raises
    ------
    ValueError
        The folder holds something and is not histosge's.
    """
    if settings.cache_gb == 0:
        return None
    try:
        return EmbeddingCache.from_settings()
    except OSError as err:
        _warn(cache_folder(), err)
        return None


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
    """Say once in a process that a folder cannot be used; the rest is detail."""
    ledger = _LEDGERS.setdefault(root, _Ledger())
    if ledger.warned:
        logger.debug("not kept: %s", err)
        return
    ledger.warned = True
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


def _header(values: NDArray[Any]) -> bytes:
    """Head of a ``.npy`` file."""
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.name not in _DTYPES:
        told = f"{values.dtype} of shape {values.shape}" if isinstance(values, np.ndarray) else type(values).__name__
        msg = f"values is {told}: pass an array of places x features, {' or '.join(_DTYPES)}."
        raise ValueError(msg)
    file = io.BytesIO()
    described = {"descr": values.dtype.str, "fortran_order": False, "shape": values.shape}
    np.lib.format.write_array_header_1_0(file, described)
    return file.getvalue()


def _read(path: Path) -> NDArray[Any]:
    """Read a ``.npy`` file that ends with a checksum: what a crash or a bad disk left half is told from what is whole."""
    data = np.fromfile(path, np.uint8)
    content = data[:-_CHECKSUM_BYTES]
    if zlib.crc32(content) != int.from_bytes(data[-_CHECKSUM_BYTES:].tobytes(), "little"):
        msg = "its checksum is wrong"
        raise ValueError(msg)
    head = io.BytesIO(content[:1024].tobytes())
    np.lib.format.read_magic(head)
    shape, _, dtype = np.lib.format.read_array_header_1_0(head)
    return content[head.tell() :].view(dtype).reshape(shape)


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
                with suppress(FileNotFoundError):  # evicted by another process meanwhile
                    told = entry.stat(follow_symlinks=False)
                    yield told.st_mtime_ns, told.st_size, entry.path


def _info(folder: Path) -> CacheGroupInfo | None:
    """Look at a shelf; ``None`` where it is no longer there."""
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
    """Remove a shelf and return the bytes of its blocks; what somebody else laid there stays."""
    gone = _part(folder)
    folder.rename(gone)  # from here on nobody finds half a shelf
    freed = 0
    for _, size, path in list(_blocks(gone)):
        Path(path).unlink(missing_ok=True)
        freed += size
    (gone / _RECIPE).unlink(missing_ok=True)
    with suppress(OSError):
        gone.rmdir()
    return freed
