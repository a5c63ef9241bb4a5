"""Look at the machine: can histosge run here, and what is to be done where it cannot.

Each check tells one thing and never fails: what is broken is what it has to tell. No token is read into a message.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import threading
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

from histosge._settings import control_groups, free_and_limit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from huggingface_hub import HfApi

_HUB_SECONDS = 4.0
"""For all that is asked of the hub, together."""
_IMPORTED = ("torch", "torchvision", "timm", "scanpy", "spatialdata")
"""What breaks in use though the versions are right: libraries with compiled parts that must fit together."""
_LITTLE_DISK = 6e9
"""The largest encoder is 4.6 GB."""
_LITTLE_MEMORY = 4e9

Status = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Check:
    """What was found of one thing."""

    name: str
    status: Status
    """``"note"`` is worth knowing, ``"problem"`` is to be mended"""
    told: str
    remedy: str | None = None
    fatal: bool = False
    """histosge cannot run"""
    details: dict[str, Any] = field(default_factory=dict)
    """Plain values, for programs"""


def examine(*, folders: Mapping[str, tuple[Path, str]] | None = None) -> list[Check]:
    """Check Python, packages, GPU, cores, memory, hub, encoders, disk, in this order.

    Parameters
    ----------
    folders
        Further folders to look at, by what they are for, with the environment variable that moves them.
    """
    checks: list[Check] = []
    steps: list[tuple[str, Callable[[], Iterable[Check]]]] = [
        ("python", _python),
        ("packages", _packages),
        ("imports", _imports),
        ("gpu", _gpu),
        ("cores", _cores),
        ("memory", _memory),
        ("hub", _hub),
        ("disk", lambda: _disk(folders or {})),
    ]
    for name, step in steps:
        try:
            checks += step()
        except Exception as err:  # noqa: BLE001  a doctor who falls ill helps nobody
            told = f"could not be checked ({type(err).__name__}: {_first_line(err)})"
            remedy = "See the checks above first; if nothing there explains it, report it as a bug of histosge."
            checks.append(Check(name, "problem", told, remedy))
    return checks


def readable_size(n_bytes: float) -> str:
    """Write a number of bytes with three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 999.5:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"


def _python() -> Iterator[Check]:
    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    told = f"{version} ({platform.python_implementation()}), {platform.system()} {platform.machine()}"
    wanted, remedy = None, None
    try:
        wanted = metadata.metadata("histosge")["Requires-Python"]
    except metadata.PackageNotFoundError:
        told, remedy = (
            f"{told}; histosge is not installed in it",
            "Run `pip install histosge`, or in a clone `make demo`.",
        )
    if wanted is not None and not SpecifierSet(wanted).contains(version, prereleases=True):
        told = f"{told}: histosge needs Python {wanted}"
        remedy = f"Make an environment with Python {wanted}, and install histosge there."
    details = {"version": version, "system": platform.system(), "machine": platform.machine()}
    yield Check("python", "problem" if remedy else "ok", told, remedy, fatal=remedy is not None, details=details)


def _packages() -> Iterator[Check]:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    asked: dict[str, list[Requirement]] = {}
    for text in metadata.requires("histosge") or []:
        one = Requirement(text)
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            asked.setdefault(canonicalize_name(one.name), []).append(one)
    versions: dict[str, str | None] = {}
    bad = []
    for name, requirements in sorted(asked.items()):
        wanted = ",".join(sorted(str(one.specifier) for one in requirements if str(one.specifier)))
        install = f'Run `pip install "{name}{wanted}"`.'
        try:
            versions[name] = found = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
            bad.append(Check(f"package {name}", "problem", "is not installed", install, fatal=True))
            continue
        if not all(one.specifier.contains(found, prereleases=True) for one in requirements):
            bad.append(Check(f"package {name}", "problem", f"{found}, but histosge asks for {wanted}", install))
    told = f"{len(versions) - len(bad)} of {len(versions)} as histosge {metadata.version('histosge')} asks"
    remedy = "Each is named below. A fresh environment with histosge alone mends them at once." if bad else None
    yield Check("packages", "problem" if bad else "ok", told, remedy, details={"versions": versions})
    yield from bad


def _imports() -> Iterator[Check]:
    imported = []
    for name in _IMPORTED:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a version will be told otherwise, one day
                version = getattr(importlib.import_module(name), "__version__", "")
        except Exception as err:  # noqa: BLE001  a library that does not fit raises anything
            remedy = f"Make a fresh environment and install histosge there, so that {name} fits what it is built on."
            if name in ("torchvision", "timm"):
                remedy = "torch and torchvision come from different sources: install both from the same one, in a fresh environment."
            elif isinstance(err, ModuleNotFoundError) and err.name == name:
                remedy = f"Run `pip install {name}`."
            told = f"cannot be imported ({type(err).__name__}: {_first_line(err)})"
            yield Check(f"import {name}", "problem", told, remedy, fatal=True)
        else:
            imported.append(f"{name} {version}".strip())
    if imported:
        yield Check("imports", "ok", ", ".join(imported))


