"""Lattice, neighbours, targets, footprints, tissue: numpy, scipy and shapely, in image pixels and µm; never torch."""

from __future__ import annotations

from histosge._geometry._areas import Grid, area_fractions, cut_bins, divide, padded, spot_by_bin
from histosge._geometry._footprints import Footprints
from histosge._geometry._lattice import (
    LEGACY_ST,
    VISIUM,
    Lattice,
    NotALattice,
    Technology,
    estimate_lattice,
    lattice_of_array,
    occupied_share,
    similarity_scale,
)
from histosge._geometry._neighbours import nearest_spots, upright
from histosge._geometry._targets import (
    UPSAMPLE,
    Targets,
    block_order,
    check_upsample,
    lay_around,
    lay_over,
    refine,
    square_bins,
)
from histosge._geometry._tissue import in_mask, optical_density, tissue_mask
