"""Independent tasks on the workers of an active dask ``Client``.

A room describes its work as a function of a plan, which all tasks share, and an item. Without a ``Client`` it calls the
function itself. With one, :func:`on_workers` sends the items, and each worker process opens the plan once.

A plan lies in a folder that this process and all workers see (``_exchange.py``): messages pass through the scheduler,
and data that only workers hold is lost with the first of them.
"""

from __future__ import annotations

import ctypes
import functools
import os
import socket
import sys
import threading
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

from histosge._cluster._exchange import exchange_folder, pack, pack_to, unpack, unpack_from
from histosge._settings import logger, settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from distributed import Client

Plan = TypeVar("Plan")
Opened = TypeVar("Opened")
Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 2
"""Tasks that are sent for each thread of the workers: one waits while one runs."""
_KEPT = 2
"""Open plans in a worker process: the current one, and one that another thread may still use"""
_SHIPPED = ("precision", "cache_gb", "part_rows", "memory_gb")
"""Settings that workers take over. The device is that of each worker."""
_TRIM_OF_DASK = "65536"
"""``MALLOC_TRIM_THRESHOLD_`` that dask gives to workers by default"""
_MALLOC = {-1: 2**27, -3: 2**25}
"""``M_TRIM_THRESHOLD`` and ``M_MMAP_THRESHOLD`` of glibc, in bytes: free memory that is kept, and arrays of their own."""


def active_client() -> Client | None:
    """Return the dask ``Client`` that work is sent to; ``None`` without one, and inside tasks of dask.

    Raises
    ------
    RuntimeError
        Where several are active and none is the current one, or it has lost its scheduler.
    """
    distributed = sys.modules.get("distributed")
    if distributed is None or not settings.dask or _inside_task():
        return None
    try:
        client = distributed.Client.current()
    except ValueError:  # there is none
        return None
    # this is how distributed itself finds the default Client; there is no public name
    running = {id(c) for c in list(distributed.client._global_clients.values()) if c.status == "running"}
    if len(running) > 1 and distributed.client._current_client.get() is None:
        msg = (
            f"{len(running)} Clients of dask are active. Close all but one, or choose one: "
            "`with client.as_current(): ...`."
        )
        raise RuntimeError(msg)
    if client.status != "running":
        msg = (
            f"the Client of dask is {client.status!r}, not running ({client}). Close it and make a new one, or compute "
            "in this process: settings.dask=False."
        )
        raise RuntimeError(msg)
    return client  # type: ignore[no-any-return]


def _inside_task() -> bool:
    try:
        sys.modules["distributed"].get_worker()
    except ValueError:
        return False
    return True


def device_of_workers(client: Client, resolve: Callable[[str | None], str], device: str | None) -> str:
    """Return the type of the device that ``resolve`` chooses on a worker; wait for a worker if there is none yet."""
    _wait_for_worker(client)
    return _guarded(client, lambda: client.submit(resolve, device, pure=False).result())  # type: ignore[no-any-return]


def on_workers(
    function: Callable[[Opened, Item], Result],
    items: Sequence[Item],
    *,
    client: Client,
    plan: Plan,
    opens: Callable[[Plan], Opened],
    name: str,
) -> Iterator[tuple[int, Result]]:
    """Yield the number of an item and its result, as they are finished.

    Parameters
    ----------
    function
        The task, a function of a module.
    items
        One for each task.
    client
        Where to send them.
    plan
        What all tasks share.
    opens
        What each worker process does once with the plan; tasks get what it returns.
    name
        What the tasks do, a word: the dashboard of dask shows it.
    """
    from distributed import as_completed

    if not items:
        return
    _wait_for_worker(client)
    token = uuid4().hex[:12]
    with exchange_folder() as folder:
        shared = {
            "folder": str(folder),
            "token": token,
            "digest": pack_to(folder / "plan", plan),
            "version": version("histosge"),
            "process": [socket.gethostname(), os.getpid()],
            "settings": {key: getattr(settings, key) for key in _SHIPPED} | {"cache_dir": _cache_dir()},
        }
        waiting = iter(enumerate(items))
        number: dict[str, int] = {}

        def send() -> Any:
            for i, item in waiting:
                key = f"{name}-{token}-{i}"
                number[key] = i
                return client.submit(_work, function, opens, item, shared, key=key, pure=False)
            return None

        def first() -> list[Any]:
            n = max(1, _AHEAD * sum(client.nthreads().values()))
            return [future for _ in range(n) if (future := send()) is not None]

        futures = as_completed(_guarded(client, first))
        try:
            while number:
                future = _guarded(client, lambda: next(futures))
                result = unpack(*_guarded(client, future.result))
                i = number.pop(future.key)
                future.release()
                if (more := _guarded(client, send)) is not None:
                    futures.add(more)
                yield i, result
        finally:
            # after an error: tasks that wait are dropped, those that run end by themselves
            with suppress(Exception):
                client.cancel([future for future in futures.futures if future.key in number])
            with suppress(Exception):
                client.run(_close, token, on_error="ignore")


