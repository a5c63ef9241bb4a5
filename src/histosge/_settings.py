"""Settings, logger, progress bars and checks of numbers, for all other modules."""

from __future__ import annotations

import logging
import math
import sys
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import TypeGuard

    import numpy as np
    from tqdm import tqdm

logger = logging.getLogger("histosge")
_LARGEST_SEED = 2**32 - 1
_FOLDERS = {
    "cache_dir": "HISTOSGE_CACHE or the system's cache folder",
    "exchange_dir": "histosge/exchange in the system's cache folder",
}
"""Settings that are folders, and what ``None`` means"""


class _CurrentStderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Write to the current ``sys.stderr``: Jupyter and pytest replace it after import."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr


class _Level(logging.Formatter):
    """Show the level of warnings and errors."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname}: {text}"


if not logger.handlers:
    _handler = _CurrentStderr()
    _handler.setFormatter(_Level("%(message)s"))
    logger.addHandler(_handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number, of Python or numpy; ``True`` and ``False`` are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether it is an integer, of Python or numpy; ``True`` and ``False`` are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_seed(seed: Any, *, argument: str = "rng", also: str = "") -> int:
    """Return the seed, else raise; ``also`` names what else is taken. Larger seeds are none to scanpy, nor to HDF5."""
    if not (is_whole(seed) and 0 <= seed <= _LARGEST_SEED):
        msg = f"{argument}={seed!r}: choose a whole number from 0 to {_LARGEST_SEED}{also}."
        raise ValueError(msg)
    return int(seed)


def seeded(rng: Any) -> np.random.Generator:
    """Return the generator of the argument ``rng``, else raise."""
    import numpy as np

    if not (rng is None or isinstance(rng, np.random.Generator)):
        check_seed(rng, also=", or pass a numpy.random.Generator")
    return np.random.default_rng(rng)


@dataclass
class Settings:
    """Settings of all calls in this session; an argument of the same name overrides them.

    Attributes
    ----------
    device
        Where torch computes: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``. ``None`` takes a GPU if there is one.
    progress
        Show progress bars. ``None`` shows them where standard error is a terminal or a notebook.
    verbosity
        0 errors, 1 warnings, 2 progress (default), 3 details.
    precision
        Number type of encoders. ``None``: bfloat16 on CUDA, float32 elsewhere, and embeddings are rounded to float16.
        ``"float32"``: float32 everywhere, nothing rounded. ``"bfloat16"``: bfloat16 everywhere, faster on processors
        that support it.
    cache_dir
        Folder of computed embeddings, which a second run reuses. ``None`` takes the environment variable
        ``HISTOSGE_CACHE`` or, without it, ``histosge`` in the system's cache folder. A folder with other files is
        refused. ``histosge cache list`` shows the folder and its content.
    cache_gb
        Largest size of the folder in gigabytes (10⁹ bytes) when a run opens it: the least recently used embeddings are
        removed. A run may exceed it by what it writes. 0 turns the cache off.
    memory_gb
        Memory that a table and its prediction may take, in gigabytes. ``None`` takes the free memory of this machine,
        or of the container or job.
    part_rows
        Rows of a table that are read or written at a time. Half a gigabyte where a store is predicted, for 1000 genes.
    dask
        Whether work goes to the workers of an active dask ``Client``. Without a ``Client`` it has no effect.
    exchange_dir
        Folder in which data travel to the workers of dask; this process and all workers must see it. ``None`` takes
        ``histosge/exchange`` in the system's cache folder, which is often in the home folder of a cluster.

    Examples
    --------
    >>> import histosge as sge
    >>> with sge.settings.override(verbosity=0):
    ...     sdata = sge.datasets.synthetic()
    """

    device: str | None = None
    progress: bool | None = None
    verbosity: int = 2
    precision: str | None = None
    cache_dir: str | Path | None = None
    cache_gb: float = 20.0
    memory_gb: float | None = None
    part_rows: int = 32_768
    dask: bool = True
    exchange_dir: str | Path | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        names = [f.name for f in fields(self)]
        if name not in names:
            msg = f"histosge has no setting {name!r}. Settings are: {', '.join(names)}."
            raise AttributeError(msg)
        if name == "verbosity":
            levels = {0: logging.ERROR, 1: logging.WARNING, 2: logging.INFO, 3: logging.DEBUG}
            if value not in levels:
                msg = f"settings.verbosity={value!r}: choose one of 0 (errors), 1 (warnings), 2 (info), 3 (details)."
                raise ValueError(msg)
            logger.setLevel(levels[value])
        if name == "precision" and value not in (None, "float32", "bfloat16"):
            msg = f"settings.precision={value!r}: choose 'float32', 'bfloat16', or None for the device's own."
            raise ValueError(msg)
        if name in _FOLDERS and value is not None and (not isinstance(value, str | Path) or not str(value).strip()):
            msg = f"settings.{name}={value!r} is not a folder. Pass a str or a Path, or None for {_FOLDERS[name]}."
            raise ValueError(msg)
        if name == "dask" and not isinstance(value, bool):
            msg = f"settings.dask={value!r}: choose True (use the active Client of dask) or False."
            raise ValueError(msg)
        if name == "cache_gb" and not (is_number(value) and value >= 0):
            msg = f"settings.cache_gb={value!r}: choose a number of gigabytes, such as 20, or 0 to turn the cache off."
            raise ValueError(msg)
        if name == "memory_gb" and value is not None and not (is_number(value) and value > 0):
            msg = f"settings.memory_gb={value!r}: choose a number of gigabytes above 0, or None for what is free."
            raise ValueError(msg)
        if name == "part_rows" and not (is_whole(value) and value >= 1):
            msg = f"settings.part_rows={value!r}: choose a whole number of rows from 1."
            raise ValueError(msg)
        super().__setattr__(name, value)

    @contextmanager
    def override(self, **values: Any) -> Iterator[Settings]:
        """Change settings inside a ``with`` block."""
        before = {name: getattr(self, name) for name in values}
        try:
            for name, value in values.items():
                setattr(self, name, value)
            yield self
        finally:
            for name, value in before.items():
                setattr(self, name, value)


settings = Settings()


def progress_bar(
    iterable: Iterable[Any] | None = None, *, desc: str, total: int | None, unit: str = "it", show: bool | None = None
) -> tqdm[Any]:
    """Open a progress bar, shown as ``show``, else as ``settings.progress``, else in terminals and notebooks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a notebook without ipywidgets gets a bar of characters
        from tqdm.auto import tqdm

    show = settings.progress if show is None else show
    if show is None:
        show = sys.stderr.isatty() or "ipykernel" in sys.modules
    return tqdm(iterable, desc=desc, total=total, unit=unit, disable=not show, leave=False)


_CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes that may be used: ``settings.memory_gb``, else the free memory of this machine, container or job."""
    return free_and_limit()[0] if settings.memory_gb is None else int(settings.memory_gb * 1e9)


def free_and_limit(cgroup: Path = _CGROUP) -> tuple[int, int | None]:
    """Bytes that are free, and the limit of the container or of the job, if there is one."""
    import psutil

    free, limit = int(psutil.virtual_memory().available), None
    for group in control_groups(cgroup):
        with suppress(OSError, ValueError):  # no limit, or "max"
            found, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            # cached files count as used memory, but it is freed on demand
            free = max(min(free, found - used + int(stat.get("inactive_file", 0))), 0)
            limit = found if limit is None else min(found, limit)
    return free, limit


def control_groups(cgroup: Path = _CGROUP) -> list[Path]:
    """Control groups of this process, innermost first: each may have limits."""
    inner = cgroup
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                inner = cgroup / line.removeprefix("0::").strip("/")
    return [group for group in (inner, *inner.parents) if group.is_relative_to(cgroup)]
