"""Read sections from what instruments and other programs write, and write what other programs read."""

from __future__ import annotations

__all__: list[str] = []
