"""What the LLM is to write behind a prompt: the title of the item that follows, and the end."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from recbole_hatllm.data.prompt import Prompt
from recbole_hatllm.data.titles import PieceEncoder, TitleTokens


class ResponseTable:
    """The responses of all items: the title as in a prompt, in quotes or plain, and the token that ends a text.

    Args:
        titles: token ids of every item's title by internal id.
        encode: tokenises the quotes and what the LLM has written.
        quotes: whether a title stands in double quotes, as in the prompt.

    Attributes:
        end: the token that ends a text.
    """

    def __init__(self, titles: TitleTokens, encode: PieceEncoder, quotes: bool):
        self.titles, self.encode, self.quotes = titles, encode, quotes
        tokenizer = encode.tokenizer
        self.end: int = tokenizer.pad_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        opening = encode('"') if quotes else []
        closing = [*(encode('"') if quotes else []), self.end]
        lengths = titles.offsets.diff()
        self.length = lengths + len(opening) + len(closing)
        self.start = self.length.cumsum(0) - self.length
        self.ids = torch.empty(int(self.length.sum()), dtype=torch.int64)
        for place, token in enumerate(opening):
            self.ids[self.start + place] = token
        for place, token in enumerate(reversed(closing), 1):
            self.ids[self.start + self.length - place] = token
        shift = torch.repeat_interleave(self.start + len(opening) - titles.offsets[:-1], lengths)
        self.ids[torch.arange(len(titles.ids)) + shift] = titles.ids

    def behind(self, prompt: Prompt, items: Tensor) -> tuple[Prompt, Tensor, Tensor]:
        """Prompts with the responses behind them, for training: template tokens, seen by what comes after them.

        Args:
            prompt: B right-padded prompts of T tokens, on the host. items: [B] int64 internal item ids.

        Returns:
            the longer prompt; where each token of a response is predicted, [N] int64 places in its flattened [B, T'];
            and these tokens, [N] int64.
        """
        begin, length = prompt.valid.sum(1, keepdim=True), self.length[items, None]
        columns = int((begin + length).max())
        more = columns - prompt.valid.shape[1]
        column = torch.arange(columns)
        place = column - begin
        response = (place >= 0) & (place < length)
        tokens = self.ids[(self.start[items, None] + place)[response]]
        ids = F.pad(prompt.input_ids, (0, more))
        ids[response] = tokens
        valid = F.pad(prompt.valid, (0, more)) | response
        slots, before = prompt.slots, prompt.valid.shape[1]
        longer = replace(
            prompt,
            slots=None if slots is None else slots // before * columns + slots % before,
            input_ids=ids,
            position_ids=torch.where(valid, column, 0),
            valid=valid,
            span=F.pad(prompt.span, (0, more), value=-1),
            is_last=F.pad(prompt.is_last, (0, more)),
        )
        return longer, response.flatten().nonzero()[:, 0] - 1, tokens

    def text(self, tokens: list[int]) -> str:
        """What the LLM has written up to its end: white space collapsed, and without the quotes around it."""
        if self.end in tokens:
            tokens = tokens[: tokens.index(self.end)]
        text = " ".join(self.encode.tokenizer.decode(tokens, clean_up_tokenization_spaces=False).split())
        if self.quotes:
            text = text.removeprefix('"').removesuffix('"').strip()
        return text
