"""The floors of every comparison, the switch that masks the history, and metrics by kind of target: each against brute force."""

from __future__ import annotations

import collections
import html
import itertools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_hatllm import demo, load, registry, run
from recbole_hatllm.config import Config
from recbole_hatllm.errors import ConfigError, DataError
from recbole_hatllm.evaluation import target_ranks
from recbole_hatllm.model.titlemarkov import TitleMarkov
from recbole_hatllm.model.titletfidf import TitleTFIDF
from recbole_hatllm.search import search
from tests.conftest import random_sequences, write_dataset

pytestmark = pytest.mark.versions


# --- Models: the formulas over dense float64, word by word


def dense_vectors(titles: list[str], min_df: int) -> np.ndarray:
    """TF-IDF of words and pairs of words; titles[0] is padding."""
    terms = []
    for title in titles:
        words = re.findall(r"\w\w+", title.lower())
        terms.append(collections.Counter([*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))]))
    containing = collections.Counter(term for counted in terms[1:] for term in counted)
    columns = {term: i for i, term in enumerate(t for t, count in containing.items() if count >= min_df)}
    vectors = np.zeros((len(titles), len(columns)))
    for row, counted in zip(vectors, terms):
        for term, count in counted.items():
            if term in columns:
                row[columns[term]] = (1 + math.log(count)) * (1 + math.log(len(titles) / (1 + containing[term])))
        row /= np.linalg.norm(row) or 1
    return vectors


def dense_title_scores(history: list[int], vectors: np.ndarray, decay: float) -> np.ndarray:
    profile = sum(decay**age * vectors[item] for age, item in enumerate(reversed(history)))
    return vectors @ profile / (np.linalg.norm(profile) or 1)


def dense_transition_scores(history, sequences, n_items: int, gaps: int, gap_decay: float, decay: float) -> np.ndarray:
    counts = np.zeros((n_items, n_items))
    for sequence in sequences:
        for place, item in enumerate(sequence):
            for gap, other in enumerate(sequence[place + 1 : place + 1 + gaps]):
                counts[item, other] += gap_decay**gap
    total = counts.sum(1, keepdims=True)
    chain = np.divide(counts, total, out=np.zeros_like(counts), where=total > 0)
    weights = [decay**age for age in range(len(history))]
    return sum(w * chain[item] for w, item in zip(weights, reversed(history))) / sum(weights)


def small(model_class, titles, sequences, **keys):
    """A model on sequences of internal ids, without files."""
    fields = {"USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "LIST_SUFFIX": "_list", "NEG_PREFIX": "neg_",
              "ITEM_LIST_LENGTH_FIELD": "item_length", "MAX_ITEM_LIST_LENGTH": 10, "device": "cpu"}  # fmt: skip
    pairs = [(user, item) for user, sequence in enumerate(sequences) for item in sequence]
    seen = dict(zip(("user_id", "item_id"), torch.tensor(pairs).T))
    dataset = SimpleNamespace(titles=titles, seen=seen, num=lambda field: len(titles))
    model = model_class({**fields, **keys}, dataset)
    model.warm_start(None)
    return model


def batch(histories: list[list[int]]) -> dict[str, torch.Tensor]:
    """Rows padded on the right; what stands behind the end is arbitrary."""
    items = torch.tensor([[*h, *[1] * (10 - len(h))] for h in histories])
    return {"item_id_list": items, "item_length": torch.tensor([len(h) for h in histories])}


WORD = st.sampled_from(["red", "red", "blue", "ball", "a", "5", "car", "Café", "of", "s"])
TITLES = st.lists(st.lists(WORD, max_size=6).map(" ".join), min_size=2, max_size=9)


