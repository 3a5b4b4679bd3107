"""What every reader returns, and the reading of lines that all of them share."""

from __future__ import annotations

import gzip
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar, cast

import numpy as np

from recbole_hatllm.errors import DataError

R = TypeVar("R")
T = TypeVar("T")

# User, item, time.
Interaction = tuple[str, str, float]

# Public dumps have a damaged line here and there; a larger share of them means a damaged or a wrong file.
BROKEN_SHARE = 0.001

# A file whose first lines are all broken is a wrong one, however many follow.
SURELY_WRONG = 1_000

# Larger times are in a smaller unit: as seconds they would lie beyond the year 5000.
LATEST_SECOND = 1e11
LATEST_NANOSECOND = 2.0**63
SMALLER_UNITS = ("milliseconds", "microseconds", "nanoseconds")

GZIP = b"\x1f\x8b"  # its first bytes

_BROKEN = (ValueError, LookupError, TypeError, SyntaxError, OverflowError, MemoryError, RecursionError)


@dataclass(frozen=True)
class RawData:
    """Interactions as a source has them, in the order of its file.

    Attributes:
        users: [N] int32, place of each interaction's user in `user_tokens`.
        items: [N] int32, place of its item in `item_tokens`.
        times: [N] seconds since 1970; int32 or int64, or float64 where the source has fractions of a second.
        user_tokens, item_tokens: ids as in the source, each once, in order of first occurrence.
        titles: item token -> title as in the source, of the items that occur and have one.
        notes: what the reader skipped or decided, one sentence each.
    """

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    user_tokens: list[str]
    item_tokens: list[str]
    titles: dict[str, str]
    notes: list[str]


class Builder:
    """Collects interactions one by one: 12 bytes each while times are whole seconds, and every token once."""

    def __init__(self) -> None:
        self.users, self.items = array("i"), array("i")
        self.times: array = array("i")
        self.user_codes: dict[str, int] = {}
        self.item_codes: dict[str, int] = {}

    def extend(self, interactions: Iterable[Interaction]) -> None:
        """Adds interactions behind those that are there."""
        users, items = self.user_codes, self.item_codes
        for user, item, time in interactions:
            self.users.append(users.setdefault(user, len(users)))
            self.items.append(items.setdefault(item, len(items)))
            try:
                self.times.append(time)
            except (TypeError, OverflowError):  # a fraction, or a smaller unit
                self.times = array("d", self.times)
                self.times.append(time)

    def build(self, source: str, titles: dict[str, str], notes: list[str]) -> RawData:
        """The table, with the titles of its items. Notes the unit of the times if they are no seconds.

        Raises:
            DataError: nothing was added; `source` is named.
        """
        if not self.users:
            raise DataError(f"{source} holds no interactions: check that it is the right file, and whole.")
        users, items, times = (
            np.frombuffer(column, column.typecode) for column in (self.users, self.items, self.times)
        )
        titles = {item: titles[item] for item in self.item_codes if titles.get(item, "").strip()}
        return RawData(users, items, _in_seconds(times, notes), [*self.user_codes], [*self.item_codes], titles, notes)


def _in_seconds(times: np.ndarray, notes: list[str]) -> np.ndarray:
    """Times whose unit their size tells in seconds; a unit other than seconds is noted."""
    if times.dtype == np.int32:
        return times
    usual, factor, unit = np.median(times), 1, "seconds"
    for smaller in SMALLER_UNITS:
        if usual / factor > LATEST_SECOND:
            factor, unit = factor * 1000, smaller
    if factor > 1:
        notes.append(f"the times are read as {unit} since 1970, as their size tells")
    times = times / factor
    whole = times.astype(np.int64)
    return whole if (whole == times).all() else times


