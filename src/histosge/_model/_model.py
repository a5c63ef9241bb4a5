"""A fitted model: heads of all folds, genes, embedding config, held-out scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from histosge._heads import POSITION_ONLY, LowRank, Queries, Spots, get_head, workers
from histosge._model._completion import complete
from histosge._model._context import UNMEASURED, Context, stack_sections
from histosge._model._files import contents, digest, load_model, save_model, training_table
from histosge._model._projection import Projection

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray
    from torch import Tensor

    from histosge._embedding import EmbeddingConfig
    from histosge._heads import Head
    from histosge._heads._protocol import Expansion, Run
    from histosge._section import Section
    from histosge._statistics import PredictionIntervals

_TARGETS_AT_ONCE = 16384
"""Targets that are predicted together"""
_VALUES_AT_ONCE = 2**17
"""Values of the expression that a thread computes at a time: half a megabyte, which fits in its cache."""


@dataclass
class Model:
    """A trained head that predicts expression from embeddings and measured neighbours.

    :func:`histosge.tl.fit` makes it, and :func:`histosge.tl.predict` takes it. It predicts the weighted mean of its
    heads: of a network, one for each fold of the spots; of any other head, one that is fitted on all spots.

    Attributes
    ----------
    head
        Name of the head.
    genes
        Genes it predicts, in order.
    context_genes
        Genes it reads from measured neighbours: ``genes``, and those that only single folds chose.
    scores
        One row for each gene: ``held_out_pcc``, ``held_out_mse``, ``predictable``, ``highly_variable``; with
        ``genes="union"`` also ``n_sections``, how many sections measure it.
    heads
        Fitted heads and their weights.
    held_out
        Mean PCC and MSE on held-out spots, of this head, of its parts and of the baselines on the same folds.
    intervals
        Prediction intervals, calibrated on the held-out spots.
    config
        How targets are embedded: encoders, the scale of the tiles of each, dense or not.
    info
        Provenance: the split, numbers of folds, spots and sections, pitch and width of the spots in µm.
    spots
        The spots it learnt from, with embedding and expression; NaN where their section does not measure a gene. Where
        nothing is measured, it predicts from these.
    training
        One row for each epoch of every head that is trained in epochs: ``head`` and ``fold`` (held out), ``epoch``
        (from 1), ``loss`` (on the stopping spots).
    projection
        Brings the embeddings of joined encoders into balance; the embedding of a single encoder stays as it is.

    Examples
    --------
    >>> import tempfile
    >>> import histosge as sge
    >>> sdata = sge.datasets.synthetic()
    >>> model = sge.tl.fit(sdata, encoder="stain-texture", head="ridge", genes=20)
    >>> folder = tempfile.mkdtemp()
    >>> model.save(folder + "/model")
    >>> sge.Model.load(folder + "/model").head
    'ridge'
    """

    head: str
    genes: pd.Index
    context_genes: pd.Index
    heads: list[tuple[float, Head]]
    scores: pd.DataFrame
    held_out: dict[str, dict[str, float]]
    config: EmbeddingConfig
    spots: Spots
    intervals: PredictionIntervals
    info: dict[str, Any] = field(default_factory=dict)
    training: pd.DataFrame = field(default_factory=lambda: training_table({}))
    projection: Projection = field(default_factory=Projection)

    def __repr__(self) -> str:
        pcc = self.held_out[self.head]["pcc"]
        return (
            f"Model: {self.head} on {self.config.name}, {len(self.genes)} genes, "
            f"held-out PCC {pcc:.3f} (mean over genes)"
        )

    def context(self, section: Section, embedding: NDArray[np.float32], *, device: torch.device) -> Context:
        """Prepare to predict on a section from its measured spots and their embeddings (n, d).

        Where nothing is measured, the training spots are the context, and no target has neighbours among them: heads
        predict from the image alone.
        """
        if not section.measured:
            blind = sorted(set(self.head.split("+")) & set(POSITION_ONLY))
            if blind:
                msg = (
                    f"the model has the head {self.head!r}, and {' and '.join(map(repr, blind))} knows positions only: "
                    "nothing is measured on this section. Fit a model with another head=."
                )
                raise ValueError(msg)
            return self.condition(self.spots, section=UNMEASURED, device=device)
        missing = self.context_genes.difference(section.genes)
        if len(missing) and not self.of_some_sections:
            msg = (
                f"{len(missing)} of the {len(self.context_genes)} genes of this model are not in the table of section "
                f"{section.spots_key!r} (for example {list(missing[:3])}). Fit on genes that all sections have: genes=."
            )
            raise ValueError(msg)
        spots = self.projection.of_spots(stack_sections([section], [embedding], self.context_genes).to(device))
        return self.condition(complete(spots, by=self.spots.to(device)), device=device)

    @property
    def of_some_sections(self) -> bool:
        """Whether some sections that it learnt from do not measure some of its genes."""
        return "n_sections" in self.scores

    def condition(self, spots: Spots, *, device: torch.device, section: int = 0) -> Context:
        """Prepare to predict from measured spots with the genes ``context_genes``.

        Heads are moved to ``device``, and compute what depends on the spots alone. ``section`` is the number of the
        section that is predicted. Genes that a section does not measure (NaN) are filled in.
        """
        spots = complete(spots.to(device))
        heads: list[tuple[float, Head, Any]] = []
        with workers(device) as run:
            for weight, head in self.heads:
                moved = head.to(device)
                heads.append((weight, moved, moved.condition(spots, run=run) if isinstance(moved, LowRank) else None))
        return Context(spots, section, heads)

    def predict_from(
        self,
        context: Context,
        *,
        embedding: NDArray[np.float32],
        xy_um: NDArray[np.float64],
        spot_index: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """Predict at targets of one section.

        Parameters
        ----------
        context
            From :meth:`context` or :meth:`condition`.
        embedding
            (m, d) embeddings of the targets.
        xy_um
            (m, 2) positions in the coordinates of the section.
        spot_index
            (m,) row of the context's spot at each target, hidden from it; -1 for none.

        Returns
        -------
        (m, genes) float32, log1p-normalised expression, never negative.
        """
        device = context.spots.embedding.device
        out = np.empty((len(embedding), len(self.genes)), np.float32)
        with workers(device) as run:
            for start in range(0, len(out), _TARGETS_AT_ONCE):
                rows = slice(start, start + _TARGETS_AT_ONCE)
                queries = Queries(
                    self.projection(torch.as_tensor(embedding[rows]).to(device)),
                    torch.as_tensor(xy_um[rows], dtype=torch.float32).to(device),
                    torch.full((len(embedding[rows]),), context.section, device=device),
                    torch.as_tensor(spot_index[rows]).to(device),
                )
                self._mean(queries, context, out=torch.from_numpy(out[rows]), run=run)
        return out

    def _mean(self, queries: Queries, context: Context, *, out: Tensor, run: Run) -> None:
        """Put the weighted mean of the predictions of the heads into ``out`` (m, genes), a few rows at a time."""
        columns = torch.as_tensor(self.context_genes.get_indexer(self.genes), device=queries.xy_um.device)
        predicted: list[tuple[float, Tensor, Expansion]] = []
        for kind in dict.fromkeys(type(head) for _, head, _ in context.heads):
            weights, heads, conditions = zip(*(each for each in context.heads if type(each[1]) is kind), strict=True)
            if isinstance(heads[0], LowRank):
                values = heads[0].components(heads, conditions, queries, run=run)
            else:
                values = [head.predict(queries, context=context.spots) for head in heads]
            predicted += zip(weights, values, (_expansion(head, columns) for head in heads), strict=True)

        @torch.inference_mode()
        def expand(rows: slice) -> None:
            mean = None
            for weight, values, expansion in predicted:
                each = expansion(values[rows]).clamp_min_(0)
                mean = each.mul_(weight) if mean is None else mean.add_(each, alpha=weight)
            out[rows] = mean  # type: ignore[assignment]

        n = max(1, _VALUES_AT_ONCE // len(self.genes)) if out.device == queries.xy_um.device else len(queries)
        list(run(expand, [slice(start, start + n) for start in range(0, len(queries), n)]))

    def fingerprint(self) -> str:
        """Digest of all of the model, the same before it is saved and after; different models have different ones."""
        return digest(*contents(self))[:16]

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the model to a folder, as one file, ``histosge.safetensors``.

        The file includes the spots that the model learnt from, with their expression. It is written in one step: after
        an error or a kill the folder holds the model that it held before, or none.

        Parameters
        ----------
        path
            The folder. It is created if it does not exist; other files in it stay as they are.
        overwrite
            Whether an existing model may be replaced.

        Raises
        ------
        FileExistsError
            Where the folder holds a model and ``overwrite`` is not set.
        ModelError
            Where the model was changed in a way that a file cannot hold.
        OSError
            Where the file cannot be written, such as on a full disk.
        """
        save_model(self, Path(path), overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path, *, head: type[Head] | None = None) -> Model:
        """Read a model from a folder, and check all of it.

        Parameters
        ----------
        path
            Folder that :meth:`save` wrote.
        head
            Class of the model's head, where it is a head of your own: see :class:`histosge.Head`.

        Returns
        -------
        The model, ready to predict.

        Raises
        ------
        FileNotFoundError
            Where the folder holds no model.
        ModelError
            Where the file is damaged or was changed, where another version of histosge saved it, in a format that this
            one does not read, or where its head is not known. It is a ``ValueError``.
        """
        if head is not None:
            get_head(head)
        return cls(**load_model(Path(path)))


def _expansion(head: Head, columns: Tensor) -> Expansion:
    """Return the function from the values of a head to expression of the genes ``columns``."""
    return head.expansion(columns) if isinstance(head, LowRank) else lambda values: values[:, columns]
