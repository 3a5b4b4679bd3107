"""Losses of sequential recommenders, as pure functions of scores."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def sampled_loss(kind: str, positive: Tensor, negative: Tensor) -> Tensor:
    """Mean loss of each target's score beside that of one sampled negative item.

    Args:
        kind: bce and mse compare both with their labels 1 and 0, over all 2N scores; bpr compares the two with each other.
        positive, negative: [N] scores.
    """
    if kind == "bpr":
        return -F.logsigmoid(positive - negative).mean()
    compare = {"bce": F.binary_cross_entropy_with_logits, "mse": F.mse_loss}[kind]
    scores = torch.cat([positive, negative])
    return compare(scores, torch.cat([torch.ones_like(positive), torch.zeros_like(negative)]))


def dro_loss(scores: Tensor, target: Tensor, weight: Tensor, radius: float) -> Tensor:
    """DROS' distributionally robust term: the log-sum-exp, over all items, of the weighted squared error of a score to its
    label, log sum_i exp(p_i (y_i - 1[i = t])^2 / radius), mean over targets.

    Args:
        scores: [N, n] of all items. target: [N] columns. weight: [n] nominal weights p. radius: temperature beta_0 > 0.
    """
    label = F.one_hot(target, scores.shape[1]).to(scores.dtype)
    return (weight * (scores - label).square() / radius).logsumexp(1).mean()


def nominal_weights(targets: Tensor, n_items: int, power: float = 0.05) -> Tensor:
    """DROS' nominal weight of each item, ((c_i + 1) / sum_j (c_j + 1))^power with c_i the times it is a training target:
    not normalised again and nearly flat.

    Args:
        targets: [N] int64 columns from 0 to n_items - 1.
    """
    counts = torch.bincount(targets, minlength=n_items).double() + 1
    return (counts / counts.sum()).pow(power).float()
