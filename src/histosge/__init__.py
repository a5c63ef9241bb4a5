"""Super-resolved spatial transcriptomics from H&E images and Visium-like spots, in scverse."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from histosge._settings import settings

if TYPE_CHECKING:
    from histosge import datasets, io, pl, pp, tl
    from histosge._encoders import EncoderSpec, encoders, load_encoder
    from histosge._heads import Head, Queries, Spots
    from histosge._model import Model, ModelError

__version__ = "0.1.0"
__all__ = [
    "EncoderSpec",
    "Head",
    "Model",
    "ModelError",
    "Queries",
    "Spots",
    "datasets",
    "encoders",
    "io",
    "load_encoder",
    "pl",
    "pp",
    "settings",
    "tl",
]

# nothing heavy at import: torch, scanpy and spatialdata come with the first call that needs them
_NAMESPACES = ("datasets", "io", "pl", "pp", "tl")
_ROOMS = {
    "EncoderSpec": "histosge._encoders",
    "Head": "histosge._heads",
    "Model": "histosge._model",
    "ModelError": "histosge._model",
    "Queries": "histosge._heads",
    "Spots": "histosge._heads",
    "encoders": "histosge._encoders",
    "load_encoder": "histosge._encoders",
}


def __getattr__(name: str) -> Any:
    if name in _NAMESPACES:
        return importlib.import_module(f"histosge.{name}")
    if name in _ROOMS:
        return getattr(importlib.import_module(_ROOMS[name]), name)
    msg = f"module 'histosge' has no attribute {name!r}; there are {', '.join(__all__)}."
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
