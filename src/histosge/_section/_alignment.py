"""Whether an image is the one that spots were aligned to, by a thumbnail of that image; see ``_orientation.py``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from histosge._image import ChunkReader
from histosge._settings import logger

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from histosge._image import LazyImage

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
"""Operations on an image (height, width, ...) that is stored upright; the first leaves it as it is"""
UPRIGHT = next(iter(ORIENTATIONS))

_WINDOWS = 8
"""Windows along each side of the image that are compared: few, since each reads a chunk of the image."""
_WINDOW_CELLS = 2
_CELL_PX = 4
"""Pixels of the small copy that are averaged, so that a shift by one or two does not matter."""
_FITS = 0.85
"""Rank correlation from which two images are the same: 0.99 on real sections, up to 0.82 in other orientations."""
_CLEARLY = 0.05
"""By how much the correlation in another orientation must be larger."""


@dataclass(frozen=True)
class Agreement:
    """How well an image agrees with a small copy of the one that spots were aligned to."""

    orientation: str
    """The key of :data:`ORIENTATIONS` that fits best"""
    best: float
    """Rank correlation of grey levels in that orientation"""
    upright: float
    """Rank correlation for the image as it is stored"""

    @property
    def fits(self) -> bool:
        return self.upright >= _FITS and self.upright > self.best - _CLEARLY

    @property
    def turned(self) -> bool:
        """Whether another orientation fits clearly better."""
        return self.best >= _FITS and self.best >= self.upright + _CLEARLY


def compare(image: LazyImage, small: NDArray[Any]) -> Agreement | None:
    """Compare an image with a small copy, (h, w, 3), in the orientations that keep its shape.

    Ranks of grey levels are compared, so that colour, brightness and contrast may differ. ``None`` where either image
    is uniform.
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
        "the image %s looks unlike the thumbnail of the one that the spots were aligned to (rank correlation %.2f, "
        "0.99 is usual, and no better mirrored or turned): is it of this section?",
        name, agreement.upright,
    )  # fmt: skip


def _windows(image: LazyImage, shape: tuple[int, int]) -> tuple[NDArray[np.float64], Any, Any] | None:
    """Grey levels of cells in windows all over the image, and corners (x, y) of the windows in the small copy."""
    edge = _WINDOW_CELLS * _CELL_PX
    if min(shape) < 2 * edge:
        return None
    per_px = np.array([image.width_px / shape[1], image.height_px / shape[0]])
    at = [np.unique(np.linspace(0, n - edge, _WINDOWS + 2)[1:-1].astype(int)) for n in (shape[1], shape[0])]
    y, x = (a.ravel() for a in np.meshgrid(at[1], at[0], indexing="ij"))
    corners = np.column_stack([x * per_px[0], y * per_px[1], (x + edge) * per_px[0], (y + edge) * per_px[1]])
    boxes = [(int(a), int(b), max(int(c), int(a) + edge), max(int(d), int(b) + edge)) for a, b, c, d in corners]
    reader = ChunkReader(replace(image, coarser=()), boxes)
    grey = []
    for i in range(len(boxes)):
        pixels = reader.read(i).mean(axis=0)  # (height, width)
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
