"""Low-rank adapters on a frozen decoder: PEFT's, made to compute as fast as the decoder does."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_hatllm.errors import BackboneError

# What the query and value projections are called; the first entry whose names a model has is taken.
LORA_TARGETS = (("q_proj", "v_proj"), ("qkv_proj",), ("query_key_value",), ("c_attn",), ("Wqkv",), ("wqkv",))


def with_lora(
    model: nn.Module,
    identity: dict,
    r: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str] | None = None,
    from_layer: int = 0,
) -> PeftModel:
    """`model` with trainable adapters in its linear layers; the arguments and errors are those of `Backbone.add_lora`.

    Args:
        identity: of the model, as a `Backbone` has it.
    """
    names = [name for name, module in model.named_modules() if _is_linear(module)]
    known = sorted({name.rpartition(".")[2] for name in names})
    if not targets:
        targets = next((group for group in LORA_TARGETS if set(group) <= set(known)), None)
        if targets is None:
            raise BackboneError(
                f"lora_targets has no default for {identity['model_type']}: name some of {', '.join(known)}."
            )
    fits = lambda name, target: name == target or name.endswith(f".{target}")  # noqa: E731
    for target in targets:
        if not any(fits(name, target) for name in names):
            raise BackboneError(
                f"lora_targets names {target!r}, which {identity['name']} does not have: "
                f"use some of {', '.join(known)}."
            )
    if not 0 <= from_layer < identity["layers"]:
        raise BackboneError(
            f"lora_from_layer is {from_layer}, and the layers of {identity['name']} are 0 to {identity['layers'] - 1}."
        )
    if from_layer:
        layer = {name: int(found[1]) for name in names if (found := re.search(r"\.(\d+)\.", name))}
        targets = [
            name
            for name, number in layer.items()
            if number >= from_layer and any(fits(name, target) for target in targets)
        ]
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets))
    with warnings.catch_warnings():  # peft asks transformers by a name that it is about to lose
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        adapted = get_peft_model(model, config)
    quicken(adapted)
    return adapted


def second(model: PeftModel, name: str) -> None:
    """Adds adapters of the same form under another name, trained as well; which of them are on, `Backbone.adapter` says."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.add_adapter(name, copy.deepcopy(model.peft_config["default"]))
    quicken(model)
    added = [parameter for full, parameter in model.named_parameters() if f".{name}." in full]
    for parameter in (*trained, *added):  # PEFT trains only those that are on
        parameter.requires_grad_(True)


def quicken(model: PeftModel) -> None:
    """Makes PEFT's layers compute as the decoder does."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
            for part in (*layer.lora_A.values(), *layer.lora_B.values()):
                part.__class__ = AsItsInput
            for part in layer.lora_dropout.values():
                if isinstance(part, nn.Dropout):  # and not the Identity that PEFT puts in place of none
                    part.__class__ = QuickDropout


class AsItsInput(nn.Linear):
    """A linear layer that computes in the type of its input.

    PEFT would turn every activation into float32 and back. The weights are kept in float32, as a small step of the optimiser is
    less than the rounding of bfloat16.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype))


class QuickDropout(nn.Dropout):
    """Dropout that draws 16 bits a number where torch on a CPU draws 64, which takes longer than the projection behind it.

    `p` is rounded to a multiple of 2^-16.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.is_cuda or not self.training or self.p == 1:
            return super().forward(input)
        dropped = min(round(self.p * 2**16), 2**16 - 1)
        drawn = torch.empty(-(-input.numel() // 4), dtype=torch.int64, device=input.device).random_(-(2**63), None)
        kept = drawn.view(torch.int16)[: input.numel()].view(input.shape) >= dropped - 2**15
        return torch.where(kept, input * (2**16 / (2**16 - dropped)), 0)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ in ("Conv1D", "Linear4bit")
