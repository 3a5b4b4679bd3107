"""Beam search with one past for all beams of a row: the tokens of a step are columns, and a mask says whose they are.

    columns   prompt . . . . . | step 0: a b | step 1: c d | step 2: e f
    beam e sees   all          |         a   |           d |         e        where e follows d, and d follows a

A beam that is left behind costs nothing to forget, and one that goes on in two needs no copy of the prompt's keys. What a
beam sees is what a forward pass over its whole text would see, layer by layer: written tokens are template tokens, F = 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from recbole_hatllm.backbone import Backbone
from recbole_hatllm.data.prompt import Prompt
from recbole_hatllm.masks import attention_mask, response_mask
from recbole_hatllm.past import Past
from recbole_hatllm.pool import TokenPool

_NEVER = -1.0e9


@torch.no_grad()
def beam_search(
    backbone: Backbone,
    lm_head: Callable[[Tensor], Tensor],
    prompt: Prompt,
    end: int,
    num_beams: int,
    max_new_tokens: int,
    pool: TokenPool | None = None,
    inputs: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The text that follows each prompt, as HF's `generate` finds it with the same `num_beams`, without sampling.

    A text's score is the mean log-probability of its tokens, the end included. A row ends when `num_beams` texts have ended
    and no beam that goes on has a better mean than the worst of them, or after `max_new_tokens`.

    Args:
        lm_head: [..., d] -> [..., vocabulary] logits, at least float32.
        prompt: B right-padded prompts, on the backbone's device. end: the token that ends a text.
        pool: of the prompt's tokens. inputs: what the backbone is given for the prompt (`LLMRecommender.embed`); else its ids.

    Returns:
        tokens [B, max_new_tokens] int64, `end` behind the text's end; scores [B], at least float32.
    """
    device, rows = prompt.input_ids.device, len(prompt.input_ids)
    length = prompt.valid.sum(1)
    kinds = set(backbone.kinds)
    spans = prompt.span, prompt.is_last, prompt.valid
    masks = {kind: attention_mask(kind, *spans) for kind in kinds}
    past = Past()
    hidden = backbone(prompt.position_ids, masks, pool=pool, past=past, **(inputs or {"input_ids": prompt.input_ids}))
    hidden = hidden[torch.arange(rows, device=device), length - 1][:, None]  # [B, 1, d]
    seen = {kind: response_mask(kind, *spans) for kind in kinds}
    position = prompt.position_ids

    active = torch.arange(rows, device=device)  # rows of the batch that still go on
    found = torch.full((rows, max_new_tokens), end, device=device)
    exact = {"device": device, "dtype": torch.promote_types(hidden.dtype, torch.float32)}
    found_score = torch.empty(rows, **exact)
    scores = torch.zeros(rows, 1, **exact)
    texts = torch.full((rows, 1, max_new_tokens), end, device=device)
    own = torch.zeros(rows, 1, 0, dtype=torch.bool, device=device)  # which written columns belong to a beam
    ended = torch.full((rows, num_beams), _NEVER, **exact)
    ended_texts = torch.full((rows, num_beams, max_new_tokens), end, device=device)
    itself = torch.eye(num_beams, dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        # Each beam times each token; twice as many as beams, as half of them may end here.
        likely = scores[..., None] + lm_head(hidden).log_softmax(-1)
        vocabulary = likely.shape[-1]
        best, at = likely.flatten(1).topk(2 * num_beams)
        parent, token = at // vocabulary, at % vocabulary
        candidates = texts.gather(1, parent[..., None].expand(-1, -1, max_new_tokens))
        candidates[:, :, step] = token
        ends = (token == end) | (step + 1 == max_new_tokens)

        # Only what ends among the first `num_beams` counts as a text.
        counts = ends & (torch.arange(2 * num_beams, device=device) < num_beams)
        ended = torch.cat([ended, torch.where(counts, best / (step + 1), _NEVER)], 1)
        ended, order = ended.topk(num_beams)
        ended_texts = torch.cat([ended_texts, candidates], 1).gather(1, order[..., None].expand(-1, -1, max_new_tokens))

        scores, order = best.masked_fill(ends, _NEVER).topk(num_beams)
        done = (ended.amin(1) > _NEVER) & (scores[:, 0] / (step + 1) <= ended.amin(1)) | ends.all(1)
        found[active[done]], found_score[active[done]] = ended_texts[done, 0], ended[done, 0]
        left = (~done).nonzero()[:, 0]
        if not len(left):
            break
        if len(left) < len(active):
            past.keep(left)
            active, length, position, own, order = (x[left] for x in (active, length, position, own, order))
            seen = {kind: mask[left] for kind, mask in seen.items()}
            scores, parent, token, candidates, ended, ended_texts = (
                x[left] for x in (scores, parent, token, candidates, ended, ended_texts)
            )
        texts = candidates.gather(1, order[..., None].expand(-1, -1, max_new_tokens))
        parent = parent.gather(1, order)
        own = torch.cat(
            [own.gather(1, parent[..., None].expand(-1, -1, own.shape[2])), itself.expand(len(left), -1, -1)], 2
        )
        here = (length + step)[:, None].expand(-1, num_beams)
        position = torch.cat([position, here], 1)
        past.distance = (length + step)[:, None, None] - position[:, None]
        masks = {
            kind: torch.cat([mask[:, None].expand(-1, num_beams, -1), own], 2)[:, None] for kind, mask in seen.items()
        }
        hidden = backbone(here, masks, input_ids=token.gather(1, order), past=past)
    return found, found_score
