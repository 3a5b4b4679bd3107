"""What each optimisation of a training step gives, alone and on top of all others; a table of docs/performance.md.

    python benchmarks/optimisations.py [--dataset=ml-100k] [--data_path=dataset/] [--layers=6] [--rows=32] [--rounds=3]

A step teaches `rows` rows, 16 at a time. Without any: padded rows in random order, SDPA with each layer's mask, adapters as PEFT
computes them, one item a row. Ways take turns step by step in one process, one thread, and its own time is counted.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from recbole_hatllm import registry
from recbole_hatllm.adapters import AsItsInput, QuickDropout
from recbole_hatllm.config import Config

NAMES = {
    "plain": "plain attention (against SDPA)",
    "pool": "token pool",
    "sorted": "pieces of like length",
    "adapters": "adapters in the backbone's type",
    "dropout": "16 random bits a number in the adapters' dropout",
    "all": "all items of a row",
}


def arrange(model, on: set[str]) -> None:
    """Switches the optimisations of `on` in a model on, all others off."""
    model.backbone.set_schedule(model.backbone.kinds, "plain" if "plain" in on else "sdpa")
    model.config["token_pool"], model.targets = "pool" in on, "all" if "all" in on else "last"
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        layer.cast_input_dtype_enabled = "adapters" not in on
        for part in (*layer.lora_A.values(), *layer.lora_B.values()):
            part.__class__ = AsItsInput if "adapters" in on else nn.Linear
        for part in layer.lora_dropout.values():
            part.__class__ = QuickDropout if "dropout" in on else nn.Dropout


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--data_path", default="dataset/")
    for name, default in (("layers", 6), ("rows", 32), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    gpu = torch.cuda.is_available()
    clock = time.perf_counter if gpu else time.process_time

    data = {}
    for targets in ("last", "all"):
        keys = {
            "data_path": options.data_path,
            "backbone_layers": options.layers,
            "n_in": 2,
            "n_cr": 1,
            "targets": targets,
        }
        config = Config("HatLLM", options.dataset, config_dict=keys)
        train = registry.data_loaders(config, registry.create_dataset(config))[0].dataset
        data[targets] = train.inter_feat
    model = registry.model_class("HatLLM")(config, train).to(config["device"])
    model.train()
    draw = torch.Generator().manual_seed(0)
    batches = {
        targets: [rows[torch.randperm(len(rows), generator=draw)[: options.rows]] for _ in range(options.rounds + 1)]
        for targets, rows in data.items()
    }

    def seconds_a_target(on: set[str], turn: int) -> float:
        arrange(model, on)
        rows = batches[model.targets][turn]
        began = clock()
        rows = model.by_length(rows) if "sorted" in on else rows
        for start in range(0, len(rows), 16):
            model.calculate_loss(rows[start : start + 16]).backward()
        model.zero_grad(set_to_none=True)
        if gpu:
            torch.cuda.synchronize()
        return (clock() - began) / model.targets_in(rows)

    every = set(NAMES)
    ways = {frozenset(way) for name in NAMES for way in ((), {name}, every - {name}, every)}
    seconds: dict[frozenset, list[float]] = {way: [] for way in ways}
    for turn in range(options.rounds + 1):
        for way in ways:
            found = seconds_a_target(set(way), turn)
            if turn:  # the first one warms up
                seconds[way].append(found)

    def faster(slow: set[str], fast: set[str]) -> float:
        return statistics.median(a / b for a, b in zip(seconds[frozenset(slow)], seconds[frozenset(fast)]))

    what = f"{config['backbone']}, {options.layers} layers, {model.backbone.base.dtype}, {config['device']}"
    print(f"{options.dataset}, {what}, {options.rows} rows a step, torch {torch.__version__}\n")
    print("| optimisation | alone | on top of all others |\n|---|---|---|")
    for name, words in NAMES.items():
        print(f"| {words} | {faster(set(), {name}):.2f} | {faster(every - {name}, every):.2f} |", flush=True)
    print(f"| all of them | {faster(set(), every):.2f} | |")


if __name__ == "__main__":
    main()
