"""The prompt, against an oracle that joins strings and token lists in plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_hatllm.backbone import load_backbone
from recbole_hatllm.data.prompt import PromptTable
from recbole_hatllm.data.titles import PieceEncoder, TitleTokens
from recbole_hatllm.masks import branch_mask
from tests.conftest import TITLES

pytestmark = pytest.mark.versions

WORDS = {"nouns": "movies", "noun": "movie", "verb": "watched"}
NAMES = ["", *TITLES]


@pytest.fixture(scope="module")
def encode():
    return PieceEncoder(load_backbone("random-tiny").tokenizer)


@pytest.fixture(scope="module")
def tables(encode):
    titles = TitleTokens.build(NAMES, encode, 48, None)
    return {
        (span, readout): PromptTable(titles, encode, WORDS, span, readout)
        for span in ("title", "quoted", "segment")
        for readout in ("prompt_end", "last_item")
    }


def oracle(encode, history, item_span):
    """Token ids, span and is_last of one history, built token by token."""
    start = (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nGiven a list of movies the user has "
        "watched before, please recommend a new movie that the user likes to the user.\n\n### Input:\nThe user has "
        "watched the following movies before:"
    )
    end = "\n \n\n### Response:\n"
    parts = [(start if item_span == "quoted" else start + ' "', -1)]
    for k, item in enumerate(history):
        last = k == len(history) - 1
        if item_span == "quoted":
            parts += [(' "', k), (NAMES[item], k), ('"', k)] + ([] if last else [(",", -1)])
        else:
            owner = k if item_span == "segment" else -1
            parts += [(NAMES[item], k), ('"' if last else '", "', owner)]
    parts.append((end, -1))
    ids, span = [], []
    for text, owner in parts:
        piece = encode(text)
        ids += piece
        span += [owner] * len(piece)
    is_last = [s >= 0 and (i + 1 == len(span) or span[i + 1] != s) for i, s in enumerate(span)]
    return ids, span, is_last, "".join(text for text, _ in parts)


histories = st.lists(st.lists(st.integers(1, len(NAMES) - 1), min_size=1, max_size=10), min_size=1, max_size=5)


@pytest.mark.parametrize("item_span", ["title", "quoted", "segment"])
@settings(max_examples=60, deadline=None)
@given(batch=histories)
def test_prompts_equal_the_oracle(tables, encode, item_span, batch):
    lengths = torch.tensor([len(history) for history in batch])
    sequences = torch.zeros(len(batch), 10, dtype=torch.int64)
    for row, history in zip(sequences, batch):
        row[: len(history)] = torch.tensor(history)
    prompt = tables[item_span, "prompt_end"](sequences, lengths)
    at_item = tables[item_span, "last_item"](sequences, lengths)
    for row, history in enumerate(batch):
        ids, span, is_last, text = oracle(encode, history, item_span)
        n = len(ids)
        assert prompt.valid[row].tolist() == [True] * n + [False] * (prompt.valid.shape[1] - n)
        assert prompt.input_ids[row, :n].tolist() == ids
        assert prompt.position_ids[row, :n].tolist() == list(range(n))
        assert prompt.span[row].tolist() == span + [-1] * (prompt.valid.shape[1] - n)
        assert prompt.is_last[row, :n].tolist() == is_last and not prompt.is_last[row, n:].any()
        assert prompt.readout[row] == n - 1
        assert at_item.readout[row] == max(i for i, last in enumerate(is_last) if last)
        assert encode.tokenizer.decode(ids) == text  # the prompt reads as it should, awkward titles included


@settings(max_examples=30, deadline=None)
@given(batch=histories)
def test_spans_hold_exactly_the_titles(tables, encode, batch):
    for history in batch:
        sequence = torch.tensor([history])
        prompt = tables["title", "prompt_end"](sequence, torch.tensor([len(history)]))
        for k, item in enumerate(history):
            assert encode.tokenizer.decode(prompt.input_ids[0][prompt.span[0] == k]) == NAMES[item]


def test_ids_do_not_depend_on_what_counts_as_the_item(tables):
    sequence, length = torch.tensor([[3, 1, 11, 0]]), torch.tensor([3])
    title, segment = (tables[span, "prompt_end"](sequence, length).input_ids for span in ("title", "segment"))
    assert title.equal(segment)


def test_a_tokenizer_that_wants_a_start_token_gets_it_once():
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_backbone("random-tiny").tokenizer
    bos = tokenizer.convert_ids_to_tokens(0)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    encode = PieceEncoder(tokenizer)
    table = PromptTable(TitleTokens.build(NAMES, encode, 48, None), encode, WORDS)
    ids = table(torch.tensor([[2]]), torch.tensor([1])).input_ids[0].tolist()
    assert ids[0] == 0 and ids[1:] == oracle(encode, [2], "title")[0]


@pytest.mark.parametrize("item_span", ["title", "quoted", "segment"])
@settings(max_examples=40, deadline=None)
@given(batch=histories)
def test_a_branch_is_the_prompt_that_ends_there(tables, item_span, batch):
    """What a branch's token sees, in order of position, is token by token the prompt of the shorter history."""
    lengths = torch.tensor([len(history) for history in batch])
    sequences = torch.zeros(len(batch), 10, dtype=torch.int64)
    for row, history in zip(sequences, batch):
        row[: len(history)] = torch.tensor(history)
    for readout in ("prompt_end", "last_item"):
        table = tables[item_span, readout]
        whole = table(sequences, lengths, branches=True)
        sees = branch_mask(whole.branch, whole.stem)[:, 0].tril()
        for row, history in enumerate(batch):
            for k in range(len(history)):
                alone = table(sequences[row : row + 1], torch.tensor([k + 1]))
                last = (whole.branch[row] == k).nonzero()[-1, 0]
                columns = sees[row, last].nonzero()[:, 0]
                for part in ("input_ids", "position_ids", "span", "is_last"):
                    expected = getattr(alone, part)[0]
                    assert getattr(whole, part)[row][columns].tolist() == expected.tolist(), (part, k)
                assert columns.tolist().index(whole.readout[row, k].item()) == alone.readout.item()
            body = whole.branch[row] < 0
            assert not (sees[row][body & whole.valid[row]] & ~body).any()
