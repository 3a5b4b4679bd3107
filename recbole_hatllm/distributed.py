"""Several processes that train one model: started by a launcher, each with a share of the rows and all of the weights.

Alone in its run, a process finds every function here to be nothing: no group, no communication, all rows its own.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from logging import getLogger
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from recbole_hatllm.errors import ConfigError, HatError

T = TypeVar("T")
_LAUNCHED = int(os.environ.get("WORLD_SIZE", 1)) > 1  # by accelerate launch, torchrun or a scheduler
# What else accelerate's config may ask for, and the remedy.
_OTHERS = {
    "DEEPSPEED": "set distributed_type: FSDP, which shards a frozen decoder as ZeRO-3 does",
    "MEGATRON_LM": "leave it out",
}
_PATIENCE = timedelta(hours=12)  # the first process may be downloading a backbone meanwhile
_UNTIL_SAID = 20  # seconds


def start(device: torch.device) -> None:
    """Meets the other processes, if a launcher started any: over gloo where `device` is the CPU, else one GPU a process.

    Raises:
        ConfigError: accelerate's config asks for another kind of parallelism than data-parallel and FSDP.
    """
    if not _LAUNCHED:
        if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
            getLogger(__name__).warning(
                "accelerate launch has started one process only, as it does on a CPU: add --multi_gpu, for a CPU too."
            )
        return
    for kind, remedy in _OTHERS.items():
        if _asked(kind):
            raise once(ConfigError(f"accelerate's config asks for {kind}, which is not supported: {remedy}."))
    from accelerate import PartialState

    PartialState(cpu=device.type == "cpu", timeout=_PATIENCE)


def sharded() -> bool:
    """Whether accelerate's config asks for FSDP: a backbone is then in shares, of which each process has one."""
    return _LAUNCHED and _asked("FSDP")


def world() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def first() -> bool:
    """Whether this process is the one that writes, logs and shows its progress."""
    return rank() == 0


def once(error: HatError) -> BaseException:
    """What to raise where all processes meet the same `error`: the first says it, the others end quietly."""
    if not _LAUNCHED or os.environ["RANK"] == "0":
        return error
    time.sleep(_UNTIL_SAID)  # a launcher ends all processes as soon as one has ended
    return SystemExit(2)


def alone(what: str) -> None:
    """Raises ConfigError where there is more than one process."""
    if _LAUNCHED:
        raise once(ConfigError(f"{what} runs in one process: start it without a launcher."))


def told(decide: Callable[[], T]) -> T:
    """What `decide` returns in the first process, which alone calls it; the HatError that it raises there ends all."""
    if world() == 1:
        return decide()
    message: list = [None, None]
    if first():
        try:
            message[0] = decide()
        except HatError as error:
            message[1] = error
    distributed.broadcast_object_list(message, src=0)
    if message[1] is not None:
        raise once(message[1])
    return message[0]


def in_turn(make: Callable[[], T]) -> T:
    """What `make` returns in each process, the first before the others, which find its downloads and caches."""
    made: list[T] = []
    told(lambda: made.append(make()))
    return made[0] if made else make()


def barrier() -> None:
    """Waits until all processes are here."""
    if world() > 1:
        distributed.barrier()


def mean(value: float) -> float:
    """The mean of all processes' numbers."""
    if world() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=_device())
    distributed.all_reduce(total)
    return total.item() / world()


def share_of(rows: int) -> np.ndarray:
    """This process's rows of so many: every n-th, and as many in each process, so the last may begin again at row 0."""
    return np.arange(rank(), -(-rows // world()) * world(), world()) % max(rows, 1)


def gather_rows(columns: dict[str, Tensor], rows: int | None) -> dict[str, Tensor]:
    """All `rows` in their order, each once, where every process has those of `share_of(rows)`.

    Args:
        columns: [rows of this process, ...] each, on the CPU.
    """
    if world() == 1:
        return columns
    parts: list = [None] * world()
    distributed.all_gather_object(parts, columns)
    return {name: torch.stack([part[name] for part in parts], 1).flatten(0, 1)[:rows] for name in columns}


def evened(pieces: list[T], filler: T) -> list[T]:
    """`pieces` and behind them `filler`: at least one, as every process takes part in a step, and where the backbone is sharded
    the same number in all processes, as it takes all of them to put a layer together."""
    need = torch.tensor(max(len(pieces), 1), device=_device() if sharded() else None)
    if sharded():
        distributed.all_reduce(need, distributed.ReduceOp.MAX)
    return pieces + [filler] * (int(need) - len(pieces))


@torch.no_grad()
def align(model: nn.Module) -> None:
    """Gives all processes the first one's trained weights and floating-point buffers (statistics, whitening)."""
    if world() > 1:
        buffers = (buffer for buffer in model.buffers() if buffer.is_floating_point())
        for tensor in [*_trained(model), *buffers]:
            distributed.broadcast(tensor.data, src=0)


def draw_from(*key: int) -> None:
    """Seeds this process's generators by `key` and its rank, so that no two processes drop the same units."""
    if world() > 1:
        np.random.seed([*key, rank()])
        random.seed(str([*key, rank()]))
        torch.manual_seed(int(np.random.SeedSequence([*key, rank()]).generate_state(1, np.uint64)[0]) >> 1)


class _Loss(nn.Module):
    """What is synchronised of a model: its loss as the forward pass, and of its parameters those that are trained."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.trained = nn.ParameterList(_trained(model))
        self.calculate_loss = model.calculate_loss  # the method, not the module: a frozen backbone is not sent around

    def forward(self, batch):
        return self.calculate_loss(batch)


def data_parallel(model: nn.Module) -> Callable:
    """`model.calculate_loss`, whose backward pass leaves the mean over all processes in the gradients (torch's DDP)."""
    if world() == 1 or not _trained(model):
        return model.calculate_loss
    # Most LLM recommenders use all that they train. Of RecBole's models some do not, and searching for it costs a little.
    search = not getattr(model, "always_uses_all_it_trains", False)
    return DistributedDataParallel(_Loss(model), find_unused_parameters=search, gradient_as_bucket_view=True)


def gradients_meet(loss: Callable, now: bool) -> AbstractContextManager:
    """Around one pass of `data_parallel`'s function: gradients are only added up here until the pass with `now`."""
    return loss.no_sync() if isinstance(loss, DistributedDataParallel) and not now else nullcontext()


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _asked(kind: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true"


def _device() -> torch.device:
    from accelerate import PartialState

    return PartialState().device
