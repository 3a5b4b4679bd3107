"""Tokens of a prompt as people read them."""

from __future__ import annotations

from collections.abc import Sequence

from recbole_hatllm.data.prompt import Prompt

SLOT = "[item]"


def texts(tokenizer, prompt: Prompt) -> list[str]:
    """The text of each token of a prompt of one row, with `·` for a space and `↵` for a line's end; a slot is `[item]`."""
    slots = set() if prompt.slots is None else set(prompt.slots.tolist())
    return [
        SLOT if place in slots else visible(tokenizer.decode([token]))
        for place, token in enumerate(prompt.input_ids[0].tolist())
    ]


def visible(text: str) -> str:
    """White space that can be seen."""
    return text.replace("\n", "↵").replace("\t", "→").replace(" ", "·")


def boundaries(span: Sequence[int]) -> list[int]:
    """Places at which another item, or the template, begins; not 0."""
    return [place for place in range(1, len(span)) if span[place] != span[place - 1]]
