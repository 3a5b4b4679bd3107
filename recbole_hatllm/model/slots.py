"""What LLM recommenders with item vectors of a SASRec in their prompts share: the run they come from, and the projector."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from recbole_hatllm import weights
from recbole_hatllm.data.prompt import Prompt
from recbole_hatllm.errors import DataError
from recbole_hatllm.item_slots import ItemSlots, frozen_table
from recbole_hatllm.lineage import Parent, said, weights_file
from recbole_hatllm.model.llm import LLMRecommender

# Where the item vectors stand in a run's weights: the rows as they are, before positions and attention.
TABLES = {
    "SASRec": "state/item_embedding.weight",
    "SASRecFast": "state/item_embedding.weight",
    "SASRecBCE": "state/encoder.items.weight",
}


class SlotRecommender(LLMRecommender):
    """An LLM recommender whose prompts have a slot an item, filled with projector(e) of the frozen vector e of a SASRec.

    Subclasses say the template, and the projector where it is not linear. The frozen table is stored with the projector: a run can
    be used without its parents.
    """

    stored = ("head", "slots")

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.optimisation["slots"] = dict(self.optimisation["backbone"])

    @classmethod
    def parts(cls, config, n_items: int, width: int) -> dict[str, nn.Module]:
        """The head, and `slots` [n_items, sasrec_width] -> width."""
        table = frozen_table(n_items, config["sasrec_width"])
        return {
            **super().parts(config, n_items, width),
            "slots": ItemSlots(table, cls.projector(config["sasrec_width"], width)),
        }

    @staticmethod
    def projector(item_width: int, width: int) -> nn.Module:
        """[S, item_width] -> [S, width]."""
        return nn.Linear(item_width, width)

    @classmethod
    def parents(cls, config) -> list[Parent]:
        """The SASRec whose item vectors are read."""
        width = config["sasrec_width"]
        return [
            *super().parents(config),
            Parent(
                role="sasrec",
                model=config["sasrec_flavour"],
                keys={**said(config, "sasrec_keys", ["hidden_size"]), "hidden_size": width},
                given="pretrained",
                folder=config["pretrained"],
                must={"hidden_size": (width, "sasrec_width")},
            ),
        ]

    @torch.no_grad()
    def inherit(self, folders: dict[str, Path], dataset) -> None:
        """Takes the SASRec's item vectors."""
        super().inherit(folders, dataset)
        tensors = weights.read(weights_file(folders["sasrec"]))
        table = tensors.get(TABLES[self.config["sasrec_flavour"]])
        if table is None or table.shape != self.slots.table.shape:
            raise DataError(
                f"{folders['sasrec']} has item vectors of shape {None if table is None else tuple(table.shape)}, and this run "
                f"needs {tuple(self.slots.table.shape)}: make pretrained, sasrec_width and the data fit."
            )
        self.slots.table.copy_(table)

    def embed(self, prompt: Prompt) -> dict[str, Tensor]:
        """Token embeddings, with the slots filled."""
        states = self.backbone.embed(prompt.input_ids)
        vectors = self.slot_vectors(prompt.slot_items).to(states.dtype)
        return {"inputs_embeds": states.flatten(0, 1).index_copy(0, prompt.slots, vectors).view_as(states)}

    def slot_vectors(self, items: Tensor) -> Tensor:
        """[S] int64 -> [S, d] float32, what stands in the slots of these items."""
        return self.slots(items)

    def __str__(self):
        count, width = self.slots.table.shape
        return (
            f"{super().__str__()}; frozen: {count - 1:,} item vectors of {self.config['sasrec_flavour']}, {width} wide"
        )
