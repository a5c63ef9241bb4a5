"""Settings of every test, those in docstrings included; which tests do arithmetic, and in which order they run."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections import Counter

import pytest

# before anything is imported: no test reaches the network, opens a window, or fights for cores with the other workers
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"  # servers of the tests are on this machine
# nor the user's caches
_CACHE = tempfile.mkdtemp(prefix="histosge-tests-")
os.environ["HISTOSGE_CACHE"] = os.path.join(_CACHE, "session")  # noqa: PTH118
os.environ["HISTOSGE_STORES"] = os.path.join(_CACHE, "stores")  # noqa: PTH118
os.environ["HISTOSGE_DATA"] = os.path.join(_CACHE, "data")  # noqa: PTH118
os.environ["HF_HUB_CACHE"] = os.path.join(_CACHE, "hub")  # noqa: PTH118
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)


_ARITHMETIC = {
    "aggregate",
    "calibration",
    "conservation",
    "coverage",
    "datasets",
    "dense",
    "embedding",
    "evaluation",
    "geometry",
    "heads",
    "holdout",
    "image",
    "metrics",
    "model",
    "splits",
    "stain_texture",
    "targets",
    "tiles",
    "tokens",
}
"""Files of which results may depend on the processor: their tests are marked ``arithmetic``."""


def pytest_addoption(parser):
    """Add what .ci/machines and `make campaign` need."""
    parser.addoption("--reverse", action="store_true", help="run the tests in reverse order: none may need another one")
    parser.addoption("--campaign", action="store_true", help="run tests/campaign whole, not in its short form")


@pytest.hookimpl(tryfirst=True)  # before what is not marked is left out
def pytest_collection_modifyitems(config, items):
    """Mark the tests that do arithmetic, and turn the order round."""
    for item in items:
        if item.path.stem.removeprefix("test_") in _ARITHMETIC:
            item.add_marker("arithmetic")
    if config.getoption("reverse"):
        items.reverse()


def pytest_terminal_summary(terminalreporter):
    """Print the counts of tests/campaign, as docs/reliability.md shows them."""
    rows = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "teardown":
                for what, found in (value for name, value in report.user_properties if name == "campaign"):
                    rows.setdefault(what, Counter()).update(found)
    if rows:
        terminalreporter.section("campaign")
        terminalreporter.write_line("| what | tried | outcomes |\n|---|---|---|")
        for what, outcomes in sorted(rows.items()):
            found = ", ".join(f"{n:,} {outcome}" for outcome, n in outcomes.items())
            terminalreporter.write_line(f"| {what} | {sum(outcomes.values()):,} | {found} |")


@pytest.fixture(scope="session")
def _made():
    return {}


@pytest.fixture(autouse=True)
def _made_once(request, monkeypatch, _made):
    """Examples of docstrings all begin with the same section: it is made once for each worker."""
    if not isinstance(request.node, pytest.DoctestItem):
        return
    from spatialdata import SpatialData

    from histosge import datasets

    original = datasets.synthetic

    def synthetic(**options):
        key = tuple(sorted(options.items()))
        if key not in _made:
            _made[key] = original(**options)
        s = _made[key]  # elements are shared, holders and tables are not
        tables = {name: table.copy() for name, table in s.tables.items()}
        return SpatialData(images=dict(s.images), shapes=dict(s.shapes), tables=tables)

    if request.node.name != "histosge.datasets._synthetic.synthetic":
        monkeypatch.setattr(datasets, "synthetic", synthetic)
