"""The identity of an encoder: one digest of all that its embeddings depend on, except pixels, scale and precision.

Cache, embedding tables, models and stores know an encoder by it. The precision is a second fact (:func:`precision_of`):
it depends on the device, and a model that was trained on a GPU may predict on a processor.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import joblib
import numpy as np
import torch
from torch import Tensor, nn

from histosge._settings import logger

if TYPE_CHECKING:
    from histosge._encoders._spec import EncoderSpec

_INPUT = ("tile_px", "token_px", "embed_dim", "mean", "std", "whole_blocks")
"""Of the spec, what decides how a tile becomes numbers. The scale is compared by itself, since ``tile_um=`` sets it."""
_SAMPLES = 16
"""Values of each tensor that are compared to see whether weights have changed since they were hashed"""
_WORTH_SAYING = 1e9
"""Bytes of weights whose hash takes a second or more"""

_HASHED: WeakKeyDictionary[nn.Module, tuple[Any, str]] = WeakKeyDictionary()
"""Hash of the weights of each network, and what they looked like then"""


def encoder_digest(encoder: Any) -> str:
    """Return the digest of a loaded encoder.

    It has the weights (parameters and buffers, hashed whole), the input (colours, size of tiles and tokens), the
    classes of the network and of what pools it, and for a module of the user's ``spec.revision``. A built-in encoder
    has no weights but the ``version`` of its arithmetic. Of any other object, networks, tensors and arrays among its
    attributes are hashed. Code is known by names only, and so are options that leave no trace in weights: who changes
    the code of an own encoder gives its spec another ``revision``.
    """
    spec: EncoderSpec = encoder.spec
    network, owner = getattr(encoder, "module", None), getattr(encoder, "owner", None)
    facts = {
        "input": {name: getattr(spec, name) for name in _INPUT},
        "code": [type(each).__name__ for each in (encoder, network, owner) if each is not None],
        "pooling": str(getattr(network, "global_pool", "")),
        "revision": spec.revision if spec.source == "user" else None,
        "version": getattr(encoder, "version", None) if spec.source == "built-in" else None,
        "weights": {name: _hash(part) for name, part in sorted(_parts(encoder).items())},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def precision_of(encoder: Any, device: torch.device) -> str:
    """Type that an encoder computes in on a device: ``"float32"`` or ``"bfloat16"``."""
    found = encoder.precision(device) if callable(getattr(encoder, "precision", None)) else torch.float32
    return str(found).removeprefix("torch.")


def _parts(encoder: Any) -> dict[str, Any]:
    """Whatever holds numbers: the network, else networks, tensors and arrays among the attributes."""
    if isinstance(encoder, nn.Module):
        return {"": encoder}
    if isinstance(getattr(encoder, "module", None), nn.Module):
        return {"": encoder.module}
    if encoder.spec.source == "built-in":
        return {}
    return {k: v for k, v in getattr(encoder, "__dict__", {}).items() if isinstance(v, nn.Module | Tensor | np.ndarray)}


def _hash(part: Any) -> str:
    if isinstance(part, nn.Module):
        return _weights_digest(part)
    digest = hashlib.sha256()
    _add(digest, "", part)
    return digest.hexdigest()


def _weights_digest(network: nn.Module) -> str:
    """Hash all weights and buffers by name, once, unless they have changed."""
    state = network.state_dict()
    looks = [(name, *_look(value)) for name, value in state.items()]
    known = _HASHED.get(network)
    if known is not None and known[0] == looks:
        return known[1]
    n_bytes = sum(value.nbytes for value in state.values() if isinstance(value, Tensor))
    if n_bytes > _WORTH_SAYING:
        logger.debug("hashing %.1f GB of weights, once", n_bytes / 1e9)
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        _add(digest, name, value)
    _HASHED[network] = looks, digest.hexdigest()
    return digest.hexdigest()


def _look(value: Any) -> tuple[Any, ...]:
    """Describe a tensor cheaply: its count of changes in place, and some values, for changes that are not counted."""
    if not _plain(value):
        return (joblib.hash(value),)
    flat = value.detach().reshape(-1)
    some = flat[:: max(1, len(flat) // _SAMPLES)].cpu().contiguous().view(torch.uint8).numpy().tobytes()
    changes = 0 if value.is_inference() else value._version
    return value.dtype, tuple(value.shape), changes, some


def _add(digest: Any, name: str, value: Any) -> None:
    if not _plain(value):  # an array, or the extra state of a module
        digest.update(f"{name} {joblib.hash(value)}".encode())
        return
    digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
    digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized
