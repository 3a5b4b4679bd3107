"""BIGRec's language strategy: the contract of all models, what is trained, and where a written title ends up in the ranking."""

import json
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from recbole_hatllm import lm_head, load, registry, resume, run, text_states
from recbole_hatllm.cli import main
from recbole_hatllm.data.response import ResponseTable
from recbole_hatllm.data.titles import PieceEncoder
from recbole_hatllm.errors import ConfigError, DataError
from recbole_hatllm.model import llm
from recbole_hatllm.pretrained import random_tiny
from recbole_hatllm.run_folder import read_ranks
from recbole_hatllm.trainer import StepTrainer
from tests import test_generation
from tests.conftest import random_sequences, write_dataset
from tests.model_contract import ModelContract, build, rows
from tests.test_generation import slow_search, whole

pytestmark = pytest.mark.versions

EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def tiny(tiny):
    """As ever, but writing, and little."""
    return {**tiny, "strategy": "language", "max_new_tokens": 6, "num_beams": 2}


def of_histories(model, loader, count=4):
    """A batch of test rows, and their histories."""
    batch = rows(loader, count)
    return batch, batch["item_id_list"], batch["item_length"]


def written_as(model, tokens):
    """A model that writes `tokens`, [max_new_tokens] int64 a row, whatever it reads."""
    return mock.patch.object(model, "write", lambda seq, _: torch.tensor(tokens)[: len(seq)])


def response(model, item):
    """The tokens of an item's own response."""
    start, length = model.responses.start[item], model.responses.length[item]
    return model.responses.ids[start : start + length].tolist()


@pytest.mark.parametrize("name", ["BIGRec", "LLaRA"])
class TestContract(ModelContract):
    def test_overfits_sixteen_users(self, name, tiny):
        """By LoRA alone: with all layers in it, and room for a whole title."""
        keys = {"lora_targets": EVERYWHERE, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "max_new_tokens": 24}
        model, train, _ = build(name, {**tiny, **keys, "learning_rate": 1e-2})
        batch = train.dataset.inter_feat
        batch = batch[torch.from_numpy(np.unique(batch["user_id"].numpy(), return_index=True)[1][:16])]
        optimizer = torch.optim.AdamW(model.parameter_groups())
        for _ in range(80):
            optimizer.zero_grad()
            model.calculate_loss(batch).backward()
            optimizer.step()
        model.eval()
        model.written = []
        assert (model.full_sort_predict(batch).argmax(1) == batch["item_id"]).all()
        texts = [model.responses.text(tokens) for tokens in model.written[0].tolist()]
        assert texts == [model.item_titles[item] for item in batch["item_id"].tolist()]


# --- Training


@pytest.mark.parametrize("quotes", [True, False])
def test_the_loss_is_that_of_a_causal_lm_on_the_response_alone(tiny, quotes):
    """HF's own model and loss on token lists that are put together by hand."""
    model, train, _ = build("BIGRec", {**tiny, "lora_dropout": 0.0, "target_quotes": quotes})
    batch = rows(train, 5)
    with model.backbone.without_adapters():
        found = model.calculate_loss(batch)
        config = model.backbone.base.config
        config.tie_word_embeddings = True
        config._attn_implementation = "eager"
        reference = LlamaForCausalLM(config).float()
        plain = {name: tensor for name, tensor in model.backbone.base.state_dict().items() if "lora" not in name}
        reference.model.load_state_dict({name.replace(".base_layer", ""): tensor for name, tensor in plain.items()})
        total, count = 0.0, 0
        for row in range(5):
            prompt = model.prompts(batch["item_id_list"][row : row + 1], batch["item_length"][row : row + 1])
            title = model.encode(model.item_titles[batch["item_id"][row]])
            quote = model.encode('"') if quotes else []
            ids = prompt.input_ids[0].tolist()
            answer = [*quote, *title, *quote, model.backbone.tokenizer.eos_token_id]
            labels = torch.tensor([[-100] * len(ids) + answer])
            loss = reference(torch.tensor([ids + answer]), labels=labels).loss
            total, count = total + loss * len(answer), count + len(answer)
    assert model.targets_in(batch) == count
    assert abs(found - total / count) < 1e-5


