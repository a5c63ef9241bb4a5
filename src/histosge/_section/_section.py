"""``SpatialData`` → :class:`Section`. All positions are in pixels (x, y) of the image's finest scale."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import shapely
from scipy import sparse

from histosge._geometry import Footprints, upright
from histosge._section._alignment import check_image
from histosge._section._coordinates import align, apply, centroids, drawn_size, scale_of
from histosge._section._counts import log_left_out, match_rows, named_layers, read_layer
from histosge._section._declared import check_single_section, read_declared, scale_factors
from histosge._section._image import find_image, lazy_image, thumbnail_of
from histosge._section._scale import physical_scale
from histosge._section._tables import find_spots, written_by_us
from histosge._section._values import Values
from histosge._settings import logger

if TYPE_CHECKING:
    from collections.abc import Iterable

    from anndata import AnnData
    from numpy.typing import NDArray
    from spatialdata import SpatialData

    from histosge._geometry import Lattice
    from histosge._image import LazyImage

MIN_SPOTS = 30
_MOST_OUTSIDE = 0.05
"""Largest share of the spots that may lie outside the image and are left out; with more, it is the wrong image."""
NEARLY_EMPTY = 0.02
"""Spots with a smaller share of the median total are left out: scaled to 10,000, single counts dominate a gene."""
_XY = ("x", "y")
_GRID_PX = 2.0**-20
"""Positions of spots are multiples of this: another coordinate system gives the same digits, and equal ties."""


@dataclass(frozen=True)
class Section:
    """One tissue section: image, spots and their expression in one coordinate system."""

    image: LazyImage
    image_key: str
    spots_key: str
    table_key: str
    coordinate_system: str
    system_given: bool
    """Whether the user named the coordinate system"""
    to_image: NDArray[np.float64]
    """(3, 3), from the spots' own coordinates to pixels of the image"""
    instances: pd.Index
    """(n,) names of the measured spots in the shapes element"""
    xy_px: NDArray[np.float64]
    """(n, 2)"""
    expression: sparse.csr_matrix
    """(n, genes) float32, in the unit of :attr:`values`"""
    genes: pd.Index
    values: Values
    """What the values of the table are, and how they became the expression"""
    mpp: float
    pitch_um: float
    spot_um: float
    lattice: Lattice | None
    technology: str
    mpp_source: str
    n_left_out: int = field(default=0)
    """Spots without counts, off the tissue (by the table) or outside the image"""
    others: pd.Series = field(default_factory=lambda: pd.Series(dtype=object))
    """Kind, by name, of the features of the table that are not gene expression"""
    rows: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """(n,) rows of the spots in the table"""
    counts: sparse.csr_matrix | None = None
    """(n, genes) raw counts, with the indices of :attr:`expression`; ``None`` where the table holds no whole numbers"""
    transformations: dict[str, Any] = field(default_factory=dict)
    """From the spots' own coordinates (those of the image, where there are none) to each coordinate system"""
    merged: int = 1
    """How many measured bins the edge of each bin has"""
    written: dict[str, AnnData] = field(default_factory=dict)
    """Tables that histosge wrote into ``sdata`` earlier, by name: embeddings in them are reused"""

    @property
    def xy_um(self) -> NDArray[np.float64]:
        return self.xy_px * self.mpp

    @property
    def log_normalised(self) -> bool:
        """Whether the table holds log-normalised values."""
        return self.values.log_normalised

    @property
    def measured(self) -> bool:
        """Whether there are spots; of an H&E image alone there are none."""
        return len(self.instances) > 0

    @property
    def contiguous(self) -> bool:
        """Whether spots are square bins that leave no gap."""
        return self.technology == "visium-hd"

    @property
    def footprints(self) -> Footprints:
        """Measured areas of the image, (n,): discs, or the squares of a lattice that may be turned."""
        if not self.contiguous or self.lattice is None:
            return Footprints.discs(self.xy_px, diameter_px=self.spot_um / self.mpp)
        corner = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]]) @ self.lattice.basis
        return Footprints.of_polygons(shapely.polygons(self.xy_px[:, None] + corner[None]))

    def take(self, rows: NDArray[np.int64]) -> Section:
        """Return the section as if only some of its spots had been measured."""
        lattice = None if self.lattice is None else replace(self.lattice, index=self.lattice.index[rows])
        return replace(
            self,
            instances=self.instances[rows],
            xy_px=self.xy_px[rows],
            expression=self.expression[rows],
            counts=None if self.counts is None else self.counts[rows],
            rows=self.rows[rows],
            lattice=lattice,
        )

    def with_genes(self, genes: pd.Index) -> Section:
        """Return the section as if only some of its genes had been measured, in the given order.

        Genes that it does not measure are left out.
        """
        genes = genes[genes.isin(self.genes)]
        columns = self.genes.get_indexer(genes)
        counts = None if self.counts is None else self.counts[:, columns]
        return replace(self, expression=self.expression[:, columns], counts=counts, genes=genes)

    def dense(self, genes: Iterable[str]) -> NDArray[np.float32]:
        """Expression of some genes: (n, len(genes)) float32, NaN where the section does not measure a gene."""
        columns = self.genes.get_indexer(pd.Index(list(genes)))
        values = np.asarray(self.expression[:, columns].todense(), dtype=np.float32)
        values[:, columns < 0] = np.nan
        return values