def _gpu() -> Iterator[Check]:
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        has_cuda = torch.cuda.is_available()
    if has_cuda:
        for i in range(torch.cuda.device_count()):
            yield _cuda_device(i)
        return
    if torch.backends.mps.is_available():
        yield Check("gpu", "ok", "Apple GPU (mps); its memory is the machine's", details={"device": "mps"})
        return
    cuda, elsewhere = torch.version.cuda, "https://pytorch.org/get-started/locally has the command"
    status: Status = "problem"
    if not (shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists()):
        status, told = "note", "none that torch can use"
        remedy = "Take a small encoder, such as stain-texture or lunit-dino-s16, or another machine."
    elif os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles"):
        status, told = "note", "hidden by CUDA_VISIBLE_DEVICES"
        remedy = "Unset it, or ask the scheduler for a GPU."
    elif cuda is None:
        told = f"there is an NVIDIA driver, but torch {torch.__version__} is built without CUDA"
        remedy = f"Install torch and torchvision for CUDA: {elsewhere}."
    else:
        why = " ".join(_first_line(w.message) for w in said) or _why_no_cuda()
        told = f"there is an NVIDIA driver, but torch (CUDA {cuda}) cannot use it: {why}"
        remedy = f"Update the driver, or install the torch that is made for it: {elsewhere}."
    yield Check("gpu", status, f"{told}; the processor computes", remedy, details={"device": "cpu"})


def _cuda_device(i: int) -> Check:
    import torch

    name, kind = f"gpu {i}", torch.cuda.get_device_name(i)
    try:
        (torch.ones(8, device=f"cuda:{i}") * 2).sum().item()
        free, total = torch.cuda.mem_get_info(i)
    except RuntimeError as err:
        remedy = "Install a torch that is made for it (https://pytorch.org/get-started/locally), or pass --device cpu."
        return Check(name, "problem", f"{kind} does not compute: {_first_line(err)}", remedy, details={"name": kind})
    told = f"{kind}, {readable_size(free)} free of {readable_size(total)}, CUDA {torch.version.cuda}"
    return Check(name, "ok", told, details={"name": kind, "free_bytes": free, "total_bytes": total})


def _why_no_cuda() -> str:
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as err:
        return _first_line(err)
    return "it shows no device"


def _cores() -> Iterator[Check]:
    total = os.cpu_count() or 1
    allowed: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    for group in control_groups():
        with suppress(OSError, ValueError):  # no limit, or "max"
            quota, period = map(float, (group / "cpu.max").read_text().split())
            allowed = min(allowed, quota / period)
    usable = max(int(allowed), 1)
    told = f"{total}" if usable == total else f"{usable} of {total}, as the container or the scheduler allows"
    remedy = None
    with suppress(Exception):  # without torch there are no threads of its own
        import torch

        if (threads := torch.get_num_threads()) > usable:
            told += f"; torch would use {threads} threads"
            remedy = f"Set OMP_NUM_THREADS={usable}: more threads than cores wait for each other."
    details = {"total": total, "usable": usable}
    yield Check("cores", "note" if remedy else "ok", told, remedy, details=details)


def _memory() -> Iterator[Check]:
    import psutil

    total = int(psutil.virtual_memory().total)
    free, limit = free_and_limit()
    told = f"{readable_size(free)} free of {readable_size(total)}"
    if limit is not None and limit < total:
        told += f", {readable_size(limit)} at most, as the container or the scheduler allows"
    details = {"total_bytes": total, "free_bytes": free, "limit_bytes": limit}
    few = "Predict with --store, fewer --genes or wider bins: a table that does not fit is refused."
    little = free < _LITTLE_MEMORY
    yield Check("memory", "note" if little else "ok", told, few if little else None, details=details)


