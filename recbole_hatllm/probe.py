"""Linear probing before fine-tuning: the head is fitted to what the bare backbone already says of the training histories.

A small step of LoRA needs a forward and a backward pass; the head alone needs neither once the readout vectors are kept.
So a head over thousands of items sees every target several times in the time that fine-tuning sees a few per cent of
them, and fine-tuning starts from a head that already ranks (Kumar et al., "Fine-Tuning can Distort Pretrained Features and
Underperform Out-of-Distribution", arXiv 2202.10054).
"""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

from recbole_hatllm.head import LinearHead
from recbole_hatllm.title_head import TitleHead


@torch.no_grad()
def readouts(model, interaction, batch_size: int, show_progress: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What `model.pairs` gives for training rows, of all of them: vectors [N, d] in the backbone's type, targets [N] and
    histories [N, L], on the model's device."""
    model.eval()
    parts = []
    starts = range(0, len(interaction), batch_size)
    for start in tqdm(starts, desc="read", unit="batch", disable=not show_progress, ncols=100):
        parts.append(model.pairs(interaction[start : start + batch_size]))
    vectors, targets, history = zip(*parts)
    return torch.cat(vectors), torch.cat(targets), torch.cat(history)


def fit(
    head: LinearHead | TitleHead,
    vectors: Tensor | None,
    targets: Tensor,
    history: Tensor,
    epochs: int,
    lr: float,
    batch_size: int,
    show_progress: bool = False,
) -> float:
    """Trains `head` on fixed vectors by AdamW, 20 steps of warm-up and linear decay; returns the last epoch's mean loss.

    Args:
        vectors: [N, d]; None for a head that can do without. targets: [N] int64. history: [N, L] int64.
    """
    head.train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.0)
    batches = -(-len(targets) // batch_size)
    step, mean = 0, 0.0
    bar = tqdm(total=epochs * batches, desc="probe", unit="step", disable=not show_progress, ncols=100)
    for _ in range(epochs):
        losses = []
        for rows in torch.randperm(len(targets)).to(targets.device).split(batch_size):
            optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 20) * (1 - step / (epochs * batches))
            optimizer.zero_grad()
            given = None if vectors is None else vectors[rows]
            loss = head.loss(given, targets[rows], history=history[rows])
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            step += 1
            bar.update()
        mean = torch.stack(losses).mean().item()
    bar.close()
    return mean
