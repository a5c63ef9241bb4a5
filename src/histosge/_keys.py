"""Every string that histosge writes into a ``SpatialData`` object."""

from __future__ import annotations

import re

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
    return key
