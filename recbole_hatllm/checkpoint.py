"""The state of a training run, in one safetensors file: a run killed at any moment goes on from the last one written.

It holds the trained weights, the optimiser's moments and the random number generators' states as tensors, and everything
else (step, best score, patience) as JSON in the header, so that no file can disagree with another.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from torch import nn

from recbole_hatllm import weights
from recbole_hatllm.files import publish

FILE = "state.safetensors"


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict) -> None:
    """Writes the state of this moment; `progress` is any JSON value."""
    tensors = {f"model/{name}": tensor for name, tensor in _trained(model).items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {
            f"optimizer/{index}/{slot}": torch.as_tensor(value) for slot, value in slots.items() if value is not None
        }
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, inner, gauss_next = random.getstate()
    tensors |= {"random/torch": torch.get_rng_state(), "random/numpy": torch.from_numpy(keys.astype(np.int64))}
    tensors |= {f"random/cuda/{i}": state for i, state in enumerate(_cuda_states())}
    note = {
        "progress": progress,
        "numpy": [kind, position, has_gauss, gauss],
        "python": [version, list(inner), gauss_next],
    }
    publish(folder / FILE, lambda temporary: weights.write(temporary, tensors, note))


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Puts the last saved state back, generators included, and returns its `progress`.

    Raises:
        DataError: the file is damaged or belongs to another model.
    """
    tensors, note = weights.read(folder / FILE), weights.read(folder / FILE, note=True)
    _load_trained(model, {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")})
    slots: dict[int, dict] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, index, slot = name.split("/")
            slots.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    kind, position, has_gauss, gauss = note["numpy"]
    np.random.set_state((kind, tensors["random/numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    version, inner, gauss_next = note["python"]
    random.setstate((version, tuple(inner), gauss_next))
    torch.set_rng_state(tensors["random/torch"])
    for i in range(len(_cuda_states())):
        torch.cuda.set_rng_state(tensors[f"random/cuda/{i}"], i)
    return note["progress"]


def _cuda_states() -> list[torch.Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """The frozen backbone of an LLM recommender is named in the run folder and never copied."""
    if getattr(model, "is_llm", False):
        changed = {name for name, p in model.named_parameters() if p.requires_grad}
        changed |= {name for name, _ in model.named_buffers() if not name.startswith("backbone.")}
        return {name: tensor for name, tensor in model.state_dict().items() if name in changed}
    return weights.model_state(model)


def _load_trained(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    if not getattr(model, "is_llm", False):
        return weights.load_model_state(model, tensors)
    own = _trained(model)
    weights.check_names(own, tensors)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
