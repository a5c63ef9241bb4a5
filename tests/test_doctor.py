"""The doctor: what it finds on machines that lack something, and what it says to do."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import threading
from collections import namedtuple
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import psutil
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants, errors
from huggingface_hub.utils import get_session

import histosge as sge
from histosge import _settings as _machine
from histosge.cli import _checks as _doctor
from histosge.cli import main
from histosge.cli._checks import Check, examine, readable_size

TOKEN = f"hf_{'x' * 24}"


def one(checks, name):
    [found] = [check for check in checks if check.name == name]
    return found


def remedied(checks):
    """Whatever is to be mended says how."""
    return all(check.remedy for check in checks if check.status == "problem")


# ------------------------------------------------------------------------------------------------------ software


def test_this_machine_can_run_it():
    checks = examine()
    assert not any(check.fatal for check in checks)
    assert [check.status for check in checks if check.name in ("python", "imports")] == ["ok", "ok"]
    names = [check.name for check in checks]
    wanted = ["python", "packages", "imports", "cores", "memory", "hub", "encoders", "disk embeddings", "disk weights"]
    assert [name for name in names if name in wanted] == wanted
    assert remedied(checks)


def test_python_that_is_too_old(monkeypatch):
    monkeypatch.setattr(_doctor.platform, "python_version", lambda: "3.10.4")
    [check] = _doctor._python()
    assert (check.status, check.fatal) == ("problem", True)
    assert "3.10.4" in check.told
    assert "histosge needs Python >=3.11" in check.told
    assert check.remedy == "Make an environment with Python >=3.11, and install histosge there."


def test_histosge_that_is_not_installed(monkeypatch):
    def nothing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(_doctor.metadata, "metadata", nothing)
    [check] = _doctor._python()
    assert check.fatal
    assert "pip install" in check.remedy


def test_packages(monkeypatch):
    asked = [
        "torch>=2.5",
        "anndata>=0.12",
        "zarr>=3.1.4",
        "old<0.7; python_version<'3'",
        "numpy>=2",
        "numpy<3; python_version>='3'",
        "extra>=1; extra == 'plot'",
    ]
    there = {"torch": "2.14.1", "anndata": "0.10.9", "numpy": "3.1", "histosge": "0.1.0"}

    def version(name):
        if name not in there:
            raise metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(_doctor.metadata, "requires", lambda _: asked)
    monkeypatch.setattr(_doctor.metadata, "version", version)
    first, *rest = _doctor._packages()
    assert first.told == "1 of 4 as histosge 0.1.0 asks"
    assert first.status == "problem"
    assert first.details == {"versions": {"anndata": "0.10.9", "numpy": "3.1", "torch": "2.14.1", "zarr": None}}
    anndata, numpy, zarr = rest
    assert anndata.told == "0.10.9, but histosge asks for >=0.12"
    assert anndata.remedy == 'Run `pip install "anndata>=0.12"`.'
    assert not anndata.fatal
    assert numpy.told == "3.1, but histosge asks for <3,>=2"
    assert (zarr.name, zarr.told, zarr.fatal) == ("package zarr", "is not installed", True)
    there |= {"anndata": "0.13.0rc1", "numpy": "2.4", "zarr": "3.1.5"}
    [check] = _doctor._packages()
    assert (check.status, check.told) == ("ok", "4 of 4 as histosge 0.1.0 asks")


def test_torchvision_of_another_source(monkeypatch):
    really = importlib.import_module

    def import_module(name):
        if name == "torchvision":
            msg = "operator torchvision::nms does not exist\nmore"
            raise RuntimeError(msg)
        if name == "scanpy":
            msg = "No module named 'scanpy'"
            raise ModuleNotFoundError(msg, name="scanpy")
        return really(name)

    monkeypatch.setattr(_doctor.importlib, "import_module", import_module)
    checks = list(_doctor._imports())
    vision, scanpy = one(checks, "import torchvision"), one(checks, "import scanpy")
    assert vision.fatal
    assert vision.told == "cannot be imported (RuntimeError: operator torchvision::nms does not exist)"
    assert "install both from the same one, in a fresh environment" in vision.remedy
    assert scanpy.remedy == "Run `pip install scanpy`."
    assert one(checks, "imports").told.startswith(f"torch {torch.__version__}, timm ")


# ------------------------------------------------------------------------------------------------------- machine


@pytest.fixture
def machine(monkeypatch):
    """A machine without GPU, of which parts can be put in."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(_doctor.shutil, "which", lambda _: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return monkeypatch


