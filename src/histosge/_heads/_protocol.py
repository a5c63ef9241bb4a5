"""The interface of heads: what each takes and returns."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, runtime_checkable

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy as np
    from torch import Tensor

    Run = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
    """``map``, or the ``map`` of a pool of threads"""
    Expansion = Callable[[Tensor], Tensor]
    """From components (m, Q) to expression (m, g)"""


@dataclass(frozen=True)
class SubSpots:
    """Sub-spots: areas smaller than a spot. A spot measures their mean."""

    embedding: Tensor
    """(p, d) float32, of all sub-spots of all spots"""
    xy_um: Tensor
    """(p, 2) float32"""
    index: Tensor
    """(n, k) int64, rows of each spot's sub-spots; padded with any row where a spot has fewer"""
    weight: Tensor
    """(n, k) float32, share of the spot's footprint that each sub-spot covers; rows sum to 1, padding is 0"""

    def take(self, rows: Tensor) -> SubSpots:
        """Return the sub-spots of some of the spots."""
        return SubSpots(self.embedding, self.xy_um, self.index[rows], self.weight[rows])

    def to(self, device: torch.device | str) -> SubSpots:
        """Move to ``device``."""
        return SubSpots(*(tensor.to(device) for tensor in (self.embedding, self.xy_um, self.index, self.weight)))

    @classmethod
    def whole(cls, spots: Spots) -> SubSpots:
        """Give each spot one sub-spot, the spot itself."""
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
    """(n, 2) float32, in the coordinates of the spot's own section"""
    section: Tensor
    """(n,) int64, number of the spot's section; spots of different sections are no neighbours"""
    pitch_um: float
    """Distance of neighbouring spots: the unit of distance for heads"""
    sub_spots: SubSpots | None = None
    """Sub-spots, where they are known"""

    def __len__(self) -> int:
        return len(self.embedding)

    def take(self, rows: Tensor) -> Spots:
        """Return some of the spots."""
        below = None if self.sub_spots is None else self.sub_spots.take(rows)
        embedding, expression, xy_um, section = (tensor[rows] for tensor in self._tensors())
        return Spots(embedding, expression, xy_um, section, self.pitch_um, below)

    def to(self, device: torch.device | str) -> Spots:
        """Move to ``device``."""
        below = None if self.sub_spots is None else self.sub_spots.to(device)
        embedding, expression, xy_um, section = (tensor.to(device) for tensor in self._tensors())
        return Spots(embedding, expression, xy_um, section, self.pitch_um, below)

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.embedding, self.expression, self.xy_um, self.section


@dataclass(frozen=True)
class Queries:
    """Targets to predict at."""

    embedding: Tensor
    """(m, d) float32"""
    xy_um: Tensor
    """(m, 2) float32, in the coordinates of the target's own section"""
    section: Tensor
    """(m,) int64, number of the target's section; with a number that no spot has, such as -1, it has no neighbours"""
    spot_index: Tensor
    """(m,) int64, row of the spot of the context that lies at the target and is hidden from it; -1 for none"""

    def __len__(self) -> int:
        return len(self.embedding)

    def take(self, rows: Tensor | slice) -> Queries:
        """Return some of the targets."""
        return Queries(self.embedding[rows], self.xy_um[rows], self.section[rows], self.spot_index[rows])

    @classmethod
    def of(cls, spots: Spots, *, hidden: bool = True) -> Queries:
        """Predict at measured spots: each is hidden from itself, or with ``hidden=False`` not in the context."""
        n, device = len(spots), spots.embedding.device
        spot_index = torch.arange(n, device=device) if hidden else torch.full((n,), -1, device=device)
        return cls(spots.embedding, spots.xy_um, spots.section, spot_index)


