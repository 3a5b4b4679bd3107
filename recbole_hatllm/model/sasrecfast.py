"""RecBole's SASRec, taught behind every item of a row instead of behind the last one only."""

import torch
from recbole.model.sequential_recommender.sasrec import SASRec
from torch import Tensor
from torch.nn import functional as F

from recbole_hatllm.model.sequential import SequenceRecommender


class SASRecFast(SequenceRecommender, SASRec):
    """The architecture, the weights and the loss of RecBole's SASRec; with `targets: last` also its rows."""

    def states(self, item_seq: Tensor) -> Tensor:
        """[B, L, d]; the last real one is what RecBole's `forward` returns."""
        place = torch.arange(item_seq.shape[1], device=item_seq.device)
        x = self.dropout(self.LayerNorm(self.item_embedding(item_seq) + self.position_embedding(place)))
        return self.trm_encoder(x, self.get_attention_mask(item_seq), output_all_encoded_layers=True)[-1]

    def scores(self, states: Tensor) -> Tensor:
        """[N, n_items], by the items' own embeddings."""
        return states @ self.item_embedding.weight.T

    def loss(self, states: Tensor, targets: Tensor, known: Tensor) -> Tensor:
        """Cross-entropy over all items; as in RecBole, padding counts among them."""
        return F.cross_entropy(self.scores(states), targets)
