"""Tissue on a thumbnail, by its optical density."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_CUT_OUT = 8
"""A pixel darker than this in every colour was blacked out, not stained."""


def in_mask(xy_px: Floats, mask: NDArray[np.bool_], *, px_per_cell: tuple[float, float]) -> NDArray[np.bool_]:
    """Look up positions (n, 2) in a coarse mask with cells of ``px_per_cell`` (x, y) image pixels; false outside."""
    col = np.floor(xy_px[:, 0] / px_per_cell[0]).astype(np.int64)
    row = np.floor(xy_px[:, 1] / px_per_cell[1]).astype(np.int64)
    inside = (row >= 0) & (col >= 0) & (row < mask.shape[0]) & (col < mask.shape[1])
    found = np.zeros(len(xy_px), dtype=bool)
    found[inside] = mask[row[inside], col[inside]]
    return found


def optical_density(thumbnail: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Optical density of each colour, (h, w, 3); 0 where the background was cut out, since no stain is that black."""
    density = -np.log10((thumbnail.astype(np.float32) + 1) / 256)
    density[thumbnail.max(axis=-1) < _CUT_OUT] = 0
    return density


def tissue_mask(
    thumbnail: NDArray[np.uint8], spots_cell: Floats, *, blur_cells: float
) -> tuple[NDArray[np.bool_], float]:
    """Find tissue on a thumbnail by its optical density.

    The threshold is Otsu's (1979), lowered until 95 % of the measured spots are tissue. So pale sections, fat and
    images that are cropped to the tissue keep their tissue, where thresholds from the image alone fail. Without spots
    it is Otsu's.

    Parameters
    ----------
    thumbnail
        (h, w, 3) RGB.
    spots_cell
        (n, 2) measured spots (x, y) in pixels of the thumbnail.
    blur_cells
        Sigma of the smoothing, in pixels of the thumbnail.

    Returns
    -------
    mask
        (h, w)
    share
        Share of the spots that Otsu's threshold alone would have kept; NaN without spots.
    """
    from scipy.ndimage import gaussian_filter
    from skimage.filters import threshold_otsu

    density = gaussian_filter(optical_density(thumbnail).mean(axis=-1), blur_cells)
    col = np.clip(np.floor(spots_cell[:, 0]).astype(int), 0, density.shape[1] - 1)
    row = np.clip(np.floor(spots_cell[:, 1]).astype(int), 0, density.shape[0] - 1)
    at_spots = density[row, col]
    otsu = float(threshold_otsu(density)) if np.ptp(density) > 0 else -1.0
    if len(at_spots) == 0:
        return density >= otsu, float("nan")
    threshold = min(otsu, float(np.quantile(at_spots, 0.05)))
    return density >= threshold, float((at_spots >= otsu).mean())
