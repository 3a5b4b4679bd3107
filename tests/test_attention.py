"""Plain attention against torch's own in float64, values and gradients; in bfloat16 within its rounding."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from recbole_hatllm.attention import plain_attention

MODULE = SimpleNamespace(training=True)


def drawn(rows, heads, groups, tokens, keys, width, seed, dtype=torch.float64):
    """query, key, value and an additive mask in which every query sees some key."""
    draw = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(rows, n, t, width, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
        for n, t in ((heads, tokens), (groups, keys), (groups, keys))
    )
    closed = torch.rand(rows, 1, tokens, keys, generator=draw) < 0.5
    closed[..., 0] = False
    mask = torch.zeros(closed.shape, dtype=dtype).masked_fill(closed, torch.finfo(dtype).min)
    return query, key, value, mask


def gradients(out, *inputs):
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    return torch.autograd.grad((out * weight).sum(), inputs)


@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 7), st.integers(1, 9), st.integers(0, 99),
    st.sampled_from([None, 1.0, 0.3]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_it_is_softmax_attention(rows, groups, repeats, tokens, keys, seed, scaling):
    query, key, value, mask = drawn(rows, groups * repeats, groups, tokens, keys, 4, seed)
    found, weights = plain_attention(MODULE, query, key, value, mask, scaling=scaling)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)
    assert weights is None and found.shape == (rows, tokens, groups * repeats, 4)
    assert (found.transpose(1, 2) - expected).abs().max() < 1e-12
    for a, b in zip(gradients(found.transpose(1, 2), query, key, value), gradients(expected, query, key, value)):
        assert (a - b).abs().max() < 1e-12 * max(1.0, float(b.abs().max()))


def test_in_bfloat16_it_is_within_the_rounding():
    exact = drawn(2, 6, 2, 40, 60, 64, 1)
    rounded = [part.detach().bfloat16() for part in exact[:3]] + [exact[3].clamp(min=-1e38).bfloat16()]
    exact = [part.double() for part in rounded]
    found = plain_attention(MODULE, *rounded)[0].double()
    expected = plain_attention(MODULE, *exact)[0]
    assert (found - expected).norm() < 2**-7 * expected.norm()


@pytest.mark.parametrize("training", [True, False])
def test_dropout_of_the_weights(training):
    """Families that drop attention weights in training (GPT-2) do so here."""
    query, key, value, mask = drawn(2, 4, 4, 30, 30, 8, 0)
    module = SimpleNamespace(training=training)
    found = plain_attention(module, query, key, torch.ones_like(value), mask, dropout=0.5)[0]
    sums = found[..., 0].detach()
    if training:
        assert sums.std() > 0.05 and abs(float(sums.mean()) - 1) < 0.1
    else:
        assert torch.allclose(sums, torch.ones_like(sums))
