"""Sections to learn from, opened one at a time: what stays in memory are the spots that are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from histosge._image import LazyImage
from histosge._model import check_max_spots, drawn_rows, spots_to_draw
from histosge._options import FitOptions, Reading, pick
from histosge._readers import are_many, name_of, opened, path_of
from histosge._section import check_orientation, column, merge_bins, merged_edge, read_section
from histosge._settings import settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import pandas as pd
    from numpy.typing import NDArray

    from histosge._readers import Source
    from histosge._section import Section

_NO_IMAGE = LazyImage(np.zeros((3, 1, 1), np.uint8))


@dataclass(frozen=True)
class _Found:
    """What is known of a section after it was opened for the first time."""

    section: Section
    """Without its spots and image, to check arguments"""
    n_spots: int
    kept: Section | None
    """All of it, where it is small enough to stay until its turn"""
    labels: NDArray[Any] | None
    edge_um: float
    """Edge to which its bins are merged"""


class Sections:
    """Sections of a call: SpatialData objects and paths.

    All are opened once to check them and to count their spots, and again when it is their turn; those with few spots
    are kept in between.

    Parameters
    ----------
    sdata
        A section or several.
    options
        How they are read, and how many spots are drawn.
    labels
        Column of ``obs`` to read as well.
    """

    def __init__(self, sdata: object, options: FitOptions, *, labels: str | None = None) -> None:
        many = are_many(sdata)
        self._given = [str(name) for name in sdata] if isinstance(sdata, Mapping) else None
        self.sources: list[Source] = list(_values(sdata)) if many else [cast("Source", sdata)]
        if not self.sources:
            msg = "sdata is an empty list: pass at least one section."
            raise ValueError(msg)
        check_max_spots(options["max_spots"])
        self._options, self._labels = options, labels
        self._found: list[_Found] = []

    def survey(self) -> None:
        """Open each section, and read it as far as is needed to check arguments."""
        n_kept, most = 0, self._options["max_spots"]
        for source in self.sources:
            with _naming(source):
                sdata = opened(source)
                section = read_section(sdata, **pick(self._options, Reading))
                check_orientation(section)
                section = merge_bins(section, self._options["merge_um"])
                labels = None if self._labels is None else column(sdata, section, self._labels)
            n = len(section.xy_px)
            n_kept += n
            known = replace(section.take(np.empty(0, np.int64)), image=_NO_IMAGE, written={})
            kept = section if n_kept <= most else None
            self._found.append(_Found(known, n, kept, labels, merged_edge(section) if section.contiguous else 0.0))

    @property
    def known(self) -> list[Section]:
        """The sections without their spots, to check arguments."""
        return [each.section for each in self._found]

    @property
    def n_measured(self) -> int:
        """Number of spots of all sections, and of bins after merging."""
        return sum(each.n_spots for each in self._found)

    def drawn(self, genes: pd.Index, *, rng: np.random.Generator) -> Iterator[tuple[Section, NDArray[Any] | None]]:
        """Open each section again, and yield it with its drawn spots, and their labels.

        Where there are several sections, they come with those of ``genes`` that they measure.
        """
        wanted = spots_to_draw([each.n_spots for each in self._found], max_spots=self._options["max_spots"])
        # bins of all sections get one size
        edge_um = self._options["merge_um"] or max(each.edge_um for each in self._found) or None
        for i, (source, n) in enumerate(zip(self.sources, wanted, strict=True)):
            found = self._found[i]
            self._found[i] = replace(found, kept=None)
            section = found.kept or self._again(source)
            labels = found.labels
            if section.contiguous and edge_um is not None and round(edge_um / section.spot_um) > 1:
                section = merge_bins(section, edge_um)
                labels = None if self._labels is None else column(opened(source), section, self._labels)
            rows = drawn_rows(section, n, rng=rng)
            if rows is not None:
                section = section.take(rows)
                labels = None if labels is None else labels[rows]
            if len(wanted) > 1 and not section.genes.equals(genes):
                section = section.with_genes(genes)
            yield section, labels

    def _again(self, source: Source) -> Section:
        """Read a section a second time, without messages."""
        with settings.override(verbosity=0), _naming(source):
            return merge_bins(read_section(opened(source), **pick(self._options, Reading)), self._options["merge_um"])

    def names(self, keys: list[str]) -> list[str]:
        """Names of the sections: those of their paths, or of their spots ``keys``, with numbers where these are equal."""
        of_paths = [name_of(source) if isinstance(source, str | PathLike) else None for source in self.sources]
        found = self._given or [name or key for name, key in zip(of_paths, keys, strict=True)]
        return found if len(set(found)) == len(found) else [f"{i}: {name}" for i, name in enumerate(found)]


def _values(sdata: object) -> Iterable[Source]:
    return sdata.values() if isinstance(sdata, Mapping) else cast("Iterable[Source]", sdata)


def without_image(section: Section) -> Section:
    """Drop what was read to embed the spots: an image may be in memory."""
    return replace(section, image=_NO_IMAGE, written={}, counts=None)


@contextmanager
def _naming(source: Source) -> Iterator[None]:
    """Put the path into an error of a section."""
    try:
        yield
    except (ValueError, KeyError) as error:
        if not isinstance(source, str | PathLike) or type(error) not in (ValueError, KeyError):
            raise
        msg = f"section {path_of(source)!r}: {error.args[0]}"
        raise type(error)(msg) from error
