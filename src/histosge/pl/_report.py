"""One self-contained HTML page of a run."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from histosge import _keys
from histosge._atomic import replacing
from histosge._settings import logger
from histosge._statistics import LEVEL, better_baselines
from histosge.pl._canvas import predicted_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray
    from spatialdata import SpatialData

_N_MAPS = 4
_N_LISTED = 50
_BASELINES = {
    "nearest": "interpolation of the measured spots",
    "ridge": "ridge regression on the image",
    "mean": "each gene's mean: a constant, 0 by definition",
}
_FEW = 0.5
"""Share of predictable genes below which the page warns."""
_FAR = 0.01
"""Share of places beyond one pitch above which the page warns."""
_DOMAINS = ("domain", "leiden")
_PANELS = {
    "image": "the H&E image",
    "measured": "expression measured at the spots",
    "predicted": "expression predicted at all places",
    "width": "width of the prediction interval",
}
_COLUMNS = ("held_out_pcc", "held_out_mse", "predictable", "highly_variable", "shrinkage")
_MOST_PX = 1800
_DPI = 144
_PANEL_SIZE = 2.8
"""Edge of a panel of a map in inches: small, so that its text is large."""
_MARK = re.compile(rb'<meta name="generator" content="histosge[ "]')


@dataclass(frozen=True)
class _Picture:
    """A figure as part of the page."""

    src: str
    width: int
    height: int
    alt: str
    caption: str

    @property
    def width_css(self) -> int:
        """Width at which it is as large as matplotlib meant it: no picture is drawn larger."""
        return round(self.width * 96 / _DPI)


def report(
    sdata: SpatialData,
    path: str | Path,
    *,
    key: str = "histosge",
    scores: pd.DataFrame | None = None,
    genes: str | Sequence[str] | None = None,
) -> Path:
    """Write one HTML page about a run: what was predicted from what, how well, and what to be careful of.

    The page is complete in itself: pictures, styles and the table of all genes are inside, and it loads nothing from
    elsewhere, so that it can be sent by mail and opened without network.

    Parameters
    ----------
    sdata
        Section with a table that :func:`histosge.tl.predict` wrote.
    path
        File to write, ``"report.html"``. A report that histosge wrote before is replaced; another file is not.
    key
        Name of the predicted table.
    scores
        What :func:`histosge.tl.evaluate` returned for this section, to be drawn as well.
    genes
        Genes to map, and to list among the others. ``None`` maps the four predicted best.

    Returns
    -------
    The path. On the page, as far as they are there: the run; held-out scores beside those of the simple rivals; what the
    prediction intervals say; the 50 genes predicted best and ``genes``, and a CSV file of all; maps; the domains of
    ``obs["domain"]`` and ``obs["leiden"]``; curves of the training; ``scores``; warnings; how to cite; the call and all of
    ``uns["histosge"]``. Nothing is written into ``sdata``.

    Raises
    ------
    KeyError
        Where there is no such table or gene.
    TypeError
        Where ``scores`` is no DataFrame.
    ValueError
        Where ``scores`` mixes what does not compare.
    FileNotFoundError
        Where the folder of ``path`` is not there.
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
    with _figures_closed():
        pictures = _draw(run, wanted=wanted, scores=scores)
    page = _page(run, pictures, wanted=wanted, scores=scores)
    if path.exists():
        logger.info("replacing the report %s of an earlier run", path)
    with replacing(path) as draft:
        draft.write_text(page, encoding="utf-8", newline="\n")
    logger.info("wrote %s (%.1f MB)", path, path.stat().st_size / 1e6)
    return path


def _writable(path: Path) -> Path:
    """Refuse a path that nothing should be written to, before the work."""
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
            msg = f"path={str(path)!r} exists, and histosge.pl.report did not write it. Choose another name, or move it away."
            raise FileExistsError(msg)
    return path


def _wanted(table: AnnData, genes: str | Sequence[str] | None) -> list[str]:
    """Genes to map: those asked for, or the best that are predictable."""
    if genes is None:
        best = table.var[table.var["predictable"].to_numpy(bool)]["held_out_pcc"].nlargest(_N_MAPS).index
        return [str(g) for g in best]
    asked = list(dict.fromkeys([genes] if isinstance(genes, str) else genes))
    missing = [g for g in asked if g not in table.var_names]
    if missing:
        msg = (
            f"genes {missing} were not predicted. Predict them with genes=[...]; here are {list(table.var_names[:5])} …"
        )
        raise KeyError(msg)
    return asked


