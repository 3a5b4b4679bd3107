"""How time grows with items, rows, history, titles and layers; the tables of docs/scaling.md. Five minutes.

    python benchmarks/scaling.py

Made-up items and histories, smollm2-135m in bfloat16, one thread. Sizes take turns; seconds are the process's own time,
medians over turns. The exponent is the least-squares slope of log(seconds) over log(size): 1 is proportional. The last
column is the same between the two largest sizes alone, where what does not grow weighs least.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
from recbole.data.interaction import Interaction

from recbole_hatllm import registry
from recbole_hatllm.config import Config
from recbole_hatllm.data.rows import TARGET_LENGTH
from recbole_hatllm.evaluation import target_ranks
from recbole_hatllm.head import START, LinearHead
from recbole_hatllm.shapes import KNOWN

ITEMS, TITLE, HISTORY, LAYERS = 1000, 8, 10, 4  # of a model, where they are not what grows
WORDS = ["red", "green", "small", "old", "wooden", "glass", "kitchen", "garden", "chair", "lamp", "book", "game"]
RANK = 8  # of the adapters


def medians(calls: dict[int, Callable[[], object]], rounds: int = 3) -> dict[int, float]:
    """Seconds of each call by size, after one call of each to warm up."""
    seconds: dict[int, list[float]] = {size: [] for size in calls}
    for turn in range(rounds + 1):
        for size, call in calls.items():
            began = time.process_time()
            call()
            if turn:
                seconds[size].append(time.process_time() - began)
    return {size: statistics.median(values) for size, values in seconds.items()}


def line(what: str, seconds: dict[int, float], parts: dict[int, int] | None = None) -> None:
    """Prints a row of the table; seconds are divided by `parts`."""
    sizes = list(seconds)
    values = [seconds[size] / (parts[size] if parts else 1) for size in sizes]
    slope = np.polyfit(np.log(sizes), np.log(values), 1)[0]
    last = np.log(values[-1] / values[-2]) / np.log(sizes[-1] / sizes[-2])
    figures = ", ".join(f"{1000 * value:,.{0 if value > 0.1 else 1}f}" for value in values)
    print(f"| {what} | {', '.join(f'{size:,}' for size in sizes)} | {figures} | {slope:.2f} | {last:.2f} |", flush=True)


def made(layers: int = LAYERS, title: int = TITLE):
    """HatLLM over `ITEMS` made-up items, each with a title of `title` tokens."""
    draw = np.random.default_rng(0)
    titles = ["", *(" ".join(draw.choice(WORDS, 40)) for _ in range(ITEMS))]
    dataset = SimpleNamespace(
        titles=titles, item_num=len(titles), item_tokens=list(map(str, range(len(titles)))), num=lambda _: len(titles)
    )
    keys = {"backbone_layers": layers, "n_in": 1, "n_cr": 1, "title_tokens": title, "lora_r": RANK, "dtype": "bfloat16"}
    keys |= {"use_gpu": False, "micro_batch_size": 16}
    return registry.model_class("HatLLM")(Config("HatLLM", "ml-100k", config_dict=keys), dataset)


def histories(rows: int, length: int = HISTORY) -> Interaction:
    """Rows with as many random items each."""
    draw = torch.Generator().manual_seed(0)
    items = torch.randint(1, ITEMS + 1, (rows, length + 1), generator=draw)
    lengths = torch.full((rows,), length)
    columns = {"item_id_list": items[:, :-1], "item_length": lengths, "item_id": items[:, -1], TARGET_LENGTH: lengths}
    return Interaction(columns)


def step(model, rows: Interaction, targets: str = "last") -> Callable[[], None]:
    """Forward and backward of all rows, 16 at a time."""

    def call():
        model.targets = targets
        model.train()
        model.zero_grad(set_to_none=True)
        for start in range(0, len(rows), 16):
            model.calculate_loss(rows[start : start + 16]).backward()

    return call


def ranking(model, rows: Interaction) -> Callable[[], None]:
    """Ranks of the rows' targets among all items."""

    def call():
        model.eval()
        with torch.no_grad():
            target_ranks(model.full_sort_predict(rows), rows["item_id"])

    return call