def read_section(
    sdata: SpatialData,
    *,
    image_key: str | None = None,
    spots_key: str | None = None,
    table_key: str | None = None,
    layer: str | None = None,
    coordinate_system: str | None = None,
    mpp: float | None = None,
    report: bool = True,
) -> Section:
    """Read image, spots and counts, and find the physical scale; ``report`` logs what was found."""
    from spatialdata.transformations import get_transformation

    check_mpp(mpp)
    image_key = find_image(sdata, image_key)
    spots_key, table_key = find_spots(sdata, spots_key, table_key)
    system, to_image = align(sdata, spots_key, image_key, wanted=coordinate_system)
    image = lazy_image(sdata.images[image_key], image_key)

    small = thumbnail_of(sdata, image_key, system)
    if small is not None and report:
        check_image(image, small, image_key)
    table = sdata.tables[table_key]
    rows, instances, left_out = match_rows(table, sdata.shapes[spots_key], spots_key, table_key)
    check_single_section(
        table,
        rows,
        spots_key,
        remedy="give each spots and a table of its own, or call sge.io.read with dataset_id=.",
    )
    element = sdata.shapes[spots_key].loc[instances]
    xy_px = apply(to_image, centroids(element))
    layer_read, counts, other_features = read_layer(table, layer, rows, table_key)
    log_left_out(layer_read.others, level=logging.INFO if report else logging.DEBUG)
    values = layer_read.values(counts, other_features)
    total = values.totals(counts)
    if not (total > 0).any():
        msg = f"the table {table_key!r} holds no counts at all. Name the layer that does: layer={named_layers(table)}."
        raise ValueError(msg)
    keep = total > NEARLY_EMPTY * np.median(total[total > 0])
    if not keep.all():
        logger.warning(
            "leaving out %d of %d spots that have no counts, or less than %g %% of the median",
            (~keep).sum(), len(total), 100 * NEARLY_EMPTY,
        )  # fmt: skip
        left_out += int((~keep).sum())
        counts, rows, instances = counts[keep], rows[keep], instances[keep]
        xy_px, element = xy_px[keep], element[keep]
    drawn_px = drawn_size(element) * scale_of(to_image, spots_key, image_key)
    keep = _inside(image, xy_px, spots_key, image_key, system, drawn_px=drawn_px)
    if not keep.all():
        logger.warning("leaving out %d spots whose centre lies beyond the border of the image", (~keep).sum())
        left_out += int((~keep).sum())
        counts, rows, instances = counts[keep], rows[keep], instances[keep]
        xy_px, element = xy_px[keep], element[keep]
    xy_px = np.clip(np.rint(xy_px / _GRID_PX) * _GRID_PX, 0, [image.width_px, image.height_px])
    order = _order(xy_px, instances)
    counts, rows, instances, xy_px, element = (
        counts[order],
        rows[order],
        instances[order],
        xy_px[order],
        element.iloc[order],
    )
    if len(xy_px) < MIN_SPOTS:
        msg = (
            f"{len(xy_px)} measured spots are too few to learn from; at least {MIN_SPOTS} are needed. "
            f"Check that the table {table_key!r} annotates the spots {spots_key!r}, or add sections."
        )
        raise ValueError(msg)
    scale = physical_scale(
        read_declared(
            table,
            rows=rows,
            instances=instances,
            keys=f"{spots_key} {table_key}",
            attrs=sdata.attrs,
            xy_px=xy_px,
            scale_factors=scale_factors(table, spots_key=spots_key, rows=rows),
        ),
        xy_px,
        spots_key=spots_key,
        drawn_px=drawn_px,
        mpp=mpp,
    )
    expression = values.expression(counts)
    section = Section(
        image=image,
        image_key=image_key,
        spots_key=spots_key,
        table_key=table_key,
        coordinate_system=system,
        system_given=coordinate_system is not None,
        to_image=to_image,
        instances=instances,
        xy_px=xy_px,
        expression=expression,
        genes=layer_read.genes,
        values=values,
        mpp=scale.mpp,
        pitch_um=scale.pitch_um,
        spot_um=scale.spot_um,
        lattice=scale.lattice,
        technology=scale.technology,
        mpp_source=scale.source,
        n_left_out=left_out,
        others=layer_read.others,
        rows=rows,
        counts=_whole_counts(counts, expression),
        transformations=dict(get_transformation(sdata.shapes[spots_key], get_all=True)),
        written=written_by_us(sdata),
    )
    if not section.genes.is_unique:
        twice = list(section.genes[section.genes.duplicated()][:3])
        msg = f"var_names of table {table_key!r} are not unique (for example {twice}). Call `var_names_make_unique()`."
        raise ValueError(msg)
    logger.log(
        logging.INFO if report else logging.DEBUG,
        "section %r: %d %s spots x %d genes, %.4g µm per pixel (%s)",
        spots_key, len(xy_px), scale.technology, len(section.genes), scale.mpp, scale.source,
    )  # fmt: skip
    return section


