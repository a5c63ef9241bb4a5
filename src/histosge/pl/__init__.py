"""Draw results. Every function returns matplotlib axes; :func:`report` writes a page."""

from __future__ import annotations

from histosge.pl._domains import domains
from histosge.pl._embedding import embedding
from histosge.pl._evaluation import evaluation
from histosge.pl._expression import expression
from histosge.pl._report import report
from histosge.pl._training import training

__all__ = ["domains", "embedding", "evaluation", "expression", "report", "training"]
