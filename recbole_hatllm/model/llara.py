"""LLaRA: Liao et al., "LLaRA: Large Language-Recommendation Assistant" (arXiv 2312.02445), by embedding or by language.

Every title is followed by a behaviour token, the projected vector of a SASRec. Training moves from prompts without these
vectors to prompts with them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recbole_hatllm.data.prompt import TITLES_AND_SLOTS
from recbole_hatllm.model.slots import SlotRecommender
from recbole_hatllm.model.writer import EitherStrategy, TitleWriter


class LLaRA(EitherStrategy, SlotRecommender):
    """BIGRec with behaviour tokens, learned by a curriculum.

    A micro-batch of training is hybrid, with behaviour tokens, with probability p = tau / T: tau micro-batches came before it, of
    T that are planned. Else a frozen random vector stands in every slot, and the projector is not touched. Validation and test
    are hybrid, and so is training that no trainer counts. With `hatllm_masks` a behaviour token is the last token of its item.
    """

    template = TITLES_AND_SLOTS
    always_uses_all_it_trains = False

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.optimisation["slots"]["weight_decay"] = config["projector_weight_decay"]
        tokens = self.backbone.base.get_input_embeddings().weight
        exact = torch.promote_types(tokens.dtype, torch.float32)
        size = torch.linalg.vector_norm(tokens, dtype=exact).item() / tokens.numel() ** 0.5
        self.register_buffer("placeholder", size * torch.randn(self.backbone.hidden_size))
        self.done = 1.0

    @staticmethod
    def projector(item_width: int, width: int) -> nn.Module:
        """Two layers."""
        return nn.Sequential(nn.Linear(item_width, width), nn.GELU(), nn.Linear(width, width))

    def reached(self, done: float) -> None:
        """The trainer tells the share tau / T before each micro-batch; a resumed one goes on where it was."""
        self.done = done

    def slot_vectors(self, items: Tensor) -> Tensor:
        """Behaviour tokens, or the placeholder in all slots of the micro-batch."""
        if self.training and float(torch.rand(())) >= self.done:
            return self.placeholder.expand(len(items), -1)
        return super().slot_vectors(items)


class WritingLLaRA(TitleWriter, LLaRA):
    """LLaRA with `strategy: language`; the titles that are written have no behaviour tokens."""


LLaRA.writer = WritingLLaRA