@contextmanager
def _figures_closed() -> Iterator[None]:
    """Close the figures that are opened inside, and no others."""
    import matplotlib.pyplot as plt

    before = set(plt.get_fignums())
    try:
        yield
    finally:
        for number in set(plt.get_fignums()) - before:
            plt.close(number)


def _pictures(axes: NDArray[Any], texts: list[tuple[str, str]]) -> list[_Picture]:
    """Turn the figure of some axes, (rows, panels) or (panels,), into a picture for each row, with alt text and caption."""
    import matplotlib.pyplot as plt
    from matplotlib.transforms import Bbox
    from PIL import Image, ImageChops, ImageOps

    figure = axes.flat[0].figure
    dpi = min(_DPI, _MOST_PX / figure.get_figwidth())
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi, transparent=False)
    whole = Image.open(drawn).convert("RGB")
    boxes = [Bbox.union([ax.get_tightbbox() for ax in row]) for row in np.atleast_2d(axes)]
    cuts = [(above.y0 + below.y1) / 2 * dpi / figure.dpi for above, below in pairwise(boxes)]
    edges = [0, *(round(whole.height - cut) for cut in cuts), whole.height]
    plt.close(figure)
    found = []
    for (top, bottom), (alt, caption) in zip(pairwise(edges), texts, strict=True):
        part = whole.crop((0, top, whole.width, bottom))
        drawn_on = ImageChops.difference(part, Image.new("RGB", part.size, "white")).getbbox()
        part = ImageOps.expand(part.crop(drawn_on), border=8, fill="white")
        kinds: dict[str, dict[str, Any]] = {
            "png": {"optimize": True},
            "jpeg": {"quality": 88, "subsampling": 0, "optimize": True},
        }
        encoded = {kind: io.BytesIO() for kind in kinds}
        for kind, options in kinds.items():
            part.save(encoded[kind], format=kind, **options)
        n_png, n_jpeg = (len(content.getvalue()) for content in encoded.values())
        kind = "jpeg" if n_jpeg < 0.7 * n_png else "png"  # text is sharper as PNG
        found.append(_Picture(_data_uri(encoded[kind].getvalue(), f"image/{kind}"), *part.size, alt, caption))
    return found


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


