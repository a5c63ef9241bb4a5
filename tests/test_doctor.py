"""The doctor: what it finds on machines that lack something, and what it says to do."""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants, errors
from huggingface_hub.utils import get_session

import histosge as sge
from histosge._encoders import weights_kept
from histosge.cli import (
    Check,
    check_cores,
    check_folder,
    check_gpus,
    check_hub,
    check_imports,
    check_memory,
    check_packages,
    check_python,
    collect,
    dependency_versions,
    machine_report,
    main,
    readable_size,
    text_report,
)

TOKEN = f"hf_{'x' * 24}"


def one(checks, name):
    [found] = [check for check in checks if check.name == name]
    return found


# ------------------------------------------------------------------------------------------------------ software


@pytest.mark.parametrize(("version", "fits"), [("3.10.4", False), ("3.11.0", True), ("3.14.0rc1", True)])
def test_python(version, fits):
    check = check_python(version, wanted=">=3.11")
    assert (check.status, check.fatal) == (("ok", False) if fits else ("problem", True))
    assert version in check.message
    if not fits:
        assert "histosge needs Python >=3.11" in check.message
        assert check.remedy == "Make an environment with Python >=3.11, and install histosge there."


def test_histosge_that_is_not_installed():
    check = check_python("3.12.1", wanted=None)
    assert check.fatal
    assert "histosge is not installed in it" in check.message
    assert "pip install" in check.remedy


def test_packages():
    requirements = ["torch>=2.5", "numpy>=99; python_version>='3'", "old<0.7; python_version<'3'", "x; extra == 'plot'"]
    versions = dependency_versions(requirements)
    assert versions == {"numpy": importlib.metadata.version("numpy"), "torch": importlib.metadata.version("torch")}
    check = check_packages({"numpy": "2.4", "torch": "2.14.1"})  # whether they fit is for pip
    assert (check.status, check.message) == ("ok", "numpy 2.4, torch 2.14.1")
    assert check.details == {"versions": {"numpy": "2.4", "torch": "2.14.1"}}
    check = check_packages(dependency_versions(["numpy", "no-such-package>=1", "nor-this"]))
    assert (check.status, check.fatal, check.message) == ("problem", True, "not installed: no-such-package, nor-this")
    assert check.remedy == "Run `pip install no-such-package nor-this`."


def test_torchvision_of_another_source():
    def load(name):
        if name == "torchvision":
            msg = "operator torchvision::nms does not exist\nmore"
            raise RuntimeError(msg)
        if name == "scanpy":
            msg = "No module named 'scanpy'"
            raise ModuleNotFoundError(msg, name="scanpy")
        return SimpleNamespace(__version__="1.2")

    checks = list(check_imports(load))
    vision, scanpy = one(checks, "import torchvision"), one(checks, "import scanpy")
    assert vision.fatal
    assert vision.message == "cannot be imported (RuntimeError: operator torchvision::nms does not exist)"
    assert "install both from the same one, in a fresh environment" in vision.remedy
    assert scanpy.remedy == "Run `pip install scanpy`."
    assert one(checks, "imports").message == "torch 1.2, timm 1.2, spatialdata 1.2"


# ------------------------------------------------------------------------------------------------------- machine


def made_up_torch(*, cuda=None, mps=False, gpus=(), init=lambda: None):
    """What the doctor asks of torch, on a machine with these GPUs."""

    def ones(n, *, device):
        if "K80" in gpus[int(device[-1])]:
            msg = "CUDA error: no kernel image is available for execution on the device\nmore"
            raise RuntimeError(msg)
        return torch.full((n,), 1.0)

    return SimpleNamespace(
        __version__="2.14",
        version=SimpleNamespace(cuda=cuda),
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: mps)),
        cuda=SimpleNamespace(
            is_available=lambda: bool(gpus),
            device_count=lambda: len(gpus),
            get_device_name=lambda i: gpus[i],
            mem_get_info=lambda _: (70e9, 80e9),
            init=init,
        ),
        ones=ones,
    )


def test_no_gpu():
    [check] = check_gpus(made_up_torch(), environ={}, has_driver=False)
    assert (check.status, check.message) == ("note", "none that torch can use; the processor computes")
    assert "stain-texture" in check.remedy
    [check] = check_gpus(made_up_torch(mps=True), environ={}, has_driver=False)
    assert (check.status, check.details) == ("ok", {"device": "mps"})


