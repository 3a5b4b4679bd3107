"""Whether one model is better than another on the same test rows: paired differences, their interval, a test, Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from recbole_hatllm.intervals import of_mean


def compare_rows(ours: np.ndarray, theirs: np.ndarray) -> dict:
    """Two models' gains of the same rows, [rows] float64 each, averaged over seeds.

    Returns:
        difference: the mean of ours - theirs, and its 95 % bootstrap `interval`. improvement: that difference in per cent of
        theirs, None where theirs is 0. p: of the two-sided Wilcoxon signed-rank test, rows of equal gains left out; 1 where
        all are equal.
    """
    difference = ours - theirs
    base = float(theirs.mean())
    p = float(stats.wilcoxon(difference).pvalue) if difference.any() else 1.0
    return {
        "difference": float(difference.mean()),
        "interval": of_mean(difference),
        "improvement": 100 * float(difference.mean()) / base if base else None,
        "p": p,
    }


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm: of the i-th smallest of m, max over j <= i of min(1, (m - j + 1) p_j)."""
    order = np.argsort(p, kind="stable")
    scaled = np.asarray(p, float)[order] * np.arange(len(p), 0, -1)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return corrected.tolist()