def test_no_gpu(machine):
    [check] = _doctor._gpu()
    assert (check.status, check.told) == ("note", "none that torch can use; the processor computes")
    assert "stain-texture" in check.remedy
    machine.setattr(torch.backends.mps, "is_available", lambda: True)
    [check] = _doctor._gpu()
    assert (check.status, check.details) == ("ok", {"device": "mps"})


def test_driver_that_torch_cannot_use(machine):
    machine.setattr(_doctor.shutil, "which", lambda _: "nvidia-smi")
    machine.setattr(torch.version, "cuda", None)
    [check] = _doctor._gpu()
    assert check.status == "problem"
    assert "is built without CUDA" in check.told
    assert "pytorch.org" in check.remedy
    machine.setattr(torch.version, "cuda", "13.0")

    def init():
        msg = "The NVIDIA driver on your system is too old (found version 11040).\nUpdate it"
        raise RuntimeError(msg)

    machine.setattr(torch.cuda, "init", init)
    [check] = _doctor._gpu()
    assert "cannot use it: The NVIDIA driver on your system is too old (found version 11040).;" in check.told
    assert "Update the driver" in check.remedy
    machine.setenv("CUDA_VISIBLE_DEVICES", "")
    [check] = _doctor._gpu()
    assert (check.status, check.told) == ("note", "hidden by CUDA_VISIBLE_DEVICES; the processor computes")


def test_gpus(machine):
    machine.setattr(torch.cuda, "is_available", lambda: True)
    machine.setattr(torch.cuda, "device_count", lambda: 2)
    machine.setattr(torch.cuda, "get_device_name", lambda i: ["H100", "K80"][i])
    machine.setattr(torch.cuda, "mem_get_info", lambda _: (70e9, 80e9))
    machine.setattr(torch.version, "cuda", "13.0")

    def ones(n, *, device):
        if device == "cuda:1":
            msg = "CUDA error: no kernel image is available for execution on the device\nmore"
            raise RuntimeError(msg)
        return torch.full((n,), 1.0)

    machine.setattr(torch, "ones", ones)
    first, second = _doctor._gpu()
    assert (first.name, first.status, first.told) == ("gpu 0", "ok", "H100, 70 GB free of 80 GB, CUDA 13.0")
    assert second.told == "K80 does not compute: CUDA error: no kernel image is available for execution on the device"
    assert "--device cpu" in second.remedy


@pytest.fixture
def container(monkeypatch, tmp_path):
    """Control groups of a job inside a container."""
    root = tmp_path / "cgroup"
    (root / "slurm" / "job").mkdir(parents=True)
    monkeypatch.setattr(_machine, "_CGROUP", root)
    read_text = Path.read_text

    def fake(path, *args, **kwargs):
        return "1:cpu:/x\n0::/slurm/job\n" if str(path) == "/proc/self/cgroup" else read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", fake)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    return root


def test_cores(container, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    [check] = _doctor._cores()
    assert check.told == "8 of 64, as the container or the scheduler allows"
    (container / "cpu.max").write_text("max 100000\n")
    (container / "slurm" / "cpu.max").write_text("250000 100000\n")
    [check] = _doctor._cores()
    assert check.details == {"total": 64, "usable": 2}
    assert check.status == "ok"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 32)
    [check] = _doctor._cores()
    assert (check.status, check.remedy[:22]) == ("note", "Set OMP_NUM_THREADS=2:")


