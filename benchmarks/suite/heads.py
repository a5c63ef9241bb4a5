"""Heads asked at many places."""

from __future__ import annotations

import numpy as np

from . import skip_if_slow


class Predict:
    """Places in batches, from 2000 measured spots and 1000 genes."""

    params = (["kriging", "in-context"], [2_000, 20_000, 200_000])
    param_names = ("head", "n_places")
    timeout = 300
    n_spots, n_genes, n_embedding = 2_000, 1_000, 128

    def setup(self, head: str, n_places: int) -> None:
        import torch

        from histosge._heads import Queries, Spots, get_head

        skip_if_slow(n_places > 20_000)
        rng = np.random.default_rng(0)
        side = int(np.ceil(np.sqrt(self.n_spots)))
        row, col = np.divmod(np.arange(self.n_spots), side)
        xy = torch.from_numpy(np.column_stack([col, row]).astype(np.float32) * 100)
        embedding = torch.from_numpy(rng.normal(size=(self.n_spots, self.n_embedding)).astype(np.float32))
        expression = torch.from_numpy(np.log1p(rng.gamma(1.0, size=(self.n_spots, self.n_genes))).astype(np.float32))
        self.spots = Spots(embedding, expression, xy, torch.zeros(self.n_spots, dtype=torch.int64), 100.0)
        self.head = get_head(head)().fit(self.spots, rng=rng, progress=False)
        where = torch.from_numpy(rng.uniform(0, 100 * side, (n_places, 2)).astype(np.float32))
        what = torch.from_numpy(rng.normal(size=(n_places, self.n_embedding)).astype(np.float32))
        self.places = Queries(what, where, torch.zeros(n_places, dtype=torch.int64), torch.full((n_places,), -1))

    def time_predict(self, head: str, n_places: int) -> None:
        conditions = [self.head.condition(self.spots)]
        for start in range(0, n_places, 8192):
            some = self.places.take(slice(start, start + 8192))
            (components,) = self.head.components([self.head], conditions, some)
            self.head.expansion()(components)


class Fit:
    """The default heads, fitted to spots with a smooth expression."""

    params = (["kriging", "in-context"],)
    param_names = ("head",)
    timeout = 300
    n_spots = 1_000

    def setup(self, head: str) -> None:
        import torch

        from histosge._heads import Spots

        rng = np.random.default_rng(0)
        side = int(np.ceil(np.sqrt(self.n_spots)))
        row, col = np.divmod(np.arange(self.n_spots), side)
        xy = np.column_stack([col, row]).astype(np.float32) * 100
        wave = np.sin(xy / 700 @ rng.normal(size=(2, 16)))
        embedding = wave @ rng.normal(size=(16, 64)) + rng.normal(size=(self.n_spots, 64))
        expression = np.log1p(rng.poisson(np.exp(wave @ rng.normal(0, 0.3, size=(16, 300)))))
        tensors = [torch.from_numpy(a.astype(np.float32)) for a in (embedding, expression, xy)]
        self.spots = Spots(*tensors, torch.zeros(self.n_spots, dtype=torch.int64), 100.0)

    def time_fit(self, head: str) -> None:
        from histosge._heads import get_head

        get_head(head)().fit(self.spots, rng=np.random.default_rng(0), progress=False)