def test_driver_that_torch_cannot_use():
    [check] = check_gpus(made_up_torch(), environ={}, has_driver=True)
    assert check.status == "problem"
    assert "torch 2.14 is built without CUDA" in check.message
    assert "pytorch.org" in check.remedy

    def init():
        msg = "The NVIDIA driver on your system is too old (found version 11040).\nUpdate it"
        raise RuntimeError(msg)

    old = made_up_torch(cuda="13.0", init=init)
    [check] = check_gpus(old, environ={}, has_driver=True)
    assert "cannot use it: The NVIDIA driver on your system is too old (found version 11040).;" in check.message
    assert "Update the driver" in check.remedy
    [check] = check_gpus(old, environ={"CUDA_VISIBLE_DEVICES": ""}, has_driver=True)
    assert (check.status, check.message) == ("note", "hidden by CUDA_VISIBLE_DEVICES; the processor computes")


def test_gpus():
    first, second = check_gpus(made_up_torch(cuda="13.0", gpus=("H100", "K80")))
    assert (first.name, first.status, first.message) == ("gpu 0", "ok", "H100, 70 GB free of 80 GB, CUDA 13.0")
    assert (
        second.message == "K80 does not compute: CUDA error: no kernel image is available for execution on the device"
    )
    assert "--device cpu" in second.remedy


def test_cores(tmp_path):
    inner, outer = tmp_path / "slurm" / "job", tmp_path / "slurm"
    inner.mkdir(parents=True)
    check = check_cores(64, 8, groups=[inner, outer], threads=2)
    assert check.message == "8 of 64, as the container or the scheduler allows"
    (inner / "cpu.max").write_text("max 100000\n")
    (outer / "cpu.max").write_text("250000 100000\n")
    check = check_cores(64, 8, groups=[inner, outer], threads=2)
    assert (check.status, check.details) == ("ok", {"total": 64, "usable": 2})
    check = check_cores(64, 8, groups=[inner, outer], threads=32)
    assert (check.status, check.remedy[:22]) == ("note", "Set OMP_NUM_THREADS=2:")
    assert check_cores(4, 4, groups=[], threads=None).message == "4"


def test_memory():
    check = check_memory(128_000_000_000, free=100_000_000_000, limit=None)
    assert (check.status, check.message) == ("ok", "100 GB free of 128 GB")
    check = check_memory(128_000_000_000, free=3_000_000_000, limit=16_000_000_000)
    assert check.details == {"total_bytes": 128_000_000_000, "free_bytes": 3_000_000_000, "limit_bytes": 16_000_000_000}
    assert check.message.startswith("3 GB free of 128 GB, 16 GB at most")
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


class Hub:
    """A hub with an answer for ``who``, for each repository, and for all others; an error is raised."""

    def __init__(self, *, who=None, others=None, **answers):
        self.who = {"name": "ada", "auth": {"accessToken": TOKEN}} if who is None else who
        self.others, self.answers = others, answers
        self.asked = []

    def answer(self, name, found):
        self.asked.append(name)
        if isinstance(found, Exception):
            raise found
        return found() if callable(found) else found

    def whoami(self):
        return self.answer("who", self.who)

    def auth_check(self, repo_id, *, token=None):
        name = repo_id if token is None else f"{repo_id} anonymously"
        return self.answer(name, self.answers.get(repo_id, self.others))


def asked_of(hub, *, has_token=True, kept=(), **options):
    return list(check_hub(hub, has_token=has_token, kept=lambda repo: repo in kept, **options))


GATED = [str(name) for name in sge.encoders().query("gated").index]


def test_access_to_each_gated_encoder():
    answers = {"MahmoodLab/uni": hub_error("GatedRepoError", 403)}
    answers |= {"paige-ai/Virchow": hub_error("RepositoryNotFoundError", 404)}
    answers |= {"histai/hibou-b": hub_error("HfHubHTTPError", 503)}
    hub = Hub(**answers)
    checks = asked_of(hub)
    assert one(checks, "hub").message == "logged in as ada"
    assert [check.name for check in checks if check.name.startswith("encoder ")] == [f"encoder {n}" for n in GATED]
    access = {name: one(checks, f"encoder {name}").details["access"] for name in GATED}
    assert {name for name, can in access.items() if can is False} == {"uni", "virchow"}
    assert {name for name, can in access.items() if can is None} == {"hibou-b"}
    uni = one(checks, "encoder uni")
    assert (uni.status, uni.message) == ("note", "gated, no access")
    assert uni.remedy.startswith("Ask for access at https://huggingface.co/MahmoodLab/uni with the account")
    assert one(checks, "encoder uni2").message == "gated, access granted"
    assert len([name for name in hub.asked if name == "MahmoodLab/conch"]) == 1  # two encoders, one page
    assert not any(check.status == "problem" or check.fatal for check in checks)
    assert TOKEN not in repr(checks)


