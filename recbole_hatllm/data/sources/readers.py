"""Which reader reads which format, and what the files are that somebody hands over."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from recbole_hatllm.data.sources import amazon, movielens, recbole_files, seqrec
from recbole_hatllm.data.sources.raw import RawData, members, open_bytes
from recbole_hatllm.errors import DataError

READERS: dict[str, Callable[[dict[str, Path]], RawData]] = {
    "amazon2014": amazon.read_2014,
    "amazon2018": amazon.read_2018,
    "amazon2023": amazon.read_2023,
    "amazon-ratings": amazon.read_ratings,
    "recbole": recbole_files.read,
    "seqrec": seqrec.read,
    "movielens": movielens.read,
}

# Format, kind of the file with the interactions, kind of the one with the titles. A kind is a file's name or suffix where
# those are always the same; reviews come under many names and are told by their first line.
_PAIRS = (
    ("recbole", ".inter", ".item"),
    ("seqrec", "user2item.pkl", "item2title.pkl"),
    ("movielens", "ratings.dat", "movies.dat"),
    ("movielens", "u.data", "u.item"),
    ("amazon2014", "reviews", "meta in Python's notation"),
    ("amazon2018", "reviews", "meta in JSON"),
    ("amazon2023", "reviews of 2023", "meta of 2023"),
    ("amazon-ratings", "ratings", "meta in Python's notation"),
    ("amazon-ratings", "ratings", "meta in JSON"),
)
_BY_NAME = {kind for _, *kinds in _PAIRS for kind in kinds if "." in kind}
_INTER = {inter: format for format, inter, _ in _PAIRS}
_META = {"reviews": "meta_<category>.json.gz", "ratings": "meta_<category>.json.gz"}
_META["reviews of 2023"] = "meta_<category>.jsonl.gz"

FIRST_LINE = 1 << 22  # bytes of it that are looked at


def recognise(paths: list[Path]) -> tuple[str, dict[str, Path]]:
    """The format of the files, a key of READERS, and the file of each role: "inter" and "items", or "archive".

    Args:
        paths: one folder, or files.

    Raises:
        DataError: nothing known is there, two files claim one role, or the one with the titles is missing.
    """
    found: dict[str, list[Path]] = defaultdict(list)
    where = ", ".join(map(str, paths))
    for file in (file for path in paths for file in _files(path)):
        if kind := _kind(file):
            found[kind].append(file)
    inter = [(kind, file) for kind, files in found.items() if kind in _INTER or kind in READERS for file in files]
    if not inter:
        raise DataError(
            f"{where} holds no interactions of a known format ({', '.join(READERS)}): check the path; a table of your "
            "own is read with --inter=FILE --items=FILE --columns=..."
        )
    kind, file = _only(inter, "interactions")
    if kind in READERS:
        return kind, {"archive": file}
    items = [(format, meta) for format, name, other in _PAIRS if name == kind for meta in found[other]]
    if not items:
        missing = _META.get(kind) or next(meta for _, name, meta in _PAIRS if name == kind)
        raise DataError(f"{file} came without its titles: hand over {missing} too, in the same folder or by name.")
    format, meta = _only(items, "titles")
    return format, {"inter": file, "items": meta}


def _files(path: Path) -> list[Path]:
    """The file itself, or the files of a folder; if it has none, those of its folders: archives often unpack into one."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path} does not exist: check its path.")
    for pattern in ("*", "*/*"):
        if files := sorted(file for file in path.glob(pattern) if file.is_file() and not file.name.startswith(".")):
            return files
    return []


def _only(candidates: list[tuple[str, Path]], what: str) -> tuple[str, Path]:
    if len(candidates) > 1:
        names = " and ".join(str(file) for _, file in candidates[:2])
        raise DataError(f"{names} both hold {what}: name the files to read, one with interactions and one with titles.")
    return candidates[0]


def _kind(file: Path) -> str | None:
    """The kind of a file, or the format of an archive; None if unknown."""
    if file.suffix == ".zip":
        kinds = {_kind_by_name(Path(name)) for name in members(file)}
        return next((format for format, *pair in _PAIRS if kinds.issuperset(pair)), None)
    return _kind_by_name(file) or _kind_by_content(file)


def _kind_by_name(file: Path) -> str | None:
    return next((name for name in (file.name, file.suffix) if name in _BY_NAME), None)


def _kind_by_content(file: Path) -> str | None:
    with open_bytes(file) as stream:
        line = stream.readline(FIRST_LINE).decode("utf-8-sig", "replace").strip()
    if line.startswith("{'") and "'asin'" in line:
        return "meta in Python's notation"
    cells = line.split(",")
    if len(cells) == 4 and cells[3].isdigit() and amazon.ASIN_LENGTH in map(len, cells[:2]):
        return "ratings"
    try:
        record = json.loads(line)
    except ValueError:
        return None
    fields = record.keys() if isinstance(record, dict) else {}
    if "parent_asin" in fields:
        return "reviews of 2023" if "user_id" in fields else "meta of 2023"
    if "asin" in fields:
        return "reviews" if "reviewerID" in fields else "meta in JSON"
    return None
