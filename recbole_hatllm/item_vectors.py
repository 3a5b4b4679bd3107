"""What the backbone itself says of each item: vectors of titles, without any history."""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm

from recbole_hatllm import weights
from recbole_hatllm.backbone import Backbone
from recbole_hatllm.data.titles import TitleTokens
from recbole_hatllm.errors import ConfigError, DataError
from recbole_hatllm.files import cache_folder, publish
from recbole_hatllm.masks import attention_mask


def kept_title_vectors(
    backbone: Backbone, titles: TitleTokens, layers: int | None = None, show_progress: bool = False
) -> Tensor:
    """`title_vectors` of the bare backbone, out of the cache where it has read the same titles to the same depth before."""
    kept = {"titles": hashlib.sha256(titles.ids.numpy().tobytes() + titles.offsets.numpy().tobytes()).hexdigest()}
    kept |= {"backbone": backbone.identity, "layers": layers, "dtype": str(next(backbone.parameters()).dtype)}
    name = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:24]
    file = cache_folder() / "title-vectors" / f"{name}.safetensors"
    device = next(backbone.parameters()).device
    if file.is_file():
        try:
            return weights.read(file)["vectors"].to(device)
        except (DataError, KeyError):  # damaged: made again
            pass
    with backbone.without_adapters():
        vectors = title_vectors(backbone, titles, layers, show_progress=show_progress)
    publish(file, lambda temporary: weights.write(temporary, {"vectors": vectors}))
    return vectors


@torch.no_grad()
def title_vectors(
    backbone: Backbone,
    titles: TitleTokens,
    layers: int | None = None,
    batch_size: int = 256,
    show_progress: bool = False,
) -> Tensor:
    """Mean hidden state over each title's tokens, each state over its root mean square, the title read alone with plain
    causal attention. [n_items, d] float32.

    Items without tokens (padding) get zeros.

    Args:
        layers: the state behind so many layers; behind the last one where it is None.

    Raises:
        ConfigError: there are fewer layers.
    """
    layers = layers or backbone.n_layers
    if layers > backbone.n_layers:
        raise ConfigError(
            f"title_layers is {layers}, and {backbone.identity['name']} has {backbone.n_layers} layers here: lower it, or raise "
            "backbone_layers."
        )
    lengths = titles.offsets.diff()
    device = next(backbone.parameters()).device
    vectors = torch.zeros(len(lengths), backbone.hidden_size, device=device)
    batches = lengths.argsort().split(batch_size)
    for items in tqdm(batches, desc="titles", unit="batch", disable=not show_progress, ncols=100):
        items = items[lengths[items] > 0]
        if not len(items):
            continue
        column = torch.arange(int(lengths[items].max()))
        valid = column < lengths[items, None]
        ids = titles.ids[(titles.offsets[items, None] + column).clamp(max=len(titles.ids) - 1)] * valid
        positions = (column * valid).to(device)
        valid = valid.to(device)
        mask = attention_mask("or", torch.where(valid, 0, -1), valid, valid)
        with _states_behind(backbone.layers[layers - 1]) as states:
            backbone(position_ids=positions, masks=dict.fromkeys(backbone.kinds, mask), input_ids=ids.to(device))
        hidden = states.pop().float()
        hidden = hidden * hidden.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
        vectors[items.to(device)] = (hidden * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
    return vectors


@contextmanager
def _states_behind(layer):
    """A list to which the layer's output goes."""
    states: list[Tensor] = []
    hook = layer.register_forward_hook(
        lambda module, given, output: states.append(output[0] if isinstance(output, tuple) else output)
    )
    try:
        yield states
    finally:
        hook.remove()
