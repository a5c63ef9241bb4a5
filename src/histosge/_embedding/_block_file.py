"""A block on disk: a ``.npy`` file, followed by a checksum that numpy does not read."""

from __future__ import annotations

import io
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_DTYPES = ("float16", "float32")
_CHECKSUM_BYTES = 4


def header(values: NDArray[Any]) -> bytes:
    """Head of a ``.npy`` file."""
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.name not in _DTYPES:
        found = f"{values.dtype} of shape {values.shape}" if isinstance(values, np.ndarray) else type(values).__name__
        msg = f"values is {found}: pass an array of locations x features, {' or '.join(_DTYPES)}."
        raise ValueError(msg)
    file = io.BytesIO()
    described = {"descr": values.dtype.str, "fortran_order": False, "shape": values.shape}
    np.lib.format.write_array_header_1_0(file, described)
    return file.getvalue()


def checksum(*parts: Any) -> bytes:
    """Checksum of the content of a file."""
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return value.to_bytes(_CHECKSUM_BYTES, "little")


def read(path: Path) -> NDArray[Any]:
    """Read a ``.npy`` file that ends with a checksum; raise where it was cut off by a crash or a bad disk."""
    data = np.fromfile(path, np.uint8)
    content = data[:-_CHECKSUM_BYTES]
    if checksum(content) != data[-_CHECKSUM_BYTES:].tobytes():
        msg = "its checksum is wrong"
        raise ValueError(msg)
    head = io.BytesIO(content[:1024].tobytes())
    np.lib.format.read_magic(head)
    shape, _, dtype = np.lib.format.read_array_header_1_0(head)
    return content[head.tell() :].view(dtype).reshape(shape)
