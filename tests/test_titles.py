"""Titles: read by ourselves, cleaned, one token sequence each."""

import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_hatllm.backbone import load_backbone
from recbole_hatllm.data.titles import PieceEncoder, TitleTokens, clean, read_titles
from recbole_hatllm.errors import DataError

pytestmark = pytest.mark.versions


def write(tmp_path, text):
    file = tmp_path / "x.item"
    file.write_bytes(text.encode("utf-8"))
    return file


@pytest.mark.parametrize(
    "raw, read",
    [
        ("Tom &amp; Jerry", "Tom & Jerry"),
        ("L&#39;Oreal &quot;Best&quot; Cream", 'L\'Oreal "Best" Cream'),
        ('"Whole title"', "Whole title"),
        ("  many \t  spaces\u00a0here ", "many spaces here"),
        ("nul\x00l\x07bell", "nul l bell"),
        ("family 👨\u200d👩\u200d👧 emoji", "family 👨\u200d👩\u200d👧 emoji"),
        ('"', '"'),
        ("", ""),
    ],
)
def test_clean(raw, read):
    assert clean(raw) == read


def test_years_quotes_and_words_like_null_stay_text(tmp_path):
    file = write(
        tmp_path,
        'item_id:token\ttitle:token_seq\trelease_year:token\n1\t"Great" Escape\t1963\n2\tNA\t\n3\tnull\t1999\n',
    )
    titles = read_titles(file, ["[PAD]", "3", "1", "2"], "title", "release_year")
    assert titles == ["", "null (1999)", '"Great" Escape (1963)', "NA"]


def test_crlf_bom_and_items_that_nobody_took(tmp_path):
    file = write(tmp_path, "\ufeffitem_id:token\ttitle:token_seq\r\n1\tHeat\r\n2\tAlien\r\n")
    assert read_titles(file, ["[PAD]", "2"], "title") == ["", "Alien"]


def test_missing_title_is_an_error_or_the_id(tmp_path):
    file = write(tmp_path, "item_id:token\ttitle:token_seq\n1\tHeat\n2\t \n")
    with pytest.raises(DataError, match=r"2 of 3 items have no title .* the first is item 2.*missing_title=id"):
        read_titles(file, ["[PAD]", "1", "2", "7"], "title")
    assert read_titles(file, ["[PAD]", "1", "2", "7"], "title", missing="id") == ["", "Heat", "2", "7"]


def test_missing_file_and_column_are_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.item does not exist"):
        read_titles(tmp_path / "absent.item", ["[PAD]", "1"], "title")
    with pytest.raises(DataError, match=r"columns item_id, name and no 'title'"):
        read_titles(write(tmp_path, "item_id:token\tname:token_seq\n1\tHeat\n"), ["[PAD]", "1"], "title")


@pytest.fixture(scope="module")
def byte_level():
    return PieceEncoder(load_backbone("random-tiny").tokenizer)


@pytest.fixture(scope="module")
def sentencepiece_encoder(tmp_path_factory):
    """A real SentencePiece BPE with a prefix space, as Llama-2's, trained on a few lines."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("spm")
    corpus = folder / "corpus.txt"
    corpus.write_text(
        "the user has watched the following movies before\nThe Dark Knight, Heat, Toy Story (1995)\n" * 50
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=340, model_type="bpe", byte_fallback=True,
        add_dummy_prefix=True, minloglevel=2, bos_id=1, eos_id=2, unk_id=0, pad_id=-1,
    )  # fmt: skip
    kind = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    encode = PieceEncoder(AutoTokenizer.from_pretrained(folder))
    assert encode.anchor and encode("Heat") != encode._ids("Heat")  # it does put a space before a piece
    return encode


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece_encoder"])
@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=30))
def test_joined_pieces_read_as_the_text(kind, text, request):
    encode = request.getfixturevalue(kind)
    title = clean(text)
    joined = encode('before: "') + encode(title) + encode('", "') + encode(title) + encode('"\n')
    assert (
        encode.tokenizer.decode(joined, clean_up_tokenization_spaces=False).strip()
        == f'before: "{title}", "{title}"'.strip()
    )


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece_encoder"])
def test_text_like_a_special_token_stays_text(kind, request):
    encode = request.getfixturevalue(kind)
    assert not set(encode("A </s> <s> <|im_end|> <|endoftext|> B")) & set(encode.tokenizer.all_special_ids)


def test_titles_are_cut_and_cached_by_content(byte_level, tmp_path):
    titles = ["", "Heat", "word " * 2000]
    tokens = TitleTokens.build(titles, byte_level, 48, tmp_path)
    assert tokens.offsets.tolist() == [0, 0, len(byte_level("Heat")), len(byte_level("Heat")) + 48]
    (file,) = tmp_path.glob("titles-*")

    calls = []
    counting = PieceEncoder(byte_level.tokenizer)
    counting._ids = lambda text: calls.append(text) or PieceEncoder._ids(byte_level, text)
    again = TitleTokens.build(titles, counting, 48, tmp_path)
    assert not calls and again.ids.equal(tokens.ids) and again.offsets.equal(tokens.offsets)

    file.write_bytes(file.read_bytes()[:20])  # a damaged cache is made again
    assert TitleTokens.build(titles, byte_level, 48, tmp_path).ids.equal(tokens.ids)
    TitleTokens.build(["", "Heat", "another"], byte_level, 48, tmp_path)
    TitleTokens.build(titles, byte_level, 12, tmp_path)
    assert len(list(tmp_path.glob("titles-*"))) == 3
