"""Embed places of the image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from histosge import _keys
from histosge._embedding import Embedder
from histosge._encoders import DEFAULT_ENCODER
from histosge._section import commit, embedding_table, own_spots, read_section, read_targets
from histosge._settings import logger
from histosge.tl._params import recorded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from spatialdata import SpatialData


def embed(
    sdata: SpatialData,
    *,
    target_key: str | None = None,
    encoder: Any = DEFAULT_ENCODER,
    tile_um: float | None = None,
    stack: Sequence[str] = ("pilm",),
    dense: bool = False,
    image_key: str | None = None,
    spots_key: str | None = None,
    table_key: str | None = None,
    layer: str | None = None,
    coordinate_system: str | None = None,
    mpp: float | None = None,
    pitch_um: float | None = None,
    device: str | None = None,
    batch_size: int = 64,
    progress: bool | None = None,
    inplace: bool = True,
) -> AnnData | None:
    """Embed places of the H&E image with a pathology image large model.

    Each place is the centre of a tile at the physical scale the encoder was trained at. The image is read block by
    block; its size does not matter for memory. Embeddings of tile encoders are kept on disk (``settings.cache_dir``,
    ``settings.cache_gb``): a second run reads them, and one that was interrupted goes on.

    Parameters
    ----------
    sdata
        Section with an H&E image and measured spots.
    target_key
        Shapes to embed. ``None`` takes the measured spots.
    encoder
        Name of an encoder (see :func:`histosge.encoders`), or one that :func:`histosge.load_encoder` made.
    tile_um
        Edge of a tile in µm. ``None`` takes the encoder's own, at which it was trained.
    stack
        Maps to stack: ``"pilm"`` the encoder's, ``"rgb"`` the mean colour around the place, as in the paper's figure.
    dense
        Embed the area of each place, from the encoder's tokens, beside the surroundings of its centre, instead of the tile
        around its centre.
    image_key
        H&E image in ``sdata.images``. ``None`` takes the only one.
    spots_key
        Measured spots in ``sdata.shapes``. ``None`` takes the only ones that a table annotates.
    table_key
        Table with the counts of the spots. ``None`` takes the only one.
    layer
        Layer of the table that holds the counts, or ``"raw"``: ``table.raw.X``. ``None`` takes ``X``.
    coordinate_system
        Coordinate system that aligns image and spots. ``None`` takes the one that holds both; several must agree.
    mpp
        µm per pixel of the image. ``None`` takes what the file states, or derives it from the pitch.
    pitch_um
        Distance of neighbouring spots in µm. ``None`` takes the technology's: Visium 100, ST 200.
    device
        Where to compute. ``None`` takes ``settings.device``, else a GPU if there is one.
    batch_size
        Tiles per forward pass.
    progress
        Show the progress bar. ``None`` follows ``settings.progress``.
    inplace
        Write into ``sdata``, or return the table.

    Returns
    -------
    ``None``, or with ``inplace=False`` the table. Written:

    ``sdata.tables["{target}_{encoder}"]``
        Annotates the target shapes, one row each, with ``obsm["X_{encoder}"]`` (n, d) float32 embeddings
        (of tile encoders rounded to half precision, unless ``settings.precision`` is ``"float32"``),
        ``obsm["spatial"]`` (n, 2) float64 (x, y) in pixels of the image, and ``uns["histosge"]``
        provenance, with the arguments of the call in ``params``.

    Raises
    ------
    KeyError
        Where a key or layer that is named is not in ``sdata``.
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
    section = read_section(
        sdata,
        image_key=image_key,
        spots_key=spots_key,
        table_key=table_key,
        layer=layer,
        coordinate_system=coordinate_system,
        mpp=mpp,
        pitch_um=pitch_um,
    )
    embedder = Embedder.open(
        section,
        encoder,
        tile_um=tile_um,
        stack=stack,
        dense=dense,
        device=device,
        batch_size=batch_size,
        progress=progress,
    )
    if target_key is None:
        target_key = section.spots_key
    targets = own_spots(section) if target_key == section.spots_key else read_targets(sdata, section, target_key)
    values = embedder.embed(targets)
    used = embedder.encoder.spec.name
    table = embedding_table(targets, encoder=used, values=values, provenance={**embedder.provenance, "params": params})
    if not inplace:
        return table
    name = _keys.embedding_table(target_key, used)
    commit(sdata, tables={name: table})
    logger.info("added %d embeddings x %d to sdata.tables[%r]", *values.shape, name)
    return None
