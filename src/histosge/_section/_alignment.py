"""Whether an image is the one that spots were aligned to, in the orientation that they were aligned in.

With a small copy of that image the two are compared. Without one, tissue and expression are evidence: spots lie on tissue,
and what they measured follows the colours of the image under them better than those of a mirrored image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from histosge._geometry import optical_density
from histosge._image import ChunkReader, thumbnail
from histosge._settings import logger

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from scipy import sparse

    from histosge._image import LazyImage
    from histosge._section._section import Section

ORIENTATIONS = {
    "as it is": lambda a: a,
    "mirrored left to right": lambda a: a[:, ::-1],
    "upside down (mirrored top to bottom)": lambda a: a[::-1],
    "turned by 180 degrees": lambda a: a[::-1, ::-1],
    "with rows and columns swapped": lambda a: a.swapaxes(0, 1),
    "turned by 90 degrees to the left": lambda a: a.swapaxes(0, 1)[::-1],
    "turned by 90 degrees to the right": lambda a: a.swapaxes(0, 1)[:, ::-1],
    "with rows and columns swapped across the other diagonal": lambda a: a[::-1, ::-1].swapaxes(0, 1),
}
"""What is done to an image (height, width, ...) that is stored upright; the first is nothing."""
UPRIGHT = next(iter(ORIENTATIONS))

_ON_TISSUE = 0.15
"""Share of the spots by which more must lie on tissue in another orientation."""
_EXPLAINED = 0.1
"""Share of the variance of expression by which the colours of another orientation must explain more; of real sections in
the right one they explain 0.02 to 0.34, in others at most 0.10."""
_AHEAD = 0.05
"""How far that orientation must be ahead of every other."""
_EVIDENCE_PX = 384
_N_SPOTS, _N_GENES, _N_COMPONENTS, _N_BLOCKS = 2000, 300, 10, 5
_PENALTY = 0.05

_WINDOWS = 8
"""Windows along each side of the image that are compared: few, since each costs a chunk of the image."""
_WINDOW_CELLS = 2
_CELL_PX = 4
"""Pixels of the small copy that are averaged, so that a shift by one or two of them does no harm."""
_FITS = 0.85
"""Rank correlation from which two pictures are the same: those of real sections have 0.99, in other orientations up to 0.82."""
_CLEARLY = 0.05
"""By how much the correlation in another orientation must be larger."""


@dataclass(frozen=True)
class Agreement:
    """How well an image agrees with a small copy of the one that it should be."""

    orientation: str
    """The one of :data:`ORIENTATIONS` that fits best"""
    best: float
    """Rank correlation of grey levels in that orientation"""
    upright: float
    """The same as the image is stored"""

    @property
    def fits(self) -> bool:
        return self.upright >= _FITS and self.upright > self.best - _CLEARLY

    @property
    def turned(self) -> bool:
        """Whether another orientation clearly fits."""
        return self.best >= _FITS and self.best >= self.upright + _CLEARLY


def compare(image: LazyImage, small: NDArray[Any]) -> Agreement | None:
    """Compare an image with a small copy, (h, w, 3), in the orientations that have its sides.

    Only ranks of grey levels count, so that colour, brightness and contrast may differ. ``None`` where either is uniform.
    """
    grey = np.asarray(small, float)[..., :3].mean(axis=-1)  # (h, w)
    windows = _windows(image, grey.shape)
    if windows is None:
        return None
    there, x, y = windows
    scores = {}
    for name, orient in ORIENTATIONS.items():
        turned = orient(grey)
        if abs(turned.shape[0] / grey.shape[0] - 1) > 0.02 or abs(turned.shape[1] / grey.shape[1] - 1) > 0.02:
            continue
        here = np.concatenate([_cells(turned, x0, y0) for y0, x0 in zip(y, x, strict=True)])
        score = _rank_correlation(here, there)
        if score is None:
            return None
        scores[name] = score
    best = max(scores, key=lambda name: scores[name])
    return Agreement(best, scores[best], scores[UPRIGHT])


def check_image(image: LazyImage, small: NDArray[Any], name: str) -> None:
    """Refuse an image that is mirrored or turned against a small copy of it, and warn where it looks like another."""
    agreement = compare(image, small)
    if agreement is None or agreement.fits:
        return
    if agreement.turned:
        msg = (
            f"the image {name!r} is {agreement.orientation} against the one that the spots were aligned to: so it "
            f"agrees with its thumbnail (rank correlation {agreement.best:.2f}), and as it is it does not "
            f"({agreement.upright:.2f}). Pass the image that the spots were aligned to, or turn this one back."
        )
        raise ValueError(msg)
    logger.warning(
        "the image %s looks unlike the thumbnail of the one that the spots were aligned to (rank correlation %.2f, 0.99 is "
        "usual, and no better mirrored or turned): is it of this section?",
        name, agreement.upright,
    )  # fmt: skip


def warn_of_orientation(section: Section, small: NDArray[np.uint8], factor: int) -> None:
    """Warn where tissue and expression of a section speak for another orientation of its image, shrunken by ``factor``."""
    from PIL import Image

    if not section.measured:
        return
    rest = -(-max(small.shape) // _EVIDENCE_PX)
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
    warn_of_orientation(section, *thumbnail(section.image, max_px=_EVIDENCE_PX))


def likelier_orientation(
    small: NDArray[np.uint8], xy: NDArray[np.float64], expression: sparse.csr_matrix, *, spot_cells: float
) -> str | None:
    """Name the orientation of an image that tissue and expression of its spots speak for, or ``None`` for the given one.

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
        turned = orient(maps)  # what they would be if the image were stored upright
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


