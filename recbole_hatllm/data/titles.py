"""From a `.item` file to one token sequence per item.

Titles are read here, line by line, and never through RecBole's `load_col`: that would change which items are ranked,
split titles into words and fail on quotes. A title is tokenised once, apart from the prompt's own text, so that every
item has one token sequence wherever it appears.
"""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from recbole_hatllm.errors import DataError
from recbole_hatllm.files import publish

_INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\ufeff]+")


def clean(title: str) -> str:
    """The title as people read it: HTML entities resolved, white space collapsed, quotes around the whole removed."""
    title = " ".join(_INVISIBLE.sub(" ", html.unescape(title)).split())
    while len(title) > 1 and title[0] == title[-1] == '"':
        title = title[1:-1].strip()
    return title


def read_titles(
    file: Path, tokens: Sequence[str], title_field: str, year_field: str | None = None, missing: str = "error"
) -> list[str]:
    """One cleaned title per internal item id.

    Args:
        file: the `.item` file, UTF-8, tab separated, first line `name:type` per column.
        tokens: item tokens by internal id; the first stands for padding and gets an empty title.
        title_field: column of the title; year_field: column of a year that is appended as "Title (1995)".
        missing: `error` raises for an item without a title, `id` uses its token.

    Raises:
        DataError: no such file or column, or an item without a title while `missing` is `error`.
    """
    if not file.is_file():
        if missing == "id":
            return ["", *tokens[1:]]
        raise DataError(
            f"{file} does not exist, and this model needs titles: write it with the columns item_id:token and "
            f"{title_field}:token_seq, or pass --missing_title=id."
        )
    with file.open(encoding="utf-8-sig", errors="replace", newline="\n") as lines:
        columns = [column.split(":")[0] for column in next(lines, "").rstrip("\r\n").split("\t")]
        if title_field not in columns:
            raise DataError(
                f"{file} has the columns {', '.join(columns)} and no {title_field!r}: pass --title_field=<column of the title>."
            )
        at_title, at_year = columns.index(title_field), columns.index(year_field) if year_field in columns else None
        found = {}
        for line in lines:
            cells = line.rstrip("\r\n").split("\t")
            title = clean(cells[at_title]) if at_title < len(cells) else ""
            year = cells[at_year].strip() if at_year is not None and at_year < len(cells) else ""
            found[cells[0]] = f"{title} ({year})" if title and year else title
    without = [token for token in tokens[1:] if not found.get(token)]
    if without and missing == "error":
        raise DataError(
            f"{len(without)} of {len(tokens) - 1} items have no title in {file}, the first is item {without[0]}: "
            "add them, or pass --missing_title=id to use their ids."
        )
    return ["", *(found.get(token) or token for token in tokens[1:])]


def read_catalogue(
    file: Path, item_field: str, title_field: str, year_field: str | None = None
) -> tuple[list[str], list[str]]:
    """Item tokens and cleaned titles of an `.item` file of its own, in its order, without padding.

    Raises:
        DataError: no such file or column, an item twice or without a title, or no item at all.
    """
    if not file.is_file():
        raise DataError(
            f"{file} does not exist: --items names a .item file with the columns {item_field}:token and {title_field}."
        )
    with file.open(encoding="utf-8-sig", errors="replace", newline="\n") as lines:
        columns = [column.split(":")[0] for column in next(lines, "").rstrip("\r\n").split("\t")]
        if columns[0] != item_field:
            raise DataError(f"{file} has the columns {', '.join(columns)}, and the first must be {item_field}:token.")
        tokens = [line.rstrip("\r\n").split("\t")[0] for line in lines if line.strip()]
    if not tokens:
        raise DataError(f"{file} holds no items: one line an item follows the line of column names.")
    if len(set(tokens)) < len(tokens):
        twice = next(token for place, token in enumerate(tokens) if token in tokens[:place])
        raise DataError(f"{file} holds the item {twice} twice: leave one line out.")
    return tokens, read_titles(file, ["", *tokens], title_field, year_field)[1:]


class PieceEncoder:
    """Tokenises one piece of a prompt so that pieces can be joined.

    No special token is added, and text that looks like one (`</s>`) stays text. SentencePiece tokenizers put a space
    before whatever they are given: there a piece is encoded behind an anchor, and the anchor's tokens are dropped.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        plain = self._ids("a") + self._ids("b")
        self.anchor = "" if tokenizer.decode(plain) == "ab" else "\n"

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def __call__(self, text: str) -> list[int]:
        if not self.anchor:
            return self._ids(text)
        anchor, whole = self._ids(self.anchor), self._ids(self.anchor + text)
        if whole[: len(anchor)] != anchor:
            raise DataError(f"{type(self.tokenizer).__name__} does not tokenise {text!r} apart from what precedes it.")
        return whole[len(anchor) :]

    def fingerprint(self) -> str:
        """Changes whenever the tokenizer could give other ids."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        text = backend.to_str() if backend is not None else repr(sorted(self.tokenizer.get_vocab().items()))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class TitleTokens:
    """Token ids of all titles, flat: item i has `ids[offsets[i]:offsets[i + 1]]`. Both int64."""

    ids: Tensor
    offsets: Tensor

    @classmethod
    def none(cls, count: int) -> TitleTokens:
        """No tokens for each of so many items."""
        return cls(torch.zeros(0, dtype=torch.int64), torch.zeros(count + 1, dtype=torch.int64))

    @classmethod
    def build(cls, titles: Sequence[str], encode: PieceEncoder, max_tokens: int, cache: Path | None) -> TitleTokens:
        """Tokenises `titles` (cut after `max_tokens` tokens), or reads the result of an earlier call with equal content."""
        key = hashlib.sha256("\0".join([encode.fingerprint(), str(max_tokens), *titles]).encode("utf-8", "replace"))
        file = cache / f"titles-{key.hexdigest()[:32]}.safetensors" if cache else None
        if file and file.is_file():
            try:
                return cls(**load_file(file))
            except SafetensorError:  # a damaged cache is made again
                pass
        rows = [encode(title)[:max_tokens] for title in titles]
        offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
        tokens = cls(torch.tensor([token for row in rows for token in row], dtype=torch.int64), offsets)
        if file:
            publish(file, lambda temporary: save_file({"ids": tokens.ids, "offsets": tokens.offsets}, temporary))
        return tokens

    def rows(self, first: int) -> TitleTokens:
        """The titles from the `first` on."""
        start = self.offsets[first]
        return TitleTokens(self.ids[start:], self.offsets[first:] - start)
