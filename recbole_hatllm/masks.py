"""Equations (1)-(5) of HatLLM (arXiv 2510.10955) as pure functions, and the schedule of the layers.

In the paper's words, for a query token j and a key token k: F(j) = 1 if j is a token of an item, B(j, k) = 1 if j and k
are tokens of the same item, L(j) = 1 if j is the last token of its item. "The same item" means the same slot of the
history: a repeated item is two spans.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

KINDS = ("in", "or", "cr", "cr_pre", "cr_all")


def attention_mask(kind: str, span: Tensor, is_last: Tensor, valid: Tensor) -> Tensor:
    """Which key (column) each query (row) may attend to.

    ======== ======== ==============================================================================================
    kind     equation forbids, on top of the causal mask (1)
    ======== ======== ==============================================================================================
    or       (2)      nothing
    in       (3)      F(j) = F(k) = 1 and B(j, k) = 0: other items
    cr_pre   (4)      j != k, F(j) = F(k) = 1 and B(j, k) = 1: other tokens of the same item
    cr       (5)      j != k, F(j) = F(k) = 1 and L(j) L(k) = 0: all pairs of item tokens but last and last
    cr_all   -        as cr, and queries with F(j) = 0 see item tokens only where L(k) = 1
    ======== ======== ==============================================================================================

    By the letter, template tokens (F = 0) are masked by causality alone, as queries and as keys.

    Args:
        kind: one of `KINDS`.
        span: [B, T] int; -1 = template token, k = token of the k-th item of the history.
        is_last: [B, T] bool; last token of an item.
        valid: [B, T] bool; False = padding, on either side: nobody attends to it.

    Returns:
        [B, 1, T, T] bool on the device of `span`, True = may attend. Every row, padding too, keeps its diagonal, so no
        softmax is empty.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"Unknown attention mask {kind!r}: use one of {', '.join(KINDS)}.")
    tokens = span.shape[1]
    item = span >= 0
    pair = item[:, :, None] & item[:, None, :]
    allowed = torch.ones(tokens, tokens, dtype=torch.bool, device=span.device).tril() & valid[:, None, :]
    if kind in ("in", "cr_pre"):
        same = span[:, :, None] == span[:, None, :]
        allowed = allowed & ~(pair & (same if kind == "cr_pre" else ~same))
    elif kind == "cr":
        allowed = allowed & ~(pair & ~(is_last[:, :, None] & is_last[:, None, :]))
    elif kind == "cr_all":
        key_open = (~item | is_last)[:, None, :]
        allowed = allowed & key_open & (~pair | is_last[:, :, None])
    return (allowed | torch.eye(tokens, dtype=torch.bool, device=span.device))[:, None]


def response_mask(kind: str, span: Tensor, is_last: Tensor, valid: Tensor) -> Tensor:
    """Which tokens of the prompt a token behind it may attend to, such as one that is being written: a template token, F = 0.

    By equations (2)-(5) that is every token of the prompt; only `cr_all` leaves of each item its last token alone.

    Args:
        kind, span, is_last, valid: of the prompt, as `attention_mask` takes them.

    Returns:
        [B, T] bool, the same for every such token.
    """
    return valid & ((span < 0) | is_last) if kind == "cr_all" else valid


def branch_mask(branch: Tensor, stem: Tensor) -> Tensor:
    """Which keys a query may see where a prompt has branches, on top of its `attention_mask`.

    A token of a branch sees the columns that its branch continues, and its own branch; the prompt itself sees no branch.

    Args:
        branch: [B, T] int; -1 = the prompt, k = token of the k-th branch. Branches stand behind the prompt.
        stem: [B, T] int; how many columns, from the first, the token's branch continues; 0 outside branches.

    Returns:
        [B, 1, T, T] bool, True = may attend.
    """
    own = branch[:, :, None] == branch[:, None, :]
    before = torch.arange(branch.shape[1], device=branch.device) < stem[:, :, None]
    return (own | before)[:, None]


def schedule(
    n_layers: int, n_in: int, n_cr: int, order: str = "IN-OR-CR", cross_mask: str = "cr", sizes: str = "type"
) -> tuple[str, ...]:
    """The mask kind of each layer, from the first to the last.

    With sizes of the `type`, wherever `order` puts it: n_in layers IN, n_cr layers CR, the rest OR; with sizes of the `position`
    the first n_in layers have the first of the three, and the last n_cr the last. Rows of the paper's Table 5: w/o IN is
    n_in = 0, w/o CR is n_cr = 0, w/o OR is n_in = n_layers - n_cr, BIGRec is both 0, CR->CR-pre is `cross_mask="cr_pre"`, and
    the rows of permutations are `order`.

    Args:
        n_layers: layers of the backbone.
        n_in: layers that attend inside an item.
        n_cr: layers that attend across items.
        order: a permutation of IN, OR and CR, joined by dashes.
        cross_mask: what the CR layers use: `cr`, `cr_pre` or `cr_all`.
        sizes: `type` or `position`.

    Raises:
        ValueError: the counts are negative or exceed n_layers, or order, cross_mask or sizes is none of the above.
    """
    if n_in < 0 or n_cr < 0 or n_in + n_cr > n_layers:
        raise ValueError(
            f"n_in = {n_in} and n_cr = {n_cr} layers do not fit a backbone of {n_layers} layers: "
            f"both must be at least 0 and their sum at most {n_layers}."
        )
    kinds, counts = {"IN": "in", "OR": "or", "CR": cross_mask}, (n_in, n_layers - n_in - n_cr, n_cr)
    names = str(order).upper().split("-")
    if sorted(names) != sorted(kinds):
        raise ValueError(f"order = {order!r} is not a permutation of IN, OR and CR joined by dashes, such as IN-OR-CR.")
    if cross_mask not in ("cr", "cr_pre", "cr_all"):
        raise ValueError(f"cross_mask = {cross_mask!r} is none of cr, cr_pre, cr_all.")
    if sizes not in ("type", "position"):
        raise ValueError(f"sizes = {sizes!r} is none of type, position.")
    size = dict(zip(kinds if sizes == "type" else names, counts))
    return tuple(kinds[name] for name in names for _ in range(size[name]))


def describe(kinds: tuple[str, ...]) -> str:
    """A schedule for people: `layers 0-3 IN | 4-25 OR | 26-27 CR`."""
    parts = []
    for kind, run in groupby(enumerate(kinds), key=lambda pair: pair[1]):
        layers = [layer for layer, _ in run]
        where = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else f"{layers[0]}"
        parts.append(f"{where} {kind.upper().replace('_', '-')}")
    return "layers " + " | ".join(parts)
