"""The estimate of `run_hatllm.py memory` beside the memory that a training step takes, each in a process of its own; Linux.

    python benchmarks/memory.py [--layers=4]

SmolLM2-135M's shape with random weights, cut to some layers, MovieLens-100K's longest prompts. Two micro-batches and the
optimiser's step; what is there all the time (weights, gradients, moments) is measured before and not part of the figures.
Each case runs twice: with glibc's allocator told to give every large block back at once, and as it is, which keeps fragments.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel

CASES = {
    "": {},
    "4 rows": {"micro_batch_size": 4},
    "eager": {"attention": "eager"},
    "sdpa": {"attention": "sdpa"},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "gradient checkpointing, sdpa": {"gradient_checkpointing": True, "attention": "sdpa"},
    "padded rows": {"token_pool": False},
    "targets: all": {"targets": "all", "micro_batch_size": 4},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, gradient checkpointing": {"dtype": "bfloat16", "gradient_checkpointing": True},
    "2 layers": {"backbone_layers": 2},
}


def write_backbone(folder: Path, layers: int) -> None:
    """A folder with a decoder of random weights, and whatever tokenizer is at hand."""
    from recbole_hatllm.files import cache_folder
    from recbole_hatllm.pretrained import local_tokenizer, quiet, random_tiny
    from recbole_hatllm.shapes import skeleton

    config = skeleton("smollm2-135m", layers, torch.float32).config
    with quiet():
        AutoModel.from_config(AutoConfig.for_model(**config.to_dict())).save_pretrained(folder)
    (local_tokenizer(cache_folder()) or random_tiny(1, 0, torch.float32, None)[1]).save_pretrained(folder)


def resident(field: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` the most since `forget_peak`."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def forget_peak() -> None:
    """Gives freed memory back to the system, and the peak falls to what is there now."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def measure(keys: dict) -> dict:
    """Bytes that the step took beside what is always there, in this process, and the estimate of them."""
    from recbole_hatllm import registry
    from recbole_hatllm.config import Config
    from recbole_hatllm.memory import Memory
    from recbole_hatllm.prompt_size import prompt_size

    config = Config("HatLLM", "ml-100k", config_dict={"n_in": 1, "n_cr": 1, **keys})
    memory = Memory(config, *prompt_size(config))
    train = registry.data_loaders(config, registry.create_dataset(config))[0]
    model = registry.model_class("HatLLM")(config, train.dataset)
    optimizer = torch.optim.AdamW(model.parameter_groups())
    rows = train.dataset.inter_feat
    longest = model.prompts.title_tokens(rows["item_id_list"]).argsort(descending=True)

    def step(batch) -> None:
        model.train()
        for _ in range(2):
            model.calculate_loss(batch).backward()
        optimizer.step()

    step(rows[longest[-1:]])  # gradients, moments and the libraries' own buffers
    forget_peak()
    before = resident("VmRSS")
    began = time.perf_counter()
    step(rows[longest[: memory.micro]])
    seconds = time.perf_counter() - began
    return {
        "measured": resident("VmHWM") - before,
        "tensors": memory.step(memory.micro),
        "fragments": memory.fragments(memory.step(memory.micro)),
        "seconds": seconds,
    }


def main() -> None:
    """Measures each case and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(json.loads(arguments.measure))))
        return
    print(
        f"{arguments.layers} layers of SmolLM2-135M's shape, float32, plain attention, 8 rows, unless said otherwise\n"
    )
    print(
        "| case | tensors, estimated MB | measured, blocks given back | ratio | with fragments | measured, as glibc is | ratio "
        "| seconds, given back over as it is |\n|---|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        write_backbone(Path(folder), arguments.layers)
        usual = {"backbone": folder, "dtype": "float32", "attention": "plain", "micro_batch_size": 8}
        for name, keys in CASES.items():
            command = [sys.executable, __file__, "--measure", json.dumps({**usual, **keys})]
            given_back, as_is = (run(command, variables) for variables in ({"MALLOC_MMAP_THRESHOLD_": "65536"}, {}))
            figures = []
            for estimated, measured in (
                (given_back["tensors"], given_back["measured"]),
                (as_is["tensors"] + as_is["fragments"], as_is["measured"]),
            ):
                figures += [f"{estimated / 1e6:,.0f}", f"{measured / 1e6:,.0f}", f"{estimated / measured:.2f}"]
            figures.append(f"{given_back['seconds'] / as_is['seconds']:.2f}")
            print(f"| {name or 'as said'} | {' | '.join(figures)} |", flush=True)


def run(command: list[str], variables: dict) -> dict:
    """What a process of its own prints in its last line."""
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **variables})
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
