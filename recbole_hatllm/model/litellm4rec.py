"""Lite-LLM4Rec: Wang et al., "Rethinking Large Language Model Architectures for Sequential Recommendations" (arXiv 2402.09543).

A reconstruction. Certain are two levels - an item LLM that makes one vector of an item's text, a user LLM that reads the
vectors - and a projection onto all items with cross-entropy. The pooling, what stands between the two LLMs and the prompt are
this package's reading.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from recbole_hatllm import distributed, text_states
from recbole_hatllm.data.prompt import SLOTS, Prompt, PromptTable
from recbole_hatllm.data.titles import PieceEncoder, TitleTokens
from recbole_hatllm.errors import ConfigError
from recbole_hatllm.files import cache_folder
from recbole_hatllm.model.llm import LLMRecommender


class LiteLLM4Rec(LLMRecommender):
    """instruction, A v_1, ..., A v_m, response marker -> last state -> scores of all items; v_i from the title of i read alone.

    A is a LayerNorm and a linear layer: v_i comes from behind the last layer and goes in before the first. The item LLM is the same
    backbone, frozen and read once, or with adapters of its own that are trained with the rest.
    """

    template = SLOTS
    stored = ("head", "projection")

    def __init__(self, config, dataset):
        self.joint = config["item_llm"] == "lora_joint"
        if self.joint:
            refuse(config)
        super().__init__(config, dataset)
        encode = PieceEncoder(self.backbone.tokenizer)
        self.titles = TitleTokens.build(dataset.titles, encode, config["title_tokens"], cache_folder())
        self.texts = text_states.behind(PromptTable.beginning(encode.tokenizer), self.titles)
        self.optimisation["projection"] = dict(self.optimisation["head"])
        self._items: Tensor | None = None
        if self.joint:
            self.backbone.add_adapter("item")
        else:
            show = config["show_progress"] and distributed.first()
            self.register_buffer(
                "table", text_states.kept_table(self.backbone, self.texts, config["item_pool"], show), persistent=False
            )

    @staticmethod
    def parts(config, n_items: int, width: int) -> dict[str, nn.Module]:
        """The head, and `projection`, [S, d] -> [S, d]."""
        projection = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        return {**LLMRecommender.parts(config, n_items, width), "projection": projection}

    @classmethod
    def uncounted(cls, config) -> str | None:
        """The item LLM's own passes."""
        if config["item_llm"] == "lora_joint":
            return "the item LLM's pass through a batch's titles (item_llm: lora_joint): ask it for item_llm: frozen_cached"
        return None

    def embed(self, prompt: Prompt) -> dict[str, Tensor]:
        """Token embeddings, with the items' projected vectors in their slots."""
        states = self.backbone.embed(prompt.input_ids)
        vectors = self.item_states(prompt.slot_items).to(self.projection[1].weight.dtype)
        vectors = self.projection(vectors).to(states.dtype)
        return {"inputs_embeds": states.flatten(0, 1).index_copy(0, prompt.slots, vectors).view_as(states)}

    def item_states(self, items: Tensor) -> Tensor:
        """[S] int64 -> [S, d]: what the item LLM says of each item.

        Training `lora_joint` reads each item of the batch once, and waits for a GPU to know which; a ranking reads all items once.
        """
        if not self.joint:
            return self.table[items]
        if not self.training:
            if self._items is None:
                show = self.config["show_progress"] and distributed.first()
                with self.backbone.adapter("item"):
                    self._items = text_states.table(self.backbone, self.texts, self.config["item_pool"], show)
            return self._items[items]
        read, place = items.unique(return_inverse=True)
        with self.backbone.adapter("item"):
            return text_states.states(self.backbone, self.texts, read.cpu(), self.config["item_pool"])[place]

    def train(self, mode: bool = True):
        """After training the item LLM says something else."""
        if mode:
            self._items = None
        return super().train(mode)

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote."""
        super().load(folder)
        self._items = None


def refuse(config) -> None:
    """What two LLMs in one backbone cannot do, before any weight is read.

    Raises:
        ConfigError: names the key and the remedy.
    """
    for key in ("gradient_checkpointing", "compile"):  # layers are computed again when the other adapters are on
        if config[key]:
            raise ConfigError(
                f"{key} is true, and item_llm: lora_joint switches between adapters in a step: set {key} to false, or use "
                "item_llm: frozen_cached."
            )
    if distributed.sharded():
        raise distributed.once(
            ConfigError(
                "item_llm: lora_joint was never run on a sharded backbone: leave FSDP out, or use frozen_cached."
            )
        )
