"""The head: closed forms in float64."""

import pytest
import torch

from recbole_hatllm.head import LinearHead


@pytest.fixture
def head():
    torch.manual_seed(0)
    return LinearHead(12, 5)


def test_scores_are_products_with_the_items_and_padding_ranks_last(head):
    vector = torch.randn(7, 5)
    scores = head(vector)
    assert scores.shape == (7, 12) and scores.dtype == torch.float32
    assert (scores[:, 0] == -torch.inf).all()
    expected = vector.double().numpy() @ head.weight.detach().double().numpy()[1:].T
    assert torch.allclose(scores[:, 1:].double(), torch.from_numpy(expected), atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_is_minus_log_softmax_over_the_real_items(head, smoothing):
    vector, target = torch.randn(7, 5), torch.tensor([1, 11, 3, 3, 7, 2, 5])
    scores = (vector.double() @ head.weight.detach().double().T)[:, 1:].numpy()
    expected = 0.0
    for row, item in zip(scores, target.tolist()):
        log_p = [value - _log_sum_exp(row) for value in row]
        expected += -(1 - smoothing) * log_p[item - 1] - smoothing * sum(log_p) / len(log_p)
    assert head.loss(vector, target, smoothing).item() == pytest.approx(expected / 7, abs=1e-6)


def _log_sum_exp(values):
    from math import exp, log

    return log(sum(exp(value) for value in values))


def test_padding_gets_no_gradient(head):
    head.loss(torch.randn(3, 5), torch.tensor([1, 2, 3])).backward()
    assert (head.weight.grad[0] == 0).all() and (head.weight.grad[1:] != 0).any(1).all()


def test_low_precision_vectors_are_scored_in_float32(head):
    vector = torch.randn(3, 5).bfloat16()
    assert head(vector).dtype == torch.float32
    assert head(vector).equal(head(vector.float()))


def test_a_start_from_vectors_is_centred_and_of_the_usual_size():
    vectors = torch.randn(50, 8) * 7 + 3
    head = LinearHead(50, 8)
    head.start_from(vectors)
    assert head.weight[1:].mean(0).abs().max() < 1e-6 and (head.weight[0] == 0).all()
    assert head.weight[1:].std().item() == pytest.approx(0.02, rel=1e-3)
    ratio = (vectors[1:] - vectors[1:].mean(0)) / head.weight[1:].detach()
    assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-3)
