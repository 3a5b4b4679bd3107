"""Ratios of training and evaluation, measured side by side in one process; writes the table of docs/performance.md.

    python benchmarks/training.py [--layers=8] [--rounds=9]

Variants take turns round by round, so that a slow moment of the machine hits all of them; a ratio is the median over rounds.
On a CPU one thread is used and its own time is counted, so that other work does not matter.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from recbole_hatllm import registry
from recbole_hatllm.config import Config
from recbole_hatllm.masks import attention_mask


def interleaved(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, by variant, after one call of each to warm up."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, call in variants.items():
            began = clock()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(clock() - began)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> float:
    """Median over rounds of one variant's time over the other's."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base]))


def build(name: str, keys: dict):
    """A model on MovieLens-100K and its training and test rows."""
    config = Config(name, "ml-100k", config_dict=keys)
    train, _, test = registry.data_loaders(config, registry.create_dataset(config))
    torch.manual_seed(0)
    return (
        registry.model_class(name)(config, train.dataset).to(config["device"]),
        train.dataset.inter_feat,
        test.dataset.inter_feat,
    )


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keys = {"backbone_layers": arguments.layers}
    hat, rows, test = build("HatLLM", {**keys, "n_in": 2, "n_cr": 2})
    big, _, _ = build("BIGRec", keys)
    # Whole histories only, so that every round has the same number of tokens to within a title's length.
    rows = rows[rows["item_length"] == 10]
    device = next(hat.parameters()).device
    batch, many, test = rows[:16].to(device), rows[:64].to(device), test[:32].to(device)

    def step(model):
        def call():
            model.train()
            model.zero_grad(set_to_none=True)
            model.calculate_loss(batch).backward()

        return call

    def rank(model):
        def call():
            model.eval()
            with torch.no_grad():
                model.full_sort_predict(test)

        return call

    def assemble(part):
        return lambda: hat.prompts(part["item_id_list"], part["item_length"])

    prompt = assemble(batch)()
    kinds = sorted(set(hat.backbone.kinds))
    times = interleaved(
        {
            "HatLLM step": step(hat),
            "BIGRec step": step(big),
            "HatLLM ranking": rank(hat),
            "BIGRec ranking": rank(big),
            "assembly, 16 rows": assemble(batch),
            "masks, 16 rows": lambda: [attention_mask(k, prompt.span, prompt.is_last, prompt.valid) for k in kinds],
        },
        arguments.rounds,
    )
    assembly = min(interleaved({"assembly": assemble(many)}, 50)["assembly"])
    sasrec, sas_rows, _ = build("SASRec", {})
    sas_batch = sas_rows[:512].to(device)

    def sas_step(anomaly: bool):
        def call():
            with torch.autograd.set_detect_anomaly(anomaly, check_nan=True):
                sasrec.zero_grad(set_to_none=True)
                sasrec.calculate_loss(sas_batch).backward()

        return call

    sasrec.train()
    sas = interleaved({"plain": sas_step(False), "anomaly": sas_step(True)}, 2 * arguments.rounds)
    per_step = statistics.median(times["HatLLM step"])
    lines = [
        ("HatLLM over BIGRec, training step", f"{ratio(times, 'HatLLM step', 'BIGRec step'):.3f}"),
        ("HatLLM over BIGRec, full ranking", f"{ratio(times, 'HatLLM ranking', 'BIGRec ranking'):.3f}"),
        (
            "prompt assembly, share of a training step",
            f"{100 * ratio(times, 'assembly, 16 rows', 'HatLLM step'):.2f} %",
        ),
        ("making the masks, share of a training step", f"{100 * ratio(times, 'masks, 16 rows', 'HatLLM step'):.2f} %"),
        ("HatLLM training", f"{16 / per_step:.1f} rows/s"),
        ("HatLLM full ranking", f"{32 / statistics.median(times['HatLLM ranking']):.1f} rows/s"),
        ("prompt assembly at batch 64", f"{64 / assembly:,.0f} prompts/s"),
        ("SASRec step under RecBole's anomaly mode over without", f"{ratio(sas, 'anomaly', 'plain'):.2f}"),
    ]
    what = f"smollm2-135m, {arguments.layers} layers, {next(hat.backbone.parameters()).dtype}"
    print(f"{what}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| measured | value |\n|---|---|")
    for name, value in lines:
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
