"""Every raw format gives the same table, with the traps of real files in it; broken files end in one sentence."""

from __future__ import annotations

import ast
import builtins
import gzip
import io
import json
import os
import pickle
import sys
import time as clock
import zipfile
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from recbole_hatllm.data.sources import amazon, raw, seqrec
from recbole_hatllm.data.sources.readers import READERS, recognise
from recbole_hatllm.data.sources.tables import read_table
from recbole_hatllm.errors import ConfigError, DataError

DAY = 86_400

# Days as times, with ties; a pair twice on two days and once more on the same day; not in order of time.
EVENTS = [
    (user, item, 1_400_000_000 // DAY * DAY + DAY * day)
    for user, item, day in [
        (0, 3, 5),
        (0, 1, 5),
        (0, 2, 5),
        (1, 1, 2),
        (1, 1, 3),
        (1, 1, 3),
        (0, 4, 1),
        (2, 5, 9),
        (2, 0, 9),
    ]
]
TITLES = [
    "Tom &amp; Jerry&#39;s &quot;Best&quot;",
    'Screen 15" wide',
    "Twin",
    "Twin",
    "word " * 137,
    "One\u2028line, Amélie",
]
LATIN = [title.replace("\u2028", " ") for title in TITLES]


def amazon_ids(user, item):
    return f"A{user:013}", f"B{item:09}"


def number_ids(user, item):
    return str(100 + user), str(100 + item)


def expected(ids, titles=TITLES):
    """(rows in file order, titles) as a reader must give them."""
    rows = [(*ids(user, item), time) for user, item, time in EVENTS]
    return rows, {ids(0, item)[1]: title for item, title in enumerate(titles)}


def read(table: raw.RawData):
    assert table.users.dtype == table.items.dtype == np.int32 and table.times.dtype in (np.int32, np.int64, np.float64)
    users, items = ([tokens[code] for code in codes] for tokens, codes in (
        (table.user_tokens, table.users), (table.item_tokens, table.items),
    ))  # fmt: skip
    return list(zip(users, items, table.times.tolist())), table.titles


def save(file: Path, lines, newline="\n", encoding="utf-8") -> Path:
    """A text file, packed if its name says so."""
    data = "".join(f"{line}{newline}" for line in lines).encode(encoding)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


# --- One writer for each format: the files it makes are EVENTS and TITLES, and items that nobody took


def reviews(folder, name, **changes):
    lines = []
    for user, item, time in EVENTS:
        who, what = amazon_ids(user, item)
        text = 'He said {"asin": "B999999999"}\u2028twice'
        record = {"reviewerID": who, "asin": what, "reviewText": text, "overall": 5.0, "unixReviewTime": time}
        lines.append(json.dumps({**record, **changes}, ensure_ascii=False))
    return save(folder / name, lines)


def metas():
    records = [{"asin": amazon_ids(0, item)[1], "title": title} for item, title in enumerate(TITLES)]
    return [*records, {"asin": "B999999999", "title": "Nobody's"}, {**records[2], "title": "A second title"}]


def amazon2014(folder):
    reviews(folder, "reviews_Beauty_5.json.gz")
    save(folder / "meta_Beauty.json.gz", [repr({**record, "price": None}) for record in metas()])


def amazon2018(folder):
    reviews(folder, "Video_Games_5.json.gz")
    save(folder / "meta_Video_Games.json.gz", [json.dumps(record) for record in metas()])


def amazon2023(folder):
    lines = []
    for user, item, time in EVENTS:
        who, what = amazon_ids(user, item)
        record = {"rating": 5.0, "asin": "B000VARIANT", "parent_asin": what, "user_id": who, "timestamp": 1000 * time}
        lines.append(json.dumps(record))
    save(folder / "All_Beauty.jsonl", lines)
    metas_2023 = [{"parent_asin": record["asin"], "title": record["title"], "details": {}} for record in metas()]
    save(folder / "meta_All_Beauty.jsonl.gz", [json.dumps(record) for record in metas_2023])


def ratings(folder, swap=False, python=True):
    rows = [(*amazon_ids(user, item)[:: -1 if swap else 1], 5.0, time) for user, item, time in EVENTS]
    save(folder / "ratings_Beauty.csv", [",".join(map(str, row)) for row in rows], newline="\r\n")
    save(folder / "meta_Beauty.json.gz", [(repr if python else json.dumps)(record) for record in metas()])


def recbole(folder):
    """Columns in an order of their own, a byte order mark, Windows line ends; names as in RecBole's zips."""
    rows = ["\ufeffrating:float\titem_id:token\ttimestamp:float\tuser_id:token"]
    for user, item, time in EVENTS:
        who, what = amazon_ids(user, item)
        rows.append(f"5.0\t{what}\t{float(time)}\t{who}")
    save(folder / "Amazon_Beauty.inter", rows, newline="\r\n")
    rows = ["brand:token\ttitle:token\titem_id:token", *(f"\t{m['title']}\t{m['asin']}" for m in metas()[:-1])]
    save(folder / "Amazon_Beauty.item", rows, newline="\r\n")


def zipped(folder, files, name):
    """Packs what `files(folder)` writes into one zip, in a folder of its own there."""
    inside = folder / "unpacked"
    files(inside)
    with zipfile.ZipFile(folder / name, "w") as archive:
        for file in sorted(inside.iterdir()):
            archive.write(file, f"inner/{file.name}")
            file.unlink()
    inside.rmdir()


def sequences(folder):
    frame = pd.DataFrame(EVENTS, columns=["UserID", "ItemID", "Timestamp"])
    frame[["UserID", "ItemID"]] += 100
    folder.mkdir(parents=True, exist_ok=True)
    frame.groupby("UserID").agg({"ItemID": list, "Timestamp": list}).reset_index().to_pickle(folder / "user2item.pkl")
    titles = pd.DataFrame({"ItemID": range(100, 100 + len(TITLES)), "Title": TITLES})
    titles.to_pickle(folder / "item2title.pkl")


def movielens_1m(folder):
    ids = [(*number_ids(user, item), time) for user, item, time in EVENTS]
    save(folder / "ratings.dat", [f"{user}::{item}::5::{time}" for user, item, time in ids])
    rows = [f"{100 + item}::{title}::Drama|War" for item, title in enumerate(LATIN)]
    save(folder / "movies.dat", rows, encoding="latin-1")


def movielens_100k(folder):
    ids = [(*number_ids(user, item), time) for user, item, time in EVENTS]
    save(folder / "u.data", [f"{user}\t{item}\t5\t{time}" for user, item, time in ids])
    rows = [f"{100 + item}|{title}|01-Jan-1995||http://x/?{item}|0|1" for item, title in enumerate(LATIN)]
    save(folder / "u.item", rows, encoding="latin-1")


SEQUENCES = sorted(EVENTS, key=lambda event: event[0])  # the benchmark's order: user by user


@pytest.mark.parametrize(
    "name, files, ids, titles",
    [
        ("amazon2014", amazon2014, amazon_ids, TITLES),
        ("amazon2018", amazon2018, amazon_ids, TITLES),
        ("amazon2023", amazon2023, amazon_ids, TITLES),
        ("amazon-ratings", ratings, amazon_ids, TITLES),
        ("amazon-ratings", lambda folder: ratings(folder, swap=True, python=False), amazon_ids, TITLES),
        ("recbole", recbole, amazon_ids, TITLES),
        ("recbole", lambda folder: zipped(folder, recbole, "Amazon_Beauty.zip"), amazon_ids, TITLES),
        ("seqrec", sequences, number_ids, TITLES),
        ("seqrec", lambda folder: zipped(folder, sequences, "proc.zip"), number_ids, TITLES),
        ("movielens", movielens_1m, number_ids, LATIN),
        ("movielens", lambda folder: zipped(folder, movielens_1m, "ml-1m.zip"), number_ids, LATIN),
        ("movielens", movielens_100k, number_ids, LATIN),
        ("movielens", lambda folder: zipped(folder, movielens_100k, "ml-100k.zip"), number_ids, LATIN),
    ],
)
def test_every_format_is_told_and_read(name, files, ids, titles, tmp_path):
    files(tmp_path)
    save(tmp_path / "README.txt", ["Some words, and no data."])
    format, paths = recognise([tmp_path])
    assert format == name
    table = READERS[format](paths)
    rows, named = expected(ids, titles)
    if name == "seqrec":
        rows = [(*ids(user, item), time) for user, item, time in SEQUENCES]
    assert read(table) == (rows, named)
    assert table.times.dtype.kind == "i"
    assert recognise([*paths.values()][::-1]) == (format, paths)  # files in any order, too


def test_a_folder_in_the_folder_is_looked_into(tmp_path):
    movielens_100k(tmp_path / "ml-100k")
    assert recognise([tmp_path])[1]["items"] == tmp_path / "ml-100k" / "u.item"


def test_milliseconds_are_kept(tmp_path):
    amazon2023(tmp_path)
    file = tmp_path / "All_Beauty.jsonl"
    file.write_text(file.read_text().replace("000}", "123}"))
    table = READERS["amazon2023"](recognise([tmp_path])[1])
    assert table.times.dtype == np.float64 and table.times[0] == EVENTS[0][2] + 0.123


def test_order_of_the_columns_of_ratings_is_said_or_asked_for(tmp_path):
    ratings(tmp_path, swap=True)
    paths = {"inter": tmp_path / "ratings_Beauty.csv", "items": tmp_path / "meta_Beauty.json.gz"}
    assert any("first column holds the items" in note for note in READERS["amazon-ratings"](paths).notes)
    save(paths["inter"], ["u,i,5.0,1400000000"])
    with pytest.raises(DataError, match=r"ratings_Beauty\.csv: neither of the first two columns"):
        READERS["amazon-ratings"](paths)


def test_scripts_are_no_titles(tmp_path):
    amazon2018(tmp_path)
    scripts = [("B000000001", "var aPageStart = 1"), ("B000000002", "x\nvar a = (new Date()).getTime();")]
    lines = [json.dumps({"asin": asin, "title": title}) for asin, title in scripts]
    save(tmp_path / "meta_Video_Games.json.gz", [*lines, *(json.dumps(record) for record in metas()[:2])])
    table = READERS["amazon2018"](recognise([tmp_path])[1])
    assert table.titles == {"B000000000": TITLES[0], "B000000001": TITLES[1]}  # another line has the one's title
    assert [note for note in table.notes if "script" in note] == [
        "meta_Video_Games.json.gz: 2 titles are pieces of a web page's script and count as none"
    ]


def test_only_metas_of_taken_items_are_parsed(tmp_path, monkeypatch):
    amazon2014(tmp_path)
    parsed = []
    monkeypatch.setattr(amazon, "_literal", lambda line: parsed.append(line) or ast.literal_eval(line))

    paths = {"inter": tmp_path / "reviews_Beauty_5.json.gz", "items": tmp_path / "meta_Beauty.json.gz"}
    amazon.read_2014(paths)
    assert len(parsed) == len(metas()) - 1 and not any("B999999999" in line for line in parsed)


# --- Code in data never runs


def test_python_in_a_meta_file_never_runs(tmp_path):
    trace = tmp_path / "trace"
    amazon2014(tmp_path / "data")
    attack = f"{{'asin': 'B000000001', 'title': __import__('pathlib').Path({str(trace)!r}).touch()}}"
    good = [repr(record) for record in metas()]
    save(tmp_path / "data" / "meta_Beauty.json.gz", [good[0], attack, *good])
    with pytest.raises(
        DataError, match=r"meta_Beauty\.json\.gz: 1 of 10 lines cannot be read .*line 2: malformed node"
    ):
        READERS["amazon2014"](recognise([tmp_path / "data"])[1])
    assert not trace.exists()


class Attack:
    def __init__(self, what, *arguments):
        self.what, self.arguments = what, arguments

    def __reduce__(self):
        return self.what, self.arguments


@pytest.mark.parametrize(
    "what, arguments, name",
    [
        (os.system, ("touch trace",), "posix.system"),
        (builtins.eval, ("open('trace', 'w')",), "builtins.eval"),
        (builtins.getattr, ("", "join"), "builtins.getattr"),
        (pd.read_pickle, ("other.pkl",), "pandas.io.pickle.read_pickle"),
        (np.load, ("other.npy",), "numpy.load"),
    ],
)
def test_a_pickle_that_is_more_than_a_table_is_refused(what, arguments, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sequences(tmp_path)
    frame = pd.DataFrame({"UserID": [100], "ItemID": [Attack(what, *arguments)], "Timestamp": [[1]]})
    with (tmp_path / "user2item.pkl").open("wb") as file:
        pickle.dump(frame, file)
    with pytest.raises(DataError, match=rf"user2item\.pkl was not read: the pickle asks for {name}"):
        READERS["seqrec"](recognise([tmp_path])[1])
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", ["DataFrame.eval", "DataFrame.__init__.__globals__"])
def test_a_pickle_cannot_reach_what_an_admitted_class_holds(name):
    with pytest.raises(DataError, match=r"asks for pandas.core.frame.DataFrame"):
        seqrec._Tables(io.BytesIO()).find_class("pandas.core.frame", name)


def test_damaged_and_foreign_pickles(tmp_path):
    sequences(tmp_path)
    paths, good = recognise([tmp_path])[1], (tmp_path / "user2item.pkl").read_bytes()
    for bad, match in (
        (good[: len(good) // 2], "is no pickled table"),
        (pickle.dumps({"UserID": 1}), "has dict where UserID, ItemID, Timestamp should be"),
        (pickle.dumps(pd.DataFrame({"User": [1]})), "has User where UserID"),
        (pickle.dumps(pd.DataFrame({"UserID": [1], "ItemID": [[1, 2]], "Timestamp": [[1]]})), "2 items and 1 times"),
        (pickle.dumps(pd.DataFrame({"UserID": [1], "ItemID": [2], "Timestamp": [3]})), "holds no sequences"),
    ):
        (tmp_path / "user2item.pkl").write_bytes(bad)
        with pytest.raises(DataError, match=match):
            READERS["seqrec"](paths)


# --- Broken files


def test_cut_gzip_is_named(tmp_path):
    amazon2014(tmp_path)
    file = reviews(tmp_path, "reviews_Beauty_5.json.gz", reviewText=os.urandom(4000).hex())
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"reviews_Beauty_5\.json\.gz ends in the middle of its compressed data"):
        READERS["amazon2014"](recognise([tmp_path])[1])


def test_damaged_gzip_and_zip_are_named(tmp_path):
    amazon2014(tmp_path)
    file = tmp_path / "meta_Beauty.json.gz"
    paths = recognise([tmp_path])[1]
    data = bytearray(file.read_bytes())
    data[-6] ^= 255  # its checksum
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"meta_Beauty\.json\.gz is damaged .*fetch it again"):
        READERS["amazon2014"](paths)
    archive = tmp_path / "proc.zip"
    archive.write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(DataError, match=r"proc\.zip is no whole zip archive"):
        recognise([archive])


def test_a_gzip_that_a_browser_unpacked_is_read(tmp_path):
    amazon2014(tmp_path)
    file = tmp_path / "meta_Beauty.json.gz"
    file.write_bytes(gzip.decompress(file.read_bytes()))
    assert read(READERS["amazon2014"](recognise([tmp_path])[1])) == expected(amazon_ids)


@pytest.mark.parametrize("broken, passes", [(0, True), (3, True), (4, False)])
def test_a_thousandth_of_the_lines_may_be_broken(broken, passes, tmp_path):
    amazon2018(tmp_path)
    file = tmp_path / "Video_Games_5.json.gz"
    lines = gzip.decompress(file.read_bytes()).decode().split("\n")[:-1]
    lines = (lines * 400)[: 3000 - broken]
    lines[1000:1000] = ['{"reviewerID": "A1", "asin"', '{"reviewerID": "A1"}', '["A1"]', '{"reviewerID": ""}'][:broken]
    save(file, lines)
    paths = recognise([tmp_path])[1]
    if passes:
        table = READERS["amazon2018"](paths)
        assert len(table.users) == 3000 - broken
        said = "3 of 3,000 lines could not be read and were skipped (the first is line 1001: Expecting ':' delimiter)"
        assert [note for note in table.notes if "skipped" in note] == ([f"{file}: {said}"] if broken else [])
    else:
        with pytest.raises(
            DataError, match=r"4 of 3,000 lines cannot be read \(the first is line 1001: .*at most 0\.1%"
        ):
            READERS["amazon2018"](paths)


def test_a_wrong_file_is_left_soon(tmp_path):
    amazon2018(tmp_path)
    wrong = save(tmp_path / "wrong.json", ['{"user": 1}'] * 5000)
    with pytest.raises(
        DataError, match=r"1,000 of 1,000 lines cannot be read \(the first is line 1: no field 'reviewerID'"
    ):
        READERS["amazon2018"]({"inter": wrong, "items": tmp_path / "meta_Video_Games.json.gz"})


@pytest.mark.parametrize("when", ["soon", None, "nan", float("inf"), 1 << 70])
def test_times_that_are_none_are_broken_lines(when, tmp_path):
    amazon2018(tmp_path)
    reviews(tmp_path, "Video_Games_5.json.gz", unixReviewTime=when)
    with pytest.raises(DataError, match="9 of 9 lines cannot be read"):
        READERS["amazon2018"](recognise([tmp_path])[1])


def test_empty_files_and_missing_columns(tmp_path):
    recbole(tmp_path)
    inter, item = tmp_path / "Amazon_Beauty.inter", tmp_path / "Amazon_Beauty.item"
    paths = {"inter": inter, "items": item}
    save(inter, ["user_id:token\titem_id:token\ttimestamp:float"])
    with pytest.raises(DataError, match=r"Amazon_Beauty\.inter holds no interactions"):
        READERS["recbole"](paths)
    save(inter, ["user_id:token\titem_id:token\trating:float"])
    with pytest.raises(DataError, match=r"\.inter, line 1, has the columns user_id, item_id, rating and no timestamp"):
        READERS["recbole"](paths)
    recbole(tmp_path)
    save(item, ["item_id:token\tbrand:token"])
    with pytest.raises(DataError, match=r"\.item, line 1, has the columns item_id, brand and no title or movie_title"):
        READERS["recbole"](paths)
    with pytest.raises(DataError, match=r"gone\.inter cannot be read \(No such file"):
        READERS["recbole"]({"inter": tmp_path / "gone.inter", "items": item})


# --- What somebody hands over


def test_missing_titles_nothing_known_and_two_candidates(tmp_path):
    with pytest.raises(DataError, match=r"nowhere does not exist"):
        recognise([tmp_path / "nowhere"])
    save(tmp_path / "notes.txt", ["hello"])
    (tmp_path / "photo.jpg").write_bytes(os.urandom(5000))
    with pytest.raises(DataError, match=r"holds no interactions of a known format .*--inter=FILE"):
        recognise([tmp_path])
    for files, missing in (
        (amazon2014, "meta_<category>.json.gz"),
        (amazon2023, "meta_<category>.jsonl.gz"),
        (recbole, ".item"),
        (movielens_1m, "movies.dat"),
    ):
        folder = tmp_path / files.__name__
        files(folder)
        for file in folder.glob("*"):
            if file.name.startswith(("meta", "movies")) or file.suffix == ".item":
                file.unlink()
        with pytest.raises(DataError, match=f"came without its titles: hand over {missing} too"):
            recognise([folder])
    amazon2018(tmp_path / "two")
    reviews(tmp_path / "two", "Books_5.json.gz")
    with pytest.raises(DataError, match=r"Books_5\.json\.gz and .*Video_Games_5\.json\.gz both hold interactions"):
        recognise([tmp_path / "two"])
    amazon2018(tmp_path / "metas")
    save(tmp_path / "metas" / "meta_Beauty.json.gz", [repr(record) for record in metas()])
    with pytest.raises(DataError, match="both hold titles"):
        recognise([tmp_path / "metas"])


def test_an_archive_of_something_else_is_unknown(tmp_path):
    zipped(tmp_path, lambda folder: save(folder / "notes.inter", ["hello"]), "some.zip")
    with pytest.raises(DataError, match="holds no interactions of a known format"):
        recognise([tmp_path])


# --- Tables of the user's

COLUMNS = {"user": "uid", "item": "sku", "time": "ts", "title": "name"}


def frames(times=lambda seconds: seconds):
    rows, titles = expected(amazon_ids)
    inter = pd.DataFrame(rows, columns=["uid", "sku", "ts"])
    inter["ts"] = [times(seconds) for seconds in inter["ts"]]
    inter.insert(0, "extra", 'a "quoted", word')
    return inter, pd.DataFrame({"name": titles.values(), "more": 1, "sku": titles.keys()})


def write_frame(frame, file):
    if file.suffix == ".parquet":
        frame.to_parquet(file)
    elif ".json" in file.name:
        frame.to_json(file, orient="records", lines=True, force_ascii=False)
    else:
        separator = "\t" if ".tsv" in file.name else ";" if "semicolon" in file.name else ","
        frame.to_csv(file, index=False, sep=separator, encoding="utf-8-sig")
    return file


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "tsv", "semicolon.csv", "jsonl", "json.gz", "parquet"])
@pytest.mark.parametrize("one_table", [False, True])
def test_tables(ending, one_table, tmp_path):
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    inter, items = frames()
    if one_table:
        table = read_table(
            write_frame(inter.merge(items, on="sku", how="left"), tmp_path / f"all.{ending}"), None, COLUMNS
        )
    else:
        files = write_frame(inter, tmp_path / f"inter.{ending}"), write_frame(items, tmp_path / f"items.{ending}")
        table = read_table(*files, COLUMNS)
    rows, titles = read(table)
    assert rows == expected(amazon_ids)[0] and titles == expected(amazon_ids)[1] and not table.notes


