"""Heads: from embeddings, positions and measured neighbours to expression, one file each, behind one protocol.

A head sees tensors only. All expression is log1p-normalised. All positions are in µm, in the coordinates of their
section.
"""

from __future__ import annotations

from histosge._heads._attention import N_POSITION, Attention, Dense, Gathered, encode_position
from histosge._heads._conditioning import n_kernel_groups, share_hyperparameters
from histosge._heads._protocol import Head, LowRank, Queries, Spots, SubSpots
from histosge._heads._registry import (
    DEFAULT_HEAD,
    HEADS,
    POSITION_ONLY,
    AnyHead,
    default_head,
    get_head,
    head_digest,
    head_name,
    learns_sub_spots,
    new_head,
    parts_of,
    restore_head,
    wrong_option,
)
from histosge._heads._space import principal, standardise, standardiser
from histosge._heads._tiles import Tiles
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
from histosge._heads.in_context import InContext
from histosge._heads.kriging import Kriging
