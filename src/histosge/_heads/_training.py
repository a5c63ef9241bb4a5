"""Deterministic training loop of the neural heads (AdamW, one-cycle rate, early stopping), and parallel fits.

Torch's global random state and its number of threads belong to the whole process. So each parallel task draws from its
own generators and computes on one core: results depend neither on the number of workers nor on their timing.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from torch import nn

from histosge._settings import progress_bar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    from torch import Tensor

T = TypeVar("T")

_global_state = threading.RLock()
"""Locked while torch's global random state is in use."""
_worker = threading.local()
"""``stop``: event that cancels the work of this thread, where the thread belongs to a pool"""
_MANY_SPOTS = 2400
"""Up to this number of spots a fixed number of steps is enough."""
_MOST_SPOTS = 20_000
"""From this number of spots on, training takes no longer: docs/benchmarks.md."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    n_steps: int
    """Optimiser steps of one cycle of the learning rate."""
    batch_size: int
    learning_rate: float
    weight_decay: float
    patience: int
    """Training ends after so many epochs without a better loss on the stopping spots."""

    def over(self, n_spots: int) -> Schedule:
        """Read each of many spots as often as with ``_MANY_SPOTS``, in more and larger batches: docs/benchmarks.md.

        Beyond ``_MOST_SPOTS`` each is read less often.
        """
        growth = max(1.0, min(n_spots, _MOST_SPOTS) / _MANY_SPOTS) ** 0.5
        return replace(self, n_steps=round(growth * self.n_steps), batch_size=round(growth * self.batch_size))


@contextmanager
def seeded(rng: np.random.Generator, device: torch.device) -> Iterator[torch.Generator]:
    """Seed torch from ``rng`` inside the block and leave its global state as it was.

    Only one thread at a time is inside such a block, so keep it short. The generator may be used after the block.
    """
    seed = int(rng.integers(2**63 - 1))
    with _global_state, torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one core inside the block: small networks are slower with several threads.

    Measured on two cores, one of them busy: 7 s with one thread, 7 to 29 s with two (docs/benchmarks.md).
    """
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n)


class Dropout(nn.Dropout):
    """Dropout that draws from a generator, where one is set, instead of torch's global state."""

    generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Zero a share of the entries in training, and scale up the others."""
        if not self.training or self.p == 0:
            return x
        # half the time of bernoulli_, which took a large part of the training
        kept = torch.rand(x.shape, generator=self.generator, dtype=x.dtype, device=x.device).ge_(self.p)
        return x * kept.div_(max(1 - self.p, 1e-6))


class _CancelCheck:
    """Progress bar of a parallel task: shows nothing, and stops the task when it is cancelled."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self) -> None:
        if self.stop.is_set():
            raise _CancelledError

    def set_postfix(self, **_: object) -> None:
        pass


class _CancelledError(Exception):
    """Another task failed, or the user interrupted. It is raised and caught inside the pool."""


def steps_bar(*, desc: str, total: int, unit: str, show: bool | None) -> AbstractContextManager[Any]:
    """Open a progress bar for the steps of one fit; of parallel fits only the common bar is shown."""
    stop = getattr(_worker, "stop", None)
    return progress_bar(desc=desc, total=total, unit=unit, show=show) if stop is None else _CancelCheck(stop)


def side_by_side(
    tasks: Sequence[Callable[[], T]], *, device: torch.device, desc: str, progress: bool | None
) -> list[T]:
    """Run independent tasks in parallel, one core each, on as many cores as torch may use; on a GPU, one by one.

    Parameters
    ----------
    tasks
        The tasks, the longest first. Each must draw random numbers from its own generators.
    device
        Where the tasks compute.
    desc
        Label of the progress bar.
    progress
        Whether to show the progress bar.

    Returns
    -------
    What each task returned, in order. The first error that a task raises ends the others and is raised.
    """
    with progress_bar(desc=desc, total=len(tasks), unit="fit", show=progress) as bar:
        if device.type != "cpu":
            return [_counted(task, bar) for task in tasks]
        n_workers = min(torch.get_num_threads(), len(tasks))
        with one_thread():
            if n_workers <= 1:
                return [_counted(task, bar) for task in tasks]
            stop = threading.Event()
            with ThreadPoolExecutor(n_workers, "histosge", _start_worker, (stop,)) as pool:
                futures = [pool.submit(task) for task in tasks]
                try:
                    for future in as_completed(futures):
                        future.result()
                        bar.update()
                except BaseException:
                    # also when interrupted: drop queued tasks; running tasks end at their next step
                    stop.set()
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
            return [future.result() for future in futures]


