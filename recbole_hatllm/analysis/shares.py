"""Who gets how much attention, layer by layer, summed over prompts: numbers alone."""

from __future__ import annotations

import torch
from torch import Tensor

from recbole_hatllm.analysis.pairs import PARTS, parts
from recbole_hatllm.data.prompt import Prompt


class Shares:
    """Sums of attention weights, averaged over heads, over the prompts it was shown; call `begin` for each and then let it watch.

    share(p) = sum of the weights of the pairs of part p / number of queries; mean(p) = that sum / number of pairs. Queries are the
    tokens of items, and parts those of `pairs.parts`, so shares add up to 1. A pair that a mask closes counts with the weight 0.
    """

    def __init__(self, layers: int):
        self.mass = torch.zeros(layers, len(PARTS), dtype=torch.float64)
        self.pairs = torch.zeros(len(PARTS), dtype=torch.float64)
        self.queries = 0
        # Of the readout token: to tokens of items, to their last tokens, to slots. Of all tokens from the first item on: to slots.
        self.readout = torch.zeros(layers, 3, dtype=torch.float64)
        self.slots = torch.zeros(layers, dtype=torch.float64)
        self.prompts = self.behind = 0

    def begin(self, prompt: Prompt) -> None:
        """The prompt whose layers are shown next: one row without padding."""
        span = prompt.span[0]
        self._parts = torch.stack([*parts(span).values()]).flatten(1).double()
        self._readout = int(prompt.readout[0])
        slot = torch.zeros(len(span), dtype=torch.float64, device=span.device)
        if prompt.slots is not None:
            slot[prompt.slots] = 1
        self._keys = torch.stack([(span >= 0).double(), prompt.is_last[0].double(), slot])
        self.pairs += self._parts.sum(1).cpu()
        self.queries += int((span >= 0).sum())
        self.behind += len(span) - int((span >= 0).nonzero()[0])
        self.prompts += 1

    def __call__(self, layer: int, weights: Tensor) -> None:
        """weights [1, heads, T, T] of a layer."""
        weights = weights[0].double().mean(0)
        self.mass[layer] += (self._parts @ weights.flatten()).cpu()
        self.readout[layer] += (self._keys @ weights[self._readout]).cpu()
        self.slots[layer] += (weights @ self._keys[2]).sum().cpu()  # nobody before the first item sees one

    def rows(self, state: str, kinds: tuple[str, ...], slots: bool) -> list[dict]:
        """One line a layer, from 0, and one of all layers together.

        Args:
            state: what to call what was watched. kinds: mask kind of each layer. slots: whether items have slots.
        """
        found = []
        for layer in ("all", *range(len(self.mass))):
            chosen = slice(None) if layer == "all" else slice(layer, layer + 1)
            mass, readout = self.mass[chosen].mean(0), self.readout[chosen].mean(0)
            share, mean = mass / self.queries, mass / self.pairs
            items, last, slot = (readout / self.prompts).tolist()
            row = {"state": state, "layer": layer, "mask": "" if layer == "all" else kinds[layer]}
            for part, value, weight, pairs in zip(PARTS, share.tolist(), mean.tolist(), self.pairs.tolist()):
                row[f"{part}_share"] = value
                row[f"{part}_mean"] = weight if pairs else None
            row |= {"readout_items": items, "readout_last": last}
            to_slots = float(self.slots[chosen].mean()) / self.behind
            row |= {"slots": to_slots if slots else None, "readout_slots": slot if slots else None}
            found.append(row)
        return found
