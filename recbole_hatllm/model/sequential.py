"""What sequence models without an LLM share: a state after every item, taught behind the last item or behind all."""

from __future__ import annotations

import torch
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import Tensor, nn

from recbole_hatllm.data.rows import TARGET_LENGTH
from recbole_hatllm.positions import taught_places
from recbole_hatllm.self_attention import SelfAttentionEncoder


class SequenceRecommender(SequentialRecommender):
    """A model that says `states`, `scores` and `loss`; the rest follows.

    A forward over a history of L items gives L states for the price of one. With `targets: all` several of them are
    taught, in rows that together teach every item once (`Rows.covering`).
    """

    input_type = InputType.POINTWISE
    negatives_in_batch = False

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.targets = config["targets"]

    def states(self, item_seq: Tensor) -> Tensor:
        """[B, L, d], the state after each item of item_seq [B, L] int64, which is padded with 0 on the right."""
        raise NotImplementedError

    def scores(self, states: Tensor) -> Tensor:
        """[N, n_items] of states [N, d]."""
        raise NotImplementedError

    def loss(self, states: Tensor, targets: Tensor, known: Tensor) -> Tensor:
        """Mean over the targets [N] of states [N, d]; known [N, L + 1] are the items of the row of each, to be no
        negatives."""
        raise NotImplementedError

    def calculate_loss(self, interaction) -> Tensor:
        """Scalar: mean over all items that the rows teach."""
        item_seq, target = interaction[self.ITEM_SEQ], interaction[self.POS_ITEM_ID]
        length = interaction[self.ITEM_SEQ_LEN]
        taught_length = interaction[TARGET_LENGTH] if self.targets == "all" else torch.ones_like(length)
        taught, following = taught_places(item_seq, length, target, taught_length)
        known = torch.cat([item_seq, target[:, None]], 1)[taught.nonzero()[:, 0]]
        return self.loss(self.states(item_seq)[taught], following[taught], known)

    def targets_in(self, interaction) -> int:
        """How many targets `calculate_loss` takes the mean over."""
        return int(interaction[TARGET_LENGTH].sum()) if self.targets == "all" else len(interaction)

    def full_sort_predict(self, interaction) -> Tensor:
        """[B, n_items] float32, padding at -inf."""
        last = (interaction[self.ITEM_SEQ_LEN] - 1)[:, None, None]
        states = self.states(interaction[self.ITEM_SEQ])
        scores = self.scores(states.gather(1, last.expand(-1, 1, states.shape[2]))[:, 0]).float()
        scores[:, 0] = -torch.inf
        return scores

    def predict(self, interaction) -> Tensor:
        """[B] float32: the score of each row's own item."""
        return self.full_sort_predict(interaction).gather(1, interaction[self.ITEM_ID][:, None])[:, 0]


class SelfAttentiveRecommender(SequenceRecommender):
    """The SASRec of the LLM papers' tables: its encoder with an output layer that shares nothing with the input."""

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        size = config["hidden_size"]
        self.encoder = SelfAttentionEncoder(self.n_items, self.max_seq_length, size, config["dropout_prob"])
        self.output = nn.Linear(size, self.n_items)

    def states(self, item_seq: Tensor) -> Tensor:
        """[B, L, d]."""
        return self.encoder(item_seq)

    def scores(self, states: Tensor) -> Tensor:
        """[N, n_items]."""
        return self.output(states)


def draw_negatives(known: Tensor, n_items: int) -> Tensor:
    """One item for each row, uniform over those that are not among the row's own.

    Args:
        known: [N, K] int64, 0 where there is none. n_items: internal ids, padding 0 included.

    Returns:
        [N] int64 from 1 to n_items - 1, drawn from torch's global generator.
    """
    drawn = torch.randint(1, n_items, known.shape[:1], device=known.device)
    for _ in range(100):  # a row may hold all items there are
        taken = (drawn[:, None] == known).any(1)
        if not taken.any():
            break
        drawn = torch.where(taken, torch.randint_like(drawn, 1, n_items), drawn)
    return drawn
