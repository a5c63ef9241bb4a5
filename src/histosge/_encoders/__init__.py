"""Encoders: frozen pathology networks and those built in, behind one spec.

An encoder has ``spec`` and ``to(device)``. An encoder of tiles has ``embed(tiles)``, an encoder of whole blocks
``embed_block(block, centres)``. Where ``spec.token_px`` is set, it is dense as well: ``embed_tokens(tiles)`` returns
the tokens of tiles, ``embed_block_dense(block, centres)`` those of a block. This module imports neither torch nor timm:
weights and their libraries are loaded when an encoder is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from histosge._encoders._hub import OPEN, PAGES, EncoderAccessError, commit, weights_kept
from histosge._encoders._load import JoinedEncoder, known_spec, load_encoder, loaded_by, split_encoder
from histosge._encoders._spec import IMAGENET_MEAN, IMAGENET_STD, EncoderSpec
from histosge._encoders._table import (
    ALIASES,
    BUILT_IN,
    DEFAULT_ENCODER,
    QUICK_ENCODER,
    TABLE,
    code_of,
    encoders,
    listed_spec,
    with_tokens,
)

if TYPE_CHECKING:
    from histosge._encoders._identity import encoder_digest, precision_of
    from histosge._encoders._lazyslide import wrap_model
    from histosge._encoders._tile_encoder import TileEncoder

_WITH_TORCH = {
    "TileEncoder": "_tile_encoder",
    "encoder_digest": "_identity",
    "precision_of": "_identity",
    "wrap_model": "_lazyslide",
}


def __getattr__(name: str) -> Any:
    if name not in _WITH_TORCH:
        msg = f"module 'histosge._encoders' has no attribute {name!r}."
        raise AttributeError(msg)
    return getattr(importlib.import_module(f"{__name__}.{_WITH_TORCH[name]}"), name)
