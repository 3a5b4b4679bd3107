"""Item vectors of another model in a prompt: a frozen table and a trained projector into the backbone's width. Knows torch
alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def frozen_table(n_items: int, width: int) -> nn.Parameter:
    """[n_items, width] float32, zeros until they are taken from another run; no gradient reaches it."""
    return nn.Parameter(torch.zeros(n_items, width), requires_grad=False)


class ItemSlots(nn.Module):
    """What stands in an item's slot: projector(table[item]).

    Args:
        table: [n_items, width of the other model], frozen. projector: from that width to the backbone's.
    """

    def __init__(self, table: nn.Parameter, projector: nn.Module):
        super().__init__()
        self.table, self.projector = table, projector

    def forward(self, items: Tensor) -> Tensor:
        """[S] int64 internal item ids -> [S, d] float32."""
        return self.projector(self.table[items])
