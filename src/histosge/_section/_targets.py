"""Targets of a section: laid between the spots, as bins, or read from shapes; which of them lie on tissue."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from histosge._geometry import (
    Footprints,
    Targets,
    check_upsample,
    in_mask,
    lay_around,
    lay_over,
    nearest_spots,
    refine,
    square_bins,
    tissue_mask,
)
from histosge._image import thumbnail
from histosge._section._coordinates import align, apply, centroids, drawn_size, scale_of
from histosge._section._orientation import warn_of_orientation
from histosge._settings import logger

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from numpy.typing import NDArray
    from spatialdata import SpatialData

    from histosge._section._section import Section

TISSUE = ("auto", "spots")
INVALID = ("raise", "skip")
SMALLEST_BIN_UM = 1.0
_TISSUE_BLUR_PITCH = 0.25
_SAME_PLACE_PITCH = 0.01
"""Largest distance, in pitches, of a target that counts as the spot itself."""


def own_spots(section: Section) -> Targets:
    """Take the measured spots as targets."""
    n = len(section.xy_px)
    return Targets(
        section.footprints, np.arange(n), section.instances.to_numpy(), key=section.spots_key, tissue="measured spots"
    )


def _in_tissue(section: Section, xy_px: NDArray[np.float64], *, tissue: str) -> tuple[NDArray[np.bool_], str]:
    """Which positions lie on tissue, and how that was found; all must lie in the image."""
    inside = np.asarray(((xy_px >= 0) & (xy_px < [section.image.width_px, section.image.height_px])).all(1))
    if tissue == "spots" and not section.measured:
        msg = "tissue='spots' keeps targets within reach of a spot, and nothing was measured here. Pass tissue='auto'."
        raise ValueError(msg)
    if tissue == "spots":
        return inside, "within reach of a measured spot"
    small, factor = thumbnail(section.image, max_px=1024)
    warn_of_orientation(section, small, factor)
    cell_um = factor * section.mpp
    # smoothed over about a spot, so that pale stroma is tissue
    mask, share = tissue_mask(
        small, section.xy_px / factor, blur_cells=max(_TISSUE_BLUR_PITCH * section.pitch_um / cell_um, 0.5)
    )
    how = "optical density of the image" + ("" if section.measured else ", Otsu's threshold")
    if share < 0.95:
        how += f", threshold lowered to the spots' own (Otsu's would have kept {share:.0%} of them)"
    return inside & in_mask(xy_px, mask, px_per_cell=(factor, factor)), how


def lay_targets(
    section: Section, *, key: str, upsample: int | None, bin_um: float | None, tissue: str = "auto"
) -> Targets:
    """Lay targets between the spots, or square bins, and keep those on tissue; targets at spots are always kept."""
    if tissue not in TISSUE:
        msg = (
            f"tissue={tissue!r}: choose 'auto' (dark enough in the image and within reach of a spot) "
            "or 'spots' (within reach of a spot)."
        )
        raise ValueError(msg)
    laid = (
        _lay_spots(section, upsample=4 if upsample is None else upsample)
        if bin_um is None
        else _lay_bins(section, bin_um)
    )
    on_tissue, how = _in_tissue(section, laid.xy_px, tissue=tissue)
    kept = laid.take(on_tissue | (laid.spot_index >= 0))
    return replace(kept, key=key, instances=np.arange(len(kept)), tissue=how)


def _lay_spots(section: Section, *, upsample: int) -> Targets:
    """Lay targets of a spot's size: on the spots' own lattice, around spots that lie on none, or over the image."""
    diameter_px, pitch_px = section.spot_um / section.mpp, section.pitch_um / section.mpp
    if not section.measured:
        check_upsample(upsample)
        width, height = section.image.width_px, section.image.height_px
        return lay_over(width, height, step_px=pitch_px / np.sqrt(upsample), hexagonal=True, diameter_px=diameter_px)
    if section.lattice is None:
        return lay_around(section.xy_px, pitch_px=pitch_px, upsample=upsample, diameter_px=diameter_px)
    return refine(section.lattice, section.xy_px, upsample=upsample, diameter_px=diameter_px)


def _lay_bins(section: Section, bin_um: float) -> Targets:
    """Lay square bins over all that lies within reach of a spot or, without spots, over the image."""
    if not SMALLEST_BIN_UM <= bin_um <= section.spot_um * (1 + 1e-6):  # spot_um may be computed, as 19.999...
        msg = (
            f"bin_um={bin_um!r}: bins must be at least {SMALLEST_BIN_UM:g} µm wide and no wider than a measured spot "
            f"({section.spot_um:g} µm), above which nothing is resolved. For targets between spots pass upsample=."
        )
        raise ValueError(msg)
    bin_px = bin_um / section.mpp
    if not section.measured:
        return lay_over(section.image.width_px, section.image.height_px, step_px=bin_px, hexagonal=False)
    return square_bins(section.xy_px, bin_px=bin_px, margin_px=section.pitch_um / np.sqrt(2) / section.mpp)


def to_image(sdata: SpatialData, section: Section, key: str) -> NDArray[np.float64]:
    """Matrix (3, 3) from a shapes element's own coordinates to pixels of the section's image."""
    wanted = section.coordinate_system if section.system_given else None
    return align(sdata, key, section.image_key, wanted=wanted)[1]


def read_targets(sdata: SpatialData, section: Section, key: str, *, on_invalid: str = "raise") -> Targets:
    """Take any shapes element as targets; ``on_invalid="skip"`` leaves out shapes that are invalid or off the image."""
    import shapely

    if key not in sdata.shapes:
        msg = f"target_key={key!r} is not among the shapes of this SpatialData: {list(sdata.shapes)}."
        raise KeyError(msg)
    if on_invalid not in INVALID:
        msg = (
            f"on_invalid={on_invalid!r}: choose 'raise', or 'skip' to leave out shapes that are invalid or outside the "
            "image."
        )
        raise ValueError(msg)
    element = sdata.shapes[key]
    if not element.index.is_unique:
        msg = f"target_key={key!r}: its index has duplicates, so that rows cannot be matched by name. Reset the index."
        raise ValueError(msg)
    matrix = to_image(sdata, section, key)
    outlines = element.geometry.to_numpy()
    broken = shapely.is_missing(outlines) | shapely.is_empty(outlines) | ~shapely.is_valid(outlines)
    with np.errstate(invalid="ignore"):
        xy_px = apply(matrix, centroids(element))
        outside = ~((xy_px >= 0) & (xy_px <= [section.image.width_px, section.image.height_px])).all(1)
    wrong = broken | outside
    if wrong.any():
        found = {
            "shapes are not valid": broken,
            f"shapes lie outside the image {section.image_key!r}": outside & ~broken,
        }
        counts = " and ".join(
            f"{int(rows.sum())} of {len(element)} {name}" for name, rows in found.items() if rows.any()
        )
        what = f"target_key={key!r}: {counts} (for example {list(element.index[wrong][:3])})"
        if on_invalid == "raise" or wrong.all():
            msg = f"{what}. Remove them (shapely.make_valid repairs some), or pass on_invalid='skip' to leave them out."
            raise ValueError(msg)
        logger.warning("%s: leaving them out", what)
        element, xy_px = element[~wrong], xy_px[~wrong]
    near, dist, present = nearest_spots(xy_px, section.xy_px, k=1)
    areas = _footprints(sdata, section, element, matrix, xy_px)
    # a cell or a bin in the middle of a spot is not the spot
    same = (dist[:, 0] * section.mpp <= _SAME_PLACE_PITCH * section.pitch_um) & present[:, 0]
    same &= ~_smaller(section, areas)
    in_tissue, how = _in_tissue(section, xy_px, tissue="auto")
    array_row, array_col = (
        element[column].to_numpy(np.int64) if column in element.columns else None
        for column in ("array_row", "array_col")
    )
    spot_index = np.where(same, near[:, 0], -1)
    names = element.index.to_numpy()
    return Targets(areas, spot_index, names, array_row, array_col, in_tissue=in_tissue, key=key, tissue=how)


def smaller_than_spot(section: Section, targets: Targets) -> bool:
    """Whether most targets are clearly smaller than a spot."""
    return len(targets) > 0 and float(np.mean(_smaller(section, targets.footprints))) > 0.5


def _smaller(section: Section, areas: Footprints) -> NDArray[np.bool_]:
    spot_px = np.median(section.footprints.size_px) if section.measured else section.spot_um / section.mpp
    return areas.size_px < 0.9 * spot_px


def _footprints(
    sdata: SpatialData, section: Section, element: GeoDataFrame, matrix: NDArray[np.float64], xy_px: NDArray[np.float64]
) -> Footprints:
    """Areas of circles and polygons in pixels of the image."""
    import shapely

    if not (element.geom_type == "Point").all():
        return Footprints.of_polygons(shapely.transform(element.geometry.to_numpy(), lambda xy: apply(matrix, xy)))
    spot_px = section.spot_um / section.mpp
    # targets that were laid between spots are drawn as wide as their step, but stand for what a spot would measure
    if "radius" not in element.columns or "is_spot" in element.columns:
        return Footprints.discs(xy_px, diameter_px=spot_px)
    size_px = 2 * element["radius"].to_numpy(float) * scale_of(matrix, "shapes", section.image_key)
    if not section.measured:
        return Footprints.discs(xy_px, diameter_px=size_px)
    # readers draw spots larger than they are: a circle of the drawn size is a spot
    spots = sdata.shapes[section.spots_key]
    drawn_px = drawn_size(spots) * scale_of(section.to_image, section.spots_key, section.image_key)
    return Footprints.discs(xy_px, diameter_px=np.where(np.abs(size_px / drawn_px - 1) < 0.01, spot_px, size_px))