def test_memory(container, monkeypatch):
    whole = SimpleNamespace(total=128_000_000_000, available=100_000_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: whole)
    [check] = _doctor._memory()
    assert (check.status, check.told) == ("ok", "100 GB free of 128 GB")
    job = container / "slurm" / "job"
    (job / "memory.max").write_text("16000000000\n")
    (job / "memory.current").write_text("14000000000\n")
    (job / "memory.stat").write_text("anon 1\ninactive_file 1000000000\n")
    (container / "memory.max").write_text("max\n")
    [check] = _doctor._memory()
    assert check.details == {"total_bytes": 128_000_000_000, "free_bytes": 3_000_000_000, "limit_bytes": 16_000_000_000}
    assert check.told.startswith("3 GB free of 128 GB, 16 GB at most")
    assert check.status == "note"
    assert "--store" in check.remedy


# ----------------------------------------------------------------------------------------------------------- hub


def hub_error(kind, status=None):
    """Make an error as huggingface_hub raises it."""
    if status is None:
        return getattr(errors, kind)("no network")
    request = get_session().build_request("GET", "https://huggingface.co/api/models/org/name/auth-check")
    module = sys.modules[type(get_session()).__module__.split(".")[0]]  # the client's, with the matching response
    response = module.Response(status, request=request, headers={"x-request-id": "abc"})
    return getattr(errors, kind)(f"{status} Client Error. token={TOKEN}", response=response)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that answers what is put in: by repository, and ``who``; an error is raised."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    answers = {"who": {"name": "ada", "auth": {"accessToken": TOKEN}}, "else": None}
    asked = []

    def answer(name):
        asked.append(name)
        said = answers.get(name, answers["else"])
        if isinstance(said, Exception):
            raise said
        return said() if callable(said) else said

    class HfApi:
        def whoami(self):
            return answer("who")

        def auth_check(self, repo_id, *, token=None):
            return answer(repo_id if token is None else f"{repo_id} anonymously")

    monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
    return SimpleNamespace(answers=answers, asked=asked)


GATED = [str(name) for name in sge.encoders().query("gated").index]


def test_access_to_each_gated_encoder(hub):
    refused = hub_error("GatedRepoError", 403)
    hub.answers |= {"MahmoodLab/uni": refused, "paige-ai/Virchow": hub_error("RepositoryNotFoundError", 404)}
    hub.answers |= {"histai/hibou-b": hub_error("HfHubHTTPError", 503)}
    checks = list(_doctor._hub())
    assert one(checks, "hub").told == "logged in as ada"
    assert [check.name for check in checks if check.name.startswith("encoder ")] == [f"encoder {n}" for n in GATED]
    access = {name: one(checks, f"encoder {name}").details["access"] for name in GATED}
    assert {name for name, can in access.items() if can is False} == {"uni", "virchow"}
    assert {name for name, can in access.items() if can is None} == {"hibou-b"}
    uni = one(checks, "encoder uni")
    assert (uni.status, uni.told) == ("note", "gated, no access")
    assert uni.remedy.startswith("Ask for access at https://huggingface.co/MahmoodLab/uni with the account")
    assert one(checks, "encoder uni2").told == "gated, access granted"
    assert len([name for name in hub.asked if name == "MahmoodLab/conch"]) == 1  # two encoders, one page
    assert not any(check.status == "problem" or check.fatal for check in checks)
    assert TOKEN not in repr(checks)


def test_weights_that_are_here(hub, tmp_path):
    hub.answers["else"] = hub_error("GatedRepoError", 403)
    kept = tmp_path / "hub" / "models--MahmoodLab--uni" / "snapshots" / ("a" * 40)
    kept.mkdir(parents=True)
    (kept / "config.json").touch()
    assert one(_doctor._hub(), "encoders").details == {"weights_here": []}
    (kept / "model.safetensors").symlink_to(tmp_path / "gone")
    assert one(_doctor._hub(), "encoders").details == {"weights_here": []}
    (kept / "pytorch_model.bin").touch()
    checks = list(_doctor._hub())
    assert one(checks, "encoders").told == (
        "weights in the hub's cache: uni; stain-texture needs none; those of midnight, the default, come at the first call "
        "(4.5 GB, no login)"
    )
    assert one(checks, "encoder uni").status == "ok"
    assert one(checks, "encoder uni").told == "gated, no access, weights are here"


