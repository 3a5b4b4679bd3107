"""BIGRec's second step: from what the LLM has written to real items, by distance; and the statistics that re-weight it.

Bao et al., "A Bi-Step Grounding Paradigm for Large Language Models in Recommendation Systems" (arXiv 2308.08434), equation (3).
Knows torch alone. Column 0, padding, takes part in nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Exponents that are tried on validation, as the paper does.
GAMMAS = {
    "popularity": [float(gamma) for gamma in range(100)],
    "cf": [gamma / 100 for gamma in range(100)] + [float(gamma) for gamma in range(1, 100)],
}


def distances(written: Tensor, items: Tensor) -> Tensor:
    """D_si = ||e(written_s) - e(item_i)||_2: [B, d], [n, d] -> [B, n] float32, exactly 0 where both are equal."""
    # Not by the product of both, whose rounding is larger than what sets near titles apart.
    return torch.cdist(written.float(), items.float(), compute_mode="donot_use_mm_for_euclid_dist")


def scaled(values: Tensor) -> Tensor:
    """Each row's values over the items, [..., n], put between 0 and 1: (x - min) / (max - min), 0 where all are equal."""
    low, high = values[..., 1:].aminmax(dim=-1, keepdim=True)
    return ((values - low) / torch.where(high > low, high - low, 1)).clamp(0, 1)


class Grounding(nn.Module):
    """Distances -> scores. Nothing in it is trained: `gamma` is chosen or given, the popularity counted.

    scores = -D without a weight, else -D^ (1 + W)^(-gamma) with D^ and W `scaled`: the nearest item, D^ = 0, stays first.

    Args:
        n_items: internal item ids, padding included. weight: `none`, `popularity` or `cf`. gamma: at the start.
    """

    popularity: Tensor
    gamma: Tensor

    def __init__(self, n_items: int, weight: str, gamma: float | None):
        super().__init__()
        self.weight = weight
        self.register_buffer("gamma", torch.tensor(gamma or 0.0) if weight != "none" else None)
        self.register_buffer("popularity", torch.zeros(n_items) if weight == "popularity" else None)

    def count(self, targets: Tensor) -> None:
        """Takes the training targets [N] int64 for the items' popularity: their share, `scaled`."""
        counts = torch.bincount(targets.cpu(), minlength=len(self.popularity)).double()
        self.popularity.copy_(scaled(counts / counts.sum()))

    def forward(self, distance: Tensor, cf: Tensor | None = None, gamma: Tensor | float | None = None) -> Tensor:
        """[B, n] float32, padding at -inf.

        Args:
            distance: [B, n]. cf: [B, n] scores of another model, where the weight is `cf`. gamma: another than its own.
        """
        if self.weight == "none":
            scores = -distance
        else:
            weight = self.popularity if self.weight == "popularity" else scaled(cf.float())
            scores = -scaled(distance) * (1 + weight) ** -(self.gamma if gamma is None else gamma)
        scores[:, 0] = -torch.inf
        return scores


def best_gamma(gammas: list[float], ranks: Tensor, cut: int) -> tuple[float, float, float]:
    """The exponent with the highest NDCG@cut, the smallest of equal ones.

    Args:
        ranks: [rows, exponents] int64, the target's rank in each row.

    Returns:
        the exponent, its NDCG, and that of the first exponent.
    """
    ndcg = torch.where(ranks <= cut, 1 / (ranks.double() + 1).log2(), 0).mean(0)
    best = int((ndcg == ndcg.max()).nonzero()[0])
    return gammas[best], float(ndcg[best]), float(ndcg[0])
