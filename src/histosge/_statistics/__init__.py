"""Metrics, counting noise, prediction intervals, splits, conservation, domains. Without torch and SpatialData."""

from __future__ import annotations

from histosge._statistics._conservation import Conservation, conserve, fade, log_variance, noise_variance, shrinkage
from histosge._statistics._counting_noise import noise_ceiling, thin
from histosge._statistics._domains import (
    MAX_RUNS,
    N_ITERATIONS,
    SPATIAL_NEIGHBOURS,
    SPATIAL_WEIGHT,
    agreement,
    cut,
    domain_graph,
    find_domains,
    leiden,
    spatial_graph,
)
from histosge._statistics._drawing import draw_evenly, shares_of
from histosge._statistics._intervals import (
    FLOOR,
    LEVEL,
    LEVELS,
    PredictionIntervals,
    calibrate,
    empirical_coverage,
    interval_around,
    neighbour_average,
)
from histosge._statistics._metrics import (
    BASELINES,
    better_baselines,
    correlation,
    gene_agreement,
    morans_i,
    neighbour_mean,
    rank_correlation,
    similarity_map,
    structural_similarity,
)
from histosge._statistics._splits import (
    MIN_TRAIN,
    Split,
    block_folds,
    block_splits,
    group_splits,
    lattice_splits,
    pseudo_spots,
    random_folds,
    random_splits,
)