def _hub() -> Iterator[Check]:
    from huggingface_hub import HfApi, constants, get_token

    from histosge._encoders import DEFAULT_ENCODER, OPEN, PAGES, encoders, weights_kept

    frame = encoders()
    repos = {str(name): str(url).removeprefix(PAGES) for name, url in frame["url"].items() if url}
    gated = [str(name) for name in frame.index[frame["gated"]]]
    kept = {name: weights_kept(repo) for name, repo in repos.items()}
    has_token = get_token() is not None
    answers: dict[str, Any] = {}
    if not constants.HF_HUB_OFFLINE:
        api = HfApi()
        asked: dict[str, Callable[[], Any]] = {"open": partial(_may_read, api, repos[OPEN[-1]], token=False)}
        if has_token:
            asked["who"] = api.whoami
            asked |= {repos[name]: partial(_may_read, api, repos[name]) for name in gated}
        answers = _within(_HUB_SECONDS, asked)
    yield _login(answers, offline=constants.HF_HUB_OFFLINE, has_token=has_token)

    here = [name for name in repos if kept[name]]
    told = f"weights in the hub's cache: {', '.join(here) if here else 'none'}; stain-texture needs none"
    if DEFAULT_ENCODER not in here:
        told += f"; those of {DEFAULT_ENCODER}, the default, come at the first call (4.5 GB, no login)"
    yield Check("encoders", "ok", told, details={"weights_here": here})
    for name in gated:
        page, answer = f"{PAGES}{repos[name]}", answers.get(repos[name])
        access = True if answer is True else False if _status(answer) in (401, 403, 404) else None
        words = {True: "access granted", False: "no access", None: "access not known"}[access]
        told = f"gated, {words}{', weights are here' if kept[name] else ''}"
        remedy = None
        if access is False:
            remedy = f"Ask for access at {page} with the account that is logged in here."
        elif access is None and not kept[name]:
            remedy = f"Ask for access at {page}" + ("." if has_token else ", and log in with `hf auth login`.")
        details = {"url": page, "access": access, "weights_here": kept[name]}
        yield Check(f"encoder {name}", "ok" if access or kept[name] else "note", told, remedy, details=details)


def _may_read(api: HfApi, repo: str, *, token: bool | None = None) -> bool:
    api.auth_check(repo, token=token)  # raises what the hub has against it
    return True


def _login(answers: Mapping[str, Any], *, offline: bool, has_token: bool) -> Check:
    """What the hub says of this machine."""
    log_in = "Log in with `hf auth login`, for encoders that are gated; open ones and stain-texture need no login."
    if offline:
        remedy = "Unset it to fetch weights; encoders whose weights are here, and stain-texture, work without."
        return Check("hub", "note", "offline: HF_HUB_OFFLINE is set, nothing was asked", remedy)
    who = answers.get("who")
    if isinstance(who, dict):
        return Check("hub", "ok", f"logged in as {who.get('name', '?')}")
    if _status(who) == 401:
        return Check("hub", "note", "the token of this machine is refused: expired, or withdrawn", log_in)
    if answers["open"] is not True and _status(answers["open"]) is None:
        remedy = "Check the network or a proxy (HTTPS_PROXY). Encoders whose weights are here, and stain-texture, work without."
        return Check("hub", "note", f"cannot be reached ({type(answers['open']).__name__})", remedy)
    if not has_token:
        return Check("hub", "note", "reached, not logged in", log_in)
    return Check("hub", "note", f"reached, but does not say who is logged in ({type(who).__name__})", log_in)


def _within(seconds: float, asked: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Ask at once; what is no answer is the error. Whoever has not answered in time is not waited for."""
    answers: dict[str, Any] = {name: TimeoutError() for name in asked}

    def ask(name: str, question: Callable[[], Any]) -> None:
        try:
            answers[name] = question()
        except Exception as err:  # noqa: BLE001  told as what it is
            answers[name] = err

    threads = [threading.Thread(target=ask, args=item, daemon=True) for item in asked.items()]
    end = monotonic() + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(end - monotonic(), 0))
    return dict(answers)


def _status(err: Any) -> int | None:
    """HTTP status that the hub answered with."""
    return getattr(getattr(err, "response", None), "status_code", None)


def _disk(folders: Mapping[str, tuple[Path, str]]) -> Iterator[Check]:
    from huggingface_hub import constants

    from histosge._embedding import EmbeddingCache

    try:
        kept = EmbeddingCache.from_settings()
        size = readable_size(sum(group.n_bytes for group in kept.groups()))
        used = f"holds {size} of at most {readable_size(kept.limit_bytes)}, "
        check = _folder("disk embeddings", kept.root, used, move="HISTOSGE_CACHE")
    except (OSError, ValueError) as err:
        remedy = "Set HISTOSGE_CACHE to a new folder; until then runs are refused, or keep nothing."
        check = Check("disk embeddings", "problem", _first_line(err), remedy)
    yield check
    yield _folder("disk weights", Path(constants.HF_HUB_CACHE), "", move="HF_HOME")
    for name, (folder, variable) in folders.items():
        yield _folder(f"disk {name}", folder, "", move=variable)


def _folder(name: str, folder: Path, used: str, *, move: str) -> Check:
    """Whether a folder can be written to, and how much."""
    there = next((f for f in (folder, *folder.parents) if f.exists()), Path("/"))
    free = shutil.disk_usage(there).free
    details = {"folder": str(folder), "free_bytes": free}
    told, remedy = f"{folder}: {used}{readable_size(free)} free", None
    status: Status = "ok"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        told, status = f"{folder} cannot be written to", "problem"
        remedy = f"Set {move} to a folder that you may write to."
    elif free < _LITTLE_DISK:
        status, remedy = "note", f"Free space, or set {move} to a folder on a larger disk."
    return Check(name, status, told, remedy, details=details)


def _first_line(err: object) -> str:
    lines = str(err).strip().splitlines()
    return lines[0][:200] if lines else type(err).__name__