@dataclass(frozen=True)
class _Run:
    """A predicted table, and what the page says of it."""

    sdata: SpatialData
    table: AnnData
    key: str

    @property
    def made(self) -> dict[str, Any]:
        return self.table.uns[_keys.UNS]

    @property
    def region(self) -> str:
        """Name of the places."""
        return str(self.table.obs[_keys.REGION].iloc[0])

    @property
    def measured(self) -> bool:
        """Whether anything was measured on this section."""
        return bool(self.made.get("spots"))

    @property
    def has_intervals(self) -> bool:
        """Whether prediction intervals can be computed."""
        return _keys.INTERVALS in self.table.varm

    @property
    def missing(self) -> list[str]:
        """Elements that the table was predicted from, or describes, and that are not here."""
        named = {"images": self.made["image"], "shapes": self.made.get("spots"), "tables": self.made.get("table")}
        asked = [*named.items(), ("shapes", self.region)]
        return [f"{kind}[{name!r}]" for kind, name in asked if name and name not in getattr(self.sdata, kind)]

    @property
    def held_out(self) -> dict[str, float]:
        """Held-out correlations of the head, its parts and its rivals, best first; a constant scores 0 by definition."""
        found = {"mean": 0.0} | {name: float(score["pcc"]) for name, score in self.made["held_out"].items()}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    @property
    def n_predictable(self) -> int:
        return int(self.table.var["predictable"].sum())

    @property
    def far(self) -> float:
        """Share of places more than a pitch from all spots."""
        distance_um = self.table.obs["distance_to_spot_um"].to_numpy(float)
        return float(np.mean(~(distance_um <= float(self.made["pitch_um"]) * (1 + 1e-6))))

    @property
    def token_um(self) -> float | None:
        """Edge of a token, where places were embedded by their area."""
        sizes = [um * one["token_px"] / one["tile_px"] for one, um in self.encoders if "token_px" in one]
        return float(max(sizes)) if self.made["dense"] and sizes else None

    @property
    def encoders(self) -> list[tuple[dict[str, Any], float]]:
        """Each encoder, and the edge of its tile in µm."""
        encoder = self.made["encoder"]
        each = list(encoder["joined"].values()) if "joined" in encoder else [encoder]
        return list(zip(each, np.atleast_1d(self.made["tile_um"]).tolist(), strict=True))

    @property
    def bin_um(self) -> float | None:
        """Edge of the bins that were laid."""
        element = self.sdata.shapes.get(self.region)
        laid = self.region == _keys.targets(self.key) and "array_col" in self.table.obs
        if not laid or element is None or element.geometry.iloc[0].geom_type == "Point":
            return None
        col, x_px = self.table.obs["array_col"].to_numpy(), self.table.obsm["spatial"][:, 0]
        first, last = np.argmin(col), np.argmax(col)
        step_px = (x_px[last] - x_px[first]) / max(col[last] - col[first], 1)
        return float(f"{step_px * float(self.made['mpp']):.6g}")

    @property
    def upsample(self) -> int | None:
        """Places per spot of the lattice that was laid: the determinant of the spots' lattice in that of the places."""
        laid = self.region == _keys.targets(self.key) and "array_col" in self.table.obs
        spots = self.table.obs[self.table.obs["is_spot"].to_numpy(bool)][:200]
        if not laid or self.bin_um is not None or len(spots) < 3:
            return None
        step = spots[["array_row", "array_col"]].to_numpy(np.int64)
        step = step[1:] - step[0]
        minors = np.outer(step[:, 0], step[:, 1]) - np.outer(step[:, 1], step[:, 0])
        return int(np.gcd.reduce(np.abs(minors).ravel()))

    @property
    def rival(self) -> str | None:
        """Best of the simple rivals."""
        return next((name for name in self.held_out if name in _BASELINES and name != self.made["head"]), None)

    @property
    def better(self) -> list[str]:
        """What the head did not beat, best first."""
        return better_baselines(self.made["head"], self.held_out)

    def warnings(self, *, scores: pd.DataFrame | None) -> list[tuple[str, str]]:
        """What a reader must know, in a few words and in a sentence."""
        made, n = self.made, self.table.n_vars
        found = []
        if self.better:
            told = " and ".join(self.better)
            text = f"On held-out spots {told} came as near to the measurement, or nearer."
            text += f" Consider head={self.better[0]!r}." if self.better[0] != "mean" else " Nothing was learnt."
            found.append((f"the head {made['head']} did not beat {told}", text))
        if self.n_predictable < _FEW * n:
            text = "The maps of all others show nothing that was confirmed on spots that were held out."
            found.append((f"only {self.n_predictable:,} of {n:,} genes are predictable", text))
        if not self.measured:
            text = "The scores are those of the sections that the model was fitted on; nothing vouches for them here, and no "
            text += "prediction intervals are given: those of other sections would be too narrow."
            found.append(("nothing was measured on this section", text))
        elif self.far > _FAR:
            text = (
                f"They lie more than one pitch ({float(made['pitch_um']):.4g} µm) from every measured spot. Nothing vouches "
                "for predictions and their intervals far from what was measured."
            )
            found.append((f"{self.far:.1%} of the places are far from all spots", text))
        if self.missing:
            text = (
                f"This SpatialData has no {' and no '.join(self.missing)}: put the predicted table, and its places, into "
                "that of the section."
            )
            found.append(("there are no maps", text))
        if self.bin_um and self.token_um and self.bin_um < 0.99 * self.token_um:
            text = f"The encoder's tokens are {self.token_um:.3g} µm wide: bins of {self.bin_um:g} µm show no more than these."
            found.append(("bins are finer than a token", text))
        if scores is not None and (scores["protocol"] != "held-out").any():
            text = "The evaluation scored spots that were trained on as well. Such scores measure memory."
            found.append(("the evaluation was not held out", text))
        return found

    def call(self) -> str:
        """Write the call that predicts this again, as far as it was recorded."""
        made = self.made
        changed = [um for one, um in self.encoders if abs(um - one["mpp"] * one["tile_px"]) > 1e-6]
        laid = self.region == _keys.targets(self.key)
        counted = bool(self.table.var["highly_variable"].all())
        learnt = {
            "head": made["head"],
            "genes": self.table.n_vars if counted else f"list(pd.read_csv('{self.key}_genes.csv')['gene'])",
            "n_folds": int(made["n_folds"]),
        }
        where = {
            "image_key": made["image"],
            "spots_key": made.get("spots"),
            "table_key": made.get("table"),
            "layer": made.get("layer"),
            "coordinate_system": made["coordinate_system"],
            "mpp": float(made["mpp"]) if made["mpp_source"] == "given" else None,
            "pitch_um": float(made["pitch_um"]) if made["mpp_source"] == "pitch_um given" else None,
            "encoder": made["encoder"]["name"],
            "tile_um": changed[0] if changed else None,
        }
        asked = {
            "upsample": self.upsample,
            "bin_um": self.bin_um,
            "target_key": None if laid else self.region,
            "dense": None if laid and bool(made["dense"]) == (self.bin_um is not None) else bool(made["dense"]),
            "tissue": "spots" if made["tissue"] == "within reach of a measured spot" else None,
            "conserve": True if "conserved" in self.table.layers else None,
            "key_added": self.key,
            "rng": None if made["seed"] == "generator" else int(made["seed"]),
        }
        plain = {name: _python(value) for name, value in (where | learnt | asked).items() if value is not None}
        if not counted:
            plain["genes"] = str(learnt["genes"])
        if not self.measured:
            plain = {name: value for name, value in plain.items() if name not in learnt}
            plain["model"] = 'sge.Model.load("model")'
        first = [] if counted or not self.measured else ["import pandas as pd"]
        lines = ["import histosge as sge", *first, "", "sge.tl.predict(", "    sdata,"]
        return "\n".join([*lines, *(f"    {name}={value}," for name, value in plain.items()), ")"])


