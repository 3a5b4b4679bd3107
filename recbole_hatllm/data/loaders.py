"""RecBole's loaders, made repeatable: what a batch holds depends on the seed, the epoch and its place, and on
nothing else."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.data.interaction import Interaction
from torch.utils.data import DataLoader, Dataset

from recbole_hatllm import distributed


class Replayable:
    """Over a training loader of RecBole: any batch of any epoch can be made again, with any number of workers.

    Iterating gives one epoch and then moves on to the next; `set_epoch` says which one is next.
    """

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration gives, from 0."""
        self.epoch = epoch

    def batches(self, epoch: int, start: int = 0) -> Iterator[Interaction]:
        """The batches of one epoch from the one at `start` on; those before it are not computed."""
        draw = torch.Generator().manual_seed(0)  # DataLoader would draw from the global one, which belongs to the model
        yield from DataLoader(
            _Epoch(self, epoch),
            batch_size=None,
            sampler=range(start, len(self)),
            num_workers=self.config["worker"],
            collate_fn=_as_is,
            generator=draw,
        )

    def __iter__(self) -> Iterator[Interaction]:
        self.epoch += 1
        return self.batches(self.epoch - 1)


class _Epoch(Dataset):
    """The batches of one epoch by their place."""

    def __init__(self, loader, epoch: int):
        self.loader, self.key = loader, [loader.config["seed"], epoch]
        rows = loader.sample_size
        self.order = np.random.RandomState(self.key).permutation(rows) if loader.shuffle else np.arange(rows)

    def __getitem__(self, place: int) -> Interaction:
        rows = self.order[place * self.loader.step : (place + 1) * self.loader.step]
        with _random_from([*self.key, place]):
            return self.loader.collate_fn(rows)


def _as_is(batch):
    return batch


@contextmanager
def _random_from(key: list[int]):
    """RecBole draws negatives from NumPy's, and transforms from Python's global generator: seeds both by `key` for a
    while."""
    numpy_before, python_before = np.random.get_state(), random.getstate()
    np.random.seed(key)
    random.seed(str(key))
    try:
        yield
    finally:
        np.random.set_state(numpy_before)
        random.setstate(python_before)


@cache
def replayable(loader_class: type) -> type:
    """`loader_class` with `Replayable` over it."""
    return type(f"Replayable{loader_class.__name__}", (Replayable, loader_class), {})


class RowEvalLoader(FullSortEvalDataLoader):
    """Evaluates row by row, each with its one target, whatever the family of the model.

    RecBole does so for sequential models only; it merges a general model's rows by user and masks all that a user took
    before. Here `mask_history` decides, for every model alike, and masks the items of a row's own history. Of several
    processes each has its share of the rows.
    """

    is_sequential = property(lambda self: True, lambda self, value: None)
    sample_size = property(lambda self: len(self.rows), lambda self, value: None)

    def __init__(self, config, dataset, sampler, shuffle=False):
        self.rows = distributed.share_of(len(dataset))
        super().__init__(config, dataset, sampler, shuffle)

    def collate_fn(self, index):
        """The batch of the rows at `index` of this share, as RecBole's trainer takes it."""
        rows = self.rows[index]
        batch, _, row, target = super().collate_fn(rows)
        return batch, self._masked(rows), row, target

    def _masked(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Row and item of every score that the trainer is to set to -inf, [K] int64 each."""
        if not self.config["mask_history"]:
            return None
        history = self._dataset.rows[rows][self._dataset.history_field]
        row, place = history.nonzero(as_tuple=True)
        return row, history[row, place]
