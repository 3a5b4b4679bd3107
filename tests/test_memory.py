"""The estimate against modules that are really there, and against arithmetic that does not know how it is made."""

import gc
import json
import re
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from recbole_hatllm import memory_report, registry
from recbole_hatllm.cli import main
from recbole_hatllm.config import Config
from recbole_hatllm.errors import BackboneError, ConfigError
from recbole_hatllm.live import Live
from recbole_hatllm.memory import Memory
from recbole_hatllm.prompt_size import PromptSize, prompt_size
from recbole_hatllm.shapes import KNOWN, skeleton

PROMPT = PromptSize(tokens=50, shared=20, known="given")


@cache
def memory(items=500, prompt=PROMPT, model="HatLLM", **keys) -> Memory:
    usual = {"backbone": "random-tiny", "dtype": "float32", "attention": "eager", "n_in": 1, "n_cr": 1}
    return Memory(Config(model, "ml-100k", config_dict={**usual, **keys}), items, prompt)


@pytest.mark.parametrize(
    "name, parameters",  # as their publishers count them, less an untied LM head
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("meta-llama/Llama-3.2-3B-Instruct@main", 3_212_749_824),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248 - 128_256 * 4096),
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
    ],
)
def test_parameters_of_public_decoders(name, parameters):
    assert sum(p.numel() for p in skeleton(name, None, torch.bfloat16).parameters()) == parameters


@pytest.mark.parametrize("name", KNOWN)
def test_every_known_shape_is_one(name):
    model = skeleton(name, 1, torch.bfloat16)
    assert {p.device.type for p in model.parameters()} == {"meta"} and {p.dtype for p in model.parameters()} == {
        torch.bfloat16
    }


def test_a_backbone_from_a_folder(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2,
                    "intermediate_size": 16, "vocab_size": 10})
    )  # fmt: skip
    one, three = (sum(p.numel() for p in skeleton(str(tmp_path), n, torch.float32).parameters()) for n in (1, None))
    assert three - one == 2 * (4 * 64 + 3 * 8 * 16 + 2 * 8)
    with pytest.raises(BackboneError, match=r"backbone_layers = 4.*3"):
        skeleton(str(tmp_path), 4, torch.float32)


def test_an_unknown_shape_is_an_error_that_names_known_ones(tmp_path):
    with pytest.raises(BackboneError, match=r"absent\.gguf.*Llama-3\.2-3B"):
        skeleton(str(tmp_path / "absent.gguf"), None, torch.float32)


@pytest.fixture(scope="module")
def real(tiny_data, tmp_path_factory):
    """A model on the dataset `tiny`, its training rows, and the estimate of it."""
    keys = {"data_path": str(tiny_data), "backbone": "random-tiny", "dtype": "float32", "n_in": 1, "n_cr": 1,
            "micro_batch_size": 8, "attention": "eager"}  # fmt: skip
    config = Config("HatLLM", "tiny", config_dict=keys)
    train = registry.data_loaders(config, registry.create_dataset(config))[0]
    model = registry.model_class("HatLLM")(config, train.dataset)
    return model, train.dataset.inter_feat, Memory(config, *prompt_size(config))


def test_what_stays_is_what_the_model_has(real):
    model, _, estimate = real
    sizes = [p.numel() * p.itemsize for p in model.backbone.parameters() if not p.requires_grad]
    assert estimate.resident["frozen weights in float32"] == sum(sizes)
    adapters, head = (sum(p.numel() * 4 for p in group["params"]) for group in model.parameter_groups())
    assert estimate.resident["adapters"] == estimate.resident["adapters: gradients"] == adapters
    assert estimate.resident["head: moments of adamw"] == 2 * estimate.resident["head"] == 2 * head