def read_image_only(
    sdata: SpatialData,
    *,
    image_key: str | None,
    coordinate_system: str | None,
    mpp: float | None,
    pitch_um: float,
    spot_um: float,
) -> Section:
    """Read the image of a section without spots; pitch and size of a spot are those that a model learnt from."""
    from spatialdata.transformations import Affine, get_transformation

    check_mpp(mpp)
    image_key = find_image(sdata, image_key)
    if mpp is None:
        msg = (
            f"nothing was measured on this section, so that the µm per pixel of its image {image_key!r} cannot be "
            "derived from the pitch of spots. Pass mpp=, as the scanner states it (about 0.25 at 40x, 0.5 at 20x)."
        )
        raise ValueError(msg)
    of_image = get_transformation(sdata.images[image_key], get_all=True)
    systems = sorted(of_image)
    if coordinate_system is not None and coordinate_system not in systems:
        msg = f"coordinate_system={coordinate_system!r} does not hold the image {image_key!r}. Choose one of {systems}."
        raise ValueError(msg)
    section = Section(
        image=lazy_image(sdata.images[image_key], image_key),
        image_key=image_key,
        spots_key="",
        table_key="",
        coordinate_system=coordinate_system or systems[0],
        system_given=coordinate_system is not None,
        to_image=np.eye(3),
        instances=pd.Index([], dtype=str),
        xy_px=np.empty((0, 2)),
        expression=sparse.csr_matrix((0, 0), dtype=np.float32),
        genes=pd.Index([], dtype=str),
        values=Values("the image alone"),
        mpp=float(mpp),
        pitch_um=pitch_um,
        spot_um=spot_um,
        lattice=None,
        technology="not measured",
        mpp_source="given",
        # pixels of the image; shapes have no channels
        transformations={k: Affine(t.to_affine_matrix(_XY, _XY), _XY, _XY) for k, t in of_image.items()},
        written=written_by_us(sdata),
    )
    logger.info("image %r: no measured spots, %.4g µm per pixel (given)", image_key, mpp)
    return section


def column(sdata: SpatialData, section: Section, name: str) -> NDArray[Any]:
    """Column of ``obs`` of the measured table, one value for each spot of the section, (n,)."""
    table = sdata.tables[section.table_key]
    if name not in table.obs:
        msg = f"labels={name!r} is not a column of sdata.tables[{section.table_key!r}].obs: {list(table.obs.columns)}."
        raise KeyError(msg)
    return table.obs[name].to_numpy()[section.rows]


def check_mpp(mpp: float | None) -> None:
    """Refuse a scale that no image has."""
    if mpp is not None and not (np.isfinite(mpp) and 0.01 <= mpp <= 10_000):
        msg = f"mpp={mpp!r} is not a length in µm. Pass a positive number, or None to take it from the spots."
        raise ValueError(msg)


def _order(xy_px: NDArray[np.float64], instances: pd.Index) -> NDArray[np.int64]:
    """Order spots by position: seeds draw the same spots in whatever order the table has them."""
    first = np.lexsort((instances.astype(str).to_numpy(), xy_px[:, 0], xy_px[:, 1]))
    x, y = upright(xy_px[first]).T
    return first[np.lexsort((x, y))]


def _whole_counts(counts: sparse.csr_matrix, expression: sparse.csr_matrix) -> sparse.csr_matrix | None:
    """Counts as float32; ``None`` where not all are whole. They share the indices of the expression made of them."""
    if not np.all(counts.data == np.rint(counts.data)):
        return None
    counts = counts.astype(np.float32)
    counts.sort_indices()
    expression.sort_indices()
    same = np.array_equal(counts.indptr, expression.indptr) and np.array_equal(counts.indices, expression.indices)
    parts = (expression.indices, expression.indptr) if same else (counts.indices, counts.indptr)
    return sparse.csr_matrix((counts.data, *parts), shape=counts.shape)


def _inside(
    image: LazyImage, xy_px: NDArray[np.float64], spots: str, image_key: str, system: str, *, drawn_px: float
) -> NDArray[np.bool_]:
    """Which centres lie on the image; a few outside, or spots cut by its border, are no sign of misalignment."""
    beyond = np.maximum(-xy_px, xy_px - [image.width_px, image.height_px]).max(1)
    if (beyond > drawn_px / 2).mean() > _MOST_OUTSIDE:
        low, high = xy_px.min(0), xy_px.max(0)
        upwards = " All y are negative: does y run upwards? Then write -y." if high[1] <= 0 else ""
        msg = (
            f"{(beyond > 0).sum()} of {len(xy_px)} spots of {spots!r} lie outside the image {image_key!r}: they span "
            f"x {low[0]:.0f} to {high[0]:.0f}, y {low[1]:.0f} to {high[1]:.0f} px, the image is {image.width_px} x "
            f"{image.height_px} px.{upwards} Is it the image these spots were aligned to? "
            f"Check image_key= and coordinate_system= (used {system!r})."
        )
        raise ValueError(msg)
    return beyond <= 1e-6 * drawn_px
