"""Hyper-parameter search: Optuna proposes, a trial is a normal run, validation decides, test is only reported.

A study folder holds `study.db` (Optuna's), `trial-<number>/` (run folders), `study.json` (all trials), `best.yaml` and figures.
Any number of workers may share it: a trial belongs to the worker that holds its lock file, which a dead one does not.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import Trial, TrialState

from recbole_hatllm import distributed, schema, search_figures
from recbole_hatllm.attempt import attempt
from recbole_hatllm.errors import ConfigError, HatError
from recbole_hatllm.files import publish
from recbole_hatllm.proposals import Proposals
from recbole_hatllm.pruning import Watch, pruner_of
from recbole_hatllm.quick_start import run
from recbole_hatllm.search_report import best_yaml, progress, records, summary
from recbole_hatllm.space import PLACE, check_space, read_space
from recbole_hatllm.trainer import GivenUp


def search(
    model: str,
    dataset: str,
    space: str | Path | None = None,
    config_file_list: list[str] | None = None,
    config_dict: dict[str, Any] | None = None,
    trials: int | None = None,
    sampler: str | None = None,
    study: str | Path | None = None,
    storage: str | None = None,
    pruner: str | None = None,
) -> dict:
    """Searches the keys of a space; the same call again goes on where the last one stopped.

    Args:
        model, dataset, config_file_list, config_dict: as in `run`, the same for all trials.
        space: a file, see `read_space`; by default properties/search/<model>.yaml.
        trials: at most so many; by default the whole grid, or 20.
        sampler: grid, random or tpe; by default grid where all keys have choices, else tpe.
        study: the study folder; by default one in `runs_dir` whose name follows from everything above but `trials`.
        storage: an Optuna storage URL or the path of a journal file; by default `study.db` in the study folder.
        pruner: of `pruning.PRUNERS`, by default none: which trials are given up by their validation curves.

    Returns:
        what `study.json` holds: the search and its trials, the best on validation first.

    Raises:
        HatError: bad space, keys or data; no trial came to an end. Interrupted: Ctrl-C; the same call goes on.
    """
    distributed.alone("search")
    return Search(model, dataset, space, config_file_list, config_dict, trials, sampler, study, storage, pruner).go()


class Search:
    """One worker on one study; arguments as in `search`."""

    def __init__(
        self, model, dataset, space, config_file_list, config_dict, trials, sampler, study, storage, pruner=None
    ):
        self.space = read_space(space or schema.PROPERTIES / "search" / f"{model}.yaml")
        if twice := sorted(self.space.dimensions.keys() & (config_dict or {}).keys()):
            raise ConfigError(f"{twice[0]} is searched and set at once: leave it out of one of them.")
        files = [schema.read_yaml(file) for file in config_file_list or []]
        self.keys = {key: value for keys in [*files, config_dict or {}] for key, value in keys.items()}
        if self.keys.get("run_dir"):
            raise ConfigError("A search makes a run folder for each trial: name the folder above them by study.")
        config = check_space(self.space, model, dataset, self.keys)
        self.metric, self.maximize = config["valid_metric"].lower(), config["valid_metric_bigger"]
        self.seed = config["seed"]
        pruner = pruner or "none"
        self.pruner, self.prunes = pruner_of(pruner), pruner != "none"
        if self.prunes and "eval_step" in self.space.dimensions:
            raise ConfigError("eval_step is searched, and a pruner compares trials validation by validation: set it.")
        self.proposals = Proposals(self.space, config, sampler, trials)
        self.total = self.proposals.total
        about = {
            "model": config["model"],
            "dataset": dataset,
            "protocol": config["protocol"],
            "valid_metric": self.metric,
            "sampler": self.proposals.sampler,
            "pruner": pruner,
            "space": {key: {dimension.kind: dimension.values} for key, dimension in self.space.dimensions.items()},
            "conditions": [condition.text for condition in self.space.conditions],
            "keys": {key: value for key, value in self.keys.items() if key not in (*PLACE, *self.space.dimensions)},
        }
        self.about = json.loads(json.dumps(about, default=str))
        digest = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:8]
        name = f"{config['model']}-{dataset}-{config['protocol']}-{digest}"
        self.folder = Path(study or Path(config["runs_dir"]) / f"search-{name}")
        publish(self.folder / ".gitignore", lambda file: file.write_text(".*.lock\n"))
        self.lock = FileLock(self.folder / ".study.lock")
        with self.lock:
            self.study = self._open(name, storage)

    def _open(self, name: str, storage: str | None) -> optuna.Study:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        known = self.folder / "study.json"
        if known.is_file() and json.loads(known.read_text(encoding="utf-8"))["search"] != self.about:
            raise ConfigError(f"{self.folder} holds another search (see its study.json): name another --study.")
        place = storage or f"sqlite:///{self.folder / 'study.db'}"
        try:
            kept = place if "://" in place else JournalStorage(JournalFileBackend(place))
            direction = "maximize" if self.maximize else "minimize"
            study = optuna.create_study(
                study_name=name, storage=kept, direction=direction, load_if_exists=True, pruner=self.pruner
            )
        except Exception as error:  # SQLAlchemy and its drivers have errors of their own
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"The storage {place} cannot be opened ({reason}): check --storage.") from error
        if not study.trials and any(self.folder.glob("trial-*")):
            raise ConfigError(
                f"{self.folder} has trials that {place} does not know: name another --study or --storage."
            )
        self.proposals.enqueue(study, at_first=True)
        return study

    def go(self) -> dict:
        """Runs trials until there are enough; prints and returns what came of them."""
        self._write()
        try:
            while taken := self._take():
                trial, lock = taken
                with lock:
                    self._run(trial)
                Path(lock.lock_file).unlink(missing_ok=True)
                print(progress(self._write(), trial.number, self.total), flush=True)
        except KeyboardInterrupt:
            print(f"Stopped; the same command goes on with {self.folder}.", flush=True)
            raise
        found = self._write()
        if found["best"] is None:
            reason = next((trial["reason"] for trial in found["trials"] if trial["reason"]), "others still run them")
            raise HatError(f"No trial of {self.folder} came to an end: {reason}")
        with self.lock:  # of two workers, the later one draws what both have found
            drawn = search_figures.draw(self.study, self.space, self._write(), self.seed, self.folder)
        print(summary(found, self.folder), flush=True)
        if drawn:
            print(f"figures and their numbers: {', '.join(drawn)}, in the study folder", flush=True)
        return found

    def _take(self) -> tuple[Trial, FileLock] | None:
        """The next trial with its lock held: one that a dead worker left half-done, else a new one."""
        with self.lock:
            trials = self.study.get_trials(deepcopy=False)
            for trial in trials:
                if trial.state == TrialState.RUNNING and (lock := self._lock(trial.number)):
                    if self.study.get_trials(deepcopy=False)[trial.number].state == TrialState.RUNNING:
                        return self._draw(Trial(self.study, trial._trial_id)), lock
                    lock.release()  # its worker ended it while we looked
            if sum(trial.state != TrialState.WAITING for trial in trials) >= self.total:
                return None
            self.proposals.enqueue(self.study)
            trial = self._draw(self.study.ask())
            return trial, self._lock(trial.number)

    def _draw(self, trial: Trial) -> Trial:
        for dimension in self.space.dimensions.values():
            dimension.suggest(trial)  # the value that it was queued with
        return trial

    def _lock(self, number: int) -> FileLock | None:
        """The lock of a trial, or None where a living worker holds it."""
        lock = FileLock(self.folder / f".trial-{number}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return None
        return lock

    def _run(self, trial: Trial) -> None:
        outcome = trial.user_attrs.get("outcome") or self._outcome_of_twin(trial) or self._outcome(trial)
        trial.set_user_attr("outcome", outcome)
        if "pruned" in outcome:
            self.study.tell(trial, state=TrialState.PRUNED)
        elif "reason" in outcome:
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            self.study.tell(trial, outcome["valid"][self.metric])

    def _outcome_of_twin(self, trial: Trial) -> dict | None:
        """What another trial with the same values came to."""
        for other in self.study.get_trials(deepcopy=False):
            if other.number != trial.number and other.params == trial.params:
                if "outcome" in other.user_attrs:
                    return other.user_attrs["outcome"]
                if other.state == TrialState.RUNNING and other.number < trial.number:
                    return {"reason": f"The same values as in trial {other.number}, which is running."}
        return None

    def _outcome(self, trial: Trial) -> dict:
        """Runs the trial, or what is missing of it: metrics, seconds and folder, or the reason why there are none.

        One that was pruned has the best of its validation metric so far.
        """
        folder = self.folder / f"trial-{trial.number}"
        keys = {"show_progress": False, **self.keys, **self.space.values(trial.params), "run_dir": str(folder)}
        watch = Watch(self.study, trial) if self.prunes else None
        begin = partial(run, self.about["model"], self.about["dataset"], config_dict=keys, callback_fn=watch)
        try:
            result = attempt(folder, begin, callback_fn=watch)
        except GivenUp:
            return {
                "pruned": max(watch.curve), "valid": {self.metric: watch.best(self.maximize)},
                "seconds": round(watch.seconds, 1), "folder": str(folder),
            }  # fmt: skip
        if "reason" in result:
            return result
        if not result["valid"]:
            return {"reason": "The run was never validated: train longer, or validate more often by eval_step."}
        seconds = round(sum(result["seconds"].values()), 1)
        kept = {name: result[name] for name in ("valid", "test", "test_interval")}
        return {**kept, "seconds": seconds, "folder": str(folder)}

    def _write(self) -> dict:
        """Brings `study.json` and `best.yaml` up to date; returns what the former holds."""
        with self.lock:
            trials = records(self.study.get_trials(deepcopy=False), self.space, self.metric, self.maximize)
            best = trials[0] if trials and trials[0]["state"] == "complete" else None
            found = {"search": self.about, "best": best and best["number"], "trials": trials}
            text = json.dumps(found, indent=2, ensure_ascii=False)
            publish(self.folder / "study.json", lambda file: file.write_text(text, encoding="utf-8"))
            if best:
                chosen = best_yaml(found, self.folder / "best.yaml")
                publish(self.folder / "best.yaml", lambda file: file.write_text(chosen, encoding="utf-8"))
        return found
