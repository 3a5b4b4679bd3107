"""Search spaces: YAML lines `key: {kind: values}`, checked before any trial.

hidden_size: {choice: [32, 64]}          learning_rate: {loguniform: [1e-4, 1e-2]}
dropout_prob: {uniform: [0.1, 0.5]}      n_layers: {int: [1, 4]}, or {int: [1, 9, 2]} with a step
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole_hatllm import schema
from recbole_hatllm.config import Config
from recbole_hatllm.errors import ConfigError

KINDS = ("choice", "uniform", "loguniform", "int")
# Runs are compared by one measure on the same rows, each in a folder of its own.
SAME_FOR_ALL = {
    "model", "dataset", "data_path", "protocol", "eval_args", "mask_history", "metrics", "topk", "valid_metric", "run_dir",
    "runs_dir",
}  # fmt: skip
# Where and how loudly a run is made is no part of what it is.
PLACE = ("gpu_id", "use_gpu", "worker", "show_progress", "runs_dir")


@dataclass(frozen=True)
class Dimension:
    """One searched key: `kind` of `KINDS` and its `values`, the choices or [low, high] (int: perhaps a step)."""

    key: str
    kind: str
    values: list

    def suggest(self, trial) -> None:
        """Draws the value of this key for an Optuna trial, which keeps it in `trial.params`."""
        if self.kind == "choice":
            trial.suggest_categorical(self.key, self.choices())
        elif self.kind == "int":
            trial.suggest_int(self.key, *self.values[:2], step=self.values[2] if len(self.values) == 3 else 1)
        else:
            trial.suggest_float(self.key, *self.values, log=self.kind == "loguniform")

    def choices(self) -> list:
        """The choices as Optuna can store them: lists and dicts as JSON."""
        return [json.dumps(value) if isinstance(value, (list, dict)) else value for value in self.values]

    def value(self, stored: Any) -> Any:
        """What the config gets for a value that Optuna stores."""
        return self.values[self.choices().index(stored)] if self.kind == "choice" else stored

    def corners(self) -> list:
        """Values that are in range only if all are."""
        return self.values if self.kind == "choice" else self.values[:2]


def read_space(file: str | Path) -> dict[str, Dimension]:
    """The searched keys of a YAML file.

    Raises:
        ConfigError: the file is missing, empty or no YAML, or a line is no `key: {kind: values}`.
    """
    if not Path(file).is_file():
        raise ConfigError(f"There is no search space {file}: name a YAML file by --space=FILE.")
    space = {key: _dimension(f"{file}: {key}", key, spec) for key, spec in schema.read_yaml(file).items()}
    if not space:
        raise ConfigError(f"{file} searches nothing: write lines such as `learning_rate: {{choice: [1e-3, 1e-4]}}`.")
    return space


def _dimension(where: str, key: str, spec: Any) -> Dimension:
    if isinstance(spec, list):
        raise ConfigError(f"{where} is a plain list: write {{choice: {spec}}}.")
    if not isinstance(spec, dict) or len(spec) != 1 or next(iter(spec)) not in KINDS:
        raise ConfigError(f"{where} is {spec!r}, and must be {{kind: [values]}} with one kind of {', '.join(KINDS)}.")
    ((kind, values),) = spec.items()
    if kind == "choice":
        if not isinstance(values, list) or not values or any(value in values[:i] for i, value in enumerate(values)):
            raise ConfigError(f"{where}: the choices are {values!r}, and must be a list of different values.")
        return Dimension(key, kind, values)
    numbers = (int,) if kind == "int" else (int, float)
    lengths = (2, 3) if kind == "int" else (2,)
    if (
        not isinstance(values, list)
        or len(values) not in lengths
        or not all(isinstance(value, numbers) and not isinstance(value, bool) for value in values)
        or not values[0] < values[1]
        or (kind == "loguniform" and values[0] <= 0)
        or (len(values) == 3 and (values[2] < 1 or (values[1] - values[0]) % values[2]))
    ):
        form = {
            "uniform": "[low, high] with low < high",
            "loguniform": "[low, high] with 0 < low < high",
            "int": "[low, high] or [low, high, step] of whole numbers, low < high, whole steps from low to high",
        }[kind]
        raise ConfigError(f"{where}: {kind} is {values!r}, and must be {form}.")
    return Dimension(key, kind, values)


def check_space(space: dict[str, Dimension], model: str, dataset: str, keys: dict[str, Any]) -> Config:
    """Reads every choice and both ends of every range as a run would; returns the config without the space.

    Args:
        keys: those that all trials share.

    Raises:
        ConfigError: `model` does not read a key, a value is out of range, or a key must be the same for all trials.
    """
    if fixed := sorted(space.keys() & SAME_FOR_ALL):
        raise ConfigError(f"{fixed[0]} cannot be searched: it must be the same for all trials.")
    config = Config(model, dataset, config_dict=keys)
    corners = {key: dimension.corners() for key, dimension in space.items()}
    for turn in range(max(map(len, corners.values()))):
        values = {key: found[turn % len(found)] for key, found in corners.items()}
        if unread := [key for key in Config(model, dataset, config_dict={**keys, **values}).unread if key in space]:
            raise ConfigError(f"{model} does not read the key {unread[0]}: searching it would change nothing.")
    return config
