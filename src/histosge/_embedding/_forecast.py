"""Forecast of the time of a run, from the time of its first batches."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

WORTH_SAYING_S = 600.0
"""Shorter runs need no forecast: the progress bar is enough."""
_SLOW_BATCH_S = 60.0
"""One-time work (loading kernels, compiling a network) takes seconds: a small part of such a batch."""


class Forecast:
    """Expected duration of a run, reported once.

    The first batch includes one-time work, so the second batch is timed, from the end of the first. A first batch that
    takes a minute is used itself. Locations with existing embeddings take no time and are not counted.

    Parameters
    ----------
    n_locations
        Locations of the whole run, which may be several calls of ``embed``: sections, or parts of a store.
    alternative
        Whether the user can choose another encoder; not with a fitted model.
    """

    clock: Callable[[], float] = staticmethod(monotonic)
    """Gives the time in seconds"""

    def __init__(self, n_locations: int, *, alternative: bool = True) -> None:
        self.n_locations = n_locations
        self.alternative = alternative
        self.n_existing = 0
        self._since: float | None = None
        self._n_batches = 0
        self._forecasted = False

    @property
    def n_to_compute(self) -> int:
        """Locations without an embedding when the run began, as far as known."""
        return self.n_locations - self.n_existing

    def existing(self, n: int) -> None:
        """Call where ``n`` locations have an embedding already."""
        self.n_existing += n

    def begin(self) -> None:
        """Call before a batch is computed: starts the clock, if it does not run."""
        if self._since is None:
            self._since = self.clock()

    def pause(self) -> None:
        """Stop the clock until the next batch."""
        self._since = None

    def computed(self, n: float) -> float | None:
        """Count a batch of ``n`` locations; return the seconds of the whole run, once, where it is long."""
        if self._forecasted or self._since is None:
            return None
        now = self.clock()
        took, self._since = now - self._since, now
        self._n_batches += 1
        if self._n_batches == 1 and took < _SLOW_BATCH_S:
            return None
        self._forecasted = True
        expected = took / n * self.n_to_compute
        return expected if expected > WORTH_SAYING_S else None


def name_device(device: torch.device) -> str:
    """Name a device in a log line; a GPU has a number."""
    return {"cpu": "this processor", "cuda": f"cuda:{device.index or 0}"}.get(device.type, str(device))


def in_words(seconds: float) -> str:
    """Write a duration, rounded: "about 40 min", "about 5 h", "about 3 days"."""
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if minutes < 1:
        return "less than a minute"
    if minutes < 9.5:
        return f"about {minutes:.0f} min"
    if minutes < 97.5:
        return f"about {5 * round(minutes / 5)} min"
    if hours < 9.75:
        return f"about {round(2 * hours) / 2:g} h"
    if hours < 35.5:
        return f"about {hours:.0f} h"
    if days < 9.75:
        return f"about {round(2 * days) / 2:g} days"
    return f"about {days:.0f} days"
