"""A frozen decoder in shares: of each layer every process keeps a part, and gets the rest while the layer computes (FSDP2).

Only frozen weights are in shares. What is trained - adapters and head - is small, stays whole in every process and is
data-parallel as ever, so gradients, clipping, the optimiser's state and all files are those of unsharded processes.
"""

from __future__ import annotations

import os
from logging import getLogger

import torch
from torch import nn

from recbole_hatllm import distributed
from recbole_hatllm.errors import ConfigError

# Settings of accelerate's config that would do here something else than they say: the only value taken, and the remedy.
_SETTINGS = {
    "FSDP_VERSION": ("2", "set fsdp_version: 2"),
    # Frozen layers that stay whole save nothing; and a process that saves its weights lets go of them, the others do not.
    "FSDP_RESHARD_AFTER_FORWARD": ("true", "set fsdp_reshard_after_forward: true"),
    "FSDP_OFFLOAD_PARAMS": ("false", "leave it out"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "leave it out and use --gradient_checkpointing=true"),
}


def check(config) -> None:
    """Refuses what cannot be sharded, before any long work.

    Raises:
        ConfigError: a setting of accelerate's FSDP that is not supported, or a backbone in 4 bits or compiled.
    """
    if not distributed.sharded():
        return
    for name, (only, remedy) in _SETTINGS.items():
        if (value := os.environ.get(name, only).lower()) != only:
            raise distributed.once(
                ConfigError(f"accelerate's config has {name.lower()}: {value}, which is not supported: {remedy}.")
            )
    for key, why in (("load_in_4bit", "does not shard 4-bit weights"), ("compile", "was never run on compiled layers")):
        if config[key]:
            raise distributed.once(ConfigError(f"{key} is true, and FSDP {why}: leave one of the two out."))
    # By accelerate's default transformers would leave the weights empty in all processes but the first of a machine.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def shard(model: nn.Module, device: torch.device) -> None:
    """Leaves in this process its share of the frozen weights of the decoder's layers, on `device`.

    Of the weights outside the layers - token embeddings, last norm - and of what is trained each process keeps all. Every
    forward and every backward pass is from now on run by all processes at once.

    Args:
        model: whole, on the CPU. Nothing happens to one without a frozen decoder, or where no launcher asks for FSDP.
    """
    log = getLogger(__name__)
    if not distributed.sharded():
        return
    if not getattr(model, "is_llm", False):
        log.info("%s has no frozen backbone to shard: its training is data-parallel", type(model).__name__)
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    backbone = model.backbone
    layers = backbone.layers
    frozen = {parameter for parameter in layers.parameters() if not parameter.requires_grad}
    options = {
        "mesh": init_device_mesh(device.type, (distributed.world(),)),
        "reshard_after_forward": True,
        "ignored_params": set(backbone.parameters()) - frozen,
    }
    whole = sum(parameter.nbytes for parameter in frozen)
    del frozen  # or the whole weights would stay in memory
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(backbone.model, **options)  # has no weights of its own to shard: a pass begins and ends here
    own = sum(p.to_local().nbytes for p in layers.parameters() if not p.requires_grad)
    log.info("FSDP: %.1f of the %.1f MB of the decoder's layers in each process", own / 1e6, whole / 1e6)
