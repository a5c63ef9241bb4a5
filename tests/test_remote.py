"""Sections at a URL: read as those on disk, and stores written there; servers that refuse, fail and die."""

from __future__ import annotations

import functools
import http.server
import json
import logging
import pickle
import re
import shutil
import threading
import warnings
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import dask
import fsspec
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import zarr
from click.testing import CliRunner
from geopandas.testing import assert_geodataframe_equal
from spatialdata import get_pyramid_levels
from spatialdata.models import Labels2DModel, PointsModel
from spatialdata.transformations import get_transformation
from upath import UPath
from xarray import DataTree

import histosge as sge
from histosge import _remote
from histosge._image._chunks import underlying_zarr
from histosge._readers import name_of, opened, path_of
from histosge._section import TableStore
from histosge.cli import main

HOW = {"encoder": "stain-texture", "head": "ridge", "genes": 5, "n_folds": 2, "upsample": 2}


def levels(element):
    return list(get_pyramid_levels(element)) if isinstance(element, DataTree) else [element]


@pytest.fixture(scope="module")
def section():
    """A section of 3 x 3 chunks, with labels and points."""
    with dask.config.set({"array.chunk-size": "1MiB"}):
        made = sge.datasets.synthetic(n_rows=7, n_cols=7, n_genes=8, mpp=1.0)
    labels = np.zeros((60, 80), np.int32)
    labels[10:20, 30:50] = 7
    made.labels["cells"] = Labels2DModel.parse(labels, dims=("y", "x"))
    made.attrs["patient"] = {"age": 60}
    return made


@pytest.fixture(scope="module")
def folder(section, tmp_path_factory):
    path = tmp_path_factory.mktemp("served")
    section.write(path / "a.zarr")
    return path


class Server(http.server.ThreadingHTTPServer):
    """A web server of this machine, without listings; it does what a test needs."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.asked: list[str] = []
        self.password = self.token = None
        self.private = False
        """Whether access to files that do not exist is refused, as of a bucket that must not be listed"""
        self.failing = 0
        """Answers from now on that fail"""
        self.how = 503
        self.dead = False
        self.only = ""
        """Part of the paths that fail"""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        pass


class Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def list_directory(self, _):
        self.send_error(404)

    def do_GET(self):
        server, parts = self.server, urlsplit(self.path)
        server.asked.append(parts.path)
        if server.password and self.headers.get("Authorization") != server.password:
            return self.send_error(401)
        if server.token and parse_qs(parts.query).get("token") != [server.token]:
            return self.send_error(403)
        if server.private and not Path(self.translate_path(parts.path)).is_file():
            return self.send_error(403)
        if (server.dead or server.failing > 0) and server.only in parts.path:
            server.failing -= 1
            if server.dead or server.how == "cut":  # in the middle of an answer
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b"half")
                self.close_connection = True
                return None
            return self.send_error(server.how)
        return super().do_GET()

    do_HEAD = do_GET


@pytest.fixture
def server(folder):
    with Server(folder) as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.fixture
def memory():
    """A folder of fsspec's memory file system."""
    name = f"/{uuid4().hex}"
    found = fsspec.filesystem("memory")
    found.makedirs(name)
    yield UPath(f"memory:/{name}")
    found.rm(name, recursive=True)


@pytest.fixture
def stored(folder, memory):
    memory.fs.put(str(folder / "a.zarr"), f"{memory.path}/a.zarr", recursive=True)
    return memory / "a.zarr"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(_remote, "_WAIT_S", 0.001)


@pytest.fixture(autouse=True)
def _quiet_again():
    yield
    sge.settings.verbosity = 2


