"""Compares models: every run of a suite with every seed, by `quick_start`, into one table.

Run folders are named by what the run is (`identity.py`) and stand in `runs_dir`, where any suite finds them: a finished run
is read, a half-done one goes on, and only then is one begun. The suite folder holds the tables, written after every run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from recbole_hatllm import compare_page, compare_report, distributed, identity, run_folder
from recbole_hatllm import suite as suites
from recbole_hatllm.attempt import attempt
from recbole_hatllm.compare_progress import Progress
from recbole_hatllm.config import Config
from recbole_hatllm.errors import ConfigError, DataError, HatError
from recbole_hatllm.quick_start import run
from recbole_hatllm.space import PLACE
from recbole_hatllm.suite import Entry, Suite


def compare(
    models: Sequence[str] = (),
    dataset: str | None = None,
    seeds: Sequence[int] | None = None,
    suite: str | Path | None = None,
    config_dict: dict[str, Any] | None = None,
    method: str | None = None,
    floors: bool | None = None,
    folder: str | Path | None = None,
) -> dict:
    """Makes the runs of a suite that are not finished yet, and the table of all; the same call goes on after a stop.

    Args:
        models: with their default keys, or suite: a YAML file (see `suite.py`), one of the two. dataset, seeds, method,
            floors: over what the file says.
        config_dict: keys for all runs, above all others.
        folder: of the tables; by default one in `runs_dir` whose name follows from the suite.

    Returns:
        what the folder's `result.json` holds, and `folder`.

    Raises:
        HatError: a bad suite, key or dataset, before any run; no run came to an end. Interrupted: Ctrl-C.
    """
    distributed.alone("compare")
    wanted = suites.read_suite(suite, models, dataset, seeds, config_dict, method, floors)
    return Comparison(wanted, folder).go()


@dataclass
class Planned:
    """One run of a suite, and what it came to: a `result` with its `ranks`, or a `reason`; none of them before its turn."""

    entry: Entry
    seed: int
    keys: dict[str, Any]
    folder: Path
    result: dict | None = None
    ranks: dict[str, np.ndarray] | None = None
    reason: str | None = None

    @property
    def label(self) -> str:
        """How the terminal calls it."""
        return self.entry.name if self.entry.counts else f"{self.entry.name}, seed {self.seed}"

    @property
    def seconds(self) -> float | None:
        """What it took, if it is finished."""
        return sum(self.result["seconds"].values()) if self.result else None


class Comparison:
    """One suite on the way; `folder` as in `compare`."""

    def __init__(self, suite: Suite, folder: str | Path | None = None):
        self.suite = suite
        configs = suites.check(suite)
        first = next(iter(configs.values()))
        suites.check_paper(suite, _measured(first))
        self.runs_dir = Path(first["runs_dir"])
        data = identity.data_digest(first)
        self.runs: list[Planned] = []
        for seed in suite.seeds:  # seed by seed: a whole table stands early
            for entry in suite.entries:
                if seed in suite.seeds_of(entry):
                    unread = configs[entry.name].unread
                    keys = {key: value for key, value in suite.keys_of(entry).items() if key not in unread}
                    keys["seed"] = seed
                    mark = identity.digest(Config(entry.model, suite.dataset, None, keys), data)
                    self.runs.append(
                        Planned(entry, seed, keys, self.runs_dir / f"{entry.model}-{suite.dataset}-{mark}")
                    )
        self.about, self.folder = place_of(suite, configs, folder)
        known = run_folder.read_result(self.folder)
        if known and known.get("comparison") != self.about:
            raise ConfigError(f"{self.folder} holds another comparison (see its result.json): name another --folder.")

    def go(self) -> dict:
        """Makes what is missing; prints and returns what came of it all."""
        for planned in self.runs:
            if result := run_folder.read_result(planned.folder):
                self._settle(planned, result)
        done = sum(planned.result is not None for planned in self.runs)
        print(
            f"{self.suite.name}: {len(self.runs)} runs on {self.suite.dataset}, {done} of them finished before",
            flush=True,
        )
        found = self._write()
        try:
            with Progress(self.runs, self.about["valid_metric"]) as progress:
                for planned in self.runs:
                    if planned.result is None and planned.reason is None:
                        with progress.running(planned):
                            self._make(planned, progress.live)
                        found = self._write()
        except KeyboardInterrupt:
            print(f"Stopped; the same command goes on. What there is stands in {self.folder}.", flush=True)
            raise
        if not any(planned.result for planned in self.runs):
            raise HatError(f"No run of {self.suite.name} came to an end: {self.runs[0].reason}")
        print("\n" + compare_report.terminal(found), flush=True)
        print(
            f"tables: {self.folder}/table.md, table.csv, table.tex, result.json; with figures: index.html", flush=True
        )
        return {**found, "folder": str(self.folder)}

    def _make(self, planned: Planned, live: bool) -> None:
        """Begins the run or goes on with it; another comparison that makes the same run is waited for."""
        show_progress = live and planned.keys.get("show_progress", True)
        keys = {**planned.keys, "show_progress": show_progress, "run_dir": str(planned.folder)}
        lock = FileLock(self.runs_dir / f".{planned.folder.name}.lock")
        self.runs_dir.mkdir(parents=True, exist_ok=True)
        with lock:
            begin = lambda: run(planned.entry.model, self.suite.dataset, config_dict=keys)  # noqa: E731
            outcome = attempt(planned.folder, begin, show_progress)
        Path(lock.lock_file).unlink(missing_ok=True)
        if "reason" in outcome:
            planned.reason = " ".join(outcome["reason"].split())
        else:
            self._settle(planned, outcome)

    def _settle(self, planned: Planned, result: dict) -> None:
        """Takes a result in, if its rows can be paired with those of the others."""
        try:
            ranks = run_folder.read_ranks(planned.folder)
        except DataError as error:
            planned.reason = str(error)
            return
        other = next((run for run in self.runs if run.result), None)
        if other and not _paired(other, result, ranks):
            planned.reason = (
                f"Its test rows or candidates are others than those of {other.label} ({len(ranks['rank'])} rows of "
                f"{result['candidates']} items, and {len(other.ranks['rank'])} of {other.result['candidates']}), so their "
                "ranks cannot be paired: give it the same data."
            )
            return
        planned.result, planned.ranks = result, ranks

    def _write(self) -> dict:
        """Brings the suite folder up to date; returns what its `result.json` holds."""
        found = compare_report.summary(self.about, self.suite.entries, self.runs)
        compare_report.write(found, self.folder)
        compare_page.write(found, self.folder)
        return found


def _paired(other: Planned, result: dict, ranks: dict[str, np.ndarray]) -> bool:
    same = all(result[name] == other.result[name] for name in ("candidates", "history_masked", "protocol"))
    return same and all(np.array_equal(ranks[name], other.ranks[name]) for name in ("user", "target"))


def place_of(suite: Suite, configs: dict[str, Config], folder: str | Path | None = None) -> tuple[dict, Path]:
    """What a comparison is, as its `result.json` says under `comparison`, and the folder of its tables.

    Args:
        configs: of `suites.check`. folder: where the user names one.
    """
    first = next(iter(configs.values()))
    not_the_run = {*PLACE, "data_path"}
    runs = {}
    for entry in suite.entries:
        left_out = not_the_run | set(configs[entry.name].unread)
        keys = {key: value for key, value in suite.keys_of(entry).items() if key not in left_out}
        runs[entry.name] = {"model": entry.model, "keys": keys}
    about = {
        "dataset": suite.dataset,
        "seeds": list(suite.seeds),
        "method": suite.method,
        "valid_metric": first["valid_metric"].lower(),
        "metrics": _measured(first),
        "runs": runs,
    }
    about = json.loads(json.dumps(about, default=str))
    short = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
    return about, Path(folder or Path(first["runs_dir"]) / f"compare-{suite.name}-{suite.dataset}-{short}")


def _measured(config: Config) -> list[str]:
    return [f"{metric}@{cut}".lower() for metric in _list(config["metrics"]) for cut in _list(config["topk"])]


def _list(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]
