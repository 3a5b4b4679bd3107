"""Amazon reviews: the releases of 2014, 2018 and 2023, and the plain ratings of the first two."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Container
from itertools import islice
from pathlib import Path

from recbole_hatllm.data.sources.raw import Builder, Interaction, RawData, number, parse_lines, read_lines, token
from recbole_hatllm.errors import DataError

ASIN_LENGTH = 10


def read_2014(paths: dict[str, Path]) -> RawData:
    """`reviews_<category>_5.json.gz` in JSON and `meta_<category>.json.gz`, one Python literal a line."""
    return _read(paths, _review, "asin", _literal, [])


def read_2018(paths: dict[str, Path]) -> RawData:
    """`<category>_5.json.gz` and `meta_<category>.json.gz`, both in JSON."""
    return _read(paths, _review, "asin", json.loads, [])


def read_2023(paths: dict[str, Path]) -> RawData:
    """`<category>.jsonl.gz` and `meta_<category>.jsonl.gz`, both in JSON; an item is the parent of its variants."""
    return _read(paths, _review_2023, "parent_asin", json.loads, [])


def read_ratings(paths: dict[str, Path]) -> RawData:
    """`ratings_<category>.csv`: user, item, rating, time (2014) or item, user, rating, time (2018); no header.

    Raises:
        DataError: also where neither of the first two columns looks like ASINs.
    """
    at_item = _asin_column(paths["inter"])

    def rating(line: str) -> Interaction:
        cells = line.split(",")
        if len(cells) != 4:
            raise ValueError(f"{len(cells)} columns and not 4")
        return token(cells[1 - at_item]), token(cells[at_item]), number(cells[3])

    notes = [f"{paths['inter'].name}: the {('first', 'second')[at_item]} column holds the items"]
    return _read(paths, rating, "asin", _json_or_literal, notes)


def _read(
    paths: dict[str, Path],
    interaction: Callable[[str], Interaction],
    key: str,
    meta: Callable[[str], dict],
    notes: list[str],
) -> RawData:
    """Interactions and titles from what one line of their files holds. key: field of the item in the file of titles."""
    builder = Builder()
    builder.extend(parse_lines(paths["inter"], interaction, notes))
    titles = _titles(paths["items"], key, meta, builder.item_codes, notes)
    return builder.build(str(paths["inter"]), titles, notes)


def _review(line: str) -> Interaction:
    record = json.loads(line)
    return token(record["reviewerID"]), token(record["asin"]), number(record["unixReviewTime"])


def _review_2023(line: str) -> Interaction:
    record = json.loads(line)
    return token(record["user_id"]), token(record["parent_asin"]), number(record["timestamp"])


def _titles(
    file: Path, key: str, read: Callable[[str], dict], wanted: Container[str], notes: list[str]
) -> dict[str, str]:
    """The first title of each wanted item. Lines of other items are told by a glance: parsing them takes much longer."""
    names = re.compile(rf"""['"]{key}['"]\s*:\s*['"]([^'"\\]+)""")
    pages = 0

    def item(line: str) -> tuple[str, str] | None:
        found = names.findall(line)
        if found and not any(name in wanted for name in found):
            return None
        record = read(line)
        title = record.get("title")
        return token(record[key]), title if isinstance(title, str) else ""

    titles: dict[str, str] = {}
    for pair in parse_lines(file, item, notes):
        if pair and pair[0] in wanted and pair[0] not in titles:
            if _is_script(pair[1]):
                pages += 1
            elif pair[1].strip():
                titles[pair[0]] = pair[1]
    if pages:
        notes.append(f"{file.name}: {pages:,} titles are pieces of a web page's script and count as none")
    return titles


def _is_script(title: str) -> bool:
    """Whether the crawler of 2018 took a script for a title; its authors advise to drop those with getTime."""
    return title.lstrip().startswith("var aPageStart") or "getTime" in title


def _literal(line: str) -> dict:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # backslashes in titles
        warnings.simplefilter("ignore", DeprecationWarning)
        return ast.literal_eval(line)


def _json_or_literal(line: str) -> dict:
    try:
        return json.loads(line)
    except ValueError:
        return _literal(line)


def _asin_column(file: Path) -> int:
    """0 or 1, whichever holds the ASINs: all of them have 10 characters, most user ids have more."""
    lengths: Counter[int] = Counter()
    for _, line in islice(read_lines(file), 1000):
        for place, cell in enumerate(line.split(b",")[:2]):
            lengths[place] += len(cell) == ASIN_LENGTH
    if lengths[0] == lengths[1]:
        raise DataError(
            f"{file}: neither of the first two columns looks like the items (ASINs, {ASIN_LENGTH} characters) more than "
            "the other: it must hold user, item, rating, time or item, user, rating, time, without a header."
        )
    return int(lengths[1] > lengths[0])
