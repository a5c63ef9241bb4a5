"""Sections in the order of their table: a section has an order of its own, so that seeds draw the same spots."""

from __future__ import annotations

import numpy as np

from histosge._section import read_section


def as_listed(section):
    """The section in the order of its table."""
    return section.take(np.argsort(section.rows))


def read_as_listed(sdata, **how):
    """Read the section in the order of its table."""
    return as_listed(read_section(sdata, **how))
