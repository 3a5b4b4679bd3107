"""Trials that are given up early: Optuna's pruners set the validation curve of a trial beside those of the others."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import optuna
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.trial import Trial

from recbole_hatllm.errors import ConfigError

# Validations are numbered as `quick_start.run` tells them.
PRUNERS: dict[str, Callable[[], BasePruner]] = {
    "none": NopPruner,
    # Gives up a trial whose best validation so far is below the median that finished trials had at the same validation, once five
    # are finished; never before the first step.
    "median": lambda: MedianPruner(n_startup_trials=5, n_warmup_steps=1),
    # Lets the best quarter of the trials go on behind validations 1, 4, 16, ...; without waiting for the others.
    "halving": lambda: SuccessiveHalvingPruner(min_resource=1, reduction_factor=4),
}


def pruner_of(name: str) -> BasePruner:
    """The pruner of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in PRUNERS:
        raise ConfigError(f"pruner is {name!r}, and must be one of {', '.join(PRUNERS)}.")
    return PRUNERS[name]()


class Watch:
    """Hears the validations of one trial, tells Optuna each of them once, and says whether to give it up.

    A trial that a dead worker left half-done tells its earlier validations again, and some that Optuna has not heard of yet.

    Attributes:
        curve: valid_metric by the number of the validation. seconds: that the trial has taken, those of dead workers included.
    """

    def __init__(self, study: optuna.Study, trial: Trial):
        self.trial = trial
        self.curve: dict[int, float] = dict(study.get_trials(deepcopy=False)[trial.number].intermediate_values)
        self.seconds: float = trial.user_attrs.get("seconds", 0.0)
        self._since = time.monotonic()

    def __call__(self, number: int, score: float) -> bool:
        now = time.monotonic()
        self.seconds, self._since = self.seconds + now - self._since, now
        if number not in self.curve:
            self.curve[number] = score
            self.trial.report(score, number)
            self.trial.set_user_attr("seconds", self.seconds)
        return self.trial.should_prune()

    def best(self, maximize: bool) -> float:
        """The best validation so far."""
        told = [score for score in self.curve.values() if not math.isnan(score)]
        return max(told) if maximize else min(told)
