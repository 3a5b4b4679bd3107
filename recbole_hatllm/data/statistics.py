"""What a dataset is made of: counts, titles and dates, beside the paper's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

from recbole_hatllm.data.sources import recbole_files
from recbole_hatllm.data.titles import clean


@dataclass(frozen=True)
class Statistics:
    """Counts of one dataset.

    users, items, interactions: how many. density: share of all (user, item) pairs, 0 to 1.
    title_coverage: share of the items with a title. distinct_titles: how many different ones.
    title_words, title_tokens: (mean, longest) of the items with a title; None without titles or without a tokenizer.
    user_interactions: (mean, median). first, last: dates of the oldest and the newest interaction, UTC.
    """

    users: int
    items: int
    interactions: int
    density: float
    title_coverage: float
    distinct_titles: int
    title_words: tuple[float, int] | None
    title_tokens: tuple[float, int] | None
    user_interactions: tuple[float, float]
    first: date
    last: date


def statistics(
    folder: Path, name: str, tokenizer: Callable[[str], Sequence[int]] | None = None, title_field: str = "title"
) -> Statistics:
    """Statistics of the atomic files `<name>.inter` and, for the titles, `<name>.item`.

    Args:
        tokenizer: text -> token ids. title_field: column of the titles.

    Raises:
        DataError: a file is missing or broken, or lacks a column.
    """
    paths = {"inter": folder / f"{name}.inter", "items": folder / f"{name}.item"}
    if not paths["items"].is_file():
        del paths["items"]
    raw = recbole_files.read(paths, [title_field])
    taken = np.bincount(raw.users)
    found = (clean(raw.titles.get(item, "")) for item in raw.item_tokens)
    titles = [title for title in found if title]
    users, items, interactions = len(taken), len(raw.item_tokens), len(raw.users)
    return Statistics(
        users=users,
        items=items,
        interactions=interactions,
        density=interactions / (users * items),
        title_coverage=len(titles) / items,
        distinct_titles=len({*titles}),
        title_words=_mean_and_longest([len(title.split()) for title in titles]),
        title_tokens=_mean_and_longest([len(tokenizer(title)) for title in titles]) if tokenizer else None,
        user_interactions=(float(taken.mean()), float(np.median(taken))),
        first=_day(raw.times.min()),
        last=_day(raw.times.max()),
    )


def _mean_and_longest(lengths: list[int]) -> tuple[float, int] | None:
    return (float(np.mean(lengths)), max(lengths)) if lengths else None


def _day(seconds: float) -> date:
    return np.datetime64(int(seconds), "s").astype("datetime64[D]").item()


def table(stats: Statistics, paper: Mapping[str, float] | None = None) -> str:
    """Lines for the terminal.

    Args:
        paper: users, items, interactions and density (0 to 1) in the paper; they get two more columns.
    """
    paper = paper or {}
    rows = [("", "here", "paper", "difference") if paper else ("", "here")]
    for what, show in (("users", ",d"), ("items", ",d"), ("interactions", ",d"), ("density", ".4%")):
        ours = getattr(stats, what)
        row = (what, format(ours, show))
        rows.append((*row, format(paper[what], show), format(ours - paper[what], "+" + show)) if what in paper else row)
    rows += [
        ("items with a title", f"{stats.title_coverage:.2%}"),
        ("distinct titles", f"{stats.distinct_titles:,}"),
    ]
    for what, pair in (("words", stats.title_words), ("tokens", stats.title_tokens)):
        if pair:
            rows += [(f"{what} a title, mean", f"{pair[0]:.1f}"), (f"{what} a title, most", f"{pair[1]:,}")]
    mean, median = stats.user_interactions
    rows += [
        ("interactions a user, mean", f"{mean:.2f}"),
        ("interactions a user, median", f"{median:g}"),
        ("first day", str(stats.first)),
        ("last day", str(stats.last)),
    ]
    first = max(len(row[0]) for row in rows)
    return "\n".join(row[0].ljust(first) + "".join(cell.rjust(12) for cell in row[1:]) for row in rows)
