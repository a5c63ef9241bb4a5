"""Prepare a section: lay targets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Unpack

from histosge import _keys
from histosge._options import Reading, expand
from histosge._section import commit, lay_targets, read_section, shapes_element
from histosge._settings import logger

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData

__all__ = ["targets"]


@expand(Reading)
def targets(
    sdata: SpatialData,
    *,
    upsample: int | None = None,
    bin_um: float | None = None,
    tissue: Literal["auto", "spots"] = "auto",
    key_added: str = "histosge",
    inplace: bool = True,
    **reading: Unpack[Reading],
) -> GeoDataFrame | None:
    """Lay targets to predict at: a lattice between the spots, or square bins.

    The lattice is estimated from the spots, at any rotation, scale and technology, and contains the spots themselves.
    Targets outside the tissue are left out.

    Parameters
    ----------
    sdata
        Section with an H&E image and measured spots.
    upsample
        Targets per measured spot: 2, 4, 8 or 16. Without this and ``bin_um``, 4 as in the paper.
    bin_um
        Edge of square bins in µm, instead of ``upsample``; from 1 to the size of a measured spot.
    tissue
        ``"auto"`` keeps targets within reach of a spot where the image is about as dark as at the spots;
        ``"spots"`` keeps all targets within reach of a spot.
    image_key, spots_key, table_key, layer, coordinate_system, mpp
    key_added
        The shapes are named ``"{key_added}_targets"``.
    inplace
        Whether to write into ``sdata``, or to return the shapes.

    Returns
    -------
    ``None``, or with ``inplace=False`` the shapes. Written:

    ``sdata.shapes["{key_added}_targets"]``
        Circles (lattice) or squares (bins), integer index, with all transformations of the spots, and the columns
        ``array_row`` (int64), ``array_col`` (int64) and ``is_spot`` (bool).

    Raises
    ------
    ValueError
        If the section cannot be read, both ``upsample`` and ``bin_um`` are given, one of them is out of range, or
        histosge did not write existing shapes of this name.

    Examples
    --------
    >>> import histosge as sge
    >>> sdata = sge.datasets.synthetic()
    >>> sge.pp.targets(sdata, upsample=4)
    >>> bool(sdata.shapes["histosge_targets"]["is_spot"].any())
    True
    """
    _keys.check("key_added", key_added)
    if upsample is not None and bin_um is not None:
        msg = f"upsample={upsample!r} and bin_um={bin_um!r} are two ways to lay targets: pass one of them."
        raise ValueError(msg)
    section = read_section(sdata, **reading)
    name = _keys.targets(key_added)
    targets = lay_targets(section, key=name, upsample=upsample, bin_um=bin_um, tissue=tissue)
    element = shapes_element(section, targets)
    if not inplace:
        return element
    commit(sdata, shapes={name: element})
    logger.info("added %d targets to sdata.shapes[%r] (tissue: %s)", len(targets), name, targets.tissue)
    return None
