"""BIGRec: the title prompt of an LLM that either embeds the user or writes the next title.

Bao et al., "A Bi-Step Grounding Paradigm for Large Language Models in Recommendation Systems" (arXiv 2308.08434).
`strategy: language` is that paper's: write a title, then rank real items by their distance to it. `strategy: embedding` is the
form that HatLLM's paper builds on and compares with: the prompt's last state and a head over all items.
"""

from recbole_hatllm.layer_schedule import hatllm_kinds
from recbole_hatllm.model.llm import LLMRecommender
from recbole_hatllm.model.writer import TitleWriter


class BIGRec(LLMRecommender):
    """`LLMRecommender` as it is, without special layers unless `hatllm_masks`; or, by `strategy`, a `TitleWriter`."""

    def __new__(cls, config=None, dataset=None):  # a copy is made without
        return super().__new__(WritingBIGRec if config and config["strategy"] == "language" else cls)

    @staticmethod
    def layer_kinds(config, n_layers):
        """HatLLM's schedule with `hatllm_masks`, else plain causal attention."""
        return (
            hatllm_kinds(config, n_layers) if config["hatllm_masks"] else LLMRecommender.layer_kinds(config, n_layers)
        )

    @staticmethod
    def uncounted(config):
        """What `memory` cannot count."""
        return TitleWriter.uncounted(config) if config["strategy"] == "language" else None


class WritingBIGRec(TitleWriter, BIGRec):
    """BIGRec with `strategy: language`."""