def assert_same(found, wanted):
    assert sorted(found.images) == sorted(wanted.images)
    assert sorted(found.shapes) == sorted(wanted.shapes)
    for name in (*wanted.images, *wanted.labels):
        for mine, theirs in zip(levels(found[name]), levels(wanted[name]), strict=True):
            assert mine.dims == theirs.dims
            assert mine.data.chunks == theirs.data.chunks
            np.testing.assert_array_equal(mine.data.compute(), theirs.data.compute())
            if "c" in theirs.coords:
                assert list(mine.coords["c"].values) == list(theirs.coords["c"].values)
        assert get_transformation(found[name], get_all=True) == get_transformation(wanted[name], get_all=True)
    for name in wanted.shapes:
        assert_geodataframe_equal(found.shapes[name], wanted.shapes[name])
    for name, table in wanted.tables.items():
        pd.testing.assert_frame_equal(found.tables[name].obs, table.obs)
        assert (found.tables[name].X != table.X).nnz == 0
    assert found.attrs == wanted.attrs
    assert found.path is None


# ----------------------------------------------------------------------------------------------------------- reading


def test_a_store_on_a_web_server(server, folder):
    found = sge.io.read(f"{server.url}/a.zarr/")
    pixels = [path for path in server.asked if "/images/" in path and "/c/" in path]
    assert pixels == []  # not before they are needed
    assert_same(found, sd.read_zarr(folder / "a.zarr"))


def test_a_store_in_memory(stored, folder):
    for place in (str(stored), stored):
        assert_same(sge.io.read(place), sd.read_zarr(folder / "a.zarr"))
    assert name_of(stored) == name_of(str(stored)) == "a"
    assert path_of(stored) == str(stored)
    assert isinstance(opened(str(stored)), sd.SpatialData)
    local = sge.io.read(f"file://{folder}/a.zarr")  # the usual way
    assert local.path == folder / "a.zarr"


@pytest.mark.filterwarnings("ignore:The 'future.infer_string' option")  # of anndata with pandas 3, about old strings
def test_a_store_of_an_older_format(folder, tmp_path, memory):
    from spatialdata._io.format import SpatialDataContainerFormatV01

    old = sd.SpatialData(images={"he": opened(folder / "a.zarr")["he"]}, tables=dict(opened(folder / "a.zarr").tables))
    old = sd.SpatialData.read(folder / "a.zarr", selection=("images", "shapes", "tables"))
    old.write(tmp_path / "old.zarr", sdata_formats=SpatialDataContainerFormatV01())
    memory.fs.put(str(tmp_path / "old.zarr"), f"{memory.path}/old.zarr", recursive=True)
    with pytest.warns(UserWarning, match="not stored in the most current format"):
        found = sge.io.read(memory / "old.zarr")
    with pytest.warns(UserWarning, match="not stored in the most current format"):
        assert_same(found, sd.read_zarr(tmp_path / "old.zarr"))


def test_blocks_are_read_as_of_a_local_store(server, folder):
    """By regions of the zarr array, each chunk once; a worker reads what was sent to it."""
    found = sge.io.read(f"{server.url}/a.zarr")
    finest = levels(found["he"])[0].data
    array = underlying_zarr(finest)
    assert isinstance(array, zarr.Array)
    server.asked.clear()
    step = array.chunks[1]
    corner = array[:, : step + 1, :step]
    np.testing.assert_array_equal(corner, levels(opened(folder / "a.zarr")["he"])[0].data[:, : step + 1, :step])
    assert len(server.asked) == len(set(server.asked)) == 2
    sent = pickle.loads(pickle.dumps(array))
    np.testing.assert_array_equal(sent[:, :9, :9], array[:, :9, :9])
    remote = sge.tl.predict(found, inplace=False, **HOW)
    local = sge.tl.predict(opened(folder / "a.zarr"), inplace=False, **HOW)
    np.testing.assert_array_equal(remote.X, local.X)


def test_points_are_left_out_with_a_warning(section, memory, tmp_path, log):
    frame = pd.DataFrame({"x": [1.0, 2.0], "y": [3.0, 4.0]})
    both = sd.SpatialData(images=dict(section.images), points={"transcripts": PointsModel.parse(frame)})
    both.write(tmp_path / "p.zarr")
    memory.fs.put(str(tmp_path / "p.zarr"), f"{memory.path}/p.zarr", recursive=True)
    found = sge.io.read(memory / "p.zarr")
    assert list(found.points) == []
    [warned] = [record.getMessage() for record in log.records if record.levelno == logging.WARNING]
    assert warned == f"{memory}/p.zarr: left out points/transcripts, which are not read from a URL"


