"""How far rounding may move a result: tolerances that hold on every processor.

Processors, libraries of linear algebra and numbers of threads add the same numbers in another order, in wider registers
or with fused products, and so end in other digits. What they have in common is how far apart these can be. Tests that
work out the same number in two ways take their tolerance from here. Equality to the last bit is for the same operations
on the same shapes with the same number of threads, and for what is copied, hidden or multiplied by zero.
"""

from __future__ import annotations

import numpy as np

_DEVIATIONS = 6


def of_sum(n: int, scale: float = 1.0, *, dtype: type = np.float32) -> float:
    """Difference between two sums of the same ``n`` terms or products, in any order.

    Every addition is off by at most u, half the distance between 1 and the next number, of the partial sum it gives. These
    errors have signs of their own: n of them come to sqrt(n) u, and to six times that hardly ever (Higham and Mary, 2019,
    SIAM Journal on Scientific Computing 41, A2815).

    Parameters
    ----------
    n
        Terms of the sum; for steps that follow each other, of all of them together.
    scale
        Largest partial sum. Where a sum is small because large terms cancel, it is theirs that counts.
    dtype
        What it is worked out in.
    """
    return _DEVIATIONS * np.sqrt(n) * np.finfo(dtype).eps / 2 * scale


def of_root(n: int, scale: float = 1.0) -> float:
    """The root of a difference of sums that ought to be zero: a standard deviation, from the mean of squares, of a constant.

    Of the squares, ``scale`` squared, the rounding error of the sum stays, and the root of a small number is larger.
    """
    return scale * np.sqrt(of_sum(n))


def of_solve(matrix: np.ndarray, values: np.ndarray) -> float:
    """Difference between two solutions of a symmetric positive system in float32, read at places like its rows.

    Cholesky's method solves (K + E) w = y exactly, with an E of about u |K| (Higham, 2002, Accuracy and Stability of
    Numerical Algorithms, §10.1). Where a place is read with k, the answer k' w moves by v' E w, with v = K⁻¹ k: the weights
    that a place gives the spots, not longer than 1. Twice, as both solutions are rounded; the largest over the columns.
    """
    weight = np.linalg.solve(matrix, values)  # (n,) or (n, q)
    return 2 * np.finfo(np.float32).eps / 2 * np.linalg.norm(matrix, 2) * np.linalg.norm(weight, axis=0).max()
