"""Contenders side by side: interleaved in one process, medians, ratios."""

from __future__ import annotations

import os
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Contender:
    """Something that is timed."""

    name: str
    run: Callable[[], int]
    """Does the work and says how many items that was"""
    unit: str = "tiles"


@dataclass(frozen=True)
class Timed:
    """What was measured of a contender."""

    name: str
    unit: str
    n: int
    seconds: list[float]

    @property
    def rate(self) -> float:
        """Items per second, by the median."""
        return self.n / float(np.median(self.seconds))


def interleave(contenders: list[Contender], *, repeats: int) -> dict[str, Timed]:
    """Run all, one after the other, ``repeats`` times; one more run of each before that is not counted."""
    counts = {c.name: c.run() for c in contenders}
    seconds: dict[str, list[float]] = {c.name: [] for c in contenders}
    for i in range(repeats):
        # each round begins with another one: none is always the first after the slowest
        for c in contenders[i % len(contenders) :] + contenders[: i % len(contenders)]:
            start = perf_counter()
            n = c.run()
            seconds[c.name].append(perf_counter() - start)
            if n != counts[c.name]:
                msg = f"{c.name}: {n} {c.unit} now, {counts[c.name]} before."
                raise RuntimeError(msg)
    return {c.name: Timed(c.name, c.unit, counts[c.name], seconds[c.name]) for c in contenders}


def table(title: str, measured: dict[str, Timed], *, reference: str) -> None:
    """Print rates, their spread, and how many times as fast the reference is."""
    print(f"\n{title} (load {os.getloadavg()[0]:.1f}, medians of {len(measured[reference].seconds)})\n")
    print("| contender | n | per second | slowest to fastest | reference is |\n|---|---|---|---|---|")
    for name, one in measured.items():
        spread = f"{one.n / max(one.seconds):,.1f} to {one.n / min(one.seconds):,.1f}"
        ratio = f"{measured[reference].rate / one.rate:.3g} x as fast" if one.unit == measured[reference].unit else ""
        ratio = "the reference" if name == reference else ratio
        print(f"| {name} | {one.n} {one.unit} | {one.rate:,.1f} | {spread} | {ratio} |")