def _python(value: Any) -> str:
    """Write a value as Python, strings in double quotes as elsewhere."""
    return repr(value) if isinstance(value, bool) else json.dumps(value, ensure_ascii=False)


def _draw(run: _Run, *, wanted: list[str], scores: pd.DataFrame | None) -> dict[str, list[_Picture]]:
    """Draw what there is to draw, by section of the page."""
    from histosge import pl

    table, made, key = run.table, run.made, run.key
    drawn: dict[str, list[_Picture]] = {"maps": [], "domains": [], "training": [], "evaluation": []}
    if scores is not None:  # first: it may be refused
        axes = pl.evaluation(scores)
        alt = "Scores of every head: a box of all genes' correlations and, as far as scored, gene by gene, prediction intervals, smoothness."
        caption = f"What sge.tl.evaluate found, split {scores['split'].iloc[0]!r}."
        drawn["evaluation"] = _pictures(axes, [(alt, caption)])
    if "training" in made:
        alt = "Loss against epoch, a line for each fold and a panel for each head that is trained."
        drawn["training"] = _pictures(pl.training(run.sdata, key=key), [(alt, "A line for each fold.")])
    if run.missing:
        return drawn
    there = {"image": True, "measured": run.measured, "predicted": True, "width": run.has_intervals}
    panels = [name for name in _PANELS if there[name]]
    texts: list[tuple[str, str]] = []
    for gene, row in table.var.loc[wanted].iterrows():
        sure = "." if row["predictable"] else ". NOT predictable: this map shows nothing that was confirmed."
        alt = f"{gene}, side by side: {', '.join(_PANELS[name] for name in panels)}."
        texts.append((alt, f"{gene}: held-out correlation {row['held_out_pcc']:.3f}{sure}"))
    for i in range(0, len(wanted), _N_MAPS):  # a few at once: what lies under each pixel is found once for them
        some = slice(i, i + _N_MAPS)
        axes = pl.expression(run.sdata, wanted[some], key=key, panels=panels, panel_size=_PANEL_SIZE)
        drawn["maps"] += _pictures(axes, texts[some])
    for column in (name for name in _DOMAINS if name in table.obs):
        n = table.obs[column].nunique()
        alt = f"The H&E image and the {n} domains of {column}, each in a colour of its own."
        drawn["domains"] += _pictures(
            pl.domains(run.sdata, key=key, domain=column), [(alt, f"{n} domains, of obs[{column!r}].")]
        )
    return drawn


def _page(run: _Run, pictures: dict[str, list[_Picture]], *, wanted: list[str], scores: pd.DataFrame | None) -> str:
    """Fill the page."""
    from jinja2 import Environment, StrictUndefined  # comes with torch; escapes every value, which no f-string does

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
        rivals=_BASELINES,
        level=LEVEL,
        ranked=ranked,
        listed=listed,
        csv=_data_uri(csv, "text/csv;charset=utf-8"),
        provenance=",\n ".join(
            f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False, default=_plain)}"
            for name, value in run.made.items()
        ),
        warnings=run.warnings(scores=scores),
        pictures=pictures,
    )


def _plain(value: Any) -> Any:
    """Turn numbers and arrays of numpy into JSON's."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else str(value)
