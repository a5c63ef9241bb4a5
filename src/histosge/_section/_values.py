"""What the values of a table are: counts, or logarithms and roots of them, whose base and total are found.

There are three kinds of evidence. Normalised counts have the same sum in every spot, and so have logarithms of them,
once undone. Counts are whole multiples of one count, whatever factor their spot was scaled by and however few genes are
left. And scanpy writes ``uns["log1p"]``. Values with no such evidence are taken as corrected counts, unless there is
evidence against that.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from histosge._settings import logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Floats = NDArray[np.floating[Any]]

TARGET_SUM = 1e4
"""Counts of a spot are scaled to this sum before log1p, as in the paper."""
UNIT = "log1p of counts per 10,000"
UNIT_AS_GIVEN = "log1p of normalised counts, scaled as given"
"""For logarithms without all of their genes: the total that spots were scaled to is not known."""

_SAMPLE = 1000
"""Spots that are checked."""
_CONSTANT = 0.01
"""Sums are constant if 98 % of them lie within this share of their median. Half precision and rounding to two decimals
change a sum by 0.5 %; sums that were never made equal differ by 10 % and more."""
_EXACT = 1e-3
_N_SPOTS = 100
"""Spots that are searched for the value of one count, in up to ``_N_VALUES`` of their smallest values."""
_N_VALUES = 32
_MOST_COUNTS = 256
"""Largest number of counts that the smallest value of a spot may be"""
_FEW_VALUES = 6
"""Fewer values than this are multiples of something by chance: then the smallest must be one count."""
_WHOLE = 0.02
_LEAST_SPOTS = 20
_LARGEST_LOG = 20.0
"""log2 of a million is 19.9"""
_LARGEST = 1e9
"""No spot has as many counts: where undoing a logarithm gives more, it was none."""
_LIBRARY = 0.15
"""Least relative standard deviation of library sizes: 0.3 to 0.6 on real sections, 0.04 to 0.1 for logarithms."""
_FALLS = -0.4
"""Correlation over spots: -0.5 to -1 of logarithms with zeros, 0.4 to 0.9 of counts."""


@dataclass(frozen=True)
class Transform:
    """What was done to normalised counts; 0 stays 0."""

    name: str
    inverse: Callable[[Floats], Floats]
    log: bool = False


def _log(base: float) -> Transform:
    name = {np.e: "log1p", 2.0: "log2(1 + x)", 10.0: "log10(1 + x)"}.get(
        base, f"the logarithm to base {base:g} of 1 + x,"
    )
    return Transform(name, lambda x: np.expm1(x * np.log(base)), log=True)


NONE = Transform("x", lambda x: x)
LOG1P = Transform("log1p", np.expm1, log=True)
SQUARE_ROOT = Transform("the square root", np.square)
TWICE = Transform("log1p, taken twice,", lambda x: np.expm1(np.expm1(x)), log=True)
_TRANSFORMS = (NONE, LOG1P, _log(2.0), _log(10.0), SQUARE_ROOT, TWICE)


@dataclass(frozen=True)
class Values:
    """What the values of a table are, and how they become the expression that heads learn."""

    input: str
    """In words, for ``uns``"""
    transform: Transform = NONE
    normalise: bool = True
    """Whether spots are scaled to :data:`TARGET_SUM`, or keep their scale"""
    unit: str = UNIT
    """Unit of the expression"""
    log_normalised: bool = False
    """Whether the table holds logarithms of normalised counts"""

    def linear(self, matrix: sparse.csr_matrix) -> sparse.csr_matrix:
        """Undo the transform: (n, genes), proportional to counts in each spot."""
        if self.transform is NONE:
            return matrix
        return sparse.csr_matrix((self.transform.inverse(matrix.data), matrix.indices, matrix.indptr), matrix.shape)

    def totals(self, matrix: sparse.csr_matrix) -> NDArray[np.float64]:
        """Sum of each spot, (n,): for counts the library size."""
        return _row_sums(self.linear(matrix) if self.normalise else matrix)

    def expression(self, matrix: sparse.csr_matrix, totals: Floats | None = None) -> sparse.csr_matrix:
        """Expression (n, genes) float32 in :attr:`unit`; ``totals`` (n,) where ``matrix`` has only some genes."""
        if not self.normalise and self.transform is LOG1P:
            return matrix.astype(np.float32)
        linear = self.linear(matrix)
        return (
            per_target_sum(linear, totals) if self.normalise else sparse.csr_matrix(linear.log1p()).astype(np.float32)
        )


def _row_sums(matrix: sparse.csr_matrix) -> NDArray[np.float64]:
    return np.asarray(matrix.sum(axis=1), np.float64).ravel()


_NORMALISED = "normalised to 10,000 and log1p"
COUNTS = Values(f"counts, {_NORMALISED}")
CORRECTED = Values(f"corrected counts, {_NORMALISED}")


def per_target_sum(counts: sparse.csr_matrix, totals: Floats | None = None) -> sparse.csr_matrix:
    """Scale every spot to ``TARGET_SUM`` and take log1p; a spot without counts stays 0."""
    total = np.asarray(counts.sum(axis=1)).ravel() if totals is None else totals
    scaled = sparse.diags(TARGET_SUM / np.where(total > 0, total, 1)) @ counts
    return sparse.csr_matrix(scaled.log1p()).astype(np.float32)


def sample(n: int) -> NDArray[np.int64]:
    """Rows to check, evenly over the table."""
    return np.unique(np.linspace(0, n - 1, min(n, _SAMPLE)).round().astype(np.int64))


def recognise(
    genes: sparse.csr_matrix,
    others: sparse.csr_matrix | None,
    *,
    named: str,
    base: float | None,
    remedy: Callable[[], str],
) -> Values:
    """Find out what values are that are not whole numbers, and log the result.

    Parameters
    ----------
    genes
        (n, genes) values, none below 0.
    others
        (n, features) values of other features, which may have been normalised together with genes.
    named
        Name of the values in messages.
    base
        Base of the logarithm that ``uns["log1p"]`` states; ``None`` where it states none.
    remedy
        What to do where they are not known.
    """
    if _scaled(genes[sample(genes.shape[0])], within=0.3) and (what := _scaled(genes, within=0.02)):
        msg = (
            f"{named} cannot be read: {_plain(genes)}, and nearly all genes have the {what} 1. They were scaled gene "
            f"by gene. Name the layer that holds counts or log-normalised values, layer=: {remedy()}."
        )
        raise ValueError(msg)
    rows = np.flatnonzero(np.asarray(genes.sum(axis=1)).ravel() > 0)
    rows = rows[sample(len(rows))]
    genes = genes[rows]
    normalised_with = [None] if others is None else [None, others[rows]]
    largest = float(genes.data.max())
    transforms = list(_TRANSFORMS)
    if base is not None and base not in (np.e, 2.0, 10.0):
        transforms.append(_log(base))
    with np.errstate(over="ignore"):
        transforms = [t for t in transforms if t is NONE or t.inverse(np.array(largest)) < _LARGEST]
    sums = [(*_sums(genes, more, t), t, more) for t in transforms for more in normalised_with]
    spread, total, transform, more = min(sums, key=lambda found: found[0])
    one = _one_count(genes, transforms)
    if transform is SQUARE_ROOT and abs(total - 1) < _CONSTANT and (one is None or one[0] is not SQUARE_ROOT):
        spread = np.inf  # rows of unit length: their squares are not counts
    if spread < _CONSTANT:
        return _normalised(transform, total, named=named, whole=more is None)
    if one is not None:
        return _multiples(*one, named=named)
    marked = [t for t in transforms if base is not None and t.name == _log(base).name]
    if marked:
        return _as_given(marked[0], named)
    small = largest < _LARGEST_LOG
    if small and (why := _no_library_sizes(genes)):
        msg = (
            f"{named} cannot be read: {_plain(genes)} are no counts, since {why}. They look like logarithms, whose "
            f"base and total are not known. Name the layer that holds counts, layer=: {remedy()}. If X holds natural "
            "logarithms, say so: "
            'table.uns["log1p"] = {"base": None}; if it holds corrected counts, normalise them first: '
            "sc.pp.normalize_total."
        )
        raise ValueError(msg)
    why = ', since nothing says that they are logarithms; if they are, name the base, uns["log1p"] = {"base": None}'
    logger.log(
        logging.WARNING if small else logging.INFO,
        "%s: %s are treated as corrected counts%s", named, _plain(genes), why if small else "",
    )  # fmt: skip
    return CORRECTED


def _plain(genes: sparse.csr_matrix) -> str:
    return f"values that are not whole numbers (largest {genes.data.max():.4g})"


# ------------------------------------------------------------------------------------------------------- evidence


def _sums(genes: sparse.csr_matrix, others: sparse.csr_matrix | None, transform: Transform) -> tuple[float, float]:
    """Spread of the sums of spots before the transform, relative to their median, and the median."""
    total = Values("", transform).totals(genes)
    if others is not None:
        with np.errstate(over="ignore", invalid="ignore"):
            total = total + Values("", transform).totals(others)
    if not np.isfinite(total).all() or (total <= 0).any():
        return np.inf, np.nan
    low, middle, high = np.quantile(total, (0.01, 0.5, 0.99))
    return float((high - low) / middle), float(middle)


def _one_count(genes: sparse.csr_matrix, transforms: list[Transform]) -> tuple[Transform, Floats] | None:
    """Transform before which all values of a spot are whole multiples of one number, and these numbers (spots,)."""
    spots = np.unique(np.linspace(0, genes.shape[0] - 1, _N_SPOTS).round().astype(int))
    rows = [np.unique(genes.data[genes.indptr[i] : genes.indptr[i + 1]]) for i in spots]
    values = [row[row > 0][:_N_VALUES] for row in rows]
    values = [row for row in values if len(row) > 1]  # a single value is always a multiple of itself
    if len(values) < _LEAST_SPOTS:
        return None
    together = np.concatenate(values)
    # values rounded to a few decimals are multiples of the last one, and so are their squares
    rounded = any(np.abs(together * s - np.rint(together * s)).max() < 0.005 for s in (10, 100, 1000))
    fits: dict[Transform, tuple[float, Floats]] = {}
    for transform in (t for t in transforms if not rounded or t.log):
        found = [_unit(transform.inverse(row)) for row in values]
        fitting = [each for each in found if each is not None]
        if len(fitting) > len(values) / 2:  # otherwise the weakest gene of most spots has too many counts
            error, units = np.array(fitting).T
            fits[transform] = float(error.mean()), units
    if NONE in fits:  # squares of whole multiples are whole multiples as well
        fits.pop(SQUARE_ROOT, None)
    best = min(fits, key=lambda transform: fits[transform][0], default=None)
    return None if best is None else (best, fits[best][1])


def _unit(values: Floats) -> tuple[float, float] | None:
    """Mean error, and the number of which all values (sorted) are whole multiples."""
    counts = np.arange(1, 2 if len(values) < _FEW_VALUES else _MOST_COUNTS + 1)  # that the smallest value may be
    multiple = values * counts[:, None] / values[0]
    error = np.abs(multiple - np.rint(multiple))
    fitting = np.flatnonzero((error < _WHOLE + 2e-6 * multiple).all(axis=1))
    if not np.isfinite(multiple).all() or len(fitting) == 0:
        return None
    return float(error[fitting[0]].mean()), float(values[0] / counts[fitting[0]])


def _no_library_sizes(genes: sparse.csr_matrix) -> str | None:
    """Evidence against counts: their sums vary with sequencing depth, which logarithms hide."""
    total, n = np.asarray(genes.sum(axis=1)).ravel(), np.diff(genes.indptr)
    if total.std() < _LIBRARY * total.mean():
        return f"the sums of spots differ by {total.std() / total.mean():.1%} only"
    # a deeper spot has more genes and more counts of each; after normalisation it has less of each
    if n.std() > 0.02 * n.mean() and np.corrcoef(np.log(n), np.log(total / n))[0, 1] < _FALLS:
        return "genes are the lower, the more of them a spot has"
    return None


def _scaled(genes: sparse.csr_matrix, *, within: float) -> str | None:
    """The statistic that is 1 for nearly all genes, if they were scaled gene by gene, which loses their strength."""
    high = genes.max(axis=0).toarray().ravel()
    seen = high > 0
    mean, square = (np.asarray(of.mean(axis=0)).ravel()[seen] for of in (genes, genes.power(2)))
    for what, values in (("standard deviation", np.sqrt(square - mean**2)), ("maximum", high[seen])):
        if (np.abs(values - 1) < within).mean() > 0.9:
            return what
    return None


# ------------------------------------------------------------------------------------------------------ conclusions


def _normalised(transform: Transform, total: float, *, named: str, whole: bool) -> Values:
    """Values of counts that were scaled to one total; ``whole`` if genes alone sum to it."""
    what = f"counts scaled to {total:,.0f}" if total >= TARGET_SUM / 100 else f"counts scaled to {total:.4g}"
    if transform is LOG1P and whole and abs(total / TARGET_SUM - 1) < _EXACT:
        logger.info("%s is log-normalised already (every spot sums to 10,000 before log1p): taken as it is", named)
        return Values("log-normalised", LOG1P, normalise=False, log_normalised=True)
    if transform is NONE:
        logger.info("%s holds %s: scaled to 10,000, then log1p", named, what)
        return Values(f"{what}, {_NORMALISED}")
    logger.info("%s holds %s of %s: converted to log1p of counts per 10,000", named, transform.name, what)
    return Values(f"{transform.name} of {what}, converted", transform, log_normalised=transform.log)


def _multiples(transform: Transform, one: Floats, *, named: str) -> Values:
    """Values that are whole multiples of one count, which is ``one`` in each spot."""
    same = np.quantile(one, 0.99) / np.quantile(one, 0.01) - 1 < _CONSTANT
    if transform.log and not same:
        return _as_given(transform, named)
    if transform is NONE:
        logger.info("%s holds counts times a factor: scaled to 10,000, then log1p", named)
        return CORRECTED
    logger.info(
        "%s holds %s of counts%s: converted to log1p of counts per 10,000",
        named,
        transform.name,
        "" if same else ", scaled",
    )
    return Values(f"{transform.name} of counts, converted", transform)


def _as_given(transform: Transform, named: str) -> Values:
    """Logarithms whose spots no longer have one total: genes were left out afterwards."""
    logger.warning(
        "%s holds %s of normalised counts whose total is not known, since spots do not sum to one (genes were left out "
        "since?): the scale is kept as given. Counts, in another layer=, would be better",
        named, transform.name,
    )  # fmt: skip
    input_ = f"{transform.name} of normalised counts, total unknown"
    return Values(input_, transform, normalise=False, unit=UNIT_AS_GIVEN, log_normalised=True)
