"""Suites: which runs are compared, read from YAML or the command line and checked before any of them begins.

dataset: ml-100k
seeds: [0, 1, 2]
keys: {protocol: windows}                     for all runs
runs:
  - {name: SASRec, model: SASRec, keys: {n_layers: 1}, config_files: [best.yaml], paper: {hr@10: 0.03}}
method: SASRec                                tested against the others; by default the best
floors: true                                  adds the runs of properties/suite/floors.yaml
prepare: [prepare my-data --inter=my.csv]     the commands that make the dataset, for whoever does not have it

What a paper prints holds for the file's own dataset alone; `paper: {ml-100k: {...}, ml-1m: {...}}` is of several.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recbole_hatllm import lineage, schema
from recbole_hatllm.config import Config
from recbole_hatllm.errors import ConfigError, nearest
from recbole_hatllm.run_folder import metric_name
from recbole_hatllm.space import PLACE, SHARED

SUITES = schema.PROPERTIES / "suite"
_OF_A_SUITE = ("dataset", "seeds", "keys", "runs", "method", "floors", "prepare")
_OF_A_RUN = ("name", "model", "keys", "config_files", "paper")


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    `keys` are its own; `counts` says that it is a floor: it takes only the protocol from the keys for all runs, and as
    nothing in it is random, one seed. `paper` are metrics that a paper prints, by RecBole's names.
    """

    name: str
    model: str
    keys: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    paper: dict[str, float] = field(default_factory=dict)
    counts: bool = False


@dataclass(frozen=True)
class Suite:
    """Entries that are run with each of the seeds: `keys` for all of them, `over` besides and above all others.

    `prepare` are the commands that make the dataset.
    """

    name: str
    dataset: str
    seeds: tuple[int, ...]
    entries: tuple[Entry, ...]
    keys: dict[str, Any]
    over: dict[str, Any]
    method: str | None = None
    prepare: tuple[str, ...] = ()

    def shared(self, entry: Entry) -> dict[str, Any]:
        """The keys for all runs, as far as this one takes them."""
        keys = {**self.keys, **self.over}
        return {key: keys[key] for key in keys if key in SHARED or key in PLACE} if entry.counts else keys

    def keys_of(self, entry: Entry) -> dict[str, Any]:
        """All keys of a run but its seed; for all runs, of its files, its own, of the command line, the last the strongest."""
        shared = self.shared(entry)
        strongest = {key: value for key, value in shared.items() if key in self.over}
        return {**shared, **entry.files, **entry.keys, **strongest}

    def seeds_of(self, entry: Entry) -> tuple[int, ...]:
        """The seeds that it is run with."""
        return self.seeds[:1] if entry.counts else self.seeds


def arguments(keys: dict[str, Any]) -> dict[str, Any]:
    """What `compare.compare` takes, out of the `keys` of a command line; those of no argument are for all runs."""
    names = ("models", "suite", "dataset", "seeds", "method", "floors", "folder")
    found = {name: keys.get(name) for name in names}
    if isinstance(found["seeds"], (str, int)):
        found["seeds"] = [schema.number(part) for part in str(found["seeds"]).split(",")]
    found["models"] = [name for name in str(found["models"] or "").split(",") if name]
    files = [file for file in str(keys.get("config_files") or "").split(",") if file]
    said = {key: value for key, value in keys.items() if key not in (*names, "config_files")}
    merged = {key: value for part in [*map(schema.read_yaml, files), said] for key, value in part.items()}
    return {**found, "config_dict": merged}