@pytest.mark.parametrize(
    "schedule",
    [
        {"hatllm_masks": False},
        {"hatllm_masks": True},
        {"hatllm_masks": True, "n_in": 2, "n_cr": 2, "cr_query_scope": "all"},
    ],
)
@pytest.mark.parametrize("name", ["BIGRec", "LLaRA"])
def test_it_learns_what_it_will_be_asked_for(tiny, schedule, name):
    """The loss is what the search of titles gives the same tokens, layer by layer: with masks and behaviour tokens too."""
    model, train, _ = build(name, {**tiny, **schedule, "lora_dropout": 0.0})
    for parameter in model.backbone.trainable().values():
        torch.nn.init.normal_(parameter, std=0.1)
    batch, item_seq, item_len = of_histories(model, train, 3)
    total, count = 0.0, 0
    for row in range(3):
        prompt = model.prompts(item_seq[row : row + 1], item_len[row : row + 1])
        answer = response(model, int(batch["item_id"][row]))
        total -= sum(
            whole(model.backbone, model.lm_head, prompt, 0, answer[:n], model)[t] for n, t in enumerate(answer)
        )
        count += len(answer)
    assert abs(model.calculate_loss(batch) - total / count) < 1e-5
    assert ("in" in model.backbone.kinds) == schedule["hatllm_masks"]


def test_its_layers_are_hatllms_with_hatllm_masks(tiny):
    keys = {"n_in": 2, "n_cr": 1, "order": "CR-OR-IN", "cross_mask": "cr_pre"}
    plain, masked = (build("BIGRec", {**tiny, **keys, "hatllm_masks": m})[0] for m in (False, True))
    assert plain.backbone.kinds == ("or",) * 4
    assert masked.backbone.kinds == build("HatLLM", {**tiny, **keys})[0].backbone.kinds
    with pytest.raises(ConfigError, match=r"n_in = 4 and n_cr = 2 layers do not fit a backbone of 4 layers"):
        build("BIGRec", {**tiny, "hatllm_masks": True, "n_in": 4, "n_cr": 2})


def test_pieces_of_a_batch_teach_what_the_batch_teaches(tiny):
    """The mean is over the tokens of the whole batch, and titles differ in length."""
    keys = {**tiny, "lora_dropout": 0.0, "strategy": "language"}
    whole_batch, pieces = (run("BIGRec", "tiny", config_dict={**keys, "micro_batch_size": m}) for m in (None, 3))
    for a, b in zip(whole_batch["curve"], pieces["curve"]):
        assert abs(a["loss"] - b["loss"]) < 1e-5


def test_the_lm_loss_in_pieces_is_the_loss(tiny):
    model, _, _ = build("BIGRec", {**tiny, "lora_dropout": 0.0})
    hidden = torch.randn(50, 32, requires_grad=True)
    token = torch.randint(0, 300, (50,))
    expected = F.cross_entropy(hidden @ model.lm_head.weight.T, token, label_smoothing=0.1)
    with mock.patch.object(lm_head, "PIECE", 7 * len(model.lm_head.weight)):
        found = model.lm_head.loss(hidden, token, 0.1)
    assert abs(found - expected) < 1e-5
    for a, b in zip(*(torch.autograd.grad(loss, hidden, retain_graph=True) for loss in (found, expected))):
        assert (a - b).abs().max() < 1e-6


# --- From text to items


def test_a_written_title_is_its_item_exactly(tiny):
    """Distance 0, and so the first place, whatever re-weights the distances."""
    model, _, test = build("BIGRec", {**tiny, "grounding_weight": "popularity", "max_new_tokens": 40})
    model.eval()
    model.head.popularity.uniform_()
    for item in range(1, model.n_items):
        batch = rows(test, 1)
        tokens = response(model, item) + [model.responses.end] * 40
        with written_as(model, [tokens[:40]]):
            assert model.distances(batch)[0, item] == 0
            for gamma in (0.0, 0.5, 99.0):
                model.head.gamma.fill_(gamma)
                scores = model.full_sort_predict(batch)[0]
                assert scores.argmax() == item or model.item_titles[scores.argmax()] == model.item_titles[item]


