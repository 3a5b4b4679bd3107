"""Titles or ids in, titles out: a trained run as an object."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from torch import nn

from recbole_hatllm.config import Config
from recbole_hatllm.data.titles import clean, read_catalogue
from recbole_hatllm.errors import ConfigError, DataError
from recbole_hatllm.model.llm import LLMRecommender
from recbole_hatllm.trained import Catalogue, load_model


@dataclass(frozen=True)
class Recommendation:
    """One place of a list: `rank` from 1, the item's id as in the files, its title, and the model's score."""

    rank: int
    item: str
    title: str
    score: float


class TrainedRun:
    """A finished run folder, loaded. `model` is the evaluated model, `config` and `result` are what the run left."""

    def __init__(self, folder: Path, config: Config, model: nn.Module, items: Catalogue, result: dict):
        self.folder, self.config, self.model, self.items, self.result = folder, config, model, items, result
        self.candidates = torch.arange(1, items.item_num)  # what is recommended

    def offer(self, file: str | Path) -> None:
        """Recommends from now on only the items of an `.item` file, such as training never saw; histories may name any item.

        The file has the columns of the run's data. An item whose id the run knows keeps what training taught of it.

        Raises:
            DataError: the file, or a title in it, is missing. ConfigError: the model has no vector for a new item.
        """
        config, known = self.config, {token: index for index, token in enumerate(self.items.item_tokens)}
        tokens, titles = read_catalogue(
            Path(file), config["ITEM_ID_FIELD"], config["title_field"], config["year_field"]
        )
        new = [(token, title) for token, title in zip(tokens, titles) if token not in known]
        if new:
            if not isinstance(self.model, LLMRecommender):
                raise ConfigError(
                    f"{config['model']} cannot score items that it was not trained on; HatLLM with --head=title can."
                )
            items = Catalogue(
                [*self.items.item_tokens, *(token for token, _ in new)],
                [*self.items.titles, *(title for _, title in new)],
            )
            self.model.add_items(items.titles)
            self.items = items
            self.__dict__.pop("_by_name", None)
            known |= {token: index for index, token in enumerate(items.item_tokens)}
        self.candidates = torch.tensor([known[token] for token in tokens])

    @cached_property
    def _by_name(self) -> dict[str, int]:
        """Internal id by id and by title, in lower case; ids win over titles, then the first item of a title."""
        names: dict[str, int] = {}
        for kind in (self.items.item_tokens, self.items.titles):
            for index, name in enumerate(kind[1:], 1):
                names.setdefault(name.lower(), index)
        for index, title in enumerate(self.items.titles[1:], 1):  # "Heat" for "Heat (1995)"
            names.setdefault(title.rsplit(" (", 1)[0].lower(), index)
        return names

    def find(self, item: str) -> int:
        """Internal id of an item named by its id or its title.

        Raises:
            DataError: nothing has that name; the nearest titles are named.
        """
        name = clean(str(item)).lower()
        if name not in self._by_name:
            near = difflib.get_close_matches(name, self._by_name, n=3, cutoff=0.5)
            hint = " or ".join(repr(self.items.titles[self._by_name[n]]) for n in dict.fromkeys(near))
            raise DataError(f"No item is called {item!r}" + (f"; did you mean {hint}?" if hint else "."))
        return self._by_name[name]

    def recommend(self, history: Sequence[str], k: int = 10) -> list[Recommendation]:
        """The `k` items with the highest scores after `history`, which names items oldest first by id or title.

        As in the evaluation, only the last `MAX_ITEM_LIST_LENGTH` items count, and may come again unless the run has
        `mask_history`.

        Raises:
            DataError: an unknown item or an empty history. ConfigError: `k` out of range, or a model that knows users only.
        """
        if not isinstance(self.model, SequentialRecommender):
            raise ConfigError(
                f"{self.config['model']} scores items for the users it was trained on and cannot read a history."
            )
        found = [self.find(item) for item in history][-self.config["MAX_ITEM_LIST_LENGTH"] :]
        if not found:
            raise DataError("The history is empty: name at least one item by its title or id.")
        masked = torch.tensor(found if self.config["mask_history"] else [0])
        offered = self.candidates[~torch.isin(self.candidates, masked)]
        if not 1 <= k <= (rest := len(offered)):
            outside = " outside the history" if self.config["mask_history"] else ""
            raise ConfigError(f"k is {k}, and must be from 1 to the {rest} items there are{outside}.")
        sequence = torch.zeros(1, self.config["MAX_ITEM_LIST_LENGTH"], dtype=torch.int64)
        sequence[0, : len(found)] = torch.tensor(found)
        row = {
            self.model.ITEM_SEQ: sequence,
            self.model.ITEM_SEQ_LEN: torch.tensor([len(found)]),
            self.model.USER_ID: torch.zeros(1, dtype=torch.int64),
        }
        self.model.eval()
        with torch.no_grad():
            scores = self.model.full_sort_predict(Interaction(row).to(self.config["device"])).view(-1)
        best = scores[offered.to(scores.device)].topk(k)
        indices = offered[best.indices.cpu()].tolist()
        return [
            Recommendation(place, self.items.item_tokens[index], self.items.titles[index], score)
            for place, (index, score) in enumerate(zip(indices, best.values.tolist()), 1)
        ]


def listing(rows: Sequence[Recommendation]) -> str:
    """One line a recommendation, for the terminal."""
    return "\n".join(f"{row.rank:>3}. {row.title}  [item {row.item}, score {row.score:.2f}]" for row in rows)


def load(folder: str | Path) -> TrainedRun:
    """Loads a finished run. An LLM recommender needs its backbone and the folder; another model needs its data too.

    Raises:
        ConfigError: not a run folder, or an unfinished one.
        DataError: damaged or foreign weights; what differs is named.
    """
    return TrainedRun(Path(folder), *load_model(folder))
