"""Example sections: simulated offline with known truth, or published and downloaded."""

from __future__ import annotations

# names outside __all__ are for the shell and tests
from histosge.datasets._download import DownloadError, data_folder, fetch_files  # noqa: F401
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
from histosge.datasets._registry import NOT_STATED, SECTIONS, RemoteFile  # noqa: F401
from histosge.datasets._simulation import expected_rates, glands, hidden_fields, parts, sample  # noqa: F401
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


def __dir__() -> list[str]:
    return __all__