@settings(max_examples=150, deadline=None)
@given(st.data(), TITLES, st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.sampled_from([1, 2]))
def test_both_models_are_their_formulas(data, titles, decay, min_df):
    titles = ["", *titles, "red ball car", "red ball"]
    item = st.integers(1, len(titles) - 1)
    sequences = data.draw(st.lists(st.lists(item, min_size=1, max_size=12), min_size=1, max_size=5))
    histories = data.draw(st.lists(st.lists(item, min_size=1, max_size=10), min_size=1, max_size=4))
    gaps, weight = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([0.0, 0.2, 3.0]))
    vectors = dense_vectors(titles, min_df)
    keys = {"history_decay": decay, "min_df": min_df}
    titles_alone = small(TitleTFIDF, titles, sequences, **keys)
    both = small(TitleMarkov, titles, sequences, gaps=gaps, gap_decay=0.7, title_weight=weight, **keys)
    found = [model.full_sort_predict(batch(histories)) for model in (titles_alone, both)]
    assert all(scores.dtype == torch.float32 and (scores[:, 0] == -torch.inf).all() for scores in found)
    for row, history in enumerate(histories):
        near = dense_title_scores(history, vectors, decay)
        follows = dense_transition_scores(history, sequences, len(titles), gaps, 0.7, decay)
        assert np.allclose(found[0][row, 1:], near[1:], atol=1e-6)
        assert np.allclose(found[1][row, 1:], (follows + weight * near)[1:], atol=1e-5)


def test_items_of_one_title_tie_and_the_smaller_id_is_first():
    titles = ["", "Red ball", "blue car", "red  Ball!", "green", "red ball"]
    scores = small(TitleTFIDF, titles, [[1]], history_decay=0.5, min_df=1).full_sort_predict(batch([[2, 1], [4]]))
    assert scores[0, 1] == scores[0, 3] == scores[0, 5] > scores[0, 2] > 0 == scores[0, 4]
    assert target_ranks(scores[:1].expand(5, -1), torch.arange(1, 6)).tolist() == [1, 4, 2, 5, 3]
    assert target_ranks(scores[1:].expand(5, -1), torch.arange(1, 6)).tolist() == [2, 3, 4, 1, 5]


def test_many_rows_are_scored_like_one(monkeypatch):
    titles = ["", *(f"word{i % 7} word{i % 3} thing" for i in range(40))]
    sequences = [[i % 40 + 1, (i * 3) % 40 + 1, (i * 7) % 40 + 1] for i in range(50)]
    model = small(TitleMarkov, titles, sequences, gaps=2, gap_decay=0.5, title_weight=0.1, history_decay=0.8, min_df=1)
    whole = model.full_sort_predict(batch(sequences))
    monkeypatch.setattr("recbole_hatllm.model.counting._BLOCK", 7)
    assert torch.equal(model.full_sort_predict(batch(sequences)), whole)
    for row, sequence in enumerate(sequences):
        assert torch.equal(model.full_sort_predict(batch([sequence]))[0], whole[row])
    rows = batch(sequences) | {"item_id": torch.tensor([s[0] for s in sequences])}
    assert torch.equal(model.predict(rows), whole.gather(1, rows["item_id"][:, None])[:, 0])


def test_titles_without_words_end_in_one_sentence():
    with pytest.raises(DataError, match=r"No word occurs in 1 of the 2 titles: lower min_df"):
        small(TitleTFIDF, ["", "M", "5"], [[1]], history_decay=0.5, min_df=1)
    with pytest.raises(DataError, match=r"No word occurs in 9 of the 2 titles: lower min_df"):
        small(TitleMarkov, ["", "Heat", "Ran"], [[1]], history_decay=0.5, min_df=9, gaps=1, gap_decay=1, title_weight=1)


def test_entities_are_resolved_before_words_are_counted(tmp_path):
    titles = ["Tom &amp; Jerry", "amp & quot", "Tom & Jerry", "Say &quot;Jerry&quot;", "Other", "More"]
    write_dataset(tmp_path, "own", random_sequences(9, 6), titles)
    keys = {"data_path": str(tmp_path), "runs_dir": str(tmp_path / "runs"), "show_progress": False}
    trained = load(run("TitleTFIDF", "own", config_dict=keys)["folder"])
    scores = {found.item: found.score for found in trained.recommend(["i0"], k=6)}
    assert scores["i0"] == pytest.approx(scores["i2"]) == pytest.approx(1) and scores["i1"] == 0 < scores["i3"]
    tokens = trained.items.item_tokens
    own = dense_vectors(["", *(html.unescape(titles[int(token[1:])]) for token in tokens[1:])], min_df=1)
    assert np.allclose([scores[token] for token in tokens[1:]], own[1:] @ own[tokens.index("i0")], atol=1e-6)


