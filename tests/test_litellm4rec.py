"""Lite-LLM4Rec: where its item vectors come from, what is trained, and that both LLMs are."""

import shutil
from unittest import mock

import pytest
import torch
from peft import PeftModel

from recbole_hatllm import load, resume, run, text_states
from recbole_hatllm.cli import main
from recbole_hatllm.errors import ConfigError
from recbole_hatllm.pretrained import random_tiny
from recbole_hatllm.trainer import StepTrainer
from tests.model_contract import ModelContract, build, rows

pytestmark = pytest.mark.versions


def state_alone(model, ids, pool):
    """By the decoder itself on one text; the adapters that are on have a part in it."""
    mask = torch.full((len(ids), len(ids)), torch.finfo(torch.float32).min).triu(1)[None, None]
    hidden = model.backbone.model(input_ids=torch.tensor([ids]), use_cache=False, hat_masks={"or": mask})
    hidden = hidden.last_hidden_state[0]
    return hidden[-1] if pool == "last" else hidden.mean(0)


def shaken(model):
    """Adapters that say something."""
    for parameter in model.backbone.trainable().values():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def joint(tiny):
    return {**tiny, "item_llm": "lora_joint"}


@pytest.mark.parametrize("name", ["LiteLLM4Rec"])
class TestJointContract(ModelContract):
    """test_models.py has the default; this is the other item LLM."""

    @pytest.fixture
    def tiny(self, joint):
        return joint


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_item_vectors_are_the_bare_backbones(tiny, pool):
    model = shaken(build("LiteLLM4Rec", {**tiny, "item_pool": pool})[0])
    for item in range(1, model.n_items):
        ids = model.titles.ids[model.titles.offsets[item] : model.titles.offsets[item + 1]].tolist()
        with torch.no_grad(), model.backbone.without_adapters():
            assert (model.table[item] - state_alone(model, ids, pool)).abs().max() < 1e-5
    assert (model.table[0] == 0).all() and not model.table.requires_grad
    again = mock.patch.object(text_states, "states", side_effect=AssertionError("read again"))
    with again:
        assert torch.equal(build("LiteLLM4Rec", {**tiny, "item_pool": pool})[0].table, model.table)


@pytest.mark.parametrize("item_llm", ["frozen_cached", "lora_joint"])
def test_scores_are_those_of_a_prompt_put_together_by_hand(tiny, item_llm):
    """instruction, one vector an item, response marker; in evaluation and in training, where dropout is off."""
    model, _, test = build("LiteLLM4Rec", {**tiny, "item_llm": item_llm, "lora_dropout": 0.0})
    shaken(model)
    tokenizer = model.backbone.tokenizer
    head, tail = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in model.prompts.text)
    batch = rows(test, 4)
    model.eval()
    with torch.no_grad():
        found = model.full_sort_predict(batch)
        for row in range(4):
            items = batch["item_id_list"][row][: batch["item_length"][row]].tolist()
            vectors = []
            for item in items:
                ids = model.titles.ids[model.titles.offsets[item] : model.titles.offsets[item + 1]].tolist()
                on = model.backbone.adapter("item") if item_llm == "lora_joint" else model.backbone.without_adapters()
                with on:
                    v = state_alone(model, ids, "last")
                norm, linear = model.projection
                v = (v - v.mean()) / (v.var(unbiased=False) + norm.eps).sqrt() * norm.weight + norm.bias
                vectors.append(linear.weight @ v + linear.bias)
            parts = [
                model.backbone.embed(torch.tensor(head)),
                torch.stack(vectors),
                model.backbone.embed(torch.tensor(tail)),
            ]
            embeds = torch.cat(parts)[None]
            mask = torch.full((embeds.shape[1],) * 2, torch.finfo(torch.float32).min).triu(1)[None, None]
            hidden = model.backbone.model(
                inputs_embeds=embeds, use_cache=False, hat_masks={"or": mask}
            ).last_hidden_state
            assert (found[row, 1:] - model.head.weight[1:] @ hidden[0, -1]).abs().max() < 1e-4
        model.train()
        vectors = model.read(batch["item_id_list"], batch["item_length"])
        assert (model.head(vectors)[:, 1:] - found[:, 1:]).abs().max() < 1e-4