def test_other_texts_are_as_far_as_their_last_states(tiny):
    """Unknown, empty, without end, of odd tokens: each gives a ranking, by the base model's own states."""
    model, _, test = build("BIGRec", tiny)
    model.eval()
    for parameter in model.backbone.trainable().values():  # the comparison is the base model's
        torch.nn.init.normal_(parameter, std=0.5)
    end, texts = model.responses.end, ["Heat of the night", "", "x" * 6, '"']
    encoded = [model.encode(text)[:6] for text in texts]
    batch = rows(test, 4)
    with written_as(model, [ids + [end] * (6 - len(ids)) for ids in encoded]):
        scores = model.full_sort_predict(batch)
    assert scores[:, 1:].isfinite().all() and (scores[:, 0] == -torch.inf).all()

    def state(ids):
        mask = torch.full((len(ids), len(ids)), torch.finfo(torch.float32).min).triu(1)[None, None]
        with torch.no_grad(), model.backbone.without_adapters():
            return model.backbone.model(
                input_ids=torch.tensor([ids]), use_cache=False, hat_masks={"or": mask}
            ).last_hidden_state[0, -1]

    for row, text in enumerate(texts):
        ids = model.encode(model.responses.text(encoded[row])) or [end]
        expected = torch.stack([(state(ids) - state(model.encode(title))).norm() for title in model.item_titles[1:]])
        assert (scores[row, 1:] + expected).abs().max() < 1e-4, text


def test_texts_lose_what_stands_around_them():
    encode = PieceEncoder(random_tiny(1, 0, torch.float32, None)[1])
    quoted, plain = (ResponseTable(text_states.flat([[], encode("Heat")]), encode, quotes) for quotes in (True, False))
    end = [quoted.end]
    for written, expected in [('"Heat"', "Heat"), (' "Heat', "Heat"), ('Heat"', "Heat"), ('"The "Best""', 'The "Best"'),
                              ("\n He \n at ", "He at"), ('"', ""), ("", ""), ('""', "")]:  # fmt: skip
        assert quoted.text(encode(written) + end + encode("more")) == expected, written
    assert plain.text(encode('"Heat"')) == '"Heat"'
    assert quoted.ids[quoted.start[1] :].tolist() == encode('"') + encode("Heat") + encode('"') + end
    assert plain.ids[plain.start[1] :].tolist() == encode("Heat") + end


def test_titles_are_read_once(tiny):
    """The table is kept on disk by its content; what the adapters have a part in is made again after each training."""
    model, _, _ = build("BIGRec", tiny)
    table = model.item_vectors()
    with mock.patch.object(text_states, "states", side_effect=AssertionError("read again")):
        assert torch.equal(build("BIGRec", tiny)[0].item_vectors(), table)
        with pytest.raises(AssertionError, match="read again"):
            build("BIGRec", {**tiny, "title_tokens": 2})[0].item_vectors()
    model.train()
    assert model.item_vectors() is table

    tuned, _, _ = build("BIGRec", {**tiny, "ground_with_lora": True})
    first = tuned.item_vectors()
    assert torch.allclose(first, table, atol=1e-6) and tuned.item_vectors() is first
    tuned.train()
    for parameter in tuned.backbone.trainable().values():
        torch.nn.init.normal_(parameter, std=0.5)
    tuned.eval()
    assert (tuned.item_vectors() - table)[1:].abs().max() > 0.1
    assert all(parameter.requires_grad for parameter in tuned.backbone.trainable().values())


def test_equal_titles_are_equally_near(tmp_path):
    titles = ["Heat", "Heat", "Ran", "Jaws", "M", "Alien"]
    write_dataset(tmp_path, "tiny", random_sequences(8, 6), titles)
    keys = {"data_path": str(tmp_path), "backbone": "random-tiny", "dtype": "float32", "strategy": "language",
            "max_new_tokens": 12, "show_progress": False}  # fmt: skip
    model, _, test = build("BIGRec", keys)
    twins = [item for item, title in enumerate(model.item_titles) if title == "Heat"]
    with written_as(model, [(response(model, twins[1]) + [model.responses.end] * 12)[:12]]):
        found = model.eval().distances(rows(test, 1))[0]
    assert len(twins) == 2 and (found[twins] == 0).all()


# --- A run