@contextmanager
def workers(device: torch.device) -> Iterator[Callable[..., Any]]:
    """Map over pieces on as many threads as torch may use, one core each; results do not depend on their number."""
    n = torch.get_num_threads()
    if device.type != "cpu" or n == 1:
        yield map
        return
    try:
        with ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(n)  # new threads take the last number that was set, even by a worker


def _counted(task: Callable[[], T], bar: Any) -> T:
    done = task()
    bar.update()
    return done


def _start_worker(stop: threading.Event) -> None:
    _worker.stop = stop
    torch.set_num_threads(1)  # OpenMP keeps it for each thread


def stopping_spots(n: int, *, rng: np.random.Generator, fraction: float = 0.1) -> tuple[Tensor, Tensor]:
    """Split ``n`` spots into training spots and stopping spots."""
    order = torch.as_tensor(rng.permutation(n))
    n_stop = max(5, round(fraction * n))
    return order[n_stop:].sort().values, order[:n_stop].sort().values


def train(
    module: nn.Module,
    *,
    loss: Callable[[Tensor], Tensor],
    stopping_loss: Callable[[], Tensor],
    n_spots: int,
    schedule: Schedule,
    generator: torch.Generator,
    desc: str,
    progress: bool | None,
    noise: torch.Generator | None = None,
) -> list[float]:
    """Train ``module``; it ends with the weights that have the smallest loss on the stopping spots.

    Parameters
    ----------
    module
        The module. Its weights are changed.
    loss
        Loss of a batch, from the rows of its spots.
    stopping_loss
        Loss on the stopping spots, called once an epoch in evaluation mode.
    n_spots
        Rows to draw batches from.
    schedule
        Steps, batch size and rates.
    generator
        Source of the order of the spots.
    desc
        Label of the progress bar.
    progress
        Whether to show the progress bar.
    noise
        Source of the dropout, on the device of ``module``; ``None`` for torch's global one.

    Returns
    -------
    Loss on the stopping spots after each epoch.
    """
    dropouts = [part for part in module.modules() if isinstance(part, Dropout)]
    for dropout in dropouts:
        dropout.generator = noise
    # parameters are views of one long vector: the same steps, without a call for each parameter
    parameters = list(module.parameters())
    vector = torch.cat([p.detach().flatten() for p in parameters])
    for parameter, view in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
        parameter.data = view.view_as(parameter)
    optimiser = torch.optim.AdamW([vector], lr=schedule.learning_rate, weight_decay=schedule.weight_decay, fused=True)
    per_epoch = -(-n_spots // schedule.batch_size)
    n_epochs = max(1, round(schedule.n_steps / per_epoch))
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, schedule.learning_rate, total_steps=n_epochs * per_epoch)
    history: list[float] = []
    best, best_state, waited = float("inf"), None, 0
    with steps_bar(desc=desc, total=n_epochs, unit="epoch", show=progress) as bar:
        for _ in range(n_epochs):
            module.train()
            for batch in torch.randperm(n_spots, generator=generator).split(schedule.batch_size):
                slopes = torch.autograd.grad(loss(batch), parameters, materialize_grads=True)
                vector.grad = torch.cat([slope.flatten() for slope in slopes])
                vector.grad.mul_((1 / (vector.grad.norm() + 1e-6)).clamp_max(1))  # clip at length 1
                optimiser.step()
                cycle.step()
            module.eval()
            with torch.inference_mode():
                history.append(float(stopping_loss()))
            bar.update()
            bar.set_postfix(loss=f"{history[-1]:.4f}")
            if history[-1] < best:
                best, waited = history[-1], 0
                best_state = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
            else:
                waited += 1
                if waited >= schedule.patience:
                    break
    for dropout in dropouts:
        dropout.generator = None
    if best_state is None:
        msg = (
            "training diverged: the loss on the stopping spots was never a number. "
            "Look for NaN or infinite values in the embedding and the counts."
        )
        raise RuntimeError(msg)
    for parameter in parameters:
        parameter.data = parameter.data.clone()  # an own tensor again: tensors that share memory cannot be stored
    module.load_state_dict(best_state)
    return history
