"""Test rows in groups, by user and by target: where one model may be better and another one worse."""

from __future__ import annotations

import numpy as np
import torch

from recbole_hatllm import target_parts

HEAD = 0.2  # share of the items that are called head
QUARTERS = (0.25, 0.5, 0.75)


def properties(test, titles: list[str]) -> dict[str, np.ndarray]:
    """Of every test row [R] int64: `user_history` and `target_count`, how often its user and its target occur in the training
    interactions, and `title_words` of its target.

    Args:
        test: the test part of a `HatDataset`. titles: by internal item id.
    """
    user, item = test.rows[test.uid_field], test.rows[test.iid_field]
    taken = torch.bincount(test.seen[test.uid_field], minlength=test.user_num)
    words = np.array([len(title.split()) for title in titles])
    return {
        "user_history": taken[user].numpy(),
        "target_count": item_counts(test)[item].numpy(),
        "title_words": words[item.numpy()],
    }


def item_counts(test) -> torch.Tensor:
    """How often each item occurs in the training interactions, [n_items] int64."""
    return torch.bincount(test.seen[test.iid_field], minlength=test.item_num)


def groups(test, titles: list[str]) -> dict[tuple[str, str], np.ndarray]:
    """[R] bool by (kind, name); the groups of a kind have no rows in common, but for `same day`.

    user history and title words: up to four groups between quartiles of the rows. target: head, the 20 % of the items that occur
    most in the training interactions, those with as many as the last of them too; tail, the other ones that occur; and cold, those
    that do not. day: same day, another day as the user's item before, where times are known.
    """
    found = properties(test, titles)
    everything = {("all", "all rows"): np.ones(len(test.rows), dtype=bool)}
    everything |= {("user history", name): chosen for name, chosen in quarters(found["user_history"]).items()}
    counts = item_counts(test)[1:]
    last = int(counts.sort(descending=True).values[max(round(HEAD * len(counts)), 1) - 1])
    count = found["target_count"]
    parts = target_parts.split(test)
    cold = parts["cold"].numpy()
    everything |= {
        ("target", f"head, {max(last, 1)} times or more"): ~cold & (count >= last),
        ("target", f"tail, less than {max(last, 1)}"): ~cold & (count < last),
        ("target", "cold, never"): cold,
    }
    everything |= {("title words", name): chosen for name, chosen in quarters(found["title_words"]).items()}
    if parts["same_day"] is not None:
        same = parts["same_day"].numpy()
        everything |= {("day", "same day"): same, ("day", "another day"): ~same}
    return {key: chosen for key, chosen in everything.items() if chosen.any()}


def quarters(values: np.ndarray) -> dict[str, np.ndarray]:
    """[R] bool by a range in words, from the lowest to the highest; fewer than four where quartiles fall together.

    Args:
        values: [R] int64.
    """
    edges = np.unique(np.quantile(values, QUARTERS, method="lower"))
    number = np.searchsorted(edges, values)  # value <= edge belongs below it
    found = {}
    for group in np.unique(number):
        chosen = number == group
        low, high = int(values[chosen].min()), int(values[chosen].max())
        found[f"{low}-{high}" if low < high else f"{low}"] = chosen
    return found
