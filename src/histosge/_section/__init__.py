"""The only room that reads and writes ``SpatialData``: sdata → :class:`Section`; arrays → elements and tables."""

from __future__ import annotations

from histosge._section._alignment import (
    ORIENTATIONS,
    UPRIGHT,
    check_image,
    compare,
)
from histosge._section._claim import Claim, scratch
from histosge._section._coordinates import affine, centroids
from histosge._section._counts import feature_kinds, log_left_out, match_rows, named_layers, open_layer, select
from histosge._section._declared import check_single_section, library_of, read_declared, scale_factors
from histosge._section._image import lazy_image
from histosge._section._interval_files import write_interval_layers
from histosge._section._intervals import (
    columns_of,
    find_table,
    interval_layers,
    intervals_of,
    refuse_foreign_layers,
)
from histosge._section._merge import merge_bins, merged_edge
from histosge._section._orientation import EVIDENCE_PX, check_orientation, likelier_orientation
from histosge._section._part_writer import PartWriter
from histosge._section._section import MIN_SPOTS, NEARLY_EMPTY, Section, column, read_image_only, read_section
from histosge._section._store import TableStore
from histosge._section._stored import StoredProvenance, open_group, open_table, read_provenance
from histosge._section._tables import is_measured
from histosge._section._targets import lay_targets, own_spots, read_targets, smaller_than_spot, to_image
from histosge._section._upload import refuse_read_only
from histosge._section._values import UNIT, UNIT_AS_GIVEN, per_target_sum, sample
from histosge._section._write import (
    commit,
    embedding_table,
    find_embedding,
    make_table,
    predicted_table,
    shapes_element,
)
