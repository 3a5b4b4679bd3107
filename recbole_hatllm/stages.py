"""Runs that a run needs first: each is an ordinary run folder in `runs_dir`, named by what it is, made once and found again.

It carries the name that `compare` would give it (`identity.py`), so that trials, seeds of a suite and later runs share it. A
finished one is read, a half-done one goes on, and only then is one begun.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from recbole_hatllm import distributed, identity, lineage, run_folder
from recbole_hatllm.config import Config
from recbole_hatllm.errors import HatError
from recbole_hatllm.files import sha256
from recbole_hatllm.lineage import Parent

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """A parent that is there: its run `folder`, and what its `result.json` holds."""

    parent: Parent
    folder: Path
    result: dict

    def record(self) -> dict[str, Any]:
        """What the child's `result.json` says of it."""
        kept = {name: self.result[name] for name in ("model", "seed", "valid", "test")}
        mark = sha256(lineage.weights_file(self.folder))
        return {"role": self.parent.role, "id": self.folder.name, "folder": str(self.folder), "sha256": mark, **kept}


def check(config: Config, item_tokens: list[str]) -> None:
    """Refuses, before any long work, parents that cannot be what `config` asks for.

    Raises:
        HatError: keys of a parent are wrong, or a run that the user names does not fit.
    """
    for parent, child in lineage.ancestors(config):
        if parent.folder is not None:
            lineage.check_given(parent, child, item_tokens)


def make(config: Config, begin: Callable[..., dict], go_on: Callable[[Path], dict]) -> list[Stage]:
    """All parents of a run of `config`, found or made.

    Args:
        begin, go_on: `quick_start.run` and `quick_start.resume`.

    Raises:
        HatError: one cannot be made. Interrupted: Ctrl-C; the same call goes on with the half-done one.
    """
    return [_found(parent, config) or _made(parent, config, begin, go_on) for parent in lineage.parents(config)]


def _found(parent: Parent, config: Config) -> Stage | None:
    """The run that the user names."""
    if parent.folder is None:
        return None
    result = run_folder.read_result(parent.folder)
    logger.info("%s needs %s: %s is taken", config["model"], parent.name, parent.folder)
    return Stage(parent, Path(parent.folder), result)


def _made(parent: Parent, config: Config, begin: Callable[..., dict], go_on: Callable[[Path], dict]) -> Stage:
    """The run in `runs_dir`, made where it is not finished."""
    own = lineage.config_of(parent, config)
    name = f"{own['model']}-{own['dataset']}-{identity.digest(own, identity.data_digest(own))}"
    folder = Path(own["runs_dir"]) / name
    say = lambda what: logger.info("%s needs %s: %s %s", config["model"], parent.name, folder, what)  # noqa: E731
    with _alone(folder, say):
        result, begun = distributed.told(lambda: (run_folder.read_result(folder), (folder / "config.yaml").is_file()))
        if result:
            say("is finished")
        else:
            say("goes on" if begun else "is made first")
            keys = {**lineage.keys_of(parent, config), "run_dir": str(folder)}
            try:
                result = go_on(folder) if begun else begin(parent.model, config["dataset"], None, keys)
            except HatError as error:
                raise type(error)(f"{config['model']} needs {parent.name}: {error}") from error
            say(f"is finished, back to {config['model']}")
    return Stage(parent, folder, result)


@contextmanager
def _alone(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Waits until no other run or comparison makes `folder`, and keeps them waiting; of several processes the first does."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))

    def acquire() -> None:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say("is being made by another process, which is waited for")
            lock.acquire()

    distributed.told(acquire)
    try:
        yield
    finally:
        lock.release()
        if distributed.first():
            Path(lock.lock_file).unlink(missing_ok=True)
