"""Layer-by-layer oracle: stock HF layers in float64, each handed its own mask, over the families of decoders."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModel

from recbole_hatllm.backbone import Backbone
from recbole_hatllm.errors import BackboneError
from recbole_hatllm.masks import attention_mask

pytestmark = pytest.mark.versions

WIDTHS = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "max_position_embeddings": 64}
COMMON = {**WIDTHS, "vocab_size": 97, "intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0}
HEAD = {**COMMON, "head_dim": 8}
WINDOW = 6  # shorter than the histories below, so that it forbids something
FAMILIES = {
    "llama": COMMON,
    "qwen2": COMMON,
    "qwen3": HEAD,
    "mistral": {**HEAD, "sliding_window": WINDOW},
    "gemma2": {**HEAD, "sliding_window": WINDOW, "query_pre_attn_scalar": 8},
    "gemma3_text": {**HEAD, "sliding_window": WINDOW, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2},
    "phi3": {**COMMON, "sliding_window": WINDOW},
    "gpt_neox": {**COMMON, "hidden_dropout": 0.0},
    "opt": {**WIDTHS, "vocab_size": 97, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "pad_token_id": 0},
    "olmo2": COMMON,
}
EAGER_ALONE = {"gemma2"}  # its score cap
LORA = {"gpt_neox": ["query_key_value"], "phi3": ["qkv_proj"]}
KINDS = ("in", "in", "or", "cr_pre", "cr", "cr_all")
EXACT = 1e-12  # families without RMSNorm; both sides round the softmax through float32 alike
ROUNDED = 3e-6  # eager attention alone rounds its softmax through float32
ROUNDED_GRADIENT = 1e-5


def stock(family):
    """A random float64 model of the family with eager attention."""
    config = AutoConfig.for_model(family, **FAMILIES[family])
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = AutoModel.from_config(config, attn_implementation="eager").double().eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:  # attention must depend on who is seen
                torch.nn.init.normal_(parameter, std=0.25)
    return model


def backbone_of(model):
    identity = {"name": "tiny", "model_type": model.config.model_type, "layers": 6, "hidden_size": 32}
    return Backbone(copy.deepcopy(model), None, identity)


def batch(seed=0, pad_left=False):
    """ids, positions, span, is_last, valid of three prompts: prefix, items with and without text between, suffix."""
    rows = [
        [-1, -1, 0, 0, 0, -1, 1, 1, -1, 2, 2, 2, -1, -1],
        [-1, 0, 0, 1, 1, 1, 2, -1],
        [0, -1, 1, 1, 2, 2, 3, 3, -1, -1, -1],
    ]
    length = max(map(len, rows))
    span, valid = torch.full((3, length), -1), torch.zeros(3, length, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = slice(length - len(row), length) if pad_left else slice(0, len(row))
        span[i, at], valid[i, at] = torch.tensor(row), True
    following = torch.cat([span[:, 1:], torch.full((3, 1), -1)], dim=1)
    is_last = (span >= 0) & (span != following)
    ids = torch.zeros_like(span)
    ids[valid] = torch.randint(2, 97, (int(valid.sum()),), generator=torch.Generator().manual_seed(seed))
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    return ids, positions, span, is_last, valid


def masks_of(span, is_last, valid, kinds=KINDS):
    return {kind: attention_mask(kind, span, is_last, valid) for kind in set(kinds)}


def may_attend(kind, j, k, span, is_last, valid, window):
    """Equations (1)-(5), one pair at a time, and the sliding window of the layer."""
    if j == k:
        return True
    if k > j or not valid[k] or (window is not None and j - k >= window):
        return False
    item_j, item_k = span[j] >= 0, span[k] >= 0
    if kind == "cr_all" and not item_j and item_k:
        return bool(is_last[k])
    if kind == "or" or not (item_j and item_k):
        return True
    same = bool(span[j] == span[k])
    return {"in": same, "cr_pre": not same}.get(kind, bool(is_last[j] and is_last[k]))


def oracle_masks(config, span, is_last, valid, kinds):
    """One additive float64 mask per layer, by loops."""
    shape, masks = span.shape, []
    for layer, kind in enumerate(kinds):
        window = getattr(config, "sliding_window", None)
        if getattr(config, "layer_types", None) and config.layer_types[layer] != "sliding_attention":
            window = None
        mask = torch.full((shape[0], 1, shape[1], shape[1]), torch.finfo(torch.float64).min, dtype=torch.float64)
        for i in range(shape[0]):
            for j in range(shape[1]):
                for k in range(shape[1]):
                    if may_attend(kind, j, k, span[i], is_last[i], valid[i], window):
                        mask[i, 0, j, k] = 0
        masks.append(mask)
    return masks


def run_oracle(model, ids, positions, masks):
    """The stock eager model; each attention module is handed its layer's mask in place of the model's own."""
    replaced, hooks = [], []

    def replace(module, args, kwargs):
        assert "attention_mask" in kwargs
        replaced.append(module.layer_idx)
        return args, {**kwargs, "attention_mask": masks[module.layer_idx]}

    for module in model.modules():
        if type(module).__name__.endswith("Attention"):
            hooks.append(module.register_forward_pre_hook(replace, with_kwargs=True))
    hidden = model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    for hook in hooks:
        hook.remove()
    assert replaced == list(range(len(masks)))
    return hidden


def distance(a, b, valid):
    return float((a - b)[valid].abs().max() / b[valid].abs().max())


@pytest.mark.parametrize("pad_left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("kernel", ["eager", "plain", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_attends_by_its_own_mask(family, kernel, pad_left):
    model = stock(family)
    ids, positions, span, is_last, valid = batch(pad_left=pad_left)
    backbone = backbone_of(model)
    if kernel != "eager" and family in EAGER_ALONE:
        with pytest.raises(BackboneError, match=f"{kernel} attention is not exact for {family}"):
            backbone.set_schedule(KINDS, kernel)
        return
    backbone.set_schedule(KINDS, kernel)
    with torch.no_grad():
        found = backbone(positions, masks_of(span, is_last, valid), input_ids=ids)
        expected = run_oracle(model, ids, positions, oracle_masks(model.config, span, is_last, valid, KINDS))
        turned = run_oracle(model, ids, positions, oracle_masks(model.config, span, is_last, valid, KINDS[::-1]))
    assert distance(found, expected, valid) < (EXACT if kernel == "eager" else ROUNDED)
    assert distance(turned, expected, valid) > 1e-2  # the test has power: another schedule is far away


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_special_layers_it_is_the_plain_model_bit_for_bit(family, kernel):
    if kernel != "eager" and family in EAGER_ALONE:
        pytest.skip("refused: only the family's own attention caps its scores")
    model = stock(family).float()  # in float64 transformers' own eager masks of empty padding rows become NaN
    ids, positions, span, is_last, valid = batch()
    backbone = backbone_of(model)
    backbone.set_schedule(("or",) * 6, kernel)
    model.config._attn_implementation = kernel
    with torch.no_grad():
        found = backbone(positions, masks_of(span, is_last, valid, ["or"]), input_ids=ids)
        expected = model(
            input_ids=ids, position_ids=positions, attention_mask=valid.long(), use_cache=False
        ).last_hidden_state
        embedded = backbone(positions, masks_of(span, is_last, valid, ["or"]), inputs_embeds=backbone.embed(ids))
    assert expected[valid].isfinite().all()
    assert torch.equal(found[valid], expected[valid])
    assert torch.equal(found, embedded)


@pytest.mark.parametrize("checkpointing", ["none", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("kernel", ["eager", "plain", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_gradients_are_those_of_the_oracle(family, kernel, checkpointing):
    """Another batch runs between the forward and the backward pass, as with prefetching or accumulation."""
    if kernel != "eager" and family in EAGER_ALONE:
        pytest.skip("refused: only the family's own attention caps its scores")
    model = stock(family)
    targets = LORA.get(family, ["q_proj", "v_proj"])
    backbone = backbone_of(model)
    backbone.set_schedule(KINDS, kernel)
    backbone.add_lora(3, 6, 0.0)
    reference = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0, target_modules=targets))
    weights = dict(reference.named_parameters())
    generator = torch.Generator().manual_seed(1)
    trained = {name: p for name, p in backbone.model.named_parameters() if p.requires_grad}
    assert trained.keys() == {name for name, p in weights.items() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
            weights[name].copy_(parameter)
    backbone.train()
    if checkpointing == "non-reentrant":
        backbone.enable_gradient_checkpointing()
    elif checkpointing == "reentrant":
        base = backbone.model.get_base_model()
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        base.enable_input_require_grads()

    ids, positions, span, is_last, valid = batch()
    direction = torch.randn(*ids.shape, 32, generator=generator, dtype=torch.float64) * valid[:, :, None]
    hidden = backbone(positions, masks_of(span, is_last, valid), input_ids=ids)
    other = batch(seed=1, pad_left=True)
    backbone(other[1], masks_of(*other[2:]), input_ids=other[0])
    (hidden * direction).sum().backward()
    masks = oracle_masks(model.config, span, is_last, valid, KINDS)
    expected = run_oracle(reference.get_base_model(), ids, positions, masks)
    (expected * direction).sum().backward()
    scale = max(float(weights[name].grad.abs().max()) for name in trained)
    for name, parameter in trained.items():
        error = float((parameter.grad - weights[name].grad).abs().max()) / scale
        assert error <= (EXACT if kernel == "eager" else ROUNDED_GRADIENT), name


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
        ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
        ("falcon", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
        ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4}),
    ],
)
def test_families_that_would_ignore_the_masks_are_refused(family, options):
    config = AutoConfig.for_model(family, vocab_size=97, bos_token_id=1, eos_token_id=1, **options)
    model = AutoModel.from_config(config)
    identity = {"name": "tiny", "model_type": family, "layers": 2, "hidden_size": 32}
    with pytest.raises(BackboneError, match=f"{family} does not route attention through AttentionInterface"):
        Backbone(model, None, identity)
