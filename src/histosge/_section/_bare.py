"""A section of which nothing was measured: an H&E image, and a scale that somebody must give."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from histosge._section._image import find_image, lazy_image
from histosge._section._section import Section, _regions, check_mpp, ours, written_by_us
from histosge._section._values import Values
from histosge._settings import logger

if TYPE_CHECKING:
    from spatialdata import SpatialData

_XY = ("x", "y")


def is_measured(sdata: SpatialData) -> bool:
    """Whether any table but ours annotates shapes that are there."""
    return any(set(_regions(table)) & set(sdata.shapes) for table in sdata.tables.values() if not ours(table))


def read_image_only(
    sdata: SpatialData,
    *,
    image_key: str | None,
    coordinate_system: str | None,
    mpp: float | None,
    pitch_um: float,
    spot_um: float,
) -> Section:
    """Read the image of a section without spots; pitch and size of a spot are those that a model learnt from."""
    from spatialdata.transformations import Affine, get_transformation

    check_mpp(mpp)
    image_key = find_image(sdata, image_key)
    if mpp is None:
        msg = (
            f"nothing was measured on this section, so that the µm per pixel of its image {image_key!r} cannot be told "
            "from the pitch of spots. Pass mpp=, as the scanner states it (about 0.25 at 40x, 0.5 at 20x)."
        )
        raise ValueError(msg)
    of_image = get_transformation(sdata.images[image_key], get_all=True)
    systems = sorted(of_image)
    if coordinate_system is not None and coordinate_system not in systems:
        msg = f"coordinate_system={coordinate_system!r} does not hold the image {image_key!r}. Choose one of {systems}."
        raise ValueError(msg)
    section = Section(
        image=lazy_image(sdata.images[image_key], image_key),
        image_key=image_key,
        spots_key="",
        table_key="",
        coordinate_system=coordinate_system or systems[0],
        system_given=coordinate_system is not None,
        to_image=np.eye(3),
        instances=pd.Index([], dtype=str),
        xy_px=np.empty((0, 2)),
        expression=sparse.csr_matrix((0, 0), dtype=np.float32),
        genes=pd.Index([], dtype=str),
        values=Values("the image alone"),
        mpp=float(mpp),
        pitch_um=pitch_um,
        spot_um=spot_um,
        lattice=None,
        technology="not measured",
        mpp_source="given",
        # pixels of the image; shapes have no channels
        transformations={k: Affine(t.to_affine_matrix(_XY, _XY), _XY, _XY) for k, t in of_image.items()},
        written=written_by_us(sdata),
    )
    logger.info("image %r: no measured spots, %.4g µm per pixel (given)", image_key, mpp)
    return section
