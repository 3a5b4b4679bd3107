"""How far a comparison is: the time left by hand, and what a terminal gets to see."""

from __future__ import annotations

import io
import re
import sys

import pytest
from tqdm import tqdm

from recbole_hatllm.compare import Planned, compare
from recbole_hatllm.compare_progress import Progress, time_left
from recbole_hatllm.suite import Entry
from tests.test_compare import keys  # noqa: F401

ENTRIES = {
    "P": Entry("P", "Pop", counts=True), "Q": Entry("Q", "MarkovChain", counts=True), "A": Entry("A", "HatLLM"),
    "B": Entry("B", "HatLLM", {"n_in": 1}), "C": Entry("C", "BPR"), "D": Entry("D", "MF"),
}  # fmt: skip


def planned(name: str, seed: int, seconds: float | None = None, reason: str | None = None) -> Planned:
    result = None if seconds is None else {"seconds": {"prepare": seconds / 4, "train": 3 * seconds / 4}}
    return Planned(ENTRIES[name], seed, {}, None, result, None, reason)


def test_the_time_left_by_hand():
    runs = [planned("P", 0, 1), planned("Q", 0), planned("A", 0, 100), planned("A", 1, 140), planned("A", 2), planned("B", 0),
            planned("C", 0, 60), planned("C", 1, reason="broken"), planned("D", 0)]  # fmt: skip
    # Q: the mean of all, (1 + 100 + 140 + 60) / 4; A: of its seeds; B: of its model, HatLLM; D: of all that train.
    assert time_left(runs) == pytest.approx(75.25 + 120 + 120 + 100)
    assert time_left(runs, runs[4], 50) == pytest.approx(75.25 + 70 + 120 + 100)
    assert time_left(runs, runs[4], 500) == pytest.approx(75.25 + 0 + 120 + 100)
    runs[5] = planned("B", 1, 10)
    assert time_left(runs) == pytest.approx((1 + 100 + 140 + 60 + 10) / 5 + 120 + (100 + 140 + 60 + 10) / 4)


def test_what_counts_says_nothing_of_what_trains():
    assert time_left([planned("P", 0, 1), planned("C", 0)]) is None
    assert time_left([planned("P", 0, 1), planned("Q", 0)]) == 1
    assert time_left([planned("C", 0)]) is None and time_left([planned("C", 0, 5), planned("D", 0, reason="x")]) == 0


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_ended_runs_are_lines_above_a_bar_and_the_bars_of_runs_go(keys, monkeypatch, capsys):  # noqa: F811
    screen = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", screen)
        patch.setenv("LINES", "40")
        keys["n_heads"] = 3
        compare(["BPR", "SASRecFast"], "tiny", [0, 1], config_dict=keys, floors=False)
    seen = [re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", part).rstrip() for part in re.split(r"[\r\n]", screen.getvalue())]
    assert any(re.match(r"BPR, seed 0 +\|.*\| 0/4 runs", line) for line in seen)
    assert any(re.match(r"SASRecFast, seed 1 +\|.*\| 3/4 runs, 1 failed, about \d+ s left", line) for line in seen)
    assert any(line.startswith("train") for line in seen)  # the run's own bar
    lines = capsys.readouterr().out.splitlines()
    assert [line[:8] for line in lines if line.startswith("run ")] == [f"run {n}/4:" for n in range(1, 5)]
    assert re.match(
        r"run 1/4: BPR, seed 0: NDCG@10 0\.\d{4}, \d+ s", next(line for line in lines if line.startswith("run 1"))
    )
    assert "run 2/4: SASRecFast, seed 0: failed: " in "\n".join(lines)
    kept = tqdm(total=1, file=Terminal())
    kept.close()
    assert kept.leave is True  # as before


def test_in_a_log_there_are_no_bars(keys, capsys):  # noqa: F811
    compare(["BPR"], "tiny", [0, 1], config_dict=keys, floors=False)
    done = capsys.readouterr()
    assert re.search(r"^run 1/2: BPR, seed 0\n    NDCG@10 .*\nrun 2/2: BPR, seed 1, about \d+ s left\n", done.out, re.M)
    assert "|" not in done.err and "train" not in done.err


def test_an_interrupted_run_leaves_no_outcome(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    run = planned("A", 0)
    with pytest.raises(KeyboardInterrupt), Progress([run], "ndcg@10") as progress, progress.running(run):
        raise KeyboardInterrupt
    assert not progress._clock.is_alive()