@pytest.mark.parametrize("name", ["TitleTFIDF", "TitleMarkov"])
def test_a_dataset_without_titles_is_refused_at_once(name, tmp_path):
    (write_dataset(tmp_path, "own", random_sequences(9, 6)) / "own.item").unlink()
    keys = {"data_path": str(tmp_path), "runs_dir": str(tmp_path / "runs"), "show_progress": False}
    with pytest.raises(DataError, match=r"own\.item does not exist, and this model needs titles"):
        run(name, "own", config_dict=keys)
    assert not any((tmp_path / "runs").iterdir())


# --- mask_history

LONGEST = 4
SEQUENCES = random_sequences(30, 20)  # the dataset `tiny`; users take items again
MODELS = {
    "Pop": {},
    "BPR": {"epochs": 2},
    "SASRecFast": {"epochs": 2, "stride": LONGEST},
    "TitleMarkov": {},
    "HatLLM": {"backbone": "random-tiny", "dtype": "float32", "n_in": 1, "n_cr": 1, "train_steps": 2, "eval_step": 1},
}


def keys_of(name, tiny, **keys) -> dict:
    place = {key: tiny[key] for key in ("data_path", "runs_dir", "show_progress")}
    return {**place, "MAX_ITEM_LIST_LENGTH": LONGEST, "topk": [3, 5], "valid_metric": "NDCG@5", **MODELS[name], **keys}


def masked_rank(scores: dict[int, float], history: list[int], target: int) -> int:
    """Of the item numbers of the file; ties by internal id, which `scores` is in the order of."""
    if target in history:
        return len(scores)
    order = sorted((item for item in scores if item not in history), key=lambda item: -scores[item])
    return order.index(target) + 1


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sample", [None, 13])
def test_masked_ranks_are_those_without_the_history(name, sample, tiny):
    result = run(
        name, "tiny", config_dict=keys_of(name, tiny, mask_history=True, eval_sample=sample, eval_batch_size=8)
    )
    trained = load(result["folder"])
    config = trained.config
    numbers = [int(token[1:]) for token in trained.items.item_tokens[1:]]
    valid, test = registry.data_loaders(config, registry.create_dataset(config))[1:]
    for part, loader, back in (("valid", valid, 2), ("test", test, 1)):
        rows = loader.dataset.inter_feat[:]
        with torch.no_grad():
            scores = trained.model.full_sort_predict(rows.to(config["device"])).view(len(rows), -1)[:, 1:].tolist()
        users = loader.dataset.id2token("user_id", rows["user_id"].numpy())
        expected, repeats = [], 0
        for user, row in zip(users, scores):
            before, target = SEQUENCES[user][:-back], SEQUENCES[user][-back]
            repeats += target in before[-LONGEST:]
            expected.append(masked_rank(dict(zip(numbers, row)), before[-LONGEST:], target))
        hits = [np.mean([rank <= k for rank in expected]) for k in (3, 5)]
        ndcg = [np.mean([(rank <= k) / math.log2(rank + 1) for rank in expected]) for k in (3, 5)]
        assert [result[part][f"hit@{k}"] for k in (3, 5)] == pytest.approx(hits, abs=1e-6)
        assert [result[part][f"ndcg@{k}"] for k in (3, 5)] == pytest.approx(ndcg, abs=1e-6)
    ranks = np.load(f"{result['folder']}/ranks.npz")
    assert ranks["rank"].tolist() == expected and len(expected) == (sample or 30)
    assert (repeats or sample) and (ranks["rank"] == 20).sum() >= repeats  # a target of the history is a miss
    assert result["history_masked"] is True


def test_an_item_that_cannot_be_ranked_is_last():
    scores = torch.tensor([[-torch.inf, 3.0, -torch.inf, 1.0, -torch.inf]])
    assert target_ranks(scores.expand(4, -1), torch.arange(1, 5)).tolist() == [1, 4, 2, 4]


def test_by_default_nothing_is_masked_and_the_run_says_which(tiny, capsys):
    kept = run("Pop", "tiny", config_dict=keys_of("Pop", tiny))
    said = capsys.readouterr().out
    masked = run("Pop", "tiny", config_dict=keys_of("Pop", tiny, mask_history=True))
    also_said = capsys.readouterr().out
    assert kept["history_masked"] is False and masked["history_masked"] is True
    assert kept["test"] != masked["test"]
    assert "\ntest: HR@3 " in said and "\ntargets, history kept " in said and "masked" not in said
    assert "\ntest, history masked: HR@3 " in also_said and "\ntargets, history masked " in also_said
    for result in (kept, masked):
        word = "masked" if result["history_masked"] else "kept"
        folder = Path(result["folder"])
        assert json.loads((folder / "result.json").read_text())["history_masked"] is result["history_masked"]
        assert f"all 20 items ranked, history {word}" in (folder / "README.md").read_text()


