"""Histories -> token ids and spans, on the host.

The prompt is the Alpaca wrapper around the paper's Table 1. Its pieces and the titles are tokenised apart, once; a batch
is then assembled by gather alone: no tokenizer, no Python loop over rows, and the span of every item is exact.

    prefix  | open title | between | open title | between | open title | end suffix
              `---- item 0 ----´     `---- item 1 ----´     `---- item 2 ---´          (item_span: segment)

For training on every item of a row at once, the ending follows once for each item, as a branch: it sees the prompt up to
its item and itself. A branch reads exactly what a prompt that ends there would read.

    prefix | title | between | title | between | title | end suffix | end suffix | end suffix
                                                         branch 0     branch 1     branch 2

An item may end in a slot: a token whose embedding a model replaces by a vector of that item (LLaRA's behaviour token), or be
nothing but a slot (E4SRec).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recbole_hatllm.data.titles import PieceEncoder, TitleTokens

_TASK = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n"
)
TEMPLATE = (
    f"{_TASK}"
    "Given a list of {nouns} the user has {verb} before, please recommend a new {noun} that the user likes to the user.\n\n"
    "### Input:\n"
    "The user has {verb} the following {nouns} before: {items}\n \n\n"
    "### Response:\n"
)


@dataclass(frozen=True)
class Wrapping:
    """The text around a title, and which part of it counts as the item's own tokens.

    `between` follows every title but the last and `end` follows the last; each is a list of (text, is part of the item).
    `close` stands between a title and its slot, as part of the item: the item's tokens are one run.
    """

    start: str
    open: tuple[tuple[str, bool], ...]
    between: tuple[tuple[str, bool], ...]
    end: tuple[tuple[str, bool], ...]
    close: str = ""


# All three read `"A", "B"`. The piece `", "` stays whole where the reading allows it: cutting it at each quote costs the
# backbone 16 % of the prompt's likelihood (docs/log.md).
WRAPPINGS = {
    "title": Wrapping(' "', (), (('", "', False),), (('"', False),)),
    "quoted": Wrapping("", ((' "', True),), (('"', True), (",", False)), (('"', True),)),
    "segment": Wrapping(' "', (), (('", "', True),), (('"', True),)),
}


# `"A"* , "B"*`, where * is a slot. As `segment` the separator behind a slot would be the item's for all items but the last.
WRAPPINGS_WITH_SLOTS = {
    "title": Wrapping(' "', (), ((', "', False),), (), close='"'),
    "quoted": Wrapping("", ((' "', True),), ((",", False),), (), close='"'),
}


@dataclass(frozen=True)
class Template:
    """What all prompts of a model have in common.

    text: with {items} where they stand, the space before it left to the wrapping, and {nouns}, {noun} and {verb}. wrappings: by
    `item_span`. titles: whether items have their titles in it, and slots: whether an item ends in a slot. bos: whether a
    tokenizer's own start token comes first.
    """

    text: str
    wrappings: dict[str, Wrapping]
    titles: bool = True
    slots: bool = False
    bos: bool = True


TITLES = Template(TEMPLATE, WRAPPINGS)
TITLES_AND_SLOTS = Template(TEMPLATE, WRAPPINGS_WITH_SLOTS, slots=True)
SLOTS = Template(
    f"{_TASK}Given the user's purchase history, predict next possible item to be purchased.\n\n"
    "### Input:\n {items}\n### Response:\n",
    dict.fromkeys(WRAPPINGS, Wrapping("", (), (), ())),
    titles=False,
    slots=True,
    bos=False,
)


@dataclass(frozen=True)
class Prompt:
    """One batch of prompts, right padded. B rows, T tokens; all tensors on one device.

    input_ids, position_ids: [B, T] int64. valid: [B, T] bool, False = padding. span: [B, T] int64, -1 = template token,
    k = k-th item of the history. is_last: [B, T] bool, last token of an item's span. readout: [B] int64, the column whose
    hidden state stands for the user; with branches [B, L], one for each item, 0 where there is none. shared: how many first
    columns, all of the template, are the same in every row. branch, stem: [B, T]
    int64, None without branches; which branch a token belongs to (-1 = none), and how many of the columns before it does
    that branch continue. slots: [S] int64, None without slots; places of the slots among the flattened [B * T], and
    slot_items: [S] int64, the item of each.
    """

    input_ids: Tensor
    position_ids: Tensor
    valid: Tensor
    span: Tensor
    is_last: Tensor
    readout: Tensor
    shared: int
    branch: Tensor | None = None
    stem: Tensor | None = None
    slots: Tensor | None = None
    slot_items: Tensor | None = None


class PromptTable:
    """All pieces of all prompts of a dataset; call it with histories to get a `Prompt`.

    Args:
        titles: token ids of every item's title by internal id; none of any item where the template has no titles.
        encode: tokenises the template's pieces.
        words: fills `{nouns}`, `{noun}` and `{verb}` of the template.
        item_span: which tokens belong to an item: `title` (the letter of the paper), `quoted` (with its quotes) or
            `segment` (with the separator after it: the only one in which IN layers isolate items fully).
        readout: `prompt_end` (last token of the prompt) or `last_item` (last token of the last item).
        template: text and form.
    """

    def __init__(
        self,
        titles: TitleTokens,
        encode: PieceEncoder,
        words: dict[str, str],
        item_span: str = "title",
        readout: str = "prompt_end",
        template: Template = TITLES,
    ):
        wrapping = template.wrappings[item_span]
        self.readout = readout
        head, tail = template.text.format(**words, items="{items}").split(" {items}")
        self.text = (head, tail)
        pieces = {
            "prefix": ((head + wrapping.start, False),),
            "between": wrapping.between,
            "end": (*wrapping.end, (tail, False)),
        }
        pool: list[int] = []
        owned: list[bool] = []
        piece = {}
        for name, parts in pieces.items():
            start = len(pool)
            for text, is_item in parts:
                ids = encode(text)
                if name == "prefix" and template.bos:
                    ids = self.beginning(encode.tokenizer) + ids
                pool += ids
                owned += [is_item] * len(ids)
            piece[name] = (start, len(pool) - start)
        self.shared = piece["prefix"][1]
        opening = [token for text, _ in wrapping.open for token in encode(text)]
        closing = encode(wrapping.close) + [0] * template.slots  # some token stands in a slot, and nobody sees it

        # The pool holds the three template pieces, then the opening, title and closing of every item.
        lengths = titles.offsets.diff() + len(opening) + len(closing)
        items = torch.empty(int(lengths.sum()), dtype=torch.int64)
        starts = lengths.cumsum(0) - lengths
        if opening:
            items[starts[:, None] + torch.arange(len(opening))] = torch.tensor(opening)
        if closing:
            items[(starts + lengths)[:, None] - torch.arange(len(closing), 0, -1)] = torch.tensor(closing)
        shift = torch.repeat_interleave(starts + len(opening) - titles.offsets[:-1], titles.offsets.diff())
        items[torch.arange(len(titles.ids)) + shift] = titles.ids

        self.pool = torch.cat([torch.tensor(pool, dtype=torch.int64), items])
        self.owned = torch.cat([torch.tensor(owned, dtype=torch.bool), torch.ones(len(items), dtype=torch.bool)])
        self.item_start, self.item_length = starts + len(pool), lengths
        self.slot_item = None  # by place in the pool, 0 where there is no slot
        if template.slots:
            self.slot_item = torch.zeros_like(self.pool)
            self.slot_item[self.item_start + lengths - 1] = torch.arange(len(lengths))
        order = ("prefix", "between", "end")
        self.piece_start, self.piece_length = torch.tensor([piece[name] for name in order]).T

    @staticmethod
    def beginning(tokenizer) -> list[int]:
        """The tokens that this tokenizer puts before a text of its own accord (Llama-3: one; SmolLM2: none)."""
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = tokenizer("a")["input_ids"]
        at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        return whole[:at]

    def title_tokens(self, item_seq: Tensor) -> Tensor:
        """[B, L] item ids, padded with 0 -> [B] int64, tokens of all titles: what makes prompts of a batch differ in length."""
        return (self.item_length[item_seq] * (item_seq > 0)).sum(1)

    def __call__(self, item_seq: Tensor, item_len: Tensor, branches: bool = False) -> Prompt:
        """Prompts of histories.

        Args:
            item_seq: [B, L] int64 internal item ids, oldest first, right padded with 0.
            item_len: [B] int64, at least 1.
            branches: end the prompt after every item, not only after the last one.
        """
        rows, slots = item_seq.shape
        slot = torch.arange(slots, device=item_seq.device)
        real = slot < item_len[:, None]
        final = slot == item_len[:, None] - 1
        prefix, between, end = self.piece_start.unbind()
        prefix_length, between_length, end_length = self.piece_length.unbind()

        # Segments of a row, in order: prefix, then title and separator per slot, then the endings. [B, 1 + 2L + E]
        endings = real if branches else torch.ones_like(real[:, :1])
        start = torch.stack([self.item_start[item_seq], between.expand_as(item_seq)], -1).flatten(1)
        length = torch.stack([self.item_length[item_seq] * real, between_length * (real & ~final)], -1).flatten(1)
        start = torch.cat([prefix.expand(rows, 1), start, end.expand_as(endings)], 1)
        length = torch.cat([prefix_length.expand(rows, 1), length, end_length * endings], 1)
        stop = length.cumsum(1)
        begin = stop - length

        total = stop[:, -1:]
        column = torch.arange(int(total.max()), device=item_seq.device).expand(rows, -1).contiguous()
        valid = column < total
        segment = torch.searchsorted(stop, column, right=True).clamp_(max=start.shape[1] - 1)
        source = (start - begin).gather(1, segment) + column
        source.masked_fill_(~valid, 0)

        # Segment 0 is the prefix; 1 and 2 are slot 0; 3 and 4 are slot 1; ...; behind them the endings.
        ending = segment - (1 + 2 * slots)
        in_ending = ending >= 0
        item_of_ending = ending if branches else item_len[:, None] - 1
        owned = self.owned[source] & valid
        span = torch.where(owned, torch.where(in_ending, item_of_ending, (segment - 1) // 2), -1)
        following = torch.cat([span[:, 1:], span.new_full((rows, 1), -1)], 1)
        is_last = owned & (following != span)

        ends = stop[:, 1 + 2 * slots :]
        if not branches:
            branch = stem = None
            position, item = column, item_len[:, None] - 1
        else:
            # A title that closes with a quote of its own ends there, and the last title's quote is in its branch.
            closes = self.owned[end] & (segment == 2 * item_len[:, None] - 1)
            is_last &= ~closes
            branch = torch.where(in_ending & valid, ending, -1)
            at = branch.clamp(min=0)
            stem = stop[:, 1 : 1 + 2 * slots : 2].gather(1, at) * (branch >= 0)
            position = torch.where(branch >= 0, column - begin[:, 1 + 2 * slots :].gather(1, at) + stem, column)
            item = slot.expand(rows, -1)
        if self.readout == "prompt_end":
            readout = ends - 1
        else:  # the last one, as the prompt itself may go on behind an item otherwise than its branch does
            readout = torch.where(is_last[:, None] & (span[:, None] == item[..., None]), column[:, None], -1).argmax(2)
        places = filled = None
        if self.slot_item is not None:
            filled = (self.slot_item[source] * valid).flatten()
            places = filled.nonzero()[:, 0]
            filled = filled[places]
        return Prompt(
            input_ids=self.pool[source].masked_fill_(~valid, 0),
            position_ids=position.masked_fill(~valid, 0),
            valid=valid,
            span=span,
            is_last=is_last,
            readout=readout.masked_fill(~real, 0) if branches else readout[:, 0],
            shared=self.shared,
            branch=branch,
            stem=stem,
            slots=places,
            slot_items=filled,
        )
