"""Any CSV, TSV, JSON-lines or Parquet table of the user's."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import date, datetime, timezone
from itertools import chain, islice
from pathlib import Path
from typing import Any

from recbole_hatllm.data.sources.raw import (
    Builder,
    Interaction,
    RawData,
    T,
    number,
    open_bytes,
    parse,
    read_lines,
    token,
)
from recbole_hatllm.errors import ConfigError, DataError

ROLES = ("user", "item", "time", "title")


def read_table(inter: Path, items: Path | None, columns: dict[str, str]) -> RawData:
    """Interactions and titles from tables whose columns may have any name.

    Times are numbers since 1970, their unit told by their size, or ISO dates; those without a zone are UTC.

    Args:
        inter: interactions. items: titles; None where the title is a column of `inter`.
        columns: role (user, item, time, title) -> name of the column; the item has one name in both tables.

    Raises:
        ConfigError: a role is missing or unknown. DataError: a file is missing or broken, or lacks a column.
    """
    if wrong := {*ROLES} ^ columns.keys():
        raise ConfigError(
            f"--columns has {', '.join(sorted(wrong))} missing or unknown: name each of the four columns, as in "
            "--columns=user=uid,item=sku,time=ts,title=name."
        )
    user, item, time, title = (columns[role] for role in ROLES)
    notes: list[str] = []
    titles: dict[str, str] = {}
    builder = Builder()
    wanted = [user, item, time] if items else [user, item, time, title]

    def interaction(row: dict) -> Interaction:
        what = token(row[item])
        if not items:
            _keep(titles, what, row.get(title))
        return token(row[user]), what, _time(row[time])

    builder.extend(_rows(inter, wanted, interaction, notes))
    if items:
        for what, name in _rows(items, [item, title], lambda row: (token(row[item]), row.get(title)), notes):
            _keep(titles, what, name)
    return builder.build(str(inter), titles, notes)


def _keep(titles: dict[str, str], item: str, title: object) -> None:
    """An item's first title counts. A number is one too: there is a film "300"."""
    if item not in titles and title is not None and title == title and str(title).strip():
        titles[item] = str(title)


def _time(value: object) -> float:
    if isinstance(value, str):
        try:
            return number(value)
        except ValueError:
            value = datetime.fromisoformat(value.strip().replace("Z", "+00:00"))
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=timezone.utc)).timestamp()
    return number(value)  # type: ignore[arg-type]


# --- Rows of each kind of file

# Its columns, its numbered records, and how a record becomes a dict.
Table = tuple[list[str], Iterable[tuple[int, Any]], Callable[[Any], dict]]


def _rows(file: Path, needed: list[str], how: Callable[[dict], T], notes: list[str]) -> Iterator[T]:
    """`how(row)` for each row, a dict by column; rows that it cannot take are few or an error.

    Raises:
        DataError: a needed column is absent; the message lists those that are there.
    """
    name = file.name.removesuffix(".gz")
    reader: Callable[[Path, list[str]], AbstractContextManager[Table]]
    if name.endswith(".parquet"):
        reader = _parquet
    elif name.endswith((".jsonl", ".json", ".ndjson")):
        reader = _json_lines
    else:
        reader = _delimited
    with reader(file, needed) as (columns, records, row):
        if missing := [column for column in needed if column not in columns]:
            raise DataError(
                f"{file} has the columns {', '.join(columns)} and no {' and no '.join(missing)}: "
                "name the columns in --columns=user=...,item=...,time=...,title=..."
            )
        yield from parse(str(file), records, lambda record: how(row(record)), notes)


@contextmanager
def _delimited(file: Path, _: list[str]) -> Iterator[Table]:
    with open_bytes(file) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        try:
            first = text.readline()
            delimiter = max(",\t;|", key=first.count)
            reader = csv.reader(chain([first], text), delimiter=delimiter, strict=True)
            header = next(_cells(reader), (1, [""]))[1]
            if isinstance(header, csv.Error):
                raise DataError(f"{file}, line 1, is no header ({header}): it must name the columns.")

            def row(cells: list[str] | csv.Error) -> dict:
                if isinstance(cells, csv.Error):
                    raise ValueError(str(cells))
                if len(cells) != len(header):
                    raise ValueError(f"{len(cells)} columns and not {len(header)}")
                return dict(zip(header, cells))

            yield header, _cells(reader), row
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is no UTF-8 text ({error}): save it as UTF-8.") from None


def _cells(reader) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """Line numbers and cells. Where a row is broken, its error stands for each line that it swallowed."""
    while True:
        last = reader.line_num
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield from ((number, error) for number in range(last + 1, reader.line_num + 1))
        else:
            if cells:
                yield reader.line_num, cells


@contextmanager
def _json_lines(file: Path, _: list[str]) -> Iterator[Table]:
    columns: dict[str, None] = {}
    for _number, line in islice(read_lines(file), 100):
        try:
            columns.update(dict.fromkeys(json.loads(line)))
        except (ValueError, TypeError):  # counted when it is read again
            continue
    yield [*columns], read_lines(file), json.loads


@contextmanager
def _parquet(file: Path, needed: list[str]) -> Iterator[Table]:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(f"Reading {file} takes pyarrow: pip install pyarrow, or save the table as CSV.") from None
    try:
        with ParquetFile(file) as table:
            columns = table.schema_arrow.names
            chosen = [name for name in columns if name in needed]
            rows = chain.from_iterable(batch.to_pylist() for batch in table.iter_batches(columns=chosen))
            yield columns, enumerate(rows, 1), lambda row: row
    except (ArrowInvalid, OSError) as error:
        raise DataError(f"{file} cannot be read as Parquet ({error}): check its path, or save it again.") from None
