"""Searches with real Optuna and small real models: complete, stoppable, honest about failures."""

import json
import re
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import yaml

from recbole_hatllm import quick_start, schema
from recbole_hatllm.config import Config
from recbole_hatllm.errors import ConfigError, HatError
from recbole_hatllm.search import search
from recbole_hatllm.space import read_space
from tests.conftest import hears_ctrl_c
from tests.test_cli import ROOT, cli, refused

GRID = {"embedding_size": {"choice": [4, 8]}, "learning_rate": {"choice": [0.1, 0.01]}}


class Killed(BaseException):
    """What no code catches."""


def space_file(folder: Path, space: dict) -> str:
    file = folder / "space.yaml"
    file.write_text(yaml.safe_dump(space))
    return str(file)


@pytest.fixture
def bpr(tiny, tmp_path):
    """Arguments of a search of four short BPR runs."""
    keys = {"data_path": tiny["data_path"], "runs_dir": str(tmp_path / "runs"), "epochs": 2, "train_batch_size": 64}
    return {
        "model": "BPR", "dataset": "tiny", "config_dict": keys, "study": tmp_path / "study",
        "space": space_file(tmp_path, GRID),
    }  # fmt: skip


def outcomes(found: dict) -> list[dict]:
    """Trials in the order of their numbers, without what differs between two runs of the same."""
    return sorted(({**trial, "seconds": 0, "folder": ""} for trial in found["trials"]), key=lambda t: t["number"])


def counted(monkeypatch) -> list[dict]:
    """The keys of each new run that a search begins from now on."""
    began = []

    def run(*arguments, config_dict, **others):
        began.append(config_dict)
        return quick_start.run(*arguments, config_dict=config_dict, **others)

    monkeypatch.setattr("recbole_hatllm.search.run", run)
    return began


def test_a_grid_runs_each_combination_once_and_validation_decides(bpr, monkeypatch, capsys):
    began = counted(monkeypatch)
    found = search(**bpr)
    assert sorted((k["embedding_size"], k["learning_rate"]) for k in began) == [
        (4, 0.01),
        (4, 0.1),
        (8, 0.01),
        (8, 0.1),
    ]
    trials, folder = found["trials"], bpr["study"]
    assert found == json.loads((folder / "study.json").read_text())
    assert [t["valid"]["ndcg@10"] for t in trials] == sorted((t["valid"]["ndcg@10"] for t in trials), reverse=True)
    for trial in trials:
        result = json.loads((folder / f"trial-{trial['number']}" / "result.json").read_text())
        assert {name: trial[name] for name in ("valid", "test", "test_interval")}.items() <= result.items()
    out = capsys.readouterr().out
    lines = re.findall(
        r"^trial \d \((\d)/4\): embedding_size=\d learning_rate=\S+ -> NDCG@10 \S+ \(best \S+\)", out, re.M
    )
    assert lines == ["1", "2", "3", "4"] and "95 % interval: HR@5" in out and out.count("test: ") == 1

    best = trials[0]
    chosen = Config("BPR", "tiny", [str(folder / "best.yaml")])
    assert chosen["embedding_size"] == best["params"]["embedding_size"] and chosen["epochs"] == 2
    assert "learning_rate" in (text := (folder / "best.yaml").read_text()) and "runs_dir" not in text
    again = quick_start.run("BPR", "tiny", [str(folder / "best.yaml")], {"runs_dir": str(folder.parent / "again")})
    assert again["test"] == best["test"]

    assert search(**bpr) == found and len(began) == 4  # nothing is left to do


def die_before_the_run(monkeypatch, turn):
    calls = []

    def run(*arguments, **keys):
        calls.append(0)
        if len(calls) == turn:
            raise Killed
        return quick_start.run(*arguments, **keys)

    monkeypatch.setattr("recbole_hatllm.search.run", run)


def die_between_two_epochs(monkeypatch, turn):
    from recbole_hatllm.trainer import StepTrainer

    calls, save = [], StepTrainer._save_state

    def save_and_die(trainer):
        save(trainer)
        calls.append(0)
        if len(calls) == 2 * turn - 1:  # of two epochs each
            raise Killed

    monkeypatch.setattr(StepTrainer, "_save_state", save_and_die)


def die_before_the_result_is_told(monkeypatch, turn):
    import optuna

    calls, tell = [], optuna.Study.tell

    def die(study, *arguments, **keys):
        calls.append(0)
        if len(calls) == turn:
            raise Killed
        return tell(study, *arguments, **keys)

    monkeypatch.setattr(optuna.Study, "tell", die)


