"""Small data and quick models that every test file may ask for."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
import torch

TITLES = [
    "The Dark Knight", "Heat", "GoldenEye", "Toy Story", "Se7en", "Fargo", "Babe", "Casino", "Twelve Monkeys", "Alien",
    "Amélie 🎬", "Tom &amp; Jerry", '"Quoted" Title', "A </s> B", "### Response: Hello", "Brazil", "Jaws", "Gigi", "M", "Ran",
]  # fmt: skip


def write_dataset(root: Path, name: str, sequences: dict[str, list[int]], titles: list[str] | None = None) -> Path:
    """Atomic files of users' item sequences; item i is the token `i<number>`, one interaction a minute."""
    folder = root / name
    folder.mkdir(parents=True)
    used = sorted({item for items in sequences.values() for item in items})
    rows = [
        f"{user}\ti{item}\t{1_000_000_000 + 60 * step}"
        for user, items in sequences.items()
        for step, item in enumerate(items)
    ]
    (folder / f"{name}.inter").write_text(
        "\n".join(["user_id:token\titem_id:token\ttimestamp:float", *rows]) + "\n", encoding="utf-8"
    )
    titles = titles or [TITLES[i] if i < len(TITLES) else f"Title number {i}" for i in range(max(used) + 1)]
    lines = ["item_id:token\ttitle:token_seq", *(f"i{item}\t{titles[item]}" for item in used)]
    (folder / f"{name}.item").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def random_sequences(
    users: int, items: int, shortest: int = 5, longest: int = 16, seed: int = 0
) -> dict[str, list[int]]:
    """Random histories; every item occurs."""
    draw = random.Random(seed)
    sequences = {f"u{u}": [draw.randrange(items) for _ in range(draw.randint(shortest, longest))] for u in range(users)}
    for item in range(items):
        sequences[f"u{item % users}"].insert(0, item)
    return sequences


def hears_ctrl_c() -> None:
    """For a new process: a shell starts what it runs in the background deaf to Ctrl-C, and the tests may be that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Derived tables go to a folder of the tests, unless the caller named one; downloads are then shared with it."""
    import os

    if "RECBOLE_HATLLM_CACHE" not in os.environ:
        os.environ["RECBOLE_HATLLM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A folder with the dataset `tiny`: 30 users, 20 items with titles of every awkward kind."""
    root = tmp_path_factory.mktemp("data")
    write_dataset(root, "tiny", random_sequences(30, 20))
    return root


@pytest.fixture
def tiny(tiny_data, tmp_path) -> dict:
    """Keys of a run on `tiny` that takes a second: the random backbone in float32, few small steps."""
    return {
        "data_path": str(tiny_data),
        "runs_dir": str(tmp_path / "runs"),
        "backbone": "random-tiny",
        "dtype": "float32",
        "n_in": 1,
        "n_cr": 1,
        "train_steps": 6,
        "eval_step": 3,
        "train_batch_size": 16,
        "warmup_steps": 2,
        "show_progress": False,
    }


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors are slower on many threads, and the order of additions must not depend on the machine."""
    torch.set_num_threads(1)
