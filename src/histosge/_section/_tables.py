"""Which tables of a ``SpatialData`` annotate which shapes: those of the user, and those that histosge wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING

from histosge import _keys

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData


def written_by_us(sdata: SpatialData) -> dict[str, AnnData]:
    """Tables that histosge wrote, by name."""
    return {name: table for name, table in sdata.tables.items() if ours(table)}


def ours(table: AnnData) -> bool:
    """Whether histosge wrote this table."""
    return _keys.UNS in table.uns


def regions(table: AnnData) -> list[str]:
    """Names of the elements that a table annotates."""
    from spatialdata.models import get_table_keys

    if "spatialdata_attrs" not in table.uns:
        return []
    region, _, _ = get_table_keys(table)
    return [region] if isinstance(region, str) else list(region)


def is_measured(sdata: SpatialData) -> bool:
    """Whether any table but ours annotates shapes that are there."""
    return any(set(regions(table)) & set(sdata.shapes) for table in sdata.tables.values() if not ours(table))


def find_spots(sdata: SpatialData, spots_key: str | None, table_key: str | None) -> tuple[str, str]:
    """Names of the measured spots and of the table that annotates them: those given, or the only ones."""
    if table_key is not None and table_key not in sdata.tables:
        msg = f"table_key={table_key!r} is not among the tables of this SpatialData: {list(sdata.tables)}."
        raise KeyError(msg)
    if spots_key is not None and spots_key not in sdata.shapes:
        msg = f"spots_key={spots_key!r} is not among the shapes of this SpatialData: {list(sdata.shapes)}."
        raise KeyError(msg)
    tables = {
        name: [r for r in regions(t) if r in sdata.shapes]
        for name, t in sdata.tables.items()
        if (table_key is None and not ours(t)) or name == table_key
    }
    pairs = [(r, name) for name, names in tables.items() for r in names if spots_key in (None, r)]
    if not pairs and not sdata.tables:
        msg = (
            "no measured spots found: this SpatialData has no table. Read the section with its counts (`sge.io.read`), "
            "or predict from the image alone with a model of other sections, model= and mpp=."
        )
        raise ValueError(msg)
    if not pairs:
        what = f"the shapes {spots_key!r}" if spots_key else "any shapes element"
        by = f"table {table_key!r}" if table_key else f"tables {list(tables)}"
        annotated = {name: regions(sdata.tables[name]) for name in tables}
        other = {
            r: kind
            for names in annotated.values()
            for r in names
            for kind in ("labels", "points")
            if r in getattr(sdata, kind)
        }
        if other and spots_key is None:
            (key, kind), *_ = other.items()
            radius = ", radius=..." if kind == "points" else ""
            msg = (
                f"the spots {key!r} are {kind}, and measured spots are shapes here. Convert them: "
                f"`sdata.shapes['spots'] = spatialdata.to_circles(sdata[{key!r}]{radius})`, then link the table: "
                "`table.obs[region_key] = 'spots'` and `sdata.set_table_annotates_spatialelement(table_name, "
                "region='spots')`."
            )
            raise ValueError(msg)
        msg = (
            f"no measured spots found: {by} annotate {annotated}, and not {what} of {list(sdata.shapes)}. "
            "Link them with `TableModel.parse(adata, region=..., region_key=..., instance_key=...)`."
        )
        raise ValueError(msg)
    if len(pairs) > 1:
        spots, names = sorted({p[0] for p in pairs}), sorted({p[1] for p in pairs})
        msg = (
            f"several spots or tables to choose from; say which: spots_key= one of {spots}, table_key= one of {names}."
        )
        raise ValueError(msg)
    return pairs[0]
