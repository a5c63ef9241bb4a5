"""The only room that reads and writes ``SpatialData``: sdata → :class:`Section`; arrays → elements and tables."""

from __future__ import annotations

from histosge._section._alignment import check_orientation
from histosge._section._bare import is_measured, read_bare
from histosge._section._coordinates import affine, centroids
from histosge._section._counts import TARGET_SUM, match_rows, named_layers, per_target_sum
from histosge._section._image import lazy_image
from histosge._section._open import open_section
from histosge._section._read import (
    MIN_SPOTS,
    NEARLY_EMPTY,
    Section,
    column,
    read_section,
    section_counts,
)
from histosge._section._rows import open_table
from histosge._section._store import TableStore
from histosge._section._write import (
    Targets,
    commit,
    embedding_table,
    find_embedding,
    lay_targets,
    make_table,
    own_spots,
    predicted_table,
    read_targets,
    shapes_element,
    smaller_than_spot,
    to_image,
)

__all__ = [
    "MIN_SPOTS",
    "NEARLY_EMPTY",
    "TARGET_SUM",
    "Section",
    "TableStore",
    "Targets",
    "affine",
    "centroids",
    "check_orientation",
    "column",
    "commit",
    "embedding_table",
    "find_embedding",
    "is_measured",
    "lay_targets",
    "lazy_image",
    "make_table",
    "match_rows",
    "named_layers",
    "open_section",
    "open_table",
    "own_spots",
    "per_target_sum",
    "predicted_table",
    "read_bare",
    "read_section",
    "read_targets",
    "section_counts",
    "shapes_element",
    "smaller_than_spot",
    "to_image",
]
