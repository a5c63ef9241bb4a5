"""Encoders: frozen pathology image large models (PILM) and the built-in one, behind one spec.

A tile encoder has ``embed(tiles)``, a block encoder ``embed_block(block, centres)``; both have ``spec`` and
``to(device)``. Where ``spec.token_px`` is set, they are dense as well: ``embed_tokens(tiles)`` gives the tokens of tiles,
``embed_block_dense(block, centres)`` those of a block.
Importing this imports neither torch nor timm: weights and their libraries are loaded when an encoder is asked for.
"""

from __future__ import annotations

from histosge._encoders._hub import OPEN, PAGES, EncoderAccessError, weights_kept
from histosge._encoders._load import BUILT_IN, DEFAULT_ENCODER, encoders, lacks_tokens, load_encoder, with_tokens
from histosge._encoders._spec import IMAGENET_MEAN, IMAGENET_STD, EncoderSpec

__all__ = [
    "BUILT_IN",
    "DEFAULT_ENCODER",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "OPEN",
    "PAGES",
    "EncoderAccessError",
    "EncoderSpec",
    "encoders",
    "lacks_tokens",
    "load_encoder",
    "weights_kept",
    "with_tokens",
]
