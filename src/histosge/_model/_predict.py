"""Predict at many targets: all at once, or part by part into a store, with memory that does not grow."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from time import time
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from histosge._cluster import active_client, on_workers
from histosge._embedding import EmbedderPlan
from histosge._geometry import block_order
from histosge._image import thumbnail
from histosge._model._conservation import conservation_of
from histosge._model._files import MODEL_FILE, ModelError, read_file, write_file
from histosge._model._model import Model
from histosge._section import PartWriter, TableStore, predicted_table, shapes_element
from histosge._settings import available_memory, logger, progress_bar, settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from anndata import AnnData
    from distributed import Client
    from geopandas import GeoDataFrame
    from numpy.typing import NDArray

    from histosge._embedding import Embedder, Forecast
    from histosge._geometry import Targets
    from histosge._model._context import Context
    from histosge._remote import Place, Remote
    from histosge._section import Section
    from histosge._statistics import Conservation

_SPARE = 1.5
"""Peak memory of a prediction, as a multiple of the size of the table."""
_SPOTS_FILE = "spots.safetensors"
"""Embeddings of the spots, in the folder of a store"""


@dataclass(frozen=True)
class Predictor:
    """A fitted model with all that it needs to predict at the targets of one section."""

    model: Model
    embedder: Embedder
    targets: Targets
    at_spots: NDArray[np.float32]
    """(n, d) embeddings of the section's spots"""
    provenance: dict[str, Any]
    """What goes into ``uns``"""
    conservation: Conservation | None = None

    @classmethod
    def of(
        cls,
        model: Model,
        embedder: Embedder,
        targets: Targets,
        at_spots: NDArray[np.float32],
        *,
        provenance: dict[str, Any],
        conserve: bool = False,
    ) -> Self:
        """Compute what all parts share; ``at_spots`` are the embeddings (n, d) of the section's spots."""
        predictor = cls(model, embedder, targets, at_spots, provenance)
        if not conserve:
            return predictor
        conservation = conservation_of(model, embedder, targets, predictor.context, at_spots)
        return replace(predictor, conservation=conservation)

    @cached_property
    def context(self) -> Context:
        """Measured spots that the model predicts from."""
        return self.model.context(self.embedder.section, self.at_spots, device=self.embedder.device)

    @property
    def names(self) -> list[str]:
        """Names of the matrices that :meth:`matrices` gives."""
        return ["X"] if self.conservation is None else ["X", "conserved"]

    def matrices(
        self,
        rows: NDArray[np.int64] | None = None,
        *,
        at_targets: NDArray[np.float32] | None = None,
        forecast: Forecast | None = None,
    ) -> dict[str, NDArray[np.float32]]:
        """Predict ``X`` and layers (m, genes) at some of the targets, by default all, in the given order.

        Parameters
        ----------
        rows
            Which targets.
        at_targets
            Their embeddings (m, d). By default they are computed.
        forecast
            Forecast of the run that these targets are a part of.
        """
        rows = np.arange(len(self.targets)) if rows is None else rows
        # the bins of a spot are scaled together
        together = rows if self.conservation is None else np.append(rows, self.conservation.partners(rows))
        targets = self.targets.take(together)
        if at_targets is None:
            at_targets = self.embedder.embed(targets, forecast=forecast, quiet=True)
        elif len(together) > len(rows):
            msg = "at_targets= holds no embeddings of the other bins under the same spots: leave it out."
            raise ValueError(msg)
        expression = self.model.predict_from(
            self.context,
            embedding=at_targets,
            xy_um=targets.xy_px * self.embedder.section.mpp,
            spot_index=targets.spot_index,
        )
        found = {"X": expression[: len(rows)]}
        if self.conservation is not None:
            found["conserved"] = self.conservation.apply(together, expression)[: len(rows)]
        return found

    def table(
        self, rows: NDArray[np.int64] | None = None, *, matrices: dict[str, NDArray[np.float32]] | None = None
    ) -> AnnData:
        """Make the table of the predictions at some of the targets, by default all, in the given order."""
        section, intervals = self.embedder.section, self.model.intervals
        var = self.model.scores.copy()
        if self.model.of_some_sections and section.measured:
            var["measured"] = var.index.isin(section.genes)
            intervals = intervals.where(var["measured"].to_numpy())
        if self.conservation is not None:
            var["shrinkage"] = self.conservation.weight
        targets = self.targets if rows is None else self.targets.take(rows)
        return predicted_table(
            section,
            targets,
            matrices=matrices or {},
            # where nothing was measured, intervals of other sections are too narrow
            intervals=intervals if section.measured else None,
            var=var,
            provenance=self.provenance,
        )


