"""What every head takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, runtime_checkable

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy as np
    from torch import Tensor

    Run = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
    """``map``, or that of a pool of threads"""
    Expansion = Callable[[Tensor], Tensor]
    """From components (m, Q) to expression (m, g)"""


@dataclass(frozen=True)
class Parts:
    """Parts of spots: the places, finer than a spot, whose mean a spot measures."""

    embedding: Tensor
    """(p, d) float32, of all parts of all spots"""
    xy_um: Tensor
    """(p, 2) float32"""
    index: Tensor
    """(n, k) int64, rows of each spot's parts; filled up with any row where a spot has fewer"""
    weight: Tensor
    """(n, k) float32, share of the spot's footprint that each part covers: rows sum to 1, what fills up has 0"""

    def take(self, rows: Tensor) -> Parts:
        """Return the parts of some of the spots."""
        return Parts(self.embedding, self.xy_um, self.index[rows], self.weight[rows])

    def to(self, device: torch.device | str) -> Parts:
        """Move to ``device``."""
        return Parts(*(tensor.to(device) for tensor in (self.embedding, self.xy_um, self.index, self.weight)))

    @classmethod
    def whole(cls, spots: Spots) -> Parts:
        """Let each spot be one part of itself."""
        n, device = len(spots), spots.embedding.device
        index = torch.arange(n, device=device)[:, None]
        return cls(spots.embedding, spots.xy_um, index, torch.ones(n, 1, device=device))


@dataclass(frozen=True)
class Spots:
    """Measured spots: what a head learns from, and the context it predicts with."""

    embedding: Tensor
    """(n, d) float32"""
    expression: Tensor
    """(n, g) float32, log1p-normalised"""
    xy_um: Tensor
    """(n, 2) float32; sections lie far apart, so that neighbours are always of one section"""
    pitch_um: float
    """Distance of neighbouring spots: the unit that heads see distances in."""
    parts: Parts | None = None
    """What lies below the spots, where that is known"""

    def __len__(self) -> int:
        return len(self.embedding)

    def take(self, rows: Tensor) -> Spots:
        """Return some of the spots."""
        parts = None if self.parts is None else self.parts.take(rows)
        return Spots(self.embedding[rows], self.expression[rows], self.xy_um[rows], self.pitch_um, parts)

    def to(self, device: torch.device | str) -> Spots:
        """Move to ``device``; the very same object where they are there already, by which heads know a context again."""
        embedding, expression, xy_um = (t.to(device) for t in (self.embedding, self.expression, self.xy_um))
        if embedding is self.embedding and expression is self.expression and xy_um is self.xy_um:
            return self
        parts = None if self.parts is None else self.parts.to(device)
        return Spots(embedding, expression, xy_um, self.pitch_um, parts)


@dataclass(frozen=True)
class Queries:
    """Places to predict at."""

    embedding: Tensor
    """(m, d) float32"""
    xy_um: Tensor
    """(m, 2) float32"""
    spot_index: Tensor
    """(m,) int64, row of the context that was measured at this very place and is hidden from it; -1 for none"""

    def __len__(self) -> int:
        return len(self.embedding)

    def take(self, rows: Tensor | slice) -> Queries:
        """Return some of the places."""
        return Queries(self.embedding[rows], self.xy_um[rows], self.spot_index[rows])

    @classmethod
    def of(cls, spots: Spots, *, hidden: bool = True) -> Queries:
        """Predict at measured spots, their own measurement hidden (or not in the context at all)."""
        n, device = len(spots), spots.embedding.device
        spot_index = torch.arange(n, device=device) if hidden else torch.full((n,), -1, device=device)
        return cls(spots.embedding, spots.xy_um, spot_index)


class Head(Protocol):
    """From embeddings, positions and measured neighbours to expression."""

    name: ClassVar[str]
    ensembles_folds: ClassVar[bool]
    """Whether a model is the mean of the heads of all folds (networks), or one head fitted on all spots."""
    divides: ClassVar[bool]
    """Whether it learns from the parts of spots, where they are given."""
    losses: Sequence[float]
    """Loss on the stopping spots after each epoch of the last :meth:`fit`; empty where nothing is trained in epochs"""

    def fit(self, spots: Spots, *, rng: np.random.Generator, progress: bool | None = None) -> Self:
        """Learn from measured spots; every choice (scaling, components, early stopping) is made inside them."""
        ...

    def predict(self, places: Queries, *, context: Spots) -> Tensor:
        """Predict (m, g) log1p expression at ``places``, given the measured spots around them.

        What is said of a place depends on no other place. Places may come in many calls: what a head works out of the
        context it keeps until it is given another object, or fitted again.
        """
        ...

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Give configuration (for JSON) and weights (for safetensors)."""
        ...

    @classmethod
    def from_state(cls, config: dict[str, Any], weights: dict[str, Tensor]) -> Self:
        """Restore a fitted head."""
        ...


@runtime_checkable
class LowRank(Head, Protocol):
    """A head whose answer is a few components, small beside the expression that is made of them."""

    @classmethod
    def answers(cls, heads: Sequence[Self], places: Queries, *, context: Spots, run: Run = map) -> list[Tensor]:
        """Components (m, Q) of each of several heads of this class, their pieces worked out by ``run``."""
        ...

    def expansion(self, columns: Tensor | None = None) -> Expansion:
        """How components become expression, of all genes or of ``columns``: ``predict`` is this of its answer."""
        ...
