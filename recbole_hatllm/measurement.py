"""What a test says of a model: metrics with intervals, over all rows and parts of them; of a run at its end, or again later."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from recbole_hatllm import distributed, registry, run_folder, target_parts, unseen_users, weights
from recbole_hatllm.errors import ConfigError, DataError, nearest
from recbole_hatllm.files import claim
from recbole_hatllm.intervals import bootstrap
from recbole_hatllm.trained import load_model
from recbole_hatllm.trainer import trainer_class

# Keys that say how a finished run is measured, and on which machine; all others made it what it is.
EVALUATION = ("mask_history", "metrics", "topk", "eval_sample")
PLACE = ("data_path", "eval_batch_size", "micro_batch_size", "gpu_id", "use_gpu", "show_progress")


def measure(trainer, test, show_progress: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Ranks the targets of all test rows by the trainer's best weights.

    Args:
        trainer: a `RunTrainer`. test: the loader of the test rows.

    Returns:
        the part of `result.json` that says how well, and by which protocol; user, target (ids as in the files) and rank of each.
    """
    config, model, data = trainer.config, trainer.model, test.dataset
    found = trainer.evaluate(test, show_progress=show_progress)
    users = data.id2token(data.uid_field, data.inter_feat[data.uid_field].numpy())
    targets = data.id2token(data.iid_field, data.inter_feat[data.iid_field].numpy())
    ranks = {"user": users.astype(str), "target": targets.astype(str), "rank": trainer.eval_collector.ranks.numpy()}
    result = {
        "test": {name: float(value) for name, value in found.items()},
        "test_interval": bootstrap(ranks["rank"], found),
        "test_parts": target_parts.measure(trainer, data, found),
        "protocol": config["protocol"],
        "candidates": data.item_num - 1,
        "history_masked": config["mask_history"],
        "unseen_users": unseen_users.describe(model, data),
    }
    return result, ranks


def summary(result: dict) -> str:
    """For the terminal."""
    state = ", history masked" if result["history_masked"] else ""
    lines = [f"test{state}: {run_folder.metric_row(result['test'])}"]
    if result["unseen_users"]["mean_vector"] and result["unseen_users"]["rows"]:
        lines.append(
            f"{result['unseen_users']['rows']} of {result['rows']['test']} test rows are of users that training never saw, scored "
            "by the mean user vector"
        )
    lines.append(f"95 % interval: {run_folder.interval_row(result['test_interval'])}")
    lines.append(run_folder.parts_table(result))
    return "\n".join(lines)


def evaluate(folder: str | Path, keys: dict[str, Any], out: str | Path | None = None) -> dict:
    """Measures a finished run again, by other keys of the evaluation; nothing is trained, and nothing in the run changes.

    Args:
        folder: of the run. keys: of `EVALUATION` and `PLACE`. out: folder for what is found; by default a new one beside the run.

    Returns:
        what the new `result.json` holds, and `folder`, which also has the config, items and ranks: `analyze errors` reads it.

    Raises:
        ConfigError: not a finished run, or another key. DataError: its weights are damaged, or its data has changed.
    """
    distributed.alone("evaluate")
    for key in keys:
        if key not in (*EVALUATION, *PLACE):
            raise ConfigError(
                f"evaluate cannot change {key}: it made the run what it is{nearest(key, [*EVALUATION, *PLACE])}"
            )
    folder = Path(folder)
    config, model, items, before = load_model(folder, keys)
    dataset = registry.create_dataset(config)
    if dataset.item_tokens != items.item_tokens:
        raise DataError(
            f"The items of {config['dataset']} in {config['data_path']} are no longer those of {folder}: bring the data back "
            "as it was, or train again."
        )
    train, _, test = registry.data_loaders(config, dataset)
    if len(train.dataset) != before["rows"]["train"]:
        raise DataError(
            f"{folder} was trained on {before['rows']['train']} rows, and {config['dataset']} in {config['data_path']} has "
            f"{len(train.dataset)} now: bring the data back as it was, or train again."
        )
    with TemporaryDirectory() as nowhere:  # what a trainer writes while it trains
        trainer = trainer_class(config)(config, model, Path(nowhere), weights.items_identity(items.item_tokens))
        found, ranks = measure(trainer, test, config["show_progress"])
    changed = "-".join(f"{key}-{keys[key]}" for key in sorted(keys) if key in EVALUATION) or "again"
    changed = re.sub(r"[^\w.]+", "-", changed).strip("-").lower()
    out = claim(Path(out or f"{folder}-{changed}"))
    run_folder.write_config(out, config)
    run_folder.write_items(out, items.item_tokens, items.titles)
    leave_written(out, model, test, ranks)
    rows = {**before["rows"], "test": len(test.dataset)}
    result = {**before, **found, "rows": rows, "evaluated": {"run": str(folder), "keys": keys}}
    run_folder.write_result(out, ranks, result)
    return {**result, "folder": str(out)}


def leave_written(folder: Path, model, test, ranks: dict[str, np.ndarray]) -> None:
    """`written.jsonl` of a model that writes: what it wrote for every test row in the evaluation before."""
    if not hasattr(model, "written"):
        return
    rows = test.dataset.inter_feat
    written = distributed.gather_rows({"written": torch.cat(model.written)}, len(rows))["written"]
    if distributed.first():
        run_folder.write_lines(folder / "written.jsonl", model.told(rows, written, ranks))
