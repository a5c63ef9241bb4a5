"""Image and places → embeddings: config, forward pass on the device, dense tokens, cache.

Files are imported when a name of theirs is first used: ``histosge cache`` needs the cache and does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from histosge._embedding._cache import EmbeddingCache, cache_folder, open_cache
    from histosge._embedding._config import (
        Recipe,
        SpotParts,
        again,
        embed_parts,
        embed_targets,
        prepare,
        provenance,
        warn_below_token,
    )
    from histosge._embedding._dense import step_tokens
    from histosge._embedding._device import resolve_device
    from histosge._embedding._embed import block_edge_px, embed
    from histosge._embedding._forecast import Forecast, in_words

_FILES = {
    "_cache": ("EmbeddingCache", "cache_folder", "open_cache"),
    "_config": (
        "Recipe",
        "SpotParts",
        "again",
        "embed_parts",
        "embed_targets",
        "prepare",
        "provenance",
        "warn_below_token",
    ),
    "_dense": ("step_tokens",),
    "_device": ("resolve_device",),
    "_embed": ("block_edge_px", "embed"),
    "_forecast": ("Forecast", "in_words"),
}
_FILE = {name: file for file, names in _FILES.items() for name in names}
__all__ = [
    "EmbeddingCache",
    "Forecast",
    "Recipe",
    "SpotParts",
    "again",
    "block_edge_px",
    "cache_folder",
    "embed",
    "embed_parts",
    "embed_targets",
    "in_words",
    "open_cache",
    "prepare",
    "provenance",
    "resolve_device",
    "step_tokens",
    "warn_below_token",
]


def __getattr__(name: str) -> Any:
    if name not in _FILE:
        msg = f"module 'histosge._embedding' has no attribute {name!r}; there are {', '.join(__all__)}."
        raise AttributeError(msg)
    return getattr(importlib.import_module(f"{__name__}.{_FILE[name]}"), name)