@pytest.mark.parametrize("how", [503, 429, "cut"])
def test_what_fails_is_read_again(server, folder, how):
    server.failing, server.how = 4, how
    found = sge.io.read(f"{server.url}/a.zarr")
    assert server.failing == 0
    server.failing, server.only = 4, "/images/"
    np.testing.assert_array_equal(
        levels(found["he"])[1].data.compute(), levels(opened(folder / "a.zarr")["he"])[1].data.compute()
    )
    assert server.failing == 0


def test_a_server_that_dies_in_the_middle(server, tmp_path, log):
    found = sge.io.read(f"{server.url}/a.zarr")
    server.dead = True
    match = rf"'{server.url}/a.zarr/images/he/\S+' cannot be read after 5 tries \(ClientPayloadError.*start again"
    with pytest.raises(OSError, match=match):
        levels(found["he"])[0].data.compute()
    summary = sge.tl.predict({"a": found}, store=tmp_path / "r", **HOW)
    assert re.search(match, summary["error"][0])
    server.dead = False
    assert sge.tl.predict({"a": found}, store=tmp_path / "r", **HOW)["error"][0] is None


def test_a_bucket_that_must_not_be_listed(server, folder, log):
    """It refuses access to chunks that do not exist, which are chunks of zeros, with the same answer."""
    server.private = True
    assert_same(sge.io.read(f"{server.url}/a.zarr"), sd.read_zarr(folder / "a.zarr"))
    warned = [record.getMessage() for record in log.records if record.name == "histosge" and record.levelno > 20]
    assert warned == [
        f"{server.url}/a.zarr: the server refuses access to files that do not exist. Chunks that it refuses are read "
        "as empty."
    ]


def test_chunks_that_are_refused(server):
    """By a server that says of others that they do not exist: no zeros are read in their place."""
    server.how, server.only, server.failing = 403, "/tables/", 10_000
    with pytest.raises(PermissionError, match=r"/tables/\S+' cannot be read: access is refused"):
        sge.io.read(f"{server.url}/a.zarr")
    server.only, server.failing = "/c/", 10_000
    with pytest.raises(PermissionError, match=r"/c/\S+' cannot be read: access is refused"):
        sge.io.read(f"{server.url}/a.zarr")
    server.failing = 0
    found = sge.io.read(f"{server.url}/a.zarr")
    server.failing = 10_000
    with pytest.raises(PermissionError, match=r"/images/he/\S+' cannot be read: access is refused"):
        levels(found["he"])[0].data.compute()


def test_what_is_not_there(server, memory, folder):
    with pytest.raises(FileNotFoundError, match=rf"source='{server.url}/b.zarr' is no zarr store: there is none of"):
        sge.io.read(f"{server.url}/b.zarr")
    with pytest.raises(FileNotFoundError, match=r"b.zarr' is no zarr store"):
        sge.io.read(memory / "b.zarr")
    server.server_close()
    with pytest.raises(OSError, match=r"cannot be read after 5 tries \(ClientConnectorError\)"):
        sge.io.read(f"{server.url}/a.zarr")


def test_a_store_without_consolidated_metadata(folder, tmp_path, memory):
    plain = shutil.copytree(folder / "a.zarr", tmp_path / "served" / "plain.zarr")
    root = json.loads((plain / "zarr.json").read_text())
    del root["consolidated_metadata"]
    (plain / "zarr.json").write_text(json.dumps(root))
    with Server(tmp_path / "served") as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        with pytest.raises(ValueError, match=r"has no consolidated metadata, and a web server does not list"):
            sge.io.read(f"{server.url}/plain.zarr")
        server.shutdown()
    memory.fs.put(str(plain), f"{memory.path}/plain.zarr", recursive=True)
    assert_same(sge.io.read(memory / "plain.zarr"), sd.read_zarr(plain))  # which can be listed


