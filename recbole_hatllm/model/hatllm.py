"""HatLLM: Hierarchical Attention Masking for LLM-based sequential recommendation (arXiv 2510.10955).

Shallow layers attend inside an item (IN), middle layers everywhere (OR), deep layers between the last tokens of items
(CR). No new parameters: the masks are all there is.
"""

from recbole_hatllm.layer_schedule import hatllm_kinds
from recbole_hatllm.model.llm import LLMRecommender


class HatLLM(LLMRecommender):
    """An LLM recommender whose layers attend by the paper's schedule (section 4; Table 5 by `order`, `cross_mask`)."""

    layer_kinds = staticmethod(hatllm_kinds)
