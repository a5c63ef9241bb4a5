"""Sections to try things on."""

from __future__ import annotations

from histosge.datasets._synthetic import synthetic, synthetic_truth

__all__ = ["synthetic", "synthetic_truth"]