def test_recommend_does_as_the_run_did(tiny):
    kept, masked = (load(run("SASRecFast", "tiny", config_dict=keys_of("SASRecFast", tiny, epochs=1, mask_history=mask))["folder"])
                    for mask in (False, True))  # fmt: skip
    history = ["i3", "i1", "i2", "i2", "i4", "i1"]  # the last four are read: i2, i2, i4, i1
    everything = {found.item: found.score for found in kept.recommend(history, 20)}
    rest = masked.recommend(history, 17)
    assert {found.item for found in rest} == everything.keys() - {"i1", "i2", "i4"} and "i3" in everything
    assert [found.score for found in rest] == [everything[found.item] for found in rest]
    with pytest.raises(ConfigError, match=r"k is 18, and must be from 1 to the 17 items there are outside the history"):
        masked.recommend(history, 18)
    with pytest.raises(ConfigError, match=r"k is 21, and must be from 1 to the 20 items there are\."):
        kept.recommend(history, 21)


def test_trials_of_a_search_rank_alike(tiny, tmp_path):
    space = tmp_path / "space.yaml"
    space.write_text("mask_history: {choice: [true, false]}\n")
    with pytest.raises(ConfigError, match="mask_history cannot be searched"):
        search("Pop", "tiny", space, config_dict=keys_of("Pop", tiny))


# --- Kinds of targets

DAY = 86_400
MONDAY = 1_400_457_600  # 2014-05-19 00:00 UTC


def write_timed(root: Path, rows: list[tuple[str, str, float]]) -> dict:
    """A dataset `timed`, and keys of a run on it."""
    (root / "timed").mkdir(parents=True)
    lines = ["user_id:token\titem_id:token\ttimestamp:float", *("\t".join(map(str, row)) for row in rows)]
    (root / "timed" / "timed.inter").write_text("\n".join(lines) + "\n")
    return {"data_path": str(root), "runs_dir": str(root / "runs"), "show_progress": False, "topk": [1, 2],
            "valid_metric": "NDCG@2", "metrics": ["Hit", "NDCG", "MRR", "ItemCoverage"]}  # fmt: skip


def by_hand(unit: float = 1) -> list[tuple[str, str, float]]:
    """Tested are d (twice, cold), f (once in training, where a history begins) and c; a fifth user has one item only."""
    last = [
        (
            "u1",
            "abc",
            "e",
            "d",
            MONDAY + 5 * DAY + DAY - 1,
            MONDAY + 5 * DAY,
        ),  # the last second and the first one of a day
        ("u2", "acb", "a", "d", MONDAY + 3 * DAY, MONDAY + 3 * DAY - 30),  # 30 s apart, over midnight
        ("u3", "bca", "c", "f", MONDAY + 9 * DAY, MONDAY + 8 * DAY),
        ("u4", "fbc", "b", "c", MONDAY + 7 * DAY + 60, MONDAY + 7 * DAY + 60),
    ]
    rows = []
    for user, train, valid, test, at, before in last:
        rows += [(user, item, (MONDAY + 600 * i) * unit) for i, item in enumerate(train)]
        rows += [(user, valid, before * unit), (user, test, at * unit)]
    return [*rows, ("u5", "z", MONDAY * unit)]  # RecBole's samplers want an item that none of the others took


@pytest.mark.parametrize("model", ["Pop", "SASRecFast"])  # a general and a sequential one
def test_parts_by_hand(model, tmp_path):
    keys = write_timed(tmp_path, by_hand())
    result = run(model, "timed", config_dict={**keys, **({} if model == "Pop" else {"epochs": 1})})
    ranks = np.load(f"{result['folder']}/ranks.npz")
    rank = dict(zip(ranks["user"].tolist(), ranks["rank"].tolist()))
    expected = {"warm": ["u3", "u4"], "cold": ["u1", "u2"], "same_day": ["u1", "u4"]}
    assert result["test_parts"].keys() == expected.keys()
    for part, users in expected.items():
        found = result["test_parts"][part]
        assert found.keys() == {"rows", *result["test"]} and found["rows"] == 2
        for k in (1, 2):
            inside = [rank[user] for user in users if rank[user] <= k]
            assert found[f"hit@{k}"] == len(inside) / 2
            assert found[f"ndcg@{k}"] == pytest.approx(sum(1 / math.log2(r + 1) for r in inside) / 2, abs=1e-6)
            assert found[f"mrr@{k}"] == pytest.approx(sum(1 / r for r in inside) / 2, abs=1e-6)
    # Two and two of four rows: the whole is the mean of warm and cold.
    for name, value in result["test"].items():
        if "coverage" not in name:
            both = result["test_parts"]["warm"][name] + result["test_parts"]["cold"][name]
            assert value == pytest.approx(both / 2, abs=1e-6)


