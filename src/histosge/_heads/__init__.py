"""Heads: from embeddings, positions and measured neighbours to expression, one file each, behind one protocol.

A head sees tensors only. All expression is log1p-normalised, all positions are in µm.
"""

from __future__ import annotations

from histosge._heads._protocol import Head, LowRank, Parts, Places, Spots
from histosge._heads._registry import BLIND, DEFAULT_HEAD, HEADS, default_head, divides, get_head, parts_of

__all__ = [
    "BLIND",
    "DEFAULT_HEAD",
    "HEADS",
    "Head",
    "LowRank",
    "Parts",
    "Places",
    "Spots",
    "default_head",
    "divides",
    "get_head",
    "parts_of",
]
