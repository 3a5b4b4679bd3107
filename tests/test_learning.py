"""That it learns, and keeps learning the same way."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_hatllm import run
from recbole_hatllm.model.counting import CountingRecommender
from recbole_hatllm.registry import model_class, own_models
from tests.conftest import write_dataset
from tests.model_contract import build

GOLDEN = Path(__file__).with_name("golden")


def planted(users: int, items: int, seed: int) -> tuple[dict[str, list[int]], list[str]]:
    """Each item is followed by one fixed other item, drawn at random; titles are random words that say nothing of it."""
    draw = np.random.default_rng(seed)
    cycle = draw.permutation(items)
    follows = {int(a): int(b) for a, b in zip(cycle, np.roll(cycle, -1))}
    titles = ["".join(draw.choice(list("abcdefghijklmnop"), 5)) for _ in range(items)]
    sequences = {}
    for user in range(users):
        sequence = [int(draw.integers(items))]
        while len(sequence) < 6:
            sequence.append(follows[sequence[-1]])
        sequences[f"u{user}"] = sequence
    return sequences, titles


def test_it_learns_a_collaborative_signal_that_titles_cannot_give(tmp_path, tiny):
    """Only who-followed-whom decides the next item: popularity and titles are at chance, 1 in 12."""
    sequences, titles = planted(120, 12, seed=5)
    write_dataset(tmp_path / "data", "planted", sequences, titles)
    keys = {
        **tiny, "data_path": str(tmp_path / "data"), "targets": "all", "readout": "last_item", "learning_rate": 0.02,
        "lora_r": 16, "train_steps": 150, "eval_step": 50, "stopping_step": 9, "train_batch_size": 32, "warmup_steps": 10,
        "metrics": ["Hit"], "topk": [1], "valid_metric": "Hit@1",
    }  # fmt: skip
    trained = run("HatLLM", "planted", config_dict=keys)
    untrained = run("HatLLM", "planted", config_dict={**keys, "train_steps": 0})
    popular = run(
        "Pop", "planted", config_dict={k: keys[k] for k in ("data_path", "runs_dir", "metrics", "topk", "valid_metric")}
    )
    assert trained["test"]["hit@1"] > 0.6, trained["test"]
    assert untrained["test"]["hit@1"] < 0.3 and popular["test"]["hit@1"] < 0.3


@pytest.mark.parametrize(
    "name", [name for name in own_models() if not issubclass(model_class(name), CountingRecommender)]
)
def test_golden_trajectory(name, tiny):
    """Loss and gradient norm of 30 steps. UPDATE_GOLDEN=1 writes them anew, after a change that is meant to move them."""
    model, train, _ = build(name, {**tiny, "lora_dropout": 0.0})
    groups = model.parameter_groups() if hasattr(model, "parameter_groups") else [{"params": [*model.parameters()]}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    curve = []
    for step in range(30):
        batch = next(iter(train.batches(epoch=step)))
        optimizer.zero_grad()
        loss = model.calculate_loss(batch)
        loss.backward()
        parameters = [p for group in groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        curve.append([loss.item(), norm.item()])
    file = GOLDEN / f"{name}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(json.dumps(curve) + "\n")
    residual = np.array(curve) - np.array(json.loads(file.read_text()))
    assert np.abs(residual).max() < 1e-4
    assert np.abs(residual.mean(0)).max() < 1e-5
