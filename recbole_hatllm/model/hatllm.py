"""HatLLM: Hierarchical Attention Masking for LLM-based sequential recommendation (arXiv 2510.10955).

Shallow layers attend inside an item (IN), middle layers everywhere (OR), deep layers between the last tokens of items
(CR). No new parameters: the masks are all there is.
"""

from recbole_hatllm.errors import ConfigError
from recbole_hatllm.masks import schedule
from recbole_hatllm.model.llm import LLMRecommender


class HatLLM(LLMRecommender):
    """An LLM recommender whose layers attend by the paper's schedule (section 4; Table 5 by `order`, `cross_mask`)."""

    @staticmethod
    def layer_kinds(config, n_layers):
        """The schedule of `n_in`, `n_cr`, `order`, `cross_mask` and `cr_query_scope`."""
        cross_mask = "cr_all" if config["cr_query_scope"] == "all" else config["cross_mask"]
        try:
            return schedule(n_layers, config["n_in"], config["n_cr"], config["order"], cross_mask)
        except ValueError as error:
            raise ConfigError(str(error)) from error
