"""What this machine, or the container or job in it, has to give."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes that are free, of this machine or of the container or job it runs in."""
    return free_and_limit()[0]


def free_and_limit() -> tuple[int, int | None]:
    """Bytes that are free, and those that the container or the scheduler allows at most."""
    import psutil

    free, limit = int(psutil.virtual_memory().available), None
    for group in control_groups():
        with suppress(OSError, ValueError):  # no limit, or "max"
            one, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            # files that were read count as used, and are forgotten on demand
            free = max(min(free, one - used + int(stat.get("inactive_file", 0))), 0)
            limit = one if limit is None else min(one, limit)
    return free, limit


def control_groups() -> list[Path]:
    """Control groups that this process is in, innermost first: each may have limits."""
    inner = _CGROUP
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                inner = _CGROUP / line.removeprefix("0::").strip("/")
    return [group for group in (inner, *inner.parents) if group.is_relative_to(_CGROUP)]
