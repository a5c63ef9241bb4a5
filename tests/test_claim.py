"""Working folders: one process at a time, whoever dies, sleeps or comes at the same moment."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from histosge._section import Claim, TableStore, scratch


def claim(home):
    return Claim(home, what="store='x.zarr'", remedy="choose another store=")


def left_by(home, **owner):
    """A folder with a file in it, whose owner is not this process; the file that names it."""
    with claim(home) as first:
        (first.folder / "part").write_text("1")
        file = first.folder.with_name(f"{first.folder.name}.json")
        text = json.loads(file.read_text())
    file.write_text(json.dumps(text | owner))
    return file


def dead():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


def test_the_second_is_refused(tmp_path):
    home = tmp_path / "x.zarr.partial"
    said = (
        rf"store='x\.zarr': process {os.getpid()} on host '{socket.gethostname()}' \(this process itself\) writes it "
        r"since \d{4}-\d\d-\d\d \d\d:\d\d \(last sign \d\d:\d\d\)\. Wait for it, end it, or choose another store=\."
    )
    with claim(home) as first:
        with pytest.raises(RuntimeError, match=said):
            claim(home)
        first.check()
        assert sorted(p.name for p in home.iterdir()) == [first.folder.name, f"{first.folder.name}.json"]
    claim(home).release()


def test_the_same_process_continues_after_an_interruption(tmp_path):
    def work():
        with claim(tmp_path / "a") as first:
            (first.folder / "part").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    with claim(tmp_path / "a") as second:
        assert (second.folder / "part").read_text() == "1"


@pytest.mark.parametrize("why", ["gone", "number used again", "other host", "same host, other numbers"])
def test_a_dead_owner_is_replaced(tmp_path, why):
    start = psutil.Process().create_time()
    owner = {
        "gone": lambda: {"pid": dead()},
        "number used again": lambda: {"start": start - 100},
        "other host": lambda: {"host": "node7"},
        "same host, other numbers": lambda: {"namespace": "pid:[1]"},
    }[why]()
    file = left_by(tmp_path / "a", **owner)
    if "other" in why:  # only its silence tells
        with pytest.raises(
            RuntimeError, match=r"store='x\.zarr': process \d+ on host '.*' .*writes it since .*last sign"
        ):
            claim(tmp_path / "a")
        old = file.stat().st_mtime - 400
        os.utime(file, (old, old))
    with claim(tmp_path / "a") as second:
        assert (second.folder / "part").read_text() == "1"
        assert len(list((tmp_path / "a").iterdir())) == 2


def test_an_owner_that_only_slept_is_locked_out(tmp_path):
    home = tmp_path / "a"
    first = claim(home)
    file = first.folder.with_name(f"{first.folder.name}.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"host": "node7"}))
    os.utime(file, (1, 1))
    with claim(home) as second:
        (first.folder / "chunk").parent.mkdir()  # zarr makes folders that are missing
        for what in (first.check, first.remove):
            with pytest.raises(
                RuntimeError, match=r"no longer the one that writes it.*5 minutes or more, and process \d+"
            ):
                what()
        first.release()
        second.check()
        second.remove()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="and another one has taken the work over. Let that one finish, or choose"):
        first.check()


def test_one_of_many_wins(tmp_path):
    """At the start, and where a dead one's work waits."""
    for made in (False, True):
        home = tmp_path / str(made)
        if made:
            left_by(home, pid=dead())
        won, lost, start = [], [], threading.Barrier(8)

        def run(home=home, won=won, lost=lost, start=start):
            start.wait()
            try:
                won.append(claim(home))
            except RuntimeError as err:
                lost.append(str(err))

        threads = [threading.Thread(target=run) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(lost)) == (1, 7), lost
        won[0].check()
        won[0].remove()
        assert [p for p in tmp_path.iterdir() if p.name != "False"] == []


def test_a_damaged_name_counts_by_its_age(tmp_path):
    file = left_by(tmp_path / "a")
    file.write_text("{")
    with pytest.raises(RuntimeError, match=r"store='x\.zarr': another process writes it \(last sign"):
        claim(tmp_path / "a")
    os.utime(file, (1, 1))
    claim(tmp_path / "a").release()


def test_scratch_is_empty_and_goes(tmp_path):
    def work():
        with scratch(tmp_path / "x.h5ad", what="x.h5ad") as folder:
            (folder / "x.h5ad").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert list(tmp_path.iterdir()) == []
    left_by(tmp_path / ".part.x.h5ad", pid=dead())
    with scratch(tmp_path / "x.h5ad", what="x.h5ad") as folder:
        assert [p.name for p in folder.iterdir()] == ["histosge-run.txt"]
        with pytest.raises(RuntimeError, match="x.h5ad: process .* choose another name"):
            work()
    assert list(tmp_path.iterdir()) == []


def opened(path):
    return TableStore.open(path, name="t", params={}, n_rows=1, part_rows=1)


def test_what_a_finished_store_has_left_is_removed(tmp_path):
    """Killed after the last rename; an unfinished run stays."""
    for finished in (True, False):
        path = tmp_path / f"{finished}.zarr"
        with opened(path) as store:
            folder = store.folder.parent
        if finished:
            (folder / "parts" / "000000.done").touch()
        path.mkdir()
        with pytest.raises(FileExistsError, match="exists already"):
            opened(path)
        assert Path(f"{path}.partial").exists() != finished


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("x.h5ad", r"store='.*x\.h5ad': the name must end in \.zarr"),
        ("x" * 300, r"store='x{20}\.\.\.' is too long a name: choose one of at most 200 bytes"),
        ("", r"store='' is no name of a file"),
        ("..", r"store='\.\.' is no name of a file"),
    ],
)
def test_names_that_no_store_can_have(tmp_path, name, said):
    with pytest.raises(ValueError, match=said):
        opened(tmp_path / name if len(name) > 2 else name)
