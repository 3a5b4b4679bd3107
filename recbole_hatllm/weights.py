"""Weights in safetensors files, never a pickle, with a note of what they belong to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.sparse
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from recbole_hatllm.errors import DataError


def write(file: Path, tensors: dict[str, Tensor], note: dict | None = None) -> None:
    """Writes `tensors`, and `note` as JSON in the file's header."""
    # safetensors refuses tensors that share memory (tied weights): each is stored by itself.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, file, metadata={"note": json.dumps(note or {})})


def read(file: Path, note: bool = False):
    """The tensors of a file by name, or its note with `note=True`.

    Raises:
        DataError: the file is missing, truncated or not a safetensors file.
    """
    try:
        with safe_open(file, framework="pt") as content:
            if note:
                return json.loads((content.metadata() or {}).get("note", "{}"))
            return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - no dict
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(
            f"{file} is not a whole safetensors file ({error}): take another copy, or train again."
        ) from error


def items_identity(item_tokens: Sequence[str]) -> dict:
    """Stands for the items and their order in a checkpoint."""
    return {"count": len(item_tokens) - 1, "sha256": hashlib.sha256("\0".join(item_tokens).encode()).hexdigest()[:16]}


def check_identity(file: Path, expected: dict) -> None:
    """Compares the note of `file` with what the running model is.

    Raises:
        DataError: they differ; both values are named.
    """
    found = read(file, note=True)
    for part in sorted(expected.keys() | found.keys()):
        if found.get(part) != expected.get(part):
            raise DataError(
                f"{file} was trained with {part} {found.get(part)}, and this run has {expected.get(part)}: "
                f"use the run folder's own config.yaml and data, or train again."
            )


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Everything of a RecBole model that training changed: its state_dict and its `other_parameter` as tensors."""
    other = {}
    for name, value in (model.other_parameter() or {}).items():
        if scipy.sparse.issparse(value):
            matrix = value.tocsr()
            parts = {"data": matrix.data, "indices": matrix.indices, "indptr": matrix.indptr, "shape": matrix.shape}
            other |= {f"sparse/{name}/{part}": torch.as_tensor(np.asarray(array)) for part, array in parts.items()}
        elif isinstance(value, Tensor | np.ndarray | int | float):
            kind = "array" if isinstance(value, np.ndarray) else "tensor" if isinstance(value, Tensor) else "number"
            other[f"{kind}/{name}"] = torch.as_tensor(value)
    return {**{f"state/{name}": tensor for name, tensor in model.state_dict().items()}, **other}


def load_model_state(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Puts what `model_state` took back into a model of the same shape.

    Raises:
        DataError: names or shapes differ.
    """
    groups: dict[str, dict] = {"state": {}, "array": {}, "tensor": {}, "number": {}, "sparse": {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        groups[kind][rest] = tensor
    try:
        model.load_state_dict(groups["state"])
    except RuntimeError as error:
        raise DataError(
            f"The weights are of another {type(model).__name__} than the one of this run: {error}."
        ) from error
    other = dict(groups["tensor"])
    other |= {name: tensor.numpy() for name, tensor in groups["array"].items()}
    other |= {name: tensor.item() for name, tensor in groups["number"].items()}
    for name in {name.rsplit("/", 1)[0] for name in groups["sparse"]}:
        data, indices, indptr, shape = (
            groups["sparse"][f"{name}/{part}"].numpy() for part in ("data", "indices", "indptr", "shape")
        )
        other[name] = scipy.sparse.csr_matrix((data, indices, indptr), shape=tuple(shape))
    model.load_other_parameter(other)


def save_model(model: nn.Module, folder: Path, items: dict) -> None:
    """Writes what training changed: an LLM recommender's adapters and head, the whole of any other model."""
    if getattr(model, "is_llm", False):
        model.save(folder)
    else:
        write(folder / "model.safetensors", model_state(model), {"items": items})


def load_model(model: nn.Module, folder: Path, items: dict) -> None:
    """Reads what `save_model` wrote.

    Raises:
        DataError: damaged files, or files of another model, backbone or set of items.
    """
    if getattr(model, "is_llm", False):
        model.load(folder)
    else:
        check_identity(folder / "model.safetensors", {"items": items})
        load_model_state(model, read(folder / "model.safetensors"))


def check_names(own: dict[str, Tensor], stored: dict[str, Tensor]) -> None:
    """Compares names and shapes.

    Raises:
        DataError: they differ; the first difference is named.
    """
    for name in sorted(own.keys() | stored.keys()):
        have, want = (tuple(side[name].shape) if name in side else None for side in (stored, own))
        if have != want:
            raise DataError(
                f"The stored weights are of another model: {name} has shape {have} in the file and {want} in this run."
            )
