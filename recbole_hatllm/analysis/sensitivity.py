"""`analyze sensitivity`: a metric over each key in which the runs of a comparison differ, as in Figure 5 of the HatLLM paper."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from recbole_hatllm import compare, run_folder
from recbole_hatllm import suite as suites
from recbole_hatllm.colours import BLUE, GREEN, ORANGE, PINK, RED, SKY
from recbole_hatllm.errors import ConfigError
from recbole_hatllm.figures import leave_figure, leave_numbers, style, text_axis
from recbole_hatllm.run_folder import aligned, metric_name

_LOOKS = [
    (BLUE, "o", "-"),
    (RED, "s", "--"),
    (GREEN, "^", ":"),
    (PINK, "D", "-."),
    (ORANGE, "v", "-"),
    (SKY, "P", "--"),
]


def run(suite: str, keys: dict[str, Any], metric: str | None = None, folder: str | None = None) -> str:
    """The metrics of a finished comparison by key and value, with their 95 % intervals; nothing is run.

    Args:
        suite: as `compare` takes it, or the folder of a comparison. keys: the others that `compare` was given. metric: what the
            figure shows; by default what training chose by. folder: of what is left.

    Returns:
        a table for the terminal.

    Raises:
        ConfigError: the comparison has not been made, its runs differ in no key, or the metric was not measured.
    """
    place = Path(suite)
    if not (place / "result.json").is_file():
        given = suites.arguments({**keys, "suite": suite})
        names = ("models", "dataset", "seeds", "method", "floors")
        wanted = suites.read_suite(suite, keys=given["config_dict"], **{name: given[name] for name in names})
        _, place = compare.place_of(wanted, suites.check(wanted))
    found = run_folder.read_result(place)
    if not found or "comparison" not in found or not any(row["seeds"] for row in found["runs"]):
        command = " ".join([f"--suite={suite}", *(f"--{key}={_text(value)}" for key, value in keys.items())])
        raise ConfigError(
            f"There are no runs of this comparison in {place} yet: run `python run_hatllm.py compare {command}` before."
        )
    about = found["comparison"]
    metric = str(metric or about["valid_metric"]).lower().replace("hr@", "hit@")
    if metric not in about["metrics"]:
        raise ConfigError(
            f"metric is {metric}, and must be one of {', '.join(about['metrics'])}, which {place} measures."
        )
    rows = numbers(found, place)
    if not rows:
        raise ConfigError(
            f"No key differs between two finished runs of one model in {place}: there is nothing to plot."
        )
    out = Path(folder or f"{place}-sensitivity")
    said = {"comparison": str(place), **{name: found[name] for name in ("protocol", "history_masked", "candidates")}}
    leave_numbers(out, "sensitivity", rows, {**said, "dataset": about["dataset"], "test_rows": found["rows"]})
    with style():
        leave_figure(out, "sensitivity", figure(rows, metric))
    missing = sum(row["asked"] - len(row["seeds"]) for row in found["runs"])
    note = f"{missing} runs have no result and are left out\n" if missing else ""
    return f"{table(rows, metric)}\n{note}figure and numbers: {out}"


def numbers(found: dict, place: Path) -> list[dict]:
    """One line a metric and run on a line of the figure: runs of one model that differ in one key alone.

    Args:
        found: what `result.json` of a comparison holds. place: its folder.

    Returns:
        key and value; model and fixed, the other keys in which runs of the model differ; run, metric, mean, low and high of its
        95 % interval (None without), seeds; ordered by key, line and value.
    """
    configs = {row["name"]: _config(row, place) for row in found["runs"] if row["seeds"]}
    rows = []
    for key, line in _lines(found, configs):
        for row in line["runs"]:
            for name, metric in row["metrics"].items():
                low, high = metric["interval"] or (None, None)
                rows.append({
                    "key": key, "value": configs[row["name"]].get(key), "model": line["model"], "fixed": line["fixed"],
                    "run": row["name"], "metric": name, "mean": metric["mean"], "low": low, "high": high,
                    "seeds": len(row["seeds"]),
                })  # fmt: skip
    return rows


def _lines(found: dict, configs: dict[str, dict]) -> list[tuple[str, dict]]:
    """By key: the runs that differ in it and in no other key, at two values of it or more, in the order of its values."""
    about, lines = found["comparison"]["runs"], []
    differing: dict[str, list[str]] = {}
    for model in dict.fromkeys(about[name]["model"] for name in configs):
        names = [name for name in configs if about[name]["model"] == model]
        said = dict.fromkeys(key for name in names for key in about[name]["keys"])
        for key in said:
            if len({_text(configs[name].get(key)) for name in names}) > 1:
                differing.setdefault(key, []).append(model)
    for key, models in differing.items():
        for model in models:
            others = [other for other, of in differing.items() if other != key and model in of]
            groups: dict[str, list[dict]] = {}
            for row in found["runs"]:
                if row["name"] in configs and about[row["name"]]["model"] == model:
                    fixed = ", ".join(f"{other} {_text(configs[row['name']].get(other))}" for other in others)
                    groups.setdefault(fixed, []).append(row)
            for fixed, runs in groups.items():
                values = [configs[row["name"]].get(key) for row in runs]
                if len(set(map(_text, values))) > 1:
                    order = (lambda pair: pair[0]) if all(map(_is_number, values)) else (lambda pair: 0)
                    ordered = [row for _, row in sorted(zip(values, runs), key=order)]
                    lines.append((key, {"model": model, "fixed": fixed, "runs": ordered}))
    return lines


def _config(row: dict, place: Path) -> dict:
    """All keys of a run; its folder may have moved with that of the comparison."""
    folder = Path(row["folders"][0])
    return run_folder.read_config(folder if folder.is_dir() else place.parent / folder.name)


def table(rows: list[dict], metric: str) -> str:
    """The lines of the figure, for the terminal."""
    lines = [["key", "value", "", metric_name(metric), "95 % interval", "seeds"]]
    for row in rows:
        if row["metric"] == metric:
            ends = "-" if row["low"] is None else f"{row['low']:.4f}-{row['high']:.4f}"
            fixed = ", ".join(filter(None, (row["model"], row["fixed"])))
            lines.append([row["key"], _text(row["value"]), fixed, f"{row['mean']:.4f}", ends, str(row["seeds"])])
    return aligned(lines)


def figure(rows: list[dict], metric: str) -> Figure:
    """A panel for each key: the metric with its intervals over the values, a look for each model and set of the other keys.

    Lines join numbers only, since texts have no order.
    """
    rows = [row for row in rows if row["metric"] == metric]
    keys = list(dict.fromkeys(row["key"] for row in rows))
    picture = Figure(figsize=(3.1 * len(keys) + 0.3, 2.6))
    panels = picture.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for panel, key in zip(panels, keys):
        own = [row for row in rows if row["key"] == key]
        values = [row["value"] for row in own]
        measured = all(map(_is_number, values))
        texts = list(dict.fromkeys(map(_text, values)))
        for number, (model, fixed) in enumerate(dict.fromkeys((row["model"], row["fixed"]) for row in own)):
            line = [row for row in own if (row["model"], row["fixed"]) == (model, fixed)]
            colour, marker, dash = _LOOKS[number % len(_LOOKS)]
            at = [row["value"] if measured else texts.index(_text(row["value"])) for row in line]
            label = ", ".join(filter(None, (model, fixed)))
            panel.plot(
                at,
                [row["mean"] for row in line],
                color=colour,
                marker=marker,
                linestyle=dash if measured else "none",
                label=label,
                linewidth=1.2,
                markersize=4,
            )
            for x, row in zip(at, line):
                if row["low"] is not None:
                    panel.plot([x, x], [row["low"], row["high"]], color=colour, linewidth=0.8)
        if not measured:
            text_axis(panel, texts)
        elif min(values) > 0 and max(values) > 20 * min(values):
            panel.set_xscale("log")
        if measured and len(set(values)) < 9:
            panel.set_xticks(sorted(set(values)), [_text(value) for value in sorted(set(values))])
            panel.minorticks_off()
        panel.set_xlabel(key)
        panel.legend(fontsize=7)
    panels[0].set_ylabel(metric_name(metric))
    return picture


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)
