"""How much of the machine a training step uses; a table of docs/performance.md.

    python benchmarks/machine.py [--dataset=ml-100k] [--data_path=dataset/] [--layers=8] [--steps=6]

Products of matrices a second over those of one large product in the same type; the trainer's time outside forward pass, backward
pass and optimiser; an evaluation over its forward passes; the tensors that a step holds against the straightforward way
(benchmarks/speed.py), counted one by one.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
from speed import Straightforward
from torch.utils.flop_counter import FlopCounterMode

from recbole_hatllm import registry, weights
from recbole_hatllm.backbone import Backbone
from recbole_hatllm.config import Config
from recbole_hatllm.head import LinearHead
from recbole_hatllm.live import Live
from recbole_hatllm.trainer import StepTrainer


class Clock:
    """Seconds of the process, and how many of them were spent inside the functions that `around` has wrapped."""

    def __init__(self, gpu: bool):
        self.gpu = gpu
        self.now = time.perf_counter if gpu else time.process_time
        self.synchronize = torch.cuda.synchronize if gpu else lambda: None
        self.inside = 0.0

    def around(self, owner, name: str):
        """A patch of `owner.name` that adds up its time."""
        call = getattr(owner, name)

        def timed(*args, **kwargs):
            began = self.now()
            try:
                return call(*args, **kwargs)
            finally:
                self.synchronize()
                self.inside += self.now() - began

        return mock.patch.object(owner, name, timed)


def large_product(dtype: torch.dtype, device, clock: Clock, size: int) -> float:
    """Operations a second of the fastest of ten products of two square matrices."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        began = clock.now()
        a @ b
        clock.synchronize()
        best = min(best, clock.now() - began)
    return 2 * size**3 / best


def step(model, rows) -> None:
    """One forward and backward pass."""
    model.train(True)
    model.calculate_loss(rows).backward()
    model.zero_grad(set_to_none=True)


def held(model, rows) -> int:
    """Bytes of tensors at the peak of a step, beside the weights."""
    step(model, rows)
    with Live() as live:
        step(model, rows)
    return live.peak


def figures(targets: str, options, clock: Clock, folder: Path) -> list[tuple[str, str]]:
    """Lines of the table for a way of training."""
    keys = {
        "data_path": options.data_path,
        "backbone_layers": options.layers,
        "n_in": 2,
        "n_cr": 2,
        "targets": targets,
        "train_batch_size": 32,
        "train_steps": options.steps,
        "eval_sample": 256,
        "show_progress": False,
    }
    config = Config("HatLLM", options.dataset, config_dict=keys)
    train, _, test = registry.data_loaders(config, dataset := registry.create_dataset(config))
    model = registry.model_class("HatLLM")(config, train.dataset).to(config["device"])
    rows = train.dataset.inter_feat
    batch = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:32]]
    weight = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    straight = held(Straightforward(config, dataset.titles, model.prompts.text), batch)
    ours = held(model, batch)

    with FlopCounterMode(display=False) as counter:
        step(model, batch)
    peak = large_product(model.backbone.base.dtype, config["device"], clock, 8192 if clock.gpu else 2048)
    passes = []
    for _ in range(options.steps):
        began = clock.now()
        step(model, batch)
        clock.synchronize()
        passes.append(clock.now() - began)
    share = counter.get_total_flops() / min(passes) / peak

    trainer = StepTrainer(config, model, folder, weights.items_identity(dataset.item_tokens))
    timed = ((Backbone, "forward"), (LinearHead, "loss"), (torch.Tensor, "backward"), (trainer.optimizer, "step"))
    with contextlib.ExitStack() as stack:
        for owner, name in timed:
            stack.enter_context(clock.around(owner, name))
        clock.inside, began = 0.0, clock.now()
        trainer.fit(train)
        outside = 1 - clock.inside / (clock.now() - began)
    with clock.around(Backbone, "forward"):
        clock.inside, began = 0.0, clock.now()
        trainer.evaluate(test, load_best_model=False)
        ranking = (clock.now() - began) / clock.inside
    lines = [
        (f"products in a step, share of the {peak / 1e9:,.0f} GFLOP/s of a large one", f"{share:.2f}"),
        ("trainer's time outside the model, share", f"{100 * outside:.1f} %"),
        ("time of an evaluation over that of its forward passes", f"{ranking:.3f}"),
        ("tensors of a step of 32 rows, MB", f"{ours / 1e6:,.0f}"),
        ("the same over the straightforward way's, which teaches one item a row", f"{ours / straight:.2f}"),
        ("the same, both with their weights", f"{(ours + weight) / (straight + weight):.2f}"),
    ]
    return [(f"`targets: {targets}`: {name}", value) for name, value in lines]


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--data_path", default="dataset/")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    clock = Clock(torch.cuda.is_available())
    with TemporaryDirectory() as folder:
        lines = [line for targets in ("last", "all") for line in figures(targets, options, clock, Path(folder))]
    device = "GPU" if clock.gpu else "CPU, one thread"
    print(f"{options.dataset}, smollm2-135m, {options.layers} layers, {device}, torch {torch.__version__}\n")
    print("| measured | value |\n|---|---|")
    for name, value in lines:
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
