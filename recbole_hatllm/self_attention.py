"""The self-attention encoder of the original SASRec (Kang and McAuley, 2018) in the form that DROS, DLLM2Rec and LLaRA use.

RecBole's SASRec is another one: two layers, two heads, normalisation after each sub-layer, GELU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SelfAttentionEncoder(nn.Module):
    """Item and position embeddings, one block with one head, a final normalisation.

    Args:
        n_items: internal ids, padding 0 included. longest: items of a history. size: of all vectors.
    """

    def __init__(self, n_items: int, longest: int, size: int, dropout: float):
        super().__init__()
        self.size = size
        self.items = nn.Embedding(n_items, size, padding_idx=0)
        self.positions = nn.Embedding(longest, size)
        for table in (self.items, self.positions):
            nn.init.normal_(table.weight, std=0.01)
        self.before_attention, self.before_feed_forward, self.last = (nn.LayerNorm(size) for _ in range(3))
        self.query, self.key, self.value = (nn.Linear(size, size) for _ in range(3))
        self.inner, self.outer = nn.Linear(size, size), nn.Linear(size, size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, item_seq: Tensor) -> Tensor:
        """The state after each item.

        Args:
            item_seq: [B, L] int64, oldest first, 0 behind the last item.

        Returns:
            [B, L, size]; 0 in padding before the final normalisation.
        """
        real = (item_seq > 0)[..., None]
        place = torch.arange(item_seq.shape[1], device=item_seq.device)
        x = self.dropout(self.items(item_seq) + self.positions(place)) * real
        normed = self.before_attention(x)
        scores = self.query(normed) @ self.key(x).transpose(1, 2) / self.size**0.5
        # Padding stands behind the last item, so that causality alone keeps it from every real place.
        weights = scores.masked_fill(place[None, :] > place[:, None], -torch.inf).softmax(-1)
        x = normed + self.dropout(weights) @ self.value(x)
        normed = self.before_feed_forward(x)
        x = normed + self.dropout(self.outer(self.dropout(self.inner(normed).relu())))
        return self.last(x * real)
