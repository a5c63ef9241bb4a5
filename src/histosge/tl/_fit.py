"""Train a head on the measured spots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

import numpy as np  # noqa: F401  the types of shared arguments name it

from histosge._embedding import Embedder, Forecast, resolve_device
from histosge._heads import default_head, learns_sub_spots
from histosge._model import check_arguments, fit_model
from histosge._options import FitOptions, Running, expand, pick
from histosge._settings import seeded
from histosge.tl._sections import Sections, without_image

if TYPE_CHECKING:
    from collections.abc import Iterable

    from histosge._heads import Head
    from histosge._model import Model
    from histosge._readers import Source


@expand(FitOptions)
def fit(
    sdata: Source | Iterable[Source],
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
        Section with an H&E image and measured spots, or a list of sections; each a ``SpatialData`` or a path, as for
        :func:`histosge.io.read`. Sections are opened one at a time, and only the spots that are learnt from stay in
        memory. On a section that does not measure a gene, ``genes="union"`` fills it in from the other genes and the
        image, to learn the others from it; nothing is scored there.
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
    known = Sections(sdata, options)
    rng = seeded(options["rng"])
    encoder, tile_um = options["encoder"], options["tile_um"]
    genes, n_folds = options["genes"], options["n_folds"]
    run = pick(options, Running)
    torch_device = resolve_device(run["device"])
    known.survey()
    head = default_head(dense=dense) if head is None else head
    learn: dict[str, Any] = {"head": head, "genes": genes, "n_folds": n_folds, "head_options": head_options}
    common = check_arguments(sections=known.known, max_spots=options["max_spots"], **learn)
    sections, values, parts = [], [], []
    forecast = Forecast(min(known.n_measured, options["max_spots"]))
    how: dict[str, Any] = {"tile_um": tile_um, "dense": dense}
    for section, _ in known.drawn(common, rng=rng):
        embedder = Embedder.open(section, encoder, **how, **run)
        encoder = embedder.encoder  # loaded once for all sections
        values.append(embedder.embed_spots(forecast=forecast))
        if dense and learns_sub_spots(head):
            parts.append(embedder.embed_parts())
        sections.append(without_image(section))
    return fit_model(
        sections,
        values,
        config=embedder.config,
        sub_spots=parts or None,
        n_measured=known.n_measured,
        rng=rng,
        device=torch_device,
        worker_device=embedder.wanted,
        **learn,
        progress=run["progress"],
    )
