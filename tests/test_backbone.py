"""Loading, LoRA and what the schedule means for hidden states, on a tiny random Llama and on the real SmolLM2."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModel, LlamaConfig

from recbole_hatllm import pretrained as module
from recbole_hatllm.adapters import QuickDropout
from recbole_hatllm.backbone import Backbone, load_backbone
from recbole_hatllm.errors import BackboneError, DataError
from recbole_hatllm.files import cache_folder
from recbole_hatllm.masks import attention_mask, schedule
from recbole_hatllm.pretrained import SMOLLM2_FILE, SMOLLM2_SHA256

pytestmark = pytest.mark.versions


def tiny(**options):
    return load_backbone("random-tiny", **{"dtype": torch.float64, **options})


def prompt(row, pad=0, left=False):
    """A span row such as [-1, 0, 0, 1, -1] -> span, is_last, valid, position_ids, each [1, T]."""
    span = torch.tensor([row])
    following = torch.cat([span[:, 1:], torch.tensor([[-1]])], dim=1)
    parts = [span, (span >= 0) & (span != following), torch.ones_like(span).bool(), torch.arange(len(row))[None]]
    size = (pad, 0) if left else (0, pad)
    return [nn.functional.pad(part, size, value=fill) for part, fill in zip(parts, (-1, False, False, 0))]


def run(backbone, ids, span, is_last, valid, positions, grad=False):
    masks = {kind: attention_mask(kind, span, is_last, valid) for kind in set(backbone.kinds)}
    with torch.set_grad_enabled(grad):
        return backbone(positions, masks, input_ids=ids)


def draw(*shape, seed=0):
    return torch.randint(1, 250, shape, generator=torch.Generator().manual_seed(seed))


def test_random_tiny_is_the_same_everywhere_and_leaves_the_random_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second, other = tiny(), tiny(), tiny(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert (first.n_layers, first.hidden_size, first.kinds) == (4, 32, ("or",) * 4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters()))
    assert first.identity == second.identity != other.identity
    assert first.identity.keys() == {"name", "revision", "sha256", "model_type", "layers", "hidden_size"}
    assert json.loads(json.dumps(first.identity)) == first.identity
    narrow = tiny(dtype=torch.float32)
    assert all(torch.equal(a.float(), b) for a, b in zip(first.parameters(), narrow.parameters()))
    assert not any(parameter.requires_grad for parameter in first.parameters())
    assert not any("head" in name for name, _ in first.named_parameters())


def test_tokenizer_reads_any_text():
    tokenizer = tiny().tokenizer
    size = len(tokenizer)
    for text in ('"Toy Story (1995)", "Amélie"', " leading", "日本\n\t", "ab"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text and max(ids) < size
    assert tokenizer.pad_token is not None and len(tokenizer) == size


def test_layer_cut():
    whole, cut = tiny(), tiny(layers=3)
    assert (cut.n_layers, cut.identity["layers"], len(cut.kinds)) == (3, 3, 3)
    own = dict(whole.named_parameters())
    assert all(torch.equal(parameter, own[name]) for name, parameter in cut.named_parameters())
    for layers in (0, -1, 5):
        with pytest.raises(BackboneError, match=rf"(?s){layers}.*4"):
            tiny(layers=layers)


def test_schedule_must_fit():
    backbone = tiny()
    with pytest.raises(BackboneError, match=r"3.*4"):
        backbone.set_schedule(("or",) * 3)
    with pytest.raises(BackboneError, match="fast"):
        backbone.set_schedule(("or",) * 4, "fast")
    with pytest.raises(BackboneError, match="cr_post"):
        backbone.set_schedule(("or",) * 3 + ("cr_post",))


def test_a_call_without_masks_is_an_error_and_not_bidirectional_attention():
    backbone = tiny()
    with pytest.raises(BackboneError, match="without"):
        backbone.model(input_ids=draw(1, 3), use_cache=False)
    with pytest.raises((BackboneError, KeyError), match="or"):
        backbone(torch.arange(3)[None], {}, input_ids=draw(1, 3))


def test_the_probe_disturbs_neither_the_random_state_nor_the_mode():
    config = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    model = AutoModel.from_config(LlamaConfig(**config, vocab_size=20, attention_dropout=0.5)).train()
    identity = {"name": "tiny", "model_type": "llama", "layers": 2, "hidden_size": 16}
    before = torch.get_rng_state()
    Backbone(model, None, identity).set_schedule(("in", "or"))
    assert model.training and torch.equal(torch.get_rng_state(), before)


# --- What the masks mean for hidden states


@pytest.mark.parametrize("kind", ["in", "cr", "cr_pre"])
def test_the_last_layer_never_reaches_a_template_readout(kind):
    backbone, parts = tiny(), prompt([-1, 0, 0, -1, 1, 1, 1, -1, -1])
    ids = draw(1, 9)
    backbone.set_schedule(("in", "or", "or", "or"))
    plain = run(backbone, ids, *parts)
    backbone.set_schedule(("in", "or", "or", kind))
    special = run(backbone, ids, *parts)
    assert torch.equal(plain[0, -1], special[0, -1]), "a template token's row is never masked"
    assert not torch.allclose(plain[0, 6], special[0, 6]), "the last token of the last item is"
    backbone.set_schedule(("in", "or", kind, "or"))
    assert not torch.allclose(plain[0, -1], run(backbone, ids, *parts)[0, -1])


def test_cr_all_reaches_a_template_readout_in_the_last_layer():
    backbone, parts = tiny(), prompt([-1, 0, 0, -1, 1, 1, 1, -1, -1])
    ids = draw(1, 9)
    plain = run(backbone, ids, *parts)
    backbone.set_schedule(schedule(4, 0, 1, cross_mask="cr_all"))
    assert not torch.allclose(plain[0, -1], run(backbone, ids, *parts)[0, -1])


@pytest.mark.parametrize(
    ("row", "layers", "isolated"),
    [
        ([-1, 0, 0, 0, 1, 1, -1], 4, True),  # item_span: segment, nothing between the items
        ([-1, 0, 0, -1, 1, 1, -1], 1, True),  # item_span: title, a separator that no item owns
        ([-1, 0, 0, -1, 1, 1, -1], 2, False),  # it relays what it saw from the second IN layer on
        ([-1, 0, 0, -1, 1, 1, -1], 4, False),
    ],
)
def test_isolation_of_items_in_in_layers(row, layers, isolated):
    backbone = tiny(layers=layers)
    backbone.set_schedule(("in",) * layers)
    ids = draw(1, len(row))
    changed = ids.clone()
    changed[0, 1:3] = ids[0, 1:3] + 1
    a, b = (run(backbone, each, *prompt(row))[0] for each in (ids, changed))
    assert not torch.allclose(a[2], b[2]) and not torch.allclose(a[-1], b[-1])
    assert torch.equal(a[4:6], b[4:6]) if isolated else not torch.allclose(a[4:6], b[4:6])


@pytest.mark.parametrize("kernel", ["eager", "plain", "sdpa"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_batch_mates_and_padding_change_nothing(kernel, left):
    backbone = tiny()
    backbone.set_schedule(("in", "or", "cr_pre", "cr"), kernel)
    rows = [[-1, 0, 0, -1, 1, -1], [0, 0, 1, 1, 1, 2, -1, -1, -1, -1], [-1]]
    ids = [draw(1, len(row), seed=i) for i, row in enumerate(rows)]
    longest = max(map(len, rows))
    parts = [prompt(row, longest - len(row), left) for row in rows]
    padded = [
        nn.functional.pad(each, (longest - each.shape[1], 0) if left else (0, longest - each.shape[1])) for each in ids
    ]
    together = run(backbone, torch.cat(padded), *(torch.cat(each) for each in zip(*parts)))
    assert together.isfinite().all()
    for i, row in enumerate(rows):
        alone = run(backbone, ids[i], *prompt(row))[0]
        found = together[i, longest - len(row) :] if left else together[i, : len(row)]
        assert (found - alone).abs().max() < 1e-6


def test_embedded_tokens_stand_for_their_ids():
    backbone, parts = tiny(), prompt([-1, 0, 0, 1, -1])
    ids = draw(1, 5)
    span, is_last, valid, positions = parts
    masks = {"or": attention_mask("or", span, is_last, valid)}
    embedded = backbone(positions, masks, inputs_embeds=backbone.embed(ids))
    assert torch.equal(embedded, run(backbone, ids, *parts))


# --- LoRA


def test_adapters_start_as_nothing_and_are_drawn_from_the_callers_seed():
    drawn = []
    for seed in (0, 0, 1):
        backbone, parts = tiny(), prompt([-1, 0, 0, 1, -1])
        plain = run(backbone, draw(1, 5), *parts)
        torch.manual_seed(seed)
        backbone.add_lora(4, 8, 0.05)
        assert torch.equal(run(backbone.eval(), draw(1, 5), *parts), plain)
        drawn.append({name: p.detach() for name, p in backbone.named_parameters() if p.requires_grad})
    assert all("lora_" in name and ("q_proj" in name or "v_proj" in name) for name in drawn[0])
    assert len(drawn[0]) == 4 * 2 * 2
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert any(not torch.equal(drawn[0][name], drawn[2][name]) for name in drawn[0])


def test_adapters_of_narrow_weights_are_float32_and_states_stay_narrow():
    backbone = tiny(dtype=torch.bfloat16)
    backbone.add_lora(4, 8, 0.0)
    hidden = run(backbone, draw(1, 5), *prompt([-1, 0, 0, 1, -1]))
    assert hidden.dtype == torch.bfloat16 and hidden.isfinite().all()
    assert {p.dtype for p in backbone.parameters() if p.requires_grad} == {torch.float32}


def test_adapters_compute_in_the_type_of_the_backbone():
    """Against PEFT's own, which turn each activation into float32: the same gradients but for bfloat16's rounding."""
    parts, ids = prompt([-1, 0, 0, 1, -1]), draw(1, 5)
    direction = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    gradients, seen = [], []
    for own in (True, False):
        backbone = tiny(dtype=torch.bfloat16)
        torch.manual_seed(3)
        backbone.add_lora(4, 8, 0.0)
        adapters = [module for module in backbone.modules() if isinstance(module, LoraLayer)]
        for layer in adapters:
            layer.lora_A["default"].register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
            if not own:
                layer.cast_input_dtype_enabled = True
                for part in (*layer.lora_A.values(), *layer.lora_B.values()):
                    part.__class__ = nn.Linear
            nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
        (run(backbone, ids, *parts, grad=True)[0] * direction).sum().backward()
        gradients.append({name: p.grad for name, p in backbone.trainable().items()})
    assert seen == [torch.bfloat16] * 8 + [torch.float32] * 8
    for name, gradient in gradients[0].items():
        assert gradient.dtype == torch.float32
        assert (gradient - gradients[1][name]).norm() < 0.05 * gradients[1][name].norm()


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_of_adapters(p):
    """As many zeros as a binomial draw has, the others scaled, both alike in the gradient; again from the same seed."""
    dropout = QuickDropout(p)
    numbers = torch.full((331, 577), 3.0, requires_grad=True)
    torch.manual_seed(1)
    found = dropout(numbers)
    torch.manual_seed(1)
    assert torch.equal(dropout(numbers), found) and not torch.equal(dropout(numbers), found)
    kept, spread = found != 0, (p * (1 - p) / found.numel()) ** 0.5
    assert abs(float(kept.float().mean()) - (1 - p)) < 5 * spread
    assert max((kept.float().mean(side) - (1 - p)).abs().max() / (p * (1 - p)) ** 0.5 for side in (0, 1)) < 5 / 331**0.5
    assert torch.allclose(found[kept], torch.tensor(3 / (1 - p)), rtol=1e-4)
    found.sum().backward()
    assert torch.allclose(numbers.grad, kept / (1 - p), rtol=1e-4)
    assert torch.equal(dropout.eval()(numbers), numbers)
    assert not QuickDropout(1.0)(numbers).any()


def test_nothing_is_kept_below_the_lowest_adapter():
    backbone, parts, ids = tiny(), prompt([-1, 0, 0, 1, -1]), draw(1, 5)
    backbone.add_lora(4, 8, 0.0, from_layer=2)
    names = list(backbone.trainable())
    assert len(names) == 2 * 2 * 2 and all(".2." in name or ".3." in name for name in names)
    kept = {}
    for number, layer in enumerate(backbone.base.layers):
        layer.register_forward_hook(
            lambda _, inputs, output, n=number: kept.update({n: (output[0] if isinstance(output, tuple) else output)})
        )
    run(backbone, ids, *parts, grad=True).sum().backward()
    assert [kept[n].requires_grad for n in range(4)] == [False, False, True, True]
    assert all(p.grad is not None for p in backbone.trainable().values())
    with pytest.raises(BackboneError, match=r"lora_from_layer is 4, and the layers of random-tiny are 0 to 3"):
        tiny().add_lora(4, 8, 0.0, from_layer=4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_are_one_graph_a_kind_for_all_sizes(checkpointing):
    """The graphs that torch.compile captures, run as they are: states and gradients as without, and none captured anew."""
    plain, compiled = tiny(), tiny()
    for backbone in (plain, compiled):
        backbone.set_schedule(("in", "or", "or", "cr"), "plain")
        torch.manual_seed(0)
        backbone.add_lora(4, 8, 0.0)
        for name, parameter in backbone.trainable().items():
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        if checkpointing:
            backbone.enable_gradient_checkpointing()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled.compile_layers(backend="eager")
    for row in ([-1, 0, 0, 1, -1], [-1, -1, 0, 0, 1, 1, 1, -1], [-1, 0, 1, 1, 1, 2, -1, -1, -1]):
        ids, gradients = draw(3, len(row)), []
        for backbone in (plain, compiled):
            backbone.train()
            backbone.zero_grad()
            hidden = run(backbone, ids, *(part.expand(3, -1) for part in prompt(row)), grad=True)
            hidden.square().sum().backward()
            gradients.append([hidden.detach(), *(p.grad for p in backbone.trainable().values())])
        for a, b in zip(*gradients):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    assert not torch._dynamo.utils.counters["graph_break"]


def test_targets():
    backbone = tiny()
    with pytest.raises(BackboneError, match=r"query.*down_proj.*q_proj"):
        backbone.add_lora(4, 8, 0.0, ["q_proj", "query"])
    backbone.add_lora(4, 8, 0.0, ["down_proj", "o_proj"])
    names = [name for name, p in backbone.named_parameters() if p.requires_grad]
    assert len(names) == 4 * 2 * 2 and all("down_proj" in name or "o_proj" in name for name in names)


def test_adapters_are_saved_in_pefts_format_and_come_back(tmp_path):
    backbone, parts, ids = tiny(), prompt([-1, 0, 0, 1, -1]), draw(1, 5)
    backbone.add_lora(4, 8, 0.0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    backbone.save_adapter(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    again = tiny()
    again.add_lora(4, 8, 0.0)
    again.load_adapter(tmp_path)
    assert torch.equal(run(again, ids, *parts), run(backbone, ids, *parts))
    for r, alpha, targets in ((8, 8, None), (4, 16, None), (4, 8, ["q_proj"])):
        other = tiny()
        other.add_lora(r, alpha, 0.0, targets)
        with pytest.raises(DataError):
            other.load_adapter(tmp_path)
    whole = (tmp_path / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="adapter_model"):
        again.load_adapter(tmp_path)


# --- Folders, the hub, 4 bits


def saved(folder, **changes):
    config = LlamaConfig(
        vocab_size=400, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, **changes
    )
    model = AutoModel.from_config(config)
    model.save_pretrained(folder)
    tokenizer = tiny().tokenizer
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    return model


def test_a_local_folder_is_named_without_its_parents(tmp_path):
    model = saved(tmp_path / "one" / "llama")
    backbone = load_backbone(str(tmp_path / "one" / "llama"), layers=2)
    own = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    assert all(torch.equal(parameter, own[name]) for name, parameter in backbone.named_parameters())
    assert backbone.n_layers == 2 and backbone.identity["name"] == "llama"
    assert backbone.tokenizer.pad_token == backbone.tokenizer.eos_token
    shutil.move(tmp_path / "one", tmp_path / "two")
    assert load_backbone(str(tmp_path / "two" / "llama"), layers=2).identity == backbone.identity
    saved(tmp_path / "llama")
    assert load_backbone(str(tmp_path / "llama"), layers=2).identity["sha256"] != backbone.identity["sha256"]


def test_weights_that_are_missing_are_not_drawn_at_random(tmp_path):
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4, "layer_types": None}))
    with pytest.raises(BackboneError, match=r"lacks.*layers\.3"):
        load_backbone(str(tmp_path))


def test_a_name_that_nobody_knows(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError, match=r"nobody/nothing.*smollm2-135m"):
        load_backbone("nobody/nothing")
    with pytest.raises(BackboneError, match=r"absent\.gguf"):
        load_backbone(str(tmp_path / "absent.gguf"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_four_bits_need_a_gpu():
    for device in ("cpu", "cuda"):
        with pytest.raises(BackboneError, match=r"CUDA.*load_in_4bit"):
            tiny(load_in_4bit=True, device=device)


# --- The real SmolLM2


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The GGUF file and a cache of its own."""
    return module._smollm2(cache_folder()), tmp_path_factory.mktemp("cache")


