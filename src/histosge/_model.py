"""A fitted model: heads of all folds, genes, recipe of the embedding, held-out scores; JSON and safetensors on disk."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from histosge._calibration import ErrorBars, calibrate
from histosge._evaluation import choose_genes, compare, cross_fit, score, summary
from histosge._heads import BLIND, LowRank, Parts, Places, Spots, get_head, parts_of
from histosge._recipe import Recipe
from histosge._settings import logger
from histosge._splits import block_folds
from histosge._training import workers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from histosge._heads import Head
    from histosge._heads._protocol import Expansion, Run
    from histosge._recipe import SpotParts
    from histosge._section import Section

RIVALS = ("ridge", "nearest")
"""Simple heads that are scored on the same folds every time."""
_FORMAT = 4
_SAME_PCC = 0.01
_PLACES_AT_ONCE = 16384
"""Places that all heads are asked at together"""
_VALUES_AT_ONCE = 2**17
"""Values of the expression that a thread makes at a time: half a megabyte, which its cache holds."""
_TRAINING = {"head": object, "fold": int, "epoch": int, "loss": float}
_FITTED = ("mean", "weights")
"""What a simple head takes when it is restored, and is no option of it."""
FAR_UM = 204_800.0
"""Sections of one model are laid this far apart, so that neighbours are always of one section.

A whole number of the published head's longest waves (128 pitches) for pitches of 2, 8, 16, 100 and 200 µm, so that a
section has the same position code in training and in prediction.
"""


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
    recipe
        How places must be embedded: encoder, tile in µm, stacked maps.
    info
        Provenance: the split, numbers of folds, spots and sections, pitch and width of the spots in µm.
    spots
        The spots it learnt from, with embedding and expression: what it predicts from where nothing is measured.
    training
        One row an epoch of every head that is trained in epochs: ``head`` and ``fold`` (held out), ``epoch`` (from 1),
        ``loss`` (on the stopping spots).

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
    recipe: Recipe
    spots: Spots
    bars: ErrorBars | None = None
    info: dict[str, Any] = field(default_factory=dict)
    training: pd.DataFrame = field(default_factory=lambda: _training_table({}))

    def __repr__(self) -> str:
        pcc = self.held_out[self.head]["pcc"]
        return (
            f"Model: {self.head} on {self.recipe.encoder['name']}, {len(self.genes)} genes, "
            f"held-out PCC {pcc:.3f} (mean over genes)"
        )

    def predict(
        self,
        section: Section,
        *,
        spots: NDArray[np.float32],
        places: NDArray[np.float32],
        xy_px: NDArray[np.float64],
        own: NDArray[np.int64],
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
        own
            (m,) row of the spot at each place, hidden from it; -1 for none.
        device
            Where to compute.

        Returns
        -------
        (m, genes) float32, log1p-normalised expression, never negative.
        """
        context = self.context(section, spots, device=device)
        return self.predict_from(context, places=places, xy_um=xy_px * section.mpp, own=own, device=device)

    def context(self, section: Section, spots: NDArray[np.float32], *, device: torch.device) -> Spots:
        """Lay out the measured spots of a section, whose embeddings are ``spots``, (n, d), to predict from.

        Of a section without any, these are the spots of training, out of reach of all its places: what neighbours would
        say is left out, and what the image says stays.
        """
        if not section.measured:
            blind = sorted(set(parts_of(self.head)) & set(BLIND))
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
        return _spots(section, spots, section.dense(self.context_genes)).to(device)

    def predict_from(
        self,
        context: Spots,
        *,
        places: NDArray[np.float32],
        xy_um: NDArray[np.float64],
        own: NDArray[np.int64],
        device: torch.device,
    ) -> NDArray[np.float32]:
        """Predict (m, genes) at places, given measured spots with the genes ``context_genes``; see :meth:`predict`."""
        context = context.to(device)
        out = np.empty((len(places), len(self.genes)), np.float32)
        with workers(device) as run:
            for start in range(0, len(out), _PLACES_AT_ONCE):
                rows = slice(start, start + _PLACES_AT_ONCE)
                where = Places(
                    torch.as_tensor(places[rows]).to(device),
                    torch.as_tensor(xy_um[rows], dtype=torch.float32).to(device),
                    torch.as_tensor(own[rows]).to(device),
                )
                self._mean(where, context, out=torch.from_numpy(out[rows]), run=run)
        return out

    def _mean(self, places: Places, context: Spots, *, out: Tensor, run: Run) -> None:
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
        for tensor in (self.spots.embedding, self.spots.expression, self.spots.xy_um):
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        digest.update(json.dumps([*self.genes, *self.context_genes, self.recipe.to_dict()], sort_keys=True).encode())
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
            "recipe": self.recipe.to_dict(),
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
            Recipe.from_dict(config["recipe"]),
            Spots(tensors["spots.embedding"], tensors["spots.expression"], tensors["spots.xy_um"], config["pitch_um"]),
            ErrorBars.from_arrays(bars) if bars else None,
            config["info"],
            pd.read_csv(path / "training.csv").astype(_TRAINING),
        )