def test_a_prompt_is_as_long_as_the_longest_row(real):
    model, rows, estimate = real
    longest = model.prompts(rows["item_id_list"], rows["item_length"]).input_ids.shape[1]
    assert longest <= estimate.prompt.tokens <= longest + 2  # room for what some tokenizers begin with


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_real_step_holds_what_the_estimate_says(real, checkpointing):
    """The same counting, on real tensors of real prompts, with the model's own code around the decoder."""
    model, rows, estimate = real
    if checkpointing:
        model.backbone.enable_gradient_checkpointing()
    model.train()
    batch = rows[model.prompts.title_tokens(rows["item_id_list"]).argsort(descending=True)[:8]]
    model.calculate_loss(batch).backward()
    gc.collect()
    with Live() as live:
        model.calculate_loss(batch).backward()
    assert estimate.step(8, checkpointing) == pytest.approx(live.peak, rel=0.15)


def test_live_counts_storages_once_and_until_they_go():
    before = torch.zeros(100)
    with Live() as live:
        a = before + 1
        b = a.view(10, 10).T
        assert live.now == 400
        del a
        assert live.now == 400
        c = b.contiguous()
        del b
        assert live.now == 400 and live.peak == 800
        assert live.held(lambda shape: shape == (10, 10)) == 400
        del c
    assert live.now == 0


def test_activations_grow_with_the_rows_and_checkpointing_keeps_few():
    estimate = memory(token_pool=False)
    four, eight = estimate.decoder(4), estimate.decoder(8)
    assert eight.kept == pytest.approx(2 * four.kept, rel=0.02)
    assert eight.peak == pytest.approx(2 * four.peak, rel=0.02)
    assert estimate.decoder(8, checkpointing=True).kept < 0.2 * eight.kept
    exact = estimate._decode(8, True)  # its modules checkpoint by now
    assert estimate.decoder(8, checkpointing=True).peak == pytest.approx(exact.peak, rel=0.02)


@pytest.mark.versions
def test_attention_scores_are_kept_by_eager_alone():
    eager, sdpa = memory(token_pool=False), memory(token_pool=False, attention="sdpa")
    rows, heads, layers = 8, 4, 4
    assert eager.decoder(rows).scores == layers * rows * heads * PROMPT.tokens**2 * 4
    assert sdpa.decoder(rows).scores == 0 and sdpa.decoder(rows).kept < eager.decoder(rows).kept


def test_four_bits_take_a_quarter_of_sixteen():
    keys = {"backbone": "meta-llama/Llama-3.1-8B", "backbone_layers": 2, "dtype": "bfloat16"}
    whole, packed = memory(**keys), memory(**keys, load_in_4bit=True)
    linear = packed.in_4_bits * 2
    assert linear == 2 * 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert packed.resident["frozen weights in 4 bits, with their scales"] == pytest.approx(linear / 4, rel=0.04)
    frozen = (
        packed.resident["frozen weights in 4 bits, with their scales"] + packed.resident["frozen weights in bfloat16"]
    )
    assert whole.resident["frozen weights in bfloat16"] - frozen == pytest.approx(0.75 * linear, rel=0.02)


def test_more_items_take_more_head_and_more_scores():
    few, many = memory(items=1000), memory(items=100_000)
    assert many.resident["head"] - few.resident["head"] == 99_000 * 32 * 4
    assert many.scores > 50 * few.scores and many.loss(8) > few.loss(8)


def test_the_largest_micro_batch_is_the_largest():
    estimate = memory()
    budget = estimate.training(37) + 1
    assert estimate.largest(budget) == 37 and estimate.largest(sum(estimate.resident.values())) == 0


def test_fragments_are_a_cpus():
    on_cpu, on_gpu = memory(), memory(load_in_4bit=True)
    beside = on_cpu.training(8) - on_cpu.step(8) - sum(on_cpu.resident.values())
    assert beside == on_cpu.fragments(on_cpu.step(8)) > 0.5 * on_cpu.step(8)
    assert on_gpu.training(8) == on_gpu.step(8) + sum(on_gpu.resident.values())


def test_every_item_as_a_target_makes_more_vectors():
    assert memory(targets="all").loss(8) > 3 * memory().loss(8)


