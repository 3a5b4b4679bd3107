"""Users that training never saw. Under the windows protocol most users of the test part are of that kind, and a model with
a vector for each user would score them by its random start: they get the mean vector of the users that were seen."""

from __future__ import annotations

import re

import torch
from torch import nn

_USER_TABLE = re.compile(r"user|ui_emb", re.IGNORECASE)  # as RecBole's models name it


def user_tables(model: nn.Module, n_users: int) -> list[nn.Embedding]:
    """The model's embeddings of users."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings == n_users and _USER_TABLE.search(name)
    ]


@torch.no_grad()
def fill(model: nn.Module, data) -> None:
    """Gives every user outside the training part the mean vector of those inside.

    Args:
        data: a built `HatDataset`, whichever part.
    """
    seen = _seen(data)
    unseen = ~seen
    unseen[0] = False
    for table in user_tables(model, data.user_num):
        here = unseen.to(table.weight.device)
        if here.any():
            table.weight[here] = table.weight[seen.to(table.weight.device)].mean(0)


def describe(model: nn.Module, data) -> dict:
    """`rows`: how many rows of the part `data` are of users that training never saw; `mean_vector`: whether the model has
    vectors of users, so that those rows are scored by their mean."""
    seen = _seen(data)[data.inter_feat[data.uid_field]]
    return {"rows": int((~seen).sum()), "mean_vector": bool(user_tables(model, data.user_num))}


def _seen(data) -> torch.Tensor:
    """[users] bool."""
    seen = torch.zeros(data.user_num, dtype=torch.bool)
    seen[data.seen[data.uid_field]] = True
    return seen
