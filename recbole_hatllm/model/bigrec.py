"""BIGRec: the title prompt of an LLM that either embeds the user or writes the next title.

Bao et al., "A Bi-Step Grounding Paradigm for Large Language Models in Recommendation Systems" (arXiv 2308.08434).
`strategy: language` is that paper's: write a title, then rank real items by their distance to it. `strategy: embedding` is the
form that HatLLM's paper builds on and compares with: the prompt's last state and a head over all items.
"""

from recbole_hatllm.model.writer import EitherStrategy, TitleWriter


class BIGRec(EitherStrategy):
    """`LLMRecommender` as it is, without special layers unless `hatllm_masks`; or, by `strategy`, a `TitleWriter`."""


class WritingBIGRec(TitleWriter, BIGRec):
    """BIGRec with `strategy: language`."""


BIGRec.writer = WritingBIGRec
