"""From a dataset's name to its folder of atomic files: fetch or take the raw files, read, apply the recipe, publish.

A prepared folder holds `<name>.inter`, `<name>.item` and `source.json`, which says what they were made from and how.
It appears whole or not at all.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import date
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock

from recbole_hatllm.data.recipe import Prepared, apply, write
from recbole_hatllm.data.sources import catalogue
from recbole_hatllm.data.sources.catalogue import Dataset, Source
from recbole_hatllm.data.sources.download import DownloadError, fetch, record, sha256_of
from recbole_hatllm.data.sources.raw import RawData
from recbole_hatllm.data.sources.readers import READERS, recognise
from recbole_hatllm.data.sources.tables import read_table
from recbole_hatllm.data.statistics import Statistics, statistics, table
from recbole_hatllm.errors import DataError
from recbole_hatllm.files import cache_folder, publish

logger = logging.getLogger(__name__)

Tokenizer = Callable[[str], Sequence[int]]
K_CORE = 5  # what the paper and its sources take


def prepare(
    name: str,
    folder: Path,
    *,
    given: Sequence[Path] | None = None,
    inter: Path | None = None,
    items: Path | None = None,
    columns: dict[str, str] | None = None,
    source: str | None = None,
    mirror: str | None = None,
    k_core: int | None = None,
    force: bool = False,
    load_tokenizer: Callable[[], Tokenizer | None] = lambda: None,
    show_progress: bool = True,
) -> Statistics:
    """Makes `folder` from the dataset's raw files and logs what was done and what came out.

    The raw files are, in this order: tables of any layout (`inter`, `items`, `columns`), files in a known format
    (`given`, files or one folder), or those of the catalogue, downloaded.

    Args:
        name: of the dataset, and of the atomic files. folder: where they go. columns: which column of the tables is
        the `user`, `item`, `time` and `title`. source: the only source of the catalogue to use. mirror: a base
        address that has the files of the sources instead. k_core: interactions that a user and an item must have.
        force: whether `folder` may be replaced. load_tokenizer: gives what splits a title into tokens, to count them;
        called late, as it may be slow.

    Raises:
        ConfigError: an unknown name or source. DataError: `folder` exists, the files cannot be had or read, or the
        recipe leaves nothing.
    """
    folder = Path(folder)
    if name == catalogue.BUNDLED and given is None and inter is None:
        return _bundled(load_tokenizer)
    dataset = catalogue.find(name) if given is None and inter is None else None
    with _only_here(name):
        _clear_leftovers(folder)
        if folder.exists() and not force:
            raise DataError(
                f"{folder} exists already: use it by --dataset={name}, or replace it by prepare {name} --force=true."
            )
        if dataset:
            raw, origin = _from_catalogue(dataset, folder, source, mirror, show_progress)
        else:
            raw, origin = _from_files(given, inter, items, columns)
        return _publish(name, folder, raw, origin, K_CORE if k_core is None else k_core, load_tokenizer)


def prepare_missing(name: str, folder: Path, show_progress: bool) -> None:
    """Makes `folder` for a run that needs it; nothing if another process has made it meanwhile.

    Raises:
        DataError: as `prepare`.
    """
    try:
        prepare(name, folder, show_progress=show_progress)
    except DataError:
        if not folder.exists():
            raise


def history(folder: Path) -> dict:
    """What `source.json` of a prepared folder says; empty for a folder that was not prepared here."""
    try:
        return json.loads((folder / "source.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def downloads(name: str) -> Path:
    """Where the raw files of a dataset are kept."""
    return cache_folder() / "downloads" / name


# --- Raw files


def _from_catalogue(dataset: Dataset, folder: Path, source: str | None, mirror: str | None, show_progress: bool):
    if dataset.note:
        logger.info("%s: %s", dataset.name, dataset.note)
    if mirror:
        dataset = dataset.on_mirror(mirror)
    failures: list[DownloadError] = []
    for place in [dataset.source(source)] if source else dataset.sources:
        try:
            files = _fetch_all(dataset.name, place, show_progress)
        except DownloadError as error:
            failures.append(error)
            continue
        logger.info("reading %s", ", ".join(file.name for file in files.values()))
        return READERS[place.format](files), _origin(place.format, files.values(), place)
    raise _nowhere(dataset, folder, failures)


def _from_files(given, inter, items, columns) -> tuple[RawData, dict]:
    if inter is not None:
        return read_table(inter, items, columns or {}), _origin("tables", [inter, *([items] if items else [])])
    kind, files = recognise(list(given))
    return READERS[kind](files), _origin(kind, files.values())


def _fetch_all(name: str, place: Source, show_progress: bool) -> dict[str, Path]:
    return {
        role: fetch(
            file.urls,
            downloads(name) / place.name / file.name,
            size=file.size,
            sha256=file.sha256,
            show_progress=show_progress,
        )
        for role, file in place.files.items()
    }


def _nowhere(dataset: Dataset, folder: Path, failures: list[DownloadError]) -> DataError:
    if all(failure.offline for failure in failures):
        why = "no server can be reached from here"
    else:
        why = "; ".join(f"{url}: {reason}" for failure in failures for url, reason in failure.reasons.items())
    urls = " and ".join(file.urls[0] for file in dataset.sources[0].files.values())
    command = f"python run_hatllm.py prepare {dataset.name}"
    return DataError(
        f"{dataset.name} is not in {folder.parent}/ and cannot be downloaded ({why}): run `{command}` where there is a "
        f"network, or put files had by hand ({urls}) into a folder and run `{command} --from=FOLDER`; "
        f"--dataset={catalogue.BUNDLED} works now."
    )


def _origin(kind: str, files, place: Source | None = None) -> dict:
    """What `source.json` says of the raw files."""
    if place:
        return {
            "format": kind,
            "source": place.name,
            "licence": place.licence,
            "files": [{"file": file.name, **record(file)} for file in files],
        }
    told = [{"file": file.name, "size": file.stat().st_size, "sha256": sha256_of(file)} for file in files]
    return {"format": kind, "files": told}


# --- The folder


def _publish(name: str, folder: Path, raw: RawData, origin: dict, k_core: int, load_tokenizer) -> Statistics:
    prepared = apply(raw, k_core)
    for line in _told(prepared):
        logger.info("%s", line)
    found: list[Statistics] = []

    def fill(temporary: Path) -> None:
        write(prepared, temporary, name)
        found.append(statistics(temporary, name, load_tokenizer()))
        note = {
            "name": name,
            **origin,
            "k_core": k_core,
            "steps": [step._asdict() for step in prepared.steps],
            "notes": prepared.notes,
            "statistics": asdict(found[0]),
            "prepared": date.today(),
        }
        (temporary / "source.json").write_text(json.dumps(note, indent=1, default=str) + "\n", encoding="utf-8")

    publish(folder, fill)
    logger.info("\n%s\n\n%s is ready: --dataset=%s", table(found[0], catalogue.PAPER.get(name)), folder, name)
    return found[0]


def _told(prepared: Prepared) -> list[str]:
    rows = [[step.what, *(f"{count:,}" for count in step[1:])] for step in prepared.steps]
    rows.insert(0, ["", "users", "items", "interactions"])
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    ]
    return [*prepared.notes, *lines]


def _bundled(load_tokenizer) -> Statistics:
    (recbole,) = find_spec("recbole").submodule_search_locations  # type: ignore[union-attr,misc]
    folder = Path(recbole) / "dataset_example" / catalogue.BUNDLED
    found = statistics(folder, catalogue.BUNDLED, load_tokenizer(), title_field="movie_title")
    logger.info("%s is ready without preparing: RecBole brings it along.\n\n%s", catalogue.BUNDLED, table(found))
    return found


def _only_here(name: str) -> FileLock:
    """Lets one process at a time prepare a dataset."""
    try:
        downloads(name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"The cache {cache_folder()} cannot be written ({error.strerror}): set RECBOLE_HATLLM_CACHE to another one."
        ) from error
    return FileLock(downloads(name) / ".prepare.lock")


def _clear_leftovers(folder: Path) -> None:
    """Removes what a killed process left beside `folder`; nobody else is at work, as the lock is held."""
    for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
