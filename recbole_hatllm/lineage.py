"""Which runs a model needs before its own: what its class declares by `parents(config)`, as configs or as folders."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recbole_hatllm import registry, run_folder, weights
from recbole_hatllm.config import Config
from recbole_hatllm.errors import ConfigError, DataError
from recbole_hatllm.space import PLACE, SHARED

# A parent is trained on the same rows from the same seed; how, its own defaults and its keys say.
_TAKEN_OVER = (SHARED - {"model", "dataset", "run_dir"}) | {"seed", "reproducibility", *PLACE}


@dataclass(frozen=True)
class Parent:
    """A run that another one needs.

    Args:
        role: what the child calls it. model, keys: of the run; its other keys are the child's where they decide rows, candidates
            and measures, and else the model's defaults.
        given: the key by which the user may name a finished run instead, and folder: its value, or None.
        must: what that run's config has to hold, by key, each with the child's key that says so.
    """

    role: str
    model: str
    keys: dict[str, Any]
    given: str
    folder: str | None = None
    must: dict[str, tuple[Any, str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For people: `SASRec`, or `its teacher, SLMRec`."""
        return self.model if self.role == self.model.lower() else f"its {self.role}, {self.model}"


def parents(config: Config) -> list[Parent]:
    """The runs that a run of `config` needs, in the order in which they are made.

    Raises:
        HatError: keys that name none.
    """
    declared = getattr(registry.model_class(config["model"]), "parents", None)
    return declared(config) if declared else []


def ancestors(config: Config) -> list[tuple[Parent, Config]]:
    """All runs that a run of `config` needs, each with the config of the run that needs it; parents of named runs are left out.

    Raises:
        HatError: a key of one of them is wrong.
    """
    found = []
    for parent in parents(config):
        found.append((parent, config))
        if parent.folder is None:
            found += ancestors(config_of(parent, config))
    return found


def said(config: Config, name: str, fixed: Iterable[str]) -> dict[str, Any]:
    """The parent's keys that the user gives in the key `name`.

    Args:
        fixed: keys that follow from others of this run.

    Raises:
        ConfigError: they hold one of those, or one that decides rows, candidates or measures.
    """
    for key in config[name]:
        if key in _TAKEN_OVER or key in fixed:
            raise ConfigError(f"{name} has {key}, which follows from the keys of this run: leave it out there.")
    return config[name]


def keys_of(parent: Parent, child: Config) -> dict[str, Any]:
    """All keys of a parent that is made for `child`."""
    shared = {key: value for key, value in child.resolved().items() if key in _TAKEN_OVER}
    return {**shared, **parent.keys}


def config_of(parent: Parent, child: Config) -> Config:
    """The config of a parent that is made for `child`.

    Raises:
        ConfigError: a key that it does not have, or a value out of range.
    """
    try:
        return Config(parent.model, child["dataset"], None, keys_of(parent, child))
    except ConfigError as error:
        raise ConfigError(f"{child['model']} needs {parent.name}: {error}") from error


def check_given(parent: Parent, child: Config, item_tokens: list[str]) -> None:
    """Holds a run that the user names against what the child needs.

    Raises:
        ConfigError: it is no finished run, or of another model, protocol or shape. DataError: it has other items, or is damaged.
    """
    folder = Path(parent.folder or "")
    stored = run_folder.read_config(folder)
    if run_folder.read_result(folder) is None:
        raise ConfigError(f"{parent.given} is {folder}, which is not finished: go on with it by --resume={folder}.")
    if stored["model"] != parent.model:
        raise ConfigError(
            f"{parent.given} is {folder}, a run of {stored['model']}: {child['model']} needs one of {parent.model}."
        )
    # Otherwise it was trained on other rows, those of this run's test among them.
    for key in ("protocol", "MAX_ITEM_LIST_LENGTH"):
        if stored.get(key) != child.resolved()[key]:
            raise ConfigError(
                f"{parent.given} is {folder}, trained with {key} {stored.get(key)}, and this run has {child.resolved()[key]}: "
                f"set --{key}={stored.get(key)}, or leave {parent.given} out."
            )
    for key, (value, said_by) in parent.must.items():
        if stored.get(key) != value:
            raise ConfigError(
                f"{parent.given} is {folder}, whose {key} is {stored.get(key)}, and {said_by} asks for {value}: make them fit."
            )
    here, there = weights.items_identity(item_tokens), weights.read(weights_file(folder), note=True).get("items")
    if there != here:
        raise DataError(
            f"{parent.given} is {folder}, trained on other items ({there}) than this run has ({here}): name a run on the same "
            "data."
        )


def weights_file(folder: Path) -> Path:
    """The file of a finished run that names its items: of an LLM recommender its head, of another model all of it."""
    head = Path(folder) / "head.safetensors"
    return head if head.is_file() else Path(folder) / "model.safetensors"
