"""How much faster SASRecFast teaches the same items than RecBole's SASRec, whose training gives each a row of its own.

    python benchmarks/classic.py [--rounds=7]

Steps of the two on MovieLens-100K take turns in one process; a ratio is the median over rounds of seconds for each item
taught, which is the ratio of an epoch's time.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from training import build, interleaved

TARGETS = 2048  # RecBole's batch


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| history | stride | SASRec, items taught/s | SASRecFast, items taught/s | ratio |\n|---|---|---|---|---|")
    for longest, strides in ((10, (10, 5)), (50, (50, 25))):
        for stride in strides:
            keys = {"MAX_ITEM_LIST_LENGTH": longest}
            theirs, rows, _ = build("SASRec", keys)
            ours, covering, _ = build("SASRecFast", {**keys, "stride": stride})
            device = next(ours.parameters()).device
            single = rows[torch.randperm(len(rows))[:TARGETS]].to(device)
            order = torch.randperm(len(covering))
            count = int((covering["target_length"][order].cumsum(0) <= TARGETS).sum())
            several = covering[order[:count]].to(device)
            taught = {"SASRec": len(single), "SASRecFast": ours.targets_in(several)}

            def step(model, batch):
                def call():
                    model.train()
                    model.zero_grad(set_to_none=True)
                    model.calculate_loss(batch).backward()

                return call

            times = interleaved({"SASRec": step(theirs, single), "SASRecFast": step(ours, several)}, rounds)
            speed = {name: [taught[name] / second for second in times[name]] for name in times}
            faster = statistics.median(a / b for a, b in zip(speed["SASRecFast"], speed["SASRec"]))
            middle = {name: statistics.median(values) for name, values in speed.items()}
            print(f"| {longest} | {stride} | {middle['SASRec']:,.0f} | {middle['SASRecFast']:,.0f} | {faster:.1f} |")


if __name__ == "__main__":
    main()
