"""Vector -> scores of all items, and the loss over them. Knows torch alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

START = 0.02  # standard deviation of the weights before training


class LinearHead(nn.Module):
    """Linear projection without bias onto all items (HatLLM, section "prediction"): scores = W h.

    Args:
        n_items: number of internal item ids, the padding item 0 included; it gets no probability and ranks last.
        width: size d of the vector.
        dropout: of the vector, while training.
        whiten: put a fixed linear map before the projection, h -> A (h - m), that `fit_whitening` sets.
    """

    mean: Tensor
    whitener: Tensor

    def __init__(self, n_items: int, width: int, dropout: float = 0.0, whiten: bool = False):
        super().__init__()
        # Kept in float32 whatever the backbone's type: ranking ties of rounded scores would be broken arbitrarily.
        weight = torch.randn(n_items, width) * START
        weight[0] = 0
        self.weight = nn.Parameter(weight)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mean", torch.zeros(width) if whiten else None)
        self.register_buffer("whitener", torch.eye(width) if whiten else None)

    def logits(self, vector: Tensor) -> Tensor:
        """[B, d] of any float type -> [B, n_items - 1] in the head's type: the items 1, 2, ..."""
        vector = vector.to(self.weight.dtype)
        if self.whitener is not None:
            vector = (vector - self.mean) @ self.whitener
        return self.dropout(vector) @ self.weight[1:].T

    def forward(self, vector: Tensor) -> Tensor:
        """[B, d] -> [B, n_items] scores, column 0 (padding) at -inf."""
        return F.pad(self.logits(vector), (1, 0), value=-torch.inf)

    def loss(self, vector: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy over all items but padding. vector [B, d], target [B] int64 internal item ids >= 1."""
        return F.cross_entropy(self.logits(vector), target - 1, label_smoothing=label_smoothing)

    @torch.no_grad()
    def start_from(self, vectors: Tensor) -> None:
        """Replaces the weights by `vectors` [n_items, d], centred over the items and scaled to the size of a random start."""
        centred = vectors[1:].float() - vectors[1:].float().mean(0)
        self.weight[1:] = centred * (START / centred.std())

    @torch.no_grad()
    def fit_whitening(self, vectors: Tensor, floor: float = 0.1) -> None:
        """Centres `vectors` [N, d] and evens out their directions: m = mean, A = (C + floor tr(C)/d I)^(-1/2) of covariance C.

        A decoder's states share a few directions that dwarf all others; a head behind them learns little else for long.
        """
        count, total = len(vectors), torch.zeros_like(self.whitener, dtype=torch.float64)
        mean = sum(part.double().sum(0) for part in vectors.split(8192)) / count
        for part in vectors.split(8192):
            centred = part.double() - mean
            total += centred.T @ centred
        values, directions = torch.linalg.eigh(total / count)
        scale = (values.clamp(min=0) + floor * values.mean()).rsqrt()
        self.mean.copy_(mean)
        self.whitener.copy_(directions @ torch.diag(scale) @ directions.T)
