"""How much memory a computation holds, found without that memory: it runs on the meta device, and tensors are counted."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Bytes of the tensors made inside this context: `now`, those still alive, and `peak`, the most at one moment.

    What was there before, such as parameters, does not count. Views count once. The backward pass is seen too.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, tuple[int, torch.Size]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._see((args, kwargs), made=False)
        out = func(*args, **(kwargs or {}))
        self._see(out, made=True)
        return out

    def held(self, of_shape) -> int:
        """Bytes alive in tensors whose shape `of_shape(shape)` holds for, as they were made."""
        return sum(size for size, shape in self._alive.values() if of_shape(shape))

    def _see(self, tree, made: bool) -> None:
        for tensor in tree_leaves(tree):
            if isinstance(tensor, Tensor) and (key := (storage := tensor.untyped_storage())._cdata) not in self._alive:
                self._alive[key] = (storage.nbytes() if made else 0, tensor.shape)
                self.now += self._alive[key][0]
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._alive.pop(key)[0]


@contextmanager
def on_meta() -> Iterator[None]:
    """Inside, decoders can be called on the meta device: before version 5 transformers asks for autocast on the device that it
    is on, and torch has none for this one."""
    autocast = torch.autocast
    known = lambda device_type, *args, **kwargs: autocast(  # noqa: E731
        "cpu" if device_type == "meta" else device_type, *args, **kwargs
    )
    with mock.patch.object(torch, "autocast", known):
        yield


@contextmanager
def kernels(gpu: bool) -> Iterator[None]:
    """Inside, the meta device keeps what the kernels of a real one keep, where several small steps stand for them.

    Args:
        gpu: of a GPU, where a dropout keeps one byte a number; else of a CPU, where it keeps the factors themselves.
    """
    with mock.patch.object(F, "scaled_dot_product_attention", _attention):
        if not gpu:
            yield
            return
        with mock.patch.object(F, "dropout", _dropout):
            yield


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _dropout(input, p=0.5, training=True, inplace=False):
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input
