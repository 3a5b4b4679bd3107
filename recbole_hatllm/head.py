"""Vector -> scores of all items, and the loss over them. Knows torch alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from recbole_hatllm.whitening import Whitening

START = 0.02  # standard deviation of the weights before training
PIECE = 2**26  # scores that the loss computes at once: 256 MiB in float32


class LinearHead(nn.Module):
    """Linear projection without bias onto all items (HatLLM, section "prediction"): scores = W h.

    Args:
        n_items: number of internal item ids, the padding item 0 included; it gets no probability and ranks last.
        width: size d of the vector.
        dropout: of the vector, while training.
        whiten: put a `Whitening` before the projection.
    """

    def __init__(self, n_items: int, width: int, dropout: float = 0.0, whiten: bool = False):
        super().__init__()
        # Kept in float32 whatever the backbone's type: ranking ties of rounded scores would be broken arbitrarily.
        weight = torch.randn(n_items, width) * START
        weight[0] = 0
        self.weight = nn.Parameter(weight)
        self.dropout = nn.Dropout(dropout)
        self.whitening = Whitening(width) if whiten else None

    def _factor(self, vector: Tensor) -> Tensor:
        """[B, d] as it is multiplied by the items: in the head's type, whitened, dropped out."""
        vector = vector.to(self.weight.dtype)
        return self.dropout(vector if self.whitening is None else self.whitening(vector))

    def forward(self, vector: Tensor, history: Tensor | None = None) -> Tensor:
        """[B, d] of any float type -> [B, n_items] scores in the head's type, column 0 (padding) at -inf.

        Args:
            history: what the vector was read from; this head needs it not.
        """
        return F.pad(self._factor(vector) @ self.weight[1:].T, (1, 0), value=-torch.inf)

    def loss(
        self, vector: Tensor, target: Tensor, label_smoothing: float = 0.0, *, history: Tensor | None = None
    ) -> Tensor:
        """Mean cross-entropy over all items but padding. vector [B, d], target [B] int64 internal item ids >= 1."""
        return cross_entropy(self._factor(vector), self.weight, target - 1, label_smoothing, first=1)

    @torch.no_grad()
    def start_from(self, vectors: Tensor) -> None:
        """Replaces the weights by `vectors` [n_items, d], centred over the items and scaled to the size of a random start."""
        centred = vectors[1:].float() - vectors[1:].float().mean(0)
        self.weight[1:] = centred * (START / centred.std())


@dataclass(frozen=True)
class Extra:
    """Something on top of some scores. column [B, K] int64: of the scores that get it; share [B, K]: how much of it, 0 for none;
    amount: scalar."""

    column: Tensor
    share: Tensor
    amount: Tensor

    def on(self, scores: Tensor, rows: slice) -> Tensor:
        """`scores` [b, n] of those rows, with it."""
        return scores.scatter_add(1, self.column[rows], self.share[rows] * self.amount)


def cross_entropy(
    vector: Tensor,
    items: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    extra: Extra | None = None,
    first: int = 0,
) -> Tensor:
    """Mean cross-entropy of `target` [B] int64 under the scores vector [B, d] x items[first:] [n, d], and what is on top of them.

    Never more than `PIECE` scores exist at once, whatever B; the loss and its gradients are those of all of them
    together. A fused kernel (cut-cross-entropy, Liger) would keep a piece's scores on the chip; that pays for
    thousands of targets a step or millions of items, runs on NVIDIA alone and is no dependency of this package.
    """
    rows = max(1, PIECE // (len(items) - first))
    if len(vector) > rows:
        amount = vector.new_zeros(()) if extra is None else extra.amount
        return _InPieces.apply(vector, items, amount, extra, target, label_smoothing, rows, first)
    scores = vector @ items[first:].T
    scores = scores if extra is None else extra.on(scores, slice(None))
    return F.cross_entropy(scores, target, label_smoothing=label_smoothing)


class _InPieces(torch.autograd.Function):
    """`cross_entropy`, `rows` vectors at a time; differentiable once.

    Each piece's share of the gradients is added up while its scores are there. Checkpointing the pieces would compute all
    scores a second time and make a gradient of the size of `items` for each piece: measured, twice the time and more
    memory than without pieces (benchmarks/head.py).
    """

    @staticmethod
    def forward(ctx, vector, items, amount, extra, target, label_smoothing, rows, first) -> Tensor:
        total = vector.new_zeros(())
        of_vector, of_items, of_amount = (
            torch.zeros_like(x) if need else None for x, need in zip((vector, items, amount), ctx.needs_input_grad)
        )
        for start in range(0, len(vector), rows):
            piece = slice(start, start + rows)
            scores = vector[piece] @ items[first:].T
            scores = scores if extra is None else extra.on(scores, piece)
            with torch.enable_grad():
                scores.requires_grad_()
                loss = F.cross_entropy(scores, target[piece], label_smoothing=label_smoothing, reduction="sum") / len(
                    vector
                )
            (of_scores,) = torch.autograd.grad(loss, scores)
            total += loss.detach()
            if of_vector is not None:
                of_vector[piece] = of_scores @ items[first:]
            if of_items is not None:
                of_items[first:].addmm_(of_scores.T, vector[piece])
            if of_amount is not None and extra is not None:
                of_amount += (of_scores.gather(1, extra.column[piece]) * extra.share[piece]).sum()
        ctx.gradients = of_vector, of_items, of_amount
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor):
        # In place, and let go of: a copy of the items' gradient is what the pieces are there to avoid.
        of_vector, of_items, of_amount = (x if x is None else x.mul_(scale) for x in ctx.gradients)
        ctx.gradients = None
        return of_vector, of_items, of_amount, None, None, None, None, None