def die_before_a_new_trial_has_values(monkeypatch, turn):
    from optuna.trial import Trial

    calls, suggest = [], Trial._suggest

    def die(*arguments):
        calls.append(0)
        if len(calls) == 2 * turn:  # the second of two values
            raise Killed
        return suggest(*arguments)

    monkeypatch.setattr(Trial, "_suggest", die)


WAYS = [die_before_the_run, die_between_two_epochs, die_before_the_result_is_told, die_before_a_new_trial_has_values]


@pytest.mark.parametrize("die", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("sampler", ["grid", "tpe"])
def test_a_killed_search_goes_on_to_the_same_end(bpr, tmp_path, monkeypatch, sampler, die):
    if sampler == "tpe":
        ranges = {"learning_rate": {"loguniform": [1e-3, 0.1]}, "embedding_size": {"int": [4, 12, 4]}}
        bpr = {**bpr, "space": space_file(tmp_path, ranges), "trials": 3}
    whole = search(**{**bpr, "study": tmp_path / "whole"})
    with monkeypatch.context() as patch:
        die(patch, turn=2)
        with pytest.raises(Killed):
            search(**bpr)
    began = counted(monkeypatch)
    found = search(**bpr)
    assert outcomes(found) == outcomes(whole)
    half_done = die in (die_between_two_epochs, die_before_the_result_is_told)
    assert len(began) == len(whole["trials"]) - (2 if half_done else 1)


def test_trials_cut_a_grid_and_more_go_on_with_it(bpr, monkeypatch):
    began = counted(monkeypatch)
    assert len(search(**bpr, trials=2)["trials"]) == len(began) == 2
    assert len(search(**bpr)["trials"]) == len(began) == 4


def test_a_trial_that_fails_is_recorded_with_its_reason(tiny, tmp_path, capsys):
    space = {"n_in": {"choice": [1, 9]}}  # random-tiny has four layers
    del tiny["n_in"]
    arguments = {"study": tmp_path / "study", "space": space_file(tmp_path, space), "config_dict": tiny}
    found = search("HatLLM", "tiny", **arguments)
    good, bad = found["trials"]
    assert good["state"] == "complete" and good["params"] == {"n_in": 1} and good["reason"] is None
    assert bad["state"] == "fail" and "9" in bad["reason"] and bad["test"] is None
    assert f"failed: {bad['reason']}" in capsys.readouterr().out
    assert search("HatLLM", "tiny", **arguments) == found


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried\nto"), ValueError("odd")])
def test_memory_and_other_errors_are_recorded_too(bpr, monkeypatch, error):
    def run(*arguments, config_dict, **others):
        if config_dict["embedding_size"] == 8:
            raise error
        return quick_start.run(*arguments, config_dict=config_dict, **others)

    monkeypatch.setattr("recbole_hatllm.search.run", run)
    trials = search(**bpr)["trials"]
    assert [t["state"] for t in trials] == ["complete", "complete", "fail", "fail"]
    assert trials[2]["reason"].startswith(type(error).__name__) and "\n" not in trials[2]["reason"]
    assert "Traceback" in (bpr["study"] / f"trial-{trials[2]['number']}" / "error.txt").read_text()


def test_a_search_of_failures_alone_ends_in_one_sentence(bpr, monkeypatch):
    def run(*_, **__):
        raise HatError("Nothing works.")

    monkeypatch.setattr("recbole_hatllm.search.run", run)
    with pytest.raises(HatError, match=r"No trial of .* Nothing works\."):
        search(**bpr)


def test_random_draws_of_the_same_values_are_not_run_again(bpr, monkeypatch):
    began = counted(monkeypatch)
    found = search(**bpr, sampler="random", trials=12)
    distinct = {tuple(trial["params"].items()) for trial in found["trials"]}
    assert len(found["trials"]) == 12 and len(began) == len(distinct) <= 4


def test_tpe_on_a_journal_file_keeps_to_the_range(bpr, tmp_path):
    space = {"learning_rate": {"loguniform": [1e-4, 1e-1]}, "embedding_size": {"choice": [4, 8]}}
    found = search(**{**bpr, "space": space_file(tmp_path, space)}, trials=3, storage=str(tmp_path / "journal.log"))
    rates = {trial["params"]["learning_rate"] for trial in found["trials"]}
    assert len(rates) == 3 and all(1e-4 <= rate <= 1e-1 for rate in rates)
    assert found["search"]["sampler"] == "tpe" and (tmp_path / "journal.log").is_file()


def test_lists_are_choices_too(tiny, tmp_path):
    space = {"mlp_hidden_size": {"choice": [[8], [8, 4]]}}
    keys = {"data_path": tiny["data_path"], "epochs": 1, "train_batch_size": 64}
    found = search("NeuMF", "tiny", space_file(tmp_path, space), None, keys, study=tmp_path / "study")
    assert sorted(trial["params"]["mlp_hidden_size"] for trial in found["trials"]) == [[8], [8, 4]]


def test_combinations_that_break_a_condition_are_no_trials(bpr, tmp_path, monkeypatch):
    began = counted(monkeypatch)
    conditions = ["embedding_size * learning_rate < 0.5", "epochs == 2"]
    found = search(**{**bpr, "space": space_file(tmp_path, {**GRID, "conditions": conditions})})
    ran = {(keys["embedding_size"], keys["learning_rate"]) for keys in began}
    assert ran == {(4, 0.1), (4, 0.01), (8, 0.01)} and len(began) == len(found["trials"]) == 3
    assert found["search"]["conditions"] == conditions


CORNER = {
    "embedding_size": {"int": [2, 12]}, "learning_rate": {"loguniform": [1e-3, 0.1]},
    "conditions": ["embedding_size * learning_rate < 0.02"],
}  # fmt: skip


@pytest.mark.parametrize("sampler, trials", [("random", 3), ("tpe", 12)])  # TPE begins to learn behind the tenth
def test_draws_that_break_a_condition_cost_nothing(bpr, tmp_path, monkeypatch, sampler, trials):
    monkeypatch.setattr("recbole_hatllm.search.run", quickly)
    arguments = {**bpr, "space": space_file(tmp_path, CORNER), "sampler": sampler, "trials": trials}
    whole = search(**{**arguments, "study": tmp_path / "whole"})
    assert [trial["number"] for trial in outcomes(whole)] == list(range(trials))
    assert all(t["params"]["embedding_size"] * t["params"]["learning_rate"] < 0.02 for t in whole["trials"])
    with monkeypatch.context() as patch:
        die_before_a_queued_trial_is_taken(patch, trials - 1)
        with pytest.raises(Killed):
            search(**arguments)
    assert outcomes(search(**arguments)) == outcomes(whole)


def quickly(*_, config_dict, **__):
    """A run that takes no time."""
    metrics = {"ndcg@10": config_dict["embedding_size"] / 100 - config_dict["learning_rate"]}
    return {"valid": metrics, "test": metrics, "test_interval": {}, "seconds": {"train": 1.0}}


def die_before_a_queued_trial_is_taken(patch, turn):
    import optuna

    calls, ask = [], optuna.Study.ask

    def die(study):
        calls.append(0)
        if len(calls) == turn:
            raise Killed
        return ask(study)

    patch.setattr(optuna.Study, "ask", die)


@pytest.mark.parametrize("sampler", ["grid", "random", "tpe"])
def test_conditions_that_leave_nothing_are_refused_before_any_trial(bpr, tmp_path, sampler):
    space = space_file(tmp_path, {**GRID, "conditions": ["embedding_size > 8"]})
    with pytest.raises(ConfigError, match=r"embedding_size > 8"):
        search(**{**bpr, "space": space}, sampler=sampler)
    assert not bpr["study"].exists()


def test_recboles_text_format_is_searched_as_yaml_is(bpr, tmp_path):
    file = tmp_path / "hyper.test"
    file.write_text("embedding_size choice [4,8]\nlearning_rate choice [0.1, 0.01]\n")
    assert outcomes(search(**{**bpr, "space": file})) == outcomes(search(**{**bpr, "study": tmp_path / "yaml"}))


def _work(arguments: dict) -> None:
    search(**arguments)


def _work_quickly(arguments: dict) -> None:
    import recbole_hatllm.search

    def once(*names, config_dict, **others):
        Path(config_dict["run_dir"]).mkdir(parents=True)  # an error where it is there already
        time.sleep(0.2)
        return quickly(*names, config_dict=config_dict, **others)

    recbole_hatllm.search.run = once
    search(**arguments)


def test_two_workers_draw_by_lot_without_a_clash(bpr, tmp_path, monkeypatch):
    arguments = {**bpr, "space": space_file(tmp_path, CORNER), "trials": 8, "sampler": "random"}
    workers = [get_context("spawn").Process(target=_work_quickly, args=(arguments,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    monkeypatch.setattr("recbole_hatllm.search.run", quickly)
    found = search(**arguments)
    assert [trial["state"] for trial in found["trials"]] == ["complete"] * 8
    assert outcomes(found) == outcomes(search(**{**arguments, "study": bpr["study"].parent / "alone"}))


def test_two_workers_never_run_a_trial_twice(bpr):
    workers = [get_context("spawn").Process(target=_work, args=(bpr,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found = search(**bpr)
    assert [trial["state"] for trial in found["trials"]] == ["complete"] * 4
    logs = [(bpr["study"] / f"trial-{n}" / "log.txt").read_text() for n in range(4)]
    assert all(log.count("run folder:") == 1 for log in logs)
    assert outcomes(found) == outcomes(search(**{**bpr, "study": bpr["study"].parent / "alone"}))


BAD_SPACES = [
    ({"embeding_size": {"choice": [4]}}, r"embeding_size.*embedding_size"),
    ({"n_in": {"choice": [4]}}, r"BPR does not read the key n_in"),
    ({"seed": {"choice": [1, -4]}}, r"seed is -4"),
    ({"learning_rate": {"choice": [0.1, "fast"]}}, r"learning_rate is 'fast'"),
    ({"learning_rate": [0.1, 0.2]}, r"plain list: write \{choice: \[0\.1, 0\.2\]\}"),
    ({"learning_rate": {"normal": [0, 1]}}, r"normal.*choice, uniform, loguniform, int"),
    ({"learning_rate": {"uniform": [0.2, 0.1]}}, r"\[0\.2, 0\.1\].*low < high"),
    ({"learning_rate": {"loguniform": [0, 0.1]}}, r"0 < low"),
    ({"embedding_size": {"int": [4, 9, 2]}}, r"\[4, 9, 2\].*whole steps"),
    ({"embedding_size": {"choice": [4, 4]}}, r"\[4, 4\].*different values"),
    ({"protocol": {"choice": ["windows"]}}, r"protocol cannot be searched"),
    ({"epochs": {"choice": [1]}}, r"epochs is searched and set at once"),
    ({}, r"searches nothing"),
]


@pytest.mark.parametrize("space, message", BAD_SPACES, ids=[str(list(space.items()))[1:-1] for space, _ in BAD_SPACES])
def test_a_bad_space_is_refused_before_any_trial(bpr, tmp_path, space, message):
    with pytest.raises(ConfigError, match=message):
        search(**{**bpr, "space": space_file(tmp_path, space)})
    assert not bpr["study"].exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sampler": "gird"}, r"'gird'.*grid, random, tpe"),
        ({"trials": 0}, r"trials is 0"),
        ({"space": "absent.yaml"}, r"absent\.yaml.*--space"),
        ({"storage": "nonsql://x"}, r"nonsql://x cannot be opened"),
    ],
)
def test_bad_options_end_in_one_sentence(bpr, options, message):
    with pytest.raises(ConfigError, match=message):
        search(**{**bpr, **options})


def test_a_study_folder_belongs_to_one_search(bpr, tmp_path):
    search(**bpr, trials=1)
    with pytest.raises(ConfigError, match=r"holds another search.*--study"):
        search(**{**bpr, "config_dict": {**bpr["config_dict"], "epochs": 3}})
    with pytest.raises(ConfigError, match="does not know"):
        search(**bpr, storage=str(tmp_path / "other.log"))


@pytest.mark.parametrize("file", sorted(schema.PROPERTIES.glob("search/*.yaml")), ids=lambda path: path.stem)
def test_shipped_spaces_are_small_or_say_their_size(file):
    space = read_space(file)
    size = 1
    for dimension in space.dimensions.values():
        size *= len(dimension.values)
    assert size <= 8 or f"= {size} runs" in file.read_text()


def test_the_command_stops_at_ctrl_c_and_goes_on(tiny, tmp_path):
    space = space_file(tmp_path, {"hidden_dropout_prob": {"choice": [0.2, 0.5]}, "n_heads": {"choice": [2, 3]}})
    command = ["search", "--model=SASRec", "--dataset=tiny", f"--data_path={tiny['data_path']}", f"--space={space}",
               "--epochs=2", "--hidden_size=8", f"--runs_dir={tmp_path / 'runs'}"]  # fmt: skip
    code = (
        "import signal, sys\nfrom recbole_hatllm import cli, search\nfirst = search.run\n"
        "def run(*a, **k):\n    result = first(*a, **k)\n    search.run = lambda *a, **k: signal.raise_signal(signal.SIGINT)\n"
        "    return result\n"
        "search.run = run\nsys.exit(cli.main(sys.argv[1:]))"
    )
    started = [sys.executable, "-c", code, *command]
    done = subprocess.run(started, capture_output=True, text=True, cwd=ROOT, preexec_fn=hears_ctrl_c)
    assert done.returncode == 130 and "the same command goes on" in done.stdout, done.stderr
    done = cli(*command)
    assert done.returncode == 0, done.stderr
    assert "(4/4)" in done.stdout and "(1/4)" not in done.stdout
    assert len(re.findall(r"^trial \d failed: ValueError", done.stdout, re.M)) == 2  # 8 is no multiple of 3 heads
    (folder,) = (tmp_path / "runs").glob("search-SASRec-tiny-leave_one_out-*")
    assert f"--config_files={folder / 'best.yaml'}" in done.stdout
    assert "--model" in refused("search", "--dataset=tiny")
