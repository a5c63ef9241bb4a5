"""Image and locations → embeddings: config, forward pass on the device, dense tokens, cache.

Files are imported when one of their names is first used: ``histosge cache`` needs only the cache, and torch takes
seconds to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from histosge._embedding._cache import EmbeddingCache, cache_folder, open_cache
    from histosge._embedding._config import EmbeddingConfig, EncoderConfig, load_of_model
    from histosge._embedding._dense import step_tokens, tile_weight
    from histosge._embedding._device import resolve_device
    from histosge._embedding._embed import block_edge_px, embed
    from histosge._embedding._embedder import Embedder, SpotParts
    from histosge._embedding._forecast import Forecast, in_words, name_device
    from histosge._embedding._on_workers import EmbedderPlan

_FILES = {
    "_cache": ("EmbeddingCache", "cache_folder", "open_cache"),
    "_config": ("EmbeddingConfig", "EncoderConfig", "load_of_model"),
    "_dense": ("step_tokens", "tile_weight"),
    "_device": ("resolve_device",),
    "_embed": ("block_edge_px", "embed"),
    "_embedder": ("Embedder", "SpotParts"),
    "_forecast": ("Forecast", "in_words", "name_device"),
    "_on_workers": ("EmbedderPlan",),
}
_FILE = {name: file for file, names in _FILES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _FILE:
        msg = f"module 'histosge._embedding' has no attribute {name!r}."
        raise AttributeError(msg)
    return getattr(importlib.import_module(f"{__name__}.{_FILE[name]}"), name)
