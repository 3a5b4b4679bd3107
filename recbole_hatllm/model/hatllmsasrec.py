"""CR->SASRec of HatLLM's Table 5: a SASRec whose item vectors come out of a HatLLM without CR layers.

The LLM reads each item by itself; what it says of the items goes to a SASRec, which does what the CR layers would have done.
"""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn

from recbole_hatllm import registry, run_folder
from recbole_hatllm.config import Config
from recbole_hatllm.errors import ConfigError
from recbole_hatllm.lineage import Parent, said
from recbole_hatllm.model.sasrecfast import SASRecFast
from recbole_hatllm.shapes import depth_of, width_of
from recbole_hatllm.transfer import to_device

BATCH = 256  # items that are read at once


class HatLLMSASRec(SASRecFast):
    """SASRec over z_i, the state at the last token of item i's title in a trained HatLLM, frozen (Table 5, CR->SASRec).

    With `item_table: projector` the item vectors are W z_i, W learned; with `pca` they begin as the first whitened principal
    components of z and are learned themselves. Either way they are input and output, as in SASRec.
    """

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        size, width = config["hidden_size"], width_of(str(config["backbone"]))
        if config["item_table"] == "projector":
            self.item_embedding = ProjectedTable(self.n_items, width, size, config["initializer_range"])
        elif size > (most := min(self.n_items - 1, width)):
            raise ConfigError(
                f"hidden_size is {size}, and {self.n_items - 1} states of width {width} have {most} principal components: "
                "lower it, or set item_table to projector."
            )
        self.scale, self.cross_layers = config["initializer_range"], config["n_cr"]

    @classmethod
    def parents(cls, config) -> list[Parent]:
        """The HatLLM without CR layers."""
        fixed = {"backbone": config["backbone"], "n_cr": 0}
        keys = said(config, "hatllm_keys", fixed) | fixed
        if config["pretrained"] is None:
            _read_behind(keys.get("backbone_layers") or depth_of(str(config["backbone"])), config["n_cr"])
        return [
            Parent(
                role="hatllm",
                model="HatLLM",
                keys=keys,
                given="pretrained",
                folder=config["pretrained"],
                must={"backbone": (config["backbone"], "backbone"), "n_cr": (0, "CR->SASRec")},
            )
        ]

    @torch.no_grad()
    def inherit(self, folders: dict[str, Path], dataset) -> None:
        """Reads all items by the HatLLM, and makes the item vectors of what it says.

        Args:
            folders: finished runs by role. dataset: as for the constructor, with titles.

        Raises:
            ConfigError: the HatLLM has too few layers. DataError: its weights are damaged.
        """
        stored = run_folder.read_config(folders["hatllm"])
        name, data = stored.pop("model"), stored.pop("dataset")
        llm = registry.model_class(name)(Config(name, data, config_dict=stored), dataset)
        llm.load(folders["hatllm"])
        states = item_states(llm.to(self.device).eval(), self.cross_layers)
        if isinstance(self.item_embedding, ProjectedTable):
            self.item_embedding.states.copy_(states)
        else:
            size = self.item_embedding.weight.shape[1]
            components = PCA(size, whiten=True, svd_solver="full").fit_transform(states[1:].cpu().numpy())
            self.item_embedding.weight[1:] = self.scale * torch.from_numpy(components).to(states)


class ProjectedTable(nn.Module):
    """Item vectors W z_i of frozen z [n_items, width], in the place of an `nn.Embedding`. W has no bias: all items would share it.

    Args:
        std: standard deviation that the vectors begin with, where those of z have a mean square of 1.
    """

    def __init__(self, n_items: int, width: int, size: int, std: float):
        super().__init__()
        self.register_buffer("states", torch.zeros(n_items, width))
        self.map = nn.Linear(width, size, bias=False)
        nn.init.normal_(self.map.weight, std=std / width**0.5)

    @property
    def weight(self) -> Tensor:
        """[n_items, size]."""
        return self.map(self.states)

    def forward(self, items: Tensor) -> Tensor:
        """[...] int64 internal item ids -> [..., size]."""
        return self.map(self.states[items])


def _read_behind(layers: int, cross_layers: int) -> int:
    if cross_layers >= layers:
        raise ConfigError(f"n_cr is {cross_layers}, and the HatLLM has {layers} layers: lower it.")
    return layers - cross_layers


@torch.no_grad()
def item_states(llm, cross_layers: int) -> Tensor:
    """z [n_items, d] float32, 0 for padding: what an LLM recommender says of each item alone, in a prompt with nothing else.

    The state of the last token of its title in front of the last `cross_layers` layers, over its root mean square, and without the
    mean over all items.

    Raises:
        ConfigError: there are not so many layers.
    """
    layer = _read_behind(llm.backbone.n_layers, cross_layers)
    states = torch.zeros(llm.n_items, llm.backbone.hidden_size, device=llm.device)
    for items in torch.arange(1, llm.n_items).split(BATCH):
        prompt = llm.prompts(items[:, None], torch.ones_like(items))
        last = to_device(prompt.is_last.int().argmax(1), llm.device)
        hidden = llm.states(prompt, [layer])[torch.arange(len(items), device=llm.device), last, 0].float()
        states[items.to(llm.device)] = hidden * hidden.square().mean(1, keepdim=True).clamp(min=1e-12).rsqrt()
    states[1:] -= states[1:].mean(0)
    return states
