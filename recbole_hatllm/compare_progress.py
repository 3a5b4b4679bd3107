"""How far a comparison is: lines for a log, or on a terminal lines of what ended above a bar over all runs, with the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partialmethod
from threading import Event, Thread
from unittest import mock

from tqdm import tqdm

from recbole_hatllm.compare_report import outcome
from recbole_hatllm.run_folder import duration


def time_left(runs: Sequence, current=None, spent: float = 0.0) -> float | None:
    """Seconds that the runs without an outcome will take, by those that are finished; None where nothing tells.

    A run is taken to last as long as, in the mean, those of its entry with other seeds; where there is none, those of its model;
    else all that train. What only counts says nothing of what trains.

    Args:
        runs: `compare.Planned`. current: the one that has been running for `spent` seconds.
    """
    ended = [run for run in runs if run.result]
    left = 0.0
    for run in runs:
        if run.result is None and run.reason is None:
            alike = (
                [other.seconds for other in ended if other.entry is run.entry]
                or [other.seconds for other in ended if other.entry.model == run.entry.model]
                or [other.seconds for other in ended if run.entry.counts or not other.entry.counts]
            )
            if not alike:
                return None
            left += max(sum(alike) / len(alike) - (spent if run is current else 0.0), 0.0)
    return left


class Progress:
    """Tells of `runs`, `compare.Planned`, while they are made; `metric` is what it says of a finished one.

    On a terminal (standard error) the running run shows its own bars below, which go when they are done.
    """

    def __init__(self, runs: Sequence, metric: str):
        self.runs, self.metric = runs, metric
        self.live = sys.stderr.isatty()
        self._current, self._began = None, 0.0

    def __enter__(self) -> Progress:
        if self.live:
            form = "{desc} |{bar}| {n_fmt}/{total_fmt} runs{postfix}"
            done = len(self.runs) - self._waiting()
            self._bar = tqdm(total=len(self.runs), initial=done, bar_format=form, leave=False, dynamic_ncols=True)
            self._over, self._clock = Event(), Thread(target=self._tick, daemon=True)
            self._clock.start()
        return self

    def __exit__(self, *_) -> None:
        if self.live:
            self._over.set()
            self._clock.join()
            self._bar.close()

    @contextmanager
    def running(self, run) -> Iterator[None]:
        """Around the making of one run, which has an outcome behind it unless it was interrupted."""
        self._current, self._began = run, time.monotonic()
        name = f"run {self.runs.index(run) + 1}/{len(self.runs)}: {run.label}"
        if not self.live:
            left = self._left()
            print(name + (f", {left}" if left else ""), flush=True)
            yield
            print(f"    {outcome(run, self.metric)}", flush=True)
            return
        # Every validation of every run would leave a bar behind.
        with mock.patch.object(tqdm, "__init__", partialmethod(tqdm.__init__, leave=False)):
            yield
        self._current = None
        self._bar.write(f"{name}: {outcome(run, self.metric)}")
        self._bar.update()

    def _tick(self) -> None:
        """Keeps the bar up to date: a run's steps do not touch it."""
        while True:
            current = self._current
            self._bar.set_description_str(current.label if current else "", refresh=False)
            failed, left = sum(run.reason is not None for run in self.runs), self._left()
            said = [f"{failed} failed"] if failed else []
            self._bar.set_postfix_str(", ".join([*said, left] if left else said))
            if self._over.wait(1.0):
                return

    def _left(self) -> str:
        left = time_left(self.runs, self._current, time.monotonic() - self._began)
        return "" if left is None else f"about {duration(left)} left"

    def _waiting(self) -> int:
        return sum(run.result is None and run.reason is None for run in self.runs)