def test_smollm2_is_dense_verified_and_cached(smollm2, monkeypatch):
    file, cache = smollm2
    monkeypatch.setattr(module, "_smollm2", lambda cache: file)
    first = load_backbone("smollm2-135m", dtype=torch.bfloat16, cache_dir=cache)
    monkeypatch.setattr(module, "_dequantise", None)
    monkeypatch.setattr(module, "_smollm2", None)
    again = load_backbone("smollm2-135m", dtype=torch.bfloat16, cache_dir=cache)
    cut = load_backbone("smollm2-135m", layers=2, dtype=torch.bfloat16, cache_dir=cache)
    assert first.identity == again.identity
    assert first.identity["sha256"] == SMOLLM2_SHA256
    assert (first.n_layers, first.hidden_size, cut.n_layers, cut.identity["layers"]) == (30, 576, 2, 2)
    linear = [layer for layer in first.modules() if "Linear" in type(layer).__name__]
    assert len(linear) == 30 * 7 and all(type(layer) is nn.Linear for layer in linear)
    assert {p.dtype for p in first.parameters()} == {torch.bfloat16} and not hasattr(first.base, "lm_head")
    assert sum(p.numel() for p in first.parameters()) == 134_515_008
    own = dict(first.named_parameters())
    assert all(torch.equal(parameter, own[name]) for name, parameter in cut.named_parameters())
    ids = torch.tensor([first.tokenizer("The capital of France is", add_special_tokens=False)["input_ids"]])
    hidden = run(first, ids, *prompt([-1] * ids.shape[1]))
    words = (hidden[0, -1].float() @ first.base.get_input_embeddings().weight.float().T).argmax()
    assert first.tokenizer.decode([int(words)]) == " Paris", "it is the pretrained model"
    with pytest.raises(BackboneError, match=r"31.*30"):
        load_backbone("smollm2-135m", layers=31, dtype=torch.bfloat16, cache_dir=cache)


def test_a_truncated_gguf_is_one_sentence(smollm2, tmp_path):
    content = smollm2[0].read_bytes()
    for size in (0, 100, len(content) // 2):
        (tmp_path / "cut.gguf").write_bytes(content[:size])
        with pytest.raises(BackboneError, match=r"cut\.gguf") as error:
            load_backbone(str(tmp_path / "cut.gguf"), cache_dir=tmp_path / "cache")
        assert "\n" not in str(error.value)
    assert not [entry for entry in (tmp_path / "cache").glob("*") if not entry.name.startswith(".")]


def test_a_wrong_hash_names_file_hashes_and_remedy(tmp_path):
    (tmp_path / SMOLLM2_FILE).write_bytes(b"GGUF")
    with pytest.raises(BackboneError) as error:
        load_backbone("smollm2-135m", cache_dir=tmp_path)
    for words in (str(tmp_path / SMOLLM2_FILE), SMOLLM2_SHA256, "delete it"):
        assert words in str(error.value)
