"""Bootstrap intervals against a plain loop, the normal approximation, and what an interval promises."""

import json
from pathlib import Path

import numpy as np
import pytest

from recbole_hatllm import run
from recbole_hatllm.intervals import bootstrap

NAMES = ["hit@1", "hit@10", "ndcg@5", "ndcg@10"]


def metric(ranks, name: str) -> float:
    kind, cut = name.split("@")
    return float(np.mean([(1 if kind == "hit" else 1 / np.log2(r + 1)) if r <= int(cut) else 0 for r in ranks]))


def some_ranks(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).geometric(0.08, rows)


def test_equals_resampling_row_by_row():
    ranks, draw = some_ranks(300), np.random.default_rng(5)
    resamples = [ranks[draw.integers(0, 300, 300)] for _ in range(3000)]
    for name, ends in bootstrap(ranks, NAMES).items():
        expected = np.quantile([metric(ranks, name) for ranks in resamples], [0.025, 0.975])
        assert ends == pytest.approx(expected, abs=0.008), name
        assert ends[0] < metric(ranks, name) < ends[1]


def test_hit_is_near_the_normal_approximation():
    ranks = some_ranks(5000)
    rate = metric(ranks, "hit@10")
    half = 1.96 * np.sqrt(rate * (1 - rate) / 5000)
    assert bootstrap(ranks, ["hit@10"])["hit@10"] == pytest.approx([rate - half, rate + half], abs=0.0015)


def test_covers_the_truth_about_95_times_in_100():
    truth = 1 - (1 - 0.08) ** 10
    ends = [bootstrap(some_ranks(400, seed), ["hit@10"], seed)["hit@10"] for seed in range(300)]
    assert 0.91 < np.mean([low <= truth <= high for low, high in ends]) < 0.985


def test_a_million_rows_and_deep_lists_in_blocks():
    ranks = np.random.default_rng(0).integers(1, 20_000, 1_000_000)
    low, high = bootstrap(ranks, ["hit@5000"])["hit@5000"]
    assert low < np.mean(ranks <= 5000) < high and high - low < 0.002


def test_same_seed_same_ends_and_blocks_change_nothing(monkeypatch):
    ranks = some_ranks(200)
    first = bootstrap(ranks, NAMES)
    monkeypatch.setattr("recbole_hatllm.intervals._BLOCK", 1000)
    assert bootstrap(ranks, NAMES) == first != bootstrap(ranks, NAMES, seed=1)


def test_sure_hits_other_metrics_and_no_rows():
    assert bootstrap(np.ones(9, int), ["hit@1", "ndcg@5", "mrr@5"]) == {"hit@1": [1.0, 1.0], "ndcg@5": [1.0, 1.0]}
    assert bootstrap(np.full(9, 99), ["hit@10"]) == {"hit@10": [0.0, 0.0]}
    assert bootstrap(np.empty(0, int), ["hit@10"]) == {} == bootstrap(np.ones(9, int), ["mrr@5"])


def test_a_run_keeps_and_shows_them(tiny, capsys):
    keys = {key: tiny[key] for key in ("data_path", "runs_dir")}
    result = run("Pop", "tiny", config_dict={**keys, "metrics": ["Hit", "NDCG", "MRR"]})
    folder = Path(result["folder"])
    assert result["test_interval"] == json.loads((folder / "result.json").read_text())["test_interval"]
    assert list(result["test_interval"]) == ["hit@5", "hit@10", "ndcg@5", "ndcg@10"]
    for name, (low, high) in result["test_interval"].items():
        assert low <= result["test"][name] <= high
    low, high = result["test_interval"]["hit@10"]
    shown = f"HR@10 {low:.4f}-{high:.4f}"
    out = capsys.readouterr().out.splitlines()
    test_line = next(i for i, line in enumerate(out) if line.startswith("test: HR@5 "))
    assert out[test_line + 1].startswith("95 % interval: ") and shown in out[test_line + 1]
    assert shown in (folder / "README.md").read_text()
