"""The training loop of the neural heads: AdamW, one-cycle rate, early stopping, deterministic."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from histosge._settings import progress_bar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    from torch import Tensor, nn


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    n_steps: int
    """Optimiser steps that the learning rate's cycle is laid out for."""
    batch_size: int
    learning_rate: float
    weight_decay: float
    patience: int
    """Epochs without a better loss on the stopping spots after which training ends."""


@contextmanager
def seeded(rng: np.random.Generator, device: torch.device) -> Iterator[torch.Generator]:
    """Seed torch from ``rng`` inside the block and leave its global state as it was."""
    seed = int(rng.integers(2**63 - 1))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one core inside the block: for small networks threads cost more than they bring.

    Measured on two cores, one of them busy: 7 s with one thread, 7 to 29 s with two (docs/benchmarks.md).
    """
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n)


def stopping_spots(n: int, *, rng: np.random.Generator, fraction: float = 0.1) -> tuple[Tensor, Tensor]:
    """Split ``n`` spots into those to learn from and those that say when to stop."""
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
) -> list[float]:
    """Train ``module`` and leave it with the weights that did best on the stopping spots.

    Parameters
    ----------
    module
        What is trained, in place.
    loss
        Loss of a batch, given the rows of its spots.
    stopping_loss
        Loss on the stopping spots, called once an epoch in evaluation mode.
    n_spots
        Rows to draw batches from.
    schedule
        Steps, batch size and rates.
    generator
        Source of the order of the spots.
    desc
        What the progress bar says.
    progress
        Whether to show the progress bar.

    Returns
    -------
    Loss on the stopping spots after each epoch.
    """
    optimiser = torch.optim.AdamW(
        module.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay, fused=True
    )
    per_epoch = -(-n_spots // schedule.batch_size)
    n_epochs = max(1, round(schedule.n_steps / per_epoch))
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, schedule.learning_rate, total_steps=n_epochs * per_epoch)
    history: list[float] = []
    best, best_state, waited = float("inf"), None, 0
    with progress_bar(desc=desc, total=n_epochs, unit="epoch", show=progress) as bar:
        for _ in range(n_epochs):
            module.train()
            for batch in torch.randperm(n_spots, generator=generator).split(schedule.batch_size):
                optimiser.zero_grad(set_to_none=True)
                value = loss(batch)
                value.backward()
                torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
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
    if best_state is None:
        msg = (
            "training diverged: the loss on the stopping spots was never a number. "
            "Look for NaN or infinite values in the embedding and the counts."
        )
        raise RuntimeError(msg)
    module.load_state_dict(best_state)
    return history
