"""Checks of ``histosge doctor``: whether histosge can run on this machine, and remedies where it cannot.

A check gets the facts about the machine as arguments. It does not raise: its message describes the problem. No message
contains a token.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from histosge._settings import control_groups, free_and_limit
from histosge.cli._shared import readable_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

_IMPORTED = ("torch", "torchvision", "timm", "scanpy", "spatialdata")
"""Libraries with compiled parts, which may be installed but incompatible"""
_LITTLE_DISK = 6e9
"""The largest encoder has 4.6 GB"""
_LITTLE_MEMORY = 4e9

Status = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Check:
    """Result of one check."""

    name: str
    status: Status
    """``"ok"``, ``"note"`` for information, or ``"problem"``, which needs a remedy"""
    message: str
    remedy: str | None = None
    fatal: bool = False
    """histosge cannot run"""
    details: dict[str, Any] = field(default_factory=dict)
    """Plain values, for programs"""


# ---------------------------------------------------------------------------------------------------- software


def required_python() -> str | None:
    """Versions of Python that histosge needs; ``None`` where it is not installed."""
    try:
        return metadata.metadata("histosge")["Requires-Python"]
    except metadata.PackageNotFoundError:
        return None


def check_python(version: str, *, wanted: str | None) -> Check:
    """Whether histosge supports this Python."""
    from packaging.specifiers import SpecifierSet

    message = f"{version} ({platform.python_implementation()}), {platform.system()} {platform.machine()}"
    remedy = None
    if wanted is None:
        message, remedy = (
            f"{message}; histosge is not installed in it",
            "Run `pip install histosge`, or in a clone `make demo`.",
        )
    elif not SpecifierSet(wanted).contains(version, prereleases=True):
        message = f"{message}: histosge needs Python {wanted}"
        remedy = f"Make an environment with Python {wanted}, and install histosge there."
    details = {"version": version, "system": platform.system(), "machine": platform.machine()}
    return Check("python", "problem" if remedy else "ok", message, remedy, fatal=remedy is not None, details=details)


def dependency_versions(requirements: Iterable[str] | None = None) -> dict[str, str | None]:
    """Version of each direct dependency of histosge, ``None`` where it is not installed."""
    from packaging.requirements import Requirement

    versions: dict[str, str | None] = {}
    for text in (metadata.requires("histosge") or []) if requirements is None else requirements:
        one = Requirement(text)
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            versions[one.name] = None
            with suppress(metadata.PackageNotFoundError):
                versions[one.name] = metadata.version(one.name)
    return dict(sorted(versions.items()))


def check_packages(versions: Mapping[str, str | None]) -> Check:
    """List the dependencies; ``pip check`` tests their versions."""
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        message, remedy = f"not installed: {', '.join(missing)}", f"Run `pip install {' '.join(missing)}`."
        return Check("packages", "problem", message, remedy, fatal=True, details={"versions": dict(versions)})
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return Check("packages", "ok", listed, details={"versions": dict(versions)})


def check_imports(load: Callable[[str], Any] = importlib.import_module) -> Iterator[Check]:
    """Import libraries that may be installed but broken."""
    imported = []
    for name in _IMPORTED:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                version = getattr(load(name), "__version__", "")
        except Exception as err:  # noqa: BLE001  an incompatible library may raise any error
            remedy = f"Make a fresh environment and install histosge there, so that {name} fits its dependencies."
            if name in ("torchvision", "timm"):
                remedy = (
                    "torch and torchvision come from different sources: install both from the same one, in a fresh "
                    "environment."
                )
            elif isinstance(err, ModuleNotFoundError) and err.name == name:
                remedy = f"Run `pip install {name}`."
            message = f"cannot be imported ({type(err).__name__}: {first_line(err)})"
            yield Check(f"import {name}", "problem", message, remedy, fatal=True)
        else:
            imported.append(f"{name} {version}".strip())
    if imported:
        yield Check("imports", "ok", ", ".join(imported))


# ----------------------------------------------------------------------------------------------------- machine


def check_gpus(
    torch: Any = None, *, environ: Mapping[str, str] = os.environ, has_driver: bool | None = None
) -> Iterator[Check]:
    """Whether torch computes on each GPU; where there is none, why.

    Parameters
    ----------
    torch
        The library. ``None`` imports it.
    environ
        Environment variables.
    has_driver
        Whether there is a driver of NVIDIA. ``None`` looks for it.
    """
    torch = importlib.import_module("torch") if torch is None else torch
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        has_cuda = torch.cuda.is_available()
    if has_cuda:
        yield from (_cuda_device(torch, i) for i in range(torch.cuda.device_count()))
        return
    if torch.backends.mps.is_available():
        yield Check("gpu", "ok", "Apple GPU (mps); its memory is the machine's", details={"device": "mps"})
        return
    if has_driver is None:
        has_driver = bool(shutil.which("nvidia-smi")) or Path("/proc/driver/nvidia/version").exists()
    cuda, elsewhere = torch.version.cuda, "https://pytorch.org/get-started/locally has the command"
    status: Status = "problem"
    if not has_driver:
        status, message = "note", "none that torch can use"
        remedy = "Take a small encoder, such as stain-texture or lunit-dino-s16, or another machine."
    elif environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles"):
        status, message = "note", "hidden by CUDA_VISIBLE_DEVICES"
        remedy = "Unset it, or ask the scheduler for a GPU."
    elif cuda is None:
        message = f"there is an NVIDIA driver, but torch {torch.__version__} is built without CUDA"
        remedy = f"Install torch and torchvision for CUDA: {elsewhere}."
    else:
        reason = " ".join(first_line(w.message) for w in caught) or _why_no_cuda(torch)
        message = f"there is an NVIDIA driver, but torch (CUDA {cuda}) cannot use it: {reason}"
        remedy = f"Update the driver, or install the torch that is made for it: {elsewhere}."
    yield Check("gpu", status, f"{message}; the processor computes", remedy, details={"device": "cpu"})


def _cuda_device(torch: Any, i: int) -> Check:
    name, kind = f"gpu {i}", torch.cuda.get_device_name(i)
    try:
        (torch.ones(8, device=f"cuda:{i}") * 2).sum().item()
        free, total = torch.cuda.mem_get_info(i)
    except RuntimeError as err:
        remedy = "Install a torch that is made for it (https://pytorch.org/get-started/locally), or pass --device cpu."
        return Check(name, "problem", f"{kind} does not compute: {first_line(err)}", remedy, details={"name": kind})
    message = f"{kind}, {readable_size(free)} free of {readable_size(total)}, CUDA {torch.version.cuda}"
    return Check(name, "ok", message, details={"name": kind, "free_bytes": free, "total_bytes": total})


def _why_no_cuda(torch: Any) -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as err:
        return first_line(err)
    return "it shows no device"


def cores() -> Iterator[Check]:
    total = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    threads = None
    with suppress(Exception):  # without torch there are no threads of torch
        threads = importlib.import_module("torch").get_num_threads()
    yield check_cores(total, allowed, groups=control_groups(), threads=threads)


def check_cores(total: int, allowed: float, *, groups: Iterable[Path], threads: int | None) -> Check:
    """How many of the cores a job may use, and whether torch starts more threads."""
    for group in groups:
        with suppress(OSError, ValueError):  # no limit, or "max"
            quota, period = map(float, (group / "cpu.max").read_text().split())
            allowed = min(allowed, quota / period)
    usable = max(int(allowed), 1)
    message = f"{total}" if usable == total else f"{usable} of {total}, as the container or the scheduler allows"
    remedy = None
    if threads is not None and threads > usable:
        message += f"; torch would use {threads} threads"
        remedy = f"Set OMP_NUM_THREADS={usable}: more threads than cores wait for each other."
    details = {"total": total, "usable": usable}
    return Check("cores", "note" if remedy else "ok", message, remedy, details=details)


def memory() -> Iterator[Check]:
    import psutil

    free, limit = free_and_limit()
    yield check_memory(int(psutil.virtual_memory().total), free=free, limit=limit)


def check_memory(total: int, *, free: int, limit: int | None) -> Check:
    """How much memory is free, and how much a job may use."""
    message = f"{readable_size(free)} free of {readable_size(total)}"
    if limit is not None and limit < total:
        message += f", {readable_size(limit)} at most, as the container or the scheduler allows"
    details = {"total_bytes": total, "free_bytes": free, "limit_bytes": limit}
    remedy = None
    if free < _LITTLE_MEMORY:
        remedy = "Predict with --store, fewer --genes or wider bins: a table that does not fit is refused."
    return Check("memory", "note" if remedy else "ok", message, remedy, details=details)


# -------------------------------------------------------------------------------------------------------- disk


def disks(folders: Mapping[str, tuple[Path, str]]) -> Iterator[Check]:
    from huggingface_hub import constants

    from histosge._embedding import EmbeddingCache

    try:
        kept = EmbeddingCache.from_settings()
        size = readable_size(sum(group.n_bytes for group in kept.groups()))
        used = f"holds {size} of at most {readable_size(kept.limit_bytes)}, "
        yield check_folder("disk embeddings", kept.root, used=used, variable="HISTOSGE_CACHE")
    except (OSError, ValueError) as err:
        remedy = "Set HISTOSGE_CACHE to a new folder; until then runs are refused, or keep nothing."
        yield Check("disk embeddings", "problem", first_line(err), remedy)
    yield check_folder("disk weights", Path(constants.HF_HUB_CACHE), variable="HF_HOME")
    for name, (folder, variable) in folders.items():
        yield check_folder(f"disk {name}", folder, variable=variable)


def check_folder(
    name: str, folder: Path, *, variable: str, used: str = "", free: int | None = None, writable: bool | None = None
) -> Check:
    """Whether a folder is writable, and how much space is free.

    Parameters
    ----------
    name
        Name of the check.
    folder
        The folder. It need not exist.
    variable
        Environment variable that sets it.
    used
        Its content, for the message.
    free, writable
        Free bytes of its disk, and whether it is writable. ``None`` looks.
    """
    there = next((f for f in (folder, *folder.parents) if f.exists()), Path("/"))
    free = shutil.disk_usage(there).free if free is None else free
    writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK) if writable is None else writable
    details = {"folder": str(folder), "free_bytes": free}
    message, remedy = f"{folder}: {used}{readable_size(free)} free", None
    status: Status = "ok"
    if not writable:
        message, status = f"{folder} cannot be written to", "problem"
        remedy = f"Set {variable} to a folder that you may write to."
    elif free < _LITTLE_DISK:
        status, remedy = "note", f"Free space, or set {variable} to a folder on a larger disk."
    return Check(name, status, message, remedy, details=details)


def first_line(err: object) -> str:
    lines = str(err).strip().splitlines()
    return lines[0][:200] if lines else type(err).__name__
