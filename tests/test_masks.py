"""Equations (1)-(5) against loops over pairs, and the schedule against the rows of the paper's Table 5."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_hatllm.masks import KINDS, attention_mask, describe, schedule


@st.composite
def prompts(draw):
    """span, is_last, valid [B, T]: items of 1-4 tokens, with or without text between them, padded on either side."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        span, last = [-1] * draw(st.integers(0, 3)), []
        last += [False] * len(span)
        for item in range(draw(st.integers(0, 4))):
            size, between = draw(st.integers(1, 4)), draw(st.integers(0, 2))
            span += [item] * size + [-1] * between
            last += [False] * (size - 1) + [True] + [False] * between
        rows.append((span or [-1], last or [False], draw(st.booleans())))
    length = max(len(span) for span, _, _ in rows) + draw(st.integers(0, 2))
    batch = []
    for span, last, pad_left in rows:
        pad = length - len(span)
        padded = [([fill] * pad, values) for fill, values in ((-1, span), (False, last), (False, [True] * len(span)))]
        batch.append([before + values if pad_left else values + before for before, values in padded])
    return tuple(torch.tensor(part) for part in zip(*batch))


def allowed(kind, span, is_last, valid, j, k):
    """One pair by the letter: the causal mask M, then what the equation of this kind sets to minus infinity."""
    minus_infinity = k > j or not valid[k]
    f_j, f_k, b, l_j, l_k = span[j] >= 0, span[k] >= 0, span[j] == span[k] >= 0, is_last[j], is_last[k]
    if kind == "in" and f_j and f_k and not b:
        minus_infinity = True
    if kind == "cr_pre" and j != k and f_j and f_k and b:
        minus_infinity = True
    if kind in ("cr", "cr_all") and j != k and f_j and f_k and not (l_j and l_k):
        minus_infinity = True
    if kind == "cr_all" and not f_j and f_k and not l_k:
        minus_infinity = True
    return j == k or not minus_infinity


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=500, deadline=None)
@given(prompt=prompts())
def test_mask_is_its_equation(kind, prompt):
    mask = attention_mask(kind, *prompt)
    rows, length = prompt[0].shape
    assert mask.shape == (rows, 1, length, length) and mask.dtype == torch.bool
    for row, (span, is_last, valid) in enumerate(zip(*(part.tolist() for part in prompt))):
        expected = [[allowed(kind, span, is_last, valid, j, k) for k in range(length)] for j in range(length)]
        assert mask[row, 0].tolist() == expected


