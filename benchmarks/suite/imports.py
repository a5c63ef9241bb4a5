"""What importing costs."""

from __future__ import annotations


def timeraw_import() -> str:
    """Import the package, in a process of its own."""
    return "import histosge"


def timeraw_tl() -> str:
    """Import what a call needs, in a process of its own."""
    return "import histosge.tl"


timeraw_tl.number = timeraw_import.number = 1  # type: ignore[attr-defined]
timeraw_tl.repeat = timeraw_import.repeat = 5  # type: ignore[attr-defined]
