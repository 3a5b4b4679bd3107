"""How far a metric would move on another draw of as many test rows: percentile bootstrap intervals from ranks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
_GAIN: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "hit": lambda rank: np.ones(len(rank)),
    "ndcg": lambda rank: 1 / np.log2(rank + 1),
}
_NAME = re.compile(rf"({'|'.join(_GAIN)})@(\d+)")
_BLOCK = 2_000_000  # counts that are held at once


def bootstrap(ranks: np.ndarray, names: Iterable[str], seed: int = 0) -> dict[str, list[float]]:
    """95 % intervals of HR and NDCG over resampled test rows.

    Args:
        ranks: [rows] int64, the place of each row's target, from 1.
        names: metrics as RecBole names them; those other than hit@k and ndcg@k are left out.
        seed: of the resampling.

    Returns:
        name -> [low, high], the 2.5 and 97.5 percentiles of `RESAMPLES` resampled means; empty without rows.
    """
    cuts = {name: (match[1], int(match[2])) for name in names if (match := _NAME.fullmatch(name))}
    if not cuts or not len(ranks):
        return {}
    # A metric sees only how many rows have which rank, and those counts in a resample of all rows are multinomial.
    deepest = max(cut for _, cut in cuts.values())
    values, counts = np.unique(np.minimum(ranks, deepest + 1), return_counts=True)
    gains = np.stack([np.where(values <= cut, _GAIN[kind](values), 0.0) for kind, cut in cuts.values()], axis=1)
    draw, size = np.random.default_rng(seed), max(_BLOCK // len(values), 1)
    means = np.concatenate([
        draw.multinomial(len(ranks), counts / len(ranks), min(size, RESAMPLES - done)) @ gains / len(ranks)
        for done in range(0, RESAMPLES, size)
    ])  # fmt: skip
    ends = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return {name: [round(float(end), 6) for end in ends[:, column]] for column, name in enumerate(cuts)}
