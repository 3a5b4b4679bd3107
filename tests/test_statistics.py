"""Counts of atomic files, and the table beside the paper's."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from recbole_hatllm.config import Config
from recbole_hatllm.data.statistics import statistics, table
from recbole_hatllm.errors import DataError

INTER = "user_id:token\titem_id:token\ttimestamp:float\nu\ta\t86399\nu\tb\t86400\nu\tc\t5e6\nv\ta\t1.5\n"
ITEM = "item_id:token\ttitle:token_seq\na\tOne &amp; two\nb\tOne & two\nc\t \nunseen\tA very long title\n"


def write(folder, item=ITEM):
    (folder / "x.inter").write_text(INTER)
    if item:
        (folder / "x.item").write_text(item)
    return folder


def test_counts(tmp_path):
    stats = statistics(write(tmp_path), "x", tokenizer=list)
    assert (stats.users, stats.items, stats.interactions) == (2, 3, 4) and stats.density == pytest.approx(4 / 6)
    assert stats.title_coverage == pytest.approx(2 / 3) and stats.distinct_titles == 1
    assert stats.title_words == (3, 3) and stats.title_tokens == (9, 9)
    assert stats.user_interactions == (2, 2) and (stats.first, stats.last) == (date(1970, 1, 1), date(1970, 2, 27))


def test_without_titles_or_tokenizer_their_rows_are_left_out(tmp_path):
    stats = statistics(write(tmp_path, item=None), "x")
    assert stats.title_coverage == 0 and stats.title_words is stats.title_tokens is None
    assert "words" not in table(stats) and "tokens" not in table(stats)
    assert "tokens a title" not in table(statistics(write(tmp_path), "x"))
    assert "tokens a title" in table(statistics(write(tmp_path), "x", str.split))


def test_other_title_columns():
    folder = Path(Config("Pop", "ml-100k")["data_path"])
    stats = statistics(folder, "ml-100k", title_field="movie_title")
    assert (stats.users, stats.items, stats.interactions) == (943, 1682, 100_000)
    assert (stats.title_coverage, stats.first, stats.last) == (1, date(1997, 9, 20), date(1998, 4, 22))


def test_a_missing_column_or_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"x\.item, line 1, has the columns item_id, title and no name"):
        statistics(write(tmp_path), "x", title_field="name")
    with pytest.raises(DataError, match=r"y\.inter cannot be read"):
        statistics(tmp_path, "y")


def test_table_beside_the_papers(tmp_path):
    stats = statistics(write(tmp_path), "x")
    lines = table(stats, {"users": 22_332, "items": 3, "interactions": 2, "density": 0.5}).split("\n")
    cells = {line[:26].strip(): line[26:].split() for line in lines}
    assert cells[""] == ["here", "paper", "difference"]
    assert cells["users"] == ["2", "22,332", "-22,330"] and cells["items"] == ["3", "3", "+0"]
    assert cells["density"] == ["66.6667%", "50.0000%", "+16.6667%"]
    assert cells["first day"] == ["1970-01-01"] and len({line.index("1970") for line in lines[-2:]}) == 1
    assert table(stats).split("\n")[0].split() == ["here"]