@pytest.mark.parametrize("unit", [1000, 1 / DAY], ids=["milliseconds", "days"])
def test_without_unix_seconds_days_are_not_told(unit, tmp_path, capsys):
    result = run("Pop", "timed", config_dict=write_timed(tmp_path, by_hand(unit)))
    assert result["test_parts"]["same_day"] is None and result["test_parts"]["warm"]["rows"] == 2
    assert re.search(r"\nsame day +- +- ", capsys.readouterr().out)


def test_an_empty_part_has_no_metrics(tmp_path, capsys):
    rows = [(f"u{u}", item, MONDAY + 60 * i) for u in range(5) for i, item in enumerate("abcabc")]
    rows.append(("u5", "z", MONDAY))
    result = run("Pop", "timed", config_dict=write_timed(tmp_path, rows))
    assert result["test_parts"]["cold"] == {"rows": 0, **dict.fromkeys(result["test"])}
    assert result["test_parts"]["warm"]["rows"] == result["test_parts"]["same_day"]["rows"] == 5
    assert json.loads((Path(result["folder"]) / "result.json").read_text())["test_parts"] == result["test_parts"]
    assert re.search(r"\ncold +0 +- ", capsys.readouterr().out)
    card = (Path(result["folder"]) / "README.md").read_text()
    assert "5 same-day targets: HR@1" in card and "cold targets" not in card


def test_under_windows_cold_is_what_no_training_row_holds(tmp_path):
    """Histories of training rows count, items that stand before all of them do not."""
    sequences = {f"u{u}": [(u * 5 + i * 3) % 40 for i in range(12 + u)] for u in range(12)}
    write_dataset(tmp_path, "own", sequences)
    keys = {"data_path": str(tmp_path), "runs_dir": str(tmp_path / "runs"), "protocol": "windows",
            "MAX_ITEM_LIST_LENGTH": 5, "show_progress": False}  # fmt: skip
    result = run("MarkovChain", "own", config_dict=keys)
    config = Config("MarkovChain", "own", config_dict=keys)
    dataset = registry.create_dataset(config)
    train, _, test = registry.data_loaders(config, dataset)
    rows = train.dataset.inter_feat[:]
    known = set(rows["item_id"].tolist()) | set(rows["item_id_list"].flatten().tolist())
    cold = sum(item not in known for item in test.dataset.inter_feat["item_id"].tolist())
    assert result["test_parts"]["cold"]["rows"] == cold
    assert result["test_parts"]["warm"]["rows"] == len(test.dataset) - cold
    assert result["test_parts"]["same_day"]["rows"] == len(test.dataset)


# --- The demo


def test_the_demo_shows_the_floors_and_says_what_is_ranked(tiny, tmp_path, capsys):
    write_dataset(tmp_path, "own", random_sequences(30, 25))  # some of its titles share a word
    small_run = {key: tiny[key] for key in ("runs_dir", "backbone", "dtype", "show_progress")}
    results = demo.demo(
        {
            **small_run,
            "data_path": str(tmp_path),
            "dataset": "own",
            "train_steps": 1,
            "eval_step": 1,
            "mask_history": True,
        }
    )
    assert list(results) == ["Pop", "MarkovChain", "TitleTFIDF", "TitleMarkov", "HatLLM, untrained", "HatLLM"]
    assert all(result["history_masked"] for result in results.values())
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("test, history masked  "))
    assert lines[head].split()[-4:] == ["HR@5", "HR@10", "NDCG@5", "NDCG@10"]
    for line, (name, result) in zip(lines[head + 1 :], results.items()):
        assert line.startswith(name) and line.endswith(f"{result['test']['ndcg@10']:.4f}")
