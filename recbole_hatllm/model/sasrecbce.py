"""SASRec as the LLM papers run it: one block, a free output layer, binary cross-entropy with one negative."""

from torch import Tensor

from recbole_hatllm.losses import sampled_loss
from recbole_hatllm.model.sequential import SelfAttentiveRecommender, draw_negatives


class SASRecBCE(SelfAttentiveRecommender):
    """Self-attentive sequential recommendation (arXiv 1808.09781) in the form of DROS' and DLLM2Rec's public code, which is
    most likely what HatLLM's tables call SASRec."""

    def loss(self, states: Tensor, targets: Tensor, known: Tensor) -> Tensor:
        """Binary cross-entropy of the target and one sampled item."""
        positive, negative = (
            (states * self.output.weight[items]).sum(1) + self.output.bias[items]
            for items in (targets, draw_negatives(known, self.n_items))
        )
        return sampled_loss("bce", positive, negative)