def _training_table(losses: dict[tuple[str, int], Sequence[float]]) -> pd.DataFrame:
    """One row an epoch."""
    rows = [(head, fold, i + 1, loss) for (head, fold), each in losses.items() for i, loss in enumerate(each)]
    return pd.DataFrame(rows, columns=list(_TRAINING)).astype(_TRAINING)


def _expansion(head: Head, columns: Tensor) -> Expansion:
    """How what a head answers becomes expression of the genes ``columns``."""
    return head.expansion(columns) if isinstance(head, LowRank) else lambda answer: answer[:, columns]


def check_arguments(
    *,
    head: str,
    genes: int | Sequence[str] | str,
    n_folds: int,
    sections: Sequence[Section],
    level: float | None = None,
    head_options: dict[str, Any] | None = None,
) -> pd.Index:
    """Say what is wrong with the arguments of :func:`fit_model` before an hour of embedding; give the common genes."""
    _check_options(head, head_options)
    if level is not None and not (isinstance(level, (int, float)) and 0 < level < 1):
        msg = f"level={level!r}: choose a share between 0 and 1, such as 0.9, or None for no error bars."
        raise ValueError(msg)
    if isinstance(n_folds, bool) or not isinstance(n_folds, (int, np.integer)) or not 2 <= n_folds <= 20:
        msg = f"n_folds={n_folds!r}: choose a whole number from 2 to 20."
        raise ValueError(msg)
    names = sections[0].genes
    for other in sections[1:]:
        names = names.intersection(other.genes, sort=False)
    if len(names) == 0:
        msg = (
            "the sections have no gene in common, so that nothing can be learnt from them together. Check that all name "
            "genes alike, by symbols or by Ensembl ids."
        )
        raise ValueError(msg)
    number = isinstance(genes, (int, np.integer)) and not isinstance(genes, bool)
    several = isinstance(genes, Collection) and not isinstance(genes, str) and len(genes) > 0
    if not (number and genes >= 1) and not several and not isinstance(genes, str):  # type: ignore[operator]
        msg = f"genes={genes!r}: pass a number above 0, a list of gene names, or 'all'."
        raise ValueError(msg)
    if isinstance(genes, str) and genes != "all":
        msg = f"genes={genes!r}: pass a number, a list of gene names, or 'all' (one gene: genes=[{genes!r}])."
        raise ValueError(msg)
    if several:
        wanted = pd.Index([str(g) for g in cast("Sequence[str]", genes)])
        missing = wanted.difference(names)
        if len(missing):
            close = [c for m in missing[:3] for c in difflib.get_close_matches(m, names, n=1)]
            hint = f" Similar names: {close}." if close else ""
            msg = (
                f"genes: {len(missing)} of {len(wanted)} names are not in the table ({list(missing[:5])}).{hint} Choose from "
                "its var_names."
            )
            raise ValueError(msg)
    return names


