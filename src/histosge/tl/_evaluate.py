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
from histosge._options import FitOptions, Running, expand, pick
from histosge._settings import is_whole, logger, seeded
from histosge.tl._sections import Sections

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from histosge._readers import Source

_BASELINES = ("kriging", "ridge", "nearest", "mean")
_MOST_TRIALS = 1000


@expand(FitOptions)
def evaluate(
    sdata: Source | Iterable[Source],
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
    """Score heads on held-out spots.

    In every split each head is fitted from scratch, as :func:`histosge.tl.predict` fits it, on the training spots
    alone: genes, scalings, components, early stopping and prediction intervals do not depend on the spots that are
    scored. All heads of a split get the same spots, genes and folds.

    Parameters
    ----------
    sdata
        Section with an H&E image and measured spots, or a list of sections; each a ``SpatialData`` or a path, as for
        :func:`histosge.io.read`.
    heads
        Names as in :func:`histosge.tl.fit`. ``None`` takes the default head (for pseudo-spots and ``dense`` the default
        for bins) and the baselines kriging, ridge, nearest and mean.
    split
        ``"blocks"``: contiguous blocks are held out, each spot once, and training spots within ``buffer_um`` of them
        are left out, as in tissue that was not measured. ``"random"``: random halves. ``"lattice"``: heads learn from a
        regular 1 in ``keep`` spots, and the others are scored, as between spots. ``"sections"``: one section of the
        list is held out; nothing is measured on it. ``"pseudo-spots"``: spots and their rings are merged into big
        spots, and the spots are predicted from these, a test of super-resolution with a measured truth. Counts are
        split in two, half for the big spots, half for the truth.
    n_splits
        Number of blockwise folds, random halves, lattice phases (at most ``keep``) or mergers.
    n_repeats
        Number of repeats, each with new splits.
    buffer_um
        Width of the buffer around blocks in µm. ``None`` takes 2.5 pitches, the reach of the default head's context.
    block_um
        Edge of the blocks in µm. ``None`` takes four buffers, less on small sections.
    keep
        For ``"lattice"``: 3, 4 or 7 on hexagonal arrays, 2, 4 or 5 on square ones.
    protocol
        ``"held-out"``, or ``"published"``: all spots are scored, including those trained on, as in the paper. These
        scores measure memory: compare them with those of the paper only, not with held-out scores.
    labels
        Column of the measured table's ``obs`` that annotates domains; missing values are left out. Domains of
        predicted and of measured expression, found by :func:`histosge.tl.domains` with its defaults, are compared with
        it; heads do not learn from it. With ``split="blocks"`` only.
    encoder, tile_um
    dense
        Whether to embed the area of a spot, from the encoder's tokens, instead of the tile around its centre, as for
        bins and cells.
    genes, n_folds, merge_um
    max_spots
        Most spots (bins) that are learnt from and scored, of all sections together. Of more, blocks are drawn evenly
        over sections and tissue, and the others are left out.
    head_options
        Arguments of heads by name, for example ``{"nearest": {"n_neighbours": 6}}``.
    image_key, spots_key, table_key, layer, coordinate_system, mpp
    device, batch_size, rng, progress

    Returns
    -------
    Tidy DataFrame with one row for each gene, head and split; nothing is written into ``sdata``. Columns: ``section``,
    ``split``, ``protocol``, ``repeat``, ``fold``, ``head``, ``gene``, ``n_train``, ``n_test`` (numbers of spots).
    Scores of the gene over the scored spots: ``pcc`` (Pearson) and ``spearman``, 0 for a constant prediction, ``mse``,
    ``mae``, ``mse_mean`` (of the mean of the training spots), ``skill`` (``1 - mse / mse_mean``), ``morans_i`` and
    ``morans_i_measured`` (where that of the prediction is larger, it is too smooth, or the measurement is noisy),
    ``gene_agreement`` (how well correlations with other genes are preserved), ``ssim`` (structural similarity on the
    lattice), ``ceiling`` (the correlation that a perfect model reaches in spite of counting noise; NaN without raw
    counts); ``coverage`` and mean ``width`` of the prediction intervals at level 0.9, and ``coverage_2``,
    ``coverage_4``, ``coverage_8`` after averaging over as many neighbours. With ``labels``, with one value for all
    genes of a head: ``ari``, ``nmi`` and ``ari_measured``, ``nmi_measured``. All scores are float.

    Raises
    ------
    ValueError
        Where the section cannot be read, or a head, split or protocol is unknown or impossible on it.
    KeyError
        Where a section lacks a named key or layer, or ``labels`` is no column of the measured table.
    RuntimeError
        Where the encoder's weights cannot be had, or memory runs out (``batch_size``).

    Notes
    -----
    Blocks with a buffer follow Roberts et al. (2017), conformal prediction intervals Barber et al. (2021), and the
    comparison with ridge regression the protocol of HEST-Bench (Jaume et al., 2024).

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
    known = Sections(sdata, options, labels=labels)
    heads = _check(
        len(known.sources),
        heads,
        split,
        protocol=protocol,
        labels=labels,
        dense=dense,
        n_splits=n_splits,
        n_repeats=n_repeats,
        head_options=head_options,
    )
    rng = seeded(options["rng"])
    encoder, tile_um = options["encoder"], options["tile_um"]
    genes, n_folds = options["genes"], options["n_folds"]
    run = pick(options, Running)
    torch_device = resolve_device(run["device"])
    known.survey()
    for head in heads:
        common = check_arguments(
            head=head, genes=genes, n_folds=n_folds, sections=known.known, max_spots=options["max_spots"],
            head_options=(head_options or {}).get(head),
        )  # fmt: skip
    drawn = list(known.drawn(common, rng=rng))
    sections = [section for section, _ in drawn]
    measured = [
        Measured(name, section, np.empty((len(section.xy_px), 0), np.float32), of_spots)
        for (section, of_spots), name in zip(drawn, known.names([s.spots_key for s in sections]), strict=True)
    ]
    empty = [m.name for m in measured if m.labels is not None and pd.isna(m.labels).all()]
    if empty:
        msg = f"labels={labels!r} has no value at any spot of {empty}. Name a column that annotates them."
        raise ValueError(msg)
    plan = Plan(split, protocol, n_splits, n_repeats, buffer_um, block_um, keep)
    for _ in trials(measured, plan, rng=copy.deepcopy(rng)):
        pass  # raise before the sections are embedded where a split is impossible
    forecast = Forecast(sum(len(section.xy_px) for section in sections))
    how: dict[str, Any] = {"tile_um": tile_um, "dense": dense}
    for i, section in enumerate(sections):
        embedder = Embedder.open(section, encoder, **how, **run)
        encoder = embedder.encoder  # loaded once for all sections
        values = embedder.embed_spots(forecast=forecast)
        parts = embedder.embed_parts() if dense and any(learns_sub_spots(head) for head in heads) else None
        measured[i] = replace(measured[i], embedding=values, parts=parts)
    if protocol == "published":
        logger.warning(
            "protocol='published' also scores the spots that heads were trained on: it measures memory. "
            "Compare it with the figures of the paper only."
        )
    scores = hold_out(
        measured,
        plan,
        heads=heads,
        config=embedder.config,
        genes=genes,
        n_folds=n_folds,
        rng=rng,
        device=torch_device,
        worker_device=embedder.wanted,
        head_options=head_options,
        progress=run["progress"],
    )
    mean = scores.groupby("head", sort=False)["pcc"].mean()
    logger.info(
        "%s PCC (split %s), mean over genes: %s", protocol, split, ", ".join(f"{h} {v:.3f}" for h, v in mean.items())
    )
    return scores


def _check(
    n_sections: int,
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
    """Check the arguments before anything is read; return the heads."""
    for name, value, choices in (("split", split, SPLITS), ("protocol", protocol, PROTOCOLS)):
        if value not in choices:
            msg = f"{name}={value!r} is unknown. Choose one of {choices}."
            raise ValueError(msg)
    for name, number, least in (("n_splits", n_splits, 2 if split == "blocks" else 1), ("n_repeats", n_repeats, 1)):
        if not (is_whole(number) and least <= number <= _MOST_TRIALS):
            msg = f"{name}={number!r}: pass a whole number of at least {least} and at most {_MOST_TRIALS}."
            raise ValueError(msg)
    if split == "sections" and n_sections < 2:
        msg = "split='sections' leaves one section out, and there is only one: pass a list of sections."
        raise ValueError(msg)
    if protocol == "published" and split not in ("random", "blocks", "lattice"):
        msg = f"protocol='published' scores training spots, which split={split!r} does not have. Choose split='random'."
        raise ValueError(msg)
    if labels is not None and (split != "blocks" or protocol != "held-out"):
        msg = (
            f"labels={labels!r} need held-out predictions of all spots, one each: "
            "choose split='blocks' and protocol='held-out'."
        )
        raise ValueError(msg)
    if heads is None:
        ours = default_head(dense=dense or split == "pseudo-spots")  # big spots have sub-spots
        heads = [h for h in (ours, *_BASELINES) if not (split == "sections" and h in POSITION_ONLY)]
    heads = [heads] if isinstance(heads, str) else list(heads)
    blind = [h for h in heads if split == "sections" and set(h.split("+")) & set(POSITION_ONLY)]
    if blind:
        msg = (
            f"heads {blind} know positions only, and with split='sections' nothing is measured on the predicted "
            "section. Leave them out."
        )
        raise ValueError(msg)
    if not heads or len(set(heads)) < len(heads):
        msg = f"heads={heads!r}: name at least one head, each once."
        raise ValueError(msg)
    unknown = [name for name in head_options or {} if name not in heads]
    if unknown:
        msg = f"head_options name {unknown}, which are not among the heads {heads}. Use the names in heads=."
        raise ValueError(msg)
    return heads
