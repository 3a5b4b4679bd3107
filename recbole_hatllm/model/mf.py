"""Matrix factorisation with a pointwise loss; RecBole's BPR is its pairwise sibling."""

import torch
from recbole.model.abstract_recommender import GeneralRecommender
from recbole.utils import InputType
from torch import Tensor, nn
from torch.nn import functional as F


class MF(GeneralRecommender):
    """score(u, i) = p_u . q_i, binary cross-entropy against sampled items that the user did not take."""

    input_type = InputType.POINTWISE

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.LABEL = config["LABEL_FIELD"]
        self.user_embedding = nn.Embedding(self.n_users, config["embedding_size"])
        self.item_embedding = nn.Embedding(self.n_items, config["embedding_size"])
        for table in (self.user_embedding, self.item_embedding):
            nn.init.normal_(table.weight, std=config["init_std"])

    def calculate_loss(self, interaction) -> Tensor:
        """Scalar, over the batch's positive and sampled pairs."""
        return F.binary_cross_entropy_with_logits(self.predict(interaction), interaction[self.LABEL])

    def predict(self, interaction) -> Tensor:
        """[B] float32: the score of each row's pair."""
        users, items = self.user_embedding(interaction[self.USER_ID]), self.item_embedding(interaction[self.ITEM_ID])
        return (users * items).sum(1)

    def full_sort_predict(self, interaction) -> Tensor:
        """[B, n_items] float32, padding at -inf."""
        scores = self.user_embedding(interaction[self.USER_ID]) @ self.item_embedding.weight.T
        return scores.index_fill(1, torch.zeros(1, dtype=torch.int64, device=scores.device), -torch.inf)
