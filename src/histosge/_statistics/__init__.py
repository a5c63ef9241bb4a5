"""Metrics, counting noise, prediction intervals, splits, conservation, domains; never torch."""

from __future__ import annotations

from histosge._statistics._conservation import Conservation, conserve, fade, noise_variance, shrinkage
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
)
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
    rank_correlation,
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

__all__ = [
    "BASELINES",
    "FLOOR",
    "LEVEL",
    "LEVELS",
    "MAX_RUNS",
    "MIN_TRAIN",
    "N_ITERATIONS",
    "SPATIAL_NEIGHBOURS",
    "SPATIAL_WEIGHT",
    "Conservation",
    "PredictionIntervals",
    "Split",
    "agreement",
    "interval_around",
    "better_baselines",
    "block_folds",
    "block_splits",
    "calibrate",
    "conserve",
    "correlation",
    "cut",
    "domain_graph",
    "empirical_coverage",
    "fade",
    "find_domains",
    "gene_agreement",
    "group_splits",
    "lattice_splits",
    "morans_i",
    "neighbour_average",
    "noise_ceiling",
    "noise_variance",
    "pseudo_spots",
    "random_folds",
    "random_splits",
    "rank_correlation",
    "shrinkage",
    "structural_similarity",
    "thin",
]
