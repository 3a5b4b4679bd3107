"""Pairs of tokens of a prompt: which kind they are of, how far apart they stand, how often titles have both."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from recbole_hatllm.data.prompt import Prompt
from recbole_hatllm.data.titles import TitleTokens

PARTS = ("intra", "cross", "self", "template")


def parts(span: Tensor) -> dict[str, Tensor]:
    """Which pairs of a query (row) that is a token of an item and a key (column) that is not behind it are of which kind.

    Every such pair is of one kind, so that the shares of them add up to 1: `intra`, an earlier token of the same item; `cross`, a
    token of an item before; `self`, itself; `template`, no token of an item. The same item means the same place in the history.

    Args:
        span: [T] int, as in `Prompt`.

    Returns:
        [T, T] bool by kind.
    """
    item = span >= 0
    query, key = item[:, None], item[None]
    same = span[:, None] == span[None]
    whole = torch.ones(len(span), len(span), dtype=torch.bool, device=span.device)
    earlier = whole.tril(-1)
    return {
        "intra": query & key & same & earlier,
        "cross": query & key & ~same & earlier,
        "self": query & (whole.tril() & ~earlier),
        "template": query & ~key & earlier,
    }


class Distances:
    """Mean distance of the pairs `intra` and `cross`, in tokens: |j - k| averaged over the pairs of all prompts."""

    def __init__(self):
        self.sum = dict.fromkeys(("intra", "cross"), 0)
        self.count = dict.fromkeys(self.sum, 0)

    def add(self, prompt: Prompt) -> None:
        """One prompt without padding."""
        place = prompt.position_ids[0]
        apart = (place[:, None] - place[None]).abs()
        for kind, chosen in parts(prompt.span[0]).items():
            if kind in self.sum:
                self.sum[kind] += int((apart * chosen).sum())
                self.count[kind] += int(chosen.sum())

    def means(self) -> dict[str, float | None]:
        """By kind; None without pairs."""
        return {kind: self.sum[kind] / count if count else None for kind, count in self.count.items()}


class CoOccurrence:
    """In how many other titles the two tokens of a pair stand together, for the pairs within an item and across items.

    The titles that the pair itself comes from do not count: one for a pair within an item, two for a pair of two items. Tokens are
    those of titles; an item's quotes and slots are left out.

    Args:
        titles: of the catalogue.
    """

    def __init__(self, titles: TitleTokens):
        count = len(titles.offsets) - 1
        title = np.repeat(np.arange(count), titles.offsets.diff().numpy())
        entries = (np.ones(len(title), dtype=np.int64), (title, titles.ids.numpy()))
        self.has = (
            csr_matrix(entries, shape=(count, int(titles.ids.max()) + 1)).minimum(1).tocsc()
        )  # [titles, vocabulary]
        self.tokens = [part.numpy() for part in titles.ids.split(titles.offsets.diff().tolist())]
        self.sum = dict.fromkeys(("intra", "cross"), 0)
        self.some = dict.fromkeys(self.sum, 0)
        self.count = dict.fromkeys(self.sum, 0)

    def add(self, items: Tensor) -> None:
        """One history: [n] int64 internal item ids, without padding."""
        items = items.numpy()
        lengths = [len(self.tokens[item]) for item in items]
        tokens = np.concatenate([self.tokens[item] for item in items])
        slot, owner = np.repeat(np.arange(len(items)), lengths), np.repeat(items, lengths)
        distinct, place = np.unique(tokens, return_inverse=True)
        own = self.has[:, distinct]
        both = (own.T @ own).toarray()[place[:, None], place[None]]
        held = own[owner].toarray()[:, place]  # [query, key]: whether the query's own title has the key's token
        counts = both - held - np.where(owner[:, None] == owner[None], 0, held.T)
        earlier = np.tri(len(tokens), k=-1, dtype=bool)
        same = slot[:, None] == slot[None]
        for kind, chosen in (("intra", earlier & same), ("cross", earlier & ~same)):
            found = counts[chosen]
            self.sum[kind] += int(found.sum())
            self.some[kind] += int((found > 0).sum())
            self.count[kind] += found.size

    def means(self) -> dict[str, dict[str, float | None]]:
        """By kind: `titles`, the mean number of other titles with both tokens, and `share` of the pairs with any."""
        return {
            kind: {
                "titles": self.sum[kind] / count if count else None,
                "share": self.some[kind] / count if count else None,
            }
            for kind, count in self.count.items()
        }
