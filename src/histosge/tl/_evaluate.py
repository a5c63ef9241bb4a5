"""Hold out, fit, predict, score: compare heads."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import pandas as pd

from histosge._embedding import Embedder, Forecast, resolve_device
from histosge._heads import POSITION_ONLY, default_head, learns_sub_spots
from histosge._model import PROTOCOLS, SPLITS, Measured, Plan, check_arguments, trials
from histosge._model import evaluate as hold_out
from histosge._options import FitOptions, Reading, Running, expand, pick
from histosge._section import check_orientation, column, read_section
from histosge._settings import logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spatialdata import SpatialData

_BASELINES = ("kriging", "ridge", "nearest", "mean")


@expand(FitOptions)
def evaluate(
    sdata: SpatialData | Sequence[SpatialData],
    *,
    heads: Sequence[str] | None = None,
    split: str = "blocks",
    n_splits: int = 5,
    n_repeats: int = 1,
    buffer_um: float | None = None,
    block_um: float | None = None,
    keep: int = 4,
    protocol: str = "held-out",
    labels: str | None = None,
    dense: bool = False,
    head_options: dict[str, dict[str, Any]] | None = None,
    **options: Unpack[FitOptions],
) -> pd.DataFrame:
    """Score heads on spots that they never saw.

    In every split each head is fitted from scratch as :func:`histosge.tl.predict` would fit it, on the training spots
    alone: genes, scalings, components, early stopping and prediction intervals know nothing of the spots that are scored. All
    heads of a split get the same spots, genes and folds.

    Parameters
    ----------
    sdata
        Section with an H&E image and measured spots, or a list of sections.
    heads
        Names as of :func:`histosge.tl.fit`. ``None`` takes the default head (for pseudo-spots and ``dense`` that of bins)
        and the baselines kriging, ridge, nearest and mean.
    split
        ``"blocks"``: contiguous blocks are held out, each spot once, and training spots within ``buffer_um`` of them
        left out, as in tissue that was not measured. ``"random"``: random halves. ``"lattice"``: a regular 1 in
        ``keep`` spots is learnt from and the others scored, as between spots. ``"sections"``: one section of the list
        is left out; nothing is measured on it. ``"pseudo-spots"``: spots and their rings are merged into big ones, and
        the spots predicted from these, a test of super-resolution with a measured truth; counts are split in two, half
        for the big spots, half for the truth.
    n_splits
        Number of blockwise folds, random halves, lattice phases (at most ``keep``) or mergers.
    n_repeats
        How often everything is repeated, each time with new splits.
    buffer_um
        Width of the buffer around blocks in µm. ``None`` takes 2.5 pitches, the reach of the default head's context.
    block_um
        Edge of the blocks in µm. ``None`` takes four buffers, less on small sections.
    keep
        For ``"lattice"``: 3, 4 or 7 on hexagonal arrays, 2, 4 or 5 on square ones.
    protocol
        ``"held-out"``, or ``"published"``: all spots are scored, including those trained on, as in the paper. Such
        scores measure memory; compare them with the paper's only, never with held-out ones.
    labels
        Column of the measured table's ``obs`` that annotates domains; missing values are left out. Domains of
        predicted and of measured expression, found as by :func:`histosge.tl.domains` with its defaults, are compared with
        it; nothing learns from it. With ``split="blocks"`` only.
    encoder, tile_um
    dense
        Embed the area of a spot, from the encoder's tokens, instead of the tile around its centre, as for bins and cells.
    genes, n_folds
    head_options
        Arguments of heads by name, for example ``{"nearest": {"n_neighbours": 6}}``.
    image_key, spots_key, table_key, layer, coordinate_system, mpp
    device, batch_size, rng, progress

    Returns
    -------
    Tidy DataFrame, one row a gene, head and split; nothing is written into ``sdata``. Columns: ``section``, ``split``,
    ``protocol``, ``repeat``, ``fold``, ``head``, ``gene``, ``n_train``, ``n_test`` (spots); of the gene over the spots
    scored: ``pcc`` (Pearson) and ``spearman``, 0 for a constant prediction, ``mse``, ``mae``, ``mse_mean`` (of the
    training spots' mean), ``skill`` (``1 - mse / mse_mean``), ``morans_i`` and ``morans_i_measured`` (a larger one of
    the prediction means over-smoothing, or noise in the measurement), ``gene_agreement`` (how well correlations with
    other genes are kept), ``ssim`` (structural similarity on the lattice), ``ceiling`` (the correlation that counting
    noise lets a perfect model reach; NaN without raw counts); ``coverage`` and mean ``width`` of the prediction intervals
    at level 0.9, and ``coverage_2``, ``coverage_4``, ``coverage_8`` after averaging over as many neighbours; with
    ``labels``, the same for all genes of a head: ``ari``, ``nmi`` and ``ari_measured``, ``nmi_measured``. All scores are
    float.

    Raises
    ------
    ValueError
        Where the section cannot be read, or a head, split or protocol is unknown or impossible on it.
    KeyError
        Where a key or layer that is named is not in a section, or ``labels`` is no column of the measured table.
    RuntimeError
        Where the encoder's weights cannot be had, or memory runs out (``batch_size``).

    Notes
    -----
    Blocks with a buffer follow Roberts et al. (2017), conformal prediction intervals Barber et al. (2021), the comparison with
    ridge regression the protocol of HEST-Bench (Jaume et al., 2024).

    Examples
    --------
    >>> import histosge as sge
    >>> sdata = sge.datasets.synthetic()
    >>> scores = sge.tl.evaluate(
    ...     sdata, encoder="stain-texture", heads=["ridge", "mean"], genes=20, n_splits=2, n_folds=2
    ... )
    >>> scores.groupby("head")["pcc"].mean().idxmax()
    'ridge'
    """
    several = [sdata] if not isinstance(sdata, (list, tuple)) else list(sdata)
    heads = _check(
        several,
        heads,
        split,
        protocol=protocol,
        labels=labels,
        dense=dense,
        n_splits=n_splits,
        n_repeats=n_repeats,
        head_options=head_options,
    )
    encoder, tile_um = options["encoder"], options["tile_um"]
    genes, n_folds = options["genes"], options["n_folds"]
    run = pick(options, Running)
    where = resolve_device(run["device"])
    sections = [read_section(one, **pick(options, Reading)) for one in several]
    for head in heads:
        of_head = (head_options or {}).get(head)
        check_arguments(head=head, genes=genes, n_folds=n_folds, sections=sections, head_options=of_head)
    names = [section.spots_key for section in sections]
    if len(set(names)) < len(names):
        names = [f"{i}: {name}" for i, name in enumerate(names)]
    measured = [
        Measured(
            name,
            section,
            np.empty((len(section.xy_px), 0), np.float32),
            None if labels is None else column(one, section, labels),
        )
        for one, section, name in zip(several, sections, names, strict=True)
    ]
    empty = [m.name for m in measured if m.labels is not None and pd.isna(m.labels).all()]
    if empty:
        msg = f"labels={labels!r} holds no value at any spot of {empty}. Name a column that annotates them."
        raise ValueError(msg)
    plan = Plan(split, protocol, n_splits, n_repeats, buffer_um, block_um, keep)
    rng = np.random.default_rng(options["rng"])
    for _ in trials(measured, plan, rng=copy.deepcopy(rng)):
        pass  # what cannot be held out is refused before an hour of embedding
    forecast = Forecast(sum(len(section.xy_px) for section in sections))
    how: dict[str, Any] = {"tile_um": tile_um, "dense": dense}
    for i, section in enumerate(sections):
        check_orientation(section)
        embedder = Embedder.open(section, encoder, **how, **run)
        encoder = embedder.encoder  # loaded once for all sections
        values = embedder.embed_spots(forecast=forecast)
        parts = embedder.embed_parts() if dense and any(learns_sub_spots(head) for head in heads) else None
        measured[i] = replace(measured[i], embedding=values, parts=parts)
    if protocol == "published":
        logger.warning(
            "protocol='published' scores the spots that heads were trained on as well: it measures memory. "
            "Compare it with the paper's figures only."
        )
    scores = hold_out(
        measured,
        plan,
        heads=heads,
        config=embedder.config,
        genes=genes,
        n_folds=n_folds,
        rng=rng,
        device=where,
        head_options=head_options,
        progress=run["progress"],
    )
    mean = scores.groupby("head", sort=False)["pcc"].mean()
    logger.info(
        "%s PCC (split %s), mean over genes: %s", protocol, split, ", ".join(f"{h} {v:.3f}" for h, v in mean.items())
    )
    return scores


def _check(
    several: list[SpatialData],
    heads: Sequence[str] | None,
    split: str,
    *,
    protocol: str,
    labels: str | None,
    dense: bool,
    n_splits: int,
    n_repeats: int,
    head_options: dict[str, dict[str, Any]] | None,
) -> list[str]:
    """Say what is wrong before anything is read; give the heads."""
    if not several:
        msg = "sdata is an empty list: pass at least one section."
        raise ValueError(msg)
    for name, value, choices in (("split", split, SPLITS), ("protocol", protocol, PROTOCOLS)):
        if value not in choices:
            msg = f"{name}={value!r} is unknown. Choose one of {choices}."
            raise ValueError(msg)
    for name, number, least in (("n_splits", n_splits, 2 if split == "blocks" else 1), ("n_repeats", n_repeats, 1)):
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            msg = f"{name}={number!r}: pass a whole number of at least {least}."
            raise ValueError(msg)
    if split == "sections" and len(several) < 2:
        msg = "split='sections' leaves one section out, and there is only one: pass a list of sections."
        raise ValueError(msg)
    if protocol == "published" and split not in ("random", "blocks", "lattice"):
        msg = f"protocol='published' scores the spots trained on, which split={split!r} has not. Choose split='random'."
        raise ValueError(msg)
    if labels is not None and (split != "blocks" or protocol != "held-out"):
        msg = (
            f"labels={labels!r} need every spot predicted once without having been seen: "
            "choose split='blocks' and protocol='held-out'."
        )
        raise ValueError(msg)
    if heads is None:
        ours = default_head(dense=dense or split == "pseudo-spots")  # big spots have parts
        heads = [h for h in (ours, *_BASELINES) if not (split == "sections" and h in POSITION_ONLY)]
    heads = [heads] if isinstance(heads, str) else list(heads)
    blind = [h for h in heads if split == "sections" and set(h.split("+")) & set(POSITION_ONLY)]
    if blind:
        msg = f"heads {blind} know positions only, and split='sections' measures nothing where they are asked. Leave them out."
        raise ValueError(msg)
    if not heads or len(set(heads)) < len(heads):
        msg = f"heads={heads!r}: name at least one head, each once."
        raise ValueError(msg)
    unknown = [name for name in head_options or {} if name not in heads]
    if unknown:
        msg = f"head_options name {unknown}, which are not among the heads {heads}. Use the names in heads=."
        raise ValueError(msg)
    return heads
