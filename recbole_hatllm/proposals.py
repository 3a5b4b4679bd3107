"""Which values the next trial of a search gets: a grid in its order, or draws by lot or by TPE; always such as the space allows."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import optuna
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import TrialState

from recbole_hatllm.config import Config
from recbole_hatllm.errors import ConfigError
from recbole_hatllm.space import Space

SAMPLERS = ("grid", "random", "tpe")
TRIALS = 20  # of random and tpe, where none are asked for
# Draws for one trial before the search is given up: some by TPE, which conditions may have cornered, then by lot.
_BY_TPE = 50
_BY_LOT = 10_000


class Proposals:
    """The plan of a search.

    Args:
        space: what is searched. config: without the searched keys. sampler: of `SAMPLERS`; by default grid where all keys have
            choices, else tpe. trials: at most so many; by default the whole grid, or `TRIALS`.

    Attributes:
        sampler: the one that is taken. total: how many trials there will be.

    Raises:
        ConfigError: no such sampler, a grid over a range, no such number of trials, or no combination keeps the conditions.
    """

    def __init__(self, space: Space, config: Config, sampler: str | None, trials: int | None):
        self.space, self.config, self.seed = space, config, config["seed"]
        ranges = [key for key, dimension in space.dimensions.items() if dimension.kind != "choice"]
        self.sampler = sampler or ("tpe" if ranges else "grid")
        if self.sampler not in SAMPLERS:
            raise ConfigError(f"sampler is {sampler!r}, and must be one of {', '.join(SAMPLERS)}.")
        if self.sampler == "grid" and ranges:
            raise ConfigError(f"A grid needs choices, and {ranges[0]} is a range: name --sampler=tpe or random.")
        if trials is not None and (not isinstance(trials, int) or isinstance(trials, bool) or trials < 1):
            raise ConfigError(f"trials is {trials!r}, and must be a whole number from 1.")
        self.total = trials or TRIALS
        if self.sampler == "grid":
            self._grid = [params for params in self._combinations() if self._allows(params)]
            if not self._grid:
                raise ConfigError(f"No combination of the grid keeps {self._conditions()}: change them or its values.")
            if trials and trials < len(self._grid):
                random.Random(self.seed).shuffle(self._grid)
                self._grid = self._grid[:trials]
            self.total = len(self._grid)
        else:
            self._draw(None, 0)

    def enqueue(self, study: optuna.Study, at_first: bool = False) -> None:
        """Puts into Optuna's queue what the next trial takes out of it; `at_first`, what is known from the start.

        The queue hands out each combination once, to however many workers; Optuna's own GridSampler may repeat some.
        """
        if self.sampler == "grid":
            for params in self._grid if at_first else ():
                study.enqueue_trial(params, skip_if_exists=True)
        elif not at_first:
            trials = study.get_trials(deepcopy=False)
            if all(trial.state != TrialState.WAITING for trial in trials):  # one that nobody lived to take
                study.enqueue_trial(self._draw(study, len(trials)))

    def _combinations(self) -> Iterator[dict[str, Any]]:
        choices = [dimension.choices() for dimension in self.space.dimensions.values()]
        return (dict(zip(self.space.dimensions, values)) for values in itertools.product(*choices))

    def _allows(self, params: dict[str, Any]) -> bool:
        return self.space.allows(self.space.values(params), self.config)

    def _conditions(self) -> str:
        return " and ".join(f"`{condition.text}`" for condition in self.space.conditions)

    def _draw(self, study: optuna.Study | None, number: int) -> dict[str, Any]:
        """Values for the trial of that number, drawn anew until they keep the conditions; by lot where there is no study.

        The conditions are not told to TPE: a draw that breaks one is no trial, so TPE's own view of good and bad stays true.
        """
        by_tpe = _BY_TPE if self.sampler == "tpe" and study is not None else 0
        unborn = optuna.trial.create_trial(state=TrialState.RUNNING)
        for attempt in range(by_tpe + _BY_LOT):
            kind = TPESampler if attempt < by_tpe else RandomSampler
            params = {}
            for key, dimension in self.space.dimensions.items():
                # A seed for each value, so that a search that went on draws what one never stopped would have drawn.
                seed = random.Random(f"{self.seed} {number} {key}" + (f" {attempt}" if attempt else "")).getrandbits(32)
                params[key] = kind(seed=seed).sample_independent(study, unborn, key, dimension.distribution())
            if self._allows(params):
                return params
        raise ConfigError(
            f"None of {_BY_LOT:,} draws from the space keeps {self._conditions()}: change them, or narrow the space to "
            "where they hold."
        )
