"""From atomic files to ready data loaders: CPU seconds and peak memory for one, two and four times as many interactions.

    python benchmarks/loading.py [--interactions=450000]

The data are made up: users of 5 to 30 interactions, items by Zipf's law, titles of 4 to 16 words, times of whole days. Each
size is loaded in a process of its own, with RecBole's own loading of sequences beside it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def write(folder: Path, interactions: int, seed: int = 0) -> None:
    """A dataset `made` in `folder`."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(5, 31, interactions // 17)
    users = np.repeat(np.arange(len(lengths)), lengths)[:interactions]
    n_items = max(interactions // 20, 10)
    items = np.minimum(draw.zipf(1.2, len(users)), n_items * 50) % n_items
    days = 1_400_000_000 // 86400 + np.sort(draw.integers(0, 3000, len(users)))
    draw.shuffle(users)
    (folder / "made").mkdir(parents=True)
    with (folder / "made" / "made.inter").open("w") as out:
        out.write("user_id:token\titem_id:token\ttimestamp:float\n")
        out.writelines(f"u{u}\ti{i}\t{d * 86400}\n" for u, i, d in zip(users.tolist(), items.tolist(), days.tolist()))
    words = np.array([f"word{n}" for n in range(5000)])
    with (folder / "made" / "made.item").open("w") as out:
        out.write("item_id:token\ttitle:token_seq\n")
        for item in np.unique(items).tolist():
            out.write(f"i{item}\t{' '.join(draw.choice(words, draw.integers(4, 17)))}\n")


def load(folder: str, whose: str) -> dict:
    """CPU seconds and MiB of one load in this process; the libraries' own imports are not counted."""
    from recbole_hatllm import registry
    from recbole_hatllm.config import Config

    config = Config("SASRec", "made", config_dict={"data_path": folder, "worker": 0})
    registry.model_class("SASRec")
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    if whose == "ours":
        dataset = registry.create_dataset(config)
        train, _, _ = registry.data_loaders(config, dataset)
        assert len(dataset.titles) == dataset.item_num
    else:
        from recbole.data import create_dataset, data_preparation

        train, _, _ = data_preparation(config, create_dataset(config))
    seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "grown": (peak - before) / 1024, "peak": peak / 1024, "rows": len(train.dataset)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interactions", type=int, default=450_000)
    parser.add_argument("--load", nargs=2, metavar=("FOLDER", "WHOSE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load(*arguments.load)))
        return
    print(
        "| interactions | whose | CPU seconds | grown by, MiB | peak, MiB | training rows |\n|---|---|---|---|---|---|"
    )
    for share in (4, 2, 1):
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), arguments.interactions // share)
            for whose in ("ours", "RecBole"):
                command = [sys.executable, __file__, "--load", folder, whose]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found = json.loads(done.stdout.strip().splitlines()[-1])
                print(
                    f"| {arguments.interactions // share:,} | {whose} | {found['seconds']:.1f} | {found['grown']:,.0f} "
                    f"| {found['peak']:,.0f} | {found['rows']:,} |"
                )


if __name__ == "__main__":
    main()
