"""What the bare backbone says of a text read alone: one vector a text, for a whole catalogue computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from recbole_hatllm.backbone import Backbone
from recbole_hatllm.data.titles import TitleTokens
from recbole_hatllm.errors import ConfigError
from recbole_hatllm.files import cache_folder, publish
from recbole_hatllm.masks import attention_mask
from recbole_hatllm.pool import TokenPool
from recbole_hatllm.transfer import to_device

BATCH = 256  # texts that are read at once


def flat(texts: Sequence[Sequence[int]]) -> TitleTokens:
    """Texts of token ids, one behind the other."""
    offsets = torch.tensor([0, *map(len, texts)]).cumsum(0)
    return TitleTokens(torch.tensor([token for text in texts for token in text], dtype=torch.int64), offsets)


def behind(beginning: Sequence[int], titles: TitleTokens) -> TitleTokens:
    """Every title that has tokens, behind what the tokenizer begins a text with."""
    texts = (part.tolist() for part in titles.ids.split(titles.offsets.diff().tolist()))
    return flat([[*beginning, *text] if text else [] for text in texts])


def states(
    backbone: Backbone, texts: TitleTokens, chosen: Tensor, pool: str = "last", layers: int | None = None
) -> Tensor:
    """The last hidden states, after the final norm and with plain causal attention, of some texts, each read alone.

    Args:
        chosen: [N] int64 numbers of texts that have tokens, on the host.
        pool: `last`, the state of a text's last token, or `mean`, that of all its tokens.
        layers: take the states behind so many layers instead, each over its root mean square.

    Returns:
        [N, d] in the type of the backbone, means in float32, on its device; differentiable.
    """
    start, length = texts.offsets[chosen], texts.offsets.diff()[chosen]
    column = torch.arange(int(length.max()))
    valid = column < length[:, None]
    ids = texts.ids[(start[:, None] + column).clamp(max=len(texts.ids) - 1)] * valid
    device = backbone.base.get_input_embeddings().weight.device
    layout = to_device(TokenPool.of(valid, 0), device)
    ids, valid, positions, last = (to_device(x, device) for x in (ids, valid, column * valid, length - 1))
    mask = attention_mask("or", torch.full_like(ids, -1), torch.zeros_like(valid), valid)
    depths = [layers] if layers else None
    hidden = backbone(positions, dict.fromkeys(backbone.kinds, mask), input_ids=ids, pool=layout, depths=depths)
    if layers:
        hidden = hidden[:, :, 0] * hidden[:, :, 0].float().square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
    if pool == "mean":
        return (hidden.float() * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
    return hidden[torch.arange(len(hidden), device=device), last]


@torch.no_grad()
def table(
    backbone: Backbone,
    texts: TitleTokens,
    pool: str = "last",
    show_progress: bool = False,
    layers: int | None = None,
) -> Tensor:
    """`states` of all texts, [n, d]; zeros for a text without tokens.

    Texts are read next to texts of their length; how many there are changes no vector.

    Raises:
        ConfigError: there are fewer layers.
    """
    if layers and layers > backbone.n_layers:
        raise ConfigError(
            f"title_layers is {layers}, and {backbone.identity['name']} has {backbone.n_layers} layers here: lower it, or raise "
            "backbone_layers."
        )
    training = backbone.training
    backbone.eval()
    lengths = texts.offsets.diff()
    weight = backbone.base.get_input_embeddings().weight
    dtype = torch.float32 if pool == "mean" else weight.dtype
    vectors = torch.zeros(len(lengths), backbone.hidden_size, dtype=dtype, device=weight.device)
    order = lengths.argsort(stable=True)
    batches = order[lengths[order] > 0].split(BATCH)
    for chosen in tqdm(batches, desc="read titles", unit="batch", disable=not show_progress, ncols=100, leave=False):
        if len(chosen):
            vectors[chosen.to(weight.device)] = states(backbone, texts, chosen, pool, layers)
    backbone.train(training)
    return vectors


def kept_table(
    backbone: Backbone,
    texts: TitleTokens,
    pool: str = "last",
    show_progress: bool = False,
    layers: int | None = None,
) -> Tensor:
    """`table` of the backbone without its adapters; read from the cache where it was made before of the same backbone and texts."""
    weight = backbone.base.get_input_embeddings().weight
    source = {**backbone.identity, "dtype": str(weight.dtype), "pool": pool, "behind": layers}
    source["in_4bit"] = bool(getattr(backbone.base, "is_loaded_in_4bit", False))
    key = hashlib.sha256(json.dumps(source, sort_keys=True).encode())
    for tensor in (texts.ids, texts.offsets):
        key.update(tensor.numpy().tobytes())
    file = cache_folder() / f"states-{key.hexdigest()[:32]}.safetensors"
    if file.is_file():
        try:
            return load_file(file)["vectors"].to(weight.device)
        except (SafetensorError, KeyError):  # a damaged cache is made again
            pass
    with backbone.without_adapters():
        vectors = table(backbone, texts, pool, show_progress, layers)
    publish(file, lambda temporary: save_file({"vectors": vectors.cpu()}, temporary))
    return vectors
