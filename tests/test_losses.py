"""Losses against closed forms computed by hand in float64."""

import math

import torch

from recbole_hatllm.losses import dro_loss, nominal_weights, sampled_loss


def test_dro_of_three_items_by_hand():
    scores = torch.tensor([[0.5, -1.0, 2.0], [0.0, 3.0, -0.5]], dtype=torch.float64)
    weight = torch.tensor([0.9, 1.0, 0.8], dtype=torch.float64)
    first = math.log(math.exp(0.9 * 0.25 / 2) + math.exp(1.0 * 4.0 / 2) + math.exp(0.8 * 4.0 / 2))  # target: item 1
    second = math.log(math.exp(0.9 * 1.0 / 2) + math.exp(1.0 * 9.0 / 2) + math.exp(0.8 * 0.25 / 2))  # target: item 0
    found = dro_loss(scores, torch.tensor([1, 0]), weight, radius=2.0)
    assert abs(found.item() - (first + second) / 2) < 1e-12


def test_dro_does_not_overflow_where_the_naive_form_does():
    scores = torch.tensor([[40.0, 1.0]])
    assert torch.exp(scores.square()).isinf().any()
    assert abs(dro_loss(scores, torch.tensor([1]), torch.ones(2), 1.0).item() - 1600.0) < 1e-3


def test_nominal_weights_by_hand():
    found = nominal_weights(torch.tensor([0, 0, 2]), 4)
    expected = [(count / 7) ** 0.05 for count in (3, 1, 2, 1)]
    assert torch.allclose(found, torch.tensor(expected), atol=1e-7)


def test_sampled_losses_by_hand():
    positive, negative = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([0.5, 3.0], dtype=torch.float64)

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    bce = -(math.log(sigmoid(1)) + math.log(sigmoid(-2)) + math.log(1 - sigmoid(0.5)) + math.log(1 - sigmoid(3))) / 4
    mse = (0 + 9 + 0.25 + 9) / 4
    bpr = -(math.log(sigmoid(0.5)) + math.log(sigmoid(-5))) / 2
    for kind, expected in (("bce", bce), ("mse", mse), ("bpr", bpr)):
        assert abs(sampled_loss(kind, positive, negative).item() - expected) < 1e-12