def check_memory(n_targets: int, n_genes: int, *, n_layers: int, available: int | None = None) -> None:
    """Raise, before the work starts, where the table would not fit into memory."""
    n_bytes = n_targets * n_genes * 4 * (1 + n_layers)
    available = available_memory() if available is None else available
    if n_bytes * _SPARE > available:
        msg = (
            f"the table of {n_targets:,} targets x {n_genes:,} genes takes {n_bytes / 2**30:.1f} GiB, and to predict "
            f"it {n_bytes * _SPARE / 2**30:.1f} GiB, but {available / 2**30:.1f} GiB of memory are free. Write it part "
            "by part with store='NAME.zarr', or predict less: fewer genes=, larger bins."
        )
        raise MemoryError(msg)


# ------------------------------------------------------------------------------------------------------ part by part


def order_of_parts(embedder: Embedder, targets: Targets) -> NDArray[np.int64]:
    """Rows of the targets in the order in which their blocks are read. A part is a run of these rows."""
    return block_order(targets.xy_px, block_px=embedder.block_edge_px, origin_px=(0.0, 0.0))


def open_store(path: Place, embedder: Embedder, targets: Targets, *, name: str, params: dict[str, Any]) -> TableStore:
    """Begin a store, or continue one that was interrupted.

    Parameters
    ----------
    path
        The store, or its URL: a ``SpatialData`` that holds the targets and their table.
    embedder
        How targets are embedded.
    targets
        Where to predict.
    name
        Name of the table.
    params
        What else the result depends on. A run with other params does not continue this one.
    """
    embedder.warn_below_token(targets)  # here once, since parts do not log
    data = _fingerprint(embedder.section, targets)
    config = embedder.config.to_dict()
    encoders = config.pop("encoders")
    config["encoder"] = {one["spec"]["name"]: one for one in encoders}  # an error then names what differs
    params = {**config, "joined": embedder.config.name, "data": data, **params}
    return TableStore.open(path, name=name, params=params, n_rows=len(targets), part_rows=settings.part_rows)


def load_fitted(store: TableStore) -> tuple[NDArray[np.float32], Model] | None:
    """Load the embeddings of the spots and the model of an interrupted run; ``None`` if it has none yet."""
    folder = store.folder / "model"
    if not (folder / MODEL_FILE).exists():
        return None
    try:
        _, tensors = read_file(store.folder / _SPOTS_FILE)
        return tensors["embedding"].numpy(), Model.load(folder)
    except ModelError as error:
        msg = f"{error} To do so, remove {str(store.folder.parent)!r} and start again."
        raise ModelError(msg) from error


def save_fitted(store: TableStore, at_spots: NDArray[np.float32], model: Model) -> tuple[NDArray[np.float32], Model]:
    """Save embeddings of the spots and the model, and read them back.

    The run uses what is read back, so that an interrupted run and an uninterrupted one compute with the same digits.
    """
    write_file(store.folder / _SPOTS_FILE, "", {"embedding": torch.as_tensor(at_spots)})
    model.save(store.folder / "model", overwrite=True)  # last: it says that both are there
    return np.ascontiguousarray(at_spots), Model.load(store.folder / "model")


