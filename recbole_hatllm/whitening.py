"""A fixed linear map that evens out the directions of a set of vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Whitening(nn.Module):
    """h -> A (h - m). A decoder's states share a few directions that dwarf all others; what is learned or compared behind them
    sees little else.

    The identity until `fit`.
    """

    mean: Tensor
    map: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("map", torch.eye(width))

    def forward(self, vectors: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        return (vectors - self.mean) @ self.map

    @torch.no_grad()
    def fit(self, vectors: Tensor, floor: float = 0.1) -> None:
        """Makes `vectors` [N, d] centred and of even directions: m = mean, A = (C + floor tr(C)/d I)^(-1/2) of covariance C."""
        count, total = len(vectors), torch.zeros_like(self.map, dtype=torch.float64)
        mean = sum(part.double().sum(0) for part in vectors.split(8192)) / count
        for part in vectors.split(8192):
            centred = part.double() - mean
            total += centred.T @ centred
        values, directions = torch.linalg.eigh(total / count)
        scale = (values.clamp(min=0) + floor * values.mean()).rsqrt()
        self.mean.copy_(mean)
        self.map.copy_(directions @ torch.diag(scale) @ directions.T)
