"""Memory and time of the item loss, forward and backward, in pieces and at once, each in a process of its own; Linux.

    python benchmarks/head.py [--targets=320] [--width=576]

`at once` is the plain cross-entropy, `checkpointed` the same pieces under torch.utils.checkpoint, `in pieces` what
`LinearHead.loss` does. The weights themselves are there before and not counted; their gradient is.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from recbole_hatllm import head as heads


def at_once(head, vector, target):
    return F.cross_entropy(head.logits(vector), target - 1)


def checkpointed(head, vector, target):
    def piece(vector, items, target):
        return F.cross_entropy(vector @ items.T, target, reduction="sum")

    items, rows = head.weight[1:], max(1, heads.PIECE // len(head.weight))
    parts = zip(vector.split(rows), (target - 1).split(rows))
    return sum(checkpoint(piece, v, items, t, use_reentrant=False) for v, t in parts) / len(vector)


def in_pieces(head, vector, target):
    return head.loss(vector, target)


def measure(name: str, items: int, targets: int, width: int) -> dict:
    """Bytes and seconds of one loss with its gradients, in this process."""
    head = heads.LinearHead(2, width)
    head.weight = torch.nn.Parameter(torch.empty(items + 1, width).normal_(0, heads.START))
    vector, target = torch.randn(targets, width, requires_grad=True), torch.randint(1, items + 1, (targets,))
    F.cross_entropy(vector[:2] @ vector.T, target[:2] % 2).backward()  # the libraries' own buffers
    Path("/proc/self/clear_refs").write_text("5")  # the peak falls to what is there now
    before, began = _resident("VmRSS"), time.perf_counter()
    globals()[name](head, vector, target).backward()
    return {"seconds": time.perf_counter() - began, "bytes": _resident("VmHWM") - before}


def _resident(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, default=320)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "ITEMS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, items = arguments.measure
        print(json.dumps(measure(name, int(items), arguments.targets, arguments.width)))
        return
    print(f"{arguments.targets} targets, width {arguments.width}, float32, {torch.get_num_threads()} threads\n")
    print("| items | loss | peak, MB | seconds |\n|---|---|---|---|")
    for items in (10**5, 10**6):
        for name in ("at_once", "checkpointed", "in_pieces"):
            command = [sys.executable, __file__, f"--targets={arguments.targets}", f"--width={arguments.width}"]
            done = subprocess.run([*command, "--measure", name, str(items)], capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.strip().splitlines()[-1])
            print(
                f"| {items:,} | {name.replace('_', ' ')} | {found['bytes'] / 1e6:,.0f} | {found['seconds']:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