def write_parts(
    predictor: Predictor,
    store: TableStore,
    *,
    forecast: Forecast | None = None,
    own_shapes: GeoDataFrame | None = None,
) -> Path | Remote:
    """Predict and write each part that is missing, and finish the store.

    With a ``Client`` of dask its workers predict and write them.

    Parameters
    ----------
    predictor
        What to predict with, and where.
    store
        The store.
    forecast
        Forecast of the run.
    own_shapes
        Shapes of the targets, where they are the user's; shapes of laid targets are made here.

    Returns
    -------
    Path or URL of the finished store.
    """
    targets, section = predictor.targets, predictor.embedder.section
    order = order_of_parts(predictor.embedder, targets)
    start = time()
    if not store.begun:
        shapes = shapes_element(section, targets.take(order)) if own_shapes is None else own_shapes
        store.begin(predictor.table(order), shapes={targets.key: shapes}, matrices=predictor.names)
        del shapes
    left = [part for part in range(store.n_parts) if part not in store.done]
    client = active_client()
    if client is None:
        written = _write_here(predictor, store, left, order=order, forecast=forecast)
    else:
        plan = _PartsPlan.of(predictor, store.writer, order)
        written = _write_there(plan, store, left, client=client)
    with progress_bar(desc="predicting", total=len(targets), unit="target", show=predictor.embedder.progress) as bar:
        bar.update(store.n_rows - store.n_rows_left)
        for part in written:
            bar.update(len(order[store.rows(part)]))
    logger.info("    predicted %d of %d parts (%.0f s)", len(left), store.n_parts, time() - start)
    return store.finish(progress=predictor.embedder.progress)


def _write_here(
    predictor: Predictor,
    store: TableStore,
    left: Sequence[int],
    *,
    order: NDArray[np.int64],
    forecast: Forecast | None,
) -> Iterator[int]:
    """Predict and write parts in this process; yield the number of each when it is on disk."""
    # a part is written while the next one is predicted; no more than one waits, since it may take half a gigabyte
    with ThreadPoolExecutor(1) as writer:
        waiting: list[tuple[int, Future[None]]] = []
        for part in left:
            matrices = predictor.matrices(order[store.rows(part)], forecast=forecast)
            for before, written in waiting:
                written.result()
                yield before
            waiting = [(part, writer.submit(store.write, part, matrices))]
            del matrices  # only the writer holds it now: freed when it is written
        for before, written in waiting:
            written.result()
            yield before


def _write_there(plan: _PartsPlan, store: TableStore, left: Sequence[int], *, client: Client) -> Iterator[int]:
    """Let the workers of dask predict and write parts; yield the number of each when it is on disk."""
    opens, name = _PartsPlan.open, "histosge_predict"
    for i, _ in on_workers(_write_part, left, client=client, plan=plan, opens=opens, name=name):
        store.written(left[i])
        yield left[i]


@dataclass(frozen=True)
class _PartsPlan:
    """What a worker needs to predict and write parts of a store."""

    model: Model
    embedder: EmbedderPlan
    targets: Targets
    at_spots: NDArray[np.float32]
    conservation: Conservation | None
    writer: PartWriter
    order: NDArray[np.int64]

    @classmethod
    def of(cls, predictor: Predictor, writer: PartWriter, order: NDArray[np.int64]) -> Self:
        model, section = predictor.model, predictor.embedder.section
        complete = not len(model.context_genes.difference(section.genes))
        if section.measured and complete:  # the context is the section: the training spots stay here
            model = replace(model, spots=model.spots.take(torch.empty(0, dtype=torch.long)))
        genes = model.context_genes if section.measured else None
        embedder = EmbedderPlan.of(predictor.embedder, genes=genes, target_key=predictor.targets.key)
        return cls(model, embedder, predictor.targets, predictor.at_spots, predictor.conservation, writer, order)

    def open(self) -> _OpenParts:
        self.writer.check()
        embedder = self.embedder.open()
        predictor = Predictor(self.model, embedder, self.targets, self.at_spots, {}, self.conservation)
        return _OpenParts(predictor, self.writer, self.order)


@dataclass(frozen=True)
class _OpenParts:
    """Predicts and writes parts of a store, on a worker."""

    predictor: Predictor
    writer: PartWriter
    order: NDArray[np.int64]


def _write_part(opened: _OpenParts, part: int) -> None:
    opened.writer.write(part, opened.predictor.matrices(opened.order[opened.writer.rows(part)]))


def _fingerprint(section: Section, targets: Targets) -> str:
    """Digest of the user's data that a run reads: counts, targets and a small copy of the image."""
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
