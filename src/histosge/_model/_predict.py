"""A model asked at many places: all at once, or part by part into a store, in memory that does not grow with them."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import time
from typing import TYPE_CHECKING, Any

import numpy as np

from histosge._embedding import Forecast, block_edge_px, embed_targets, warn_below_token
from histosge._geometry import block_order, spot_by_bin
from histosge._image import thumbnail
from histosge._model._model import Model
from histosge._section import TableStore, own_spots, predicted_table, section_counts, shapes_element
from histosge._settings import available_memory, logger, progress_bar
from histosge._statistics import Conservation, noise_variance, shrinkage

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch
    from anndata import AnnData
    from geopandas import GeoDataFrame
    from numpy.typing import NDArray
    from scipy import sparse
    from spatialdata import SpatialData

    from histosge._embedding import Recipe
    from histosge._geometry import Places
    from histosge._model._context import Context
    from histosge._section import Section, Targets

PART_ROWS = 32_768
"""Places that are predicted and written at a time: half a gigabyte for 1000 genes with error bars."""
_SPARE = 1.5
"""Memory that predicting takes, in sizes of the table."""


@dataclass(frozen=True)
class Question:
    """Places of a section, and how they are embedded."""

    sdata: SpatialData
    section: Section
    targets: Targets
    places: Places | None
    """What was laid; ``None`` where the shapes are the user's own"""
    square: bool
    """Whether bins were laid"""
    encoder: Any
    recipe: Recipe
    device: torch.device
    batch_size: int
    progress: bool | None
    fitted: bool = False
    """Whether a model is given, which settles the encoder"""

    def forecast(self, n_places: int) -> Forecast:
        """Forecast of embedding some places."""
        return Forecast(n_places, alternative=not self.fitted)

    def embed(self, targets: Targets, *, forecast: Forecast | None, part: bool = False) -> NDArray[np.float32]:
        """Embed places of the section; those of a part with no more than the forecast."""
        return embed_targets(
            self.sdata,
            self.section,
            targets,
            self.encoder,
            self.recipe,
            device=self.device,
            batch_size=self.batch_size,
            progress=False if part else self.progress,
            report=not part,
            forecast=forecast,
        )


def check_conservation(question: Question, *, layer: str | None) -> tuple[Places, sparse.csr_matrix]:
    """Refuse what cannot be conserved, before the work; give the bins and the raw counts of the spots."""
    section, places = question.section, question.places
    if not section.measured:
        msg = "conserve=True needs measured spots, and nothing was measured on this section: leave conserve= out."
        raise ValueError(msg)
    counts = section_counts(question.sdata, section, layer=layer)
    if places is None or not question.square or places.size_px * section.mpp > section.spot_um / 2:
        why = f"lays bins of at most half a spot ({section.spot_um / 2:g} µm): pass bin_um="
    elif section.contiguous:
        why = "is for spots with gaps between them, not for measured bins"
    elif counts is None:
        why = "needs raw counts, whose noise is known: name them, layer="
    else:
        return places, counts
    msg = f"conserve=True {why}; or leave conserve= out."
    raise ValueError(msg)


def _conservation(
    question: Question, model: Model, context: Context, at_spots: NDArray[np.float32], *, layer: str | None
) -> Conservation:
    """Shrink what was measured on the spots towards what the model, having read it, says of them."""
    places, counts = check_conservation(question, layer=layer)
    section, xy_px = question.section, question.targets.xy_px
    n = len(section.xy_px)
    said = model.predict_from(context, places=at_spots, xy_um=section.xy_um, spot_index=np.full(n, -1))
    columns = section.genes.get_indexer(model.genes)
    noise = noise_variance(counts[:, columns], total=np.asarray(counts.sum(axis=1)).ravel())
    shrunken = shrinkage(section.dense(model.genes), said, noise=noise)
    row, col = places.array_row, places.array_col
    share = spot_by_bin(section.footprints, xy_px, bin_px=places.size_px, row=row, col=col)
    inner_um = section.spot_um / 2 + places.size_px * section.mpp / np.sqrt(2)
    return Conservation(
        share,
        xy_px * section.mpp,
        section.xy_um,
        (inner_um, max(inner_um, section.pitch_um / 2)),
        np.expm1(shrunken.mean).astype(np.float32),
        shrunken.weight.mean(0).astype(np.float32),
    )