class Head(Protocol):
    """From embeddings, positions and measured neighbours to expression.

    A head of your own: write a class with a ``name`` and the four methods below, and pass the class, or an object of it
    that is not fitted, as ``head=``. Subclass ``histosge.Head`` to inherit :meth:`to` and the defaults of the other
    attributes. In another process :meth:`histosge.Model.load` needs the class as ``head=``, unless an installed
    package names it in the entry point group ``histosge.heads`` (``my-head = "my_package:MyHead"``).

    A head sees tensors only. All expression is log1p-normalised, all positions are in µm. A fitted head does not
    change: :meth:`predict` moves and stores nothing.

    Examples
    --------
    >>> import histosge as sge
    >>> class Median(sge.Head):
    ...     name = "median"
    ...
    ...     def __init__(self, median=None):
    ...         self.median = median
    ...
    ...     def fit(self, spots, *, rng, progress=None):
    ...         self.median = spots.expression.median(dim=0).values
    ...         return self
    ...
    ...     def predict(self, queries, *, context):
    ...         return self.median.expand(len(queries), -1)
    ...
    ...     def state(self):
    ...         return {}, {"median": self.median}
    ...
    ...     @classmethod
    ...     def from_state(cls, config, weights):
    ...         return cls(weights["median"])
    >>> sdata = sge.datasets.synthetic()
    >>> sge.tl.fit(sdata, encoder="stain-texture", head=Median, genes=20).head
    'median'
    """

    name: ClassVar[str]
    ensembles_folds: ClassVar[bool] = False
    """Whether a model is the mean of the heads of all folds (networks), or one head fitted on all spots."""
    learns_sub_spots: ClassVar[bool] = False
    """Whether it learns from sub-spots, where they are given."""
    losses: Sequence[float] = ()
    """Loss on the stopping spots after each epoch of the last :meth:`fit`; empty where nothing is trained in epochs"""

    @abstractmethod
    def fit(self, spots: Spots, *, rng: np.random.Generator, progress: bool | None = None) -> Self:
        """Learn from measured spots; all choices (scaling, components, early stopping) depend on these alone."""
        ...

    @abstractmethod
    def predict(self, queries: Queries, *, context: Spots) -> Tensor:
        """Predict (m, g) log1p expression at ``queries``, given the measured spots around them.

        Head, queries and context are on one device. The prediction of a target depends on no other target.
        """
        ...

    @abstractmethod
    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return configuration (for JSON) and weights (for safetensors)."""
        ...

    @classmethod
    @abstractmethod
    def from_state(cls, config: dict[str, Any], weights: dict[str, Tensor]) -> Self:
        """Restore a fitted head, on the device of the weights."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Return the fitted head on ``device``: itself, if it is there already."""
        config, weights = self.state()
        moved = {name: tensor.to(device) for name, tensor in weights.items()}
        if all(moved[name] is tensor for name, tensor in weights.items()):
            return self
        return self.from_state(config, moved)


@runtime_checkable
class LowRank(Head, Protocol):
    """A head that predicts a few components per target, from which the expression of all genes is computed.

    :meth:`condition` computes once what depends on the context alone, for any number of predictions.
    """

    @abstractmethod
    def condition(self, context: Spots, *, run: Run = map) -> Any:
        """Compute what depends on the context alone."""
        ...

    @classmethod
    @abstractmethod
    def components(
        cls, heads: Sequence[Self], conditions: Sequence[Any], queries: Queries, *, run: Run = map
    ) -> list[Tensor]:
        """Predict components (m, Q) by several heads of this class, given the result of :meth:`condition` of each.

        ``run`` computes independent pieces.
        """
        ...

    @abstractmethod
    def expansion(self, columns: Tensor | None = None) -> Expansion:
        """Return the function from components to expression, of all genes or of ``columns``."""
        ...

    def predict(self, queries: Queries, *, context: Spots) -> Tensor:
        """Condition on the context, and expand the components."""
        (components,) = self.components([self], [self.condition(context)], queries)
        with torch.inference_mode():
            return self.expansion()(components)
