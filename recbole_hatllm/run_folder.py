"""What a run leaves behind, readable without this library: weights, config, items, result, per-row ranks, a model card.

    adapter_model.safetensors, adapter_config.json, head.safetensors   an LLM recommender (with slots.safetensors, if it has
                                                                       item vectors of another model in its prompts), or
    model.safetensors                                                  any other model
    written.jsonl                                                      of a model that writes: what, for every test row
    config.yaml  items.tsv  result.json  ranks.npz  README.md  log.txt  tensorboard/
    state.safetensors, best-<step>/                                    only while the run is not finished

`result.json` is written last: a folder that has it is complete.
"""

from __future__ import annotations

import csv
import json
import platform
import shutil
import zipfile
from collections.abc import Iterable
from datetime import datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import yaml

from recbole_hatllm import checkpoint
from recbole_hatllm.errors import ConfigError, DataError
from recbole_hatllm.files import claim, publish

PACKAGES = ("recbole_hatllm", "recbole", "torch", "transformers", "peft", "numpy", "pandas")


def create(config) -> Path:
    """A new folder for a run, with its config in it: `run_dir`, or `runs_dir`/<model>-<dataset>-<time>.

    Raises:
        ConfigError: `run_dir` holds a run already. DataError: the folder cannot be written.
    """
    if config["run_dir"]:
        folder = Path(config["run_dir"])
        if (folder / "config.yaml").exists():
            raise ConfigError(
                f"{folder} holds a run already: go on with it by --resume={folder}, or name another run_dir."
            )
    else:
        name = f"{config['model']}-{config['dataset']}-{datetime.now():%Y%m%d-%H%M%S}"
        folder = claim(Path(config["runs_dir"]) / name)
    write_config(folder, config)
    return folder


def write_config(folder: Path, config) -> None:
    """`config.yaml`: every key, whoever gave it."""
    text = yaml.safe_dump(config.resolved(), sort_keys=True, allow_unicode=True)
    publish(folder / "config.yaml", lambda file: file.write_text(text, encoding="utf-8"))


def drop_unused(folder: Path) -> None:
    """Removes a run folder in which nothing was computed: the run was refused before its first step."""
    if {file.name for file in folder.iterdir()} <= {"config.yaml", "log.txt"}:
        shutil.rmtree(folder)


def read_config(folder: Path) -> dict:
    """The resolved config of a run folder.

    Raises:
        ConfigError: `folder` is not a run folder.
    """
    file = Path(folder) / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{folder} is not a run folder: it has no config.yaml.")
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def read_result(folder: Path) -> dict | None:
    """`result.json`, or None while the run is not finished."""
    file = Path(folder) / "result.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def write_items(folder: Path, tokens: list[str], titles: list[str]) -> None:
    """`items.tsv`: internal id, token, title of every item."""

    def write(file: Path) -> None:
        with file.open("w", encoding="utf-8", newline="") as out:
            table = csv.writer(out, delimiter="\t", lineterminator="\n")
            table.writerow(["id", "token", "title"])
            table.writerows(zip(range(len(tokens)), tokens, titles))

    publish(folder / "items.tsv", write)


