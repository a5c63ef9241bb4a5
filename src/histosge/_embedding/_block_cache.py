"""Blocks of a run that are in the cache, and those to compute and put there."""

from __future__ import annotations

import hashlib
from collections import deque
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from histosge._embedding._cache import open_cache
from histosge._settings import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from numpy.typing import NDArray

    from histosge._embedding._cache import CacheGroup, EmbeddingCache
    from histosge._geometry import Footprints
    from histosge._image import Block

_SCHEME = 1
"""Increased when the same pixels and locations give other embeddings."""


class BlockCache:
    """Read blocks of one run from the cache, and put others there.

    A block is identified by its pixels and locations, so that it is not read for another image, another scale or other
    locations, and an interrupted run continues at its last block.
    """

    def __init__(
        self,
        cache: EmbeddingCache | None,
        config: dict[str, Any] | None,
        *,
        rounds: bool,
        on_found: Callable[[int], None] | None = None,
    ) -> None:
        self.n_found = 0
        self._on_found = on_found
        self._cache, self._config, self._rounds = cache, config, rounds
        self._group: CacheGroup | None = None
        self._areas: Footprints | None = None
        self._found: deque[tuple[NDArray[np.int64], NDArray[Any]]] = deque()
        self._waiting: deque[tuple[str, int]] = deque()  # digest of a block and its number of locations
        self._values: list[NDArray[Any]] = []  # of the first block

    @classmethod
    def open(
        cls, encoder: Any, device: torch.device, *, tile_um: float, on_found: Callable[[int], None] | None = None
    ) -> Self:
        """Open the cache, except for encoders whose embeddings depend on unknown things."""
        identity = getattr(encoder, "identity", None)
        cache = None if identity is None else open_cache()
        made_by = None if identity is None or cache is None else identity(device)
        config = None if made_by is None else {"encoder": made_by, "tile_um": tile_um, "scheme": _SCHEME}
        # an encoder without an identity is not ours: do not round its embeddings
        rounds = identity is not None and settings.precision != "float32"
        return cls(cache, config, rounds=rounds, on_found=on_found)

    def todo(self, found: Iterator[Block], *, way: str, areas: Footprints | None = None) -> Iterator[Block]:
        """Yield the blocks that are not in the cache; runs in the thread that reads ahead."""
        self._areas = areas
        if self._cache is not None and self._config is not None:
            self._group = self._cache.group(self._config | {"way": way, "dense": areas is not None})
        try:
            for block in found:
                if self._group is not None:
                    digest = self._digest(block)
                    values = self._group.get(digest)
                    if values is not None and len(values) == len(block.rows):
                        self._found.append((block.rows, values))
                        if self._on_found is not None:
                            self._on_found(len(values))
                        continue
                    self._waiting.append((digest, len(block.rows)))
                yield block
        finally:
            found.close()  # type: ignore[attr-defined]

    def found(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Yield rows and values of the blocks that were in the cache."""
        while self._found:
            rows, values = self._found.popleft()
            self.n_found += len(rows)
            yield rows, values.astype(np.float32)

    def done(
        self, rows: NDArray[np.int64], values: NDArray[np.float32]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Take computed values in the order of ``todo``; round them as in the cache, and put whole blocks there."""
        fits = np.abs(values).max(initial=0) <= np.finfo(np.float16).max
        kept: NDArray[Any] = values.astype(np.float16) if self._rounds and fits else values
        yield rows, kept.astype(np.float32)
        if self._group is None:
            return
        self._values.append(kept)
        while self._waiting and sum(map(len, self._values)) >= self._waiting[0][1]:
            digest, n = self._waiting.popleft()
            so_far = np.concatenate(self._values)
            if np.isfinite(so_far[:n]).all():  # the caller raises on other values
                self._group.put(digest, so_far[:n])
            self._values = [so_far[n:]]

    def _digest(self, block: Block) -> str:
        digest = hashlib.sha256(repr((block.pixels.shape, block.origin_px if self._areas else None)).encode())
        digest.update(np.ascontiguousarray(block.pixels))
        digest.update(np.ascontiguousarray(block.xy_px))
        if self._areas is not None:
            digest.update(self._areas.take(block.rows).digest())
        return digest.hexdigest()
