"""One self-contained HTML page of a run."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from histosge import _keys
from histosge._atomic import replacing
from histosge._settings import logger
from histosge._statistics import LEVEL, better_baselines
from histosge.pl._canvas import predicted_table
from histosge.pl._pictures import Picture, data_uri, figures_closed, pictures_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from anndata import AnnData
    from spatialdata import SpatialData

_N_MAPS = 4
_N_LISTED = 50
_BASELINES = {
    "nearest": "interpolation of the measured spots",
    "ridge": "ridge regression on the image",
    "mean": "the mean of each gene: a constant, 0 by definition",
}
_FEW = 0.5
"""Share of predictable genes below which the page warns."""
_FAR = 0.01
"""Share of targets farther than a pitch from all spots above which the page warns."""
_DOMAINS = ("domain", "leiden")
_PANELS = {
    "image": "the H&E image",
    "measured": "expression measured at the spots",
    "predicted": "expression predicted at all targets",
    "width": "width of the prediction interval",
}
_COLUMNS = ("held_out_pcc", "held_out_mse", "predictable", "highly_variable", "shrinkage")
_PANEL_SIZE = 2.8
"""Edge of a panel of a map in inches: small, so that its text is relatively large."""
_MARK = re.compile(rb'<meta name="generator" content="histosge[ "]')


def report(
    sdata: SpatialData,
    path: str | Path,
    *,
    key: str = "histosge",
    scores: pd.DataFrame | None = None,
    genes: str | Sequence[str] | None = None,
) -> Path:
    """Write one HTML page about a run: its input, its scores and warnings.

    The page contains pictures, styles and the table of all genes and loads nothing from elsewhere: it can be sent by
    mail and opened without network.

    Parameters
    ----------
    sdata
        Section with a table that :func:`histosge.tl.predict` wrote.
    path
        File to write, ``"report.html"``. A report of histosge is replaced; another file is not.
    key
        Name of the predicted table.
    scores
        Result of :func:`histosge.tl.evaluate` for this section, to draw as well.
    genes
        Genes to map and to list. ``None`` maps the four genes that are predicted best.

    Returns
    -------
    The path. The page shows, where they exist: the run; held-out scores of the head and the baselines; prediction
    intervals; the 50 genes that are predicted best and ``genes``, and a CSV file of all genes; maps; the domains of
    ``obs["domain"]`` and ``obs["leiden"]``; training curves; ``scores``; warnings; how to cite; the call and all of
    ``uns["histosge"]``. Nothing is written into ``sdata``.

    Raises
    ------
    KeyError
        Where there is no such table or gene.
    TypeError
        Where ``scores`` is no DataFrame.
    ValueError
        Where ``scores`` mixes splits or protocols.
    FileNotFoundError
        Where the folder of ``path`` does not exist.
    FileExistsError
        Where ``path`` is a folder, or a file that this function did not write.

    Examples
    --------
    >>> import tempfile
    >>> import histosge as sge
    >>> sdata = sge.datasets.synthetic(n_rows=12, n_cols=12, n_genes=20, mpp=2.0)
    >>> sge.tl.predict(sdata, encoder="stain-texture", head="nearest", genes=20, n_folds=2)
    >>> sge.pl.report(sdata, tempfile.mkdtemp() + "/report.html", genes="GENE000").name
    'report.html'
    """
    table = predicted_table(sdata, key)
    path = _writable(Path(path))
    wanted = _wanted(table, genes)
    run = _Run(sdata, table, key)
    with figures_closed():
        pictures = _draw(run, wanted=wanted, scores=scores)
    page = _page(run, pictures, wanted=wanted, scores=scores)
    if path.exists():
        logger.info("replacing the report %s of an earlier run", path)
    with replacing(path) as draft:
        draft.write_text(page, encoding="utf-8", newline="\n")
    logger.info("wrote %s (%.1f MB)", path, path.stat().st_size / 1e6)
    return path


def _writable(path: Path) -> Path:
    """Raise, before the work starts, where the page cannot be written to the path."""
    if path.is_dir():
        msg = f"path={str(path)!r} is a folder. Name a file in it, such as {str(path / 'report.html')!r}."
        raise FileExistsError(msg)
    if not path.parent.is_dir():
        msg = f"path={str(path)!r}: there is no folder {str(path.parent)!r}. Make it first, or choose another."
        raise FileNotFoundError(msg)
    if path.exists():
        with path.open("rb") as file:
            ours = _MARK.search(file.read(1000)) is not None
        if not ours:
            msg = (
                f"path={str(path)!r} exists, and histosge.pl.report did not write it. Choose another name, or move "
                "it away."
            )
            raise FileExistsError(msg)
    return path


def _wanted(table: AnnData, genes: str | Sequence[str] | None) -> list[str]:
    """Return the genes to map: those of the user, or the best predictable ones."""
    if genes is None:
        best = table.var[table.var["predictable"].to_numpy(bool)]["held_out_pcc"].nlargest(_N_MAPS).index
        return [str(g) for g in best]
    chosen = list(dict.fromkeys([genes] if isinstance(genes, str) else genes))
    missing = [g for g in chosen if g not in table.var_names]
    if missing:
        msg = (
            f"genes {missing} were not predicted. Predict them with genes=[...]; here are {list(table.var_names[:5])} …"
        )
        raise KeyError(msg)
    return chosen


@dataclass(frozen=True)
class _Run:
    """A predicted table, and facts about it for the page."""

    sdata: SpatialData
    table: AnnData
    key: str

    @property
    def made(self) -> dict[str, Any]:
        return self.table.uns[_keys.UNS]

    @property
    def region(self) -> str:
        """Name of the shapes."""
        return str(self.table.obs[_keys.REGION].iloc[0])

    @property
    def measured(self) -> bool:
        """Whether anything was measured on this section."""
        return bool(self.made.get("spots"))

    @property
    def has_intervals(self) -> bool:
        """Whether prediction intervals can be computed."""
        return self.measured and _keys.INTERVALS in self.table.varm

    @property
    def missing(self) -> list[str]:
        """Elements of the prediction that ``sdata`` lacks."""
        named = {"images": self.made["image"], "shapes": self.made.get("spots"), "tables": self.made.get("table")}
        elements = [*named.items(), ("shapes", self.region)]
        return [f"{kind}[{name!r}]" for kind, name in elements if name and name not in getattr(self.sdata, kind)]

    @property
    def held_out(self) -> dict[str, float]:
        """Held-out correlations of the head, its parts and the baselines, best first; a constant has 0."""
        found = {"mean": 0.0} | {name: float(score["pcc"]) for name, score in self.made["held_out"].items()}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    @property
    def n_predictable(self) -> int:
        return int(self.table.var["predictable"].sum())

    @property
    def far(self) -> float:
        """Share of targets farther than a pitch from all spots."""
        distance_um = self.table.obs["distance_to_spot_um"].to_numpy(float)
        return float(np.mean(~(distance_um <= float(self.made["pitch_um"]) * (1 + 1e-6))))

    @property
    def token_um(self) -> float | None:
        """Edge of a token, where targets are embedded by their area."""
        sizes = [um * one["token_px"] / one["tile_px"] for one, um in self.encoders if "token_px" in one]
        return float(max(sizes)) if self.made["dense"] and sizes else None

    @property
    def encoders(self) -> list[tuple[dict[str, Any], float]]:
        """Each encoder, and the edge of its tile in µm."""
        encoder = self.made["encoder"]
        each = list(encoder["joined"].values()) if "joined" in encoder else [encoder]
        return list(zip(each, np.atleast_1d(self.made["tile_um"]).tolist(), strict=True))

    @property
    def params(self) -> dict[str, Any]:
        """Arguments of the call."""
        return self.made["params"]

    @property
    def baseline(self) -> str | None:
        """The best baseline."""
        return next((name for name in self.held_out if name in _BASELINES and name != self.made["head"]), None)

    @property
    def better(self) -> list[str]:
        """Baselines that the head did not beat, best first."""
        return better_baselines(self.made["head"], self.held_out)

    def warnings(self, *, scores: pd.DataFrame | None) -> list[tuple[str, str]]:
        """Warnings, each in a few words and in sentences."""
        made, n = self.made, self.table.n_vars
        found = []
        if self.better:
            names = " and ".join(self.better)
            text = f"On held-out spots {names} predicted as well, or better."
            text += f" Consider head={self.better[0]!r}." if self.better[0] != "mean" else " Nothing was learnt."
            found.append((f"the head {made['head']} did not beat {names}", text))
        if self.n_predictable < _FEW * n:
            text = "The maps of all other genes are not confirmed on held-out spots."
            found.append((f"only {self.n_predictable:,} of {n:,} genes are predictable", text))
        if not self.measured:
            text = (
                "The scores are those of the sections that the model was fitted on. They were not checked here, and no "
            )
            text += "prediction intervals are given: those of other sections would be too narrow."
            found.append(("nothing was measured on this section", text))
        elif self.far > _FAR:
            text = (
                f"They lie more than one pitch ({float(made['pitch_um']):.4g} µm) from every measured spot. "
                "Predictions and their intervals are not checked at this distance from the measurements."
            )
            found.append((f"{self.far:.1%} of the targets are far from all spots", text))
        if self.missing:
            text = (
                f"This SpatialData has no {' and no '.join(self.missing)}: put the predicted table and its shapes into "
                "the SpatialData of the section."
            )
            found.append(("there are no maps", text))
        bin_um = self.params.get("bin_um")
        if bin_um and self.token_um and bin_um < 0.99 * self.token_um:
            text = (
                f"The encoder's tokens are {self.token_um:.3g} µm wide: bins of {bin_um:g} µm show no more than these."
            )
            found.append(("bins are finer than a token", text))
        if scores is not None and (scores["protocol"] != "held-out").any():
            text = "The evaluation also scored spots that heads were trained on. These scores measure memory."
            found.append(("the evaluation was not held out", text))
        return found

    def call(self) -> str:
        """Write the call that repeats the prediction; an object is written as ``...``."""
        lines = ["import histosge as sge", "", "sge.tl.predict(", "    sdata,"]
        for name, value in self.params.items():
            is_object = isinstance(value, str) and value.startswith("<")
            lines.append(f"    {name}=...,  # {value}" if is_object else f"    {name}={_python(value)},")
        return "\n".join([*lines, ")"])


def _python(value: Any) -> str:
    """Write a value as Python, with strings in double quotes."""
    value = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_python(k)}: {_python(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        rows = [", ".join(map(_python, value[i : i + 8])) for i in range(0, len(value), 8)]
        return f"[{rows[0]}]" if len(rows) == 1 else "\n        ".join(["[", *(f"{row}," for row in rows)]) + "\n    ]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _draw(run: _Run, *, wanted: list[str], scores: pd.DataFrame | None) -> dict[str, list[Picture]]:
    """Draw all pictures, by part of the page."""
    from histosge.pl._domains import domains
    from histosge.pl._evaluation import evaluation
    from histosge.pl._expression import expression
    from histosge.pl._training import training

    table, made, key = run.table, run.made, run.key
    drawn: dict[str, list[Picture]] = {"maps": [], "domains": [], "training": [], "evaluation": []}
    if scores is not None:  # first, since it may raise
        axes = evaluation(scores)
        alt = (
            "Scores of every head: a box of all genes' correlations and, where scored, gene by gene, prediction "
            "intervals, smoothness."
        )
        caption = f"Result of sge.tl.evaluate, split {scores['split'].iloc[0]!r}."
        drawn["evaluation"] = pictures_of(axes, [(alt, caption)])
    if "training" in made:
        alt = "Loss against epoch, a line for each fold and a panel for each head that is trained."
        drawn["training"] = pictures_of(training(run.sdata, key=key), [(alt, "A line for each fold.")])
    if run.missing:
        return drawn
    there = {"image": True, "measured": run.measured, "predicted": True, "width": run.has_intervals}
    panels = [name for name in _PANELS if there[name]]
    texts: list[tuple[str, str]] = []
    for gene, row in table.var.loc[wanted].iterrows():
        sure = "." if row["predictable"] else ". NOT predictable: this map is not confirmed."
        alt = f"{gene}, side by side: {', '.join(_PANELS[name] for name in panels)}."
        texts.append((alt, f"{gene}: held-out correlation {row['held_out_pcc']:.3f}{sure}"))
    for i in range(0, len(wanted), _N_MAPS):  # a few at once: they share the raster
        some = slice(i, i + _N_MAPS)
        axes = expression(run.sdata, wanted[some], key=key, panels=panels, panel_size=_PANEL_SIZE)
        drawn["maps"] += pictures_of(axes, texts[some])
    for column in (name for name in _DOMAINS if name in table.obs):
        n = table.obs[column].nunique()
        alt = f"The H&E image and the {n} domains of {column}, each in its own colour."
        drawn["domains"] += pictures_of(
            domains(run.sdata, key=key, domain=column), [(alt, f"{n} domains, of obs[{column!r}].")]
        )
    return drawn


def _page(run: _Run, pictures: dict[str, list[Picture]], *, wanted: list[str], scores: pd.DataFrame | None) -> str:
    """Fill the page."""
    from jinja2 import Environment, StrictUndefined  # a dependency of torch; unlike an f-string it escapes every value

    ranked = run.table.var[[c for c in _COLUMNS if c in run.table.var]].sort_values(
        "held_out_pcc", ascending=False, kind="stable"
    )
    listed = [(rank, gene) for rank, gene in enumerate(ranked.index, 1) if rank <= _N_LISTED or gene in set(wanted)]
    csv = ranked.to_csv(index_label="gene", lineterminator="\n").encode()
    name = run.made["coordinate_system"]
    env = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    template = env.from_string(files("histosge.pl").joinpath("report.html").read_text(encoding="utf-8"))
    return template.render(
        run=run,
        made=run.made,
        encoders=run.encoders,
        section=name if name != "global" else run.made.get("spots", run.made["image"]),
        generator=f"histosge {version('histosge')}",
        date=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        baselines=_BASELINES,
        level=LEVEL,
        ranked=ranked,
        listed=listed,
        csv=data_uri(csv, "text/csv;charset=utf-8"),
        provenance=",\n ".join(
            f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False, default=_plain)}"
            for name, value in run.made.items()
        ),
        warnings=run.warnings(scores=scores),
        pictures=pictures,
    )


def _plain(value: Any) -> Any:
    """Convert numbers and arrays of numpy for JSON."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else str(value)
