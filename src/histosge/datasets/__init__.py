"""Sections to try things on: made offline with known truth, or published by others and downloaded."""

from __future__ import annotations

from histosge.datasets._download import DownloadError
from histosge.datasets._published import (
    breast_cancer_1,
    breast_cancer_2,
    colorectal_cancer_hd,
    dlpfc,
    fetch,
    her2st,
    load,
    mouse_brain,
    published,
)
from histosge.datasets._synthetic import synthetic, synthetic_truth

__all__ = [
    "DownloadError",
    "breast_cancer_1",
    "breast_cancer_2",
    "colorectal_cancer_hd",
    "dlpfc",
    "fetch",
    "her2st",
    "load",
    "mouse_brain",
    "published",
    "synthetic",
    "synthetic_truth",
]
