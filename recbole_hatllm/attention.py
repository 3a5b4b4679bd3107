"""How each layer of a HF decoder gets its own mask: transformers' AttentionInterface.

The decoder's attention modules call one function of ours; it picks the mask of the module's kind out of a dict that
travels as a keyword of each forward call. Not a hook and not state on the modules: what gradient checkpointing computes
again later must see the masks of its own batch, and keywords do so on every version of transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from recbole_hatllm.errors import BackboneError

# transformers looks for "sdpa", "flash" and "flex" inside such names, so ours contains none of them.
NAME = "hatllm"
# Entries of hat_masks beside those of the kinds: a TokenPool, the mask of what all its rows begin with, a Past, and who is told
# the weights.
POOL, BEGINNING, PAST, WATCH = "pool", "beginning", "past", "watch"


def hat_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    hat_masks: dict | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """The attention of one layer by the mask of its kind; the family's own kernel does the rest.

    Args:
        module: an attention module that `attach` has marked.
        query, key, value: [B, heads, T, d], or of a token pool [1, heads, P + N, d]; with a past, of the tokens behind it.
        attention_mask: not read; transformers builds none for a name it does not know.
        hat_masks: from `additive`, with the pool if there is one; the keyword of the model's forward call.

    Raises:
        BackboneError: the model was called without masks, which would be attention in both directions.
    """
    if hat_masks is None:
        raise BackboneError("The decoder was called without hat_masks: call the Backbone around it.")
    if "calls" in hat_masks:
        # Score caps and sinks are for the family's own attention alone: sdpa drops them, some versions silently.
        own = kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None
        hat_masks["calls"].append((module.layer_idx, own))
    kernel = module.hat_backend
    if kernel == "auto":  # on CPUs in bfloat16 two products are faster than the fused kernel
        kernel = "sdpa" if query.is_cuda else "plain"
    if kernel == "eager":
        attend = sys.modules[type(module).__module__].eager_attention_forward
    else:
        attend = {"plain": plain_attention, "sdpa": ALL_ATTENTION_FUNCTIONS["sdpa"]}[kernel]
    masks = [_mask(hat_masks, kind, kwargs.get("sliding_window")) for kind in (module.hat_kind, BEGINNING)]
    pool = hat_masks.get(POOL)
    if (past := hat_masks.get(PAST)) is not None:
        key, value = past.extend(module.layer_idx, key, value, pool)
    if (watch := hat_masks.get(WATCH)) is not None:
        watch(module.layer_idx, attention_weights(module, query, key, value, masks[0], **kwargs))
    if pool is None:
        return attend(module, query, key, value, masks[0].to(query.dtype), **kwargs)

    def in_rows(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return attend(module, query, key, value, mask.to(query.dtype), **kwargs)[0]

    return pool.attend(in_rows, query, key, value, *masks), None


AttentionInterface.register(NAME, hat_attention)


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_,
) -> tuple[Tensor, None]:
    """softmax(scaling query key' + mask) value, in as few passes over the scores as torch has.

    What the families' own eager attention computes, which repeats keys for grouped queries, scales and masks in passes of their
    own, and goes through float32 and back: torch's softmax rounds once, from float32 inside, and keeps a third of the bytes.

    Args:
        query: [B, heads, T, d]. key, value: [B, groups, S, d]. mask: [B or 1, 1, T, S], to be added.

    Returns:
        [B, T, heads, d] and None.
    """
    rows, heads, tokens, width = query.shape
    groups, keys = key.shape[1:3]
    query = query * (width**-0.5 if scaling is None else scaling)  # before the product, which has more numbers
    scores = query.reshape(rows * groups, -1, width) @ key.reshape(rows * groups, keys, width).transpose(1, 2)
    scores.view(rows, groups, -1, tokens, keys).add_(mask[:, :, None])
    weights = F.dropout(scores.softmax(-1), dropout, module.training)
    mixed = weights @ value.reshape(rows * groups, keys, width)
    return mixed.view(rows, heads, tokens, width).transpose(1, 2), None


def attention_weights(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs) -> Tensor:
    """How much each query gives to each key, by the family's own attention, score caps included: [B, heads, T, S] float32 or wider.

    Args:
        query: [B, heads, T, d]. key, value: [B, groups, S, d]. mask: [B, 1, T, S], to be added.
    """
    eager = sys.modules[type(module).__module__].eager_attention_forward
    wide = torch.promote_types(query.dtype, torch.float32)
    return eager(module, *(part.to(wide) for part in (query, key, value, mask)), **kwargs)[1]


def additive(masks: dict[str, Tensor], dtype: torch.dtype) -> dict:
    """Masks as numbers to add to the scores: 0 = may attend, the least finite number = may not.

    Args:
        masks: [B, 1, T, T] bool by kind.
        dtype: of the queries. Eager attention would add a bool mask as 0 and 1, without an error.
    """
    closed = torch.finfo(dtype).min
    return {
        kind: torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, closed)
        for kind, mask in masks.items()
    }


def _mask(masks: dict, kind: str, window: int | None) -> Tensor | None:
    """The mask of a kind; for layers that see the latest `window` columns only, made once a call of the model."""
    mask = masks.get(kind)
    if mask is None or not window or window >= mask.shape[-1]:
        return mask
    if (kind, window) not in masks:
        past = masks.get(PAST)
        if past is None or past.distance is None:
            column = torch.arange(mask.shape[-1], device=mask.device)
            too_old = column[-mask.shape[-2] :, None] - column >= window  # the mask may have the last rows only
        else:  # columns do not stand in the order of positions
            too_old = past.distance[:, None] >= window
        masks[kind, window] = mask.masked_fill(too_old, torch.finfo(mask.dtype).min)
    return masks[kind, window]


def attach(model: nn.Module, kinds: Sequence[str], attention: str = "auto") -> None:
    """Makes layer l of a HF decoder attend by the mask of kinds[l].

    Args:
        model: a decoder without LM head.
        kinds: one mask kind a layer.
        attention: `plain`, `sdpa`, `eager` for the family's own, or `auto` for the fastest one that is exact for the family.

    Raises:
        BackboneError: the family does not route its attention through AttentionInterface, or the kernel is not exact.
    """
    if attention not in ("auto", "eager", "plain", "sdpa"):
        raise BackboneError(f"attention = {attention!r} is none of auto, eager, plain, sdpa.")
    family = model.config.model_type
    modules = {}
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int) and "Attention" in type(module).__name__:
            modules.setdefault(module.layer_idx, []).append(module)
    other = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if sorted(modules) != list(range(len(kinds))) or any(len(found) > 1 for found in modules.values()) or other:
        raise BackboneError(_refusal(family, f"{len(kinds)} plain attention layers are needed"))

    before = model.config._attn_implementation
    for layer, (module,) in modules.items():
        module.hat_kind, module.hat_backend = kinds[layer], "eager"
        getattr(module, "config", model.config)._attn_implementation = NAME
    model.config._attn_implementation = NAME
    try:
        calls = _probe(model, set(kinds))
    except Exception as error:  # what a family does with a name that it does not know is its own business
        model.config._attn_implementation = before
        raise BackboneError(_refusal(family, f"{type(error).__name__}: {error}")) from error
    if sorted(layer for layer, _ in calls) != list(range(len(kinds))):
        model.config._attn_implementation = before
        raise BackboneError(_refusal(family, f"{len(calls)} calls for {len(kinds)} layers"))

    exact = getattr(model, "_supports_sdpa", True) and not any(own for _, own in calls)
    if attention in ("plain", "sdpa") and not exact:
        raise BackboneError(f"{attention} attention is not exact for {family}: set attention to eager or auto.")
    if attention == "auto" and not exact:
        attention = "eager"
    for (module,) in modules.values():
        module.hat_backend = attention


def _probe(model: nn.Module, kinds: set[str]) -> list[tuple[int, bool]]:
    """Runs two tokens; the layers that called `hat_attention`, each with whether only the family's kernel is exact."""
    device = model.device
    positions = torch.arange(2, device=device)[None]
    causal = torch.ones(1, 1, 2, 2, dtype=torch.bool, device=device).tril()
    masks = additive(dict.fromkeys(kinds, causal), model.get_input_embeddings().weight.dtype)
    masks["calls"] = []
    training = model.training
    model.eval()  # no dropout: nothing is drawn
    try:
        with torch.no_grad():
            model(input_ids=positions, position_ids=positions, use_cache=False, hat_masks=masks)
    finally:
        model.train(training)
    return masks["calls"]


def _refusal(family: str, detail: str) -> str:
    return (
        f"{family} does not route attention through AttentionInterface in this version of transformers ({detail}), so "
        "its layers cannot get masks of their own: use a family that does, such as llama, qwen3, mistral or gemma3."
    )
