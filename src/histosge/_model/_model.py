"""A fitted model: heads of all folds, genes, config of the embedding, held-out scores; JSON and safetensors on disk."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from histosge._embedding import EmbeddingConfig
from histosge._heads import POSITION_ONLY, LowRank, Queries, Spots, get_head, parts_of, workers
from histosge._model._context import FAR_UM, spots_of
from histosge._model._projection import Projection
from histosge._statistics import PredictionIntervals

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from histosge._heads import Head
    from histosge._heads._protocol import Expansion, Run
    from histosge._section import Section

_FORMAT = 5
_PLACES_AT_ONCE = 16384
"""Places that all heads are asked at together"""
_VALUES_AT_ONCE = 2**17
"""Values of the expression that a thread makes at a time: half a megabyte, which its cache holds."""
_TRAINING = {"head": object, "fold": int, "epoch": int, "loss": float}


@dataclass
class Model:
    """A trained head that predicts expression from embeddings and measured neighbours.

    Made by :func:`histosge.tl.fit`; given to :func:`histosge.tl.predict`. It predicts the weighted mean of its heads:
    a network for each fold of the spots, and one of every other head, fitted on all spots.

    Attributes
    ----------
    head
        Name of the head.
    genes
        Genes it predicts, in order.
    context_genes
        Genes it reads from measured neighbours: those of ``genes``, and those that single folds chose beside them.
    scores
        One row a gene: ``held_out_pcc``, ``held_out_mse``, ``predictable``, ``highly_variable``.
    heads
        Fitted heads and their weights.
    held_out
        Mean PCC and MSE on held-out spots, of this head, of its parts and of the simple rivals on the same folds.
    bars
        Error bars, calibrated on the held-out spots; ``None`` if they were not asked for.
    config
        How places are embedded: encoders, the scale that each is fed, dense or not.
    info
        Provenance: the split, numbers of folds, spots and sections, pitch and width of the spots in µm.
    spots
        The spots it learnt from, with embedding and expression: what it predicts from where nothing is measured.
    training
        One row an epoch of every head that is trained in epochs: ``head`` and ``fold`` (held out), ``epoch`` (from 1),
        ``loss`` (on the stopping spots).
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
    bars: PredictionIntervals | None = None
    info: dict[str, Any] = field(default_factory=dict)
    training: pd.DataFrame = field(default_factory=lambda: training_table({}))
    projection: Projection = field(default_factory=Projection)

    def __repr__(self) -> str:
        pcc = self.held_out[self.head]["pcc"]
        return (
            f"Model: {self.head} on {self.config.name}, {len(self.genes)} genes, "
            f"held-out PCC {pcc:.3f} (mean over genes)"
        )

    def predict(
        self,
        section: Section,
        *,
        spots: NDArray[np.float32],
        places: NDArray[np.float32],
        xy_px: NDArray[np.float64],
        spot_index: NDArray[np.int64],
        device: torch.device,
    ) -> NDArray[np.float32]:
        """Predict at places of a section.

        Parameters
        ----------
        section
            The section, whose measured spots are the context.
        spots
            (n, d) embeddings of its spots.
        places
            (m, d) embeddings of the places.
        xy_px
            (m, 2) the places in pixels of the image.
        spot_index
            (m,) row of the spot at each place, hidden from it; -1 for none.
        device
            Where to compute.

        Returns
        -------
        (m, genes) float32, log1p-normalised expression, never negative.
        """
        context = self.context(section, spots, device=device)
        return self.predict_from(
            context, places=places, xy_um=xy_px * section.mpp, spot_index=spot_index, device=device
        )

    def context(self, section: Section, spots: NDArray[np.float32], *, device: torch.device) -> Spots:
        """Lay out the measured spots of a section, whose embeddings are ``spots``, (n, d), to predict from.

        Of a section without any, these are the spots of training, out of reach of all its places: what neighbours would
        say is left out, and what the image says stays.
        """
        if not section.measured:
            blind = sorted(set(parts_of(self.head)) & set(POSITION_ONLY))
            if blind:
                msg = (
                    f"the model has the head {self.head!r}, and {' and '.join(map(repr, blind))} knows positions only: nothing "
                    "is measured on this section. Fit a model with another head=."
                )
                raise ValueError(msg)
            away = self.spots.xy_um.max(0).values + FAR_UM
            return replace(self.spots, xy_um=self.spots.xy_um - (away / FAR_UM).ceil() * FAR_UM).to(device)
        missing = self.context_genes.difference(section.genes)
        if len(missing):
            msg = (
                f"{len(missing)} of the {len(self.context_genes)} genes of this model are not in the table of section "
                f"{section.spots_key!r} (for example {list(missing[:3])}). Fit on genes that all sections have: genes=."
            )
            raise ValueError(msg)
        found = spots_of(section, spots, section.dense(self.context_genes)).to(device)
        return self.projection.of_spots(found)

    def predict_from(
        self,
        context: Spots,
        *,
        places: NDArray[np.float32],
        xy_um: NDArray[np.float64],
        spot_index: NDArray[np.int64],
        device: torch.device,
    ) -> NDArray[np.float32]:
        """Predict (m, genes) at places, given measured spots with the genes ``context_genes``; see :meth:`predict`."""
        context = context.to(device)
        out = np.empty((len(places), len(self.genes)), np.float32)
        with workers(device) as run:
            for start in range(0, len(out), _PLACES_AT_ONCE):
                rows = slice(start, start + _PLACES_AT_ONCE)
                where = Queries(
                    self.projection(torch.as_tensor(places[rows]).to(device)),
                    torch.as_tensor(xy_um[rows], dtype=torch.float32).to(device),
                    torch.as_tensor(spot_index[rows]).to(device),
                )
                self._mean(where, context, out=torch.from_numpy(out[rows]), run=run)
        return out

    def _mean(self, places: Queries, context: Spots, *, out: Tensor, run: Run) -> None:
        """Weighted mean of what the heads say, into ``out`` (m, genes): a few rows at a time, which caches hold."""
        columns = torch.as_tensor(self.context_genes.get_indexer(self.genes), device=places.xy_um.device)
        said: list[tuple[float, Tensor, Expansion]] = []
        for kind in dict.fromkeys(type(head) for _, head in self.heads):
            weights, heads = zip(*((w, head) for w, head in self.heads if type(head) is kind), strict=True)
            if isinstance(heads[0], LowRank):
                answers = heads[0].answers(heads, places, context=context, run=run)
            else:
                answers = [head.predict(places, context=context) for head in heads]
            said += zip(weights, answers, (_expansion(head, columns) for head in heads), strict=True)

        @torch.inference_mode()
        def expand(rows: slice) -> None:
            values = None
            for weight, answer, into in said:
                one = into(answer[rows]).clamp_min_(0)
                values = one.mul_(weight) if values is None else values.add_(one, alpha=weight)
            out[rows] = values  # type: ignore[assignment]

        n = max(1, _VALUES_AT_ONCE // len(self.genes)) if out.device == places.xy_um.device else len(places)
        list(run(expand, [slice(start, start + n) for start in range(0, len(places), n)]))

    def fingerprint(self) -> str:
        """Digest of the weights and of what is said of them, to tell models apart."""
        digest = hashlib.sha256()
        for weight, head in self.heads:
            config, tensors = head.state()
            digest.update(json.dumps([head.name, weight, config], sort_keys=True).encode())
            for name, tensor in sorted(tensors.items()):
                digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        projection = [tensor for _, tensor in sorted(self.projection.state().items())]
        for tensor in (self.spots.embedding, self.spots.expression, self.spots.xy_um, *projection):
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        digest.update(json.dumps([*self.genes, *self.context_genes, self.config.to_dict()], sort_keys=True).encode())
        return digest.hexdigest()[:16]

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the model to a folder: ``config.json``, ``scores.csv``, ``training.csv`` and ``model.safetensors``.

        The spots that it learnt from are part of it, with their expression.

        Parameters
        ----------
        path
            The folder, made if it is not there.
        overwrite
            Whether a model that is there already may be replaced.

        Raises
        ------
        FileExistsError
            Where a model is there already and ``overwrite`` is not set.
        """
        from safetensors.torch import save_file

        path = Path(path)
        if (path / "config.json").exists() and not overwrite:
            msg = f"{path} holds a model already. Pass overwrite=True to replace it, or choose another folder."
            raise FileExistsError(msg)
        path.mkdir(parents=True, exist_ok=True)
        states = [head.state() for _, head in self.heads]
        tensors = {
            f"{i}.{name}": t.detach().cpu().contiguous() for i, (_, ws) in enumerate(states) for name, t in ws.items()
        }
        spots = {"embedding": self.spots.embedding, "expression": self.spots.expression, "xy_um": self.spots.xy_um}
        tensors |= {f"spots.{name}": t.detach().cpu().contiguous() for name, t in spots.items()}
        tensors |= {f"projection.{name}": t.detach().cpu().contiguous() for name, t in self.projection.state().items()}
        if self.bars is not None:
            tensors |= {f"bars.{name}": torch.as_tensor(a) for name, a in self.bars.to_arrays().items()}
        config = {
            "format": _FORMAT,
            "head": self.head,
            "heads": [
                {"name": head.name, "weight": weight, "config": c}
                for (weight, head), (c, _) in zip(self.heads, states, strict=True)
            ],
            "held_out": self.held_out,
            "embedding": self.config.to_dict(),
            "context_genes": list(self.context_genes),
            "pitch_um": self.spots.pitch_um,
            "info": self.info,
        }
        (path / "config.json").write_text(json.dumps(config, indent=1))
        self.scores.to_csv(path / "scores.csv", index_label="gene")
        self.training.to_csv(path / "training.csv", index=False)
        save_file(tensors, path / "model.safetensors")

    @classmethod
    def load(cls, path: str | Path) -> Model:
        """Read a model from a folder.

        Parameters
        ----------
        path
            Folder that :meth:`save` wrote.

        Returns
        -------
        The model, ready to predict.

        Raises
        ------
        FileNotFoundError
            Where the folder holds no model.
        ValueError
            Where another version of histosge saved it, in a format that this one does not read.
        """
        from safetensors.torch import load_file

        path = Path(path)
        if not (path / "config.json").exists():
            msg = f"{path} holds no model: there is no config.json. Pass a folder that Model.save() wrote."
            raise FileNotFoundError(msg)
        config = json.loads((path / "config.json").read_text())
        if config.get("format") != _FORMAT:
            msg = f"{path} has model format {config.get('format')!r}; this version of histosge reads {_FORMAT}. Fit it again."
            raise ValueError(msg)
        tensors = load_file(path / "model.safetensors")
        heads = []
        for i, c in enumerate(config["heads"]):
            mine = {n.removeprefix(f"{i}."): t for n, t in tensors.items() if n.startswith(f"{i}.")}
            heads.append((c["weight"], get_head(c["name"]).from_state(c["config"], mine)))
        projection = {n.removeprefix("projection."): t for n, t in tensors.items() if n.startswith("projection.")}
        bars = {n.removeprefix("bars."): t.numpy() for n, t in tensors.items() if n.startswith("bars.")}
        scores = pd.read_csv(path / "scores.csv", index_col="gene", dtype={"gene": str}, keep_default_na=False)
        scores.index.name = None
        scores = scores.astype({"held_out_pcc": np.float32, "held_out_mse": np.float32})
        return cls(
            config["head"],
            pd.Index(scores.index),
            pd.Index(config["context_genes"]),
            heads,
            scores,
            config["held_out"],
            EmbeddingConfig.from_dict(config["embedding"]),
            Spots(tensors["spots.embedding"], tensors["spots.expression"], tensors["spots.xy_um"], config["pitch_um"]),
            PredictionIntervals.from_arrays(bars) if bars else None,
            config["info"],
            pd.read_csv(path / "training.csv").astype(_TRAINING),
            Projection.from_state(projection),
        )


def training_table(losses: dict[tuple[str, int], Sequence[float]]) -> pd.DataFrame:
    """One row an epoch."""
    rows = [(head, fold, i + 1, loss) for (head, fold), each in losses.items() for i, loss in enumerate(each)]
    return pd.DataFrame(rows, columns=list(_TRAINING)).astype(_TRAINING)


def _expansion(head: Head, columns: Tensor) -> Expansion:
    """How what a head answers becomes expression of the genes ``columns``."""
    return head.expansion(columns) if isinstance(head, LowRank) else lambda answer: answer[:, columns]
