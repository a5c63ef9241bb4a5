"""Heads: from embeddings, positions and measured neighbours to expression, one file each, behind one protocol.

A head sees tensors only. All expression is log1p-normalised, all positions are in µm.
"""

from __future__ import annotations

from histosge._heads._protocol import Head, LowRank, Parts, Queries, Spots
from histosge._heads._registry import DEFAULT_HEAD, HEADS, POSITION_ONLY, default_head, divides, get_head, parts_of
from histosge._heads._space import principal, standardise, standardiser
from histosge._heads._training import (
    Dropout,
    Schedule,
    one_thread,
    seeded,
    side_by_side,
    stopping_spots,
    train,
    workers,
)
from histosge._heads.aggregate import Aggregate
from histosge._heads.in_context import N_POSITION, InContext
from histosge._heads.kriging import Kriging

__all__ = [
    "DEFAULT_HEAD",
    "HEADS",
    "N_POSITION",
    "POSITION_ONLY",
    "Aggregate",
    "Dropout",
    "Head",
    "InContext",
    "Kriging",
    "LowRank",
    "Parts",
    "Queries",
    "Schedule",
    "Spots",
    "default_head",
    "divides",
    "get_head",
    "one_thread",
    "parts_of",
    "principal",
    "seeded",
    "side_by_side",
    "standardise",
    "standardiser",
    "stopping_spots",
    "train",
    "workers",
]
