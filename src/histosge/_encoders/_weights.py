"""Weights that are loaded are the weights: no part of a network stays untrained, and no pickle is run."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_HEADS = ("classifier", "fc", "head", "head_dist", "heads", "last_linear", "pooler")
"""First parts of the names of classifiers, which an encoder may lack"""
_WEIGHTS_ONLY, _ANYTHING = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class Loading:
    """What the libraries of encoders loaded into which network, and left out."""

    def __init__(self) -> None:
        self._left_out: dict[int, tuple[nn.Module, list[str], list[str]]] = {}

    def note(
        self, network: nn.Module, state: Mapping[str, Any] | None, missing: Iterable[str], extra: Iterable[str]
    ) -> None:
        """Note the names that are left out, with the loaded ``state`` where it is known.

        Tables of whole numbers are computed, and old checkpoints hold or lack them.
        """
        own = network.state_dict()
        self._left_out[id(network)] = (
            network,
            sorted(name for name in missing if _is_real(own.get(name))),
            sorted(
                name
                for name in extra
                if (state is None or _is_real(state.get(name))) and name.split(".")[0] not in _HEADS
            ),
        )

    def check(self, network: nn.Module, *, name: str, weights: object, by_torch: bool) -> None:
        """Raise where the weights of a network are not those that were asked for, or not finite.

        Parameters
        ----------
        network
            The network.
        name
            Name of the encoder.
        weights
            Where the weights come from, for the message; ``None`` is the hub.
        by_torch
            Whether the library loads with ``nn.Module.load_state_dict``: without a call of it, nothing was loaded.
        """
        of = f"weights={str(weights)!r}" if weights is not None else "the weights on the hub"
        if by_torch and id(network) not in self._left_out:
            msg = f"{of} were not loaded into encoder {name!r}: its library knows no way. Pass another file or folder."
            raise ValueError(msg)
        _, missing, extra = self._left_out.get(id(network), (network, [], []))
        refuse_other_weights(missing, extra, name=name, weights=weights)
        masks = {t for t, _ in network.named_buffers() if not t.split(".")[-1].startswith("running_")}  # of attention
        broken = [
            tensor for tensor, values in network.state_dict().items() if not _is_finite(values, masked=tensor in masks)
        ]
        if broken:
            msg = (
                f"{of} of encoder {name!r} are damaged: {_few(broken)} {'has' if len(broken) == 1 else 'have'} values "
                "that are not finite. Download the weights again, and compare them with the checksums of their page."
            )
            raise ValueError(msg)


def refuse_other_weights(missing: list[str], extra: list[str], *, name: str, weights: object) -> None:
    """Raise where weights lack tensors of the network, or hold others."""
    if not missing and not extra:
        return
    of = f"weights={str(weights)!r}" if weights is not None else "the weights on the hub"
    lacks = [f"the file lacks {_few(missing)}"] if missing else []
    holds = [f"the network has no {_few(extra)}"] if extra else []
    msg = (
        f"{of} are not those of encoder {name!r}: {'; '.join(lacks + holds)}. It would not be the network that was "
        "trained. Name the encoder that the weights belong to, or pass its own weights; or build the network yourself "
        "and pass it: histosge.load_encoder(module, spec=...)."
    )
    raise ValueError(msg)


@contextmanager
def watched(*, trusted: bool = False) -> Iterator[Loading]:
    """Note what libraries load, which they do leniently; have torch refuse pickles unless ``trusted``.

    Some libraries pass ``weights_only=False``, and torch before 2.6 has it by default; torch's own variable overrules
    both.
    """
    loading, original = Loading(), nn.Module.load_state_dict
    before = {name: os.environ.get(name) for name in (_WEIGHTS_ONLY, _ANYTHING)}

    def load(network: nn.Module, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        result = original(network, state_dict, *args, **options)
        loading.note(network, state_dict, result.missing_keys, result.unexpected_keys)
        return result

    nn.Module.load_state_dict = load  # type: ignore[assignment,method-assign]
    try:
        if not trusted:
            os.environ.pop(_ANYTHING, None)
            os.environ[_WEIGHTS_ONLY] = "1"
        yield loading
    finally:
        nn.Module.load_state_dict = original  # type: ignore[method-assign]
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _is_real(values: Any) -> bool:
    return isinstance(values, Tensor) and values.is_floating_point()


def _is_finite(values: Any, *, masked: bool) -> bool:
    """Whether no value is NaN or infinite, in one pass; masks among buffers may be infinite."""
    if not _is_real(values) or values.numel() == 0:
        return True
    ends = torch.stack(torch.aminmax(values))
    return not bool(ends.isnan().any() if masked else (~ends.isfinite()).any())


def _few(names: list[str]) -> str:
    more = len(names) - 3
    return ", ".join(map(repr, names[:3])) + (f" and {more} more" if more > 0 else "")
