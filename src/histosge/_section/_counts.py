"""Tables of ``SpatialData`` → values of genes at the spots."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from histosge._section._values import COUNTS, Values, recognise, sample
from histosge._settings import logger

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame
    from numpy.typing import NDArray

RAW = "raw"
"""Means ``table.raw.X``, unless a layer has this name."""

_KIND_COLUMNS = ("featuretypes", "featuretype", "modality", "featureclass", "codeclass")
"""Columns of ``var`` that state what a feature is, in lower case without punctuation."""
_GENES = {"geneexpression", "gex", "rna", "mrna", "gene", "genes", "expression", "transcript", "transcripts"}
_GENES |= {"transcriptome", "endogenous", "housekeeping"}
_NO_GENES = re.compile(
    "antibod|capture|crispr|guide|hashtag|control|codeword|blank|multiplex"
    "|^(proteins?|proteinexpression|prot|adts?|htos?|custom|peaks?|atac|chromatinaccessibility|negative|vdj)$"
)
"""Other kinds of features. Biotypes (protein coding, lncRNA) in such a column are not among them."""


def named_layers(table: AnnData) -> list[str]:
    """Names that ``layer=`` takes; anndata 0.13 lists ``X`` among the layers, as ``None``."""
    found = [name for name in table.layers if name is not None]
    return found if table.raw is None or RAW in found else [*found, RAW]


def match_rows(table: AnnData, element: GeoDataFrame, spots_key: str, table_key: str) -> tuple[Any, pd.Index, int]:
    """Rows of the table for the spots, and names of these spots: matched by name, never by order."""
    from spatialdata.models import get_table_keys

    _, region_key, instance_key = get_table_keys(table)
    rows = np.flatnonzero((table.obs[region_key].astype(str) == spots_key).to_numpy())
    left_out = 0
    if "in_tissue" in table.obs:
        words = table.obs["in_tissue"].astype(str).str.lower().replace({"true": "1", "false": "0"})
        inside = pd.to_numeric(words, errors="coerce").fillna(1).to_numpy()[rows] > 0
        left_out = int((~inside).sum())
        if left_out:
            logger.info("leaving out %d spots with obs['in_tissue'] = 0", left_out)
        rows = rows[inside]
    instances = pd.Index(table.obs[instance_key].to_numpy()[rows])
    for what, names in ((f"the spots {spots_key!r}", element.index), (f"rows of table {table_key!r}", instances)):
        if not names.is_unique:
            twice = list(names[names.duplicated()][:3])
            msg = (
                f"{what}: names are not unique, so that rows cannot be matched (for example {twice}). Rename or drop "
                "them."
            )
            raise ValueError(msg)
    known = instances.isin(element.index)
    if not known.any():
        msg = (
            f"table {table_key!r} does not annotate the spots {spots_key!r}: none of its {len(instances)} "
            f"{instance_key!r} values (for example {list(instances[:2])}) is in the element's index "
            f"(for example {list(element.index[:2])}). Pass the table_key= that annotates these spots, or link them "
            "with `TableModel.parse`."
        )
        raise ValueError(msg)
    if not known.all():
        logger.warning("leaving out %d rows of table %r that have no spot", (~known).sum(), table_key)
    return rows[known], instances[known], left_out


@dataclass(frozen=True)
class Source:
    """Values of a table as they are stored, and which features are genes."""

    matrix: Any
    """(rows, features), in memory or not"""
    genes: pd.Index
    others: pd.Series
    """Kind, by name, of features that are not gene expression"""
    is_gene: NDArray[np.bool_]
    """(features,)"""
    named: str
    """In messages"""
    base: float | None
    """Base of the logarithm that ``uns`` states for these values; ``None`` where it states none"""
    remedy: Callable[[], str]
    """Where whole numbers are"""

    def split(self, part: Any) -> tuple[sparse.csr_matrix, sparse.csr_matrix | None]:
        """Rows of :attr:`matrix` as float64: values of genes, and of everything else if there is any."""
        rows = as_rows(part, self.named)
        genes = rows if self.is_gene.all() else rows[:, self.is_gene]
        self._check(genes)
        return genes, None if genes is rows else rows[:, ~self.is_gene]

    def values(self, genes: sparse.csr_matrix, others: sparse.csr_matrix | None) -> Values:
        """Find out what they are."""
        if not _whole(genes):
            return recognise(genes, others, named=self.named, base=self.base, remedy=self.remedy)
        if genes.data.max(initial=0) == 1:
            logger.warning("%s holds nothing but 0 and 1: these are read as counts. Are they counts?", self.named)
        return COUNTS

    def _check(self, genes: sparse.csr_matrix) -> None:
        bad = ~np.isfinite(genes.data)
        if bad.any():
            spots = np.unique(np.repeat(np.arange(genes.shape[0]), np.diff(genes.indptr))[bad])
            msg = (
                f"counts of {self.named} hold {bad.sum()} values that are NaN or infinite, in {len(spots)} spots. "
                f"Remove or replace them first, or name another layer=: {self.remedy()}."
            )
            raise ValueError(msg)
        if (genes.data < 0).any():
            msg = (
                f"counts of {self.named} hold {(genes.data < 0).sum()} negative values (least {genes.data.min():.4g}). "
                f"Pass raw counts or log-normalised values, not scaled ones: layer=, where {self.remedy()}."
            )
            raise ValueError(msg)


def open_layer(table: AnnData, layer: str | None, table_key: str) -> Source:
    """Find the values of ``layer``, and which of them are of genes; nothing is read."""
    if layer is not None and layer not in named_layers(table):
        hint = " (and there is no table.raw)" if layer == RAW else ""
        msg = (
            f"layer={layer!r} is not among the layers of table {table_key!r}: {named_layers(table)}{hint} (None means "
            "X)."
        )
        raise KeyError(msg)
    of_raw = layer == RAW and RAW not in table.layers
    holder = table.raw if of_raw else table
    matrix = holder.X if layer is None or of_raw else table.layers[layer]
    if matrix is None or matrix.shape[1] == 0:
        msg = (
            f"table {table_key!r} has no values in {'X' if layer is None else layer}. Name a layer: "
            f"{named_layers(table)}."
        )
        raise ValueError(msg)
    names = pd.Index(holder.var_names.astype(str))
    kinds = feature_kinds(holder.var)
    is_gene = kinds.isna().to_numpy()
    if not is_gene.any():
        msg = (
            f"table {table_key!r} holds no gene expression: by its var, features are {_counted(kinds)}. Pass the table "
            "that holds genes, table_key=; or remove that column of var, to read these features as if they were genes."
        )
        raise ValueError(msg)
    what = "" if layer is None else f", {'table.raw.X' if of_raw else f'layer {layer!r}'}"
    return Source(
        matrix.tocsr() if sparse.issparse(matrix) and matrix.format not in ("csr", "csc") else matrix,
        names[is_gene],
        pd.Series(kinds.to_numpy()[~is_gene], index=names[~is_gene]),
        is_gene,
        f"table {table_key!r}{what}",
        _log_base(table) if layer is None or of_raw else None,
        lambda: _where_counts_are(table, layer),
    )


def read_layer(
    table: AnnData, layer: str | None, rows: Any, table_key: str
) -> tuple[Source, sparse.csr_matrix, sparse.csr_matrix | None]:
    """Read values of some rows, float64: of genes, and of everything else if there is any."""
    source = open_layer(table, layer, table_key)
    return source, *source.split(select(source.matrix, rows))


def select(matrix: Any, rows: NDArray[np.int64]) -> Any:
    """Some rows (sorted) of a matrix of any kind."""
    if type(matrix).__module__.startswith("h5py"):  # fast for a block, slow for a list of rows
        return matrix[rows[0] : rows[-1] + 1][rows - rows[0]]
    return matrix[rows]


def as_rows(part: Any, named: str) -> sparse.csr_matrix:
    """A matrix of any kind and type as float64 rows; the input stays as it is."""
    part = part.compute() if hasattr(part, "compute") else part
    if part.dtype.kind not in "iuf":
        msg = (
            f"{named} holds values of type {part.dtype}, which are no counts. Name the layer that holds numbers, "
            "layer=, or convert what is written as text: table.X = table.X.astype('float32')."
        )
        raise ValueError(msg)
    if part.dtype == np.float16:  # scipy does not accept it
        part = part.astype(np.float32)
    found = sparse.csr_matrix(part).astype(np.float64)
    found.sum_duplicates()
    return found


def feature_kinds(var: pd.DataFrame) -> pd.Series:
    """Kinds of features that are not gene expression, as the table states them; NaN for genes, (features,)."""
    columns = {_letters(name): name for name in var.columns}
    for name in (columns[wanted] for wanted in _KIND_COLUMNS if wanted in columns):
        stated = pd.Series(var[name].astype(object).to_numpy())
        stated = stated.where(stated.notna() & stated.map(_letters).ne(""))
        code, kinds = pd.factorize(stated)
        words = [_letters(kind) for kind in kinds]
        if gene := [word in _GENES for word in words]:
            other = [_NO_GENES.search(word) is not None for word in words]
            if any(gene):  # where genes are marked, unmarked features are none
                return stated.where(stated.notna(), "of no kind").mask(np.array([*gene, False])[code])
            if any(other):
                return stated.where(np.array([*other, False])[code])
    return pd.Series(np.full(len(var), np.nan), dtype=object)


def log_left_out(others: pd.Series, *, level: int) -> None:
    if len(others):
        logger.log(level, "leaving out %d features that are no gene expression: %s", len(others), _counted(others))


def _counted(kinds: pd.Series) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in kinds.value_counts().items())


def _letters(text: Any) -> str:
    text = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _whole(matrix: sparse.csr_matrix) -> bool:
    return bool(np.all(matrix.data == np.rint(matrix.data)))


def _log_base(table: AnnData) -> float | None:
    if "log1p" not in table.uns:
        return None
    written = table.uns["log1p"]
    base = written.get("base") if isinstance(written, Mapping) else None  # files do not keep a base of None
    base = np.e if base is None else float(np.asarray(base).item())
    return base if base > 1 else None


def _where_counts_are(table: AnnData, layer: str | None) -> str:
    """Text for messages: which layers hold whole numbers."""
    found = []
    for name in (None, *named_layers(table)):
        if name == layer:
            continue
        of_raw = name == RAW and RAW not in table.layers
        matrix = table.X if name is None else table.raw.X if of_raw else table.layers[name]
        if matrix is None or not hasattr(matrix, "dtype") or matrix.dtype.kind not in "iuf":
            continue
        part = as_rows(select(matrix, sample(matrix.shape[0])), "")
        if _whole(part) and (part.data >= 0).all() and len(part.data):
            found.append("X (layer=None)" if name is None else f"layer={name!r}{' (table.raw.X)' if of_raw else ''}")
    if found:
        return f"whole numbers are in {' and '.join(found)}"
    others = [name for name in named_layers(table) if name != layer]
    return f"the others, {others}, hold no whole numbers" if others else "this table has no other"