@pytest.mark.parametrize("num_beams", [1, 3])
def test_behaviour_tokens_are_read_by_what_is_written(tiny, num_beams):
    """A title is what a search by lists finds behind the filled prompt, and another SASRec's vectors give another one."""
    model, _, test = build("LLaRA", {**tiny, "num_beams": num_beams, "hatllm_masks": True, "n_in": 1, "n_cr": 1})
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    _, item_seq, item_len = of_histories(model.eval(), test, 3)
    written = model.write(item_seq, item_len)
    filled = partial(whole, model=model)
    with mock.patch.object(test_generation, "whole", filled), torch.no_grad():
        for row in range(3):
            prompt = model.prompts(item_seq[row : row + 1], item_len[row : row + 1])
            _, text = slow_search(model.backbone, model.lm_head, prompt, 0, num_beams, 6, model.responses.end)
            assert written[row].tolist() == text + [model.responses.end] * (6 - len(text))
        model.slots.table.normal_(std=3)
        assert not torch.equal(model.write(item_seq, item_len), written)


def test_a_run_tells_what_it_wrote(tiny):
    result = run("BIGRec", "tiny", config_dict={**tiny, "eval_batch_size": 7, "micro_batch_size": 3})
    lines = [json.loads(line) for line in Path(result["folder"], "written.jsonl").read_text("utf-8").splitlines()]
    ranks = read_ranks(result["folder"])
    trained = load(result["folder"])
    assert [line["rank"] for line in lines] == ranks["rank"].tolist()
    assert [line["user"] for line in lines] == ranks["user"].tolist()
    tokens = dict(zip(trained.items.item_tokens, trained.items.titles))
    assert [line["target"] for line in lines] == [tokens[token] for token in ranks["target"]]
    for line in lines[:3]:  # the same text, from the titles of its history
        items = torch.zeros(1, 10, dtype=torch.int64)
        found = [trained.find(title) for title in line["history"]]
        items[0, : len(found)] = torch.tensor(found)
        again = trained.model.write(items, torch.tensor([len(found)]))[0].tolist()
        assert trained.model.responses.text(again) == line["written"]
    assert trained.model.written is None


def test_gamma_is_chosen_on_the_validation_rows_and_kept(tiny):
    keys = {**tiny, "grounding_weight": "popularity"}
    result = run("BIGRec", "tiny", config_dict=keys)
    model = load(result["folder"]).model
    train, valid, _ = registry.data_loaders(model.config, registry.create_dataset(model.config))
    model.eval()
    gain, measured = [], [(model.distances(batch).double()[:, 1:], target) for batch, _, _, target in valid]
    for gamma in range(100):
        total = 0.0
        for distance, target in measured:
            low, high = distance.amin(1, keepdim=True), distance.amax(1, keepdim=True)
            counts = torch.bincount(train.dataset.inter_feat["item_id"], minlength=model.n_items)[1:].double()
            weight = (counts - counts.min()) / (counts.max() - counts.min())
            moved = (distance - low) / (high - low) * (1 + weight) ** -gamma
            for row, item in zip(moved, (target - 1).tolist()):
                rank = 1 + int((row < row[item]).sum()) + int((row[:item] == row[item]).sum())
                total += 1 / np.log2(rank + 1) if rank <= 10 else 0
        gain.append(total)
    assert model.head.gamma == int(np.argmax(gain)) and max(gain) > gain[0]
    assert "gamma" in Path(result["folder"], "log.txt").read_text()
    stated = run("BIGRec", "tiny", config_dict={**keys, "grounding_gamma": 2.5})
    assert load(stated["folder"]).model.head.gamma == 2.5


