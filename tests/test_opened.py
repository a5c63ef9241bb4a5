"""Sections as doors take them: in memory, or where they lie."""

from __future__ import annotations

import numpy as np
import pytest
from spatialdata import SpatialData

import histosge as sge
from histosge._readers import name_of, opened, path_of


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("opened") / "liver.1.zarr"
    sge.datasets.synthetic(n_rows=7, n_cols=7, n_genes=8, mpp=2.0).write(path)
    return path


@pytest.mark.parametrize("kind", [str, type(None)], ids=["text", "path"])
def test_a_path_is_opened_and_stays_on_disk(path, kind):
    found = opened(path if kind is type(None) else str(path))
    assert np.array_equal(found.tables["table"].X.toarray(), opened(path).tables["table"].X.toarray())
    assert found.is_backed()
    assert name_of(path) == name_of(str(path)) == name_of(found) == "liver.1"
    assert path_of(path) == path_of(found) == str(path)


def test_a_section_in_memory_is_itself(sdata):
    assert opened(sdata) is sdata
    assert name_of(sdata) is path_of(sdata) is None


def test_what_is_no_section(tmp_path):
    with pytest.raises(TypeError, match="sdata holds a int: pass SpatialData objects, or paths of sections"):
        opened(3)
    with pytest.raises(FileNotFoundError, match="does not exist: check the path"):
        opened(tmp_path / "nowhere.zarr")
    assert isinstance(opened(SpatialData()), SpatialData)
