"""Many targets in one forward: a branch equals the separate row, in value and in gradient; and what the probe builds on it."""

import pytest
import torch
from torch.nn import functional as F

from recbole_hatllm import probe
from recbole_hatllm.head import LinearHead
from tests.model_contract import build

pytestmark = pytest.mark.versions

SCHEDULES = [{"n_in": 0, "n_cr": 0}, {"n_in": 1, "n_cr": 2}, {"n_in": 2, "n_cr": 2, "cr_query_scope": "all"},
             {"n_in": 1, "n_cr": 2, "cross_mask": "cr_pre", "order": "CR-OR-IN"}]  # fmt: skip


@pytest.mark.parametrize("item_span", ["title", "quoted", "segment"])
@pytest.mark.parametrize("readout", ["prompt_end", "last_item"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_branches_equal_separate_rows(tiny, item_span, readout, schedule):
    keys = {**tiny, **schedule, "dtype": "float64", "lora_dropout": 0.0, "item_span": item_span, "readout": readout}
    model, train, _ = build("HatLLM", keys)
    rows = train.dataset.inter_feat
    rows = rows[rows["item_length"] >= 4][:3]
    for (
        parameter
    ) in model.backbone.trainable().values():  # LoRA starts at no effect, which would hide its gradient's errors
        torch.nn.init.normal_(parameter, std=0.1)
    weight = torch.randn(model.n_items, model.backbone.hidden_size, dtype=torch.float64)
    following = rows["item_id_list"].roll(-1, 1).scatter(1, rows["item_length"][:, None] - 1, rows["item_id"][:, None])

    def gradients(vectors, targets):
        model.zero_grad()
        F.cross_entropy(vectors @ weight.T, targets).backward()
        return [p.grad.clone() for p in model.backbone.trainable().values()]

    real = torch.arange(following.shape[1]) < rows["item_length"][:, None]
    together = model.read(rows["item_id_list"], rows["item_length"], branches=True)[real]
    alone = torch.cat(
        [
            model.read(rows["item_id_list"][row : row + 1], torch.tensor([length + 1]))
            for row, length in real.nonzero().tolist()
        ]
    )
    # In a float64 model, norms, softmax and the adapters still compute in float32.
    assert (together - alone).abs().max() < 1e-5
    pairs = zip(gradients(together, following[real]), gradients(alone, following[real]))
    # The adapters are in float32, and so are the gradients that reach them.
    assert max((a - b).abs().max() / b.abs().max().clamp(min=1e-12) for a, b in pairs) < 1e-4


def test_targets_all_means_every_item_after_the_first(tiny):
    model, train, _ = build("HatLLM", {**tiny, "targets": "all"})
    batch = train.dataset.inter_feat[:5]
    _, targets, history = model.pairs(batch)
    expected, before = [], []
    for items, length, target in zip(
        batch["item_id_list"].tolist(), batch["item_length"].tolist(), batch["item_id"].tolist()
    ):
        expected += [*items[1:length], target]
        before += [items[:place] for place in range(1, length + 1)]
    assert [[item for item in items if item] for items in history.tolist()] == before
    assert targets.tolist() == expected and model.targets_in(batch) == len(expected)


def test_whitening_evens_out_all_directions():
    torch.manual_seed(0)
    vectors = (
        torch.randn(5000, 8) @ torch.diag(torch.tensor([100.0, 10, 1, 1, 1, 0.5, 0.1, 0.01])) @ torch.randn(8, 8) + 7
    )
    head = LinearHead(3, 8, whiten=True)
    head.whitening.fit(vectors, floor=0.0)
    white = head.whitening.double()(vectors.double())
    covariance = white.T @ white / len(white)
    assert white.mean(0).abs().max() < 1e-3
    # float32 holds the four orders of magnitude between these directions to a few per cent
    assert (covariance[:3, :3] - torch.eye(3)).abs().max() < 0.05 and abs(covariance.trace().item() - 8) < 0.5
    head.whitening.fit(vectors, floor=0.1)
    kept = (head.whitening.double()(vectors.double())).var(0).sum()
    assert kept < 8  # a floor leaves the smallest directions small


def test_the_probe_finds_a_linear_rule():
    torch.manual_seed(0)
    rule = torch.randn(16, 10)
    vectors = torch.randn(3000, 16)
    targets = 1 + (vectors @ rule).argmax(1)
    head = LinearHead(11, 16)
    loss = probe.fit(head, vectors, targets, targets[:, None], epochs=30, lr=0.01, batch_size=64)
    head.eval()
    accuracy = (head(vectors).argmax(1) == targets).float().mean()
    assert loss < 0.5 and accuracy > 0.9


@pytest.mark.parametrize("head", ["linear", "title_id"])
def test_a_warm_start_survives_a_kill(tmp_path, tiny, head):
    """Step 0 - the whitening and the probe - is part of the state: resuming repeats none of it and ends the same."""
    from unittest import mock

    from recbole_hatllm import resume, run
    from recbole_hatllm.trainer import StepTrainer

    keys = {**tiny, "head": head, "targets": "all", "readout_norm": "whiten", "head_init": "probe", "head_dropout": 0.2}
    whole = run("HatLLM", "tiny", config_dict=keys)
    folder = tmp_path / "stopped"
    with mock.patch.object(StepTrainer, "_step", side_effect=RuntimeError("killed")), pytest.raises(RuntimeError):
        run("HatLLM", "tiny", config_dict={**keys, "run_dir": str(folder)})
    with mock.patch.object(probe, "fit", side_effect=AssertionError("probed again")):
        again = resume(folder)
    assert again["test"] == whole["test"] and again["valid"] == whole["valid"]
    assert whole["curve"][0]["step"] == 0 and whole["curve"][0]["loss"] is None


def test_a_title_start_is_what_the_backbone_says_of_each_title_alone(tiny):
    from recbole_hatllm import text_states

    model, _, _ = build("HatLLM", tiny)
    vectors = text_states.table(model.backbone, model.titles, "mean")
    for item in (1, 5, 20):
        ids = model.titles.ids[model.titles.offsets[item] : model.titles.offsets[item + 1]][None]
        mask = torch.full((ids.shape[1], ids.shape[1]), -1e30).triu(1)[None, None]
        hidden = model.backbone.model(
            input_ids=ids, use_cache=False, hat_masks=dict.fromkeys(model.backbone.kinds, mask)
        ).last_hidden_state
        assert torch.allclose(vectors[item], hidden[0].mean(0), atol=1e-5)
    assert (vectors[0] == 0).all()
    model.config["head_init"] = "title"
    assert model.warm_start(None) == ["started the head from the titles"]
    assert model.head.weight[1:].mean(0).abs().max() < 1e-6
