"""Vector -> scores of all items, and the loss over them. Knows torch alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LinearHead(nn.Module):
    """Linear projection without bias onto all items (HatLLM, section "prediction"): scores = W h.

    Args:
        n_items: number of internal item ids, the padding item 0 included; it gets no probability and ranks last.
        width: size d of the vector.
        init: [n_items, d] float tensor to start from, or None for N(0, 0.02^2).
        dropout: of the vector, while training.
    """

    def __init__(self, n_items: int, width: int, init: Tensor | None = None, dropout: float = 0.0):
        super().__init__()
        # Kept in float32 whatever the backbone's type: ranking ties of rounded scores would be broken arbitrarily.
        weight = torch.randn(n_items, width) * 0.02 if init is None else init.float().clone()
        weight[0] = 0
        self.weight = nn.Parameter(weight)
        self.dropout = nn.Dropout(dropout)

    def logits(self, vector: Tensor) -> Tensor:
        """[B, d] of any float type -> [B, n_items - 1] in the head's type: the items 1, 2, ..."""
        return self.dropout(vector.to(self.weight.dtype)) @ self.weight[1:].T

    def forward(self, vector: Tensor) -> Tensor:
        """[B, d] -> [B, n_items] scores, column 0 (padding) at -inf."""
        return F.pad(self.logits(vector), (1, 0), value=-torch.inf)

    def loss(self, vector: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy over all items but padding. vector [B, d], target [B] int64 internal item ids >= 1."""
        return F.cross_entropy(self.logits(vector), target - 1, label_smoothing=label_smoothing)