def test_weights_that_are_here():
    refused = Hub(others=hub_error("GatedRepoError", 403))
    assert one(asked_of(refused), "encoders").details == {"weights_here": []}
    checks = asked_of(refused, kept=["MahmoodLab/uni"])
    assert one(checks, "encoders").message == (
        "weights in the hub's cache: uni; stain-texture needs none; those of midnight, the default, come at the first call "
        "(4.5 GB, no login)"
    )
    assert one(checks, "encoder uni").status == "ok"
    assert one(checks, "encoder uni").message == "gated, no access, weights are here"


def test_encoders_that_run_code_of_others_are_named():
    check = one(asked_of(None), "remote code")
    assert check.status == "ok"
    assert check.message.startswith("encoders that run code of others, only with trust_remote_code=True: chief, conch_")
    frame = sge.encoders()
    assert check.details == {"encoders": list(frame.index[frame["remote_code"]])}


def test_weights_are_looked_for_in_the_cache_of_the_hub(tmp_path):
    folder = Path(constants.HF_HUB_CACHE) / "models--mine--tiles" / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    assert not weights_kept("mine/tiles")
    (folder / "model.safetensors").symlink_to(tmp_path / "gone")
    assert not weights_kept("mine/tiles")
    (folder / "pytorch_model.bin").touch()
    assert weights_kept("mine/tiles")
    assert not weights_kept("mine/others")


def test_not_logged_in():
    hub = Hub()
    checks = asked_of(hub, has_token=False)
    login = one(checks, "hub")
    assert (login.status, login.message) == ("note", "reached, not logged in")
    assert "`hf auth login`" in login.remedy
    assert hub.asked == ["1aurent/vit_small_patch16_224.lunit_dino anonymously"]
    uni = one(checks, "encoder uni")
    assert (uni.status, uni.details["access"]) == ("note", None)
    assert uni.remedy == "Ask for access at https://huggingface.co/MahmoodLab/uni, and log in with `hf auth login`."


@pytest.mark.parametrize(
    ("who", "message"),
    [
        (("HfHubHTTPError", 401), "the token of this machine is refused: expired, or withdrawn"),
        (("HfHubHTTPError", 503), "reached, but does not state who is logged in (HfHubHTTPError)"),
    ],
)
def test_login_that_does_not_work(who, message):
    check = one(asked_of(Hub(who=hub_error(*who))), "hub")
    assert (check.status, check.message) == ("note", message)
    assert "hf auth login" in check.remedy


def test_no_network():
    checks = asked_of(Hub(who=ConnectionError(TOKEN), others=ConnectionError(TOKEN)))
    check = one(checks, "hub")
    assert (check.status, check.message) == ("note", "cannot be reached (ConnectionError)")
    assert "Check the network" in check.remedy
    assert TOKEN not in repr(checks)
    assert one(asked_of(None), "hub").message == "offline: HF_HUB_OFFLINE is set, no request was sent"


def test_hub_that_never_answers():
    """Nothing waits for it, neither the check nor the end of the process."""
    never, before = threading.Event(), set(threading.enumerate())
    hub = Hub(who=never.wait, others=never.wait)
    try:
        check = one(asked_of(hub, seconds=0.05), "hub")
        assert check.message == "cannot be reached (TimeoutError)"
        asking = set(threading.enumerate()) - before
        assert len(asking) == len(hub.asked) > 20
        assert all(thread.daemon for thread in asking)
    finally:
        never.set()


# ---------------------------------------------------------------------------------------------------------- disk


def test_folders(tmp_path):
    folder = tmp_path / "data"
    check = check_folder("disk data sets", folder, variable="HISTOSGE_DATA", used="holds 1 GB, ", free=50_000_000_000)
    assert (check.status, check.message) == ("ok", f"{folder}: holds 1 GB, 50 GB free")
    assert check.details == {"folder": str(folder), "free_bytes": 50_000_000_000}
    assert not folder.exists()
    check = check_folder("disk weights", folder, variable="HF_HOME", free=1_000_000_000)
    assert check.status == "note"
    assert "set HF_HOME to a folder on a larger disk" in check.remedy
    check = check_folder("disk embeddings", folder, variable="HISTOSGE_CACHE", writable=False)
    assert (check.status, check.message) == ("problem", f"{folder} cannot be written to")
    assert check.remedy == "Set HISTOSGE_CACHE to a folder that you may write to."
    (tmp_path / "file").touch()
    assert check_folder("disk", tmp_path / "file" / "in", variable="X").status == "problem"


