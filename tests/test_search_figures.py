"""Figures of a study: their numbers against closed forms and the trials themselves."""

import csv
import itertools
import json
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from recbole_hatllm.search import search
from recbole_hatllm.search_figures import draw, importances
from recbole_hatllm.space import Dimension, Space
from tests.test_search import quickly, space_file

FILES = {f"{name}.{kind}" for name in ("importance", "slice") for kind in ("png", "svg", "csv", "json")}
SPACE = Space({
    "rate": Dimension("rate", "loguniform", [1e-4, 1e-2]), "size": Dimension("size", "choice", [[64, 64], [128]]),
    "depth": Dimension("depth", "int", [1, 4]), "fixed": Dimension("fixed", "choice", ["all"]),
})  # fmt: skip


def study_of(space: Space, trials: list[tuple[dict, float]], pruned=()) -> tuple[optuna.Study, dict]:
    """Finished trials with these values, or given up where their number is in `pruned`."""
    study = optuna.create_study(direction="maximize")
    for params, value in trials:
        study.enqueue_trial(params)
        trial = study.ask()
        for dimension in space.dimensions.values():
            dimension.suggest(trial)
        trial.set_user_attr("outcome", {"valid": {"ndcg@10": value}})
        study.tell(trial, **({"state": TrialState.PRUNED} if trial.number in pruned else {"values": value}))
    about = dict.fromkeys(("model", "dataset", "protocol", "sampler", "pruner"), "-") | {"valid_metric": "ndcg@10"}
    finished = [number for number in range(len(trials)) if number not in pruned]
    return study, {"search": about, "best": max(finished, key=lambda number: trials[number][1], default=None)}


def rows(file: Path) -> list[dict]:
    with file.open(newline="", encoding="utf-8") as content:
        return list(csv.DictReader(content))


def test_importance_is_the_share_of_the_variance():
    """A sum of functions of one key each, over all combinations: the share of a key is that of its function's variance."""
    keys = {key: Dimension(key, "int", [0, 7]) for key in "abc"}
    grid = [dict(zip("abc", values)) for values in itertools.product(range(8), repeat=3)]
    study, _ = study_of(Space(keys), [(params, 2 * params["a"] + params["b"]) for params in grid])
    found = importances(study, ["a", "b", "c"], seed=0)
    assert [row["key"] for row in found] == ["a", "b", "c"]
    assert [row["importance"] for row in found] == pytest.approx([0.8, 0.2, 0.0], abs=0.02)
    assert found == importances(study, ["a", "b", "c"], seed=0)


def test_the_slice_holds_every_trial_that_was_validated(tmp_path):
    trials = [({"rate": 1e-4 * 3**n, "size": ["[64, 64]", "[128]"][n % 2], "depth": 1 + n % 4, "fixed": "all"}, v)
              for n, v in enumerate([0.3, 0.5, 0.1, 0.4])]  # fmt: skip
    study, found = study_of(SPACE, trials, pruned={2})
    assert draw(study, SPACE, found, 0, tmp_path) == ["importance", "slice"]
    assert {file.name for file in tmp_path.iterdir()} == FILES
    assert (tmp_path / "slice.png").read_bytes().startswith(b"\x89PNG") and "<svg" in (
        tmp_path / "slice.svg"
    ).read_text()
    content = json.loads((tmp_path / "slice.json").read_text())
    assert content["finished_trials"] == 3 and content["metric"] == "valid NDCG@10"
    listed = content["rows"]
    assert [row["key"] for row in listed] == ["rate"] * 4 + ["size"] * 4 + ["depth"] * 4
    for row in listed:
        params, value = trials[row["trial"]]
        expected = json.loads(params["size"]) if row["key"] == "size" else params[row["key"]]
        assert row["value"] == expected and row["metric"] == value
        assert row["state"] == {1: "best", 2: "pruned"}.get(row["trial"], "complete")
    assert [{key: str(value) for key, value in row.items()} for row in listed] == rows(tmp_path / "slice.csv")
    shares = rows(tmp_path / "importance.csv")
    assert {row["key"] for row in shares} == {"rate", "size", "depth"}
    assert sum(float(row["importance"]) for row in shares) == pytest.approx(1)
    texts = (tmp_path / "slice.svg").read_text()
    assert all(text in texts for text in ("[64, 64]", "0.001", "depth", "valid NDCG@10", "pruned", "best"))


def test_without_two_finished_trials_nothing_is_drawn(tmp_path):
    params = {"rate": 1e-3, "size": "[128]", "depth": 2, "fixed": "all"}
    for trials, pruned in (([], ()), ([(params, 0.1)], ()), ([(params, 0.1), ({**params, "depth": 3}, 0.2)], {0})):
        assert draw(*study_of(SPACE, trials, pruned)[:1], SPACE, study_of(SPACE, trials, pruned)[1], 0, tmp_path) == []
    only = Space({"fixed": Dimension("fixed", "choice", ["all"])})
    study, found = study_of(only, [({"fixed": "all"}, 0.1), ({"fixed": "all"}, 0.1)])
    assert draw(study, only, found, 0, tmp_path) == [] and not list(tmp_path.iterdir())


def test_where_all_came_to_the_same_no_key_is_important(tmp_path):
    params = {"rate": 1e-3, "size": "[128]", "depth": 2, "fixed": "all"}
    study, found = study_of(SPACE, [(params, 0.1), ({**params, "depth": 3}, 0.1), ({**params, "depth": 4}, 0.1)])
    assert draw(study, SPACE, found, 0, tmp_path) == ["slice"]
    assert not list(tmp_path.glob("importance*"))


def test_a_search_leaves_them_and_brings_them_up_to_date(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("recbole_hatllm.search.run", quickly)
    space = {"embedding_size": {"choice": [4, 8]}, "learning_rate": {"choice": [0.1, 0.01]}}
    arguments = {
        "study": tmp_path / "study",
        "space": space_file(tmp_path, space),
        "config_dict": {"data_path": tiny["data_path"]},
    }
    search("BPR", "tiny", **arguments, trials=1)
    assert not {file.name for file in (tmp_path / "study").iterdir()} & FILES
    assert "figures" not in capsys.readouterr().out
    for trials in (2, 4):
        found = search("BPR", "tiny", **arguments, trials=trials)
        assert {file.name for file in (tmp_path / "study").iterdir()} >= FILES
        listed = rows(tmp_path / "study" / "slice.csv")
        assert len(listed) == 2 * trials
        assert {row["trial"] for row in listed if row["state"] == "best"} == {str(found["best"])}
        assert "figures and their numbers: importance, slice" in capsys.readouterr().out
    for file in FILES:
        (tmp_path / "study" / file).unlink()
    search("BPR", "tiny", **arguments)
    assert {file.name for file in (tmp_path / "study").iterdir()} >= FILES
