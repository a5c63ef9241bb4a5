"""The HTML report: what it says is what is in the table, it carries everything with it, and nothing in it runs by accident."""

from __future__ import annotations

import ast
import base64
import hashlib
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import anndata as ad
import dask.array as da
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from spatialdata import SpatialData, read_zarr
from spatialdata.models import TableModel

import histosge as sge
from histosge._section import open_table

VOID = {"meta", "link", "img", "input", "br", "hr"}


class Page(HTMLParser):
    """A parsed page: its tags, its text by id, its tables; open and close tags must match."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.html, self.tags, self.open, self.texts = html, [], [], {}
        self.feed(html)
        self.close()
        assert self.open == [], "tags left open"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("id")))
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {tag} {attrs}"

    def handle_endtag(self, tag):
        assert self.open[-1][0] == tag, f"</{tag}> closes <{self.open[-1][0]}>"
        self.open.pop()

    def handle_data(self, data):
        for _, name in self.open:
            if name:
                self.texts[name] = self.texts.get(name, "") + data

    def find(self, tag, **attrs):
        return [a for t, a in self.tags if t == tag and all(a.get(k) == v for k, v in attrs.items())]

    def text(self, name):
        return re.sub(r"\s+", " ", self.texts[name]).strip()

    @property
    def sections(self):
        return [a["id"] for a in self.find("section")]

    @property
    def csv(self):
        (link,) = self.find("a", id="gene-csv")
        content = base64.b64decode(link["href"].removeprefix("data:text/csv;charset=utf-8;base64,"))
        return pd.read_csv(io.BytesIO(content), index_col="gene", keep_default_na=False)


def read(path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def rows(page: Page, name: str) -> list[list[str]]:
    """Cells of the body of the table with this id, or of the only table in the section with it."""
    part = page.html[page.html.index(f'id="{name}"') :]
    body = part[part.index("<tbody>") : part.index("</tbody>")]
    cells = [
        re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, flags=re.S) for row in re.findall(r"<tr.*?</tr>", body, re.S)
    ]
    return [[re.sub("<.*?>", "", cell).strip() for cell in row] for row in cells]


@pytest.fixture(scope="module")
def once(_section_once):
    s = _section_once
    sdata = SpatialData(images=dict(s.images), shapes=dict(s.shapes), tables={"table": s.tables["table"].copy()})
    sge.tl.predict(sdata, encoder="stain-texture", head="ridge", genes=20, n_folds=2, upsample=2)
    return sdata


@pytest.fixture
def predicted(once):
    s = once
    tables = {name: table.copy() for name, table in s.tables.items()}
    return SpatialData(images=dict(s.images), shapes=dict(s.shapes), tables=tables)


@pytest.fixture(scope="module")
def scores():
    """As of tl.evaluate: two heads, 20 genes, one split."""
    heads, genes = np.repeat(["ridge", "mean"], 20), [f"GENE{i:03}" for i in range(20)] * 2
    pcc = np.concatenate([np.linspace(0.1, 0.9, 20), np.zeros(20)])
    told = {
        "split": "blocks",
        "protocol": "held-out",
        "head": heads,
        "gene": genes,
        "pcc": pcc,
        "coverage": 0.9,
        "width": 1.0,
    }
    return pd.DataFrame(told)


@pytest.fixture(scope="module")
def full(once, scores, tmp_path_factory):
    """Everything there can be, once: two maps, domains, training, evaluation."""
    s = once
    table = s.tables["histosge"].copy()
    table.obs["domain"] = pd.Categorical(np.where(table.obsm["spatial"][:, 0] > 426, "right", "left"))
    table.uns["histosge"]["training"] = {
        "head": np.repeat("in-context", 6).astype(object),
        "fold": np.repeat([0, 1], 3),
        "epoch": np.tile([0, 1, 2], 2),
        "loss": np.linspace(1, 0.5, 6),
    }
    sdata = SpatialData(images=dict(s.images), shapes=dict(s.shapes), tables={"table": s["table"], "histosge": table})
    path = tmp_path_factory.mktemp("report") / "report.html"
    assert sge.pl.report(sdata, path, scores=scores, genes=["GENE003", "GENE001"]) == path
    return read(path)


def test_every_section_is_there(full):
    assert full.sections == [
        "run", "scores", "intervals", "genes", "maps", "domains", "training", "evaluation", "warnings", "cite", "provenance",
    ]  # fmt: skip
    targets = {a["id"] for _, a in full.tags if "id" in a}
    links = {a["href"].removeprefix("#") for a in full.find("a") if a["href"].startswith("#")}
    assert set(full.sections) <= links <= targets
    assert len(targets) == sum("id" in a for _, a in full.tags)


def test_is_a_document_that_anyone_can_read(full):
    assert full.html.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert full.find("meta", charset="utf-8")
    assert full.find("meta", name="viewport")
    assert len(full.find("h1")) == len(full.find("title")) == 1
    tables = len(full.find("table"))
    assert tables == len(full.find("caption")) == 3
    assert {a.get("scope") for a in full.find("th")} == {"row", "col"}
    for rule in ("prefers-color-scheme: dark", "@media print", "size: A4", "max-width: 40rem"):
        assert rule in full.html


def test_pictures_are_inside_and_described(full):
    pictures = full.find("img")
    assert len(pictures) == 5  # two genes, domains, training, evaluation
    for picture in pictures:
        assert len(picture["alt"]) > 30
        kind, content = picture["src"].split(";base64,")
        image = Image.open(io.BytesIO(base64.b64decode(content)))
        assert kind == f"data:image/{image.format.lower()}"
        assert (str(image.width), str(image.height)) == (picture["width"], picture["height"])
        assert np.asarray(image).std() > 5
        assert image.width <= 2000
    assert [p["alt"].split(",")[0] for p in pictures[:2]] == ["GENE003", "GENE001"]
    assert all("H&E" in p["alt"] and "width of the prediction interval" in p["alt"] for p in pictures[:2])


def test_nothing_is_loaded_from_elsewhere(full):
    for tag, attrs in full.tags:
        assert tag not in {"link", "iframe", "object", "embed", "base", "form"}
        assert tag == "a" or "href" not in attrs
        assert attrs.get("src", "data:image/").startswith("data:image/")
        assert not {"srcset", "onerror", "onclick", "onload"} & attrs.keys()
    for style in (full.html[m.end() : full.html.index("</style>")] for m in re.finditer("<style>", full.html)):
        assert "url(" not in style
        assert "@import" not in style
    (policy,) = full.find("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'; img-src data:;")
    assert len(full.html) < 5e6


def scripts(html: str) -> list[str]:
    return re.findall(r"<script[^>]*>(.*?)</script>", html, flags=re.S)


def test_only_our_own_script_runs(full):
    (script,) = scripts(full.html)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = full.find("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].endswith(f"script-src 'sha256-{digest}'")


def test_numbers_are_those_of_the_table(full, once):
    table = once["histosge"]
    best = table.var.sort_values("held_out_pcc", ascending=False)
    for rank, (row, (gene, told)) in enumerate(zip(rows(full, "gene-table"), best.iterrows(), strict=True), 1):
        yes = "yes" if told["predictable"] else "no"
        assert row == [str(rank), gene, f"{told['held_out_pcc']:.3f}", f"{told['held_out_mse']:.3f}", yes]
    written = full.csv
    assert list(written.index) == list(best.index)
    for column in ("held_out_pcc", "held_out_mse", "predictable", "highly_variable"):
        np.testing.assert_array_equal(written[column].to_numpy(best[column].dtype), best[column].to_numpy())
    held_out = table.uns["histosge"]["held_out"]
    told = {row[0].split(" ")[0]: row[1:3] for row in rows(full, "scores")}
    assert told == {n: [f"{s['pcc']:.3f}", f"{s['mse']:.3f}"] for n, s in held_out.items()} | {"mean": ["0.000", ""]}
    n = int(table.var["predictable"].sum())
    assert full.text("predictable").startswith(f"{n} of 20 genes ({n / 20:.0%}".replace("%", " %"))
    assert "contains about 90 %" in full.text("intervals")


def test_run_says_what_was_predicted_from_what(full, once):
    table = once["histosge"]
    told = dict(rows(full, "run"))
    assert told["Image"] == "he"
    assert told["Scale"] == "2 µm per pixel (from the pitch, 50.0 px = 100 µm)"
    assert told["Learnt from"] == "138 measured spots, pitch 100 µm (visium)"
    assert told["Places"].startswith(f"{table.n_obs} (histosge_targets), 2 for each spot; ")
    assert told["Encoder"].startswith("stain-texture, built in")
    assert (told["Tile"], told["Seed"]) == ("256 µm", "0")
    assert told["Head"].startswith("ridge: ")
    assert f"histosge {sge.__version__}" in told["Versions"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d \S+", told["Page written"])


def test_provenance_is_whole(full, once):
    import json

    told = json.loads(full.texts["json"])
    made = once["histosge"].uns["histosge"]
    assert set(told) == set(made) | {"training"}
    assert told["held_out"] == made["held_out"]
    assert told["encoder"]["mean"] == list(made["encoder"]["mean"])


def called(page: Page) -> dict[str, object]:
    """Arguments of the call on the page."""
    (call,) = (n for n in ast.walk(ast.parse(page.texts["call"])) if isinstance(n, ast.Call) and n.keywords)
    return {k.arg: ast.literal_eval(k.value) for k in call.keywords}


def test_the_call_makes_the_same_table(full, sdata, once):
    exec(full.texts["call"], {"sdata": sdata})
    one, other = sdata["histosge"], once["histosge"]
    np.testing.assert_array_equal(one.X, other.X)
    np.testing.assert_array_equal(one.varm["histosge_intervals"], other.varm["histosge_intervals"])
    assert list(one.var_names) == list(other.var_names)


def test_the_call_is_that_of_the_parameters(predicted, tmp_path):
    """As they come back from a file: arrays, and names that must not run."""
    genes = ['a"b', *(f"GENE{i:03}" for i in range(20))]
    params = {
        "mpp": 0.97,
        "layer": "counts",
        "genes": np.array(genes, object),
        "conserve": False,
        "head_options": {"ridge": {"alphas": np.array([1.0, 2.5])}},
        "model": "<Model 12ab>",
        "rng": "<generator>",
    }
    predicted["histosge"].uns["histosge"]["params"] = params
    page = read(sge.pl.report(predicted, tmp_path / "r.html", genes=[]))
    told = called(page)
    assert told.pop("model") is told.pop("rng") is ...
    wanted = params | {"genes": genes, "head_options": {"ridge": {"alphas": [1.0, 2.5]}}}
    assert told == {name: value for name, value in wanted.items() if name not in ("model", "rng")}
    assert "    model=...,  # <Model 12ab>" in page.texts["call"]
    assert "named in angle brackets: pass them yourself" in page.text("provenance")


def test_bins_and_tokens(predicted, tmp_path):
    places = sge.pp.targets(predicted, bin_um=40, inplace=False)
    old, n = predicted["histosge"], len(places)
    obs = places[["array_row", "array_col"]].assign(is_spot=False, in_spot=True, distance_to_spot_um=10.0)
    obs = obs.assign(region=pd.Categorical(["histosge_targets"] * n), instance_id=places.index).rename(index=str)
    uns = {"histosge": old.uns["histosge"] | {"dense": True, "params": {"bin_um": 40.0}}}
    table = ad.AnnData(np.zeros((n, 20), np.float32), obs=obs, var=old.var.copy(), uns=uns)
    middle = places.geometry.centroid
    table.obsm["spatial"] = np.column_stack([middle.x, middle.y])
    del predicted.tables["histosge"]
    predicted.shapes["histosge_targets"] = places
    predicted.tables["histosge"] = TableModel.parse(
        table, region="histosge_targets", region_key="region", instance_key="instance_id"
    )
    table.obsm["spatial"] = 20 * (places[["array_col", "array_row"]].to_numpy() + 0.5)  # pixels of 2 µm
    page = read(sge.pl.report(predicted, tmp_path / "r.html", genes="GENE000"))
    assert ", bins of 40 µm;" in dict(rows(page, "run"))["Places"]
    assert "in tokens of 8 µm" in dict(rows(page, "run"))["Tile"]
    assert page.text("intervals") == "What the prediction intervals say This table has none."
    (picture,) = page.find("img")
    assert "interval" not in picture["alt"]
    assert "finer than a token" not in page.text("warnings")
    predicted["histosge"].uns["histosge"]["encoder"] = dict(uns["histosge"]["encoder"], token_px=32)
    assert "Bins are finer than a token." in read(sge.pl.report(predicted, tmp_path / "r.html", genes=[])).text(
        "warnings"
    )


NASTY = ["<script>alert(1)</script>", "\"><img src=x onerror='alert(2)'>", 'a,b"c', "{{ 7 * 7 }}", "&lt;b&gt;"]


@pytest.fixture
def nasty(predicted):
    table = predicted["histosge"]
    table.var_names = [*NASTY, *table.var_names[len(NASTY) :]]
    table.var["held_out_pcc"] = np.linspace(0.9, 0.1, 20).astype(np.float32)
    table.uns["histosge"]["coordinate_system"] = "</title><script>alert(3)</script>"
    table.uns["histosge"]["versions"]["torch"] = "<b>2</b>"
    return predicted


def test_text_stays_text(nasty, tmp_path):
    page = read(sge.pl.report(nasty, tmp_path / "r.html", genes=[]))
    assert len(scripts(page.html)) == len(page.find("script")) == 1
    assert page.find("b") == page.find("img") == []
    assert page.texts["gene-table"].count(NASTY[0]) == 1
    for name in NASTY:
        assert name in page.texts["gene-table"]
    assert list(page.csv.index[: len(NASTY)]) == NASTY


def test_text_in_pictures_stays_text(nasty, tmp_path):
    nasty["table"].var_names = [*NASTY, *nasty["table"].var_names[len(NASTY) :]]
    nasty["histosge"].uns["histosge"]["coordinate_system"] = "synthetic"
    page = read(sge.pl.report(nasty, tmp_path / "r.html", genes=NASTY[1]))
    (picture,) = page.find("img")
    assert picture["alt"].startswith(f"{NASTY[1]}, ")
    assert "onerror" not in picture


def test_says_whether_the_head_won(predicted, tmp_path):
    made = predicted["histosge"].uns["histosge"]
    path = tmp_path / "r.html"
    made["held_out"] = {"ridge": {"pcc": 0.5, "mse": 1.0}, "nearest": {"pcc": 0.42, "mse": 1.1}}
    page = read(sge.pl.report(predicted, path, genes=[]))
    assert "a correlation of 0.500 with the measurement" in page.text("verdict")
    assert "nearest (interpolation of the measured spots), reaches 0.420: the head won, by 0.080." in page.text(
        "verdict"
    )
    assert "None" in page.text("warnings")
    made["held_out"]["nearest"]["pcc"] = 0.6
    page = read(sge.pl.report(predicted, path, genes=[]))
    assert "the head did not win, it is 0.100 behind" in page.text("verdict")
    assert "The head ridge did not beat nearest." in page.text("warnings")
    assert "Consider head='nearest'" in page.text("warnings")
    assert "ridge did not beat nearest" in page.text("scores")
    assert [row[0].split()[0] for row in rows(page, "scores")] == ["nearest", "ridge", "mean"]


def test_a_part_of_the_head_is_no_baseline(predicted, tmp_path):
    made = predicted["histosge"].uns["histosge"]
    made["head"] = "in-context+kriging"
    pcc = {"in-context+kriging": 0.5, "in-context": 0.505, "kriging": 0.4, "ridge": 0.3, "nearest": 0.2}
    made["held_out"] = {name: {"pcc": value, "mse": 1.0} for name, value in pcc.items()}
    page = read(sge.pl.report(predicted, tmp_path / "r.html", genes=[]))
    assert "ridge (ridge regression on the image), reaches 0.300: the head won, by 0.200" in page.text("verdict")
    assert "None" in page.text("warnings")  # within a hundredth is as good
    assert "in-context (a part of it)" in page.text("scores")
    made["held_out"]["in-context"]["pcc"] = 0.52
    page = read(sge.pl.report(predicted, tmp_path / "r.html", genes=[]))
    assert "did not beat in-context." in page.text("warnings")


def test_warns_of_what_a_reader_must_know(predicted, scores, tmp_path):
    table = predicted["histosge"]
    table.var["predictable"] = np.arange(20) < 3
    far = np.arange(table.n_obs) < 30
    table.obs["distance_to_spot_um"] = np.where(far, 150, 20).astype(np.float32)
    table.uns["histosge"]["held_out"]["ridge"]["pcc"] = -0.1
    page = read(
        sge.pl.report(predicted, tmp_path / "r.html", genes="GENE005", scores=scores.assign(protocol="published"))
    )
    told = page.text("warnings")
    assert "Only 3 of 20 genes are predictable." in told
    assert f"{30 / table.n_obs:.1%} of the targets are far from all spots" in told
    assert "The head ridge did not beat nearest and mean." in told
    assert "also scored spots that heads were trained on" in told
    assert "4 warnings:" in page.text("scores")
    assert "Warnings (4)" in page.html
    assert "GENE005: held-out correlation" in page.text("maps")
    assert "NOT predictable" in page.text("maps")


def test_best_predictable_genes_are_mapped(predicted, tmp_path):
    table = predicted["histosge"]
    table.var["held_out_pcc"] = np.linspace(0.1, 0.9, 20).astype(np.float32)
    table.var["predictable"] = np.arange(20) < 2  # only these
    page = read(sge.pl.report(predicted, tmp_path / "r.html"))
    assert [p["alt"].split(",")[0] for p in page.find("img")] == ["GENE001", "GENE000"]


def test_sections_of_what_is_not_there_are_left_out(predicted, tmp_path):
    page = read(sge.pl.report(predicted, tmp_path / "r.html", genes=[]))
    assert page.sections == ["run", "scores", "intervals", "genes", "warnings", "cite", "provenance"]
    links = [a["href"] for a in page.find("a") if a["href"].startswith("#")]
    assert not {"#maps", "#domains", "#training", "#evaluation"} & set(links)


def test_every_gene_has_a_picture_of_its_own(predicted, tmp_path):
    """However many: rows of one figure are cut apart, and none is cut in two."""
    genes = [f"GENE{i:03}" for i in range(5)]  # four in one figure, one in the next
    pictures = read(sge.pl.report(predicted, tmp_path / "r.html", genes=genes)).find("img")
    assert [p["alt"].split(",")[0] for p in pictures] == genes
    assert len({p["src"] for p in pictures}) == 5
    heights = [int(p["height"]) for p in pictures]
    assert max(heights) - min(heights) < 5
    for picture in pictures:
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["src"].split(",")[1]))).convert("L"))
        frame = (pixels < 128).mean(axis=1) > 0.2  # rows that cross a dark edge or a panel
        assert not frame[0]
        assert not frame[-3:].any()


def test_fifty_genes_and_those_asked_for(tmp_path):
    sdata = sge.datasets.synthetic(n_rows=7, n_cols=7, n_genes=60, mpp=4.0)
    sge.tl.predict(sdata, encoder="stain-texture", head="nearest", genes=60, n_folds=2, upsample=2)
    best = sdata["histosge"].var["held_out_pcc"].sort_values(ascending=False, kind="stable").index
    page = read(sge.pl.report(sdata, tmp_path / "r.html", genes=best[54]))
    assert [row[:2] for row in rows(page, "gene-table")] == [[str(r), best[r - 1]] for r in (*range(1, 51), 55)]
    assert len(page.csv) == 60


def test_own_reports_are_replaced_and_nothing_else(predicted, tmp_path, log):
    path = tmp_path / "r.html"
    sge.pl.report(predicted, path, genes=[])
    assert "replacing" not in log.text
    sge.pl.report(predicted, str(path), genes=[])
    assert f"replacing the report {path}" in log.text
    path.write_text("<!DOCTYPE html><p>mine, made with histosge</p>", encoding="utf-8")
    with pytest.raises(FileExistsError, match=r"histosge\.pl\.report did not write it\. Choose another name"):
        sge.pl.report(predicted, path, genes=[])
    assert path.read_text(encoding="utf-8").endswith("mine, made with histosge</p>")
    with pytest.raises(FileExistsError, match="is a folder"):
        sge.pl.report(predicted, tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        sge.pl.report(predicted, tmp_path / "none" / "r.html")
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_refuses_what_is_not_there(predicted, scores, tmp_path):
    path = tmp_path / "r.html"
    with pytest.raises(KeyError, match=r"key='other' is not a table .* there are \['histosge'\]"):
        sge.pl.report(predicted, path, key="other")
    with pytest.raises(KeyError, match="key='table' is not a table that histosge.tl.predict wrote"):
        sge.pl.report(predicted, path, key="table")
    with pytest.raises(KeyError, match=r"genes \['NONE'\] were not predicted"):
        sge.pl.report(predicted, path, genes=["GENE000", "NONE"])
    with pytest.raises(TypeError, match="scores is a dict"):
        sge.pl.report(predicted, path, scores={})
    with pytest.raises(ValueError, match="lacks the columns"):
        sge.pl.report(predicted, path, scores=scores.drop(columns="pcc"))
    assert list(tmp_path.iterdir()) == []


def test_leaves_everything_as_it_was(predicted, tmp_path):
    before = {name: table.copy() for name, table in predicted.tables.items()}
    elements = {name: id(element) for _, name, element in predicted.gen_elements()}
    plt.close("all")  # of other tests
    mine, _ = plt.subplots()
    parameters, backend = dict(mpl.rcParams), mpl.get_backend()
    sge.pl.report(predicted, tmp_path / "r.html", genes="GENE001")
    assert plt.get_fignums() == [mine.number]
    assert dict(mpl.rcParams) == parameters
    assert mpl.get_backend() == backend
    assert {name: id(element) for _, name, element in predicted.gen_elements()} == elements
    for name, table in before.items():
        pd.testing.assert_frame_equal(predicted[name].obs, table.obs)
        pd.testing.assert_frame_equal(predicted[name].var, table.var)
        assert str(predicted[name].uns) == str(table.uns)

    # a colour that is none is noticed when the figure of the domains is there
    table = predicted["histosge"]
    table.obs["domain"] = pd.Categorical(np.where(np.arange(table.n_obs) % 2, "a", "b"))
    table.uns["domain_colors"] = np.array(["red", "no colour"])
    with pytest.raises(ValueError, match="no colour"):
        sge.pl.report(predicted, tmp_path / "other.html", genes="GENE001")
    assert plt.get_fignums() == [mine.number]
    assert not (tmp_path / "other.html").exists()
    plt.close(mine)


def test_reads_no_gene_that_is_not_drawn(predicted, tmp_path):
    table = predicted["histosge"]

    def guarded(values):
        def look(block, block_info=None):
            if block.size and block_info and block_info[0]["chunk-location"][1] != 3:
                msg = f"gene {block_info[0]['chunk-location'][1]} was read"
                raise RuntimeError(msg)
            return block

        return da.from_array(np.asarray(values), chunks=(200, 1)).map_blocks(
            look, dtype=np.float32, meta=np.empty((0, 0), np.float32)
        )

    table.X = guarded(table.X)
    page = read(sge.pl.report(predicted, tmp_path / "r.html", genes="GENE003"))
    assert len(page.find("img")) == 1
    with pytest.raises(RuntimeError, match="gene 4 was read"):
        sge.pl.report(predicted, tmp_path / "r.html", genes="GENE004")


def test_table_of_a_store(predicted, tmp_path):
    """A store holds the places and their table only; the table may be read when asked for."""
    store = SpatialData(
        shapes={"histosge_targets": predicted["histosge_targets"]}, tables={"histosge": predicted["histosge"]}
    )
    store.write(tmp_path / "s.zarr")
    alone = read_zarr(tmp_path / "s.zarr")
    page = read(sge.pl.report(alone, tmp_path / "alone.html"))
    assert page.find("img") == []
    told = "There are no maps. This SpatialData has no images['he'] and no shapes['spots'] and no tables['table']"
    assert told in page.text("warnings")
    assert called(page)["encoder"] == "stain-texture"
    predicted.tables["histosge"] = open_table(tmp_path / "s.zarr", "histosge")
    page = read(sge.pl.report(predicted, tmp_path / "r.html", genes="GENE001"))
    assert len(page.find("img")) == 1
    assert isinstance(predicted["histosge"].X, da.Array)


def test_section_without_spots(predicted, tmp_path):
    table = predicted["histosge"].copy()
    table.obs["distance_to_spot_um"] = np.float32("nan")
    table.obs["is_spot"] = table.obs["in_spot"] = False
    made = {k: v for k, v in table.uns["histosge"].items() if k not in ("spots", "table")}
    table.uns["histosge"] = made | {"technology": "not measured", "mpp_source": "given", "input": "the image alone"}
    table.uns["histosge"]["params"] = {"model": "<Model>"}
    shapes = {"histosge_targets": predicted["histosge_targets"]}
    alone = SpatialData(images=dict(predicted.images), shapes=shapes, tables={"histosge": table})
    page = read(sge.pl.report(alone, tmp_path / "r.html", genes="GENE001"))
    assert "Nothing was measured on this section." in page.text("warnings")
    assert dict(rows(page, "run"))["Section"].startswith("nothing measured")
    assert "from the H&E image alone, by a model of other sections" in re.sub("&amp;", "&", page.html)
    (picture,) = page.find("img")
    assert "measured" not in picture["alt"]
    assert called(page) == {"model": ...}


@pytest.mark.slow
def test_in_a_browser(nasty, tmp_path):
    """The script runs under the page's own policy, finds and sorts, and nothing else runs or is complained of."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    path = sge.pl.report(nasty, tmp_path / "r.html", genes=[])

    def dom(file):
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
        done = subprocess.run(
            [browser, *options, "--enable-logging=stderr", "--dump-dom", file.as_uri()],
            capture_output=True, text=True, timeout=600, check=True,
        )  # fmt: skip
        assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
        return Page(done.stdout)

    page = dom(path)
    assert "hidden" not in page.find("label", id="gene-find")[0]  # the script was allowed to run
    assert len(page.find("button")) == 5
    assert page.find("img") == page.find("b") == []

    # a second script, which the policy of the page would refuse, does what a reader does
    html = re.sub(r"<meta http-equiv=.*?>", "", path.read_text(encoding="utf-8"))
    act = 'const s = document.getElementById("gene-search"); s.value = "a,B"; s.dispatchEvent(new Event("input"));'
    (tmp_path / "find.html").write_text(html.replace("</body>", f"<script>{act}</script></body>"), encoding="utf-8")
    page = dom(tmp_path / "find.html")
    assert [row[1] for row in rows(page, "gene-table")] == ['a,b"c']
    assert page.text("gene-count") == "1 of 20 genes"
    act = 'const b = document.querySelectorAll("#gene-table button")[2]; b.click(); b.click();'
    (tmp_path / "sort.html").write_text(html.replace("</body>", f"<script>{act}</script></body>"), encoding="utf-8")
    pcc = [float(row[2]) for row in rows(dom(tmp_path / "sort.html"), "gene-table")]
    assert pcc == sorted(pcc)
    assert len(pcc) == 20