def items() -> None:
    """Over the number of items: the head's part of a step and of a ranking, without the backbone."""
    sizes, width, rows = (10**3, 10**4, 10**5, 10**6), 576, 32
    vector = torch.randn(rows, width)
    heads, target = {}, {size: torch.randint(1, size + 1, (rows,)) for size in sizes}
    for size in sizes:
        heads[size] = LinearHead(2, width)
        heads[size].weight = torch.nn.Parameter(torch.empty(size + 1, width).normal_(0, START))

    def loss(size):
        heads[size].weight.grad = None
        heads[size].loss(vector.clone().requires_grad_(), target[size]).backward()

    @torch.no_grad()
    def ranked(size):
        target_ranks(heads[size](vector), target[size])

    @torch.no_grad()
    def first(size):
        heads[size](vector).topk(10)

    seconds = medians({size: lambda size=size: loss(size) for size in sizes})
    line(f"items: loss of {rows} targets, forward and backward", seconds)
    line(f"items: ranks of {rows} users", medians({size: lambda size=size: ranked(size) for size in sizes}))
    line(f"items: top 10 of {rows} users", medians({size: lambda size=size: first(size) for size in sizes}))
    few = sizes[:-1]  # with its moments and what a step needs beside, the largest head takes 12 GB
    optimizers = {size: torch.optim.AdamW([heads[size].weight]) for size in few}
    line("items: AdamW's step of the head", medians({size: optimizers[size].step for size in few}))
    size = few[-1]
    moments = [x for x in optimizers[size].state[heads[size].weight].values() if x.numel() > 1]
    held = [heads[size].weight, heads[size].weight.grad, *moments]
    print(f"\nhead of {size:,} items, gradient, moments: {sum(x.nbytes for x in held) / 1e6:,.1f} MB\n", flush=True)


def sequences() -> None:
    """Over rows, items of a history, tokens of a title, and layers."""
    model = made()
    sizes: tuple[int, ...] = (16, 32, 64, 128)
    line("rows: training", medians({size: step(model, histories(size)) for size in sizes}))
    line("rows: ranking", medians({size: ranking(model, histories(size)) for size in sizes}))

    sizes, rows = (5, 10, 20, 50), 8
    per_row = dict.fromkeys(sizes, rows)
    batches = {size: histories(rows, size) for size in sizes}
    line("history: training, `targets: last`, a row", medians({n: step(model, batches[n]) for n in sizes}), per_row)
    every = medians({size: step(model, batches[size], "all") for size in sizes})
    line("history: training, `targets: all`, a row", every, per_row)
    line("history: training, `targets: all`, a target", every, {size: rows * size for size in sizes})
    line("history: ranking, a user", medians({size: ranking(model, batches[size]) for size in sizes}), per_row)

    batch = histories(rows)
    for what, sizes, build in (
        ("tokens of a title", (4, 8, 16, 32), lambda size: made(title=size)),
        ("layers", (2, 4, 8, 16), lambda size: made(layers=size)),
    ):
        models = {size: build(size) for size in sizes}
        per_row = dict.fromkeys(sizes, rows)
        line(f"{what}: training, a row", medians({size: step(models[size], batch) for size in sizes}), per_row)
        line(f"{what}: ranking, a user", medians({size: ranking(models[size], batch) for size in sizes}), per_row)


def gradients() -> None:
    """What processes send each other in a step, from the shapes: float32 gradients of the adapters and the head."""
    print(
        f"| backbone, adapters of rank {RANK} on query and value | adapters, MB | head, MB an item | 17,250 items, MB in all "
        "| 10^7 items, MB in all |\n|---|---|---|---|---|"
    )
    for name in ("SmolLM2-135M", "Llama-3.2-3B", "Llama-3.1-8B"):
        _, width, layers, heads, value_heads, size, *_ = KNOWN[name]
        adapters = 4 * layers * RANK * (2 * width + (heads + value_heads) * size) / 1e6
        head = 4 * width / 1e6
        whole = " | ".join(f"{adapters + n * head:,.0f}" for n in (17250, 10**7))
        print(f"| {name} | {adapters:.1f} | {head:.4f} | {whole} |")


def main() -> None:
    """Measures and prints the tables."""
    torch.set_num_threads(1)
    print(f"smollm2-135m in bfloat16, {LAYERS} layers, cpu, 1 thread, torch {torch.__version__}\n")
    columns = "what grows: what is measured | sizes | milliseconds | exponent | at the largest"
    print(f"| {columns} |\n|---|---|---|---|---|")
    sequences()
    items()
    gradients()


if __name__ == "__main__":
    main()
