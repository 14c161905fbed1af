"""The linear algebra of every change: one closed-form solver, its metrics, low-rank factors, a randomised SVD.

Letters: a weight is d x m; a fact brings a key (m) and a residual (d), n facts are K (m x n) and R (d x n); p earlier
keys Kp (m x p) may have to keep their output; the answer Dw = left @ right (d x n, n x m) is never multiplied out.
Everything is computed in float64 on the CPU.
"""

from __future__ import annotations

from .low_rank import Operator, compress, frobenius_norm, randomized_svd, spectral_norm
from .metrics import Covariance, Identity, Metric, NullSpace, Woodbury, amplification, amplification_bound, null_space
from .solver import MAX_CONDITION, Mode, Solution, solve

__all__ = [
    "MAX_CONDITION",
    "Covariance",
    "Identity",
    "Metric",
    "Mode",
    "NullSpace",
    "Operator",
    "Solution",
    "Woodbury",
    "amplification",
    "amplification_bound",
    "compress",
    "frobenius_norm",
    "null_space",
    "randomized_svd",
    "solve",
    "spectral_norm",
]
