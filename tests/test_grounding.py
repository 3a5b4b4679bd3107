"""BIGRec's equation (3) against itself in float64, item by item."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_hatllm.grounding import GAMMAS, Grounding, best_gamma, distances, scaled


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(2, 9), st.integers(0, 99), st.sampled_from([0.0, 0.3, 2.0, 99.0]))
def test_it_is_the_equation(rows, items, seed, gamma):
    written, table, cf = drawn(seed, rows, 5), drawn(seed + 1, items + 1, 5), drawn(seed + 2, rows, items + 1)
    cf[:, 0] = -torch.inf  # as a model's own scores are
    targets = torch.randint(1, items + 1, (20,), generator=torch.Generator().manual_seed(seed))
    found = distances(written, table)
    by_count, by_model, bare = (Grounding(items + 1, kind, gamma) for kind in ("popularity", "cf", "none"))
    by_count.count(targets)
    counts = [int((targets == item).sum()) / 20 for item in range(1, items + 1)]
    for row in range(rows):
        d = [float((written[row].double() - table[i].double()).norm()) for i in range(1, items + 1)]
        near = [(x - min(d)) / (max(d) - min(d)) for x in d]
        for grounding, values in ((by_count, counts), (by_model, cf[row, 1:].tolist())):
            span = (max(values) - min(values)) or 1
            expected = [-n * (1 + (v - min(values)) / span) ** -gamma for n, v in zip(near, values)]
            scores = grounding(found, cf)[row]
            assert scores[0] == -torch.inf
            assert (scores[1:].double() - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-5
            assert scores[1 + d.index(min(d))] == 0  # the nearest stays first, whatever the weight
            assert ((grounding(found, cf, 0.0)[row, 1:] + scaled(found)[row, 1:]).abs() < 1e-7).all()
        assert (bare(found)[row, 1:].double() + torch.tensor(d, dtype=torch.float64)).abs().max() < 1e-5


def test_equal_vectors_are_at_no_distance_at_all():
    table = drawn(0, 50, 300) * 100
    assert (distances(table, table).diagonal() == 0).all()


@pytest.mark.parametrize("values", [[9.0, 3.0, 3.0, 3.0], [-9.0, 1.0, 5.0, 3.0]])
def test_scaled_lies_between_0_and_1_and_leaves_padding_out(values):
    found = scaled(torch.tensor([values]))[0, 1:]
    assert found.tolist() == ([0, 0, 0] if values[1] == 3 else [0, 1, 0.5])


def test_what_is_kept_is_what_was_counted_and_chosen():
    assert Grounding(5, "none", None).state_dict() == {}
    assert Grounding(5, "cf", None).state_dict().keys() == {"gamma"}
    assert Grounding(5, "popularity", 2.0).state_dict().keys() == {"gamma", "popularity"}
    assert not list(Grounding(5, "popularity", 2.0).parameters())


def test_the_best_gamma_is_the_smallest_with_the_highest_ndcg():
    ranks = torch.tensor([[11, 2, 2, 1], [1, 1, 1, 4]])
    gamma, best, first = best_gamma([0.0, 1.0, 2.0, 3.0], ranks, 10)
    assert (gamma, round(first, 6)) == (1.0, 0.5)
    assert abs(best - (1 + 1 / torch.tensor(3.0).log2().item()) / 2) < 1e-6
    assert best_gamma([0.0, 1.0, 2.0, 3.0], ranks, 1)[0] == 0.0


def test_the_grids_are_the_papers():
    assert GAMMAS["popularity"] == list(range(100))
    assert len(GAMMAS["cf"]) == 199 and GAMMAS["cf"][:2] == [0, 0.01] and GAMMAS["cf"][99:102] == [0.99, 1, 2]