def read_items(folder: Path) -> tuple[list[str], list[str]]:
    """Tokens and titles by internal id.

    Raises:
        DataError: the file is missing or cut off.
    """
    try:
        with (Path(folder) / "items.tsv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, delimiter="\t"))[1:]
        if [int(row[0]) for row in rows] != list(range(len(rows))) or any(len(row) != 3 for row in rows):
            raise ValueError("ids are not 0, 1, 2, ...")
    except (OSError, ValueError, IndexError) as error:
        raise DataError(
            f"{Path(folder) / 'items.tsv'} is damaged or missing ({error}): take another copy of the run."
        ) from error
    return [row[1] for row in rows], [row[2] for row in rows]


def write_lines(file: Path, rows: Iterable[dict]) -> None:
    """One JSON object a line."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    publish(file, lambda temporary: temporary.write_text(lines, encoding="utf-8"))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def finish(folder: Path, best: Path | None, ranks: dict[str, np.ndarray], result: dict) -> None:
    """Moves the best weights up, writes ranks, model card and, last, the result; then drops what only resuming needs."""
    for file in best.iterdir() if best else ():
        publish(folder / file.name, partial(shutil.copyfile, file))
    publish(folder / "README.md", lambda file: file.write_text(model_card(folder.name, result), encoding="utf-8"))
    write_result(folder, ranks, result)
    for leftover in folder.glob("best-*"):
        shutil.rmtree(leftover)
    (folder / checkpoint.FILE).unlink(missing_ok=True)


def write_result(folder: Path, ranks: dict[str, np.ndarray], result: dict) -> None:
    """`ranks.npz` and, last, `result.json`."""
    publish(folder / "ranks.npz", lambda file: _save_npz(file, ranks))
    text = json.dumps(result, indent=2, ensure_ascii=False)
    publish(folder / "result.json", lambda file: file.write_text(text, encoding="utf-8"))


def _save_npz(file: Path, arrays: dict[str, np.ndarray]) -> None:
    with file.open("wb") as out:
        np.savez_compressed(out, allow_pickle=False, **arrays)


def metric_row(metrics: dict[str, float]) -> str:
    """`HR@5 0.0123, NDCG@5 ...`: RecBole calls HR with one target a row `hit`."""
    return ", ".join(f"{metric_name(name)} {value:.4f}" for name, value in metrics.items())


def interval_row(intervals: dict[str, list[float]]) -> str:
    """`HR@5 0.0101-0.0145, ...`; `none` without any."""
    return ", ".join(f"{metric_name(name)} {low:.4f}-{high:.4f}" for name, (low, high) in intervals.items()) or "none"


def history_word(masked: bool) -> str:
    """How tables say it."""
    return "history masked" if masked else "history kept"


def aligned(rows: list[list[str]]) -> str:
    """A table for the terminal: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    pad = [str.ljust, *[str.rjust] * (len(widths) - 1)]
    return "\n".join("  ".join(fit(cell, width) for fit, cell, width in zip(pad, row, widths)) for row in rows)


def parts_table(result: dict) -> str:
    """Rows and metrics over warm, cold and same-day targets, for the terminal; a part without rows or times has none."""
    names = list(result["test"])
    rows = [[f"targets, {history_word(result['history_masked'])}", "rows", *map(metric_name, names)]]
    for part, found in result["test_parts"].items():
        metrics = [f"{found[name]:.4f}" if found and found["rows"] else "-" for name in names]
        rows.append([part.replace("_", " "), str(found["rows"]) if found else "-", *metrics])
    return aligned(rows)


def metric_name(name: str) -> str:
    """RecBole's metric name as the field writes it: hit@10 -> HR@10."""
    return name.upper().replace("HIT@", "HR@")


def duration(seconds: float) -> str:
    """`42 s`, `12 min` or `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: int | None) -> str:
    """Bytes as `312 MB` or `1.3 GB` of 10^6 and 10^9, `-` where they are not known."""
    if count is None:
        return "-"
    return f"{count / 1e6:.0f} MB" if count < 999.5e6 else f"{count / 1e9:.1f} GB"


def read_ranks(folder: Path) -> dict[str, np.ndarray]:
    """User and target (ids as in the files) and rank (int64, from 1) of every test row of a finished run.

    Raises:
        DataError: the file is missing or damaged.
    """
    file = Path(folder) / "ranks.npz"
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in ("user", "target", "rank")}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{file} is damaged or missing ({error}): take another copy of the run.") from error


def model_card(name: str, result: dict) -> str:
    """README.md of a run folder."""
    lines = [
        f"# {name}",
        "",
        f"{result['model']} on {result['dataset']}, trained with recbole_hatllm.",
        "",
        f"- Test: {metric_row(result['test'])}",
        f"- 95 % bootstrap interval: {interval_row(result['test_interval'])}",
        f"- Validation: {metric_row(result['valid'] or {})}",
        f"- Protocol: {result['protocol']}, {result['rows']['test']} test rows, all {result['candidates']} items ranked, "
        f"{history_word(result['history_masked'])}",
        f"- Training: {result['steps']} steps on {result['rows']['train']} rows, {result['seconds']['train']:.0f} s, "
        f"{result['trainable_parameters']:,} trainable parameters, peak memory {size(result['peak_memory'])}",
    ]
    for part, found in result["test_parts"].items():
        if found and found["rows"]:
            metrics = {name: found[name] for name in result["test"]}
            lines.append(f"- Test, {found['rows']} {part.replace('_', '-')} targets: {metric_row(metrics)}")
    if unseen := result["unseen_users"]["rows"]:
        how = ", scored by the mean user vector" if result["unseen_users"]["mean_vector"] else ""
        lines.append(f"- Users that training never saw: {unseen} of the test rows{how}")
    if result["backbone"]:
        lines.append(f"- Backbone: {result['backbone']}")
    for parent in result["parents"]:
        lines.append(
            f"- Built on a run of {parent['model']} ({parent['role']}), {parent['id']}: test {metric_row(parent['test'])}"
        )
    lines += ["- Versions: " + ", ".join(f"{package} {number}" for package, number in result["versions"].items()), ""]
    lines += [
        "```python",
        "from recbole_hatllm import load",
        f'load("{name}").recommend(["first title", "second title"], k=10)',
        "```",
        "",
    ]
    return "\n".join(lines)
