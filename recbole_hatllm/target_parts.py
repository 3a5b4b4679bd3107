"""Test rows by their target: warm, cold, and of the same day as what the user took before.

A cold target occurs nowhere in the training rows, so a model with a vector for each item knows nothing of it; one of the
same day was most likely taken together with the item before it. A measure over all rows mixes these.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split(data) -> dict[str, Tensor | None]:
    """Which rows are in which part, [R] bool each.

    Args:
        data: a built evaluation part of `HatDataset`.

    Returns:
        warm: the target occurs in the training rows, as history or target. cold: it does not. same_day: it was taken on the
        day (of UTC) of the user's interaction before it; None where the data's times are no Unix seconds.
    """
    warm = torch.isin(data.rows[data.iid_field], data.seen[data.iid_field])
    return {"warm": warm, "cold": ~warm, "same_day": data.same_day}


def measure(trainer, data, names) -> dict[str, dict | None]:
    """Metrics over the parts, from the ranks of the trainer's last evaluation, which was of `data`.

    Args:
        names: of the metrics.

    Returns:
        for each part of `split` its number of `rows` and each metric, None where there are no rows; None for a part that
        cannot be told.
    """
    found: dict[str, dict | None] = {}
    for part, chosen in split(data).items():
        if chosen is None:
            found[part] = None
            continue
        metrics = dict.fromkeys(names)
        if chosen.any():
            metrics = trainer.evaluator.evaluate(trainer.eval_collector.part(chosen))
            metrics = {name: float(value) for name, value in metrics.items()}
        found[part] = {"rows": int(chosen.sum()), **metrics}
    return found
