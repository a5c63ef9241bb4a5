"""Look at results. Every function returns matplotlib axes."""

from __future__ import annotations

from histosge.pl._evaluation import evaluation
from histosge.pl._expression import expression

__all__ = ["evaluation", "expression"]