def test_not_logged_in(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    checks = list(_doctor._hub())
    login = one(checks, "hub")
    assert (login.status, login.told) == ("note", "reached, not logged in")
    assert "`hf auth login`" in login.remedy
    assert hub.asked == ["1aurent/vit_small_patch16_224.lunit_dino anonymously"]
    uni = one(checks, "encoder uni")
    assert (uni.status, uni.details["access"]) == ("note", None)
    assert uni.remedy == "Ask for access at https://huggingface.co/MahmoodLab/uni, and log in with `hf auth login`."


@pytest.mark.parametrize(
    ("who", "told"),
    [
        (("HfHubHTTPError", 401), "the token of this machine is refused: expired, or withdrawn"),
        (("HfHubHTTPError", 503), "reached, but does not say who is logged in (HfHubHTTPError)"),
    ],
)
def test_login_that_does_not_work(hub, who, told):
    hub.answers["who"] = hub_error(*who)
    check = one(_doctor._hub(), "hub")
    assert (check.status, check.told) == ("note", told)
    assert "hf auth login" in check.remedy


def test_no_network(hub, monkeypatch):
    hub.answers |= {"else": ConnectionError(TOKEN), "who": ConnectionError(TOKEN)}
    checks = list(_doctor._hub())
    check = one(checks, "hub")
    assert (check.status, check.told) == ("note", "cannot be reached (ConnectionError)")
    assert "Check the network" in check.remedy
    assert TOKEN not in repr(checks)
    del hub.asked[:]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check = one(_doctor._hub(), "hub")
    assert check.told == "offline: HF_HUB_OFFLINE is set, nothing was asked"
    assert hub.asked == []


def test_hub_that_never_answers(hub, monkeypatch):
    """Nobody waits for it, neither here nor at the end of the process."""
    monkeypatch.setattr(_doctor, "_HUB_SECONDS", 0.05)
    never, before = threading.Event(), set(threading.enumerate())
    hub.answers |= {"else": never.wait, "who": never.wait}
    try:
        check = one(_doctor._hub(), "hub")
        assert check.told == "cannot be reached (TimeoutError)"
        asking = set(threading.enumerate()) - before
        assert len(asking) == len(hub.asked) > 20
        assert all(thread.daemon for thread in asking)
    finally:
        never.set()


# ---------------------------------------------------------------------------------------------------------- disk


def test_disk(tmp_path, monkeypatch, cache_folder):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100e9, 50e9, 50e9))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    kept, weights, data = _doctor._disk({"data sets": (tmp_path / "data", "HISTOSGE_DATA")})
    assert (kept.status, kept.told) == ("ok", f"{cache_folder}: holds 0 B of at most 20 GB, 50 GB free")
    assert (weights.status, weights.told) == ("ok", f"{tmp_path / 'hub'}: 50 GB free")
    assert data.details == {"folder": str(tmp_path / "data"), "free_bytes": 50e9}
    assert not (tmp_path / "data").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100e9, 99e9, 1e9))
    _, weights, data = _doctor._disk({"data sets": (tmp_path / "data", "HISTOSGE_DATA")})
    assert (weights.status, data.status) == ("note", "note")
    assert "set HF_HOME to a folder on a larger disk" in weights.remedy
    assert "set HISTOSGE_DATA" in data.remedy
    monkeypatch.setattr(os, "access", lambda *_: False)
    kept, *_ = _doctor._disk({})
    assert (kept.status, kept.told) == ("problem", f"{cache_folder} cannot be written to")
    assert kept.remedy == "Set HISTOSGE_CACHE to a folder that you may write to."


