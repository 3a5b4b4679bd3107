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


def _loss_and_gradients(head, vector, target, smoothing):
    head.zero_grad()
    vector = vector.clone().requires_grad_()
    torch.manual_seed(1)
    loss = head.loss(vector, target, smoothing)
    (3 * loss).backward()
    return loss.detach(), vector.grad, head.weight.grad


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("whiten, dropout", [(False, 0.0), (True, 0.0), (True, 0.4)])
def test_pieces_change_neither_loss_nor_gradients(monkeypatch, whiten, dropout, smoothing):
    torch.manual_seed(0)
    head = LinearHead(40, 6, dropout, whiten).double()
    vector, target = torch.randn(23, 6, dtype=torch.float64), torch.randint(1, 40, (23,))
    if whiten:
        head.whitening.fit(vector + 1)
    whole = _loss_and_gradients(head, vector, target, smoothing)
    monkeypatch.setattr("recbole_hatllm.head.PIECE", 39 * 5)  # 5 targets at a time, the last piece shorter
    for ours, plain in zip(_loss_and_gradients(head, vector, target, smoothing), whole):
        assert (ours - plain).abs().max() < 1e-12


def test_pieces_serve_fixed_vectors_and_gradients_that_add_up(monkeypatch):
    torch.manual_seed(0)
    head, plain = (LinearHead(40, 6).double() for _ in range(2))
    plain.load_state_dict(head.state_dict())
    vector, target = torch.randn(8, 6, dtype=torch.float64), torch.randint(1, 40, (8,))
    for _ in range(2):
        plain.loss(vector, target).backward()
    monkeypatch.setattr("recbole_hatllm.head.PIECE", 1)  # less than one target's scores: one target at a time
    for _ in range(2):
        head.loss(vector, target).backward()
    assert torch.allclose(head.weight.grad, plain.weight.grad, atol=1e-12)
    with torch.no_grad():
        assert head.loss(vector, target).item() == pytest.approx(plain.loss(vector, target).item(), abs=1e-12)


def test_one_piece_is_the_plain_path_to_the_bit(head):
    vector, target = torch.randn(7, 5), torch.tensor([1, 11, 3, 3, 7, 2, 5])
    plain = torch.nn.functional.cross_entropy(vector @ head.weight[1:].T, target - 1)
    assert head.loss(vector, target).equal(plain)


def test_many_targets_hold_one_piece_of_scores_at_a_time(monkeypatch):
    """No tensor that is made on the way has more numbers than a piece or than the weights."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.numbers = max(self.numbers, tensor.numel())
            return out

    monkeypatch.setattr("recbole_hatllm.head.PIECE", 4 * 100)
    head = LinearHead(101, 2)
    vector = torch.randn(64, 2, requires_grad=True)
    with Largest() as seen:
        head.loss(vector, torch.randint(1, 101, (64,))).backward()
    assert seen.numbers <= 4 * 100