def _check_options(head: str, options: dict[str, Any] | None) -> None:
    """Refuse an unknown head, and options that it does not have."""
    names = parts_of(head)
    given = {"head_options": {} if options is None else options}
    if len(names) > 1 and isinstance(options, dict):
        unknown = set(options) - set(names)
        if unknown:
            msg = (
                f"head_options of {sorted(unknown)}: head {head!r} takes options by name of its parts, "
                f"for example {{{names[0]!r}: {{...}}}}."
            )
            raise ValueError(msg)
        given = {f"head_options[{name!r}]": options[name] for name in names if name in options}
        names = tuple(name for name in names if name in options)
    for name, (where, one) in zip(names, given.items(), strict=False):
        if not isinstance(one, dict):
            msg = f"{where}={one!r}: pass a dict of arguments of the head."
            raise ValueError(msg)
        known = [p for p in inspect.signature(get_head(name)).parameters if p not in _FITTED]
        for option in one:
            if option not in known:
                msg = f"head_options: head {name!r} has no option {option!r}. {'Choose from ' + str(known) if known else 'It has none'}."
                raise ValueError(msg)


def fit_model(
    sections: Sequence[Section],
    embeddings: Sequence[NDArray[np.float32]],
    *,
    recipe: Recipe,
    head: str,
    genes: int | Sequence[str] | str,
    n_folds: int,
    rng: np.random.Generator,
    device: torch.device,
    parts: Sequence[SpotParts] | None = None,
    level: float | None = 0.9,
    rivals: Sequence[str] = RIVALS,
    head_options: dict[str, Any] | None = None,
    progress: bool | None = None,
) -> Model:
    """Fit a head on every fold of the spots of one or more sections, and score it on the spots left out.

    ``parts`` say what lies below the spots of each section, for heads that learn from it.
    """
    names = check_arguments(
        head=head, genes=genes, n_folds=n_folds, sections=sections, level=level, head_options=head_options
    )
    everything = sparse.vstack([s.expression[:, s.genes.get_indexer(names)] for s in sections]).tocsr()
    spread_out = np.vstack([s.xy_um + [FAR_UM * i, 0] for i, s in enumerate(sections)])
    fold = block_folds(spread_out, n_folds=n_folds, rng=rng)

    final, per_fold, highly_variable = _select(genes, names, everything, spread_out, fold)
    union = np.flatnonzero(final | per_fold.any(axis=0))
    spots = lay_out(sections, embeddings, names[union], parts=parts).to(device)

    logger.info("fitting %s on %d spots x %d genes, %d folds", head, len(spots), int(final.sum()), n_folds)
    fitted = cross_fit(spots, head=head, fold=fold, rng=rng, options=head_options, progress=progress)
    measured = spots.expression.cpu().numpy()

    def chosen(one: int) -> NDArray[np.bool_]:
        return per_fold[one][union]

    said = {head: fitted.held_out} | fitted.parts
    held_out = {name: summary(values, measured, fold=fold, chosen=chosen) for name, values in said.items()}
    others = [r for r in rivals if r not in held_out]
    held_out |= compare(spots, heads=others, fold=fold, chosen=chosen, rng=rng)
    if rivals:
        _report(head, held_out)

    gene_scores = score(fitted.held_out, measured, fold=fold)
    keep = final[union]
    scores = pd.DataFrame(
        {
            "highly_variable": highly_variable[union][keep],
            "held_out_pcc": gene_scores.pcc[keep].astype(np.float32),
            "held_out_mse": gene_scores.mse[keep].astype(np.float32),
            "predictable": gene_scores.predictable[keep],
        },
        index=pd.Index(names[union][keep], name="gene"),
    )
    bars = None
    if level is not None:
        bars = calibrate(fitted.held_out[:, keep], measured[:, keep], fold=fold, level=level)
    info = {
        "split": f"blocks, {n_folds} folds, each spot predicted by heads that never saw it",
        "n_folds": n_folds,
        "n_spots": len(spots),
        "n_sections": len(sections),
        "pitch_um": spots.pitch_um,
        "spot_um": float(np.mean([s.spot_um for s in sections])),
    }
    scores.index.name = None
    found = pd.Index(scores.index), pd.Index(names[union]), fitted.heads
    kept = replace(spots, parts=None).to("cpu")
    return Model(head, *found, scores, held_out, recipe, kept, bars, info, _training_table(fitted.losses))


