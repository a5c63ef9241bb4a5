"""Which spots heads learn from, where there are more than ``max_spots``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from histosge._settings import is_whole, logger
from histosge._statistics import draw_evenly, shares_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from histosge._section import Section

LEAST_SPOTS = 50
"""Smallest ``max_spots``: fewer spots, in folds, are too few to learn from."""
_LEAST_OF_SECTION = 10


def spots_to_draw(sizes: Sequence[int], *, max_spots: int) -> list[int]:
    """Number of spots to learn from in each section, of ``sizes`` spots; log where some are left out."""
    check_max_spots(max_spots)
    found = [int(n) for n in shares_of(sizes, most=max_spots)]
    n_all = sum(sizes)
    if n_all <= max_spots:
        return found
    few = min(found)
    if few < min(_LEAST_OF_SECTION, *sizes):
        msg = (
            f"max_spots={max_spots} is {few} spots in each of {len(sizes)} sections, and at least {_LEAST_OF_SECTION} "
            f"are needed: pass max_spots={_LEAST_OF_SECTION * len(sizes)} or more, or fewer sections."
        )
        raise ValueError(msg)
    where = "" if len(sizes) == 1 else f", at most {max(found):,} of a section"
    logger.info(
        "learning from %s of %s spots (max_spots), blocks drawn evenly over the tissue%s",
        f"{sum(found):,}", f"{n_all:,}", where,
    )  # fmt: skip
    return found


def drawn_rows(section: Section, n: int, *, rng: np.random.Generator) -> NDArray[np.int64] | None:
    """Rows of ``n`` spots of a section, drawn evenly; ``None`` for all of them, without a draw from ``rng``."""
    if n >= len(section.xy_px):
        return None
    return draw_evenly(section.xy_um, n, pitch_um=section.pitch_um, rng=rng)


def check_max_spots(max_spots: int) -> None:
    """Raise where ``max_spots`` is no number, or too small."""
    if not (is_whole(max_spots) and max_spots >= LEAST_SPOTS):
        msg = f"max_spots={max_spots!r}: pass a whole number of spots to learn from, at least {LEAST_SPOTS}."
        raise ValueError(msg)
