"""MovieLens as GroupLens publishes it: ml-1m.zip and ml-100k.zip, or the files inside."""

from __future__ import annotations

from pathlib import Path

from recbole_hatllm.data.sources.raw import Builder, Interaction, RawData, members, number, parse_lines, token
from recbole_hatllm.errors import DataError

# File of the ratings -> its separator, the file of the titles and that one's separator.
LAYOUTS = {"ratings.dat": ("::", "movies.dat", "::"), "u.data": ("\t", "u.item", "|")}


def read(paths: dict[str, Path]) -> RawData:
    """Titles keep their year: "Heat (1995)".

    Raises:
        DataError: a file is missing or broken, or the archive holds no MovieLens of these two.
    """
    ratings, movies, layout = _find(paths)
    between, _, between_titles = LAYOUTS[layout]
    notes: list[str] = []

    def interaction(line: str) -> Interaction:
        user, item, _, time = line.split(between)
        return token(user), token(item), number(time)

    def movie(line: str) -> tuple[str, str]:
        item, title, _ = line.split(between_titles, 2)
        return token(item), title

    builder = Builder()
    builder.extend(parse_lines(ratings[0], interaction, notes, ratings[1], "latin-1"))
    titles = dict(parse_lines(movies[0], movie, notes, movies[1], "latin-1"))
    return builder.build(str(ratings[0]), titles, notes)


def _find(paths: dict[str, Path]) -> tuple[tuple[Path, str | None], tuple[Path, str | None], str]:
    """(file, member of the archive) of the ratings and of the titles, and the name of the layout."""
    if "archive" not in paths:
        return (paths["inter"], None), (paths["items"], None), paths["inter"].name
    file = paths["archive"]
    inside = {name.rsplit("/", 1)[-1]: name for name in members(file)}
    for ratings, (_, movies, _) in LAYOUTS.items():
        if ratings in inside and movies in inside:
            return (file, inside[ratings]), (file, inside[movies]), ratings
    raise DataError(
        f"{file} holds neither ratings.dat and movies.dat nor u.data and u.item: it is no MovieLens 1M or 100K."
    )
