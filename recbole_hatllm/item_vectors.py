"""What the backbone itself says of each item: vectors of titles, without any history."""

from __future__ import annotations

import torch
from torch import Tensor

from recbole_hatllm.backbone import Backbone
from recbole_hatllm.data.titles import TitleTokens
from recbole_hatllm.masks import attention_mask


@torch.no_grad()
def title_vectors(backbone: Backbone, titles: TitleTokens, batch_size: int = 256) -> Tensor:
    """Mean last hidden state over each title's tokens, read alone with plain causal attention. [n_items, d] float32.

    Items without tokens (padding) get zeros.
    """
    lengths = titles.offsets.diff()
    device = next(backbone.parameters()).device
    vectors = torch.zeros(len(lengths), backbone.hidden_size, device=device)
    for items in lengths.argsort().split(batch_size):
        items = items[lengths[items] > 0]
        if not len(items):
            continue
        column = torch.arange(int(lengths[items].max()))
        valid = column < lengths[items, None]
        ids = titles.ids[(titles.offsets[items, None] + column).clamp(max=len(titles.ids) - 1)] * valid
        valid = valid.to(device)
        span = torch.where(valid, 0, -1)
        mask = attention_mask("or", span, valid, valid)
        hidden = backbone(
            position_ids=(column * valid.cpu()).to(device),
            masks=dict.fromkeys(backbone.kinds, mask),
            input_ids=ids.to(device),
        ).float()
        vectors[items.to(device)] = (hidden * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
    return vectors
