"""How far a metric would move on another draw of as many test rows: percentile bootstrap intervals from ranks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
_GAIN: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "hit": np.ones_like,
    "ndcg": lambda rank: 1 / np.log2(rank + 1),
}
_NAME = re.compile(rf"({'|'.join(_GAIN)})@(\d+)")
_BLOCK = 2_000_000  # counts that are held at once


def gains(ranks: np.ndarray, name: str) -> np.ndarray:
    """What each row adds to HR or NDCG: 1, or 1 / log2(rank + 1), within the first k, else 0; averaged over seeds.

    Args:
        ranks: [rows] or [seeds, rows] int64, the place of each row's target, from 1.
        name: hit@k or ndcg@k; `is_measured` tells whether it is.

    Returns:
        [rows] float64, whose mean is the metric.
    """
    kind, cut = _NAME.fullmatch(name).groups()
    ranks = np.atleast_2d(ranks)
    return np.where(ranks <= int(cut), _GAIN[kind](ranks), 0.0).mean(0)


def is_measured(name: str) -> bool:
    """Whether ranks alone decide this metric of RecBole's, and `gains` knows it."""
    return bool(_NAME.fullmatch(name))


def bootstrap(ranks: np.ndarray, names: Iterable[str], seed: int = 0) -> dict[str, list[float]]:
    """95 % intervals of HR and NDCG, or of their means over seeds, over resampled test rows.

    Args:
        ranks: [rows] or [seeds, rows] int64, the place of each row's target, from 1.
        names: metrics as RecBole names them; those other than hit@k and ndcg@k are left out.
        seed: of the resampling.

    Returns:
        name -> [low, high], the 2.5 and 97.5 percentiles of `RESAMPLES` resampled means; empty without rows.
    """
    measured = [name for name in names if is_measured(name)]
    ranks = np.atleast_2d(ranks)
    if not measured or not ranks.size:
        return {}
    # A metric sees only how many rows have which ranks, and those counts in a resample of all rows are multinomial.
    deepest = max(int(name.rpartition("@")[2]) for name in measured)
    values, counts = np.unique(np.minimum(ranks, deepest + 1), axis=1, return_counts=True)
    ends = _percentiles(np.stack([gains(values, name) for name in measured], axis=1), counts, seed)
    return dict(zip(measured, ends))


def of_mean(values: np.ndarray, seed: int = 0) -> list[float]:
    """The 95 % interval [low, high] of the mean of `values` [rows] float64, over resampled rows."""
    distinct, counts = np.unique(values, return_counts=True)
    return _percentiles(distinct[:, None], counts, seed)[0]


def _percentiles(values: np.ndarray, counts: np.ndarray, seed: int) -> list[list[float]]:
    """[low, high] of the resampled mean of each column of `values` [distinct, columns], which `counts` rows have each."""
    rows, draw, size = counts.sum(), np.random.default_rng(seed), max(_BLOCK // len(values), 1)
    means = np.concatenate([
        draw.multinomial(rows, counts / rows, min(size, RESAMPLES - done)) @ values / rows
        for done in range(0, RESAMPLES, size)
    ])  # fmt: skip
    ends = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return [[round(float(end), 6) for end in column] for column in ends.T]