def check_memory(n_places: int, n_genes: int, *, n_layers: int, available: int | None = None) -> None:
    """Refuse a table that would not fit into memory, before the work and not after it."""
    n_bytes = n_places * n_genes * 4 * (1 + n_layers)
    available = available_memory() if available is None else available
    if n_bytes * _SPARE > available:
        less = ", level=None (no error bars)" if n_layers >= 3 else ""
        msg = (
            f"the table of {n_places:,} places x {n_genes:,} genes takes {n_bytes / 2**30:.1f} GiB, and to predict it "
            f"{n_bytes * _SPARE / 2**30:.1f} GiB, but {available / 2**30:.1f} GiB of memory are free. Write it part by part "
            f"with store='NAME.zarr', or ask for less: fewer genes=, larger bins{less}."
        )
        raise MemoryError(msg)


@dataclass(frozen=True)
class _Oracle:
    """A fitted model with all it needs to be asked."""

    question: Question
    model: Model
    context: Context
    conservation: Conservation | None
    provenance: dict[str, Any]

    def table(
        self,
        rows: NDArray[np.int64],
        at_targets: NDArray[np.float32] | None = None,
        *,
        forecast: Forecast | None = None,
    ) -> AnnData:
        """Predict at some of the places, in the given order."""
        question = self.question
        everything = rows
        if self.conservation is not None:
            everything = np.concatenate([rows, self.conservation.partners(rows)])
        asked = question.targets.take(everything)
        at_targets = question.embed(asked, forecast=forecast, part=True) if at_targets is None else at_targets
        expression = self.model.predict_from(
            self.context,
            places=at_targets,
            xy_um=asked.xy_px * question.section.mpp,
            spot_index=asked.spot_index,
        )
        layers, var = {}, self.model.scores.copy()
        if self.conservation is not None:
            layers["conserved"] = self.conservation.apply(everything, expression)[: len(rows)]
            var["shrinkage"] = self.conservation.weight
        return predicted_table(
            question.section,
            question.targets.take(rows),
            expression=expression[: len(rows)],
            bars=self.model.bars,
            var=var,
            layers=layers,
            provenance=self.provenance,
        )


def predict_table(question: Question, answer: Answer) -> tuple[AnnData, Model]:
    """Predict at all places at once."""
    section, targets = question.section, question.targets
    own, n_spots = targets.spot_index >= 0, len(section.xy_px)
    same_way = not question.recipe.dense  # a spot's area is not that of the place upon it
    among = same_way and len(np.unique(targets.spot_index[own])) == n_spots  # every spot is among the targets
    forecast = question.forecast(len(targets) + n_spots * (same_way and not among))
    at_targets = question.embed(targets, forecast=forecast)
    if among:
        at_spots = np.empty((n_spots, at_targets.shape[1]), np.float32)
        at_spots[targets.spot_index[own]] = at_targets[own]
    else:
        at_spots = question.embed(own_spots(section), forecast=forecast if same_way else question.forecast(n_spots))
    model = answer.fit(at_spots)
    return answer.oracle(question, model, at_spots).table(np.arange(len(targets)), at_targets), model


@dataclass(frozen=True)
class Answer:
    """How the model comes about, and what is made of its predictions."""

    fit: Callable[[NDArray[np.float32]], Model]
    """From embeddings of the spots, (n, d), to the model; called once"""
    provenance: Callable[[Model], dict[str, Any]]
    """What goes into ``uns``"""
    conserve: bool
    layer: str | None

    def oracle(self, question: Question, model: Model, at_spots: NDArray[np.float32]) -> _Oracle:
        """Make ready what every part needs."""
        context = model.context(question.section, at_spots, device=question.device)
        conservation = None
        if self.conserve:
            conservation = _conservation(question, model, context, at_spots, layer=self.layer)
        return _Oracle(question, model, context, conservation, self.provenance(model))


