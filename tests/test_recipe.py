"""From a raw table to atomic files: each step against an oracle that shares no code with it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_hatllm import registry
from recbole_hatllm.config import Config
from recbole_hatllm.data import recipe
from recbole_hatllm.data.sources import recbole_files
from recbole_hatllm.data.sources.raw import Builder
from recbole_hatllm.data.titles import clean
from recbole_hatllm.errors import DataError


def raw(rows, titles=None, notes=()):
    """A raw table of (user, item, time) rows; every item has a title unless `titles` says otherwise."""
    builder = Builder()
    builder.extend(rows)
    return builder.build("test", {item: f"Title {item}" for _, item, _ in rows} if titles is None else titles, [*notes])


def rows_of(prepared):
    users, items = prepared.user_tokens, prepared.item_tokens
    return [
        (users[user], items[item], time)
        for user, item, time in zip(prepared.users, prepared.items, prepared.times.tolist())
    ]


def oracle(rows, k_core):
    """Recipe without titles, row by row."""
    rows = [*dict.fromkeys(rows)]
    while True:
        users, items = Counter(user for user, *_ in rows), Counter(item for _, item, _ in rows)
        kept = [row for row in rows if users[row[0]] >= k_core and items[row[1]] >= k_core]
        if len(kept) == len(rows):
            return [row for _, row in sorted(enumerate(rows), key=lambda pair: (pair[1][2], pair[0]))]
        rows = kept


TABLES = st.lists(
    st.tuples(st.sampled_from("uvwxyz"), st.sampled_from("abcde"), st.integers(0, 3)), min_size=1, max_size=120
)


@given(TABLES, st.integers(1, 6))
@settings(max_examples=300, deadline=None)
def test_recipe_is_the_oracles(rows, k_core):
    expected = oracle(rows, k_core)
    if not expected:
        with pytest.raises(DataError, match=f"Nothing is left .* '{k_core}-core': lower the k-core"):
            recipe.apply(raw(rows), k_core)
        return
    prepared = recipe.apply(raw(rows), k_core)
    assert rows_of(prepared) == expected
    assert set(prepared.titles) == {item for _, item, _ in expected}
    for step, left in zip(prepared.steps, (rows, rows, [*dict.fromkeys(rows)], expected)):
        assert step[1:] == (len({user for user, *_ in left}), len({item for _, item, _ in left}), len(left))


def test_many_rows_are_handled_in_parts(monkeypatch):
    draw = np.random.default_rng(0)
    rows = [(f"u{u}", f"i{i}", int(t)) for u, i, t in zip(*draw.integers(0, [[9], [7], [5]], (3, 700)))]
    monkeypatch.setattr(recipe, "SORTED_AT_ONCE", 100)
    assert rows_of(recipe.apply(raw(rows), 5)) == oracle(rows, 5)


def test_items_without_a_title_go_before_all_else():
    """The first of them takes users with it: they have too few interactions then."""
    rows = [(user, item, time) for user in "uv" for time, item in enumerate("abcd")] + [("w", "a", 1), ("w", "x", 2)]
    titles = {"a": "A&amp;B", "b": "&#39;", "c": " \t", "d": "Two\u2028lines\there", "x": "X", "unseen": "Y"}
    prepared = recipe.apply(raw(rows, titles, ["the reader's"]), 2)
    assert prepared.titles == {"a": "A&B", "d": "Two lines here"}
    assert rows_of(prepared) == [("u", "a", 0), ("v", "a", 0), ("u", "d", 3), ("v", "d", 3)]
    assert [step[1:] for step in prepared.steps] == [(3, 5, 10), (3, 2, 5), (3, 2, 5), (2, 2, 4)]
    assert prepared.notes == ["the reader's", "2 titles of one character count as none"]
    with pytest.raises(DataError, match=r"Nothing is left of 10 interactions .* check that the titles belong"):
        recipe.apply(raw(rows, {"other": "Title"}), 2)


def test_ties_keep_the_order_of_the_file_and_later_repetitions_go():
    rows = [("u", "c", 5), ("u", "a", 5), ("u", "b", 2), ("u", "c", 5), ("u", "c", 2), ("u", "a", 5)]
    prepared = recipe.apply(raw(rows), 1)
    assert rows_of(prepared) == [("u", "b", 2), ("u", "c", 2), ("u", "c", 5), ("u", "a", 5)]


@given(st.text(st.sampled_from("&#;amp382quot\"' \t\u2028A"), max_size=30))
@settings(max_examples=300, deadline=None)
def test_cleaning_a_title_again_changes_nothing(title):
    prepared = recipe.apply(raw([("u", "a", 1), ("u", "b", 1)], {"a": "Title", "b": title}), 1)
    assert all(clean(title) == title for title in prepared.titles.values())


# --- Files

AWKWARD = {
    "b": 'A bare 15" quote',
    "a": '"Starts" with one',
    "c": "Twin",
    "ds": "Escaped twice&amp;#8482, &amp;quot;so&amp;quot;",
    "d": "Twin",
    "é e": "word " * 137 + "&quot;end&quot;",
    "f": "One\u2028line\r\n\tTom &amp; Jerry",
}


def awkward_rows():
    """Days with ties; every user takes all items, some twice."""
    rows = [(f"user {u}", item, 86_400 * (u + place // 3)) for u in range(7) for place, item in enumerate(AWKWARD)]
    return rows + [(f"user {u}", "b", 86_400 * 9) for u in range(7)]


def test_files_are_read_as_they_were_written(tmp_path):
    prepared = recipe.apply(raw(awkward_rows(), AWKWARD), 5)
    recipe.write(prepared, tmp_path / "mine", "mine")
    dataset = registry.create_dataset(Config("SASRec", "mine", config_dict={"data_path": str(tmp_path)}))
    users, items = dataset.field2id_token["user_id"], dataset.item_tokens
    feat = dataset.inter_feat
    found = list(zip(users[feat["user_id"]], (items[i] for i in feat["item_id"]), feat["timestamp"].astype(int)))
    assert found == rows_of(prepared) == oracle(awkward_rows(), 5)
    assert dict(zip(items[1:], dataset.titles[1:])) == prepared.titles
    again = recbole_files.read({"inter": tmp_path / "mine/mine.inter", "items": tmp_path / "mine/mine.item"})
    second = recipe.apply(again, 5)
    assert rows_of(second) == rows_of(prepared) and second.titles == prepared.titles
    assert len({step[1:] for step in second.steps}) == 1  # nothing more to drop


def test_files_hold_what_is_left_and_no_more(tmp_path):
    rows = [("u", "a", 1), ("u", "b", 2), ("v", "a", 1), ("v", "b", 3), ("w", "x", 9)]
    recipe.write(recipe.apply(raw(rows), 2), tmp_path, "x")
    assert (tmp_path / "x.inter").read_bytes() == (
        b"user_id:token\titem_id:token\ttimestamp:float\nu\ta\t1\nv\ta\t1\nu\tb\t2\nv\tb\t3\n"
    )
    assert (tmp_path / "x.item").read_bytes() == b"item_id:token\ttitle:token_seq\na\tTitle a\nb\tTitle b\n"


def test_fractions_of_seconds_are_written_exactly(tmp_path):
    times = [1_617_000_000.123, 1_617_000_000.124, 1_617_000_001.0]
    recipe.write(recipe.apply(raw([("u", f"i{t}", t) for t in times]), 1), tmp_path, "x")
    assert recbole_files.read({"inter": tmp_path / "x.inter"}).times.tolist() == times


@pytest.mark.parametrize("token", ["a\tb", 'say "a"', "a\rb", "NA", "null", "nan"])
def test_ids_that_files_cannot_hold_are_named(token, tmp_path):
    for rows, what in (([(token, "i", 1)], "user"), ([("u", token, 1)], "item")):
        with pytest.raises(DataError, match=f"The {what} id .* cannot stand in a tab-separated file"):
            recipe.write(recipe.apply(raw(rows), 1), tmp_path, "x")
