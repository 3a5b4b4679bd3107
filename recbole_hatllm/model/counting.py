"""What models that only count have in common: a history as weights of its items, and who followed whom."""

from __future__ import annotations

import numpy as np
import scipy.sparse
import torch
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import Tensor

_BLOCK = 128  # rows that are scored at once, in float64


class CountingRecommender(SequentialRecommender):
    """A model that counts in `warm_start` and says `scores`; the rest follows. Nothing is trained.

    What was counted is in the attributes of `other_parameter_name`, sparse matrices among them, which a checkpoint keeps.
    """

    input_type = InputType.POINTWISE
    negatives_in_batch = False

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.history_decay = config["history_decay"]

    def scores(self, history: scipy.sparse.csr_matrix) -> np.ndarray:
        """[B, n_items] float64 of history [B, n_items], the weight of each item in it; weights of a row add up to 1."""
        raise NotImplementedError

    def full_sort_predict(self, interaction) -> Tensor:
        """[B, n_items] float32, padding at -inf."""
        items, length = (interaction[name].cpu().numpy() for name in (self.ITEM_SEQ, self.ITEM_SEQ_LEN))
        history = weigh(items, length, self.history_decay, self.n_items)
        scores = torch.empty(len(items), self.n_items)
        for start in range(0, len(items), _BLOCK):
            scores[start : start + _BLOCK] = torch.from_numpy(self.scores(history[start : start + _BLOCK]))
        scores[:, 0] = -torch.inf
        return scores.to(interaction[self.ITEM_SEQ].device)

    def predict(self, interaction) -> Tensor:
        """[B] float32: the score of each row's own item."""
        return self.full_sort_predict(interaction).gather(1, interaction[self.ITEM_ID][:, None])[:, 0]


def weigh(items: np.ndarray, length: np.ndarray, decay: float, n_items: int) -> scipy.sparse.csr_matrix:
    """[B, n_items] float64: the weight of each item of a history, decay^age over their sum; the last item has age 0.

    Args:
        items: [B, L] int64, oldest first, anything behind the end. length: [B] int64, from 1.
    """
    age = length[:, None] - 1 - np.arange(items.shape[1])
    weight = np.where(age >= 0, decay ** np.maximum(age, 0).astype(float), 0)
    weight /= weight.sum(1, keepdims=True)
    row = np.repeat(np.arange(len(items)), items.shape[1])
    return scipy.sparse.csr_matrix((weight.ravel(), (row, items.ravel())), (len(items), n_items))


def followers(
    users: np.ndarray, items: np.ndarray, n_items: int, gaps: int, gap_decay: float
) -> scipy.sparse.csr_matrix:
    """[n_items, n_items] float64: how often column came g items after row, times gap_decay^(g-1), over g = 1 to `gaps`.

    Args:
        users, items: [N] int64 interactions, each user's in time order.
    """
    order = users.argsort(kind="stable")
    users, items = users[order], items[order]
    shape = (n_items, n_items)
    counts = scipy.sparse.csr_matrix(shape)
    for gap in range(1, gaps + 1):
        same = users[gap:] == users[:-gap]
        weight = np.full(same.sum(), gap_decay ** (gap - 1))
        counts = counts + scipy.sparse.csr_matrix((weight, (items[:-gap][same], items[gap:][same])), shape)
    return counts
