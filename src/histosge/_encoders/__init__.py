"""Encoders: frozen pathology image large models (PILM) and the built-in one, behind one spec.

A tile encoder has ``embed(tiles)``, a dense one ``embed_block(block, centres)``; both have ``spec`` and ``to(device)``.
Importing this imports neither torch nor timm: weights and their libraries are loaded when an encoder is asked for.
"""

from __future__ import annotations

from histosge._encoders._registry import encoders, load_encoder
from histosge._encoders._spec import EncoderSpec

__all__ = ["EncoderSpec", "encoders", "load_encoder"]
