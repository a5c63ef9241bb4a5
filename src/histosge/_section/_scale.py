"""µm per pixel of a section: from the pitch of its spots, and from what its file says about their array."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial import ConvexHull
from scipy.spatial.distance import pdist

from histosge._geometry import (
    LEGACY_ST,
    VISIUM,
    Lattice,
    NotALattice,
    Technology,
    estimate_lattice,
    lattice_of_array,
    nearest_spots,
)
from histosge._settings import logger

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from histosge._section._declared import Declared

_VISIUM_SPOTS = 128 * 112
"""Spots of the largest capture area, 11 mm wide"""
_VISIUM_DIAGONAL = 160
"""Pitches across the largest capture area, with a margin"""
_SPOT_PER_PITCH = (0.5, 0.8)
"""Diameter of a Visium spot as Space Ranger writes it (55 to 70 µm), over 100 µm."""
_TOUCHING = 0.9
"""Drawn diameter over pitch from which spots leave no gap."""
_COARSE_UM = 10.0
"""Pixels of microscope images are smaller; those of thumbnails have up to 10 µm."""
_FEWEST_PX = 3.0
"""Least distance of spots on an image: on the smallest thumbnails it is 6 px."""


@dataclass(frozen=True)
class Scale:
    """Physical scale of a section, and the lattice of its spots."""

    mpp: float
    pitch_um: float
    spot_um: float
    technology: str
    source: str
    """Where the µm per pixel comes from"""
    lattice: Lattice | None


def physical_scale(
    declared: Declared,
    xy_px: NDArray[np.float64],
    *,
    spots_key: str,
    drawn_px: float,
    mpp: float | None,
) -> Scale:
    """Find µm per pixel, pitch and spot size, or say why they cannot be known.

    Parameters
    ----------
    declared
        What the file says.
    xy_px
        (n, 2) spots in pixels of the image.
    spots_key
        Name of the spots, for messages.
    drawn_px
        Drawn diameter of a spot, or edge of a bin.
    mpp
        µm per pixel, where the user gives it.
    """
    _check_no_indices(declared, xy_px, spots_key)
    lattice, why_not = _lattice(declared, xy_px)
    if lattice is None:
        near = float(np.median(nearest_spots(xy_px, xy_px, k=1, exclude=np.arange(len(xy_px)))[1]))
        source = "given"
        if mpp is None:
            mpp, source = declared.mpp, "stated by the file"
        if mpp is None:
            msg = (
                f"the physical scale of {spots_key!r} cannot be known from its spots: {why_not} "
                "Pass mpp=, the µm per pixel of the image."
            )
            raise ValueError(msg)
        spot_px = drawn_px if declared.spot_px is None else declared.spot_px
        return _checked(Scale(mpp, near * mpp, spot_px * mpp, "irregular", source, None), spots_key)
    found, why_not = _recognised(lattice, declared, xy_px, drawn_px=drawn_px)
    source = "given"
    if mpp is None and declared.mpp is not None:
        mpp, source = declared.mpp, "stated by the file"
        pitch = mpp * lattice.pitch_px
        if found is not None and abs(pitch / found.pitch_um - 1) > 0.1:
            msg = (
                f"the file states {mpp:.4g} µm per pixel, which makes the pitch of {spots_key!r} {pitch:.4g} µm, but "
                f"it is {found.pitch_um:g} µm ({declared.source}): are the spots in pixels of another image? Pass "
                "mpp=, the µm per pixel of this image."
            )
            raise ValueError(msg)
    if mpp is None:
        if found is None:
            msg = (
                f"the physical scale of {spots_key!r} cannot be known from its spots: {why_not} "
                f"Pass mpp=: the pitch of the spots in µm divided by {lattice.pitch_px:.4g} px."
            )
            raise ValueError(msg)
        pitch = found.pitch_um
        mpp = pitch / lattice.pitch_px
        source = f"from the pitch, {lattice.pitch_px:.1f} px = {pitch:g} µm"
        _check_pixels(lattice, declared, found, spots_key)
        _warn_if_doubtful(declared, found, lattice, spots_key)
    else:
        pitch = lattice.pitch_px * mpp
        if found and abs(pitch / found.pitch_um - 1) > 0.1:
            logger.warning(
                "mpp=%g makes the pitch of these %s spots %.1f µm, where %g µm is usual",
                mpp, found.name, pitch, found.pitch_um,
            )  # fmt: skip
    if found is not None and abs(pitch / found.pitch_um - 1) < 0.1:
        return _checked(Scale(mpp, pitch, found.spot_um, found.name, source, lattice), spots_key)
    name = f"{lattice.kind} lattice of {pitch:.3g} µm"
    return _checked(Scale(mpp, pitch, drawn_px * mpp, name, source, lattice), spots_key)


def _checked(scale: Scale, spots_key: str) -> Scale:
    if scale.mpp > _COARSE_UM:
        logger.warning(
            "%r: %.4g µm per pixel is coarser than any microscope image (0.2 to 1; thumbnails up to %g): are the spots "
            "in pixels of this image?",
            spots_key, scale.mpp, _COARSE_UM,
        )  # fmt: skip
    return scale


def _lattice(declared: Declared, xy_px: NDArray[np.float64]) -> tuple[Lattice | None, str]:
    """The lattice of the spots, or of the array's rows and columns where those disagree; else why there is none."""
    lattice, why_not = None, ""
    try:
        lattice = estimate_lattice(xy_px)
    except NotALattice as err:
        why_not = str(err)
    if declared.row is None or declared.col is None:
        return lattice, why_not
    try:
        stated = lattice_of_array(xy_px, declared.row, declared.col)
    except NotALattice as err:
        logger.debug("rows and columns of the array are not used: %s", err)
        return lattice, why_not
    same = lattice is not None and lattice.kind == stated.kind and abs(lattice.pitch_px / stated.pitch_px - 1) < 0.02
    return (lattice if same else stated), ""