def test_both_llms_get_the_gradients_of_one_loss(joint):
    """Against finite differences, in the adapters of each and in the projection."""
    model, train, _ = build("LiteLLM4Rec", {**joint, "dtype": "float64", "lora_dropout": 0.0})
    shaken(model.double())
    batch = rows(train, 6)
    model.calculate_loss(batch).backward()
    names = dict(model.named_parameters())
    chosen = [next(n for n in names if f"lora_{m}.{a}." in n) for m in "AB" for a in ("default", "item")]
    for name in [*chosen, "projection.0.weight", "projection.1.weight"]:
        parameter = names[name]
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 1e-3 * direction
                losses.append(model.calculate_loss(batch).item())
                parameter -= sign * 1e-3 * direction
        slope = (losses[0] - losses[1]) / 2e-3
        found = float((parameter.grad * direction).sum())
        assert abs(found) > 1e-6 and abs(found - slope) < 0.01 * abs(found) + 1e-6, name


def test_each_item_of_a_batch_is_read_once(joint):
    model, train, _ = build("LiteLLM4Rec", joint)
    batch = rows(train, 12)
    with mock.patch.object(text_states, "states", wraps=text_states.states) as states:
        model.calculate_loss(batch)
    (call,) = states.call_args_list
    read = call.args[2]
    inside = batch["item_id_list"] * (torch.arange(10) < batch["item_length"][:, None])
    assert sorted(read.tolist()) == sorted(set(inside.flatten().tolist()) - {0})


def test_frozen_and_joint_start_alike(tiny, joint):
    """Adapters begin with no effect."""
    frozen, _, test = build("LiteLLM4Rec", tiny)
    both, _, _ = build("LiteLLM4Rec", joint)
    for part in ("projection", "head"):
        getattr(both, part).load_state_dict(getattr(frozen, part).state_dict())
    batch = rows(test, 5)
    with torch.no_grad():
        a, b = (model.eval().full_sort_predict(batch)[:, 1:] for model in (frozen, both))
    assert (a - b).abs().max() < 1e-5


def test_a_table_does_not_outlive_its_adapters(joint):
    model, _, test = build("LiteLLM4Rec", joint)
    batch = rows(test, 3)
    with torch.no_grad():
        before = model.eval().full_sort_predict(batch)
        with mock.patch.object(text_states, "states", side_effect=AssertionError("read again")):
            assert torch.equal(model.full_sort_predict(batch), before)
        model.train()
        for name, parameter in model.backbone.trainable().items():
            if ".item." in name:
                torch.nn.init.normal_(parameter, std=0.5)
        assert (model.eval().full_sort_predict(batch) - before)[:, 1:].abs().max() > 1e-2


@pytest.mark.parametrize("item_llm", ["frozen_cached", "lora_joint"])
def test_every_item_as_a_target_in_one_pass(tiny, item_llm):
    model, train, _ = build("LiteLLM4Rec", {**tiny, "item_llm": item_llm, "lora_dropout": 0.0, "targets": "all"})
    shaken(model)
    batch = train.dataset.inter_feat
    batch = batch[batch["item_length"] >= 4][:4]
    real = torch.arange(10) < batch["item_length"][:, None]
    together = model.read(batch["item_id_list"], batch["item_length"], branches=True)[real]
    alone = [model.read(batch["item_id_list"][r : r + 1], torch.tensor([k + 1])) for r, k in real.nonzero().tolist()]
    assert (together - torch.cat(alone)).abs().max() < 1e-5


@pytest.mark.parametrize("item_llm", ["frozen_cached", "lora_joint"])
def test_what_is_trained_is_counted(tiny, item_llm):
    model, _, _ = build("LiteLLM4Rec", {**tiny, "item_llm": item_llm})
    # Two projections a layer: of the query 32 -> 32, of the value 32 -> 16; both down to rank 8.
    adapters = 4 * 8 * ((32 + 32) + (32 + 16)) * (2 if item_llm == "lora_joint" else 1)
    projection, head = 2 * 32 + 32 * 32 + 32, (model.n_items) * 32
    assert (
        f"trainable: {adapters:,} in adapters, {head:,} in the head of 20 items, {projection:,} in the projection"
        in str(model)
    )
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adapters + projection + head
    groups = [p for group in model.parameter_groups() for p in group["params"]]
    assert {id(p) for p in groups} == {id(p) for p in model.parameters() if p.requires_grad}