def test_cache_of_somebody_else(cache_folder):
    cache_folder.mkdir(parents=True)
    (cache_folder / "precious.txt").touch()
    check, _ = _doctor._disk({})
    assert check.status == "problem"
    assert "holds something that is not histosge's" in check.told
    assert "HISTOSGE_CACHE" in check.remedy


# --------------------------------------------------------------------------------------------------- the command


def test_a_check_that_fails_is_told(monkeypatch):
    def ill():
        raise ZeroDivisionError

    for name in ("_python", "_packages", "_imports", "_gpu", "_cores", "_hub"):
        monkeypatch.setattr(_doctor, name, list)
    monkeypatch.setattr(_doctor, "_memory", ill)
    check = examine()[0]
    assert (check.name, check.status) == ("memory", "problem")
    assert check.told == "could not be checked (ZeroDivisionError: ZeroDivisionError)"
    assert check.remedy


FOUND = [
    Check("python", "ok", "3.13.1"),
    Check("gpu", "problem", "a driver, but no torch for it", "Install the other torch."),
    Check("encoder uni", "note", "gated, no access", "Ask for access at PAGE.", details={"access": False}),
    Check("encoder uni2", "ok", "gated, access granted", details={"access": True}),
    Check("encoder musk", "note", "gated, access not known", details={"access": None}),
    Check("encoder h0-mini", "note", "gated, no access", "Ask for access at PAGE.", details={"access": False}),
    Check("disk weights", "ok", "50 GB free"),
]


@pytest.fixture
def found(monkeypatch):
    checks = list(FOUND)
    monkeypatch.setattr(_doctor, "examine", lambda **_: checks)
    yield checks
    sge.settings.verbosity = 2


def doctor(*options):
    return CliRunner().invoke(main, ["doctor", *options])


def test_doctor(found):
    done = doctor()
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "ok       python          3.13.1",
        "problem  gpu             a driver, but no torch for it",
        "                         → Install the other torch.",
        "ok       gated encoders  access granted: uni2",
        "note     gated encoders  no access: uni, h0-mini",
        "                         → Each has a page to ask for access at: `histosge doctor -v` lists them.",
        "note     gated encoders  access not known: musk",
        "                         → Each has a page to ask for access at: `histosge doctor -v` lists them.",
        "ok       disk weights    50 GB free",
        "histosge can run here.",
    ]


def test_doctor_in_detail(found):
    told = doctor("-v").stdout
    assert "note     encoder uni      gated, no access\n" in told
    assert "→ Ask for access at PAGE." in told
    assert "gated encoders" not in told


def test_doctor_where_histosge_cannot_run(found):
    found.append(Check("import torch", "problem", "cannot be imported", "Make a fresh environment.", fatal=True))
    done = doctor()
    assert done.exit_code == 1
    assert done.stdout.splitlines()[-1] == "histosge cannot run here: see the problems above."
    done = doctor("--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["can_run"] is False


def test_doctor_as_json(found):
    done = doctor("--json")
    assert (done.exit_code, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told["can_run"] is True
    assert [check["name"] for check in told["checks"]] == [check.name for check in FOUND]
    assert told["checks"][2] == {
        "name": "encoder uni",
        "status": "note",
        "told": "gated, no access",
        "remedy": "Ask for access at PAGE.",
        "fatal": False,
        "details": {"access": False},
    }


def test_doctor_looks_at_all_folders(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(_doctor, "examine", lambda **options: asked.update(options) or [])
    monkeypatch.setenv("HISTOSGE_DATA", str(tmp_path / "data"))
    assert doctor("--json").exit_code == 0
    assert asked == {"folders": {"data sets": (tmp_path / "data", "HISTOSGE_DATA")}}


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (2.5e10, "25 GB"),
        (3e13, "30 TB"),
    ],
)
def test_sizes(n_bytes, text):
    assert readable_size(n_bytes) == text