def token(value: object) -> str:
    """An id as text: no spaces around it, and whole numbers without a decimal point.

    Raises:
        ValueError: it is empty or no id.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int):
        value = str(value)
    if not isinstance(value, str) or not (text := value.strip()):
        raise ValueError(f"{value!r} is no id")
    return text


def number(value: str | float) -> float:
    """A time in any unit; an int if it is whole.

    Raises:
        ValueError: it is no number, or none of this age of the world.
    """
    time = float(value)
    if not abs(time) < LATEST_NANOSECOND:
        raise ValueError(f"{value!r} is no time")
    return int(time) if time.is_integer() else time


# --- Files


def label(file: Path, member: str | None) -> str:
    """How messages name a file, or a member of a zip archive."""
    return f"{file}:{member}" if member else str(file)


@contextmanager
def open_bytes(file: Path, member: str | None = None) -> Iterator[IO[bytes]]:
    """A file, unpacked if it is gzip (browsers unpack some and keep the name), or a member of a zip archive.

    Raises:
        DataError: it is missing, cut short or damaged; also while it is read within the `with`.
    """
    again = "it did not arrive whole; delete it and fetch it again."
    try:
        with ExitStack() as stack:
            if member:
                stream = stack.enter_context(stack.enter_context(zipfile.ZipFile(file)).open(member))
            else:
                plain = stack.enter_context(file.open("rb"))
                packed = plain.peek(2).startswith(GZIP)
                stream = stack.enter_context(cast(IO[bytes], gzip.GzipFile(fileobj=plain))) if packed else plain
            yield stream
    except EOFError:
        raise DataError(f"{label(file, member)} ends in the middle of its compressed data: {again}") from None
    except (gzip.BadGzipFile, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{label(file, member)} is damaged ({error}): {again}") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror or error}): check its path.") from None


def members(file: Path) -> list[str]:
    """Names of the files in a zip archive.

    Raises:
        DataError: it is missing or no whole zip archive.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.namelist()
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror or error}): check its path.") from None
    except zipfile.BadZipFile as error:
        raise DataError(
            f"{file} is no whole zip archive ({error}): it did not arrive whole; delete it and fetch it again."
        ) from None


def read_lines(file: Path, member: str | None = None) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers from 1. Only line feeds end a line: titles may hold U+2028.

    Raises:
        DataError: as `open_bytes`.
    """
    with open_bytes(file, member) as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line := line.rstrip(b"\r\n"):
                yield number, line


def parse(source: str, records: Iterable[tuple[int, R]], how: Callable[[R], T], notes: list[str]) -> Iterator[T]:
    """`how(record)` for each numbered record; a few records that it cannot take are passed over and noted.

    Args:
        source: how messages name the file. notes: gets a sentence if records were passed over.

    Raises:
        DataError: more than BROKEN_SHARE of the records are broken; the message names the first.
    """
    count = broken = 0
    first = ""
    for number, record in records:
        count += 1
        try:
            result = how(record)
        except _BROKEN as error:
            broken += 1
            first = first or f"the first is line {number}: {_reason(error)}"
            if broken == count == SURELY_WRONG:
                break
        else:
            yield result
    if broken > BROKEN_SHARE * count:
        raise DataError(
            f"{source}: {broken:,} of {count:,} lines cannot be read ({first}), and at most {BROKEN_SHARE:.1%} may be "
            "broken: check that it is the right file, and fetch it again."
        )
    if broken:
        notes.append(f"{source}: {broken:,} of {count:,} lines could not be read and were skipped ({first})")


def parse_lines(
    file: Path, how: Callable[[str], T], notes: list[str], member: str | None = None, encoding: str = "utf-8"
) -> Iterator[T]:
    """`how(line)` for each line of a file or of a member of a zip archive; see `parse` and `read_lines`."""
    return parse(label(file, member), read_lines(file, member), lambda line: how(line.decode(encoding)), notes)


def _reason(error: BaseException) -> object:
    return f"no field {error}" if isinstance(error, KeyError) else getattr(error, "msg", None) or error
