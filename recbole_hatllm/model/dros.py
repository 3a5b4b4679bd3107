"""DROS: SASRec trained to be robust against a shift of the item distribution (arXiv 2208.06604)."""

from torch import Tensor
from torch.nn import functional as F

from recbole_hatllm.losses import dro_loss, nominal_weights, sampled_loss
from recbole_hatllm.model.sequential import SelfAttentiveRecommender, draw_negatives


class DROS(SelfAttentiveRecommender):
    """The loss of one sampled negative plus `dro_weight` times the robust term over all items."""

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.kind, self.weight, self.radius = config["base_loss"], config["dro_weight"], config["dro_radius"]
        # Column 0 is padding, which is no item.
        self.register_buffer("nominal", nominal_weights(dataset.taught_items() - 1, self.n_items - 1))

    def loss(self, states: Tensor, targets: Tensor, known: Tensor) -> Tensor:
        """Base loss and robust term; with `base_loss: bpr` both are of elu(score) + 1, which ranks as the score does."""
        scores = self.scores(states)
        if self.kind == "bpr":
            scores = F.elu(scores) + 1
        negatives = draw_negatives(known, self.n_items)
        positive, negative = (scores.gather(1, items[:, None])[:, 0] for items in (targets, negatives))
        robust = dro_loss(scores[:, 1:], targets - 1, self.nominal, self.radius)
        return sampled_loss(self.kind, positive, negative) + self.weight * robust
