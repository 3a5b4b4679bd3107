"""RecBole's atomic files, in a folder or zipped; columns in any order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from recbole_hatllm.data.sources.raw import (
    Builder,
    RawData,
    label,
    members,
    number,
    parse,
    read_lines,
    token,
)  # fmt: skip
from recbole_hatllm.errors import DataError

TITLE_FIELDS = ("title", "movie_title")


def read(paths: dict[str, Path], title_fields: Sequence[str] = TITLE_FIELDS) -> RawData:
    """`<name>.inter` with user_id, item_id, timestamp and `<name>.item` with item_id and one of `title_fields`.

    Args:
        paths: the roles "inter" and, where there are titles, "items"; or "archive".

    Raises:
        DataError: a file or a column is missing, or too many lines are broken.
    """
    inter, items = _find(paths)
    builder, notes = Builder(), list[str]()
    builder.extend(_rows(*inter, [("user_id",), ("item_id",), ("timestamp",)], notes))
    titles = dict(_rows(*items, [("item_id",), tuple(title_fields)], notes)) if items else {}
    return builder.build(label(*inter), titles, notes)


def _rows(file: Path, member: str | None, wanted: list[tuple[str, ...]], notes: list[str]) -> Iterator[tuple]:
    """The wanted columns of each line, each the first of its names that the header has."""
    lines = read_lines(file, member)
    header = next(lines, (1, b""))[1].decode("utf-8", "replace").split("\t")
    names = [column.partition(":")[0] for column in header]
    places = []
    for choice in wanted:
        place = next((names.index(name) for name in choice if name in names), None)
        if place is None:
            raise DataError(
                f"{label(file, member)}, line 1, has the columns {', '.join(names)} and no {' or '.join(choice)}: "
                "rename the column."
            )
        places.append(place)
    convert = {"timestamp": number, "user_id": token, "item_id": token}
    converters = [convert.get(choice[0], str) for choice in wanted]

    def row(line: bytes) -> tuple:
        cells = line.decode("utf-8").split("\t")
        if len(cells) != len(names):
            raise ValueError(f"{len(cells)} columns and not {len(names)}")
        return tuple(to(cells[place]) for to, place in zip(converters, places))

    return parse(label(file, member), lines, row, notes)


def _find(paths: dict[str, Path]) -> tuple[tuple[Path, str | None], tuple[Path, str | None] | None]:
    """(file, member of the archive) of the interactions and of the titles."""
    if "archive" not in paths:
        return (paths["inter"], None), (paths["items"], None) if "items" in paths else None
    file, found = paths["archive"], {}
    for suffix in (".inter", ".item"):
        names = [name for name in members(file) if name.endswith(suffix) and not name.startswith("__MACOSX")]
        if len(names) != 1:
            raise DataError(f"{file} holds {len(names)} files *{suffix} and not one: unpack it and name the files.")
        found[suffix] = (file, names[0])
    return found[".inter"], found[".item"]