@pytest.mark.parametrize(
    ("url", "error", "match"),
    [
        ("foo://a/b.zarr", ValueError, r"'foo://a/b.zarr' has a protocol that fsspec does not know: choose one of"),
        ("oci://a/b.zarr", ImportError, r"needs a package that is not installed \(.*\): install it"),
        ("https:/host/b.zarr", ValueError, "is a URL of which pathlib has removed a slash: pass it as text"),
        (Path("s3://bucket/b.zarr"), ValueError, "pathlib has removed a slash"),
        ("s3://bucket/b.zarr?token=x", ValueError, r"^'s3://bucket/b.zarr'…: only URLs of a web server have a query"),
        ("simplecache::https://me:pw@h/b.zarr", ValueError, r"^'simplecache::https://'…: .*Pass a upath.UPath"),
    ],
)
def test_urls_that_cannot_be(url, error, match):
    with pytest.raises(error, match=match):
        sge.io.read(url)


def test_arguments_of_other_sources(stored):
    with pytest.raises(ValueError, match=r"dataset_id='x', but source='memory://.*' is a SpatialData `.zarr`"):
        sge.io.read(stored, dataset_id="x")


# ------------------------------------------------------------------------------------------------------ credentials


def test_passwords_and_tokens_are_used_and_not_shown(server, tmp_path, log, capfd):
    """Neither in errors, logs, tables, files, nor in what a store or a graph shows."""
    sge.settings.verbosity = 3
    server.password, server.token = "Basic bWU6aHVzaCFwdw==", "hush+t/k"  # me:hush!pw
    url = server.url.replace("//", "//me:hush!pw@") + "/a.zarr?token=hush%2Bt/k"
    found = sge.io.read(url)
    assert path_of(url) == f"{server.url}/a.zarr"
    assert name_of(url) == "a"
    texts = [repr(found), repr(levels(found["he"])[0].data), repr(underlying_zarr(levels(found["he"])[0].data).store)]
    summary = sge.tl.predict([url, url.replace("a.zarr", "b.zarr")], store=tmp_path / "r", **HOW)
    assert summary["error"][0] is None
    assert summary["source"].tolist() == [f"{server.url}/a.zarr", f"{server.url}/b.zarr"]
    learn = {key: value for key, value in HOW.items() if key != "upsample"}
    model = sge.tl.fit([url, url], **learn)
    texts.append(str(model.info))
    with pytest.raises(KeyError, match=f"section '{server.url}/a.zarr'") as no_layer:
        sge.tl.fit([url], layer="none", **learn)
    texts.append(str(no_layer.value))
    server.failing, server.how = 10_000, 503
    for wrong in (url, url.replace("hush!pw", "hush!wrong"), url.replace("hush%2B", "hush-wrong")):
        with pytest.raises(OSError, match="cannot be read") as error:
            sge.io.read(wrong)
        texts += [str(error.value), repr(error.value), *map(str, error.value.args)]
        assert error.value.__suppress_context__
    with pytest.raises(ValueError, match="a web server can be read only") as read_only:
        sge.tl.predict(found, store=url, **HOW)
    texts.append(str(read_only.value))
    done = CliRunner().invoke(main, ["predict", url, str(tmp_path / "o.zarr"), "--json"])
    assert done.exit_code == 1
    texts += [done.output, log.text, *capfd.readouterr(), summary.to_csv()]
    texts += [path.read_text("latin-1") for path in (tmp_path / "r").rglob("*") if path.is_file()]
    assert len(texts) > 100
    assert [text for text in texts if "hush" in text or "bWU6" in text] == []


def test_access_that_is_refused(server):
    server.token = "t"
    with pytest.raises(PermissionError, match=r"cannot be read: access is refused \(ClientResponseError, status 403\)"):
        sge.io.read(f"{server.url}/a.zarr")
    server.password = "p"
    with pytest.raises(PermissionError, match=r"status 401\). Check the URL and the credentials"):
        sge.io.read(f"{server.url}/a.zarr")
    assert server.asked == 2 * ["/a.zarr/zarr.json"]  # once each


