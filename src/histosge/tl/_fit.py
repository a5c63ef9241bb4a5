"""Train a head on the measured spots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np  # noqa: F401  the types of shared arguments name it

from histosge._embedding import Embedder, Forecast, resolve_device
from histosge._heads import default_head, learns_sub_spots
from histosge._model import check_arguments, drawn_rows, fit_model, spots_to_draw
from histosge._options import FitOptions, Reading, Running, expand, pick
from histosge._section import check_orientation, merge_bins, merged_edge, read_section
from histosge._settings import seeded

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from histosge._heads import Head
    from histosge._model import Model


@expand(FitOptions)
def fit(
    sdata: SpatialData | Sequence[SpatialData],
    *,
    head: str | type[Head] | Head | None = None,
    dense: bool = False,
    head_options: dict[str, Any] | None = None,
    **options: Unpack[FitOptions],
) -> Model:
    """Train a head on the measured spots of one or more sections.

    The spots are split into folds of contiguous blocks. For each fold a head is trained on the other folds, with early
    stopping on some of their spots, and predicts the held-out fold. These predictions are scored, next to those of
    ridge regression and inverse-distance interpolation on the same folds, and prediction intervals are calibrated on
    them. The model is the mean of the networks of all folds; a head without a network is fitted once more, on all
    spots. Genes and scalings are chosen on the training spots of each fold.

    Parameters
    ----------
    sdata
        Section with an H&E image and measured spots, or a list of sections.
    encoder
    head
        ``"in-context"`` (attention over measured neighbours), ``"aggregate"`` (the same, learnt through the mean of
        each spot's sub-spots), ``"kriging"`` (Gaussian process on position and image), ``"published"`` (the paper's
        network, corrected), ``"ridge"``, ``"coordinates"``, ``"nearest"`` or ``"mean"``; names joined by ``+`` for
        their mean. Or a head of your own, see :class:`histosge.Head`. ``None`` takes ``"in-context+kriging"``, or
        ``"aggregate+kriging"`` where ``dense``.
    genes, tile_um
    dense
        Whether to embed the area of a spot, from the encoder's tokens, instead of the tile around its centre: for
        models that predict bins and cells.
    n_folds, max_spots, merge_um
    head_options
        Arguments of the head, for example ``{"n_neighbours": 30}``; for joined heads by name, for example
        ``{"in-context": {"n_neighbours": 30}}``.
    image_key, spots_key, table_key, layer, coordinate_system, mpp
    device, batch_size, rng, progress

    Returns
    -------
    The model, with held-out scores in ``model.scores`` and ``model.held_out``. The losses of heads that are trained in
    epochs are in ``model.training``. It includes the spots that it learnt from. Nothing is written into ``sdata``.

    Raises
    ------
    KeyError
        Where a section lacks a named key or layer.
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
    sdatas = list(sdata) if isinstance(sdata, Sequence) else [sdata]
    if not sdatas:
        msg = "sdata is an empty list: pass at least one section."
        raise ValueError(msg)
    rng = seeded(options["rng"])
    encoder, tile_um = options["encoder"], options["tile_um"]
    genes, n_folds = options["genes"], options["n_folds"]
    run = pick(options, Running)
    torch_device = resolve_device(run["device"])
    sections = [read_section(each, **pick(options, Reading)) for each in sdatas]
    merge_um = options["merge_um"]
    if merge_um is None:  # bins of all sections get one size
        merge_um = max((merged_edge(s) for s in sections if s.contiguous), default=None)
    sections = [merge_bins(section, merge_um) for section in sections]
    head = default_head(dense=dense) if head is None else head
    learn: dict[str, Any] = {"head": head, "genes": genes, "n_folds": n_folds, "head_options": head_options}
    check_arguments(sections=sections, max_spots=options["max_spots"], **learn)
    n_measured = [len(section.xy_px) for section in sections]
    wanted = spots_to_draw(n_measured, max_spots=options["max_spots"])
    values, parts = [], []
    forecast = Forecast(sum(wanted))
    how: dict[str, Any] = {"tile_um": tile_um, "dense": dense}
    for i, (section, n) in enumerate(zip(sections, wanted, strict=True)):
        check_orientation(section)
        rows = drawn_rows(section, n, rng=rng)
        if rows is not None:
            sections[i] = section = section.take(rows)
        embedder = Embedder.open(section, encoder, **how, **run)
        encoder = embedder.encoder  # loaded once for all sections
        values.append(embedder.embed_spots(forecast=forecast))
        if dense and learns_sub_spots(head):
            parts.append(embedder.embed_parts())
    return fit_model(
        sections,
        values,
        config=embedder.config,
        sub_spots=parts or None,
        n_measured=sum(n_measured),
        rng=rng,
        device=torch_device,
        worker_device=embedder.wanted,
        **learn,
        progress=run["progress"],
    )
