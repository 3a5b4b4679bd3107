"""`run_hatllm.py memory`: what a run needs, item by item, what fits where, and what to change where it does not fit."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

from recbole_hatllm.config import Config
from recbole_hatllm.errors import ConfigError
from recbole_hatllm.masks import describe
from recbole_hatllm.memory import Memory
from recbole_hatllm.prompt_size import prompt_size

GB = 10**9
CARDS = (24, 40, 80)  # GB; a card sold as 24 GB has 25.7, and its driver and fragments take the rest


def report(model: str, dataset: str, files: list[str], keys: dict, items: object = None, tokens: object = None) -> str:
    """The report of the run that `quick_start.run` would start with the same arguments.

    Args:
        items, tokens: of the dataset and of its prompts; counted in the dataset's files where they are None.

    Raises:
        HatError: what `Config`, `prompt_size` and `Memory` refuse, or a number that is none.
    """
    for name, value in (("items", items), ("tokens", tokens)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 2):
            raise ConfigError(f"{name} is {value!r}, and must be a whole number, at least 2.")
    config = Config(model, dataset, files, keys)
    memory = Memory(config, *prompt_size(config, items, tokens))
    return "\n".join([*_head(memory), "", *_table(memory), "", _fits(memory), _here(memory)])


def _here(memory: Memory) -> str:
    if memory.config["load_in_4bit"] and not torch.cuda.is_available():
        return "load_in_4bit needs a CUDA GPU, and torch can use none here."
    return advice(memory, *free_memory())


def _head(memory: Memory) -> list[str]:
    config, prompt = memory.config, memory.prompt
    checkpointing = "gradient checkpointing" if config["gradient_checkpointing"] else "no gradient checkpointing"
    return [
        f"{config['model']} on {config['backbone']}, {memory.parameters:,} parameters, {describe(memory.kinds)}",
        f"{config['dataset']}: {memory.items:,} items; {prompt.tokens} tokens a prompt ({prompt.known})",
        f"{str(memory.dtype).removeprefix('torch.')}, {memory.attention} attention, {checkpointing}, micro-batches of "
        f"{memory.micro} rows with {memory.micro * memory.targets} targets",
    ]


def _table(memory: Memory) -> list[str]:
    rows, layers, kinds = memory.micro, memory.backbone.n_layers, sorted(set(memory.kinds))
    plain, checkpointed = (memory.decoder(rows, way).kept / layers for way in (False, True))
    use, masks = memory.decoder(rows), rows * memory.prompt.tokens**2 * memory.dtype.itemsize * len(kinds)
    lines: list[tuple[str, float | None]] = [
        *memory.resident.items(),
        ("all of these, which stay", sum(memory.resident.values())),
        (f"activations kept for the backward pass, {rows} rows", use.kept),
        (f"  a layer: {plain / GB:.4f}, with gradient checkpointing {checkpointed / GB:.4f}", None),
        (f"  attention scores: {use.scores / GB:.3f} of them; masks {', '.join(kinds)}: {masks / GB:.3f}", None),
        ("beside them, at work in the backward pass", max(use.peak - use.kept, 0) + memory.unpacked),
        (f"or, before it, the loss over {memory.items:,} items", memory.loss(rows)),
        ("fragments that a CPU's allocator keeps, and its libraries' buffers", memory.fragments(memory.step(rows))),
        (f"in ranking, the scores of {memory.config['eval_batch_size']} rows", memory.scores),
        ("training, at its peak", memory.training(rows)),
        ("ranking, at its peak, beside gradients and moments", memory.ranking(rows)),
    ]
    lines = [line for line in lines if line[1] != 0]
    return [f"{'GB':>9}"] + [f"{'' if size is None else f'{size / GB:.3f}':>9}  {name}" for name, size in lines]


def _fits(memory: Memory) -> str:
    found = (f"{memory.largest(card * GB) or 'none'} in {card} GB" for card in CARDS)
    return f"largest micro_batch_size: {', '.join(found)}"


def advice(memory: Memory, free: float, where: str) -> str:
    """One sentence: whether the run fits in `free` bytes of `where`, and if not, what to change."""
    rows = memory.micro
    need = max(memory.training(rows), memory.ranking(rows))
    if need <= free:
        return f"It fits: {need / GB:.1f} GB of the {free / GB:.1f} GB free in {where}."
    largest = max(memory.resident, key=memory.resident.get)
    if fewer := memory.largest(free):
        change = f"set micro_batch_size to {fewer}"
    elif fewer := memory.largest(free, checkpointing=True):
        change = f"set gradient_checkpointing to true and micro_batch_size to {min(fewer, rows)}"
    elif memory.training(1, checkpointing=True) <= free:
        change = "set eval_batch_size lower"
    elif largest.startswith("frozen") and not memory.in_4_bits:
        change = "set load_in_4bit to true, on a GPU, or take a smaller backbone or fewer backbone_layers"
    else:
        size = memory.resident[largest] / GB
        change = f"take a smaller backbone or more memory, as {largest} alone take {size:.1f} GB"
    return f"It does not fit: it needs {need / GB:.1f} GB and {free / GB:.1f} GB are free in {where}; {change}."


def free_memory() -> tuple[float, str]:
    """Bytes free on the GPU, where there is one, else in the machine or its container, and which of them it is."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0], f"the {torch.cuda.get_device_name()}"
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        free = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    folder = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no container, or one without a limit
        free = min(free, int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text()))
    return free, "this machine's RAM"
