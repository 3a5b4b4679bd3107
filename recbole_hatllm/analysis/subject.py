"""What is analysed: a finished run of an LLM recommender, its test rows, one user's row of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recbole_hatllm import registry, run_folder
from recbole_hatllm.config import Config
from recbole_hatllm.data.prompt import Prompt
from recbole_hatllm.errors import ConfigError, DataError, nearest
from recbole_hatllm.masks import attention_mask
from recbole_hatllm.model.llm import LLMRecommender
from recbole_hatllm.trained import Catalogue, load_model
from recbole_hatllm.transfer import to_device

Watch = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Subject:
    """A run with its model on its device, and the test part of its data as `HatDataset.build` makes it."""

    folder: Path
    config: Config
    model: LLMRecommender
    items: Catalogue
    test: object

    def history(self, row: int) -> tuple[Tensor, Tensor]:
        """Items [1, L] int64, oldest first and padded with 0, and their number [1] of one test row."""
        return history(self.test, row)

    def prompt(self, row: int) -> Prompt:
        """The prompt of one test row, without padding, on the model's device."""
        return to_device(self.model.prompts(*self.history(row)), self.model.device)


def open_run(folder: str | Path) -> Subject:
    """A finished run of an LLM recommender.

    Raises:
        ConfigError: no run folder, not finished, or another kind of model. DataError: the data is no longer that of the run.
    """
    folder = must_be_llm(folder)
    config, model, items, _ = load_model(folder, {"compile": False})  # compiled layers could not tell their weights
    test = test_part(config)
    if test.item_tokens != items.item_tokens:
        raise DataError(
            f"The items of {config['dataset']} in {config['data_path']} are no longer those of {folder}: bring the data back "
            "as it was, or train again."
        )
    return Subject(folder, config, model, items, test)


def must_be_llm(folder: str | Path) -> Path:
    """The folder of a run, if its model is an LLM recommender; nothing is loaded.

    Raises:
        ConfigError: it is no run folder, or another model's.
    """
    folder = Path(folder)
    if not is_llm(name := run_folder.read_config(folder)["model"]):
        raise ConfigError(
            f"{folder} is a run of {name}, which is no LLM recommender: name a run of one, such as HatLLM."
        )
    return folder


def is_llm(model: str) -> bool:
    """Whether the model of this name reads prompts."""
    return bool(getattr(registry.model_class(model), "is_llm", False))


def test_part(config):
    """The test part of the data of `config`; its `rows` are a RowTable for models of every family."""
    return registry.create_dataset(config).build()[2]


def history(test, row: int) -> tuple[Tensor, Tensor]:
    """Items [1, L] int64 and their number [1] of one row of a test part."""
    found = test.rows[[row]]
    return found[test.history_field], found[test.item_list_length_field]


def row_of(test, user: str) -> int:
    """The user's test row, the last one where there are several.

    Raises:
        DataError: there is no such user, the nearest are named; or none of the test rows is the user's.
    """
    field, user = test.uid_field, str(user)
    known = test.field2token_id[field]
    if user not in known or user == "[PAD]":
        raise DataError(f"There is no user {user!r} in {test.dataset_name}{nearest(user, [*known][1:])}")
    rows = (test.rows[field] == known[user]).nonzero()
    if not len(rows):
        some = ", ".join(test.id2token(field, test.rows[field][:3].numpy()))
        raise DataError(f"The user {user!r} of {test.dataset_name} has no test row: take one that has, such as {some}.")
    return int(rows[-1])


def paired(first: Path, second: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """`ranks.npz` of two finished runs.

    Raises:
        ConfigError: a run is not finished, or their rows, candidates or protocols differ.
    """
    results = [run_folder.read_result(folder) for folder in (first, second) if run_folder.read_config(folder)]
    for folder, result in zip((first, second), results):
        if result is None:
            raise ConfigError(f"The run in {folder} is not finished: go on with --resume={folder}.")
    ranks = [run_folder.read_ranks(folder) for folder in (first, second)]
    for name in ("dataset", "protocol", "candidates", "history_masked"):
        ours, theirs = (result[name] for result in results)
        if ours != theirs:
            raise ConfigError(f"{first} has {name} {ours} and {second} {theirs}: compare runs on the same rows.")
    if not all(np.array_equal(ranks[0][name], ranks[1][name]) for name in ("user", "target")):
        ours, theirs = (len(found["rank"]) for found in ranks)
        raise ConfigError(
            f"The {ours} test rows of {first} are not the {theirs} of {second}: give both runs the same data and eval_sample."
        )
    return ranks[0], ranks[1]


def masks_of(prompt: Prompt, kinds: tuple[str, ...]) -> dict[str, Tensor]:
    """[1, 1, T, T] bool by kind."""
    return {kind: attention_mask(kind, prompt.span, prompt.is_last, prompt.valid) for kind in dict.fromkeys(kinds)}


@torch.no_grad()
def attend(
    model: LLMRecommender, prompt: Prompt, inputs: dict[str, Tensor], watch: Watch, bare: bool = False
) -> Tensor:
    """Reads one prompt as a ranking does; `watch` is told each layer's weights [1, heads, T, T] in turn.

    Args:
        inputs: `model.embed(prompt)`. bare: by the backbone as it was pretrained, without adapters and with plain causal attention.

    Returns:
        [1, T, d] hidden states.
    """
    masks = masks_of(prompt, model.backbone.kinds)
    if bare:
        masks = dict.fromkeys(masks, masks_of(prompt, ("or",))["or"])
    with model.backbone.without_adapters() if bare else nullcontext():
        return model.backbone(prompt.position_ids, masks, watch=watch, **inputs)
