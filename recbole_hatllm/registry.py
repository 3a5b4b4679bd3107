"""Names -> models, datasets, loaders: ours first, then RecBole's own.

A model is a file: `model/<name>.py` holds the class <Name>, here as in RecBole, so names are known without importing
anything.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from functools import cache
from pathlib import Path

from recbole_hatllm.errors import ConfigError, nearest

_FAMILIES = {
    "recbole.model.sequential_recommender": "sequential",
    "recbole.model.general_recommender": "general",
    "recbole.model.context_aware_recommender": "context-aware",
    "recbole.model.knowledge_aware_recommender": "knowledge-aware",
    "recbole.model.exlib_recommender": "decision-tree",
}
_RUN = {"sequential", "general"}
# Their RecBole datasets add columns (negative histories, entity vectors) that no other model could be compared on.
_OWN_DATASET = {"DIEN", "GRU4RecKG", "KSR"}


@cache
def _models(package: str) -> dict[str, str]:
    """Class name -> module name, for each file of `package` that holds a class of its own name."""
    found = {}
    spec = importlib.util.find_spec(package)
    for path in sorted(Path(spec.submodule_search_locations[0]).glob("*.py")):
        for name in re.findall(r"^class (\w+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
            if name.lower() == path.stem.replace("_", ""):
                found[name] = f"{package}.{path.stem}"
    return found


def own_models() -> list[str]:
    """Names of this package's models."""
    return sorted(_models("recbole_hatllm.model"))


def model_names() -> list[str]:
    """Names of all models that run: ours, then RecBole's sequential and general ones."""
    theirs = {name for package, family in _FAMILIES.items() if family in _RUN for name in _models(package)}
    return own_models() + sorted(theirs - set(own_models()) - _OWN_DATASET)


def model_class(name: str) -> type:
    """The class of a model.

    Raises:
        ConfigError: no model has that name (the nearest ones are named), or it is of a family that is not run here.
    """
    if name in own_models():
        return getattr(importlib.import_module(_models("recbole_hatllm.model")[name]), name)
    if name in _OWN_DATASET:
        raise ConfigError(f"{name} needs data of its own and is not run here: take another model, such as SASRec.")
    for package, family in _FAMILIES.items():
        if name in _models(package):
            if family not in _RUN:
                raise ConfigError(
                    f"{name} is a {family} model of RecBole; only sequential and general models are run here."
                )
            return getattr(importlib.import_module(_models(package)[name]), name)
    raise ConfigError(f"There is no model {name!r}{nearest(name, model_names())}")


def create_dataset(config):
    """The dataset of `config`, the same class for every model.

    Raises:
        DataError: its files are missing or broken.
    """
    from recbole_hatllm.data.dataset import HatDataset

    return HatDataset(config)


def data_loaders(config, dataset):
    """Loaders of the training, validation and test rows.

    All models are evaluated on the same rows; the training loader gives each model the batches of its own kind.

    Raises:
        DataError: there are too few interactions for three parts.
    """
    from recbole.data.utils import create_samplers, get_dataloader

    from recbole_hatllm.data.loaders import RowEvalLoader, replayable

    parts = dataset.build()
    sampler = create_samplers(config, parts[0], parts)[0]
    train = replayable(get_dataloader(config, "train"))(config, parts[0], sampler, shuffle=config["shuffle"])
    return train, *(RowEvalLoader(config, part, None) for part in parts[1:])
