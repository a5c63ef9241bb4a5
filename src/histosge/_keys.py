"""Every string that histosge writes into a ``SpatialData`` object."""

from __future__ import annotations

import os
import re
from pathlib import Path

UNS = "histosge"
"""Provenance of a written table: ``table.uns["histosge"]``."""

INTERVALS = "histosge_intervals"
"""Numbers that prediction intervals are computed from: ``table.varm["histosge_intervals"]``, one row a gene."""

INTERVAL_LAYERS = ("sd", "lower", "upper")
"""Layers that :func:`histosge.tl.intervals` writes."""

REGION = "region"
INSTANCE = "instance_id"
"""Columns of ``obs`` that link a table of ours to its shapes element."""

_VALID = re.compile(r"[A-Za-z0-9_.\-]+")
_LONGEST_KEY, _LONGEST_NAME = 120, 200
"""File systems take 255 bytes, and what is derived from a name is longer: ``{key}_targets``, ``{name}.partial``."""


def targets(key: str) -> str:
    """Name of the shapes element with the targets of table ``key``."""
    return f"{key}_targets"


def embedding_table(target_key: str, encoder: str) -> str:
    """Name of the table that holds an encoder's embeddings of the shapes ``target_key``."""
    return f"{target_key}_{slug(encoder)}"


def embedding(encoder: str) -> str:
    """Name of the embedding in ``obsm``."""
    return f"X_{slug(encoder)}"


def slug(name: str) -> str:
    """Replace what ``SpatialData`` does not allow in a key (``hf-hub:a/b`` becomes ``hf-hub_a_b``)."""
    return re.sub(r"[^A-Za-z0-9_.\-]", "_", name)


def check(argument: str, key: str) -> str:
    """Return ``key`` if ``SpatialData`` accepts it as an element's name, else raise."""
    if not isinstance(key, str) or not _VALID.fullmatch(key) or key.startswith("__") or key in {".", ".."}:
        msg = (
            f"{argument}={key!r} is not a valid name for a SpatialData element. "
            "Use letters, digits, '_', '-' and '.' only, and do not begin with '__'."
        )
        raise ValueError(msg)
    if len(key) > _LONGEST_KEY:
        msg = f"{argument}={key[:20] + '...'!r} has {len(key)} characters: choose a name of at most {_LONGEST_KEY}."
        raise ValueError(msg)
    return key


def check_output(argument: str, path: str | Path, *, endings: tuple[str, ...] = ()) -> Path:
    """Return the path of an output if files can have this name, and it has one of the endings, else raise."""
    found = Path(path)
    if not str(path).strip() or not found.name or found.name == "..":
        msg = f"{argument}={str(path)!r} is no name of a file: choose one that does not exist."
    elif len(os.fsencode(found.name)) > _LONGEST_NAME:
        msg = f"{argument}={found.name[:20] + '...'!r} is too long a name: choose one of at most {_LONGEST_NAME} bytes."
    elif endings and found.suffix not in endings:
        msg = f"{argument}={str(path)!r}: the name must end in {' or '.join(e for e in endings if e)}."
    else:
        return found
    raise ValueError(msg)
