"""What the host has made, brought to the device without waiting for it.

A step reads nothing back from the device, so that a GPU always has work queued: prompts, layouts and the places of readouts
are made on the host.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def to_device(record: T, device: torch.device) -> T:
    """A tensor, or a dataclass with all tensors in it, on `device`; copied from pinned memory where that is a GPU."""
    if isinstance(record, Tensor):
        if device.type == "cuda" and record.device.type == "cpu":
            record = record.pin_memory()
        return record.to(device, non_blocking=True)
    if is_dataclass(record):
        return replace(
            record, **{field.name: to_device(getattr(record, field.name), device) for field in fields(record)}
        )
    return record
