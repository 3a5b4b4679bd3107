"""Rows - a user, a history, a target: where they stand in a table of interactions, and how a batch of them is made."""

from __future__ import annotations

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import Tensor

TARGET_LENGTH = "target_length"  # how many items a training row teaches, its target the last of them


class Rows:
    """Where the rows of a table in time order are.

    A row is named by the place of its target after a stable sort by user, in which each user's items stand together.

    Args:
        users: [N] int64, the user of each interaction, oldest interaction first. longest: items a history can have.
    """

    def __init__(self, users: np.ndarray, longest: int):
        self.longest = longest
        self.order = np.argsort(users, kind="stable")  # place -> line of the table
        sorted_users = users[self.order]
        places = np.arange(len(users))
        _, first, count = np.unique(sorted_users, return_index=True, return_counts=True)
        self.before = places - np.repeat(first, count)  # how many items the user had before
        self.after = np.repeat(count, count) - 1 - self.before
        self.length = np.minimum(self.before, longest)

    def leave_one_out(self) -> list[np.ndarray]:
        """Every item but the first is a target: a user's last is tested, the one before validated, others trained.

        As in RecBole, a user with one row gives it to training, and one with two has none for validation.
        """
        rows = self.before + self.after  # of this user
        test = (self.after == 0) & (rows >= 2)
        valid = (self.after == 1) & (rows >= 3)
        train = (self.before > 0) & ~test & ~valid
        return [self._by_time(np.flatnonzero(part)) for part in (train, valid, test)]

    def windows(self) -> list[np.ndarray]:
        """Each run of longest + 1 items is a row, and a shorter sequence is one as a whole.

        The first 80 % by the target's time are trained, the next 10 % validated, the rest tested.
        """
        ends = (self.before > 0) & ((self.before >= self.longest) | (self.after == 0))
        rows = self._by_time(np.flatnonzero(ends))
        return np.split(rows, [int(0.8 * len(rows)), int(0.9 * len(rows))])

    def covering(self, ends: np.ndarray, stride: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows that teach every item after a user's first up to the last one in `ends`, each item in one row.

        A row teaches its last `stride` items, and all of them where nothing stands before its history; so a user's rows
        lie `stride` items apart, and an item is taught with at least min(longest - stride + 1, all there are) before it.

        Args:
            ends: rows. stride: 1 to `longest`.

        Returns:
            rows in time order, and how many items each teaches, its target included: both [R] int64.
        """
        first, user = np.unique(ends - self.before[ends], return_inverse=True)
        last = np.zeros_like(first)
        np.maximum.at(last, user, ends)
        count = 1 + -(np.minimum(self.longest - self.before[last], 0) // stride)
        step = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
        rows = self._by_time(np.repeat(last, count) - stride * step)
        return rows, np.where(self.before[rows] <= self.longest, self.before[rows], stride)

    def interactions(self, ends: np.ndarray) -> np.ndarray:
        """Lines of the table that occur in the rows `ends`, as history or target; in time order."""
        change = np.zeros(len(self.order) + 1, dtype=np.int64)
        np.add.at(change, ends - self.length[ends], 1)
        np.add.at(change, ends + 1, -1)
        return np.sort(self.order[change.cumsum()[:-1] > 0])

    def _by_time(self, ends: np.ndarray) -> np.ndarray:
        return ends[np.argsort(self.order[ends])]


class RowTable(Interaction):
    """Rows of one part of the data. Histories are kept as places in one list of items, and padded when they are asked for.

    Behaves as RecBole's Interaction with one column more, `history`: [R, longest] int64, oldest item first, 0 behind the
    last. Whoever asks for that column as a whole has it made and kept.

    Args:
        columns: what a row has besides, [R, ...] each. history: name of that column.
        items: [N] int64, all items, each user's side by side and in time order.
        ends: [R] int64 place of each row's target in `items`. length: [R] int64 items of its history.
    """

    def __init__(
        self, columns: dict[str, Tensor], history: str, items: Tensor, ends: Tensor, length: Tensor, longest: int
    ):
        super().__init__(columns)
        self._history, self._items, self._ends, self._length, self._longest = history, items, ends, length, longest

    def _histories(self, index) -> Tensor:
        length = self._length[index][..., None]
        place = torch.arange(self._longest)
        inside = place < length
        return self._items[torch.where(inside, self._ends[index][..., None] - length + place, 0)].where(inside, 0)

    def __getitem__(self, index):
        """A column by its name; the rows of an index - a number, slice, mask or list - as a plain Interaction."""
        if isinstance(index, str):
            if index == self._history and index not in self.interaction:
                self.interaction[index] = self._histories(slice(None))
            return self.interaction[index]
        if isinstance(index, (np.ndarray, list)):
            index = torch.as_tensor(index)
        rows = {name: column[index] for name, column in self.interaction.items()}
        return Interaction({**rows, self._history: self._histories(index)})

    @property
    def columns(self) -> list[str]:
        """Names of all columns."""
        return [*(name for name in self.interaction if name != self._history), self._history]

    def __iter__(self):
        return iter(self.columns)

    def __contains__(self, name):
        return name in self.columns

    def to(self, device, selected_field=None):
        """As RecBole's, on all rows."""
        return self[:].to(device, selected_field)
