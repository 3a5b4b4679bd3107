"""HR and NDCG of a whole evaluation, against a few lines of numpy, ties included."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recbole.data.interaction import Interaction
from recbole.evaluator import Evaluator

from recbole_hatllm.errors import DataError
from recbole_hatllm.evaluation import RankCollector, target_ranks

CONFIG = {
    "metrics": ["Hit", "NDCG", "MRR"],
    "topk": [1, 5, 10],
    "eval_args": {"mode": {"valid": "full", "test": "full"}},
    "device": torch.device("cpu"),
    "metric_decimal_place": 12,
}


def oracle(scores: np.ndarray, target: np.ndarray, k: int) -> tuple[float, float, float, list[int]]:
    """Ranks by sorting each row: by score, then by item id."""
    ranks = []
    for row, item in zip(scores, target):
        order = sorted(range(len(row)), key=lambda i: (-row[i], i))
        ranks.append(order.index(item) + 1)
    hits = [rank <= k for rank in ranks]
    ndcg = [hit / np.log2(rank + 1) for rank, hit in zip(ranks, hits)]
    mrr = [hit / rank for rank, hit in zip(ranks, hits)]
    return float(np.mean(hits)), float(np.mean(ndcg)), float(np.mean(mrr)), ranks


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 30), items=st.integers(12, 60), values=st.integers(2, 50))
def test_metrics_equal_numpy_with_ties(seed, rows, items, values):
    draw = np.random.default_rng(seed)
    scores = draw.integers(0, values, (rows, items)).astype(np.float32)
    scores[:, 0] = -np.inf
    target = draw.integers(1, items, rows)
    collector, evaluator = RankCollector(CONFIG), Evaluator(CONFIG)
    half = max(rows // 2, 1)
    for part in (slice(0, half), slice(half, rows)):
        if len(target[part]):
            batch = torch.from_numpy(scores[part]), torch.from_numpy(target[part])
            collector.eval_batch_collect(batch[0], Interaction({}), torch.arange(len(batch[1])), batch[1])
    result = evaluator.evaluate(collector.get_data_struct())
    for k in CONFIG["topk"]:
        hit, ndcg, mrr, ranks = oracle(scores, target, k)
        assert abs(result[f"hit@{k}"] - hit) < 1e-9
        assert abs(result[f"ndcg@{k}"] - ndcg) < 1e-9
        assert abs(result[f"mrr@{k}"] - mrr) < 1e-9
    assert collector.ranks.tolist() == ranks


def test_without_ties_ranks_are_what_topk_gives():
    torch.manual_seed(0)
    scores, target = torch.randn(50, 200), torch.randint(0, 200, (50,))
    order = scores.argsort(1, descending=True)
    assert target_ranks(scores, target).equal((order == target[:, None]).int().argmax(1) + 1)


def test_scores_that_are_not_numbers_stop_the_evaluation():
    scores = torch.tensor([[-torch.inf, 1.0, torch.nan]])
    try:
        RankCollector(CONFIG).eval_batch_collect(scores, Interaction({}), torch.arange(1), torch.tensor([1]))
    except DataError as error:
        assert "nan" in str(error)
    else:
        raise AssertionError("nan was ranked")
