"""Whether an image is mirrored or turned against its spots, where no copy of the right one is there to compare with.

Tissue and expression are the evidence: spots lie on tissue, and what they measured follows the colours of the image
under them better than those of a mirrored image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from histosge._geometry import optical_density
from histosge._image import thumbnail
from histosge._section._alignment import ORIENTATIONS, UPRIGHT
from histosge._settings import logger

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from scipy import sparse

    from histosge._section._section import Section

_ON_TISSUE = 0.15
"""How much larger the share of spots on tissue must be in another orientation."""
_EXPLAINED = 0.1
"""How much more variance of expression the colours of another orientation must explain. On real sections they explain
0.02 to 0.34 in the right orientation, and at most 0.10 in others."""
_AHEAD = 0.05
"""How much better that orientation must be than every other."""
EVIDENCE_PX = 384
"""Largest edge of the shrunken image"""
_N_SPOTS, _N_GENES, _N_COMPONENTS, _N_BLOCKS = 2000, 300, 10, 5
_PENALTY = 0.05


def warn_of_orientation(section: Section, small: NDArray[np.uint8], factor: int) -> None:
    """Warn where tissue and expression fit another orientation of the image better; ``small`` is ``factor`` smaller."""
    from PIL import Image

    if not section.measured:
        return
    rest = -(-max(small.shape) // EVIDENCE_PX)
    smaller = np.asarray(Image.fromarray(small).reduce(rest)) if rest > 1 else small
    cell_px = factor * rest
    likelier = likelier_orientation(
        smaller,
        section.xy_px / cell_px,
        section.expression,
        spot_cells=section.spot_um / section.mpp / cell_px,
    )
    if likelier is not None:
        logger.warning(
            "image %r: the spots of %r fit it better %s: more of them lie on tissue, or what they measured follows the "
            "colours under them more closely. Is it stored as it was when the spots were aligned to it, and are their "
            "coordinates (x, y)?",
            section.image_key, section.spots_key, likelier,
        )  # fmt: skip


def check_orientation(section: Section) -> None:
    """Warn where an image seems mirrored or turned against its spots, reading all of it once."""
    warn_of_orientation(section, *thumbnail(section.image, max_px=EVIDENCE_PX))


def likelier_orientation(
    small: NDArray[np.uint8], xy: NDArray[np.float64], expression: sparse.csr_matrix, *, spot_cells: float
) -> str | None:
    """Name the orientation of an image that fits tissue and expression of its spots best; ``None`` for the given one.

    Parameters
    ----------
    small
        (h, w, 3) the image, shrunken.
    xy
        (n, 2) spots in pixels of it.
    expression
        (n, genes) log-normalised.
    spot_cells
        Diameter of a spot in pixels of ``small``.
    """
    some = np.unique(np.linspace(0, len(xy) - 1, _N_SPOTS).astype(int))
    xy, components = xy[some], _components(expression[some])
    if components is None or len(xy) < 10 * _N_BLOCKS:
        return None
    fold, maps = _blocks(xy), _maps(small, sigma=max(spot_cells / 4, 1.0))
    on_tissue, explained = {}, {}
    for name, orient in ORIENTATIONS.items():
        turned = orient(maps)  # as they would be if the image were stored upright
        if (xy >= turned.shape[1::-1]).any():
            continue
        under = turned[tuple(xy.astype(int).T[::-1])].astype(float)  # (n, maps)
        colours = _standardised(under[:, 1:])
        on_tissue[name] = float(under[:, 0].mean())
        explained[name] = _explained(np.column_stack([colours, colours**2]), components, fold)

    def ahead(scores: dict[str, float]) -> tuple[str, float, float]:
        best, second = sorted(scores, key=lambda name: -scores[name])[:2]
        return best, scores[best] - scores[UPRIGHT], scores[best] - scores[second]

    if len(explained) < 2:
        return None
    best, more, _ = ahead(on_tissue)
    if more >= _ON_TISSUE and explained[best] > explained[UPRIGHT] - _AHEAD:
        return best
    best, more, lead = ahead(explained)
    if explained[best] >= _EXPLAINED and more >= _EXPLAINED and lead >= _AHEAD:
        return best
    return None


def _components(expression: sparse.csr_matrix) -> NDArray[np.float64] | None:
    """Principal components of the most variable genes, (n, components), each as large as its share of the variance."""
    mean = np.asarray(expression.mean(axis=0)).ravel()
    variance = np.asarray(expression.multiply(expression).mean(axis=0)).ravel() - mean**2
    top = np.argsort(-variance, kind="stable")[:_N_GENES]
    values = np.asarray(expression[:, top].todense(), float) - mean[top]
    u, size, _ = np.linalg.svd(values, full_matrices=False)
    scores = u[:, :_N_COMPONENTS] * size[:_N_COMPONENTS]
    return scores if np.isfinite(scores).all() and (scores**2).sum() > 0 else None


def _blocks(xy: NDArray[np.float64]) -> NDArray[np.int64]:
    """Folds of spots by blocks, so that neighbours are held out together."""
    x, y = (np.searchsorted(np.quantile(a, np.arange(1, _N_BLOCKS) / _N_BLOCKS), a) for a in xy.T)
    return (x + 2 * y) % _N_BLOCKS


def _maps(small: NDArray[np.uint8], *, sigma: float) -> NDArray[np.float32]:
    """Tissue by Otsu's threshold, and colours under and around each pixel: (h, w, maps)."""
    from scipy.ndimage import gaussian_filter
    from skimage.filters import threshold_otsu

    density = optical_density(small)
    grey = density.mean(axis=-1)
    smooth = gaussian_filter(grey, 2 * sigma)
    tissue = smooth >= threshold_otsu(smooth) if np.ptp(smooth) > 0 else np.ones(smooth.shape, bool)
    colours = [gaussian_filter(density[..., c], s) for s in (sigma, 2.5 * sigma) for c in range(3)]
    spread = np.sqrt(np.maximum(gaussian_filter(grey**2, 2 * sigma) - smooth**2, 0))
    return np.stack([tissue.astype(np.float32), *colours, spread], axis=-1)


def _standardised(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return (values - values.mean(axis=0)) / (values.std(axis=0) + 1e-9)


def _explained(features: NDArray[np.float64], wanted: NDArray[np.float64], fold: NDArray[np.int64]) -> float:
    """Share of the variance that ridge regression explains in blocks that it was not fitted on."""
    x, predicted = _standardised(features), np.zeros_like(wanted)
    for f in np.unique(fold):
        held = fold == f
        mean_x, mean_y = x[~held].mean(axis=0), wanted[~held].mean(axis=0)
        inner = x[~held] - mean_x
        gram = inner.T @ inner + _PENALTY * len(inner) * np.eye(x.shape[1])
        predicted[held] = mean_y + (x[held] - mean_x) @ np.linalg.solve(gram, inner.T @ (wanted[~held] - mean_y))
    return float(1 - ((wanted - predicted) ** 2).sum() / ((wanted - wanted.mean(axis=0)) ** 2).sum())
