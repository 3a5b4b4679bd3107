"""A backbone without its weights: its modules on torch's meta device, which costs no memory and no download of weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

from recbole_hatllm.errors import BackboneError
from recbole_hatllm.pretrained import cut, quiet, random_tiny

_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
           "intermediate_size", "vocab_size")  # fmt: skip
# Public shapes, so that an estimate for them needs neither network nor licence; the fields stand in the order above.
KNOWN = {
    "SmolLM2-135M": ("llama", 576, 30, 9, 3, 64, 1536, 49152),
    "SmolLM2-360M": ("llama", 960, 32, 15, 5, 64, 2560, 49152),
    "SmolLM2-1.7B": ("llama", 2048, 24, 32, 32, 64, 8192, 49152),
    "Llama-3.2-1B": ("llama", 2048, 16, 32, 8, 64, 8192, 128256),
    "Llama-3.2-3B": ("llama", 3072, 28, 24, 8, 128, 8192, 128256),
    "Llama-3.1-8B": ("llama", 4096, 32, 32, 8, 128, 14336, 128256),
    "Qwen2.5-0.5B": ("qwen2", 896, 24, 14, 2, 64, 4864, 151936),
    "Qwen2.5-1.5B": ("qwen2", 1536, 28, 12, 2, 128, 8960, 151936),
    "Qwen2.5-3B": ("qwen2", 2048, 36, 16, 2, 128, 11008, 151936),
    "Qwen2.5-7B": ("qwen2", 3584, 28, 28, 4, 128, 18944, 152064),
    "Qwen3-0.6B": ("qwen3", 1024, 28, 16, 8, 128, 3072, 151936),
    "Qwen3-1.7B": ("qwen3", 2048, 28, 16, 8, 128, 6144, 151936),
    "Qwen3-4B": ("qwen3", 2560, 36, 32, 8, 128, 9728, 151936),
    "Qwen3-8B": ("qwen3", 4096, 36, 32, 8, 128, 12288, 151936),
}


def skeleton(name: str, layers: int | None, dtype: torch.dtype) -> nn.Module:
    """The decoder that `load_backbone` would load, without LM head and without values.

    Args:
        name: as the key `backbone`. A hub id of `KNOWN`, whoever its owner, is not looked up; of another one the
            configuration alone is fetched.
        layers: keep the first so many decoder layers; None for all.
        dtype: type of the weights.

    Raises:
        BackboneError: its shape is not known and cannot be read, or it has fewer layers.
    """
    config = _config(name)
    if layers is not None:
        cut(config.get_text_config(), layers, name)
    with torch.device("meta"):
        model = AutoModel.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():  # as in a checkpoint, buffers stay as they are
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def depth_of(name: str) -> int:
    """How many layers a backbone has, by its configuration alone.

    Raises:
        BackboneError: its shape is not known and cannot be read.
    """
    return _config(name).get_text_config().num_hidden_layers


def width_of(name: str) -> int:
    """The size d of a backbone's states, by its configuration alone.

    Raises:
        BackboneError: its shape is not known and cannot be read.
    """
    return _config(name).get_text_config().hidden_size


def _config(name: str) -> PretrainedConfig:
    if name == "random-tiny":
        return random_tiny(None, 0, torch.float32, None)[0].config
    hub, _, revision = name.partition("@")
    known = "SmolLM2-135M" if name == "smollm2-135m" else hub.rpartition("/")[2].removesuffix("-Instruct")
    path = Path(name).expanduser()
    if known in KNOWN and not path.exists():
        family, *values = KNOWN[known]
        return AutoConfig.for_model(family, **dict(zip(_FIELDS, values)))
    try:
        with quiet():
            if path.suffix == ".gguf":
                return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
            if path.is_dir():
                return AutoConfig.from_pretrained(path)
            return AutoConfig.from_pretrained(hub, revision=revision or None)
    except Exception as error:  # transformers, its parsers and the hub client each have error classes of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BackboneError(
            f"The shape of the backbone {name!r} could not be read ({reason}): name a hub id that this machine can reach, "
            f"a local folder, a .gguf file, or one of {', '.join(KNOWN)}."
        ) from error
