"""BIGRec, embedding-based: the title prompt, its last state and a head over all items, without special layers.

Bao et al., "A Bi-Step Grounding Paradigm for Large Language Models in Recommendation Systems" (arXiv 2308.08434), in the
embedding-based form that HatLLM's paper builds on and compares with.
"""

from recbole_hatllm.model.llm import LLMRecommender


class BIGRec(LLMRecommender):
    """`LLMRecommender` as it is: HatLLM with n_in = n_cr = 0."""