def _windows(image: LazyImage, shape: tuple[int, int]) -> tuple[NDArray[np.float64], Any, Any] | None:
    """Grey levels of cells in windows all over the image, and where the windows begin in the small copy: x, y."""
    edge = _WINDOW_CELLS * _CELL_PX
    if min(shape) < 2 * edge:
        return None
    per_px = np.array([image.width_px / shape[1], image.height_px / shape[0]])
    at = [np.unique(np.linspace(0, n - edge, _WINDOWS + 2)[1:-1].astype(int)) for n in (shape[1], shape[0])]
    y, x = (a.ravel() for a in np.meshgrid(at[1], at[0], indexing="ij"))
    corners = np.column_stack([x * per_px[0], y * per_px[1], (x + edge) * per_px[0], (y + edge) * per_px[1]])
    boxes = [(int(a), int(b), max(int(c), int(a) + edge), max(int(d), int(b) + edge)) for a, b, c, d in corners]
    regions = ChunkReader(replace(image, coarser=()), boxes)
    grey = []
    for i in range(len(boxes)):
        pixels = regions.read(i).mean(axis=0)  # (height, width)
        rows, cols = (np.linspace(0, n, _WINDOW_CELLS + 1).astype(int) for n in pixels.shape)
        sums = np.add.reduceat(np.add.reduceat(pixels, rows[:-1], axis=0), cols[:-1], axis=1)
        grey.append((sums / np.outer(np.diff(rows), np.diff(cols))).ravel())
    return np.concatenate(grey), x, y


def _cells(grey: NDArray[np.float64], x0: int, y0: int) -> NDArray[np.float64]:
    edge = _WINDOW_CELLS * _CELL_PX
    # a swapped copy may be a pixel shorter
    x0, y0 = min(x0, grey.shape[1] - edge), min(y0, grey.shape[0] - edge)
    window = grey[y0 : y0 + edge, x0 : x0 + edge]
    return window.reshape(_WINDOW_CELLS, _CELL_PX, _WINDOW_CELLS, _CELL_PX).mean((1, 3)).ravel()


def _rank_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    from scipy.stats import rankdata

    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])
