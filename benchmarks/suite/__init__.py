"""Benchmarks for asv, which follows speed and memory from commit to commit.

Each is small: the sizes in ``docs/benchmarks.md`` are those of the scripts one folder up. Parameters that take minutes
run where the environment variable HISTOSGE_SLOW is set.
"""

from __future__ import annotations

import os


def skip_if_slow(slow: bool) -> None:  # noqa: FBT001  asv hands parameters on by position
    """Leave a parameter out, in asv's way, unless slow ones are asked for."""
    if slow and not os.environ.get("HISTOSGE_SLOW"):
        msg = "set HISTOSGE_SLOW=1 to run it"
        raise NotImplementedError(msg)