# --------------------------------------------------------------------------------------------------- the command


def doctor(*options):
    done = CliRunner().invoke(main, ["doctor", *options])
    sge.settings.verbosity = 2
    return done


def test_this_machine_can_run_it(cache_folder):
    done = doctor("--json")
    assert (done.exit_code, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["can_run"] is True
    checks = {check["name"]: check for check in found["checks"]}
    wanted = ["python", "packages", "imports", "cores", "memory", "hub", "encoders"]
    disks = ["disk embeddings", "disk weights", "disk data sets"]
    assert [name for name in checks if name in {*wanted, *disks}] == wanted + disks
    assert [checks[name]["status"] for name in ("python", "packages", "imports")] == ["ok"] * 3
    assert checks["packages"]["details"]["versions"]["anndata"] == importlib.metadata.version("anndata")
    assert checks["hub"]["message"].startswith("offline")
    assert checks["disk embeddings"]["message"].startswith(f"{cache_folder}: holds 0 B of at most 20 GB, ")
    assert checks["disk data sets"]["details"]["folder"] == os.environ["HISTOSGE_DATA"]
    assert all(check["remedy"] for check in checks.values() if check["status"] == "problem")


def test_cache_of_somebody_else(cache_folder):
    cache_folder.mkdir(parents=True)
    (cache_folder / "precious.txt").touch()
    [check] = [one for one in json.loads(doctor("--json").stdout)["checks"] if one["name"] == "disk embeddings"]
    assert check["status"] == "problem"
    assert "holds something that is not histosge's" in check["message"]
    assert "HISTOSGE_CACHE" in check["remedy"]


def test_a_check_that_fails_does_not_stop_the_others():
    def fails():
        raise ZeroDivisionError

    first, second = collect({"memory": fails, "disk": lambda: [Check("disk", "ok", "fine")]})
    assert (first.name, first.status) == ("memory", "problem")
    assert first.message == "could not be checked (ZeroDivisionError: ZeroDivisionError)"
    assert first.remedy
    assert second.message == "fine"


FOUND = [
    Check("python", "ok", "3.13.1"),
    Check("packages", "ok", "numpy 2.4, torch 2.14", details={"versions": {"numpy": "2.4", "torch": "2.14"}}),
    Check("gpu", "problem", "a driver, but no torch for it", "Install the other torch."),
    Check("encoder uni", "note", "gated, no access", "Ask for access at PAGE.", details={"access": False}),
    Check("encoder uni2", "ok", "gated, access granted", details={"access": True}),
    Check("encoder musk", "note", "gated, access not known", details={"access": None}),
    Check("encoder h0-mini", "note", "gated, no access", "Ask for access at PAGE.", details={"access": False}),
    Check("disk weights", "ok", "50 GB free"),
]


def test_report():
    assert text_report(FOUND, in_full=False).splitlines() == [
        "ok       python          3.13.1",
        "ok       packages        2 installed; `histosge doctor -v` lists their versions",
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


def test_report_in_full():
    text = text_report(FOUND, in_full=True)
    assert "ok       packages         numpy 2.4, torch 2.14\n" in text
    assert "note     encoder uni      gated, no access\n" in text
    assert "→ Ask for access at PAGE." in text
    assert "gated encoders" not in text


def test_report_where_histosge_cannot_run():
    broken = Check("import torch", "problem", "cannot be imported", "Make a fresh environment.", fatal=True)
    checks = [*FOUND, broken]
    assert text_report(checks, in_full=False).splitlines()[-1] == "histosge cannot run here: see the problems above."
    assert json.loads(machine_report(checks))["can_run"] is False


def test_report_as_json():
    found = json.loads(machine_report(FOUND))
    assert found["can_run"] is True
    assert [check["name"] for check in found["checks"]] == [check.name for check in FOUND]
    assert found["checks"][3] == {
        "name": "encoder uni",
        "status": "note",
        "message": "gated, no access",
        "remedy": "Ask for access at PAGE.",
        "fatal": False,
        "details": {"access": False},
    }


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