def _cache_dir() -> str | None:
    chosen = settings.cache_dir or os.environ.get("HISTOSGE_CACHE")
    return str(Path(chosen).expanduser().absolute()) if chosen else None


def _wait_for_worker(client: Client) -> None:
    if not _guarded(client, client.nthreads):
        logger.info("waiting for the first worker of dask (%s)", client.dashboard_link)
        _guarded(client, lambda: client.wait_for_workers(1))


def _guarded(client: Client, call: Callable[[], Any]) -> Any:
    """Call, and say what a user can do where dask itself fails."""
    from concurrent.futures import CancelledError as OfThreads

    from distributed import CancelledError, KilledWorker
    from distributed.client import ClosedClientError
    from distributed.comm import CommClosedError

    try:
        return call()
    except KilledWorker as err:
        msg = (
            f"{err.allowed_failures + 1} workers of dask died one after the other while they computed {err.task!r}, the "
            f"last of them {err.last_worker.address}: probably memory ran out. See their logs; give them more memory, or "
            "choose smaller parts, settings.part_rows."
        )
        raise RuntimeError(msg) from err
    except (CancelledError, OfThreads, CommClosedError, ClosedClientError) as err:
        raise _lost(client) from err
    except ModuleNotFoundError as err:
        if (err.name or "").partition(".")[0] != "histosge":
            raise
        msg = f"a worker of dask does not have this histosge ({err}). Install version {version('histosge')} on all workers."
        raise RuntimeError(msg) from err
    except OSError as err:  # of dask, or of the task
        if client.status == "running":
            raise
        raise _lost(client) from err


def _lost(client: Client) -> RuntimeError:
    address = getattr(client.scheduler, "address", None) or client
    return RuntimeError(
        f"the connection to the scheduler of dask is lost ({address}). Parts of a store that are marked as done are "
        "kept. Start the cluster and the Client again, and make the same call."
    )


# ------------------------------------------------------------------------------------------------------------ on workers


@dataclass
class _Plans:
    """Open plans of a worker process, by token."""

    lock: threading.Lock
    opened: OrderedDict[str, Any]


_PLANS = _Plans(threading.Lock(), OrderedDict())


def _work(function: Callable[[Any, Any], Any], opens: Callable[[Any], Any], item: Any, shared: dict[str, Any]) -> Any:
    """Run one task, on a worker."""
    import torch

    folder = Path(shared["folder"])
    if (here := version("histosge")) != shared["version"]:
        msg = (
            f"{_me()} has histosge {here}, and the process that sends the work {shared['version']}. Install the same "
            "version on both."
        )
        raise RuntimeError(msg)
    if not folder.is_dir():
        msg = (
            f"{_me()} cannot see the folder {str(folder)!r}, in which data travel. Set settings.exchange_dir to a folder "
            "that this process and all workers see."
        )
        raise RuntimeError(msg)
    if shared["process"] != [socket.gethostname(), os.getpid()]:  # with LocalCluster(processes=False) it is this one
        torch.set_num_threads(1)  # dask counts a thread of a worker as one core
        _keep_freed_memory()
        for key, value in {**shared["settings"], "verbosity": min(settings.verbosity, 1), "progress": False}.items():
            setattr(settings, key, value)
    with _PLANS.lock:  # another thread of this worker may need the same plan
        opened = _PLANS.opened.get(shared["token"])
        if opened is None:
            opened = _PLANS.opened[shared["token"]] = opens(unpack_from(folder / "plan", shared["digest"]))
            while len(_PLANS.opened) > _KEPT:
                _PLANS.opened.popitem(last=False)
    result = function(opened, item)
    return pack(result, folder / f"result-{uuid4().hex[:12]}")


@functools.cache
def _keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next array, as it does by itself in other processes.

    dask starts workers with the smallest threshold for trimming. Memory of every array above 128 kB then comes anew
    from the kernel, which clears it: predictions took twice as long (docs/benchmarks.md). A threshold that the user
    has chosen stays.
    """
    if sys.platform != "linux" or os.environ.get("MALLOC_TRIM_THRESHOLD_") != _TRIM_OF_DASK:
        return
    with suppress(OSError, AttributeError):  # only glibc has it
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, n_bytes in _MALLOC.items():
            mallopt(parameter, n_bytes)


def _close(token: str) -> None:
    with _PLANS.lock:
        _PLANS.opened.pop(token, None)


def _me() -> str:
    from distributed import get_worker

    return f"the worker {get_worker().address} on host {socket.gethostname()!r}"
