"""Pruning: decisions against the rules by hand on made-up curves, and real runs that are given up, killed and gone on with."""

import json
import statistics
import warnings

import optuna
import pytest

from recbole_hatllm import quick_start, resume, run
from recbole_hatllm.errors import ConfigError
from recbole_hatllm.pruning import PRUNERS, Watch
from recbole_hatllm.search import search
from recbole_hatllm.trainer import GivenUp, StepTrainer
from tests.test_search import Killed, outcomes, space_file
from tests.test_trainer import same_outcome

LENGTH = 6
VALUES = [3, 7, 1, 8, 2, 6, 9, 4, 5, 10, 12, 11]


def curve(seed: int) -> list[float]:
    """A rising curve that may fall again: what it reaches early says something of its end, not all."""
    return [round(0.01 * seed * n / LENGTH - 0.002 * (seed * n % 5), 6) for n in range(1, LENGTH + 1)]


@pytest.fixture
def fake(tiny, tmp_path, monkeypatch):
    """Arguments of a search over made-up runs, whose validations are `curve(embedding_size)`; they take no time."""

    def run(*_, config_dict, callback_fn):
        values = curve(config_dict["embedding_size"])
        for number, value in enumerate(values, 1):
            if callback_fn and callback_fn(number, value) and number < len(values):
                raise GivenUp
        metrics = {"ndcg@10": max(values)}
        return {"valid": metrics, "test": metrics, "test_interval": {}, "seconds": {"train": 1.0}}

    monkeypatch.setattr("recbole_hatllm.search.run", run)
    return {
        "model": "BPR", "dataset": "tiny", "config_dict": {"data_path": tiny["data_path"], "runs_dir": str(tmp_path)},
        "study": tmp_path / "study", "space": space_file(tmp_path, {"embedding_size": {"choice": VALUES}}),
    }  # fmt: skip


def by_median(values: list[int]) -> dict[int, int]:
    """Where each trial is given up: five finished ones are needed, and the median is theirs at the same validation."""
    finished, pruned = [], {}
    for value in values:
        own = curve(value)
        for number in range(1, LENGTH):
            if len(finished) >= 5 and max(own[:number]) < statistics.median(other[number - 1] for other in finished):
                pruned[value] = number
                break
        else:
            finished.append(own)
    return pruned