def test_an_object_store_without_credentials(monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    match = r"'s3://no-bucket/a.zarr/\S+' cannot be read: access is refused \(NoCredentialsError\).*FSSPEC_S3_ANON=true"
    with pytest.raises(PermissionError, match=match):
        sge.io.read("s3://no-bucket/a.zarr")


# ----------------------------------------------------------------------------------------------------------- writing


@pytest.fixture
def stores(tmp_path, monkeypatch):
    """Folder where stores are made before they are copied."""
    monkeypatch.setenv("HISTOSGE_STORES", str(tmp_path / "stores"))
    return tmp_path / "stores"


def content(place):
    prefix = f"{place.path}/"
    return {name.removeprefix(prefix): place.fs.cat_file(name) for name in place.fs.find(place.path)}


def left_on_disk(folder):
    return [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []


def test_a_store_is_written_to_a_url(sdata, memory, stores, tmp_path, log):
    lazy = sge.tl.predict(sdata, store=str(memory / "out.zarr"), inplace=False, **HOW)
    sge.tl.predict(sdata, store=tmp_path / "out.zarr", **HOW)
    local = {p.relative_to(tmp_path / "out.zarr").as_posix(): p for p in (tmp_path / "out.zarr").rglob("*")}
    found = content(memory / "out.zarr")
    assert sorted(found) == sorted(name for name, path in local.items() if path.is_file())
    for name in found:
        if "/c/" in name and ("/X/" in name or "/obs/" in name):
            assert found[name] == local[name].read_bytes(), name
    np.testing.assert_array_equal(lazy.X.compute(), sd.read_zarr(tmp_path / "out.zarr")["histosge"].X)
    assert sge.io.read(memory / "out.zarr")["histosge"].shape == lazy.shape
    assert left_on_disk(stores) == []
    assert f"making the store in {stores}" in log.text
    assert f"targets to {memory}/out.zarr" in log.text
    with pytest.raises(FileExistsError, match=r"store='memory://\S+/out.zarr' exists already"):
        sge.tl.predict(sdata, store=memory / "out.zarr", **HOW)


@pytest.fixture
def small_store():
    """Make a store of two parts, up to its end; what is written does not matter here."""
    from tests.test_store import head_of, matrices, whole

    def make(place, *, parts=2, params=None, shape=20):
        table, shapes = whole(shape)
        with TableStore.open(
            place, name="predicted", params=params or {"a": 1}, n_rows=len(table), part_rows=shape // 2
        ) as store:
            if not store.begun:
                store.begin(head_of(table), shapes={"bins": shapes}, matrices=["X", "sd"])
            for part in [part for part in range(parts) if part not in store.done]:
                store.write(part, matrices(table, store.rows(part)))
            return store.finish() if parts == 2 else None

    return make


class KilledError(BaseException):
    """The process ends here."""


@pytest.mark.slow
def test_a_copy_that_is_interrupted_anywhere(memory, stores, small_store, monkeypatch):
    """Killed at every step that changes the place: never a store that is not complete, and the next run finishes it."""
    small_store(memory / "whole.zarr")
    wanted = content(memory / "whole.zarr")
    fs = memory.fs
    steps = []
    limit = None
    monkeypatch.setattr("histosge._section._upload._BATCH", 9)

    def counting(name):
        original = getattr(type(fs), name)

        def step(self, *args, **kwargs):
            if limit is not None and len(steps) >= limit:
                raise KilledError
            steps.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(type(fs), name, step)

    for name in ("put_file", "pipe_file", "rm_file"):
        counting(name)
    small_store(memory / "counted.zarr")
    n_steps = len(steps)
    assert n_steps > len(wanted)
    for at in [0, 1, n_steps // 2, n_steps - 2, n_steps - 1]:
        place = memory / f"{at}.zarr"
        steps.clear()
        limit = at
        with pytest.raises(KilledError):
            small_store(place)
        done = fs.exists(f"{place.path}/zarr.json")
        if not done:
            with pytest.raises(FileNotFoundError):
                sge.io.read(place)
        steps.clear()
        limit = None
        if done:
            with pytest.raises(FileExistsError, match="exists already"):
                small_store(place)
        else:
            small_store(place)
        found = content(place)
        found.pop("histosge-upload.json", None)
        assert found == wanted, at
        if at not in (0, n_steps - 1):
            assert len(steps) < n_steps  # not copied again
    assert left_on_disk(stores) == []


def test_an_unfinished_store_is_continued(memory, stores, small_store, log):
    place = memory / "out.zarr"
    small_store(place, parts=1)
    assert list(content(place)) == ["histosge-upload.json"]
    with pytest.raises(ValueError, match=r"store='memory://\S+/out.zarr': .* holds an unfinished run with other arg"):
        small_store(place, params={"a": 2})
    small_store(place)
    assert "resuming out.zarr: 1 of 2 parts are there" in log.text
    assert "histosge-upload.json" not in content(place)


def test_two_machines(memory, stores, small_store, monkeypatch, tmp_path):
    """Each has a folder of its own: the mark at the URL keeps the second out."""
    place = memory / "out.zarr"
    small_store(place, parts=1)
    monkeypatch.setenv("HISTOSGE_STORES", str(tmp_path / "other machine"))
    with pytest.raises(RuntimeError, match=r"an unfinished run on host '.+' writes it since 20.*remove what is at the"):
        small_store(place)
    place.fs.rm(place.path, recursive=True)  # as the message says
    small_store(place)
    monkeypatch.setenv("HISTOSGE_STORES", str(stores))
    with pytest.raises(FileExistsError, match="exists already"):
        small_store(place)


def test_a_mark_that_is_gone(memory, stores, small_store, monkeypatch):
    """Somebody removed what is at the URL while it was made: no store of two runs comes of it."""
    from histosge._section import _upload

    place = memory / "out.zarr"
    copied = _upload.again

    def removed(action, remote, done):
        result = copied(action, remote, done)
        if done == "written":
            place.fs.rm_file(f"{place.path}/histosge-upload.json")
            monkeypatch.setattr(_upload, "again", copied)
        return result

    monkeypatch.setattr(_upload, "again", removed)
    with pytest.raises(RuntimeError, match=r"another process writes or removes it \(its mark is gone\). Start again"):
        small_store(place)
    assert not place.fs.exists(f"{place.path}/zarr.json")


def test_a_place_with_other_files(memory, stores, small_store):
    memory.fs.pipe_file(f"{memory.path}/out.zarr/thesis.txt", b"precious")
    with pytest.raises(FileExistsError, match=r"there are other files, such as 'thesis.txt'. Choose another store="):
        small_store(memory / "out.zarr")
    assert content(memory / "out.zarr") == {"thesis.txt": b"precious"}


def test_a_copy_that_fails_and_passes(memory, stores, small_store, monkeypatch):
    fs, failing = type(memory.fs), [3]
    put = fs.put_file

    def flaky(self, *args, **kwargs):
        if failing[0] > 0:
            failing[0] -= 1
            raise OSError(5, "Input/output error: token=hush")
        return put(self, *args, **kwargs)

    monkeypatch.setattr(fs, "put_file", flaky)
    small_store(memory / "a.zarr")
    failing[0] = 1000
    with pytest.raises(OSError, match=r"b.zarr' cannot be written after 5 tries \(OSError\)") as error:
        small_store(memory / "b.zarr")
    assert "hush" not in str(error.value)
    failing[0] = 0
    small_store(memory / "b.zarr")


@pytest.mark.parametrize(
    ("store", "match"),
    [
        ("https://host/out.zarr", "store='https://host/out.zarr': a web server can be read only"),
        ("memory://x/out.h5ad", r"store='memory://x/out.h5ad': the name must end in .zarr"),
        ("memory://", "must end in .zarr"),
        ("foo://x/out.zarr", "has a protocol that fsspec does not know"),
    ],
)
def test_stores_that_cannot_be(sdata, stores, store, match):
    with pytest.raises(ValueError, match=match):
        sge.tl.predict(sdata, store=store, **HOW)
    assert left_on_disk(stores) == []


# -------------------------------------------------------------------------------------------------- many, and shell


def test_many_from_urls_to_a_url(stored, folder, memory, stores):
    model = sge.tl.fit(opened(folder / "a.zarr"), encoder="stain-texture", head="ridge", genes=5, n_folds=2)
    how = {"model": model, "upsample": 2, "store": str(memory / "results")}
    found = sge.tl.predict([stored, str(memory / "b.zarr")], **how)
    assert found["store"].tolist() == [f"{memory}/results/a.zarr", f"{memory}/results/b.zarr"]
    assert found["error"][0] is None
    assert "is no zarr store" in found["error"][1]
    again = sge.tl.predict([stored], **how)
    assert again["seconds"].tolist() == found["seconds"].tolist()[:1]
    assert "upsample is 4, was 2" in sge.tl.predict([stored], **how | {"upsample": 4})["error"][0]
    file = pd.read_csv((memory / "results" / "summary.csv").open())
    assert file["section"].tolist() == ["a", "b"]
    with pytest.raises(ValueError, match="a web server can be read only"):
        sge.tl.predict([stored], **how | {"store": "https://host/results"})
    with pytest.raises(ValueError, match="would be overwritten by its own result"):
        sge.tl.predict([stored], **how | {"store": str(memory)})


def test_the_shell(stored, memory, stores, tmp_path):
    def run(*words):
        return CliRunner().invoke(main, [str(word) for word in ("-q", "predict", *words)])

    fast = ["--encoder", "stain-texture", "--head", "ridge", "--genes", "5", "--n-folds", "2", "--upsample", "2"]
    done = run(stored, memory / "out.zarr", *fast, "--store", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert (said["source"], said["out"]) == (str(stored), f"{memory}/out.zarr")
    assert sge.io.read(memory / "out.zarr")["histosge"].n_obs == said["n_places"]
    done = run(stored, memory / "out.zarr", *fast)
    assert (done.exit_code, "Pass --store, or name a path" in done.output) == (2, True)
    done = run(stored, stored, *fast, "--store")
    assert (done.exit_code, "is or holds IN" in done.output) == (1, True)
    done = run(stored, tmp_path / "out.zarr", *fast, "--plot", "memory://x/map.png")
    assert (done.exit_code, "is a URL: name a path on this machine" in done.output) == (2, True)
    done = run(stored, "--out", memory / "many", *fast, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["out"] == f"{memory}/many"


@pytest.mark.slow
def test_with_workers_of_dask(server, folder, tmp_path):
    """They read the image from its URL, with its credentials; a section in memory is an error of its own."""
    distributed = pytest.importorskip("distributed")
    server.token = "t"
    with warnings.catch_warnings(), sge.settings.override(exchange_dir=tmp_path / "exchange"):
        warnings.simplefilter("ignore")  # of tornado, when it closes
        with (
            distributed.LocalCluster(
                n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None, protocol="tcp"
            ) as cluster,
            distributed.Client(cluster),
        ):
            sections = {"web": f"{server.url}/a.zarr?token=t", "memory": small_in_memory()}
            found = sge.tl.predict(sections, store=tmp_path / "r", **HOW)
    assert found["error"][0] is None
    assert "lies in the memory of this process" in found["error"][1]
    sge.tl.predict({"here": folder / "a.zarr"}, store=tmp_path / "r", **HOW)
    tables = [sd.read_zarr(tmp_path / "r" / f"{name}.zarr")["histosge"] for name in ("web", "here")]
    np.testing.assert_allclose(tables[0].X, tables[1].X, rtol=0, atol=1e-4)


def small_in_memory():
    return sge.datasets.synthetic(n_rows=7, n_cols=7, n_genes=8, mpp=2.0)
