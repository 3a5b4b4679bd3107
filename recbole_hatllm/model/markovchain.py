"""A Markov chain over items: who followed whom in the training sequences, counted."""

from __future__ import annotations

import numpy as np
import scipy.sparse

from recbole_hatllm.model.counting import CountingRecommender, followers


class MarkovChain(CountingRecommender):
    """score(j) = (1 - popularity_weight) P(j | history) + popularity_weight P(j).

    P(j | i) = (sum_g gap_decay^(g-1) c_g(i, j) + smoothing) / (row sum + smoothing n) with c_g the times that j came g items
    after i, g = 1 to `gaps`; P(j | history) is the mean over the history, an item of age a weighted by history_decay^a.
    Counts are kept sparse; nothing is trained.
    """

    other_parameter_name = ("transitions", "evenly", "popularity")

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.seen = dataset.seen
        self.gaps, self.gap_decay, self.smoothing = config["gaps"], config["gap_decay"], config["smoothing"]
        self.popularity_weight = config["popularity_weight"]
        self.transitions = self.evenly = self.popularity = None

    def warm_start(self, rows, show_progress: bool = False) -> list[str]:
        """Counts the training interactions."""
        users, items = (self.seen[field].numpy() for field in (self.USER_ID, self.ITEM_ID))
        counts = followers(users, items, self.n_items, self.gaps, self.gap_decay)
        total = np.asarray(counts.sum(1))[:, 0] + self.smoothing * (self.n_items - 1)
        # Without smoothing an item that nothing followed says nothing.
        share = np.divide(1.0, total, out=np.zeros_like(total), where=total > 0)
        self.transitions = scipy.sparse.diags_array(share).dot(counts).tocsr()  # what a row has beyond `evenly`
        self.evenly = self.smoothing * share
        taken = np.bincount(items, minlength=self.n_items)
        self.popularity = taken / taken.sum()
        return [f"counted {counts.nnz:,} pairs of items that followed each other"]

    def scores(self, history) -> np.ndarray:
        """[B, n_items]."""
        follows = (history @ self.transitions).toarray() + (history @ self.evenly)[:, None]
        return (1 - self.popularity_weight) * follows + self.popularity_weight * self.popularity
