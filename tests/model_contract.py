"""What every LLM recommender must pass. A new model is found by its file and gets these tests for nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from recbole.data.interaction import Interaction

from recbole_hatllm import registry, resume, run, stages
from recbole_hatllm.config import Config
from recbole_hatllm.recommend import load

# Of runs that a model needs first.
PARENTS = {
    "sasrec_keys": {"epochs": 2},
    "teacher_keys": {"train_steps": 4, "eval_step": 2},
    "hatllm_keys": {"n_in": 1, "train_steps": 4, "eval_step": 2},
}


def build(name: str, keys: dict):
    """A model of that name on the data of `keys`, with its training rows; runs that it needs are made once, beside the data."""
    keys = {**PARENTS, **keys, "runs_dir": str(Path(keys["data_path"]) / "runs")}
    config = Config(name, "tiny", config_dict={k: v for k, v in keys.items() if k in known_keys(name)})
    parents = {stage.parent.role: stage.folder for stage in stages.make(config, run, resume)}
    torch.manual_seed(0)
    train, _, test = registry.data_loaders(config, registry.create_dataset(config))
    model = registry.model_class(name)(config, train.dataset)
    if parents:
        model.inherit(parents, train.dataset)
    return model, train, test


def known_keys(name: str) -> set[str]:
    """Keys that a run of this model takes: HatLLM's own would be unknown to BIGRec."""
    from recbole_hatllm import schema

    llm = ["llm.yaml"] if getattr(registry.model_class(name), "is_llm", False) else []
    files = [schema.PROPERTIES / part for part in ("overall.yaml", *llm, f"model/{name}.yaml")]
    return set(schema.keys_of(*files)) | {
        "data_path",
        "train_batch_size",
        "eval_step",
        "learning_rate",
        "stopping_step",
    }


def rows(loader, count: int) -> Interaction:
    """The first rows of a loader's data."""
    return loader.dataset.inter_feat[:count]


def with_histories(interaction: Interaction, sequences: list[list[int]]) -> Interaction:
    """The same rows with other histories."""
    changed = Interaction({key: value.clone() for key, value in interaction.interaction.items()})
    changed["item_id_list"] = torch.zeros_like(changed["item_id_list"])
    for row, sequence in zip(changed["item_id_list"], sequences):
        row[: len(sequence)] = torch.tensor(sequence)
    changed["item_length"] = torch.tensor([len(sequence) for sequence in sequences])
    return changed


class ModelContract:
    """Subclass with `name`, or parametrise: each method takes a model name and the keys of a tiny run."""

    def test_loss_is_a_finite_scalar_with_gradients(self, name, tiny):
        model, train, _ = build(name, tiny)
        loss = model.calculate_loss(rows(train, 8))
        assert loss.shape == () and loss.isfinite()
        loss.backward()
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        touched = {n for n, p in model.named_parameters() if p.grad is not None}
        assert touched == trained and trained

    def test_an_epoch_holds_the_training_rows_and_nothing_else(self, name, tiny):
        """RecBole would add sampled negatives as rows of their own, which a loss over all items takes for positives."""
        _, train, _ = build(name, tiny)
        batches = list(train.batches(epoch=0))
        for field in ("user_id", "item_id", "timestamp"):
            read = torch.cat([batch[field] for batch in batches])
            assert read.sort().values.equal(train.dataset.inter_feat[field].sort().values)

    def test_scores_have_a_column_an_item_equal_to_predict(self, name, tiny):
        model, _, test = build(name, tiny)
        model.eval()
        batch = rows(test, 3)
        with torch.no_grad():
            scores = model.full_sort_predict(batch)
            assert scores.shape == (3, test.dataset.item_num) and scores.dtype == torch.float32
            assert (scores[:, 0] == -torch.inf).all()
            for item in range(1, test.dataset.item_num):
                batch["item_id"] = torch.full((3,), item)
                assert torch.allclose(model.predict(batch), scores[:, item], atol=1e-6)
            fresh = model.full_sort_predict(batch)
            fresh[:] = 0  # RecBole writes into what it gets
            assert torch.equal(model.full_sort_predict(batch), scores)

    def test_nothing_but_the_history_changes_a_score(self, name, tiny):
        """Batch mates, their lengths, the order of rows, padding and the target in the batch."""
        model, _, test = build(name, tiny)
        model.eval()
        batch = rows(test, 6)
        with torch.no_grad():
            scores = model.full_sort_predict(batch)
            for index in range(6):
                alone = model.full_sort_predict(batch[index : index + 1])
                assert torch.allclose(alone[0, 1:], scores[index, 1:], atol=1e-5)
            order = torch.tensor([3, 0, 5, 1, 4, 2])
            assert torch.allclose(model.full_sort_predict(batch[order])[:, 1:], scores[order][:, 1:], atol=1e-5)
            short = with_histories(batch, [[2], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [3], [4], [5], [6]])
            together = model.full_sort_predict(short)
            alone = model.full_sort_predict(short[0:1])
            assert torch.allclose(alone[0, 1:], together[0, 1:], atol=1e-5)
            batch["item_id"] = batch["item_id"].roll(1)
            assert torch.equal(model.full_sort_predict(batch), scores)
            batch["item_id_list"] = batch["item_id_list"].clone()
            for row, length in zip(batch["item_id_list"], batch["item_length"]):
                row[length:] = 7  # what stands behind the history's end is nobody's business
            assert torch.equal(model.full_sort_predict(batch), scores)

    def test_frozen_weights_stay_bit_equal(self, name, tiny):
        model, train, _ = build(name, tiny)
        before = {n: p.clone() for n, p in model.named_parameters()}
        optimizer = torch.optim.AdamW(model.parameter_groups())
        for _ in range(3):
            optimizer.zero_grad()
            model.calculate_loss(rows(train, 8)).backward()
            optimizer.step()
        for n, parameter in model.named_parameters():
            assert parameter.requires_grad != torch.equal(parameter, before[n]), n

    def test_overfits_sixteen_users(self, name, tiny):
        model, train, _ = build(name, {**tiny, "learning_rate": 5e-3, "lora_dropout": 0.0})
        batch = train.dataset.inter_feat
        users = batch["user_id"].numpy()
        batch = batch[torch.from_numpy(np.unique(users, return_index=True)[1][:16])]
        optimizer = torch.optim.AdamW(model.parameter_groups())
        for _ in range(300):
            optimizer.zero_grad()
            loss = model.calculate_loss(batch)
            loss.backward()
            optimizer.step()
            if loss < 0.02:
                break
        model.eval()
        with torch.no_grad():
            assert (model.full_sort_predict(batch).argmax(1) == batch["item_id"]).all()

    def test_loaded_in_another_process_it_scores_the_same(self, name, tiny):
        result = run(name, "tiny", config_dict={k: v for k, v in {**PARENTS, **tiny}.items() if k in known_keys(name)})
        history = load(result["folder"]).items.titles[1:5]
        here = [(r.item, r.score) for r in load(result["folder"]).recommend(history, 5)]
        code = (
            "import sys, torch; torch.set_num_threads(1)\n"
            "from recbole_hatllm import load\n"
            f"trained = load({result['folder']!r})\n"
            f"print([(r.item, r.score) for r in trained.recommend({history!r}, 5)])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        there = eval(done.stdout.strip().splitlines()[-1])
        assert [item for item, _ in there] == [item for item, _ in here]
        assert max(abs(a - b) for (_, a), (_, b) in zip(here, there)) < 1e-5
