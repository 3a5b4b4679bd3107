"""Awkward and broken data: awkward data runs, broken data ends in one sentence before any long work."""

import pytest
import torch

from recbole_hatllm import run
from recbole_hatllm.errors import DataError
from tests.conftest import random_sequences, write_dataset

AWKWARD = [
    "word " * 2000,
    "🎬🍿 film 👨\u200d👩\u200d👧",
    "Tom &amp; Jerry &quot;Special&quot;",
    "</s> end of text <|im_end|>",
    "### Response:\nhello",
    '"starts with a quote',
    "a\\nb \\t c",
    "مرحبا بالعالم",
    "NA",
    "x",
]


def test_awkward_titles_run(tmp_path, tiny):
    titles = [title.replace("\n", " ") for title in AWKWARD]
    write_dataset(tmp_path / "data", "awkward", random_sequences(12, len(titles)), titles)
    result = run("HatLLM", "awkward", config_dict={**tiny, "data_path": str(tmp_path / "data")})
    assert 0 <= result["test"]["ndcg@10"] <= 1


def broken(tmp_path, tiny, change, match):
    """Runs on data whose files `change(folder)` has spoilt."""
    folder = write_dataset(tmp_path / "data", "broken", random_sequences(12, 9))
    change(folder)
    with pytest.raises(DataError, match=match):
        run("HatLLM", "broken", config_dict={**tiny, "data_path": str(tmp_path / "data")})


def edit(name, old, new):
    def change(folder):
        file = folder / name
        text = file.read_text(encoding="utf-8")
        assert old in text
        file.write_text(text.replace(old, new, 1), encoding="utf-8")

    return change


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda f: (f / "broken.inter").unlink(), r"broken\.inter"),
        (lambda f: (f / "broken.item").unlink(), r"broken\.item does not exist"),
        (lambda f: (f / "broken.inter").write_text(""), r"broken\.inter.*empty"),
        (edit("broken.inter", "timestamp:float", "when:float"), r"broken\.inter.*timestamp"),
        (edit("broken.inter", "item_id:token", "item_id"), r"broken\.inter.*item_id"),
        (edit("broken.inter", "\t1000000000", "\tyesterday"), r"broken\.inter.*yesterday"),
        (edit("broken.item", "title:token_seq", "name:token_seq"), r"broken\.item.*name.*title"),
        (edit("broken.item", "\tHeat", "\t"), r"1 of 9 items have no title.*item i1"),
        (edit("broken.item", "i1\tHeat\n", ""), r"1 of 9 items have no title.*item i1"),
    ],
    ids=["no inter", "no item", "empty inter", "no time", "no type", "bad time", "no title column", "empty title", "no title"],
)  # fmt: skip
def test_broken_files(tmp_path, tiny, change, match):
    broken(tmp_path, tiny, change, match)


def test_ids_stand_in_for_missing_titles(tmp_path, tiny):
    folder = write_dataset(tmp_path / "data", "untitled", random_sequences(12, 9))
    (folder / "untitled.item").unlink()
    keys = {**tiny, "data_path": str(tmp_path / "data"), "missing_title": "id"}
    assert run("HatLLM", "untitled", config_dict=keys)["candidates"] == 9


def test_recboles_models_need_no_titles(tmp_path, tiny):
    folder = write_dataset(tmp_path / "data", "untitled", random_sequences(12, 9))
    (folder / "untitled.item").unlink()
    keys = {"data_path": str(tmp_path / "data"), "runs_dir": tiny["runs_dir"], "epochs": 1, "show_progress": False}
    assert run("SASRec", "untitled", config_dict=keys)["candidates"] == 9


def test_users_with_few_interactions(tmp_path, tiny):
    sequences = {**random_sequences(12, 9), "one": [3], "two": [4, 5], "three": [1, 2, 3]}
    write_dataset(tmp_path / "data", "short", sequences)
    result = run("HatLLM", "short", config_dict={**tiny, "data_path": str(tmp_path / "data")})
    assert torch.isfinite(torch.tensor(result["test"]["ndcg@10"]))