def test_scores_of_another_run_move_the_distances(tiny, tiny_data, tmp_path):
    parent = run("SASRec", "tiny", config_dict={"data_path": str(tiny_data), "runs_dir": str(tmp_path), "epochs": 1,
                                                "show_progress": False})  # fmt: skip
    keys = {**tiny, "grounding_weight": "cf", "pretrained_cf": parent["folder"], "grounding_gamma": 0.7}
    result = run("BIGRec", "tiny", config_dict=keys)
    (record,) = result["parents"]
    assert (record["role"], record["folder"], record["test"]) == ("cf", parent["folder"], parent["test"])
    trained = load(result["folder"])
    model, _, test = build("BIGRec", keys)
    model.load(Path(result["folder"]))
    batch = rows(test, 5)
    with torch.no_grad():
        found = trained.model.full_sort_predict(batch)[:, 1:]
        distance = trained.model.distances(batch)[:, 1:]
        cf = load(parent["folder"]).model.full_sort_predict(batch).view(5, -1)[:, 1:]
        assert torch.equal(model.eval().full_sort_predict(batch)[:, 1:], found)
    near, liked = (
        (x - x.amin(1, keepdim=True)) / (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) for x in (distance, cf)
    )
    assert (found + near * (1 + liked) ** -0.7).abs().max() < 1e-5
    assert trained.recommend(["Heat"], 3)
    trainable = sum(p.numel() for p in trained.model.parameters() if p.requires_grad)
    assert (
        trainable
        == result["trainable_parameters"]
        == sum(p.numel() for p in trained.model.backbone.trainable().values())
    )
    with pytest.raises(ConfigError, match=r"trained with MAX_ITEM_LIST_LENGTH 10, and this run has 5"):
        run("BIGRec", "tiny", config_dict={**keys, "MAX_ITEM_LIST_LENGTH": 5})
    with pytest.raises(ConfigError, match=r"a run of SASRec: BIGRec needs one of GRU4Rec"):
        run("BIGRec", "tiny", config_dict={**keys, "cf_model": "GRU4Rec"})
    write_dataset(tmp_path / "other", "tiny", random_sequences(9, 12))
    with pytest.raises(DataError, match="trained on other items"):
        run("BIGRec", "tiny", config_dict={**keys, "data_path": str(tmp_path / "other")})


@pytest.mark.parametrize("name", ["BIGRec", "LLaRA"])
def test_the_run_whose_scores_move_the_distances_is_made_first(tiny, name):
    keys = {**tiny, "grounding_weight": "cf", "cf_model": "MarkovChain", "cf_keys": {"history_decay": 0.3}}
    keys |= {"sasrec_keys": {"epochs": 1}} if name == "LLaRA" else {}
    result = run(name, "tiny", config_dict=keys)
    assert [record["role"] for record in result["parents"]] == ["sasrec", "cf"][name == "BIGRec" :]
    assert "history_decay: 0.3" in Path(result["parents"][-1]["folder"], "config.yaml").read_text()
    trained = load(result["folder"])
    assert [entry.item for entry in trained.recommend(["Heat"], 3)]
    assert not any("_cf" in parameter for parameter, _ in trained.model.named_parameters())


def test_killed_and_resumed_it_ends_the_same(tiny, tmp_path):
    keys = {**tiny, "grounding_weight": "popularity"}
    whole_run = run("BIGRec", "tiny", config_dict=keys)
    step, folder = StepTrainer._step, tmp_path / "stopped"

    def until_four(self, *args):
        if self.step == 4:
            raise RuntimeError("killed")
        return step(self, *args)

    with mock.patch.object(StepTrainer, "_step", until_four), pytest.raises(RuntimeError):
        run("BIGRec", "tiny", config_dict={**keys, "run_dir": str(folder)})
    again = resume(folder)
    assert again["test"] == whole_run["test"] and again["curve"][-1]["loss"] == whole_run["curve"][-1]["loss"]
    assert (folder / "written.jsonl").read_text() == Path(whole_run["folder"], "written.jsonl").read_text()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"targets": "all"}, "set targets to last"),
        ({"compile": True}, "set compile to false"),
        ({"pretrained_cf": "runs/x"}, "set grounding_weight to cf"),
        ({"grounding_weight": "cf", "cf_model": "BPR"}, "cf_model is BPR, and must be a sequential model"),
        ({"grounding_weight": "cf", "cf_model": "HatLLM"}, "cf_model is HatLLM, and must be a sequential model"),
        ({"grounding_weight": "cf", "cf_keys": {"seed": 1}}, "cf_keys has seed"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(tiny, keys, message):
    with (
        mock.patch.object(llm, "load_backbone", side_effect=AssertionError("work was done")),
        pytest.raises(ConfigError, match=message),
    ):
        build("BIGRec", {**tiny, **keys})


def test_memory_says_that_it_does_not_count_writing(tiny_data, capsys):
    arguments = ["memory", "--model=BIGRec", "--dataset=tiny", f"--data_path={tiny_data}", "--backbone=random-tiny"]
    assert main([*arguments, "--strategy=language"]) == 2
    assert "strategy: language" in capsys.readouterr().err
    assert main(arguments) == 0