def read_suite(
    file: str | Path | None = None,
    models: Sequence[str] = (),
    dataset: str | None = None,
    seeds: Sequence[int] | None = None,
    keys: dict[str, Any] | None = None,
    method: str | None = None,
    floors: bool | None = None,
) -> Suite:
    """A suite of a YAML file or of the default runs of `models`, one of the two.

    Args:
        file: a path, or the name of a file in properties/suite. The rest goes over what it says.
        keys: for all runs, above all that the file says.

    Raises:
        ConfigError: the file is missing, no YAML or holds something else than a suite; names, seeds or runs are missing or
            stand there twice.
    """
    if bool(file) == bool(models):
        raise ConfigError("compare takes --models=A,B,... or --suite=FILE, one of the two.")
    path = _path(file) if file else None
    said = schema.read_yaml(path) if path else {"runs": [{"name": model, "model": model} for model in models]}
    where = str(path or "--models")
    _check_keys(where, said, _OF_A_SUITE)
    wanted = {"dataset": dataset, "seeds": seeds, "method": method, "floors": floors}
    own = said.get("dataset")
    said = {"keys": {}, "floors": True, **said, **{key: value for key, value in wanted.items() if value is not None}}
    if not said.get("dataset"):
        raise ConfigError(f"{where} names no dataset: say --dataset=NAME.")
    if not isinstance(said["keys"], dict):
        raise ConfigError(f"{where}: keys are {said['keys']!r}, and must be lines of the form `key: value`.")
    prepare = said.get("prepare") or []
    if not isinstance(prepare, list) or not all(isinstance(command, str) for command in prepare):
        raise ConfigError(
            f"{where}: prepare is {prepare!r}, and must be a list of commands, such as [prepare amazon-toys]."
        )
    if not isinstance(said["floors"], bool):
        raise ConfigError(f"{where}: floors is {said['floors']!r}, and must be true or false.")
    if not isinstance(said.get("runs"), list) or not said["runs"]:
        raise ConfigError(f"{where} has no runs: list them as {{name: ..., model: ...}}.")
    floor_runs = schema.read_yaml(SUITES / "floors.yaml")["runs"]
    floor_models = {floor["model"] for floor in floor_runs}
    of = (str(own or said["dataset"]), str(said["dataset"]))
    entries = [_entry(where, run, path, floor_models, of) for run in said["runs"]]
    names = [entry.name for entry in entries]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"{where} has two runs named {twice[0]}: name them apart.")
    if said["floors"]:
        taken = {entry.name for entry in entries} | {entry.model for entry in entries}
        entries = [
            *(Entry(run["name"], run["model"], counts=True) for run in floor_runs if run["model"] not in taken),
            *entries,
        ]
    chosen = said.get("method")
    if chosen is not None and chosen not in (names := [entry.name for entry in entries]):
        raise ConfigError(f"{where}: the method {chosen!r} is none of the runs{nearest(chosen, names)}")
    name = path.stem if path else "models"
    of_it = tuple(prepare) if of[0] == of[1] else ()
    seeds = _seeds(where, said)
    return Suite(name, of[1], seeds, tuple(entries), said["keys"], dict(keys or {}), chosen, of_it)


def check(suite: Suite) -> dict[str, Config]:
    """The config of each run by its name, with the first seed; RecBole's warnings of keys that others read are kept quiet.

    Raises:
        ConfigError: an unknown model or key, a value out of range, of a run or of one that it needs first; a key that nobody
            reads, one that must be the same for all runs and is not; the dataset is not there and is none of those that are
            made by themselves.
    """
    default = schema.read_yaml(schema.PROPERTIES / "overall.yaml")["data_path"]
    data = Path({"data_path": default, **suite.keys, **suite.over}["data_path"])
    if suite.prepare and not (data / suite.dataset).is_dir():
        commands = ", then ".join(f"`python run_hatllm.py {command}`" for command in suite.prepare)
        raise ConfigError(f"{suite.name} needs {suite.dataset}, which is not in {data}: run {commands}.")
    logging.disable(logging.WARNING)
    try:
        configs = {entry.name: _checked(suite, entry) for entry in suite.entries}
    finally:
        logging.disable(logging.NOTSET)
    for key in {**suite.keys, **suite.over}:
        if all(key in config.unread or key not in config.external_config_dict for config in configs.values()):
            raise ConfigError(f"No run of {suite.name} reads the key {key}: leave it out.")
    return configs


