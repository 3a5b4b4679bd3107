"""Tokens in a pool give the numbers and gradients of tokens in padded rows, whatever the family, kernel and recomputation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_hatllm.live import on_meta
from recbole_hatllm.pool import TokenPool
from tests.model_contract import build
from tests.test_families import (
    EAGER_ALONE,
    EXACT,
    FAMILIES,
    KINDS,
    ROUNDED,
    ROUNDED_GRADIENT,
    backbone_of,
    batch,
    distance,
    masks_of,
    stock,
)

pytestmark = pytest.mark.versions


def beginning(shared: int):
    """`batch()` behind `shared` template tokens that are the same in all rows."""
    ids, _, span, is_last, valid = batch()
    rows = len(ids)
    first = torch.randint(2, 97, (1, shared), generator=torch.Generator().manual_seed(5)).expand(rows, -1)
    ids = torch.cat([first, ids], 1)
    span = torch.cat([torch.full((rows, shared), -1), span], 1)
    is_last = torch.cat([torch.zeros(rows, shared, dtype=torch.bool), is_last], 1)
    valid = torch.cat([torch.ones(rows, shared, dtype=torch.bool), valid], 1)
    return ids, (valid.cumsum(1) - 1).clamp(min=0), span, is_last, valid


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(0, 4), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_packing_and_unpacking(lengths, shared, seed):
    valid = torch.arange(shared + max(lengths)) < shared + torch.tensor(lengths)[:, None]
    if not valid.any():
        return
    numbers = torch.randn(*valid.shape, 3, generator=torch.Generator().manual_seed(seed))
    numbers[:, :shared] = numbers[:1, :shared]
    pool = TokenPool.of(valid, shared)
    packed = pool.pack(numbers)
    assert packed.shape == (1, shared + sum(lengths), 3)
    assert torch.equal(pool.unpack(packed)[valid], numbers[valid])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("kernel", ["eager", "plain", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pool_changes_nothing(family, kernel, checkpointing):
    """Hidden states and adapter gradients, in float64, with another batch between the forward and the backward pass."""
    if kernel != "eager" and family in EAGER_ALONE:
        pytest.skip("refused: only the family's own attention caps its scores")
    backbone = backbone_of(stock(family))
    backbone.set_schedule(KINDS, kernel)
    backbone.add_lora(3, 6, 0.0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.trainable().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    backbone.train()
    if checkpointing:
        backbone.enable_gradient_checkpointing()

    def outcome(shared, pooled):
        ids, positions, span, is_last, valid = beginning(shared)
        direction = torch.randn(*ids.shape, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        backbone.zero_grad()
        pool = TokenPool.of(valid, shared) if pooled else None
        hidden = backbone(positions, masks_of(span, is_last, valid), input_ids=ids, pool=pool)
        other = batch(seed=1)
        backbone(other[1], masks_of(*other[2:]), input_ids=other[0], pool=TokenPool.of(other[4], 0))
        (hidden * direction * valid[:, :, None])[:, shared:].sum().backward()
        return hidden.detach(), [p.grad.clone() for p in backbone.trainable().values()], valid

    # In families without RMSNorm, plain attention and SDPA compute in float64 throughout; eager attention and RMSNorm round
    # through float32, and rows of another length round otherwise.
    throughout = kernel != "eager" and family in ("gpt_neox", "opt")
    for shared in (0, 3, 9):  # 9 is longer than the sliding windows
        padded, expected, valid = outcome(shared, False)
        pooled, found, _ = outcome(shared, True)
        assert distance(pooled, padded, valid) < (EXACT if throughout else ROUNDED)
        scale = max(float(gradient.abs().max()) for gradient in expected)
        limit = EXACT if throughout else ROUNDED_GRADIENT
        assert max(float((a - b).abs().max()) / scale for a, b in zip(found, expected)) < limit


def test_vectors_in_place_of_ids():
    backbone = backbone_of(stock("llama"))
    backbone.set_schedule(KINDS)
    ids, positions, span, is_last, valid = beginning(4)
    masks, pool = masks_of(span, is_last, valid), TokenPool.of(valid, 4)
    with torch.no_grad():
        by_id = backbone(positions, masks, input_ids=ids, pool=pool)
        by_vector = backbone(positions, masks, inputs_embeds=backbone.embed(ids), pool=pool)
    assert torch.equal(by_id[valid], by_vector[valid])


@pytest.mark.parametrize("targets", ["last", "all"])
@pytest.mark.parametrize("item_span", ["title", "quoted", "segment"])
def test_a_model_does_not_know_its_layout(tiny, item_span, targets):
    """Loss, gradients and scores of a whole model; the padded prompts really have padding and a common beginning."""
    keys = {**tiny, "dtype": "float64", "lora_dropout": 0.0, "item_span": item_span, "targets": targets, "n_cr": 2}
    outcomes = []
    for token_pool in (False, True):
        model, train, test = build("HatLLM", {**keys, "token_pool": token_pool})
        for parameter in model.backbone.trainable().values():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(3))
        rows = train.dataset.inter_feat[:9]
        prompt = model.prompts(rows["item_id_list"], rows["item_length"])
        assert prompt.shared > 5 and not prompt.valid.all()
        assert (prompt.input_ids[:, : prompt.shared] == prompt.input_ids[0, : prompt.shared]).all()
        loss = model.calculate_loss(rows)
        loss.backward()
        gradients = [p.grad for group in model.parameter_groups() for p in group["params"]]
        model.eval()
        with torch.no_grad():
            outcomes.append((loss, gradients, model.full_sort_predict(test.dataset.inter_feat[:7])[:, 1:]))
    # The adapters, the head and the norms compute in float32 even here.
    (loss_a, gradients_a, scores_a), (loss_b, gradients_b, scores_b) = outcomes
    assert abs(loss_a - loss_b) < 1e-6 and (scores_a - scores_b).abs().max() < 1e-5
    for a, b in zip(gradients_a, gradients_b):
        assert (a - b).abs().max() <= 1e-5 * max(1.0, float(a.abs().max()))


@pytest.mark.parametrize("targets", ["last", "all"])
def test_a_step_reads_nothing_from_the_device(tiny, targets):
    """The meta device has no numbers: whatever looks at one there, as a GPU would have to be waited for, raises."""
    model, train, _ = build("HatLLM", {**tiny, "targets": targets})
    rows = model.by_length(train.dataset.inter_feat[:9])
    model.to("meta").device = torch.device("meta")
    with on_meta():
        model.calculate_loss(rows).backward()
    assert all(p.grad.device.type == "meta" for group in model.parameter_groups() for p in group["params"])
