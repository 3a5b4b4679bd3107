"""RecBole's evaluator, fed with exact ranks.

RecBole finds hits by `topk`, which breaks ties as the kernel pleases: for Pop, whose scores are counts, that decides the
result. Here each row's rank is counted once - items that score higher, then equal ones with a smaller id - and RecBole's
metrics read it. The same ranks are what a run folder keeps.
"""

from __future__ import annotations

import copy

import torch
from recbole.evaluator import Collector
from recbole.evaluator.collector import DataStruct
from torch import Tensor

from recbole_hatllm import distributed
from recbole_hatllm.errors import DataError

_BY_ROW = (
    "rec.items",
    "rec.meanrank",
    "rec.score",
    "data.label",
)  # what RecBole's own collector adds a batch at a time


def target_ranks(scores: Tensor, target: Tensor) -> Tensor:
    """The place of each row's target among all items, from 1.

    A target at -inf is not to be recommended, as an item of a masked history: it has the last place.

    Args:
        scores: [B, n_items] float, padding at -inf. target: [B] int64 internal item ids.
    """
    own = scores.gather(1, target[:, None])
    better = scores > own
    earlier = torch.arange(scores.shape[1], device=scores.device) < target[:, None]
    rank = 1 + (better | ((scores == own) & earlier)).sum(1)
    return torch.where(own[:, 0] == -torch.inf, scores.shape[1] - 1, rank)


class RankCollector(Collector):
    """RecBole's collector for rows with one target each.

    After an evaluation `ranks` [rows] int64 holds the target's rank in each row, in the dataset's order, and `part` gives
    what RecBole's evaluator reads of some of the rows. Processes share what they have collected before anything is measured,
    so that all come to the same numbers.
    """

    def __init__(self, config):
        super().__init__(config)
        self.ranks = torch.empty(0, dtype=torch.int64)
        self.rows: int | None = None  # of the evaluation, in all processes; None: as many as are collected
        self._batches: list[Tensor] = []
        self._needs_topk = self.register.need("rec.topk")
        setattr(self.register, "rec.topk", False)  # collected here instead

    def eval_batch_collect(self, scores_tensor, interaction, positive_u, positive_i):
        """Adds one batch; scores_tensor [B, n_items], positive_i [B] the target of each row.

        Raises:
            DataError: a score is not a number.
        """
        if scores_tensor.isnan().any():
            raise DataError(
                "The model scores items with nan: its weights have diverged, so train again with a smaller "
                "learning_rate or with dtype: float32."
            )
        super().eval_batch_collect(scores_tensor, interaction, positive_u, positive_i)
        self._batches.append(target_ranks(scores_tensor, positive_i.to(scores_tensor.device)).cpu())

    def get_data_struct(self):
        """What RecBole's evaluator reads; closes the evaluation."""
        own = {name: self.data_struct[name].cpu() for name in _BY_ROW if name in self.data_struct}
        rows = distributed.gather_rows({**own, "ranks": torch.cat([self.ranks[:0], *self._batches])}, self.rows)
        self.ranks, self._batches = rows.pop("ranks"), []
        for name, column in rows.items():
            self.data_struct.set(name, column)
        if self._needs_topk:
            # What RecBole's metrics read: a 1 at the target's place among the first max(topk), and the number of targets.
            hits = torch.arange(1, max(self.topk) + 1) == self.ranks[:, None]
            self.data_struct.set("rec.topk", torch.cat([hits, torch.ones_like(hits[:, :1])], 1).int())
        self._whole = super().get_data_struct()
        return self._whole

    def part(self, chosen: Tensor) -> DataStruct:
        """The rows of the last evaluation at which `chosen` [rows] bool is true, for RecBole's evaluator."""
        struct = copy.copy(self._whole)
        struct._data_dict = {
            name: value[chosen] if name in ("rec.topk", *_BY_ROW) else value
            for name, value in self._whole._data_dict.items()
        }
        return struct
