"""A Markov chain over items: who followed whom in the training sequences, counted."""

from __future__ import annotations

import numpy as np
import scipy.sparse
import torch
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import Tensor


class MarkovChain(SequentialRecommender):
    """score(j) = (1 - popularity_weight) P(j | history) + popularity_weight P(j).

    P(j | i) = (sum_g gap_decay^(g-1) c_g(i, j) + smoothing) / (row sum + smoothing n) with c_g the times that j came g items
    after i, g = 1 to `gaps`; P(j | history) is the mean over the history, an item of age a weighted by history_decay^a.
    Counts are kept sparse; nothing is trained.
    """

    input_type = InputType.POINTWISE
    negatives_in_batch = False
    other_parameter_name = ("transitions", "evenly", "popularity")

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.seen = dataset.seen
        self.gaps, self.gap_decay, self.smoothing = config["gaps"], config["gap_decay"], config["smoothing"]
        self.history_decay, self.popularity_weight = config["history_decay"], config["popularity_weight"]
        self.transitions = self.evenly = self.popularity = None

    def warm_start(self, rows, show_progress: bool = False) -> list[str]:
        """Counts the training interactions."""
        order = self.seen[self.USER_ID].argsort(stable=True)
        users, items = self.seen[self.USER_ID][order].numpy(), self.seen[self.ITEM_ID][order].numpy()
        shape = (self.n_items, self.n_items)
        counts = scipy.sparse.csr_matrix(shape)
        for gap in range(1, self.gaps + 1):
            same = users[gap:] == users[:-gap]
            weight = np.full(same.sum(), self.gap_decay ** (gap - 1))
            counts = counts + scipy.sparse.csr_matrix((weight, (items[:-gap][same], items[gap:][same])), shape)
        total = np.asarray(counts.sum(1))[:, 0] + self.smoothing * (self.n_items - 1)
        # Without smoothing an item that nothing followed says nothing.
        share = np.divide(1.0, total, out=np.zeros_like(total), where=total > 0)
        self.transitions = scipy.sparse.diags_array(share).dot(counts).tocsr()  # what a row has beyond `evenly`
        self.evenly = self.smoothing * share
        taken = np.bincount(items, minlength=self.n_items)
        self.popularity = taken / taken.sum()
        return [f"counted {counts.nnz:,} pairs of items that followed each other"]

    def full_sort_predict(self, interaction) -> Tensor:
        """[B, n_items] float32, padding at -inf."""
        items, length = (interaction[name].cpu().numpy() for name in (self.ITEM_SEQ, self.ITEM_SEQ_LEN))
        age = length[:, None] - 1 - np.arange(items.shape[1])
        weight = np.where(age >= 0, self.history_decay ** np.maximum(age, 0).astype(float), 0)
        weight /= weight.sum(1, keepdims=True)
        row = np.repeat(np.arange(len(items)), items.shape[1])
        history = scipy.sparse.csr_matrix((weight.ravel(), (row, items.ravel())), (len(items), self.n_items))
        follows = (history @ self.transitions).toarray() + (history @ self.evenly)[:, None]
        scores = (1 - self.popularity_weight) * follows + self.popularity_weight * self.popularity
        scores[:, 0] = -np.inf
        return torch.from_numpy(scores).float().to(interaction[self.ITEM_SEQ].device)

    def predict(self, interaction) -> Tensor:
        """[B] float32: the score of each row's own item."""
        return self.full_sort_predict(interaction).gather(1, interaction[self.ITEM_ID][:, None])[:, 0]
