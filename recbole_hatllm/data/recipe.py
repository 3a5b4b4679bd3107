"""From raw interactions to atomic files: titled items only, no duplicates, k-core, time order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from recbole_hatllm.data.sources.raw import RawData
from recbole_hatllm.data.titles import clean
from recbole_hatllm.errors import DataError

# Rows that are handled at once, about: bounds the memory that it takes, not the result.
SORTED_AT_ONCE = 4_000_000
WRITTEN_AT_ONCE = 100_000

# What pandas, with which RecBole reads, takes for the end of a cell or for an empty one.
_FORBIDDEN = re.compile('[\t\r\n\0"]')
_NO_IDS = {
    "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL",
    "NaN", "None", "n/a", "nan", "null",
}  # fmt: skip


class Step(NamedTuple):
    """What was done, and how many users, items and interactions are left after it."""

    what: str
    users: int
    items: int
    interactions: int


@dataclass(frozen=True)
class Prepared:
    """Interactions in time order.

    Attributes:
        users, items: [N] int32, places in `user_tokens` and `item_tokens`, which also hold those that were dropped.
        times: [N] seconds since 1970, of the dtype in RawData.
        titles: token -> cleaned title of each item that is left.
        steps: what each step left, beginning with what was read. notes: one sentence each.
    """

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    user_tokens: list[str]
    item_tokens: list[str]
    titles: dict[str, str]
    steps: list[Step]
    notes: list[str]


def apply(raw: RawData, k_core: int) -> Prepared:
    """Drops items without a title, then repetitions of (user, item, time), then what is outside the k-core; sorts by time.

    A title of one character counts as none, as in the code that the paper follows. Of equal times the file's order is kept.

    Args:
        k_core: every user and every item that is left has at least this many interactions.

    Raises:
        DataError: a step leaves nothing.
    """
    notes = [*raw.notes]
    titles = {item: _settled(title) for item, title in raw.titles.items()}
    if short := sum(len(title) == 1 for title in titles.values()):
        notes.append(f"{short:,} titles of one character count as none")
    keep = np.ones(len(raw.users), dtype=bool)
    steps = [_step("read", raw, keep)]

    titled = np.array([len(titles.get(item, "")) > 1 for item in raw.item_tokens])
    keep &= titled[raw.items]
    steps.append(_step("items without a title dropped", raw, keep))

    _drop_repetitions(raw, keep)
    steps.append(_step("repeated (user, item, time) dropped", raw, keep))

    _drop_outside_core(raw, keep, k_core)
    steps.append(_step(f"{k_core}-core", raw, keep))

    order = np.flatnonzero(keep)
    order = order[np.argsort(raw.times[order], kind="stable")]
    items = raw.items[order]
    left = (raw.item_tokens[item] for item in np.unique(items))
    return Prepared(
        users=raw.users[order],
        items=items,
        times=raw.times[order],
        user_tokens=raw.user_tokens,
        item_tokens=raw.item_tokens,
        titles={item: titles[item] for item in left},
        steps=steps,
        notes=notes,
    )


def _settled(title: str) -> str:
    """Cleaned until cleaning changes nothing more: some sources escape twice, and whoever reads the files cleans again."""
    while (cleaned := clean(title)) != title:
        title = cleaned
    return title


def _step(what: str, raw: RawData, keep: np.ndarray) -> Step:
    users, items = (int(np.count_nonzero(np.bincount(codes[keep]))) for codes in (raw.users, raw.items))
    if not users:
        raise DataError(
            f"Nothing is left of {len(keep):,} interactions after the step '{what}': "
            + ("lower the k-core." if what.endswith("-core") else "check that the titles belong to these interactions.")
        )
    return Step(what, users, items, int(keep.sum()))


def _drop_repetitions(raw: RawData, keep: np.ndarray) -> None:
    """Keeps the first of equal interactions. Some users at a time, as sorting all at once would take much memory."""
    parts = len(keep) // SORTED_AT_ONCE + 1
    for part in range(parts):
        rows = np.flatnonzero(keep & (raw.users % parts == part))
        columns = raw.times[rows], raw.items[rows], raw.users[rows]
        order = np.lexsort(columns)  # stable: the first in the file is the first of its equals
        again = np.logical_and.reduce([column[order[1:]] == column[order[:-1]] for column in columns])
        keep[rows[order[1:][again]]] = False


def _drop_outside_core(raw: RawData, keep: np.ndarray, k_core: int) -> None:
    """Users and items with too few interactions go in turns, until none is left."""
    before = None
    while (left := np.count_nonzero(keep)) != before:
        before = left
        for codes in (raw.users, raw.items):
            keep &= (np.bincount(codes[keep], minlength=codes.max() + 1) >= k_core)[codes]


# --- Files


def write(prepared: Prepared, folder: Path, name: str) -> None:
    """Writes `<name>.inter`, oldest interaction first, and `<name>.item`, into `folder`, which is made if need be.

    Raises:
        DataError: an id cannot stand in a tab-separated file that pandas reads.
    """
    folder.mkdir(parents=True, exist_ok=True)
    users, items = prepared.user_tokens, prepared.item_tokens
    for what, tokens, codes in (("user", users, prepared.users), ("item", items, prepared.items)):
        for code in np.unique(codes):
            _check_id(what, tokens[code])
    _write_lines(folder / f"{name}.inter", "user_id:token\titem_id:token\ttimestamp:float", _interactions(prepared))
    titles = (f"{item}\t{title}" for item, title in prepared.titles.items())
    _write_lines(folder / f"{name}.item", "item_id:token\ttitle:token_seq", titles)


def _interactions(prepared: Prepared) -> Iterator[str]:
    users, items = prepared.user_tokens, prepared.item_tokens
    for start in range(0, len(prepared.times), WRITTEN_AT_ONCE):
        part = slice(start, start + WRITTEN_AT_ONCE)
        columns = (column[part].tolist() for column in (prepared.users, prepared.items, prepared.times))
        for user, item, time in zip(*columns):
            yield f"{users[user]}\t{items[item]}\t{time}"


def _write_lines(file: Path, header: str, lines: Iterable[str]) -> None:
    with file.open("w", encoding="utf-8", newline="\n") as out:
        out.writelines(f"{line}\n" for line in chain([header], lines))


def _check_id(what: str, token: str) -> None:
    if token in _NO_IDS or _FORBIDDEN.search(token):
        raise DataError(
            f"The {what} id {token!r} cannot stand in a tab-separated file that RecBole reads (no tabs, line ends, quotes "
            "or words such as NA): rename it in the source."
        )
