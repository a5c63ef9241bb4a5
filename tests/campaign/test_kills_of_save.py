"""Saves of models that are killed, or fail, at every step: what is there afterwards is the old model or the new one."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections import Counter

import pytest
from tests.test_model import FILE, embed_by_hand, fit

import histosge as sge
from histosge._model import Model
from histosge._section import read_section

_CHILD = r"""
import errno, json, os, resource, shutil, signal, sys, time
from pathlib import Path
from histosge import Model, ModelError

old, new = Model.load(sys.argv[1]), Model.load(sys.argv[2])
names = {old.fingerprint(): "the old model", new.fingerprint(): "the new model"}
place, every = Path(sys.argv[3]), int(sys.argv[4])
new.save(place / "once")  # all that is imported late is imported now
size = (place / "once" / "histosge.safetensors").stat().st_size


def at_operation(number, act):
    "Do something at the file operation of this number: open, mkdir, rename, remove."
    seen = 0

    def hook(event, args):
        nonlocal seen
        if event.startswith(("open", "os.")) and any(str(place) in str(a) for a in args[:2]):
            seen += 1
            if seen == number:
                act()

    sys.addaudithook(hook)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise OSError(errno.ENOSPC, "No space left on device")


def at_byte(number, kills):
    "The disk is full at this byte of a file: the system kills, or says so."
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kills else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))


def at_time(seconds):
    signal.setitimer(signal.ITIMER_REAL, seconds)  # nobody handles it: it kills


def save(folder, prepare):
    "Save the new model in a child; say how it ended, what the folder holds, and whether it can be saved again."
    had = (folder / "histosge.safetensors").exists()
    child = os.fork()
    if child == 0:
        try:
            prepare()
            new.save(folder, overwrite=True)
            code = 0
        except OSError as error:
            code = 2 if "histosge.safetensors" in str(error) else 3
        except BaseException:
            code = 4
        os._exit(code)
    status = os.waitpid(child, 0)[1]
    ended = "killed" if os.WIFSIGNALED(status) else {0: "saved", 2: "failed", 3: "no path", 4: "raw"}[status >> 8]
    try:
        holds = names.get(Model.load(folder).fingerprint(), "another model")
    except FileNotFoundError:
        holds = "no model"
    except Exception as error:
        holds = f"wrong: {error}"
    drafts = len(list(folder.glob("*.tmp"))) if folder.exists() else 0
    new.save(folder, overwrite=holds != "no model")
    again = names.get(Model.load(folder).fingerprint())
    print(json.dumps([ended, holds, had, drafts, again]), flush=True)
    shutil.rmtree(folder)
    return ended


number = 0


def folder_with(model):
    global number
    number += 1
    folder = place / f"m{number}"
    if model is not None:
        model.save(folder)
    return folder


for before in (None, old):
    for act in (kill, fail):
        k = 1
        while save(folder_with(before), lambda: at_operation(k, act)) != "saved":
            k += 1
    for kills in (True, False):
        for at in range(0, size, max(1, size // every)):
            save(folder_with(before), lambda: at_byte(at, kills))
    for i in range(every):
        save(folder_with(before), lambda: at_time(1e-4 + 0.03 * i / every))
"""


@pytest.fixture(scope="module")
def saved(_section_once, tmp_path_factory):
    """Two models."""
    section = read_section(_section_once)
    embedding = embed_by_hand(sge.datasets.synthetic_truth(_section_once).loc[section.instances].to_numpy())
    folders = [tmp_path_factory.mktemp("model") / name for name in ("old", "new")]
    for folder, head in zip(folders, ("mean", "ridge"), strict=True):
        fit(section, embedding, head=head, n_folds=2).save(folder)
    return folders


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
def test_killed_and_failed_saves(saved, tmp_path, tries, tally):
    """At every file operation, at bytes all over the file, and at any time."""
    command = [sys.executable, "-W", "ignore", "-c", _CHILD, *map(str, saved), str(tmp_path), str(tries(8, 150))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ends = Counter()
    for line in done.stdout.splitlines():
        ended, holds, had, drafts, again = json.loads(line)
        tally("killed and failed saves of a model")[f"{ended}, then {holds}"] += 1
        ends[ended] += 1
        before = "the old model" if had else "no model"
        allowed = {"killed": {before, "the new model"}, "saved": {"the new model"}, "failed": {before, "the new model"}}
        assert holds in allowed[ended], line
        assert drafts <= (ended == "killed"), line
        assert again == "the new model", line
    # each of the four walks over the file operations ends with a save; how many kills come too late is a matter of speed
    assert min(ends["killed"], ends["failed"], ends["saved"]) >= 4


def test_full_disk(saved, tmp_path):
    """The error names the file; neither a draft nor half a model stays."""
    model, (old, _) = Model.load(saved[1]), saved
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    Model.load(old).save(tmp_path / "kept")
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limit[1]))
    try:
        for folder in (tmp_path / "kept", tmp_path / "fresh"):
            with pytest.raises(OSError, match=rf"File too large: '{folder / FILE}'"):
                model.save(folder, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert Model.load(tmp_path / "kept").fingerprint() == Model.load(old).fingerprint()
    assert os.listdir(tmp_path / "fresh") == []  # noqa: PTH208
    model.save(tmp_path / "fresh")


def test_full_tmpfs(saved, tmp_path):
    """A disk that is really full."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip(f"mount is not permitted: {done.stderr.strip()}")
    try:
        with pytest.raises(OSError, match=rf"No space left on device: '{disk / FILE}'"):
            Model.load(saved[1]).save(disk)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
