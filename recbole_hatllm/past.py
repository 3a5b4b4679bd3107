"""Keys and values of tokens that a decoder has read, so that one more token costs one token and not the whole text.

It travels beside the masks as a keyword of the forward call, so that every family that takes masks of its own takes a past as
well, whatever transformers' own caches look like in that version.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recbole_hatllm.pool import TokenPool


class Past:
    """What each layer keeps: keys and values [B, groups, columns, d], as they are after the rotation by their positions.

    Attributes:
        distance: [B, T, columns] int64, how many positions each key stands before the query, where columns are not in the order of
            positions; None where they are. Only layers with a sliding window ask.
    """

    def __init__(self):
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.distance: Tensor | None = None

    def extend(self, layer: int, key: Tensor, value: Tensor, pool: TokenPool | None = None) -> tuple[Tensor, Tensor]:
        """Keeps new keys and values behind those of `layer`, and returns what the new queries are to be compared with.

        Args:
            key, value: [B, groups, T, d], or of a pool [1, groups, P + N, d]: the first pass, kept in rows, returned as it is.
        """
        if pool is not None:
            self.layers[layer] = pool.whole_rows(key), pool.whole_rows(value)
            return key, value
        if layer in self.layers:
            key, value = (torch.cat(pair, 2) for pair in zip(self.layers[layer], (key, value)))
        self.layers[layer] = key, value
        return key, value

    def keep(self, rows: Tensor) -> None:
        """Only the rows [K] int64 from now on."""
        self.layers = {layer: (key[rows], value[rows]) for layer, (key, value) in self.layers.items()}
