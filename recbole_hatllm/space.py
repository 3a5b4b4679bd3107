"""Search spaces: YAML lines `key: {kind: values}`, checked before any trial.

hidden_size: {choice: [32, 64]}          learning_rate: {loguniform: [1e-4, 1e-2]}
dropout_prob: {uniform: [0.1, 0.5]}      n_layers: {int: [1, 4]}; a range takes a step too, {int: [1, 9, 2]}
conditions: ["hidden_size % n_layers == 0"]                                          (see conditions.py)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import isclose, isfinite
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial
from recbole.utils.argument_list import dataset_arguments, evaluation_arguments

from recbole_hatllm import schema
from recbole_hatllm.conditions import Condition, parse
from recbole_hatllm.config import Config
from recbole_hatllm.errors import ConfigError, nearest
from recbole_hatllm.hyper_file import SUFFIXES, read_hyper

KINDS = ("choice", "uniform", "loguniform", "int")
# Runs are compared by one measure on the same rows, each in a folder of its own.
SAME_FOR_ALL = {
    "model", "dataset", "data_path", "protocol", "eval_args", "mask_history", "metrics", "topk", "valid_metric", "run_dir",
    "runs_dir",
}  # fmt: skip
# What decides the rows, the candidates and the measures. Two keys of RecBole's lists decide none: which columns a model reads
# besides, and the speed of an evaluation.
SHARED = (
    SAME_FOR_ALL
    | {"eval_sample", "encoding"}
    | ({*dataset_arguments, *evaluation_arguments} - {"load_col", "eval_batch_size"})
)
# Where and how loudly a run is made is no part of what it is.
PLACE = ("gpu_id", "use_gpu", "worker", "show_progress", "runs_dir")


@dataclass(frozen=True)
class Dimension:
    """One searched key: `kind` of `KINDS` and its `values`, the choices or [low, high], perhaps with a step."""

    key: str
    kind: str
    values: list

    def distribution(self) -> BaseDistribution:
        """What Optuna draws from."""
        if self.kind == "choice":
            return CategoricalDistribution(self.choices())
        low, high, *step = self.values
        if self.kind == "int":
            return IntDistribution(low, high, step=step[0] if step else 1)
        return FloatDistribution(low, high, log=self.kind == "loguniform", step=step[0] if step else None)

    def suggest(self, trial: Trial) -> None:
        """Draws the value of this key for an Optuna trial, which keeps it in `trial.params`."""
        from_ = self.distribution()
        if isinstance(from_, CategoricalDistribution):
            trial.suggest_categorical(self.key, from_.choices)
        elif isinstance(from_, IntDistribution):
            trial.suggest_int(self.key, from_.low, from_.high, step=from_.step)
        else:
            trial.suggest_float(self.key, from_.low, from_.high, step=from_.step, log=from_.log)

    def choices(self) -> list:
        """The choices as Optuna can store them: lists and dicts as JSON."""
        return [json.dumps(value) if isinstance(value, (list, dict)) else value for value in self.values]

    def value(self, stored: Any) -> Any:
        """What the config gets for a value that Optuna stores."""
        if self.kind == "choice":
            return self.values[self.choices().index(stored)]
        if self.kind == "uniform" and len(self.values) == 3:
            return float(f"{stored:.12g}")  # three steps of 0.1 are 0.30000000000000004
        return stored

    def corners(self) -> list:
        """Values that are in range only if all are."""
        return self.values if self.kind == "choice" else self.values[:2]


@dataclass(frozen=True)
class Space:
    """The searched keys by name, and the conditions that each combination of their values keeps."""

    dimensions: dict[str, Dimension]
    conditions: tuple[Condition, ...] = ()

    def values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """What the config gets for the params of an Optuna trial, in the order of the space."""
        return {key: dimension.value(params[key]) for key, dimension in self.dimensions.items() if key in params}

    def allows(self, values: Mapping[str, Any], config: Config) -> bool:
        """Whether `values` of the searched keys, beside the other keys of `config`, keep all conditions.

        An empty backbone_layers is the number of layers that the backbone has.

        Raises:
            ConfigError: a condition cannot be computed with them. BackboneError: those layers cannot be read.
        """

        def look_up(name: str) -> Any:
            value = values[name] if name in values else config[name]
            return _depth(str(look_up("backbone"))) if name == "backbone_layers" and value is None else value

        return all(condition.holds({name: look_up(name) for name in condition.names}) for condition in self.conditions)


@cache
def _depth(backbone: str) -> int:
    from recbole_hatllm.shapes import depth_of  # transformers, which a search without an LLM does not need

    return depth_of(backbone)


def read_space(file: str | Path) -> Space:
    """The searched keys of a YAML file, or of one in RecBole's text format (see `hyper_file.py`).

    Raises:
        ConfigError: the file is missing, empty or of neither format, a line is no `key: {kind: values}`, or a condition none.
    """
    if not Path(file).is_file():
        raise ConfigError(f"There is no search space {file}: name a YAML file by --space=FILE.")
    conditions: Any = []
    if Path(file).suffix in SUFFIXES:
        specs = read_hyper(file)
    else:
        keys = schema.read_yaml(file)
        conditions = keys.pop("conditions", [])
        specs = {key: (f"{file}: {key}", spec) for key, spec in keys.items()}
    if not isinstance(conditions, list):
        raise ConfigError(f"{file}: conditions is {conditions!r}, and must be a list, one condition an entry.")
    dimensions = {key: _dimension(where, key, spec) for key, (where, spec) in specs.items()}
    if not dimensions:
        raise ConfigError(f"{file} searches nothing: write lines such as `learning_rate: {{choice: [1e-3, 1e-4]}}`.")
    return Space(dimensions, tuple(parse(condition, str(file)) for condition in conditions))


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
    if not _is_range(kind, values):
        form = {
            "uniform": "[low, high] or [low, high, step] with low < high, whole steps from low to high",
            "loguniform": "[low, high] with 0 < low < high",
            "int": "[low, high] or [low, high, step] of whole numbers, low < high, whole steps from low to high",
        }[kind]
        raise ConfigError(f"{where}: {kind} is {values!r}, and must be {form}.")
    return Dimension(key, kind, values)


def _is_range(kind: str, values: Any) -> bool:
    numbers = (int,) if kind == "int" else (int, float)
    if not isinstance(values, list) or len(values) not in ((2,) if kind == "loguniform" else (2, 3)):
        return False
    if not all(isinstance(value, numbers) and not isinstance(value, bool) and isfinite(value) for value in values):
        return False
    low, high, *step = values
    if step and (step[0] <= 0 or not isclose((high - low) / step[0], round((high - low) / step[0]))):
        return False
    return low < high and (kind != "loguniform" or low > 0)


def check_space(space: Space, model: str, dataset: str, keys: dict[str, Any]) -> Config:
    """Reads every choice and both ends of every range as a run would; returns the config without the space.

    Args:
        keys: those that all trials share.

    Raises:
        ConfigError: `model` does not read a key, a value is out of range, a key must be the same for all trials, or a condition
            names no key or cannot be computed.
    """
    if fixed := sorted(space.dimensions.keys() & SAME_FOR_ALL):
        raise ConfigError(f"{fixed[0]} cannot be searched: it must be the same for all trials.")
    config = Config(model, dataset, config_dict=keys)
    known = {*space.dimensions, *config.final_config_dict}
    for condition in space.conditions:
        if unknown := [name for name in condition.names if name not in known]:
            raise ConfigError(
                f"The condition {condition.text!r} names {unknown[0]}, which is no key of {model}{nearest(unknown[0], known)}"
            )
    corners = {key: dimension.corners() for key, dimension in space.dimensions.items()}
    for turn in range(max(map(len, corners.values()))):
        values = {key: found[turn % len(found)] for key, found in corners.items()}
        if unread := [key for key in Config(model, dataset, config_dict={**keys, **values}).unread if key in corners]:
            raise ConfigError(f"{model} does not read the key {unread[0]}: searching it would change nothing.")
        space.allows(values, config)
    return config
