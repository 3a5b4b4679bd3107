"""The tokens of a batch in one row: none of padding, and what all prompts begin with only once.

All that a decoder does token by token - projections, feed-forward layers, norms, adapters - then works on real tokens. Only
attention needs rows: it puts queries, keys and values back into rows, with the shared beginning's keys before each of them.

    padded [3, 7]     A A x x x . .          pool [1, 2 + 3 + 5 + 2]     A A x x x y y y y y z z
                      A A y y y y y
                      A A z z . . .

Exact, in values and in gradients: a token of the beginning sees only tokens before it, so it is the same in every row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenPool:
    """Which token of the padded rows [B, T] is where in the pool [1, P + N].

    shared: P, how many first columns are the same in all rows. rows, columns: B, T. own: [N] int64, places of the other real
    tokens among the flattened [B, T - P]. place: [B, T] int64, where each column is in the pool; 0 for padding.
    """

    shared: int
    rows: int
    columns: int
    own: Tensor
    place: Tensor

    @classmethod
    def of(cls, valid: Tensor, shared: int) -> TokenPool:
        """The pool of rows with real tokens at `valid` [B, T] bool, the first `shared` of them the same in all rows.

        How many real tokens there are is read from `valid`: a GPU is waited for, so make it on the host.
        """
        rows, columns = valid.shape
        apart = valid[:, shared:]
        own = apart.flatten().nonzero()[:, 0]
        place = torch.zeros_like(valid, dtype=torch.int64)
        place[:, :shared] = torch.arange(shared, device=valid.device)
        place[:, shared:][apart] = shared + torch.arange(len(own), device=valid.device)
        return cls(shared, rows, columns, own, place)

    def pack(self, padded: Tensor) -> Tensor:
        """[B, T, ...] -> [1, P + N, ...]."""
        own = padded[:, self.shared :].flatten(0, 1).index_select(0, self.own)
        return torch.cat([padded[0, : self.shared], own])[None]

    def unpack(self, pooled: Tensor) -> Tensor:
        """[1, P + N, d] -> [B, T, d]; padding holds some token's numbers."""
        return pooled[0].index_select(0, self.place.flatten()).view(self.rows, self.columns, -1)

    def attend(
        self, attention: Callable, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, beginning: Tensor
    ) -> Tensor:
        """Attention of pooled tokens by rows.

        Args:
            attention: (query, key, value, mask) -> [rows, columns, heads, d], a decoder's own.
            query, key, value: [1, heads, P + N, d].
            mask: [B, 1, T - P, T], to be added, of the tokens behind the beginning. beginning: [1, 1, P, P], of those in it.

        Returns:
            [1, P + N, heads, d].
        """
        shared = self.shared
        parts = []
        if shared:
            parts.append(attention(query[:, :, :shared], key[:, :, :shared], value[:, :, :shared], beginning)[0])
        by_row = attention(self._in_rows(query), self.whole_rows(key), self.whole_rows(value), mask)
        parts.append(by_row.flatten(0, 1).index_select(0, self.own))
        return torch.cat(parts)[None]

    def whole_rows(self, pooled: Tensor) -> Tensor:
        """[1, heads, P + N, d] -> [B, heads, T, d], the beginning in every row; padding is 0."""
        beginning = pooled[:, :, : self.shared].expand(self.rows, -1, -1, -1)
        return torch.cat([beginning, self._in_rows(pooled)], 2)

    def _in_rows(self, pooled: Tensor) -> Tensor:
        """[1, heads, P + N, d] -> [B, heads, T - P, d], without the beginning; padding is 0."""
        heads, width = pooled.shape[1], pooled.shape[3]
        flat = pooled.new_zeros(self.rows * (self.columns - self.shared), heads, width)
        flat = flat.index_copy(0, self.own, pooled[0, :, self.shared :].transpose(0, 1))
        return flat.view(self.rows, -1, heads, width).transpose(1, 2)