ADVICE = [
    (lambda m: m.training(32), {}, r"^It fits"),
    (lambda m: m.training(10), {}, r"set micro_batch_size to 10\.$"),
    (lambda m: m.training(1) - 1, {"micro_batch_size": 1, "eval_batch_size": 1},
     r"gradient_checkpointing to true and micro_batch_size to 1\.$"),
    (lambda m: m.ranking(1) - 1, {"eval_batch_size": 65536}, r"eval_batch_size lower\.$"),
    (lambda m: 1000, {}, r"load_in_4bit"),
    (lambda m: 1000, {"load_in_4bit": True}, r"a smaller backbone or more memory, as .* alone take 0\.0 GB"),
]  # fmt: skip


@pytest.mark.parametrize("free, keys, said", ADVICE)
def test_advice_says_what_to_change(free, keys, said):
    estimate = memory(items=300, **keys)
    assert re.search(said, memory_report.advice(estimate, free(estimate), "this machine's RAM"))


def test_the_command_without_data(capsys):
    arguments = ["memory", "--model=HatLLM", "--dataset=amazon-games", "--backbone=meta-llama/Llama-3.2-3B",
                 "--backbone_layers=8", "--gradient_checkpointing=true", "--lora_r=16"]  # fmt: skip
    assert main([*arguments, "--items=17250", "--tokens=200", "--data_path=nowhere"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"17,250 items; 200 tokens a prompt \(given\)", said)
    for item in ("frozen weights", "adapters: gradients", "head: moments of adamw", "training, at its peak", "ranking"):
        assert re.search(rf"^ +\d+\.\d+  {item}", said, flags=re.M), item
    assert re.search(r"largest micro_batch_size: \d+ in 24 GB, \d+ in 40 GB, \d+ in 80 GB", said)


def test_the_command_counts_the_datasets_own_titles(tiny_data, capsys):
    arguments = ["memory", "--model=BIGRec", "--dataset=tiny", f"--data_path={tiny_data}"]
    assert main([*arguments, "--backbone=random-tiny"]) == 0
    own = capsys.readouterr().out
    assert re.search(r"20 items; \d+ tokens a prompt \(the longest of \d+ training rows, by the backbone's", own)
    assert main([*arguments, "--backbone=nobody/SmolLM2-360M", "--backbone_layers=1"]) == 0
    assert re.search(r"words x 1\.4", capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--model=HatLLM", "--dataset=amazon-games", "--data_path=nowhere"],
            r"amazon-games.*prepare.*--items=.*--tokens=",
        ),
        (["--model=HatLLM", "--dataset=amazon-games", "--items=many", "--tokens=200"], r"items is 'many'"),
        (["--model=SASRec", "--dataset=ml-100k", "--items=9", "--tokens=9"], r"SASRec has no backbone"),
        (["--model=HatLLM", "--dataset=ml-100k", "--lora_rr=8"], r"lora_rr.*lora_r"),
        (["--model=HatLLM"], r"--dataset=\.\.\. is missing"),
    ],
)
def test_bad_arguments_end_in_one_sentence(arguments, message, capsys):
    assert main(["memory", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_free_memory_is_the_gpus_where_there_is_one(monkeypatch):
    free, where = memory_report.free_memory()
    assert free > 0 and where
    gpu = SimpleNamespace(is_available=lambda: True, mem_get_info=lambda: (5, 9), get_device_name=lambda: "Some GPU")
    monkeypatch.setattr(torch, "cuda", gpu)
    assert memory_report.free_memory() == (5, "the Some GPU")


def test_a_model_without_a_backbone_is_refused():
    with pytest.raises(ConfigError, match="SASRec"):
        Memory(Config("SASRec", "ml-100k"), 10, PROMPT)


@pytest.mark.parametrize("model", ["HatLLM", "BIGRec"])
def test_titles_that_are_taught_are_not_counted_and_it_says_so(model):
    with pytest.raises(ConfigError, match="title_table: refreshed"):
        memory(model=model, head="title_id", title_table="trained")
    memory(model=model, title_table="trained")  # not refused: with a linear head the key means nothing