@settings(max_examples=200, deadline=None)
@given(prompt=prompts())
def test_relations_between_the_masks(prompt):
    span, is_last, valid = prompt
    length = span.shape[1]
    mask = {kind: attention_mask(kind, *prompt)[:, 0] for kind in KINDS}
    before = torch.ones(length, length, dtype=torch.bool).tril(-1)
    items = ((span >= 0)[:, :, None] & (span >= 0)[:, None, :]) & before
    for kind in KINDS:
        assert mask[kind].diagonal(dim1=1, dim2=2).all(), "every row keeps its diagonal"
        assert not mask[kind].triu(1).any(), "never the future"
        assert not (mask[kind] & ~mask["or"]).any(), "no kind allows more than plain causal attention"
        assert not (mask[kind] & before & ~valid[:, None, :]).any(), "nobody attends to padding"
    assert torch.equal(mask["in"][items], ~mask["cr_pre"][items]), "IN and CR-pre complete each other"
    assert not (mask["cr"] & ~mask["cr_pre"]).any() and not (mask["cr_all"] & ~mask["cr"]).any()
    counts = (mask["cr"] & items).sum((1, 2)).tolist()
    assert counts == [m * (m - 1) // 2 for m in is_last.sum(1).tolist()], "CR keeps the pairs of last tokens"
    template = (span < 0)[:, :, None] | (span < 0)[:, None, :]
    for kind in ("in", "cr_pre", "cr"):
        assert torch.equal(mask[kind] & template, mask["or"] & template), "template rows and columns stay causal"


def test_by_hand():
    """One prompt: text, item 0 of two tokens, text, item 1 of one token, item 2 of two tokens, text."""
    span = torch.tensor([[-1, 0, 0, -1, 1, 2, 2, -1]])
    is_last = torch.tensor([[0, 0, 1, 0, 1, 0, 1, 0]]).bool()
    expected = {
        "in": "1 11 111 1111 10011 100101 1001011 11111111",
        "or": "1 11 111 1111 11111 111111 1111111 11111111",
        "cr": "1 11 101 1111 10111 100101 1011101 11111111",
        "cr_pre": "1 11 101 1111 11111 111111 1111101 11111111",
        "cr_all": "1 11 101 1011 10111 100101 1011101 10111011",
    }
    for kind, rows in expected.items():
        mask = attention_mask(kind, span, is_last, torch.ones(1, 8, dtype=torch.bool))[0, 0].int().tolist()
        found = " ".join("".join(map(str, row[: j + 1])) for j, row in enumerate(mask))
        assert found == rows, kind


def test_unknown_mask():
    with pytest.raises(ValueError, match="cr_post"):
        attention_mask("cr_post", torch.zeros(1, 2).long(), torch.zeros(1, 2).bool(), torch.ones(1, 2).bool())


@pytest.mark.parametrize(
    ("row", "arguments", "expected"),
    [
        ("BIGRec", (0, 0), "OR*8"),
        ("HatLLM", (3, 2), "IN*3 OR*3 CR*2"),
        ("w/o IN", (0, 2), "OR*6 CR*2"),
        ("w/o OR", (6, 2), "IN*6 CR*2"),
        ("w/o CR", (3, 0), "IN*3 OR*5"),
        ("CR->CR-pre", (3, 2, "IN-OR-CR", "cr_pre"), "IN*3 OR*3 CR_PRE*2"),
        ("IN-CR-OR", (3, 2, "IN-CR-OR"), "IN*3 CR*2 OR*3"),
        ("OR-IN-CR", (3, 2, "OR-IN-CR"), "OR*3 IN*3 CR*2"),
        ("OR-CR-IN", (3, 2, "OR-CR-IN"), "OR*3 CR*2 IN*3"),
        ("CR-IN-OR", (3, 2, "CR-IN-OR"), "CR*2 IN*3 OR*3"),
        ("CR-OR-IN", (3, 2, "CR-OR-IN"), "CR*2 OR*3 IN*3"),
        ("query scope all", (3, 2, "IN-OR-CR", "cr_all"), "IN*3 OR*3 CR_ALL*2"),
    ],
)
def test_rows_of_table_5(row, arguments, expected):
    blocks = [part.split("*") for part in expected.lower().split()]
    assert schedule(8, *arguments) == tuple(kind for kind, count in blocks for _ in range(int(count)))


@given(
    counts=st.tuples(*[st.integers(0, 40)] * 3),
    order=st.permutations(["IN", "OR", "CR"]),
    cross_mask=st.sampled_from(["cr", "cr_pre", "cr_all"]),
)
def test_counts_follow_the_type(counts, order, cross_mask):
    n_in, n_or, n_cr = counts
    kinds = schedule(sum(counts), n_in, n_cr, "-".join(order), cross_mask)
    assert [kinds.count(kind) for kind in ("in", "or", cross_mask)] == [n_in, n_or, n_cr]
    names = [{"in": "IN", "or": "OR", cross_mask: "CR"}[kind] for kind in kinds]
    assert list(dict.fromkeys(names)) == [name for name in order if name in names]


@pytest.mark.parametrize("order", ["IN-OR-CR", "OR-IN-CR", "CR-OR-IN", "CR-IN-OR"])
def test_counts_may_follow_the_position(order):
    first, middle, last = order.lower().split("-")
    assert schedule(9, 2, 3, order, sizes="position") == (first,) * 2 + (middle,) * 4 + (last,) * 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((16, 16, 2), ["16", "2"]),
        ((4, -1, 2), ["-1"]),
        ((4, 1, -2), ["-2"]),
        ((4, 1, 1, "IN-OR"), ["IN-OR"]),
        ((4, 1, 1, "IN-OR-OR"), ["IN-OR-OR"]),
        ((4, 1, 1, ""), ["order"]),
        ((4, 1, 1, "IN-OR-CR", "in"), ["cross_mask", "'in'"]),
        ((4, 1, 1, "IN-OR-CR", "cr", "layer"), ["sizes", "'layer'"]),
    ],
)
def test_schedules_that_do_not_fit(arguments, words):
    with pytest.raises(ValueError) as error:
        schedule(*arguments)
    assert all(word in str(error.value) for word in words)


def test_describe():
    assert describe(schedule(28, 4, 2)) == "layers 0-3 IN | 4-25 OR | 26-27 CR"
    assert describe(("or",)) == "layers 0 OR"
    assert describe(schedule(4, 2, 1, cross_mask="cr_pre")) == "layers 0-1 IN | 2 OR | 3 CR-PRE"
