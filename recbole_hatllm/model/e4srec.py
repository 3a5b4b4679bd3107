"""E4SRec: Li et al., "E4SRec: An Elegant Effective Efficient Extensible Solution of Large Language Models for Sequential
Recommendation" (arXiv 2312.02443). No text of any item: the LLM reads an instruction and a vector an item."""

from recbole_hatllm.data.prompt import SLOTS
from recbole_hatllm.model.slots import SlotRecommender


class E4SRec(SlotRecommender):
    """instruction, W e_1 + b, ..., W e_m + b, response marker -> last state -> scores of all items, linear without bias."""

    template = SLOTS
