"""Train a head on the measured spots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from histosge._embedding import Embedder, Forecast, resolve_device
from histosge._encoders import DEFAULT_ENCODER
from histosge._heads import default_head, divides
from histosge._model import check_arguments, fit_model
from histosge._section import check_orientation, read_section

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from histosge._model import Model


def fit(
    sdata: SpatialData | Sequence[SpatialData],
    *,
    encoder: Any = DEFAULT_ENCODER,
    head: str | None = None,
    genes: int | Sequence[str] | str = 1000,
    tile_um: float | None = None,
    dense: bool = False,
    n_folds: int = 5,
    level: float | None = 0.9,
    head_options: dict[str, Any] | None = None,
    image_key: str | None = None,
    spots_key: str | None = None,
    table_key: str | None = None,
    layer: str | None = None,
    coordinate_system: str | None = None,
    mpp: float | None = None,
    pitch_um: float | None = None,
    device: str | None = None,
    batch_size: int = 64,
    rng: int | np.random.Generator | None = 0,
    progress: bool | None = None,
) -> Model:
    """Train a head on the measured spots of one or more sections.

    The spots are dealt into folds of contiguous blocks; for each fold a head is trained on all others, with early
    stopping on spots of its own, and predicts the fold it never saw. The scores are the held-out ones, beside those of
    ridge regression and inverse-distance interpolation on the same folds; the error bars are calibrated on the same
    predictions. The model is the mean of the networks of all folds; heads that are no networks are fitted once more, on
    all spots. Genes are chosen, and everything is scaled, inside the training spots of each fold.

    Parameters
    ----------
    sdata
        Section with an H&E image and measured spots, or a list of sections.
    encoder
        Name of an encoder (see :func:`histosge.encoders`), names joined by ``+`` as in ``"uni+rgb"``, the paper's, or one
        that :func:`histosge.load_encoder` made.
    head
        ``"in-context"`` (attention over measured neighbours), ``"aggregate"`` (the same, learnt through the mean of each
        spot's parts), ``"kriging"`` (Gaussian process on position and image), ``"published"`` (the paper's network,
        repaired), ``"ridge"``, ``"coordinates"``, ``"nearest"`` or ``"mean"``; names joined by ``+`` for their mean.
        ``None`` takes ``"in-context+kriging"``, or ``"aggregate+kriging"`` where ``dense``.
    genes
        Number of genes, chosen by spatial autocorrelation; a list of names; or ``"all"`` that were seen.
    tile_um
        Edge of a tile in µm. ``None`` takes the encoder's own, at which it was trained.
    dense
        Embed the area of a spot, from the encoder's tokens, instead of the tile around its centre: for models that predict
        bins and cells.
    n_folds
        Folds of the spots, 2 to 20.
    level
        Share of measurements at spot scale that the error bars shall hold. ``None`` makes none.
    head_options
        Arguments of the head, for example ``{"n_neighbours": 30}``; of several heads, by name, for example
        ``{"in-context": {"n_neighbours": 30}}``.
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
        Tiles per forward pass of the encoder.
    rng
        Seed or generator. The same seed gives the same model on the same machine.
    progress
        Show progress bars. ``None`` follows ``settings.progress``.

    Returns
    -------
    The model, with held-out scores in ``model.scores`` and ``model.held_out``, and the losses of heads that are trained in
    epochs in ``model.training``. It holds the spots that it learnt from. Nothing is written into ``sdata``.

    Raises
    ------
    KeyError
        Where a key or layer that is named is not in a section.
    ValueError
        Where a section cannot be read, or a head, gene or encoder is unknown.
    RuntimeError
        Where the encoder's weights cannot be had, or memory runs out (``batch_size``).

    Examples
    --------
    >>> import histosge as sge
    >>> sdata = sge.datasets.synthetic()
    >>> model = sge.tl.fit(sdata, encoder="stain-texture", head="ridge", genes=20)
    >>> sorted(model.held_out)
    ['nearest', 'ridge']
    """
    several = list(sdata) if isinstance(sdata, Sequence) else [sdata]
    if not several:
        msg = "sdata is an empty list: pass at least one section."
        raise ValueError(msg)
    where = resolve_device(device)
    sections = [
        read_section(
            one,
            image_key=image_key,
            spots_key=spots_key,
            table_key=table_key,
            layer=layer,
            coordinate_system=coordinate_system,
            mpp=mpp,
            pitch_um=pitch_um,
        )
        for one in several
    ]
    head = default_head(dense=dense) if head is None else head
    check_arguments(head=head, genes=genes, n_folds=n_folds, sections=sections, level=level, head_options=head_options)
    values, parts = [], []
    forecast = Forecast(sum(len(section.xy_px) for section in sections))
    how: dict[str, Any] = {"tile_um": tile_um, "dense": dense}
    run: dict[str, Any] = {"device": device, "batch_size": batch_size, "progress": progress}
    for section in sections:
        check_orientation(section)
        embedder = Embedder.open(section, encoder, **how, **run)
        encoder = embedder.encoder  # loaded once for all sections
        values.append(embedder.embed_spots(forecast=forecast))
        if dense and divides(head):
            parts.append(embedder.embed_parts())
    return fit_model(
        sections,
        values,
        config=embedder.config,
        parts=parts or None,
        head=head,
        genes=genes,
        n_folds=n_folds,
        level=level,
        rng=np.random.default_rng(rng),
        device=where,
        head_options=head_options,
        progress=progress,
    )
