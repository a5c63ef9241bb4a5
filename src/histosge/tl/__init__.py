"""Compute: embed, fit, predict, prediction intervals, evaluate, find domains."""

from __future__ import annotations

from histosge.tl._domains import domains
from histosge.tl._embed import embed
from histosge.tl._evaluate import evaluate
from histosge.tl._fit import fit
from histosge.tl._intervals import intervals
from histosge.tl._predict import predict

__all__ = ["domains", "embed", "evaluate", "fit", "intervals", "predict"]