@pytest.fixture
def elsewhere(monkeypatch):
    """Dates must not depend on the machine's time zone."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "EST+5")
        clock.tzset()
        yield
    clock.tzset()


@pytest.mark.parametrize(
    "times, unit",
    [
        (lambda s: 1000 * s, "milliseconds"),
        (lambda s: 10**9 * s, "nanoseconds"),
        (lambda s: datetime.fromtimestamp(s, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"), None),
        (lambda s: datetime.fromtimestamp(s, timezone.utc).strftime("%Y-%m-%d"), None),
        (lambda s: str(datetime.fromtimestamp(s, timezone.utc).replace(tzinfo=None)), None),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_times_of_tables(times, unit, ending, tmp_path, elsewhere):
    inter, items = frames(times)
    table = read_table(
        write_frame(inter, tmp_path / f"a.{ending}"), write_frame(items, tmp_path / f"b.{ending}"), COLUMNS
    )
    assert read(table)[0] == expected(amazon_ids)[0] and table.times.dtype.kind == "i"
    assert table.notes == ([f"the times are read as {unit} since 1970, as their size tells"] if unit else [])


def test_dates_in_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    inter, items = frames(lambda s: pd.Timestamp(s, unit="s"))
    table = read_table(write_frame(inter, tmp_path / "a.parquet"), write_frame(items, tmp_path / "b.parquet"), COLUMNS)
    assert read(table)[0] == expected(amazon_ids)[0]


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"a\.parquet takes pyarrow: pip install pyarrow"):
        read_table(tmp_path / "a.parquet", None, COLUMNS)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_missing_columns_are_listed(ending, tmp_path):
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    inter, items = frames()
    files = write_frame(inter, tmp_path / f"a.{ending}"), write_frame(items, tmp_path / f"b.{ending}")
    with pytest.raises(
        DataError, match=rf"a\.{ending} has the columns extra, uid, sku, ts and no when: name .*--columns"
    ):
        read_table(*files, {**COLUMNS, "time": "when"})
    with pytest.raises(DataError, match=rf"b\.{ending} has the columns name, more, sku and no label"):
        read_table(*files, {**COLUMNS, "title": "label"})
    with pytest.raises(DataError, match=rf"a\.{ending} has the columns extra, uid, sku, ts and no name"):
        read_table(files[0], None, COLUMNS)


def test_roles_of_columns_are_checked(tmp_path):
    with pytest.raises(ConfigError, match=r"--columns has rating, title missing or unknown"):
        read_table(tmp_path / "a.csv", None, {"user": "u", "item": "i", "time": "t", "rating": "r"})


@pytest.mark.parametrize(
    "lines, match",
    [
        (["uid,sku,ts,name", "u,i,yesterday,Heat"], r"a\.csv: 1 of 1 lines .*line 2: Invalid isoformat"),
        (["uid,sku,ts,name", "u,i,5"], r"line 2: 3 columns and not 4"),
        (["uid,sku,ts,name", ",i,5,Heat"], r"line 2: '' is no id"),
        (["uid,sku,ts,name", 'u,i,5,"Heat" in town'], r"line 2: .*expected after"),
        (["uid,sku,ts,name", 'u,i,5,"Heat', *["u,i,5,Heat"] * 9], r"10 of 10 lines .*line 2: unexpected end of data"),
        (["uid,sku,ts,name"], r"a\.csv holds no interactions"),
        ([], r"a\.csv has the columns  and no uid"),
    ],
)
def test_broken_tables(lines, match, tmp_path):
    with pytest.raises(DataError, match=match) as error:
        read_table(save(tmp_path / "a.csv", lines), None, COLUMNS)
    assert "\n" not in str(error.value)


def test_tables_in_another_encoding_and_absent_ones(tmp_path):
    file = save(tmp_path / "a.csv", ["uid,sku,ts,name", "u,i,5,Amélie"], encoding="latin-1")
    with pytest.raises(DataError, match=r"a\.csv is no UTF-8 text"):
        read_table(file, None, COLUMNS)
    for name in ("gone.csv", "gone.jsonl", "gone.parquet"):
        with pytest.raises(DataError, match=rf"{name} cannot be read"):
            read_table(tmp_path / name, None, COLUMNS)