def _recognised(
    lattice: Lattice, declared: Declared, xy_px: NDArray[np.float64], *, drawn_px: float
) -> tuple[Technology | None, str]:
    """The technology that file and lattice agree on; else why it is not known."""
    technology, pitch_px = declared.technology, lattice.pitch_px
    touching = drawn_px >= _TOUCHING * pitch_px
    if technology is not None and technology.name == "visium-hd":
        return (technology, "") if lattice.kind == "square" else (None, "bins lie on a hexagonal lattice.")
    if lattice.kind == "hexagonal":
        if technology is VISIUM:
            return VISIUM, ""
        across = float(pdist(xy_px[ConvexHull(xy_px, qhull_options="QJ").vertices]).max()) / pitch_px
        if touching:
            return (
                None,
                f"they touch each other on a hexagonal lattice of {pitch_px:.1f} px, and spots of Visium do not.",
            )
        if len(xy_px) > _VISIUM_SPOTS or across > _VISIUM_DIAGONAL:
            return None, (
                f"{len(xy_px)} spots, {across:.0f} pitches across, on a hexagonal lattice of {pitch_px:.1f} px are "
                f"more than any Visium array has ({_VISIUM_SPOTS} spots, 158 pitches across)."
            )
        return VISIUM, ""
    if touching:
        return None, (
            f"they touch each other on a square lattice of {pitch_px:.1f} px, and no barcode, name or scale factor "
            "says how large these bins are."
        )
    if technology is LEGACY_ST:
        return LEGACY_ST, ""
    return None, (
        f"they lie on a square lattice of {pitch_px:.1f} px with gaps, and no name or scale factor says of which "
        "technology: 200 µm apart as of Spatial Transcriptomics, 20 to 100 µm as of DBiT-seq, or bins with some left "
        "out?"
    )


def _check_no_indices(declared: Declared, xy_px: NDArray[np.float64], spots_key: str) -> None:
    """Refuse rows and columns of the array where pixels should be."""
    if declared.row is None or declared.col is None or declared.technology is not VISIUM:
        return
    array = np.column_stack([declared.col, declared.row])
    if np.allclose(xy_px, array) or np.allclose(xy_px, array[:, ::-1]):
        msg = (
            f"the coordinates of {spots_key!r} are array_col and array_row, not pixels of the image. Write pixels to "
            'obsm["spatial"] and read the section again: pxl_col_in_fullres and pxl_row_in_fullres of Space Ranger\'s '
            "tissue_positions."
        )
        raise ValueError(msg)


def _check_pixels(lattice: Lattice, declared: Declared, found: Technology, spots_key: str) -> None:
    """Refuse coordinates that are not pixels, or not of the image that the scale factors describe."""
    ratio = None if declared.spot_px is None else declared.spot_px / lattice.pitch_px
    if found is VISIUM and ratio is not None and not _SPOT_PER_PITCH[0] <= ratio <= _SPOT_PER_PITCH[1]:
        usual = [declared.spot_px / r for r in reversed(_SPOT_PER_PITCH) if declared.spot_px is not None]
        msg = (
            f"the scale factors state that a spot of {spots_key!r} is {declared.spot_px:.4g} px wide, so that Visium "
            f"spots lie {usual[0]:.4g} to {usual[1]:.4g} px apart, but these lie {lattice.pitch_px:.4g} px apart: "
            "their coordinates "
            "are in pixels of another image, for example of the hires thumbnail. Divide them by that image's scale "
            "factor (tissue_hires_scalef), or pass mpp=, the µm per pixel of this image, if they are right and the "
            "factors are not."
        )
        raise ValueError(msg)
    if found in (VISIUM, LEGACY_ST) and lattice.pitch_px < _FEWEST_PX:
        msg = (
            f"the spots of {spots_key!r} lie {lattice.pitch_px:.3g} px apart, which makes "
            f"{found.pitch_um / lattice.pitch_px:.3g} µm per pixel: are the coordinates rows and columns of the array? "
            "Write pixels of the image, or pass mpp=."
        )
        raise ValueError(msg)


def _warn_if_doubtful(declared: Declared, found: Technology, lattice: Lattice, spots_key: str) -> None:
    if declared.technology is None:
        logger.warning(
            "%r: taken as %s, %g µm apart, since the spots lie on a %s lattice with gaps; no barcode, array_row and "
            "array_col or scale factor says so. Pass mpp= if they are of another technology",
            spots_key, found.name, found.pitch_um, lattice.kind,
        )  # fmt: skip
    elif declared.doubtful:
        logger.warning(
            "%r: taken as Spatial Transcriptomics, %g µm apart (%s); DBiT-seq uses the same names for its squares: if "
            "these are such, pass mpp=",
            spots_key, found.pitch_um, declared.source,
        )  # fmt: skip
