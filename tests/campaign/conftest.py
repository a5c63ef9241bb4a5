"""What the tests of the campaign share: how many cases are tried, and the counts of what came of them."""

from __future__ import annotations

from collections import Counter

import pytest


@pytest.fixture
def tries(request):
    """``tries(short, full)`` is ``full`` under ``--campaign`` (`make campaign`), else ``short``."""
    whole = request.config.getoption("campaign")
    return lambda short, full: full if whole else short


@pytest.fixture
def tally(request):
    """``tally("mutated models")[outcome] += 1`` counts outcomes, which are printed when all tests have run."""
    counts = {}
    yield lambda what: counts.setdefault(what, Counter())
    request.node.user_properties += [("campaign", (what, dict(found))) for what, found in counts.items()]
