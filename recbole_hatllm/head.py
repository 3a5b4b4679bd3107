"""Vector -> scores of all items, and the loss over them. Knows torch alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

START = 0.02  # standard deviation of the weights before training
PIECE = 2**26  # scores that the loss computes at once: 256 MiB in float32


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
        return self._factor(vector) @ self.weight[1:].T

    def _factor(self, vector: Tensor) -> Tensor:
        """[B, d] as it is multiplied by the items: in the head's type, whitened, dropped out."""
        vector = vector.to(self.weight.dtype)
        if self.whitener is not None:
            vector = (vector - self.mean) @ self.whitener
        return self.dropout(vector)

    def forward(self, vector: Tensor) -> Tensor:
        """[B, d] -> [B, n_items] scores, column 0 (padding) at -inf."""
        return F.pad(self.logits(vector), (1, 0), value=-torch.inf)

    def loss(self, vector: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy over all items but padding. vector [B, d], target [B] int64 internal item ids >= 1.

        Never more than `PIECE` scores exist at once, whatever B; the loss and its gradients are those of all of them
        together. A fused kernel (cut-cross-entropy, Liger) would keep a piece's scores on the chip; that pays for
        thousands of targets a step or millions of items, runs on NVIDIA alone and is no dependency of this package.
        """
        rows = max(1, PIECE // (len(self.weight) - 1))
        if len(vector) <= rows:
            return F.cross_entropy(self.logits(vector), target - 1, label_smoothing=label_smoothing)
        return _InPieces.apply(self._factor(vector), self.weight, target - 1, label_smoothing, rows)

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


class _InPieces(torch.autograd.Function):
    """Mean cross-entropy of `vector @ weight[1:].T`, `rows` vectors at a time; differentiable once.

    Each piece's share of the gradients is added up while its scores are there. Checkpointing the pieces would compute all
    scores a second time and make a gradient of the size of `weight` for each piece: measured, twice the time and more
    memory than without pieces (benchmarks/head.py).
    """

    @staticmethod
    def forward(ctx, vector: Tensor, weight: Tensor, target: Tensor, label_smoothing: float, rows: int) -> Tensor:
        items, total = weight[1:], vector.new_zeros(())
        of_vector, of_weight = (
            torch.zeros_like(x) if need else None for x, need in zip((vector, weight), ctx.needs_input_grad)
        )
        for start in range(0, len(vector), rows):
            piece = slice(start, start + rows)
            with torch.enable_grad():
                scores = (vector[piece].detach() @ items.detach().T).requires_grad_()
                loss = F.cross_entropy(scores, target[piece], label_smoothing=label_smoothing, reduction="sum") / len(
                    vector
                )
            (of_scores,) = torch.autograd.grad(loss, scores)
            total += loss.detach()
            if of_vector is not None:
                of_vector[piece] = of_scores @ items
            if of_weight is not None:
                of_weight[1:].addmm_(of_scores.T, vector[piece])
        ctx.gradients = of_vector, of_weight
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor):
        # In place, and let go of: a copy of the weight's gradient is what the pieces are there to avoid.
        of_vector, of_weight = (x if x is None else x.mul_(scale) for x in ctx.gradients)
        ctx.gradients = None
        return of_vector, of_weight, None, None, None
