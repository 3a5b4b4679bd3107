"""What a search leaves to read: the trials as plain data, a table, a line a trial, and the best keys as YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from optuna.trial import FrozenTrial, TrialState

from recbole_hatllm.run_folder import duration, interval_row, metric_name, metric_row
from recbole_hatllm.space import Space


def records(trials: list[FrozenTrial], space: Space, metric: str, maximize: bool) -> list[dict]:
    """The trials that began: finished ones, the best on `metric` in validation first, then pruned ones likewise, then others.

    Returns:
        for each: number, state (complete, pruned, fail or running), params, valid (of a pruned one the best of `metric` so far),
        test, test_interval, seconds, folder, pruned (behind which validation) and reason; None where there is none.
    """
    names = ("valid", "test", "test_interval", "seconds", "folder", "pruned", "reason")
    found: list[dict[str, Any]] = []
    for trial in trials:
        if trial.state != TrialState.WAITING:
            outcome = trial.user_attrs.get("outcome", {}) if trial.state.is_finished() else {}
            kept = {name: outcome.get(name) for name in names}
            params = space.values(trial.params)
            found.append({"number": trial.number, "state": trial.state.name.lower(), "params": params, **kept})
    sign, order = -1 if maximize else 1, {"complete": 0, "pruned": 1}
    return sorted(
        found, key=lambda trial: (order.get(trial["state"], 2), trial["valid"] and sign * trial["valid"][metric])
    )


def progress(found: dict, number: int, total: int) -> str:
    """The line of a trial that has just ended; `found` is what `study.json` holds."""
    metric = found["search"]["valid_metric"]
    trials = {trial["number"]: trial for trial in found["trials"]}
    ended = [trial for trial in trials.values() if trial["state"] != "running"]
    seconds = [trial["seconds"] for trial in ended if trial["seconds"] is not None]
    trial = trials[number]
    line = f"trial {number} ({len(ended)}/{total}): {_pairs(trial['params'])} -> "
    if trial["valid"]:
        best = f"{trials[found['best']]['valid'][metric]:.4f}" if found["best"] is not None else "none"
        pruned = f"pruned behind validation {trial['pruned']}, " if trial["state"] == "pruned" else ""
        value = f"{metric_name(metric)} {trial['valid'][metric]:.4f} (best {best})"
        line += f"{pruned}{value}, {duration(trial['seconds'])}"
    else:
        line += f"failed: {trial['reason']}"
    if seconds and len(ended) < total:
        line += f", about {duration(sum(seconds) / len(seconds) * (total - len(ended)))} left"
    return line


def summary(found: dict, folder: Path) -> str:
    """A table of all trials, the best one's test metrics, and where to find more."""
    metric = found["search"]["valid_metric"]
    best = next(trial for trial in found["trials"] if trial["number"] == found["best"])
    rows = [["trial", *found["search"]["space"], f"valid {metric_name(metric)}", f"test {metric_name(metric)}", "s"]]
    for trial in found["trials"]:
        values = [_text(trial["params"].get(key, "")) for key in found["search"]["space"]]
        if trial["valid"]:
            test = f"{trial['test'][metric]:.4f}" if trial["test"] else trial["state"]
            outcome = [f"{trial['valid'][metric]:.4f}", test, f"{trial['seconds']:.0f}"]
        else:
            outcome = [trial["state"], "", ""]
        rows.append([str(trial["number"]), *values, *outcome])
    widths = [max(map(len, column)) for column in zip(*rows)]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    failed = [f"trial {t['number']} failed: {t['reason']}" for t in found["trials"] if t["state"] == "fail"]
    return "\n".join([
        "", *table, *failed, "",
        f"best on validation: trial {best['number']}, {_pairs(best['params'])}",
        f"test: {metric_row(best['test'])}",
        f"95 % interval: {interval_row(best['test_interval'])}",
        f"study folder: {folder}; its keys are taken by --config_files={folder / 'best.yaml'}",
    ])  # fmt: skip


def best_yaml(found: dict, file: Path) -> str:
    """The searched keys at their best and those that all trials shared, for a `file` of `--config_files`."""
    about = found["search"]
    best = next(trial for trial in found["trials"] if trial["number"] == found["best"])
    head = [
        f"# The best of {len(found['trials'])} trials on {about['dataset']}, {about['protocol']}: trial {best['number']}.",
        f"#   validation: {metric_row(best['valid'])}",
        f"#   test: {metric_row(best['test'])}",
        f"#   python run_hatllm.py --model={about['model']} --dataset={about['dataset']} --config_files={file}",
    ]
    keys = {**about["keys"], **best["params"]}
    return "\n".join([*head, yaml.safe_dump(keys, sort_keys=True, allow_unicode=True)])


def _pairs(params: dict) -> str:
    return " ".join(f"{key}={_text(value)}" for key, value in params.items())


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