def lay_out(
    sections: Sequence[Section],
    embeddings: Sequence[NDArray[np.float32]],
    genes: pd.Index,
    *,
    parts: Sequence[SpotParts] | None = None,
) -> Spots:
    """Lay the spots of several sections, and their parts, far apart in one plane."""
    each = [
        _spots(s, e, s.dense(genes), offset_um=FAR_UM * i)
        for i, (s, e) in enumerate(zip(sections, embeddings, strict=True))
    ]
    return Spots(
        torch.cat([s.embedding for s in each]),
        torch.cat([s.expression for s in each]),
        torch.cat([s.xy_um for s in each]),
        float(np.mean([s.pitch_um for s in each])),
        None if parts is None else _lay_out_parts(sections, parts),
    )


def _lay_out_parts(sections: Sequence[Section], parts: Sequence[SpotParts]) -> Parts:
    before = np.cumsum([0, *(len(p.embedding) for p in parts)])
    widest = max(p.index.shape[1] for p in parts)
    fill = [((0, 0), (0, widest - p.index.shape[1])) for p in parts]
    index = [np.pad(p.index, f) + n for p, f, n in zip(parts, fill, before, strict=False)]
    weight = [np.pad(p.weight, f) for p, f in zip(parts, fill, strict=True)]
    xy_um = [p.xy_px * s.mpp + [FAR_UM * i, 0.0] for i, (p, s) in enumerate(zip(parts, sections, strict=True))]
    return Parts(
        torch.as_tensor(np.concatenate([p.embedding for p in parts])),
        torch.as_tensor(np.concatenate(xy_um), dtype=torch.float32),
        torch.as_tensor(np.concatenate(index)),
        torch.as_tensor(np.concatenate(weight), dtype=torch.float32),
    )


def _spots(
    section: Section, embedding: NDArray[np.float32], expression: NDArray[np.float32], offset_um: float = 0.0
) -> Spots:
    xy = torch.as_tensor(section.xy_um + [offset_um, 0.0], dtype=torch.float32)
    return Spots(torch.as_tensor(embedding), torch.as_tensor(expression), xy, section.pitch_um)


def _select(
    genes: int | Sequence[str] | str,
    names: pd.Index,
    expression: sparse.csr_matrix,
    xy: NDArray[np.float64],
    fold: NDArray[np.int64],
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """Genes to predict; genes each fold's training spots would choose, (folds, genes); which vary most in space."""
    n_folds = int(fold.max()) + 1
    if isinstance(genes, (int, np.integer)):
        n = min(int(genes), len(names))
        final = choose_genes(expression, xy, n_genes=n)
        per_fold = np.stack([choose_genes(expression[fold != f], xy[fold != f], n_genes=n) for f in range(n_folds)])
        return final, per_fold, final
    if isinstance(genes, str):
        final = np.asarray((expression > 0).sum(axis=0)).ravel() > 0
    else:
        final = np.asarray(names.isin([str(g) for g in genes]))
    variable = final & choose_genes(expression, xy, n_genes=min(1000, len(names)))
    # scanpy's PCA takes the highly variable genes: with none marked it would have nothing to work on
    highly_variable = variable if variable.any() else final
    return final, np.tile(final, (n_folds, 1)), highly_variable


def _report(head: str, held_out: dict[str, dict[str, float]]) -> None:
    told = ", ".join(f"{name} {s['pcc']:.3f}" for name, s in held_out.items())
    logger.info("held-out PCC, mean over genes: %s", told)
    # a part within a hundredth of the whole is no better (that much changes from seed to seed), but a simple rival is
    parts = set(parts_of(head)) - set(RIVALS)
    lead = {n: s["pcc"] - held_out[head]["pcc"] - (_SAME_PCC if n in parts else 0) for n, s in held_out.items()}
    better = [n for n, ahead in lead.items() if n != head and ahead >= 0]
    if better:
        logger.warning(
            "head %r does not beat %s on held-out spots (PCC %.3f): consider head=%r",
            head, " and ".join(better), held_out[head]["pcc"], max(better, key=lambda n: held_out[n]["pcc"]),
        )  # fmt: skip