def _checked(suite: Suite, entry: Entry) -> Config:
    try:
        plain = Config(entry.model, suite.dataset, None, suite.shared(entry)).resolved()
        keys = suite.keys_of(entry)
        config, *_ = [
            Config(entry.model, suite.dataset, None, {**keys, "seed": seed}) for seed in suite.seeds_of(entry)
        ]
        lineage.ancestors(config)
    except ConfigError as error:
        raise ConfigError(f"{entry.name}: {error}") from error
    resolved = config.resolved()
    changed = {key: resolved.get(key) for key in sorted(SHARED) if resolved.get(key) != plain.get(key)}
    changed |= {"seed": entry.keys["seed"]} if "seed" in entry.keys else {}
    for key, value in changed.items():
        how = "seeds" if key == "seed" else f"keys, or --{key}"
        raise ConfigError(
            f"{entry.name} sets {key} to {value!r}, which must be the same for all runs: set it for the whole suite, by {how}."
        )
    if unread := [key for key in config.unread if key in entry.keys]:
        raise ConfigError(f"{entry.name}: {entry.model} does not read the key {unread[0]}: leave it out.")
    return config


def _path(file: str | Path) -> Path:
    shipped = SUITES / f"{file}.yaml"
    found = next((path for path in (Path(file), shipped) if path.is_file()), None)
    if found is None:
        names = [path.stem for path in sorted(SUITES.glob("*.yaml"))]
        raise ConfigError(f"There is no suite {file}: name a YAML file, or one of {', '.join(names)}.")
    return found


def _entry(where: str, run: Any, path: Path | None, floors: set[str], of: tuple[str, str]) -> Entry:
    """`of` are the dataset that the file is about, and the one that is compared on."""
    if not isinstance(run, dict) or not run.get("model"):
        raise ConfigError(f"{where}: the run {run!r} names no model: write {{name: ..., model: ...}}.")
    _check_keys(f"{where}, run {run.get('name') or run['model']}", run, _OF_A_RUN)
    name = str(run.get("name") or run["model"])
    keys, paper, files = run.get("keys") or {}, run.get("paper") or {}, run.get("config_files") or []
    for part, value in (("keys", keys), ("paper", paper)):
        if not isinstance(value, dict):
            raise ConfigError(f"{where}, run {name}: {part} is {value!r}, and must be lines of the form `name: value`.")
    read: dict[str, Any] = {}
    for file in [files] if isinstance(files, str) else files:
        beside = path.parent / str(file) if path else Path(file)
        read |= schema.read_yaml(beside if beside.is_file() else file)
    read.pop("seed", None)  # of the search that chose these keys; a suite has its own
    return Entry(name, str(run["model"]), keys, read, _paper(f"{where}, run {name}", paper, of), run["model"] in floors)


def _paper(where: str, paper: dict[str, Any], of: tuple[str, str]) -> dict[str, float]:
    """What a paper prints of the dataset that is compared on."""
    own, dataset = of
    by_dataset = paper if any(isinstance(value, dict) for value in paper.values()) else {own: paper}
    found: dict[str, dict[str, float]] = {}
    for name, metrics in by_dataset.items():
        if not isinstance(metrics, dict):
            raise ConfigError(
                f"{where}: paper has {metrics!r} for {name} beside datasets: write {{dataset: {{metric: number}}}}."
            )
        for metric, value in metrics.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ConfigError(f"{where}: paper has {value!r} for {metric}, and must have a number.")
            found.setdefault(str(name), {})[str(metric).lower().replace("hr@", "hit@")] = float(value)
    return found.get(dataset, {})


def check_paper(suite: Suite, names: Iterable[str]) -> None:
    """Raises ConfigError where a paper's metric is none of the measured `names`."""
    for entry in suite.entries:
        for name in entry.paper:
            if name not in names:
                known = ", ".join(map(metric_name, names))
                raise ConfigError(f"{entry.name}: paper has {metric_name(name)}, and measured are {known}.")


def _check_keys(where: str, said: dict[str, Any], known: tuple[str, ...]) -> None:
    for key in said:
        if key not in known:
            raise ConfigError(f"{where} has {key!r}{nearest(key, known)} It takes {', '.join(known)}.")


def _seeds(where: str, said: dict[str, Any]) -> tuple[int, ...]:
    seeds = said.get("seeds")
    if seeds is None or seeds == []:
        raise ConfigError(f"{where} has no seeds: say --seeds=0,1,2.")
    if not isinstance(seeds, list) or not all(isinstance(s, int) and not isinstance(s, bool) for s in seeds):
        raise ConfigError(f"{where}: seeds is {seeds!r}, and must be a list of whole numbers, such as 0,1,2.")
    if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise ConfigError(f"{where} has the seed {twice[0]} twice: leave one out.")
    return tuple(seeds)
