"""Nearest titles: what a recommender of texts reaches without any training."""

from __future__ import annotations

import numpy as np

from recbole_hatllm.model.counting import CountingRecommender
from recbole_hatllm.tfidf import title_cosine, title_vectors


class TitleTFIDF(CountingRecommender):
    """score(j) = cos(v_j, sum over the history of history_decay^age v_i), v the TF-IDF vectors of the titles.

    Who took what does not enter: an item that training never saw is ranked as well as any.
    """

    other_parameter_name = ("vectors",)

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.titles, self.min_df, self.vectors = dataset.titles, config["min_df"], None

    def warm_start(self, rows, show_progress: bool = False) -> list[str]:
        """Counts the words of the titles."""
        self.vectors = title_vectors(self.titles, self.min_df)
        return [f"counted {self.vectors.shape[1]:,} words and pairs of words in {self.n_items - 1:,} titles"]

    def scores(self, history) -> np.ndarray:
        """[B, n_items], 0 to 1."""
        return title_cosine(history, self.vectors)
