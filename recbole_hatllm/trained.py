"""A finished run's model, read from its folder: by `recommend`, and by models that use another run's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from recbole_hatllm import registry, run_folder, weights
from recbole_hatllm.config import Config
from recbole_hatllm.errors import ConfigError


@dataclass(frozen=True)
class Catalogue:
    """The items of a finished run: all an LLM recommender needs to know of its data, read from the run folder."""

    item_tokens: list[str]
    titles: list[str]

    @property
    def item_num(self) -> int:
        """Internal ids, padding included."""
        return len(self.item_tokens)

    def num(self, field: str) -> int:
        """RecBole's name for `item_num`."""
        return self.item_num


def load_model(folder: str | Path, keys: dict | None = None) -> tuple[Config, nn.Module, Catalogue, dict]:
    """Config, model, items and result of a finished run; the model is on its device and in evaluation mode.

    An LLM recommender needs its backbone and the folder; another model needs its data too.

    Args:
        keys: over those of the run's config.

    Raises:
        ConfigError: not a run folder, or an unfinished one.
        DataError: damaged or foreign weights; what differs is named.
    """
    folder = Path(folder)
    stored = run_folder.read_config(folder) | (keys or {})
    result = run_folder.read_result(folder)
    if result is None:
        raise ConfigError(f"The run in {folder} is not finished: go on with --resume={folder}.")
    config = Config(stored.pop("model"), stored.pop("dataset"), config_dict=stored)
    items = source = Catalogue(*run_folder.read_items(folder))
    model_class = registry.model_class(config["model"])
    if not getattr(model_class, "is_llm", False):
        dataset = registry.create_dataset(config)
        source = registry.data_loaders(config, dataset)[0].dataset
    model = model_class(config, source).to(config["device"])
    weights.load_model(model, folder, weights.items_identity(source.item_tokens))
    return config, model.eval(), items, result
