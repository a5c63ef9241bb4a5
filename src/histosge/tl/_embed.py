"""Embed spots or targets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import numpy as np

from histosge import _keys
from histosge._embedding import Embedder
from histosge._options import EmbedOptions, Reading, Running, expand, pick
from histosge._section import commit, embedding_table, own_spots, read_section, read_targets
from histosge._settings import logger
from histosge.tl._params import recorded

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData


@expand(EmbedOptions)
def embed(
    sdata: SpatialData,
    *,
    target_key: str | None = None,
    dense: bool = False,
    inplace: bool = True,
    **options: Unpack[EmbedOptions],
) -> AnnData | None:
    """Embed spots or targets from the H&E image with a pathology image large model.

    Each is the centre of a tile at the physical scale that the encoder was trained at. The image is read block by
    block, so memory does not grow with its size. Embeddings of tile encoders are kept on disk (``settings.cache_dir``,
    ``settings.cache_gb``): a second run reads them, and an interrupted run continues.

    Parameters
    ----------
    sdata
        Section with an H&E image and measured spots.
    target_key
        Shapes to embed. ``None`` takes the measured spots.
    encoder, tile_um
    dense
        Whether to embed the area of each shape, from the encoder's tokens, together with the surroundings of its
        centre, instead of the tile around its centre.
    image_key, spots_key, table_key, layer, coordinate_system, mpp
    device, batch_size, progress
    inplace
        Whether to write into ``sdata``, or to return the table.

    Returns
    -------
    ``None``, or with ``inplace=False`` the table. Written:

    ``sdata.tables["{target}_{encoder}"]``
        Annotates the shapes, one row each, with ``obsm["X_{encoder}"]`` (n, d) float32 embeddings
        (tile encoders round to half precision, unless ``settings.precision`` is ``"float32"``),
        ``obsm["spatial"]`` (n, 2) float64 (x, y) in pixels of the image, and ``uns["histosge"]``
        provenance, with the arguments of the call in ``params``.

    Raises
    ------
    KeyError
        Where ``sdata`` lacks a named key or layer.
    ValueError
        Where the section cannot be read, the encoder is unknown, or the image is too coarse for it.
    RuntimeError
        Where the encoder's weights cannot be had, or memory runs out (``batch_size``).

    Examples
    --------
    >>> import histosge as sge
    >>> sdata = sge.datasets.synthetic()
    >>> sge.tl.embed(sdata, encoder="stain-texture")
    >>> sdata.tables["spots_stain-texture"].obsm["X_stain-texture"].shape[1]
    120
    """
    params = recorded(locals())
    section = read_section(sdata, **pick(options, Reading))
    embedder = Embedder.open(
        section,
        options["encoder"],
        tile_um=options["tile_um"],
        dense=dense,
        **pick(options, Running),
    )
    if target_key is None:
        target_key = section.spots_key
    if target_key == section.spots_key:
        targets = own_spots(section).take(np.argsort(section.rows))  # in the order of the user's table
    else:
        targets = read_targets(sdata, section, target_key)
    values = embedder.embed(targets)
    used = embedder.config.name
    table = embedding_table(targets, encoder=used, values=values, provenance={**embedder.provenance, "params": params})
    if not inplace:
        return table
    name = _keys.embedding_table(target_key, used)
    commit(sdata, tables={name: table})
    logger.info("added %d embeddings x %d to sdata.tables[%r]", *values.shape, name)
    return None
