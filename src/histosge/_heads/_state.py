"""State of fitted heads: tensors under names with a prefix, such as ``network.embed.weight``."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from histosge._heads._protocol import Head

    N = TypeVar("N", bound=nn.Module)

T = TypeVar("T")


def fitted(value: T | None, head: Head) -> T:
    """Return what only a fitted ``head`` has; raise where it is not fitted."""
    if value is None:
        msg = f"head {head.name!r} is not fitted: call fit() first."
        raise RuntimeError(msg)
    return value


def join_state(**groups: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put groups of tensors into one dict, with the group as prefix of the name."""
    return {f"{group}.{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}


def split_state(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Split a dict of :func:`join_state` into its groups."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        group, _, rest = name.partition(".")
        groups.setdefault(group, {})[rest] = tensor
    return groups


def restore_network(build: Callable[[], N], weights: Mapping[str, Tensor]) -> N:
    """Build a network of the given weights, without drawing random numbers, and without memory of its own."""
    with torch.device("meta"):
        network = build()
    network.load_state_dict(weights, assign=True)  # compares names and shapes
    return network.eval()
