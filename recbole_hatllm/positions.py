"""What a row teaches when it teaches more than its last item: which item follows each place of its history."""

from __future__ import annotations

import torch
from torch import Tensor


def taught_places(item_seq: Tensor, item_len: Tensor, target: Tensor, target_length: Tensor) -> tuple[Tensor, Tensor]:
    """The places of a history behind which an item is to be predicted, and that item.

    Args:
        item_seq: [B, L] int64, oldest first, padded on the right. item_len: [B] int64. target: [B] int64, the item that
            follows the whole history. target_length: [B] int64, how many items the row teaches, `target` the last.

    Returns:
        [B, L] bool and [B, L] int64; the item is meaningless where the first is False.
    """
    following = item_seq.roll(-1, 1).scatter(1, item_len[:, None] - 1, target[:, None])
    place = torch.arange(item_seq.shape[1], device=item_seq.device)
    taught = (place < item_len[:, None]) & (place >= (item_len - target_length)[:, None])
    return taught, following