def test_both_sets_of_adapters_are_kept_in_pefts_format(joint, tmp_path):
    model = shaken(build("LiteLLM4Rec", joint)[0])
    model.save(tmp_path / "saved")
    again, _, test = build("LiteLLM4Rec", joint)
    again.load(tmp_path / "saved")
    for a, b in zip(model.backbone.trainable().values(), again.backbone.trainable().values(), strict=True):
        assert torch.equal(a, b)
    batch = rows(test, 4)
    with torch.no_grad():
        assert torch.equal(model.eval().full_sort_predict(batch), again.eval().full_sort_predict(batch))
    mask = torch.full((3, 3), torch.finfo(torch.float32).min).triu(1)[None, None]
    ids = torch.tensor([[5, 6, 7]])
    for name, prefix in (("default", ""), ("item", "item_")):
        (tmp_path / name).mkdir()
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            shutil.copy(tmp_path / "saved" / f"{prefix}{file}", tmp_path / name / file)
        base = random_tiny(None, 2026, torch.float32, None)[0].eval()
        plain = PeftModel.from_pretrained(base, tmp_path / name)
        with torch.no_grad(), model.backbone.adapter(name):
            ours = model.backbone.model(input_ids=ids, use_cache=False, hat_masks={"or": mask}).last_hidden_state
            theirs = plain(input_ids=ids, use_cache=False).last_hidden_state
        assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("head_init", ["title", "probe"])
def test_the_head_may_start_from_something(joint, head_init):
    keys = {"targets": "all", "readout_norm": "whiten", "head_init": head_init}
    result = run("LiteLLM4Rec", "tiny", config_dict={**joint, **keys})
    assert load(result["folder"]).model.head.weight.isfinite().all() and result["curve"][0]["step"] == 0


@pytest.mark.parametrize("item_llm", ["frozen_cached", "lora_joint"])
def test_killed_and_resumed_it_ends_the_same(tiny, tmp_path, item_llm):
    keys = {**tiny, "item_llm": item_llm}
    keys = {key: value for key, value in keys.items() if key not in ("n_in", "n_cr")}
    whole_run = run("LiteLLM4Rec", "tiny", config_dict=keys)
    step, folder = StepTrainer._step, tmp_path / "stopped"

    def until_four(self, *args):
        if self.step == 4:
            raise RuntimeError("killed")
        return step(self, *args)

    with mock.patch.object(StepTrainer, "_step", until_four), pytest.raises(RuntimeError):
        run("LiteLLM4Rec", "tiny", config_dict={**keys, "run_dir": str(folder)})
    again = resume(folder)
    assert again["test"] == whole_run["test"] and again["curve"][-1]["loss"] == whole_run["curve"][-1]["loss"]


@pytest.mark.parametrize("key", ["gradient_checkpointing", "compile"])
def test_what_would_compute_layers_again_is_refused(joint, key):
    with pytest.raises(ConfigError, match=f"{key} is true, and item_llm: lora_joint switches"):
        build("LiteLLM4Rec", {**joint, key: True})


def test_gradient_checkpointing_with_a_frozen_item_llm(tiny):
    plain, again = (
        build("LiteLLM4Rec", {**tiny, "lora_dropout": 0.0, "gradient_checkpointing": g})[0] for g in (False, True)
    )
    _, train, _ = build("LiteLLM4Rec", tiny)
    for model in (plain, again):
        torch.manual_seed(0)
        shaken(model).calculate_loss(rows(train, 6)).backward()
    for a, b in zip(plain.parameters(), again.parameters()):
        assert a.grad is None or (a.grad - b.grad).abs().max() < 1e-6


def test_memory_counts_it_or_says_what_it_does_not_count(tiny_data, capsys):
    arguments = [
        "memory",
        "--model=LiteLLM4Rec",
        "--dataset=tiny",
        f"--data_path={tiny_data}",
        "--backbone=random-tiny",
    ]
    assert main(arguments) == 0
    assert main([*arguments, "--item_llm=lora_joint"]) == 2
    assert "ask it for item_llm: frozen_cached" in capsys.readouterr().err
