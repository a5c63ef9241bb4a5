"""Predict expression at targets."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import replace
from time import time
from typing import TYPE_CHECKING, Any, Unpack, cast

import numpy as np

from histosge import _keys
from histosge._embedding import Embedder, Forecast
from histosge._heads import AnyHead, default_head, head_digest, head_name, learns_sub_spots
from histosge._model import (
    Predictor,
    check_arguments,
    check_conservation,
    check_memory,
    drawn_rows,
    fit_model,
    load_fitted,
    open_store,
    save_fitted,
    spots_to_draw,
    write_parts,
)
from histosge._options import FitOptions, Reading, Running, expand, pick
from histosge._readers import are_many
from histosge._section import (
    commit,
    is_measured,
    lay_targets,
    merge_bins,
    open_table,
    read_image_only,
    read_section,
    read_targets,
    shapes_element,
    smaller_than_spot,
)
from histosge._settings import logger, seeded
from histosge.tl._params import check_call, provenance, recorded
from histosge.tl._predict_many import predict_many

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray
    from spatialdata import SpatialData
    from upath import UPath

    from histosge._heads import Head
    from histosge._model import Model
    from histosge._remote import Place
    from histosge._section import Section


@expand(FitOptions)
def predict(
    sdata: SpatialData | Iterable[SpatialData | str | Path | UPath] | Mapping[str, SpatialData | str | Path | UPath],
    *,
    head: str | type[Head] | Head | None = None,
    head_options: dict[str, Any] | None = None,
    model: Model | None = None,
    upsample: int | None = None,
    bin_um: float | None = None,
    target_key: str | None = None,
    dense: bool | None = None,
    tissue: str = "auto",
    on_invalid: str = "raise",
    conserve: bool = False,
    key_added: str = "histosge",
    store: str | Path | UPath | None = None,
    inplace: bool = True,
    **options: Unpack[FitOptions],
) -> AnnData | pd.DataFrame | None:
    """Predict expression between the spots, or at any targets, from the H&E image and the measured spots.

    Lays the targets, embeds them, trains the head and writes the table. Existing embeddings with the same settings
    (:func:`histosge.tl.embed`) are reused, and ``model=`` reuses a fitted model.

    Parameters
    ----------
    sdata
        Section with an H&E image and measured spots; with ``model=``, an image is enough. Or a list of sections, each
        a ``SpatialData`` or a path or URL (as for :func:`histosge.io.read`), which is opened when its turn comes. A
        section has the name of its path; ``{name: section}`` gives others.
    image_key, spots_key, table_key, layer, coordinate_system
    mpp
        µm per pixel of the image. ``None`` takes what the file states, else what follows from the pitch of the spots. A
        section without spots needs it.
    encoder
        Name of an encoder (see :func:`histosge.encoders`), names joined by ``+`` as in ``"uni+rgb"``, the paper's, or
        one that :func:`histosge.load_encoder` made. With ``model=``, that of the model.
    tile_um
    head
        ``"in-context"``, ``"aggregate"``, ``"kriging"``, ``"published"``, ``"ridge"``, ``"coordinates"``, ``"nearest"``
        or ``"mean"``, or several joined by ``+`` for their mean; see :func:`histosge.tl.fit`. ``None`` takes
        ``"in-context+kriging"``, or ``"aggregate+kriging"`` where ``dense``.
    genes
    n_folds, max_spots, merge_um
    head_options
        Arguments of the head; see :func:`histosge.tl.fit`.
    model
        A fitted model, of this or other sections; ``head``, ``genes``, ``n_folds``, ``max_spots`` and ``merge_um`` are
        then those of the model. Where no table of ``sdata`` annotates any shapes, it predicts from the image alone, without
        prediction intervals.
    upsample
        Targets per measured spot: 2, 4, 8 or 16. Without this, ``bin_um`` and ``target_key``, 4 as in the paper.
    bin_um
        Edge of square bins in µm, from 1 to the size of a measured spot.
    target_key
        Any shapes of ``sdata`` to predict at: other spots, cells, bins; circles or polygons.
    dense
        Whether to embed the area of a target, from the encoder's tokens (a few µm each), instead of the tile around its
        centre. This resolves targets smaller than a spot. Spots are embedded in the same way. ``None`` does so for bins
        and for shapes smaller than a spot.
    tissue
        ``"auto"`` or ``"spots"``; see :func:`histosge.pp.targets`.
    on_invalid
        What to do with shapes of ``target_key`` that are not valid polygons or lie outside the image: ``"raise"`` an
        error, or ``"skip"`` them with a warning.
    conserve
        Whether to write ``layers["conserved"]`` as well: bins scaled so that the mean of the bins under a spot is its
        measurement without counting noise. For ``bin_um`` and raw counts.
    key_added
        Name of the table written.
    store
        Folder to write to, ``"NAME.zarr"``, part by part: memory then does not grow with the number of targets. An
        interrupted run continues where it stopped if it is started again with the same arguments. ``None`` writes into
        ``sdata``. With a list, the folder of the stores, which it needs. A URL such as ``"s3://BUCKET/NAME.zarr"`` is
        written too: the store is made in a local folder (the environment variable ``HISTOSGE_STORES``, else in the
        system's cache folder), where an interrupted run continues, and is copied when it is complete.
    device, batch_size, rng, progress
    inplace
        Whether to write into ``sdata``, or to return the table and write nothing. Not for a list.

    Returns
    -------
    ``None``, with ``inplace=False`` the table, or for a list its summary (see *Notes*). Written into ``sdata``, or with
    ``store`` into a ``SpatialData`` of its own (:func:`spatialdata.read_zarr`); ``inplace=False`` then returns a lazy
    table, whose ``X`` and layers are read on demand:

    ``sdata.shapes["{key_added}_targets"]``
        Circles or squares, as from :func:`histosge.pp.targets`; not with ``target_key``.
    ``sdata.tables["{key_added}"]``
        Annotates these shapes by ``obs["region"]`` and ``obs["instance_id"]``. ``X`` (n, genes) float32: expected
        log1p expression at 10,000 counts (where the input is logarithms of only some genes, at their own scale: see
        ``uns["histosge"]["unit"]``). With ``conserve``, ``layers["conserved"]`` (n, genes) float32, and
        ``var["shrinkage"]``: the mean share of the difference between measurement and prediction of a spot that is not
        counting noise. ``obs``: ``array_row``, ``array_col`` (int64, where the targets form a grid), ``in_tissue``,
        ``is_spot`` (the target is a measured spot; its measurement is hidden from the context, but heads have learnt
        from it: this is no held-out prediction; false where bins are merged), ``in_spot`` (its centre lies inside a
        physical spot; bool), ``distance_to_spot_um`` (float32, to the centre of the nearest spot or merged bin).
        ``obsm["spatial"]`` (n, 2) float64, (x, y) in pixels of the image. Without spots, ``distance_to_spot_um`` is
        NaN, and targets cover the tissue of the whole image. ``var``: ``highly_variable`` (bool), ``held_out_pcc``, ``held_out_mse`` (float32, on held-out spots),
        ``predictable`` (bool, at a false discovery rate of 5 %); with a model of ``genes="union"`` also ``n_sections``
        (int64, how many sections measure the gene) and ``measured`` (bool, whether this section does; if not, there are
        no intervals). ``varm["histosge_intervals"]`` (genes, 105) float32:
        numbers from which :func:`histosge.tl.intervals` computes prediction intervals; ``uns["histosge"]["intervals"]``
        names the columns. It is absent without measured spots. ``uns["histosge"]``: encoder, head, scale, seed, split,
        versions, held-out scores of the head and the baselines, ``training``: the losses of heads that are trained in
        epochs, as in ``histosge.Model.training``, and ``params``: the arguments of the call, so that
        ``sge.tl.predict(sdata, **params)`` repeats it. It lacks arguments that are ``None``, ``store``, ``progress``
        and ``inplace``; objects (a model, an own encoder, a generator) are named in angle brackets and must be passed
        again.

    Raises
    ------
    KeyError
        Where ``sdata`` lacks a named key or layer.
    ValueError
        Where the section cannot be read, an argument is out of range, histosge did not write an existing ``key_added``,
        or the encoder has no tokens for ``dense``. ``sdata`` is then unchanged.
    TypeError
        Where ``head`` is no head or ``model`` no model; with ``store``, also where ``head`` is an object that cannot be
        pickled.
    MemoryError
        Where the table would not fit in memory; before the work starts.
    FileExistsError
        Where ``store`` exists already.
    RuntimeError
        Where the encoder's weights cannot be had, or memory runs out (``batch_size``).

    Notes
    -----
    Prediction intervals, at any level, are computed afterwards: :func:`histosge.tl.intervals`. With ``model=`` they are
    calibrated on the sections that it learnt from. Where nothing was measured there are none, since they would be too
    narrow.

    A list is predicted one section after the other, with the encoder loaded once, each to ``{store}/{name}.zarr``.
    Without ``model=``, each section is fitted on its own. The summary is a ``DataFrame`` with a row for each section:
    ``section``, ``store``, ``n_targets`` and ``n_genes`` (Int64), ``scores`` (``"held-out"``, or ``"image only"`` where
    nothing was measured), ``held_out_pcc`` (float64, mean over genes; of the sections of the model with ``model=``),
    ``seconds`` (float64), ``error`` and ``source`` (the path). The file ``{store}/summary.csv`` has the same columns,
    for all sections that were predicted into the folder. A section that fails does not stop the others, and raises
    nothing: its message is in ``error``, and logged. The same call again predicts what is missing. A finished store is
    left as it is. If it was made by another model, with other arguments or from another path, this is an error of its
    section; a section that was changed in its place is not noticed: remove its store.

    The kind of values in a table is detected and logged: counts, corrected counts, or their logarithms (of any base) or
    square roots, which are converted. Where ``var`` has feature types, only "Gene Expression" is used. ``sge.tl.fit``
    and ``sge.tl.evaluate`` read in the same way.

    The method is HisToSGE's (Shi et al., 2024, arXiv 2407.20518) with the measured neighbours as context;
    ``head="published"`` is the network of the paper, and ``head="kriging"`` a Gaussian process on the same inputs.

    Examples
    --------
    >>> import histosge as sge
    >>> sdata = sge.datasets.synthetic()
    >>> sge.tl.predict(sdata, encoder="stain-texture", head="ridge", genes=20)
    >>> sdata.tables["histosge"].n_vars
    20
    """
    arguments = dict(locals())
    params = recorded(arguments)
    check_call(arguments)
    if are_many(sdata):
        return predict_many(cast("Any", sdata), predict=_predict_section, params=params, arguments=arguments)
    return _predict_section(**arguments, params=params)


def _predict_section(
    sdata: SpatialData,
    *,
    head: AnyHead | None,
    head_options: dict[str, Any] | None,
    model: Model | None,
    upsample: int | None,
    bin_um: float | None,
    target_key: str | None,
    dense: bool | None,
    tissue: str,
    on_invalid: str,
    conserve: bool,
    key_added: str,
    store: Place | None,
    inplace: bool,
    options: FitOptions,
    params: dict[str, Any],
) -> AnnData | None:
    """Predict one section; ``params`` are the arguments as they are recorded."""
    start = time()
    reading = pick(options, Reading)
    encoder, tile_um = options["encoder"], options["tile_um"]
    genes, n_folds, rng = options["genes"], options["n_folds"], options["rng"]
    seed = int(rng) if isinstance(rng, (int, np.integer)) else "generator"
    generator = seeded(rng)
    if model is not None and reading["spots_key"] is None and reading["table_key"] is None and not is_measured(sdata):
        if reading["layer"] is not None:
            layer = reading["layer"]
            msg = f"layer={layer!r}, but no table of sdata annotates spots: nothing was measured. Leave layer= out."
            raise ValueError(msg)
        section = read_image_only(
            sdata,
            image_key=reading["image_key"],
            coordinate_system=reading["coordinate_system"],
            mpp=reading["mpp"],
            pitch_um=model.info["pitch_um"],
            spot_um=model.info["spot_um"],
        )
        _warn_of_image_only()
    else:
        section = read_section(sdata, **reading)
        if model is not None:
            _check_unit(model, section)
            logger.info(
                "prediction intervals are those of the model, calibrated on the %d spots that it learnt from",
                model.info["n_spots"],
            )
    if target_key is None:
        name = _keys.targets(key_added)
        targets = lay_targets(section, key=name, upsample=upsample, bin_um=bin_um, tissue=tissue)
    else:
        targets = read_targets(sdata, section, target_key, on_invalid=on_invalid)
    # a model reads bins of the size that it learnt from
    merge_um = options["merge_um"] if model is None else model.info.get("merged_um", section.spot_um)
    section = merge_bins(section, merge_um)
    if section.merged > 1:  # no target is a merged bin
        targets = replace(targets, spot_index=np.full(len(targets), -1))
    run = pick(options, Running)
    learn: dict[str, Any] = {}
    if model is not None:
        embedder = Embedder.of_model(section, model.config, encoder, **run)
        n_genes = len(model.genes)
    else:
        if dense is None:
            dense = bin_um is not None or smaller_than_spot(section, targets)
        head = default_head(dense=dense) if head is None else head
        learn = {"head": head, "genes": genes, "n_folds": n_folds, "head_options": head_options}
        learn["max_spots"] = options["max_spots"]
        names = check_arguments(sections=[section], **learn)
        embedder = Embedder.open(section, encoder, tile_um=tile_um, dense=dense, **run)
        n_genes = len(names) if isinstance(genes, str) else len(genes) if isinstance(genes, Collection) else int(genes)
    if conserve:
        check_conservation(section, targets)
    shapes = {targets.key: shapes_element(section, targets)} if targets.laid and store is None else {}
    if store is None:
        check_memory(len(targets), min(n_genes, len(section.genes)), n_layers=int(conserve))
        if inplace:
            commit(sdata, shapes=shapes, tables={key_added: None}, dry_run=True)  # raise before the work, not after it

    about: dict[str, Any] = {"params": params}
    settled = {"model": model.fingerprint()} if model is not None else {"seed": seed, **learn}
    parts = None
    if store is not None:
        if model is None:
            settled["head"] = head_digest(learn["head"])
            if settled["head"] != head_name(learn["head"]):  # an object, of which params has the name only
                about["head_digest"] = settled["head"]
        parts = open_store(store, embedder, targets, name=key_added, params=settled | {"conserve": conserve})
    with parts or nullcontext():  # at the end, also after an error, another process may continue the store
        forecast = Forecast(0 if parts is None else parts.n_rows_left, alternative=model is None)
        fitted = None if parts is None else load_fitted(parts)
        if fitted is not None:
            logger.info("using the model that was fitted before the interruption")
            at_targets, (at_spots, model) = None, fitted
        else:
            at_targets, at_spots = embedder.embed_both(None if parts is not None else targets, forecast=forecast)
            if model is None:
                model = _fit(embedder, at_spots, rng=generator, **learn)
            if parts is not None:
                at_spots, model = save_fitted(parts, at_spots, model)
        predictor = Predictor.of(
            model, embedder, targets, at_spots, conserve=conserve,
            provenance={**provenance(embedder, targets, model, seed=seed, layer=reading["layer"]), **about},
        )  # fmt: skip
        if parts is not None:
            own_shapes = None if targets.laid else sdata.shapes[targets.key].loc[targets.instances]
            path = write_parts(predictor, parts, forecast=forecast, own_shapes=own_shapes)
            logger.info("wrote %d targets to %s, table %r, %.0f s", len(targets), path, key_added, time() - start)
            return None if inplace else open_table(path, key_added)
    table = predictor.table(matrices=predictor.matrices(at_targets=at_targets))
    if not inplace:
        return table
    commit(sdata, shapes=shapes, tables={key_added: table})
    logger.info(
        "added %d targets x %d genes to sdata.tables[%r] (%d genes predictable), %.0f s",
        *table.shape, key_added, int(model.scores["predictable"].sum()), time() - start,
    )  # fmt: skip
    return None


def _warn_of_image_only() -> None:
    """Warn that scores and intervals of a model do not apply to a section without spots."""
    logger.warning(
        "predicting from the image alone: scores are those of the sections that the model learnt from. To score it on "
        "others: sge.tl.evaluate([...], split='sections')"
    )
    logger.warning(
        "no prediction intervals: nothing was measured on this section to calibrate them on, and those of the model "
        "are too narrow (on the section of another patient, intervals of 90 % held about 41 % of the measurements)"
    )


def _fit(
    embedder: Embedder,
    at_spots: NDArray[np.float32],
    *,
    head: AnyHead,
    max_spots: int,
    rng: np.random.Generator,
    **learn: Any,
) -> Model:
    """Fit the head on spots of the section, at most ``max_spots``, with their sub-spots where it learns from these."""
    n_measured = len(at_spots)
    rows = drawn_rows(embedder.section, *spots_to_draw([n_measured], max_spots=max_spots), rng=rng)
    if rows is not None:
        embedder, at_spots = replace(embedder, section=embedder.section.take(rows)), at_spots[rows]
    parts = [embedder.embed_parts()] if embedder.config.dense and learns_sub_spots(head) else None
    return fit_model(
        [embedder.section],
        [at_spots],
        config=embedder.config,
        head=head,
        sub_spots=parts,
        n_measured=n_measured,
        rng=rng,
        device=embedder.device,
        worker_device=embedder.wanted,
        progress=embedder.progress,
        **learn,
    )


def _check_unit(model: Model, section: Section) -> None:
    """Raise where the expression of the section is in another unit than that of the model."""
    mine = model.info["unit"]
    if mine != section.values.unit:
        msg = (
            f"the model predicts {mine}, but section {section.spots_key!r} holds {section.values.unit}: they cannot be "
            "read together. Name the layer that holds the counts, layer=."
        )
        raise ValueError(msg)
