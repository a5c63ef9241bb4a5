from __future__ import annotations

import logging
import os
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings

# beside other work a machine may be slow, and nothing is wrong with the tests
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

_CACHE = Path(os.environ["HISTOSGE_CACHE"]).parent  # of this session, by the conftest.py above


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch):
    """A cache of its own for each test, so that none reads what another computed; not made before it is needed."""
    folder = _CACHE / uuid4().hex
    monkeypatch.setenv("HISTOSGE_CACHE", str(folder))
    return folder


@pytest.fixture
def hub_client(tmp_path, monkeypatch):
    """Change constants of the hub's client, which reads them at each request. Its cache is empty."""
    from huggingface_hub import constants

    def change(**values):
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)

    change(HF_HUB_CACHE=str(tmp_path / "hub"))
    return change


@pytest.fixture
def log(caplog):
    """Messages of histosge's logger, which does not hand them on to the root's."""
    logger = logging.getLogger("histosge")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture(scope="session")
def _section_once():
    import histosge as sge

    return sge.datasets.synthetic(n_rows=12, n_cols=12, n_genes=20, mpp=2.0)


@pytest.fixture
def sdata(_section_once):
    """A small synthetic section; elements are shared, holders are not: add, replace and delete as you like."""
    from spatialdata import SpatialData

    s = _section_once
    return SpatialData(
        images=dict(s.images), shapes=dict(s.shapes), tables={name: table.copy() for name, table in s.tables.items()}
    )