def by_halving(values: list[int]) -> dict[int, int]:
    """Where each trial is given up: behind validations 1 and 4 the best quarter of those that came there goes on."""
    rungs, pruned = {1: [], 4: []}, {}
    for value in values:
        for number, reached in rungs.items():
            reached.append(curve(value)[number - 1])
            if reached[-1] < sorted(reached, reverse=True)[max(len(reached) // 4 - 1, 0)]:
                pruned[value] = number
                break
    return pruned


@pytest.mark.parametrize("pruner, rule", [("median", by_median), ("halving", by_halving)])
def test_trials_are_given_up_by_the_rule(fake, capsys, pruner, rule):
    found = search(**fake, pruner=pruner)
    trials = sorted(found["trials"], key=lambda trial: trial["number"])
    values = [trial["params"]["embedding_size"] for trial in trials]
    expected = rule(values)
    assert 2 <= len(expected) < len(values) - 1
    assert {v: t["pruned"] for v, t in zip(values, trials) if t["state"] == "pruned"} == expected
    for value, trial in zip(values, trials):
        told = curve(value)[: expected.get(value, LENGTH)]
        assert trial["valid"]["ndcg@10"] == max(told) and (trial["test"] is None) == (value in expected)
    study = json.loads((fake["study"] / "study.json").read_text())
    assert study["trials"] == found["trials"] and study["search"]["pruner"] == pruner
    states = [trial["state"] for trial in found["trials"]]
    assert states == sorted(states) and states[0] == "complete"
    assert found["best"] == max((t for t in trials if t["test"]), key=lambda t: t["valid"]["ndcg@10"])["number"]
    out = capsys.readouterr().out
    assert out.count("-> pruned behind validation") == len(expected) and out.count("pruned\n") == 0
    assert search(**fake, pruner=pruner) == found


def test_what_was_decided_stays_where_the_worker_died_before_it_said_so(fake, tmp_path, monkeypatch):
    """Optuna's halving asks a trial once at each of its rungs, and would let it pass when asked again."""
    whole = search(**{**fake, "study": tmp_path / "whole"}, pruner="halving")
    with monkeypatch.context() as patch:
        die_before_it_is_written_as_pruned(patch)
        with pytest.raises(Killed):
            search(**fake, pruner="halving")
    assert outcomes(search(**fake, pruner="halving")) == outcomes(whole)


def test_a_pruned_trial_is_never_the_best_whatever_it_had_reached(fake, monkeypatch):
    falls = {value: [0.5 + value / 100] + [0.1] * (LENGTH - 1) for value in VALUES}
    falls[11] = [0.9, *[0.01] * (LENGTH - 1)]
    monkeypatch.setitem(globals(), "curve", falls.get)
    monkeypatch.setitem(
        PRUNERS, "median",
        lambda: optuna.pruners.ThresholdPruner(lower=0.05, n_warmup_steps=2),
    )  # fmt: skip
    found = search(**fake, pruner="median")
    pruned = next(trial for trial in found["trials"] if trial["state"] == "pruned")
    assert pruned["params"] == {"embedding_size": 11} and pruned["valid"] == {"ndcg@10": 0.9} and pruned["pruned"] == 2
    assert found["trials"][0]["params"] == {"embedding_size": 12} and found["trials"][-1] == pruned
    assert "embedding_size: 12" in (fake["study"] / "best.yaml").read_text()


def test_without_a_pruner_nothing_is_told(fake, monkeypatch):
    found = search(**fake)
    assert found["search"]["pruner"] == "none" and {trial["state"] for trial in found["trials"]} == {"complete"}
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{fake['study'] / 'study.db'}")
    assert all(not trial.intermediate_values for trial in study.get_trials())


def test_bad_pruners_end_in_one_sentence(fake, tmp_path):
    with pytest.raises(ConfigError, match="pruner is 'mean', and must be one of none, median, halving"):
        search(**fake, pruner="mean")
    steps = space_file(tmp_path, {"eval_step": {"choice": [1, 2]}})
    with pytest.raises(ConfigError, match="eval_step is searched"):
        search(**{**fake, "space": steps}, pruner="median")


# --- real runs


@pytest.fixture
def bpr(tiny, tmp_path, monkeypatch):
    """A learning rate that learns nothing, which is given up behind its third validation, and a good one."""
    monkeypatch.setitem(
        PRUNERS, "median",
        lambda: optuna.pruners.ThresholdPruner(lower=0.185, n_warmup_steps=3),
    )  # fmt: skip
    keys = {"data_path": tiny["data_path"], "runs_dir": str(tmp_path / "runs"), "epochs": 5, "train_batch_size": 64}
    space = {"learning_rate": {"choice": [1e-9, 0.05]}}
    return {
        "model": "BPR", "dataset": "tiny", "config_dict": keys, "study": tmp_path / "study", "pruner": "median",
        "space": space_file(tmp_path, space),
    }  # fmt: skip


def curves(folder) -> list[dict[int, float]]:
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{folder / 'study.db'}")
    return [trial.intermediate_values for trial in study.get_trials()]


def die_before_the_state_is_saved(patch):
    save = StepTrainer._save_state
    patch.setattr(StepTrainer, "_save_state", lambda self: _die() if _learns_nothing(self) else save(self))


def die_before_a_validation_is_told(patch):
    tell = StepTrainer._tell

    def die(self, callback_fn, validation, every):
        if _learns_nothing(self) and len(self.history) == 2:
            _die()
        tell(self, callback_fn, validation, every)

    patch.setattr(StepTrainer, "_tell", die)


def die_between_telling_and_deciding(patch):
    should = optuna.trial.Trial.should_prune
    patch.setattr(optuna.trial.Trial, "should_prune", lambda self: _die() if should(self) else False)


def die_before_it_is_known_as_pruned(patch):
    import recbole_hatllm.search

    def die(*arguments, **options):
        try:
            return attempt(*arguments, **options)
        except GivenUp:
            _die()

    attempt = recbole_hatllm.search.attempt
    patch.setattr("recbole_hatllm.search.attempt", die)


def die_before_it_is_written_as_pruned(patch):
    tell = optuna.Study.tell
    patch.setattr(optuna.Study, "tell", lambda *a, **k: _die() if k else tell(*a, **k))


def _die():
    raise Killed


def _learns_nothing(trainer) -> bool:
    return trainer.learning_rate < 1e-8


WAYS = [
    die_before_the_state_is_saved, die_before_a_validation_is_told, die_between_telling_and_deciding,
    die_before_it_is_known_as_pruned, die_before_it_is_written_as_pruned,
]  # fmt: skip


def test_a_killed_search_prunes_as_one_never_killed(bpr, tmp_path, monkeypatch):
    warnings.simplefilter("error", UserWarning)  # Optuna warns where a validation is reported twice
    whole = search(**{**bpr, "study": tmp_path / "whole"})
    states = {trial["params"]["learning_rate"]: trial["state"] for trial in whole["trials"]}
    assert states == {1e-9: "pruned", 0.05: "complete"}
    expected = curves(tmp_path / "whole")
    assert [list(found) for found in expected] == [[1, 2, 3], [1, 2, 3, 4, 5]]
    for die in WAYS:
        arguments = {**bpr, "study": tmp_path / die.__name__}
        with monkeypatch.context() as patch:
            die(patch)
            with pytest.raises(Killed):
                search(**arguments)
        found = search(**arguments)
        assert outcomes(found) == outcomes(whole), die.__name__
        assert curves(arguments["study"]) == expected, die.__name__
        for trial in found["trials"]:
            log = (arguments["study"] / f"trial-{trial['number']}" / "log.txt").read_text()
            assert ("run folder:" in log) == (trial["state"] == "complete")
            assert trial["seconds"] > 0 and trial["folder"].endswith(f"trial-{trial['number']}")


def test_a_pruned_run_stays_and_may_be_finished_by_hand(bpr, tmp_path):
    found = search(**bpr)
    pruned = next(trial for trial in found["trials"] if trial["state"] == "pruned")
    finished = resume(pruned["folder"])
    keys = {**bpr["config_dict"], **pruned["params"]}
    assert finished["test"] == run("BPR", "tiny", config_dict=keys)["test"] and finished["steps"] > 0
    assert search(**bpr) == found


# --- who listens to a run


def test_a_run_tells_its_validations_and_goes_on_where_it_was_given_up(tiny):
    keys = {**tiny, "train_steps": 14, "eval_step": 4, "stopping_step": 10}
    told = []
    whole = run("HatLLM", "tiny", config_dict=keys, callback_fn=lambda *heard: told.append(heard))
    assert told == [(n, entry["ndcg@10"]) for n, entry in zip((1, 2, 3, 4), whole["curve"])]

    heard = []

    def until_two(number, score):
        heard.append((number, score))
        return number == 2

    with pytest.raises(GivenUp):
        run("HatLLM", "tiny", config_dict={**keys, "run_dir": f"{tiny['runs_dir']}/given-up"}, callback_fn=until_two)
    assert heard == told[:2]
    again = []
    finished = resume(f"{tiny['runs_dir']}/given-up", callback_fn=lambda *one: again.append(one))
    assert again == told
    same_outcome(finished, whole)


def test_the_last_validation_gives_nothing_up(tiny):
    keys = {**tiny, "train_steps": 8, "eval_step": 4}
    result = run("HatLLM", "tiny", config_dict=keys, callback_fn=lambda number, _: number == 2)
    assert result["steps"] == 8
    impatient = {**keys, "train_steps": 400, "stopping_step": 1}
    ended = run("HatLLM", "tiny", config_dict=impatient)
    assert ended["steps"] < 400
    result = run("HatLLM", "tiny", config_dict=impatient, callback_fn=lambda number, _: 4 * number == ended["steps"])
    assert result["steps"] == ended["steps"]


def test_what_a_model_does_before_its_first_step_is_validation_0(tiny):
    told = []
    keys = {**tiny, "head_init": "probe", "train_steps": 3, "eval_step": 2}
    run("HatLLM", "tiny", config_dict=keys, callback_fn=lambda number, _: told.append(number))
    assert told == [0, 1, 2]
    with pytest.raises(GivenUp):
        run("HatLLM", "tiny", config_dict=keys, callback_fn=lambda *_: True)


def test_models_with_a_trainer_of_their_own_are_given_up_too(tiny, tmp_path):
    from recbole_hatllm.trainer import trainer_class

    keys = {"data_path": tiny["data_path"], "runs_dir": str(tmp_path), "epochs": 5, "show_progress": False}
    config = quick_start.Config("RecVAE", "tiny", config_dict=keys)
    assert not issubclass(trainer_class(config), StepTrainer)
    told = []

    def until_one(number, _):
        told.append(number)
        return number == 1

    with pytest.raises(GivenUp):
        run("RecVAE", "tiny", config_dict=keys, callback_fn=until_one)
    assert told == [0, 1]


def test_a_watch_tells_optuna_each_validation_once():
    study = optuna.create_study(direction="maximize")
    trial = study.ask()
    first = Watch(study, trial)
    assert first(1, 0.1) is False and first(2, 0.3) is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = Watch(study, optuna.trial.Trial(study, trial._trial_id))
        for number, score in [(1, 0.1), (2, 0.3), (3, float("nan")), (4, 0.2)]:
            second(number, score)
    assert study.trials[0].intermediate_values.keys() == {1, 2, 3, 4}
    assert second.best(True) == 0.3 and second.best(False) == 0.1 and second.seconds >= first.seconds > 0
