"""What travels to the workers of dask and back: large arrays as zarr, in a folder that all see; the rest as bytes."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import socket
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy as np

from histosge._settings import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_LARGE = 2**20
"""Arrays with more bytes travel as zarr."""
_CHUNK_BYTES = 2**26
_OLD_S = 86_400.0
"""Age at which the folder of a process that is gone is removed"""


@contextmanager
def exchange_folder() -> Iterator[Path]:
    """Make a folder for one job that only this user can read, and remove it at the end."""
    from platformdirs import user_cache_path

    root = Path(settings.exchange_dir or user_cache_path("histosge", appauthor=False) / "exchange").absolute()
    root.mkdir(parents=True, exist_ok=True)
    mine = f"{socket.gethostname()}-"
    for left in root.glob(f"{mine}*-job-*"):  # of processes of this host that were killed
        pid = left.name.removeprefix(mine).partition("-")[0]
        with suppress(FileNotFoundError):  # another process removes it
            # containers may share a host name and have numbers of processes of their own: young folders stay
            old = time.time() - left.stat().st_mtime > _OLD_S
            if old and pid.isdigit() and not _is_running(int(pid)):
                shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{mine}{os.getpid()}-job-", dir=root))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid)


def n_bytes(value: Any) -> int:
    """Bytes of the arrays in a value that would travel with it; what lies on disk and is read on demand has none."""
    counted = 0

    def count(array: np.ndarray[Any, Any]) -> int:
        nonlocal counted
        counted += array.nbytes
        return 0

    _Pickler(io.BytesIO(), count, larger_than=1000).dump(value)
    return counted


def pack(value: Any, folder: Path) -> tuple[bytes, str]:
    """Return a value as bytes, and the folder with its large arrays as zarr."""
    import zarr

    n = 0

    def put(array: np.ndarray[Any, Any]) -> int:
        nonlocal n
        rows = max(1, min(len(array), _CHUNK_BYTES * len(array) // array.nbytes))
        data = np.ascontiguousarray(array)
        zarr.create_array(folder / str(n), data=data, chunks=(rows, *array.shape[1:]), compressors=None, zarr_format=3)
        n += 1
        return n - 1

    stream = io.BytesIO()
    _Pickler(stream, put).dump(value)
    return stream.getvalue(), str(folder)


def unpack(stream: bytes, folder: str) -> Any:
    return _Unpickler(io.BytesIO(stream), Path(folder)).load()


def pack_to(folder: Path, value: Any) -> str:
    """Put a value into a folder, and return its digest."""
    folder.mkdir()
    stream, _ = pack(value, folder)
    (folder / "plan.pickle").write_bytes(stream)
    return hashlib.sha256(stream).hexdigest()


def unpack_from(folder: Path, digest: str) -> Any:
    stream = (folder / "plan.pickle").read_bytes()
    if hashlib.sha256(stream).hexdigest() != digest:
        msg = (
            f"the worker on host {socket.gethostname()!r} found {str(folder)!r} changed: it "
            "is not what was put there. Set settings.exchange_dir to a folder of your own."
        )
        raise RuntimeError(msg)
    return unpack(stream, str(folder))


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles all but large arrays and tensors, which ``put`` gets; it returns their name."""

    def __init__(
        self, file: io.BytesIO, put: Callable[[np.ndarray[Any, Any]], int], *, larger_than: int = _LARGE
    ) -> None:
        super().__init__(file, protocol=5)
        self._put, self._larger_than = put, larger_than
        self._seen: dict[int, tuple[Any, Any]] = {}

    def persistent_id(self, value: Any) -> Any:
        torch = sys.modules.get("torch")
        kind = "array" if type(value) is np.ndarray else "tensor" if torch and type(value) is torch.Tensor else None
        if kind is None or value.nbytes <= self._larger_than or (kind == "tensor" and not _plain(value)):
            return None
        if id(value) not in self._seen:  # some arrays are in several places
            array = value if kind == "array" else value.cpu().numpy()
            if array.dtype.kind not in "biuf":
                return None
            self._seen[id(value)] = value, (kind, self._put(array))
        return self._seen[id(value)][1]


def _plain(tensor: Any) -> bool:
    """Whether numpy can hold the tensor."""
    import torch

    return not tensor.requires_grad and tensor.dtype is not torch.bfloat16 and tensor.layout is torch.strided


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, folder: Path) -> None:
        super().__init__(file)
        self._folder = folder
        self._seen: dict[int, Any] = {}

    def persistent_load(self, pid: Any) -> Any:
        import zarr

        kind, n = pid
        if n not in self._seen:
            array = np.asarray(zarr.open_array(self._folder / str(n), mode="r")[...])
            if kind == "tensor":
                import torch

                self._seen[n] = torch.from_numpy(array)
            else:
                self._seen[n] = array
        return self._seen[n]
