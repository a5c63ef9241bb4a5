"""What is free, of the machine or of the container or job in it."""

from __future__ import annotations

import pytest

from histosge._settings import available_memory, free_and_limit


def test_free_memory_is_plausible():
    import psutil

    assert 2**24 < available_memory() <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("limit", "used", "stat", "free"),
    [
        ("1000000\n", "400000\n", "anon 1\ninactive_file 0\n", 600_000),
        ("1000000\n", "900000\n", "anon 1\ninactive_file 300000\nfile 5\n", 400_000),  # files are forgotten on demand
        ("1000\n", "2000\n", "inactive_file 0\n", 0),
        ("max\n", "400000\n", "inactive_file 0\n", None),
        (None, None, None, None),
    ],
)
def test_the_limit_of_a_container_counts(tmp_path, limit, used, stat, free):
    for name, text in (("memory.max", limit), ("memory.current", used), ("memory.stat", stat)):
        if text is not None:
            (tmp_path / name).write_text(text)
    found, _ = free_and_limit(tmp_path)
    if free is None:
        import psutil

        assert found == pytest.approx(psutil.virtual_memory().available, rel=0.5)
    else:
        assert found == free