def predict_to_store(
    question: Question, answer: Answer, path: str | Path, *, name: str, arguments: dict[str, Any]
) -> Path:
    """Predict part by part and write each; a run that was interrupted goes on where it stopped.

    Parameters
    ----------
    question
        Where to predict.
    answer
        What to predict with.
    path
        The store: a ``SpatialData`` that holds the places and their table.
    name
        Of the table.
    arguments
        What else the result depends on; a run with others does not go on with this one's parts.

    Returns
    -------
    Path of the finished store.
    """
    section, targets, places = question.section, question.targets, question.places
    edge_px = block_edge_px(question.encoder, mpp=section.mpp, tile_um=question.recipe.tile_um)
    order = block_order(targets.xy_px, block_px=edge_px, origin_px=(0.0, 0.0))  # the blocks that are read
    warn_below_token(section, targets, question.recipe)
    recipe = {"table": name, **question.recipe.to_dict(), "data": _fingerprint(section, targets), **arguments}
    store = TableStore.open(path, recipe=recipe, n_rows=len(targets), part_rows=PART_ROWS)
    finished = set(store.done)
    n_left = sum(len(order[store.rows(part)]) for part in range(store.n_parts) if part not in finished)
    forecast = question.forecast(n_left)
    at_spots, model = _fitted(store, question, answer.fit, forecast)
    oracle = answer.oracle(question, model, at_spots)
    own_shapes = question.sdata.shapes[targets.key].loc[targets.instances] if places is None else None
    start = time()
    with progress_bar(desc="predicting", total=len(targets), unit="place", show=question.progress) as bar:

        def put(part: int, table: AnnData, shapes: GeoDataFrame | None) -> None:
            store.write(part, table, shapes=shapes)
            bar.update(table.n_obs)

        bar.update(sum(len(order[store.rows(part)]) for part in store.done))
        # a part is written while the next is predicted; no more wait, since each is half a gigabyte
        with ThreadPoolExecutor(1) as writer:
            written: Future[None] | None = None
            for part in range(store.n_parts):
                if part in finished:
                    continue
                rows = order[store.rows(part)]
                table = oracle.table(rows, forecast=forecast)
                shapes = None
                if places is not None:
                    some, instances = places.keep(rows), targets.instances[rows]
                    shapes = shapes_element(question.sdata, section, some, square=question.square, instances=instances)
                if written is None:
                    store.begin(table, name=name, shapes=shapes, shapes_key=targets.key, shapes_whole=own_shapes)
                else:
                    written.result()
                written = writer.submit(put, part, table, shapes)
                del table, shapes  # the writer's alone: it goes when it is written
            if written is not None:
                written.result()
    logger.info("    predicted %d of %d parts (%.0f s)", store.n_parts - len(finished), store.n_parts, time() - start)
    return store.finish()


def _fitted(
    store: TableStore, question: Question, fit: Callable[[NDArray[np.float32]], Model], forecast: Forecast
) -> tuple[NDArray[np.float32], Model]:
    """Embeddings of the spots and the model, of this run or of the one that it goes on with."""
    spots, folder = store.folder / "spots.npy", store.folder / "model"
    if (folder / "whole").exists():
        logger.info("using the model that was fitted before the interruption")
        return np.load(spots), Model.load(folder)
    at = own_spots(question.section)
    if question.recipe.dense:  # spots and places do not cost the same
        forecast = question.forecast(len(at))
    else:
        forecast.n_places += len(at)
    at_spots = question.embed(at, forecast=forecast)
    model = fit(at_spots)
    np.save(spots, at_spots)
    model.save(folder, overwrite=True)
    (folder / "whole").touch()
    # what is read back decides: a run that was interrupted and one that was not see the same digits
    return np.load(spots), Model.load(folder)


def _fingerprint(section: Section, targets: Targets) -> str:
    """Digest of what is read from the user's data: counts, places and a small copy of the image."""
    digest = hashlib.sha256()
    matrix = section.expression
    small, _ = thumbnail(section.image, max_px=256)
    areas, scale = targets.footprints, np.array([section.mpp, section.pitch_um, section.spot_um])
    spots = (matrix.data, matrix.indices, matrix.indptr, section.xy_px, scale)
    for array in (*spots, targets.xy_px, areas.size_px, areas.bounds(), small):
        digest.update(np.ascontiguousarray(array).tobytes())
    for names in (section.genes, section.instances, targets.instances):
        digest.update(json.dumps([str(n) for n in names]).encode())
    return digest.hexdigest()[:16]
