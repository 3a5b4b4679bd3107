"""The `prepare` command: its keys, and the list of what is known."""

from __future__ import annotations

import logging
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recbole_hatllm.data.prepare import downloads, history, prepare
from recbole_hatllm.data.sources import catalogue
from recbole_hatllm.data.sources.catalogue import Dataset
from recbole_hatllm.data.sources.download import record
from recbole_hatllm.errors import ConfigError, nearest
from recbole_hatllm.files import cache_folder

KEYS = ("from", "source", "mirror", "inter", "items", "columns", "k_core", "force", "show_progress")
ROLES = ("user", "item", "time", "title")


def run(name: str, root: str, keys: dict[str, Any]) -> None:
    """Makes `root`/`name`, telling on the terminal what is done.

    Args:
        keys: of `KEYS`, as the command line gives them.

    Raises:
        ConfigError: a key or value that is not understood. DataError: as `data.prepare.prepare`.
    """
    options = _options(name, keys)
    with _told():
        prepare(name, Path(root) / name, load_tokenizer=_title_tokenizer, **options)


def listing(root: str) -> str:
    """All datasets, one line each: name, release, sources, bytes to download, and what is prepared in `root`."""
    known = [catalogue.find(name) for name in catalogue.names()]
    own = [path.name for path in sorted(Path(root).glob("*")) if history(path) and path.name not in catalogue.names()]
    rows = [["name", "release", "sources", "download", "prepared: users / items / interactions"]]
    rows += [[d.name, str(d.year), _sources(d), _megabytes(d), _prepared(root, d)] for d in known]
    rows += [[name, "", "", "", _prepared(root, name)] for name in own]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    publishers: dict[str, dict[str, None]] = {}
    for place in (place for dataset in known for place in dataset.sources):
        publishers.setdefault(place.licence, {})[place.name] = None
    notes = [f"{dataset.name}: {dataset.note}" for dataset in known if dataset.note]
    return "\n".join([
        *lines,
        "",
        "Fields of all: user_id, item_id, timestamp; title. Sources are tried in order; --source=NAME takes one.",
        "What the publishers say of use:",
        *(f"  {', '.join(places)}: {licence}" for licence, places in publishers.items()),
        "Notes:",
        *(f"  {note}" for note in notes),
    ])  # fmt: skip


def _sources(dataset: Dataset) -> str:
    return ", ".join(source.name for source in dataset.sources) or "RecBole itself"


def _megabytes(dataset: Dataset) -> str:
    """Of the first source whose sizes are known, by the catalogue or by an earlier download."""
    for source in dataset.sources:
        folder = downloads(dataset.name) / source.name
        sizes = [file.size or record(folder / file.name).get("size", 0) for file in source.files.values()]
        if all(sizes):
            return f"{sum(sizes) / 1e6:,.1f} MB"
    return ""


def _prepared(root: str, dataset: Dataset | str) -> str:
    name = dataset if isinstance(dataset, str) else dataset.name
    found = history(Path(root) / name).get("statistics")
    if found:
        return " / ".join(f"{found[part]:,}" for part in ("users", "items", "interactions"))
    return "ready" if name == catalogue.BUNDLED else ""


def _options(name: str, keys: dict[str, Any]) -> dict[str, Any]:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigError(f"{name!r} cannot be the name of a dataset: use letters, digits, - and _.")
    for key in keys:
        if key not in KEYS:
            raise ConfigError(f"prepare does not take {key!r}{nearest(key, (*KEYS, 'data_path'))}")
    if "inter" in keys and "from" in keys:
        raise ConfigError("--from and --inter exclude each other: --inter is for tables of your own.")
    for key in ("items", "columns"):
        if key in keys and "inter" not in keys:
            raise ConfigError(f"--{key} goes with --inter=FILE, the table of the interactions, which is missing.")
    options: dict[str, Any] = {key: str(keys[key]) for key in ("source", "mirror") if keys.get(key)}
    options |= {key: Path(str(keys[key])) for key in ("inter", "items") if keys.get(key)}
    options |= {key: _flag(key, keys[key]) for key in ("force", "show_progress") if key in keys}
    if keys.get("from"):
        options["given"] = [Path(part.strip()).expanduser() for part in str(keys["from"]).split(",") if part.strip()]
    if "columns" in keys:
        options["columns"] = _columns(str(keys["columns"]))
    if "k_core" in keys:
        if type(keys["k_core"]) is not int or keys["k_core"] < 1:
            raise ConfigError(f"k_core is {keys['k_core']!r}, and must be a whole number from 1 on.")
        options["k_core"] = keys["k_core"]
    return options


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{key} is {value!r}, and must be true or false.")
    return value


def _columns(text: str) -> dict[str, str]:
    """`user=uid,item=sku` as a dict."""
    pairs = [part.partition("=") for part in text.split(",")]
    columns = {role.strip(): column.strip() for role, _, column in pairs}
    if not all(columns.values()) or not columns.keys() <= set(ROLES) or len(columns) != len(pairs):
        raise ConfigError(
            f'--columns is {text!r}, and must name columns as "user=...,item=...,time=...,title=...", each once.'
        )
    return columns


def _title_tokenizer():
    """Splits titles as HatLLM's default LLM does, where that LLM is here already; else None."""
    from recbole_hatllm.data.titles import PieceEncoder
    from recbole_hatllm.pretrained import local_tokenizer

    tokenizer = local_tokenizer(cache_folder())
    return PieceEncoder(tokenizer) if tokenizer else None


@contextmanager
def _told():
    """Sends this package's log to the terminal meanwhile."""
    package, terminal = logging.getLogger("recbole_hatllm"), logging.StreamHandler(sys.stdout)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    level = package.level
    package.setLevel(logging.INFO)
    package.addHandler(terminal)
    try:
        yield
    finally:
        package.removeHandler(terminal)
        package.setLevel(level)
