"""Beam search against HF's `generate`, and against a search that reads each text whole at every step, whatever the masks."""

import copy

import pytest
import torch
from hypothesis import given, settings
from transformers import AutoConfig, AutoModelForCausalLM

from recbole_hatllm.backbone import Backbone
from recbole_hatllm.data.prompt import Prompt
from recbole_hatllm.generation import beam_search
from recbole_hatllm.lm_head import LMHead
from recbole_hatllm.masks import KINDS, attention_mask, response_mask
from recbole_hatllm.pool import TokenPool
from tests.test_families import FAMILIES, batch
from tests.test_masks import prompts

pytestmark = pytest.mark.versions

END = 3
SCHEDULES = [
    ("or",) * 6,
    ("in", "in", "or", "cr_pre", "cr", "cr_all"),
    ("in", "or", "or", "or", "cr", "cr"),
    ("cr_all",) * 6,
]


def causal_lm(family):
    """A random float64 model whose texts end now and then."""
    config = AutoConfig.for_model(family, **FAMILIES[family], tie_word_embeddings=family != "gpt_neox")
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.25)
        model.get_output_embeddings().weight.data[END] *= 2.5
    return model


def writer(family, kinds=("or",) * 6):
    """A model of HF's, and the same one as backbone and head."""
    model = causal_lm(family)
    identity = {"name": "tiny", "model_type": family, "layers": 6, "hidden_size": 32}
    backbone = Backbone(copy.deepcopy(getattr(model, "model", None) or model.base_model), None, identity)
    backbone.set_schedule(kinds, "eager")
    head = model.get_output_embeddings()
    return model, backbone, LMHead(head.weight, head.bias, getattr(model.config, "final_logit_softcapping", None))


def three_prompts():
    """Prompts of different lengths, right padded, the first two tokens the same in all."""
    ids, _, span, is_last, valid = batch()
    first = torch.tensor([[11, 12]]).expand(3, -1)
    ids, valid = torch.cat([first, ids], 1), torch.cat([torch.ones_like(first).bool(), valid], 1)
    span = torch.cat([torch.full_like(first, -1), span], 1)
    is_last = torch.cat([torch.zeros_like(first).bool(), is_last], 1)
    return Prompt(ids, (valid.cumsum(1) - 1).clamp(min=0), valid, span, is_last, valid.sum(1) - 1, shared=2)


def search(backbone, head, num_beams, pooled, max_new_tokens=10):
    prompt = three_prompts()
    pool = TokenPool.of(prompt.valid, prompt.shared) if pooled else None
    return beam_search(backbone, head, prompt, END, num_beams, max_new_tokens, pool)


@pytest.mark.parametrize("pooled", [False, True], ids=["rows", "pool"])
@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_generate_finds(family, num_beams, pooled):
    """Each of HF's texts from a prompt alone, without padding; ours from a batch."""
    model, backbone, head = writer(family)
    found, _ = search(backbone, head, num_beams, pooled)
    prompt = three_prompts()
    ends = []
    for row, tokens in enumerate(found.tolist()):
        ids = prompt.input_ids[row : row + 1][:, prompt.valid[row]]
        with torch.no_grad():
            expected = model.generate(
                ids, attention_mask=torch.ones_like(ids), num_beams=num_beams, max_new_tokens=10, do_sample=False,
                early_stopping=False, length_penalty=1.0, eos_token_id=END, pad_token_id=END,
            )[0, ids.shape[1] :].tolist()  # fmt: skip
        assert tokens == expected + [END] * (10 - len(expected))
        ends.append(len(expected))
    if num_beams > 1 and family in ("llama", "qwen2", "mistral"):
        assert min(ends) < 10  # the test has power: some text has ended


def whole(backbone, head, prompt, row, text, model=None):
    """Log-probabilities of the next token after a prompt and `text`, by one pass over all of it without a past.

    Of a model with slots, which are filled one by one, the prompt has one row.
    """
    n = int(prompt.valid[row].sum())
    more = torch.tensor(text, dtype=torch.int64)
    ids = torch.cat([prompt.input_ids[row, :n], more])[None]
    span = torch.cat([prompt.span[row, :n], torch.full_like(more, -1)])[None]
    is_last = torch.cat([prompt.is_last[row, :n], torch.zeros_like(more).bool()])[None]
    masks = {k: attention_mask(k, span, is_last, torch.ones_like(is_last)) for k in set(backbone.kinds)}
    inputs = {"input_ids": ids}
    if prompt.slots is not None:
        states = backbone.embed(ids).clone()
        for place, item in zip(prompt.slots.tolist(), prompt.slot_items):
            states[0, place] = model.slots(item[None])[0]
        inputs = {"inputs_embeds": states}
    with torch.no_grad():
        hidden = backbone(torch.arange(ids.shape[1])[None], masks, **inputs)
        return head(hidden[0, -1]).log_softmax(-1)


def slow_search(backbone, head, prompt, row, num_beams, max_new_tokens, end_token=END):
    """The search by its description, with lists: beams [(sum, text)], texts that have ended [(mean, text)]."""
    beams, ended = [(0.0, [])], []
    for step in range(1, max_new_tokens + 1):
        likely = [whole(backbone, head, prompt, row, text) + total for total, text in beams]
        best = sorted(
            ((float(p), [*beams[b][1], token]) for b, probabilities in enumerate(likely) for token, p in enumerate(probabilities)),
            key=lambda candidate: -candidate[0],
        )[: 2 * num_beams]  # fmt: skip
        ends = [text[-1] == end_token or step == max_new_tokens for _, text in best]
        ended += [(total / step, text) for (total, text), end in list(zip(best, ends))[:num_beams] if end]
        ended = sorted(ended, key=lambda text: -text[0])[:num_beams]
        beams = [candidate for candidate, end in zip(best, ends) if not end][:num_beams]
        if not beams or (len(ended) == num_beams and beams[0][0] / step <= ended[-1][0]):
            break
    return ended[0]


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("kinds", SCHEDULES, ids="-".join)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt_neox"])
def test_a_past_gives_what_reading_the_whole_text_gives(family, kinds, num_beams):
    """A written token has F = 0 in every layer; with a window as well, whose positions are not the columns."""
    _, backbone, head = writer(family, kinds)
    found, scores = search(backbone, head, num_beams, pooled=True, max_new_tokens=6)
    for row in range(3):
        mean, text = slow_search(backbone, head, three_prompts(), row, num_beams, 6)
        assert found[row].tolist() == text + [END] * (6 - len(text))
        assert abs(scores[row].item() - mean) < 1e-5  # norms and softmax round through float32


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(prompt=prompts())
def test_what_a_written_token_sees_of_its_prompt(kind, prompt):
    span, is_last, valid = (torch.cat([x, x.new_full((len(x), 2), fill)], 1) for x, fill in zip(prompt, (-1, 0, 1)))
    expected = attention_mask(kind, span, is_last, valid)[:, 0, -1]
    assert torch.equal(response_mask(kind, *prompt), expected[:, :-2]) and expected[:, -2:].all()
