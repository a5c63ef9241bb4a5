"""Published sections, from a server on this machine: nothing here reaches the network."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import socket
import tarfile
import threading
from dataclasses import dataclass, field, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from click.testing import CliRunner
from filelock import FileLock
from tests.spaceranger import write_image, write_visium, write_visium_hd

import histosge as sge
from histosge._section import read_section
from histosge.cli import main
from histosge.datasets import NOT_STATED, SECTIONS, DownloadError, RemoteFile, data_folder, fetch_files

TEXT = bytes(range(256)) * 40


@dataclass
class Server:
    """Files by path, and what was asked for; each way to fail can be turned on."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    """Path of each request"""
    cuts: list[int] = field(default_factory=list)
    """Bytes after which the next answers break off"""
    kind: str = "application/octet-stream"

    def put(self, path: str, content: bytes = TEXT) -> str:
        self.files[path] = content
        return self.address + path


class _Handler(BaseHTTPRequestHandler):
    server: ThreadingHTTPServer

    def do_GET(self) -> None:
        state: Server = self.server.state  # type: ignore[attr-defined]
        state.asked.append(self.path)
        if self.path not in state.files:
            self.send_error(404)
            return
        content = state.files[self.path]
        self.send_response(200)
        self.send_header("Content-Type", state.kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: state.cuts.pop(0)] if state.cuts else content)
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server():
    http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    http.state = Server(address=f"http://127.0.0.1:{http.server_port}")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield http.state
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture
def data(monkeypatch, tmp_path):
    folder = tmp_path / "data"
    monkeypatch.setenv("HISTOSGE_DATA", str(folder))
    return folder


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def packed(folder: Path, *names: str) -> bytes:
    """A tar.gz of folders."""
    room = io.BytesIO()
    with tarfile.open(fileobj=room, mode="w:gz") as tar:
        for name in names:
            tar.add(folder / name, arcname=name)
    return room.getvalue()


# --- one file


def test_a_file_comes_once(server, tmp_path, log):
    file = RemoteFile(server.put("/a.h5"), "inner/a.h5")
    fetch_files(tmp_path, [file])
    assert (tmp_path / "inner/a.h5").read_bytes() == TEXT
    assert (tmp_path / "inner/a.h5.sha256").read_text() == f"{sha256(TEXT)}  a.h5\n"
    assert f"a.h5: unverified, recorded on first download: sha256 {sha256(TEXT)}" in log.text
    assert sorted(path.name for path in (tmp_path / "inner").iterdir()) == ["a.h5", "a.h5.sha256"]
    log.clear()
    fetch_files(tmp_path, [file])
    assert len(server.asked) == 1
    assert log.text == ""


def test_progress_is_shown_in_bytes(server, tmp_path, capsys):
    with sge.settings.override(progress=True):
        fetch_files(tmp_path, [RemoteFile(server.put("/a.h5"), "b.h5")])
    assert re.search(r"a\.h5: .*/10\.2k", capsys.readouterr().err)


def test_a_published_hash_is_compared(server, tmp_path, log):
    fetch_files(tmp_path, [RemoteFile(server.put("/a.h5"), "a.h5", sha256=sha256(TEXT))])
    assert "unverified" not in log.text
    with pytest.raises(DownloadError, match="another file than expected: sha256 0000.* was published for it") as error:
        fetch_files(tmp_path, [RemoteFile(server.put("/b.h5"), "b.h5", sha256="0" * 64)], retries=0)
    assert str(tmp_path / "b.h5") in str(error.value)
    assert "to accept it" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5", "a.h5.sha256"]


def test_a_connection_that_breaks_off_is_tried_again(server, tmp_path):
    server.cuts = [3000]
    fetch_files(tmp_path, [RemoteFile(server.put("/a.tif"), "a.tif")], retries=1)
    assert (tmp_path / "a.tif").read_bytes() == TEXT
    assert server.asked == ["/a.tif", "/a.tif"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tif", "a.tif.sha256"]


def test_nothing_is_left_of_a_download_that_failed(server, tmp_path):
    files = [RemoteFile(server.put("/a.tif"), "a.tif"), RemoteFile(server.put("/b.tif"), "b.tif")]
    server.cuts = [len(TEXT), 5120]
    with pytest.raises(DownloadError, match=r"/b\.tif: .*Files that are complete are kept: the same call downloads"):
        fetch_files(tmp_path, files, retries=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tif", "a.tif.sha256"]
    fetch_files(tmp_path, files, retries=0)
    assert server.asked == ["/a.tif", "/b.tif", "/b.tif"]
    assert (tmp_path / "b.tif").read_bytes() == TEXT


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_others_may_read_what_was_downloaded(server, tmp_path):
    fetch_files(tmp_path, [RemoteFile(server.put("/a.tif"), "a.tif")])
    (tmp_path / "usual").touch()
    assert (tmp_path / "a.tif").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_file_that_changed_on_disk_is_reported(server, tmp_path):
    file = RemoteFile(server.put("/a.h5"), "a.h5")
    fetch_files(tmp_path, [file])
    (tmp_path / "a.h5").write_bytes(b"other")
    with pytest.raises(
        DownloadError, match=r"a\.h5 is not the expected file.*recorded after the first download"
    ) as error:
        fetch_files(tmp_path, [file])
    for part in (sha256(b"other"), sha256(TEXT), "Remove the file", "to accept it as it is, remove a.h5.sha256"):
        assert part in str(error.value)
    (tmp_path / "a.h5").unlink()
    fetch_files(tmp_path, [file])
    assert (tmp_path / "a.h5").read_bytes() == TEXT


def test_a_file_that_changed_on_the_server_is_reported(server, tmp_path):
    file = RemoteFile(server.put("/a.h5"), "a.h5")
    fetch_files(tmp_path, [file])
    (tmp_path / "a.h5").unlink()
    server.put("/a.h5", b"other")
    with pytest.raises(DownloadError, match="another file than expected.*remove a.h5.sha256"):
        fetch_files(tmp_path, [file], retries=0)
    (tmp_path / "a.h5.sha256").unlink()
    fetch_files(tmp_path, [file])
    assert (tmp_path / "a.h5").read_bytes() == b"other"


def test_offline_says_which_file_to_put_where(tmp_path, server):
    with socket.socket() as unused:  # a port that nobody listens at
        unused.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{unused.getsockname()[1]}"
    files = [
        RemoteFile(server.put("/a.h5"), "a.h5"),
        RemoteFile(f"{dead}/b.h5", "b.h5"),
        RemoteFile(f"{dead}/c", "in/c"),
    ]
    with pytest.raises(DownloadError) as error:
        fetch_files(tmp_path, files, retries=0)
    text = str(error.value)
    assert re.match(rf"could not download {dead}/b\.h5: Failed to establish a new connection: .*refused\. Files", text)
    assert "download these 2 files by other means" in text
    assert f"  {dead}/b.h5\n    → {tmp_path / 'b.h5'}\n" in text
    assert f"  {dead}/c\n    → {tmp_path / 'in/c'}\n" in text
    assert "HISTOSGE_DATA" in text
    assert "a.h5" not in text
    # do what it says
    (tmp_path / "b.h5").write_bytes(b"by other means")
    (tmp_path / "in").mkdir(exist_ok=True)
    (tmp_path / "in/c").write_bytes(b"too")
    fetch_files(tmp_path, files)
    assert (tmp_path / "b.h5.sha256").read_text() == f"{sha256(b'by other means')}  b.h5\n"
    assert len(server.asked) == 1


def test_what_the_server_says_is_passed_on(server, tmp_path):
    with pytest.raises(DownloadError, match=r"/gone: the server answers 404 Not Found\. Files"):
        fetch_files(tmp_path, [RemoteFile(f"{server.address}/gone", "gone")], retries=0)
    server.kind = "text/html; charset=utf-8"
    with pytest.raises(DownloadError, match="answers with a web page instead of the file"):
        fetch_files(tmp_path, [RemoteFile(server.put("/login"), "login")], retries=0)
    assert list(tmp_path.iterdir()) == []


def test_one_process_at_a_time(server, tmp_path, log):
    file, folder = RemoteFile(server.put("/a.h5"), "a.h5"), tmp_path / "section"
    with FileLock(tmp_path / "section.lock"):
        other = threading.Thread(target=fetch_files, args=(folder, [file]))
        other.start()
        other.join(0.3)
        assert other.is_alive()
        assert server.asked == []
    other.join(10)
    assert not other.is_alive()
    assert (folder / "a.h5").read_bytes() == TEXT
    assert f"another process downloads to {folder}: waiting for it" in log.text


def test_a_folder_that_is_a_file(server, tmp_path):
    (tmp_path / "data").write_text("")
    file = RemoteFile(server.put("/a.h5"), "a.h5")
    for folder in (tmp_path / "data", tmp_path / "data/section"):
        with pytest.raises(DownloadError, match=r"the folder .*data.* cannot be used: .*HISTOSGE_DATA to another one"):
            fetch_files(folder, [file])


# --- archives


def test_an_archive_is_unpacked_and_removed(server, tmp_path):
    (tmp_path / "made/spatial").mkdir(parents=True)
    (tmp_path / "made/spatial/a.csv").write_text("a")
    file = RemoteFile(server.put("/s.tar.gz", packed(tmp_path / "made", "spatial")), "s.tar.gz", unpack="spatial")
    home = tmp_path / "home"
    fetch_files(home, [file])
    assert (home / "spatial/a.csv").read_text() == "a"
    assert sorted(path.name for path in home.iterdir()) == ["s.tar.gz.sha256", "spatial"]
    fetch_files(home, [file])
    assert len(server.asked) == 1
    shutil.rmtree(home / "spatial")
    fetch_files(home, [file])
    assert len(server.asked) == 2
    assert (home / "spatial/a.csv").read_text() == "a"


def test_unpacking_that_was_interrupted_is_repeated(server, tmp_path):
    (tmp_path / "made/spatial").mkdir(parents=True)
    (tmp_path / "made/spatial/a.csv").write_text("a")
    home = tmp_path / "home"
    (home / "s.tar.gz.unpacking/spatial").mkdir(parents=True)
    (home / "s.tar.gz.unpacking/spatial/half").write_text("")
    file = RemoteFile(server.put("/s.tar.gz", packed(tmp_path / "made", "spatial")), "s.tar.gz", unpack="spatial")
    fetch_files(home, [file])
    assert [path.name for path in (home / "spatial").iterdir()] == ["a.csv"]
    assert not (home / "s.tar.gz.unpacking").exists()


@pytest.mark.parametrize("evil", ["../evil", "link"])
def test_an_archive_writes_nothing_outside(server, tmp_path, evil):
    room = io.BytesIO()
    with tarfile.open(fileobj=room, mode="w:gz") as tar:
        info = tarfile.TarInfo(evil)
        if evil == "link":
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info, io.BytesIO())
    file = RemoteFile(server.put("/s.tar.gz", room.getvalue()), "s.tar.gz", unpack="spatial")
    with pytest.raises(DownloadError, match=r"s\.tar\.gz cannot be unpacked.*downloads it again from http"):
        fetch_files(tmp_path / "home", [file])
    assert not (tmp_path / "evil").exists()
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["s.tar.gz", "s.tar.gz.sha256"]


def test_no_archive_at_all(server, tmp_path):
    file = RemoteFile(server.put("/s.tar.gz"), "s.tar.gz", unpack="spatial")
    with pytest.raises(DownloadError, match=r"cannot be unpacked.*Remove it and s\.tar\.gz\.sha256"):
        fetch_files(tmp_path, [file])


# --- the registry


def test_the_registry_is_well_formed():
    urls, names = [], set()
    for name, section in SECTIONS.items():
        assert name == section.name
        assert re.fullmatch(r"\w+", name)
        assert section.image in {file.path for file in section.files}
        assert section.technology
        assert section.tissue
        assert section.citation
        assert section.licence == "CC BY 4.0" or section.licence.startswith(NOT_STATED)
        assert section.url.startswith("https://")
        assert section.size_gb is None or section.size_gb > 0
        paths = [file.path for file in section.files]
        assert len(paths) == len(set(paths))
        for file in section.files:
            assert urlsplit(file.url).scheme == "https"
            assert "//" not in urlsplit(file.url).path
            assert not Path(file.path).is_absolute()
            assert ".." not in Path(file.path).parts
            assert (file.unpack is not None) == file.url.endswith(".tar.gz")
            assert file.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", file.sha256)
            urls += [] if file.url.endswith("layer_map.tsv") else [file.url]  # one file for twelve sections
        names.add(name)
    assert len(urls) == len(set(urls))
    hashes = [file.sha256 for section in SECTIONS.values() for file in section.files if file.sha256]
    assert len(hashes) == len(set(hashes))
    assert {f"dlpfc_{i}" for i in (151507, 151510, 151669, 151676)} <= names
    assert sum(name.startswith("dlpfc_") for name in names) == 12


def test_published_lists_the_registry(data):
    frame = sge.datasets.published()
    assert frame.index.tolist() == list(SECTIONS)
    assert frame.columns.tolist() == [
        "technology",
        "tissue",
        "size_gb",
        "licence",
        "citation",
        "url",
        "on_disk",
        "folder",
    ]
    assert frame["size_gb"].dtype == float
    assert not frame["on_disk"].any()
    assert frame.loc["mouse_brain", "folder"] == str(data / "mouse_brain")
    assert not data.exists()


def test_folder_of_the_variable_or_of_the_system(data):
    assert data_folder() == data
    assert data_folder({}).parts[-2:] == ("histosge", "datasets")
    assert data_folder({"HISTOSGE_DATA": "~/sections"}) == Path.home() / "sections"


@pytest.mark.parametrize("call", [sge.datasets.fetch, sge.datasets.load])
def test_unknown_name(call, data):
    with pytest.raises(
        ValueError, match="name='dlpfc' is no published section. Choose one of dlpfc_151507, .*her2st_C6"
    ):
        call("dlpfc")


def test_unknown_section(data):
    with pytest.raises(ValueError, match="section='151511': choose one of 151507, 151508"):
        sge.datasets.dlpfc("151511")
    with pytest.raises(ValueError, match="section='A1': choose one of B4, C2"):
        sge.datasets.her2st("A1")
    assert not data.exists()


# --- whole sections, in the formats of their sources


@pytest.fixture
def serve(monkeypatch, server, data):
    """Lets a section of the registry come from here: the same names and folders, other content."""

    def put(name: str, contents: dict[str, bytes]) -> None:
        section = SECTIONS[name]
        files = []
        for file in section.files:
            url = server.put(urlsplit(file.url).path, contents[file.path])
            files.append(replace(file, url=url, sha256=file.sha256 and sha256(contents[file.path])))
        monkeypatch.setitem(SECTIONS, name, replace(section, files=tuple(files)))

    return put


@pytest.fixture(scope="module")
def visium(tmp_path_factory):
    """A download of 10x Genomics: section, folder, and the files as they are served."""
    section = sge.datasets.synthetic(n_rows=10, n_cols=10, n_genes=12, mpp=2.0)
    folder = tmp_path_factory.mktemp("visium")
    written = write_visium(folder, section, version="1.1.0", prefix="X", image="image.tif")
    contents = {
        "filtered_feature_bc_matrix.h5": (folder / "X_filtered_feature_bc_matrix.h5").read_bytes(),
        "image.tif": written.image.read_bytes(),
        "spatial.tar.gz": packed(folder, "spatial"),
    }
    return section, folder, contents


def check(sdata, section) -> None:
    """All that `predict` needs is found without a key, and the counts are those of the spots they were."""
    found = read_section(sdata)
    truth = read_section(section)
    assert found.mpp == pytest.approx(truth.mpp, rel=0.01)
    assert sorted(found.genes) == sorted(truth.genes)
    (table,), (original,) = sdata.tables.values(), section.tables.values()
    assert sorted(table.obs_names) == sorted(original.obs_names)
    rows = table.obs_names
    a, b = table[rows, found.genes].X.toarray(), original[rows, found.genes].X.toarray()
    np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(table[rows].obsm["spatial"], original[rows].obsm["spatial"], atol=0.51)


@pytest.mark.parametrize("name", ["mouse_brain", "breast_cancer_1", "breast_cancer_2"])
def test_sections_of_10x(serve, server, data, visium, name):
    section, _, contents = visium
    serve(name, contents)
    sdata = getattr(sge.datasets, name)()
    check(sdata, section)
    assert name in sdata.shapes
    n_asked = len(server.asked)
    assert n_asked == 3
    getattr(sge.datasets, name)()
    assert len(server.asked) == n_asked
    assert sge.datasets.published().loc[name, "on_disk"]


def test_fetch_from_the_shell(serve, server, data, visium, tmp_path):
    serve("mouse_brain", visium[2])
    run = partial(CliRunner().invoke, main)
    done = run(["datasets", "fetch", "mouse_brain"])
    assert (done.exit_code, done.stdout) == (0, f"{data / 'mouse_brain'}\n")
    assert len(server.asked) == 3
    out = tmp_path / "out.zarr"
    done = run(["datasets", "fetch", "mouse_brain", str(out), "--json"])
    assert json.loads(done.stdout) == {"name": "mouse_brain", "folder": str(data / "mouse_brain"), "out": str(out)}
    check(sd.read_zarr(out), visium[0])
    shutil.rmtree(data / "mouse_brain")
    done = run(["datasets", "fetch", "mouse_brain", str(out)])
    assert done.exit_code == 1
    assert "exists already" in done.stderr
    assert len(server.asked) == 3  # nothing is downloaded before this is said


def test_dlpfc_has_its_layers(serve, server, data, visium):
    section, folder, contents = visium
    names = sorted(section.tables["table"].obs_names)
    layers = [f"{name}\t151673\t{'WM' if i % 2 else 'L4'}" for i, name in enumerate(names[:-1])]  # the last has none
    layers += [f"{name}\t151674\tL1" for name in names]  # the same barcodes mean other spots elsewhere
    contents = {
        "filtered_feature_bc_matrix.h5": contents["filtered_feature_bc_matrix.h5"],
        "full_image.tif": contents["image.tif"],
        "spatial/tissue_positions_list.csv": (folder / "spatial/tissue_positions_list.csv").read_bytes(),
        "spatial/scalefactors_json.json": (folder / "spatial/scalefactors_json.json").read_bytes(),
        "layers.tsv": "\n".join(layers[::-1]).encode(),
    }
    serve("dlpfc_151673", contents)
    sdata = sge.datasets.dlpfc(section="151673")
    check(sdata, section)
    (table,) = sdata.tables.values()
    layer = table.obs["layer"]
    assert layer.cat.categories.tolist() == ["L1", "L2", "L3", "L4", "L5", "L6", "WM"]
    assert layer[names[:4]].tolist() == ["L4", "WM", "L4", "WM"]
    assert pd.isna(layer[names[-1]])
    assert layer.isna().sum() == 1
    sge.tl.predict(sdata, encoder="stain-texture", head="nearest", genes=8)
    assert "histosge" in sdata.tables


def test_layers_of_another_section_are_refused(serve, server, data, visium):
    section, folder, contents = visium
    contents = {
        "filtered_feature_bc_matrix.h5": contents["filtered_feature_bc_matrix.h5"],
        "full_image.tif": contents["image.tif"],
        "spatial/tissue_positions_list.csv": (folder / "spatial/tissue_positions_list.csv").read_bytes(),
        "spatial/scalefactors_json.json": (folder / "spatial/scalefactors_json.json").read_bytes(),
        "layers.tsv": b"X\t151673\tL1\n",
    }
    serve("dlpfc_151673", contents)
    with pytest.raises(ValueError, match=r"layers\.tsv names no spot of section 151673"):
        sge.datasets.dlpfc()


@pytest.mark.parametrize("inside", ["square_008um", "binned_outputs"])  # no public source says which it is
def test_visium_hd(serve, server, data, tmp_path, inside):
    section = sge.datasets.synthetic(n_rows=3, n_cols=3, n_genes=12, mpp=2.0, bin_um=8)
    folder = tmp_path / "hd"
    written = write_visium_hd(folder, section, prefix="X", image="tissue_image.btf")
    shutil.rmtree(folder / "binned_outputs/square_016um")
    contents = {
        "feature_slice.h5": (folder / "X_feature_slice.h5").read_bytes(),
        "tissue_image.btf": written.image.read_bytes(),
        "spatial.tar.gz": packed(folder, "spatial"),
        "square_008um_outputs.tar.gz": packed(
            folder if inside == "binned_outputs" else folder / "binned_outputs", inside
        ),
    }
    serve("colorectal_cancer_hd", contents)
    sdata = sge.datasets.colorectal_cancer_hd()
    found = read_section(sdata)
    assert found.technology == "visium-hd"
    assert found.pitch_um == pytest.approx(8)
    assert found.mpp == pytest.approx(2, rel=0.01)
    assert len(found.instances) == len(read_section(section).instances)


def test_legacy_st(serve, server, data):
    random = np.random.default_rng(0)
    pitch_px, n = 60, 8
    y, x = (a.ravel() for a in np.indices((n, n)))
    pixels = random.integers(150, 220, ((n + 1) * pitch_px, (n + 1) * pitch_px, 3), np.uint8)
    spots = pd.DataFrame({"x": x + 3, "y": y + 5, "new_x": x + 3.01, "new_y": y + 4.99})
    spots["pixel_x"], spots["pixel_y"] = (x + 1.0) * pitch_px, (y + 0.75) * pitch_px
    spots["selected"] = 1
    spots.loc[0, "selected"] = 0
    names = [f"{a}x{b}" for a, b in zip(spots["x"], spots["y"], strict=True)]
    counts = pd.DataFrame(random.poisson(5, (n * n, 10)), index=names, columns=[f"G{i}" for i in range(10)])
    counts.loc["40x40"] = 1  # off the tissue
    room = data.parent / "made"
    room.mkdir()
    counts.sample(frac=1, random_state=0).to_csv(room / "counts.tsv.gz", sep="\t")
    spots.to_csv(room / "spots.tsv", sep="\t", index=False)
    write_image(room / "image.jpg", pixels)
    serve("her2st_C2", {path.name: path.read_bytes() for path in room.iterdir()})
    sdata = sge.datasets.her2st()
    found = read_section(sdata)
    assert found.technology == "st"
    assert found.mpp == pytest.approx(200 / pitch_px, rel=0.01)
    (table,) = sdata.tables.values()
    assert table.n_obs == n * n - 1
    np.testing.assert_array_equal(table[names[1:]].X.toarray(), counts.loc[names[1:]])
    np.testing.assert_allclose(table[names[1:]].obsm["spatial"], spots[["pixel_x", "pixel_y"]][1:])
