"""Who followed whom, plus nearest titles: what a recommender that uses both has to beat."""

from __future__ import annotations

import numpy as np
from sklearn.preprocessing import normalize

from recbole_hatllm.model.counting import CountingRecommender, followers
from recbole_hatllm.tfidf import title_cosine, title_vectors


class TitleMarkov(CountingRecommender):
    """score(j) = P(j | history) + title_weight cos(v_j, sum over the history of history_decay^age v_i).

    P(j | i) = sum_g gap_decay^(g-1) c_g(i, j) / row sum, with c_g the times that j came g items after i, g = 1 to `gaps`,
    and nothing for an item that nothing followed; P(j | history) is the mean over the history, an item of age a weighted by
    history_decay^a. v are the TF-IDF vectors of the titles.
    """

    other_parameter_name = ("transitions", "vectors")

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.seen, self.titles = dataset.seen, dataset.titles
        self.gaps, self.gap_decay = config["gaps"], config["gap_decay"]
        self.title_weight, self.min_df = config["title_weight"], config["min_df"]
        self.transitions = self.vectors = None

    def warm_start(self, rows, show_progress: bool = False) -> list[str]:
        """Counts the training interactions and the words of the titles."""
        users, items = (self.seen[field].numpy() for field in (self.USER_ID, self.ITEM_ID))
        self.transitions = normalize(followers(users, items, self.n_items, self.gaps, self.gap_decay), "l1")
        self.vectors = title_vectors(self.titles, self.min_df)
        return [
            f"counted {self.transitions.nnz:,} pairs of items that followed each other",
            f"{self.vectors.shape[1]:,} words and pairs of words",
        ]

    def scores(self, history) -> np.ndarray:
        """[B, n_items]."""
        return (history @ self.transitions).toarray() + self.title_weight * title_cosine(history, self.vectors)
