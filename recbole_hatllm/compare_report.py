"""What a comparison leaves to read: one summary as plain data, and the same table for the terminal, Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from recbole_hatllm.files import publish
from recbole_hatllm.intervals import bootstrap, gains, is_measured
from recbole_hatllm.run_folder import aligned, duration, history_word, metric_name, size
from recbole_hatllm.significance import compare_rows, holm

_TEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
}


def summary(about: dict, entries: Sequence, runs: Sequence) -> dict:
    """All numbers of a comparison.

    Args:
        about: dataset, seeds, method, valid_metric, metrics and runs, as `result.json` repeats them under `comparison`.
        entries, runs: `suite.Entry` and `compare.Planned`, with those outcomes that there are.

    Returns:
        runs: for each entry its metrics (mean over seeds, 95 % interval, by seed, the paper's), cost (seconds: the mean over seeds,
        peak_memory: their most), curves (of each seed the steps and by metric the values in validation), folders and failures.
        best: the tests on each metric of the method, or of the best, against the best other, Holm-corrected over the
        metrics. others: those of the method, or of the best, against each other run on valid_metric, corrected over the runs.
    """
    rows, ranks = [], {}
    for entry in entries:
        own = [run for run in runs if run.entry is entry]
        done = [run for run in own if run.result]
        rows.append(_row(entry, own, done, about["metrics"]))
        if done:
            ranks[entry.name] = np.stack([run.ranks["rank"] for run in done])
    some = next((run for run in runs if run.result), None)
    shared = ("protocol", "candidates", "history_masked")
    found: dict[str, Any] = {"comparison": about, **{name: some.result[name] if some else None for name in shared}}
    found["rows"] = len(some.ranks["rank"]) if some else None
    found["runs"] = rows
    found["best"] = _corrected([
        test for name in about["metrics"] if (test := _against_best(about, rows, ranks, name))
    ])  # fmt: skip
    found["others"] = _against_all(about, rows, ranks)
    return found


def _row(entry, own: list, done: list, names: list[str]) -> dict:
    metrics = {}
    ranks = np.stack([run.ranks["rank"] for run in done]) if done else np.empty((0, 0), np.int64)
    ends = bootstrap(ranks, names)
    for name in names:
        by_seed = [run.result["test"][name] for run in done]
        # Of exact gains where ranks tell them: the rounded metrics of runs would make ties into places.
        mean = float(gains(ranks, name).mean() if is_measured(name) else np.mean(by_seed)) if done else None
        mean = None if mean is None else round(mean, 9)
        metrics[name] = {"mean": mean, "interval": ends.get(name), "by_seed": by_seed, "paper": entry.paper.get(name)}
    return {
        "name": entry.name,
        "model": entry.model,
        "seeds": [run.seed for run in done],
        "asked": len(own),
        "metrics": metrics,
        "trainable_parameters": done[0].result["trainable_parameters"] if done else None,
        "seconds": sum(run.seconds for run in done) / len(done) if done else None,
        "peak_memory": max((most for run in done if (most := run.result["peak_memory"]) is not None), default=None),
        "curves": [_curve(run, names) for run in done if run.result["curve"]],
        "folders": [str(run.folder) for run in done],
        "failures": [{"seed": run.seed, "reason": run.reason} for run in own if run.reason],
    }


def _curve(run, names: list[str]) -> dict:
    points = run.result["curve"]
    measured = [name for name in names if name in points[0]]
    valid = {name: [point[name] for point in points] for name in measured}
    return {"seed": run.seed, "steps": [point["step"] for point in points], "valid": valid}


def ranking(rows: Sequence[dict], name: str) -> list[str]:
    """Names of the runs with a result, the best on a metric first; of equal ones the upper."""
    known = [row for row in rows if row["metrics"][name]["mean"] is not None]
    return [row["name"] for row in sorted(known, key=lambda row: -row["metrics"][name]["mean"])]


def place(found: dict, row: dict, name: str) -> int | None:
    """How many runs are better on a metric, so 0 for the best and those that equal it; None without a figure."""
    own, means = row["metrics"][name]["mean"], [other["metrics"][name]["mean"] for other in found["runs"]]
    return None if own is None else sum(mean is not None and mean > own for mean in means)


def _against_best(about: dict, rows: list[dict], ranks: dict, name: str) -> dict | None:
    order = ranking(rows, name)
    method = about["method"] or next(iter(order), None)
    others = [other for other in order if other != method]
    if method not in order or not others or not is_measured(name):
        return None
    return _test(ranks, name, method, others[0])


def _against_all(about: dict, rows: list[dict], ranks: dict) -> list[dict]:
    name = about["valid_metric"]
    order = ranking(rows, name)
    method = about["method"] or next(iter(order), None)
    if method not in order or not is_measured(name):
        return []
    return _corrected([_test(ranks, name, method, other) for other in order if other != method])


def _test(ranks: dict[str, np.ndarray], name: str, method: str, baseline: str) -> dict:
    tested = compare_rows(gains(ranks[method], name), gains(ranks[baseline], name))
    return {"metric": name, "method": method, "baseline": baseline, **tested}


def _corrected(tests: list[dict]) -> list[dict]:
    return [{**test, "p_holm": p} for test, p in zip(tests, holm([test["p"] for test in tests]))]


def outcome(run, metric: str) -> str:
    """What a run that has just ended came to, in a line."""
    if run.reason:
        return f"failed: {run.reason}"
    return f"{metric_name(metric)} {run.result['test'][metric]:.4f}, {duration(run.seconds)}"


# --- One table in four forms


def terminal(found: dict) -> str:
    """The table, what is below it, and the failures."""

    def cell(value: str, place: int, ends: str, paper: str) -> str:
        return value + {0: "*", 1: "'"}.get(place, " ") + (f" {ends}" if ends else "") + paper

    table = aligned([_head(found), *(_cells(found, row, cell) for row in found["runs"])])
    return "\n".join([table, "* best, ' second", *notes(found)])


def markdown(found: dict) -> str:
    """The table with the best in bold and the second underlined."""

    def cell(value: str, place: int, ends: str, paper: str) -> str:
        shown = {0: f"**{value}**", 1: f"<u>{value}</u>"}.get(place, value)
        return shown + (f" ({ends})" if ends else "") + paper

    head = _head(found)
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *(_cells(found, row, cell) for row in found["runs"])]
    table = ["| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines]
    return "\n".join([*table, "", *(f"- {note}" for note in notes(found)), ""])


def latex(found: dict) -> str:
    """A table for a paper, over booktabs."""

    def cell(value: str, place: int, ends: str, paper: str) -> str:
        shown = {0: rf"\textbf{{{value}}}", 1: rf"\underline{{{value}}}"}.get(place, value)
        ends = ends.replace("-", "--")
        return shown + (rf" {{\scriptsize ({ends})}}" if ends else "") + tex(paper)

    lines = [map(tex, _head(found))]
    for row in found["runs"]:
        name, *cells = _cells(found, row, cell)
        lines.append([tex(name), *cells])
    head, *body = [" & ".join(line) + r" \\" for line in lines]
    columns = "l" + "r" * (len(_head(found)) - 1)
    return "\n".join([
        "% " + found["comparison"]["dataset"] + ", needs \\usepackage{booktabs}",
        rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}",
        *(f"% {note}" for note in notes(found)), "",
    ])  # fmt: skip


def write_csv(found: dict, file: Path) -> None:
    """One line a run, numbers unrounded; empty where there are none."""
    names = found["comparison"]["metrics"]
    tests = {test["baseline"]: test for test in found["others"]}
    parts = ("mean", "low", "high", "paper")
    head = ["name", "model", "dataset", "protocol", "history", "candidates", "rows", "seeds"]
    head += [f"{metric_name(name)} {part}" for name in names for part in parts]
    with file.open("w", encoding="utf-8", newline="") as out:
        table = csv.writer(out, lineterminator="\n")
        table.writerow([*head, "p", "p Holm", "trainable parameters", "seconds", "peak memory", "failure"])
        for row in found["runs"]:
            line = [row["name"], row["model"], found["comparison"]["dataset"], found["protocol"]]
            line += [None if found["rows"] is None else history_word(found["history_masked"]).split()[1]]
            line += [found["candidates"], found["rows"], len(row["seeds"])]
            for name in names:
                metric = row["metrics"][name]
                line += [metric["mean"], *(metric["interval"] or [None, None]), metric["paper"]]
            test = tests.get(row["name"], {})
            line += [test.get("p"), test.get("p_holm")]
            line += [row["trainable_parameters"], row["seconds"], row["peak_memory"]]
            table.writerow([*line, "; ".join(failure["reason"] for failure in row["failures"])])


def write(found: dict, folder: Path) -> None:
    """table.md, table.csv, table.tex and result.json; each is whole at any moment."""
    text = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    for name, content in {"table.md": markdown(found), "table.tex": latex(found), "result.json": text}.items():
        publish(folder / name, lambda file, content=content: file.write_text(content, encoding="utf-8"))
    publish(folder / "table.csv", partial(write_csv, found))


def tex(text: str) -> str:
    """`text` as LaTeX prints it."""
    return "".join(_TEX.get(character, character) for character in text)


def _head(found: dict) -> list[str]:
    method = found["others"][0]["method"] if found["others"] else "the best"
    return [
        "test",
        *map(metric_name, found["comparison"]["metrics"]),
        f"p against {method}",
        "parameters",
        "time",
        "memory",
        "seeds",
    ]


def _cells(found: dict, row: dict, cell: Callable[[str, int, str, str], str]) -> list[str]:
    tests = {test["baseline"]: test["p_holm"] for test in found["others"]}
    cells = []
    for name in found["comparison"]["metrics"]:
        metric = row["metrics"][name]
        paper = "" if metric["paper"] is None else f" [paper {metric['paper']:.4f}]"
        if metric["mean"] is None:
            cells.append(("failed" if row["failures"] else "-") + paper)
            continue
        ends = "{:.4f}-{:.4f}".format(*metric["interval"]) if metric["interval"] else ""
        cells.append(cell(f"{metric['mean']:.4f}", place(found, row, name), ends, paper))
    p = p_value(tests[row["name"]]) if row["name"] in tests else "-"
    if not row["seeds"]:
        return [row["name"], *cells, p, "-", "-", "-", seeds(row)]
    cost = [f"{row['trainable_parameters']:,}", duration(row["seconds"]), size(row["peak_memory"])]
    return [row["name"], *cells, p, *cost, seeds(row)]


def seeds(row: dict) -> str:
    """With how many seeds there is a result, and of how many where some are missing."""
    return str(row["asked"]) if len(row["seeds"]) == row["asked"] else f"{len(row['seeds'])}/{row['asked']}"


def notes(found: dict) -> list[str]:
    """What a reader has to know of the table."""
    about, said = found["comparison"], []
    if found["rows"] is not None:
        said.append(
            f"{about['dataset']}, {found['protocol']}, {history_word(found['history_masked'])}: {found['rows']} test rows, "
            f"{found['candidates']} candidates; means over seeds with 95 % bootstrap intervals over rows"
        )
    for test in found["best"]:
        more = "" if test["improvement"] is None else f" {test['improvement']:+.1f} %,"
        low, high = test["interval"]
        said.append(
            f"{metric_name(test['metric'])}: {test['method']} against {test['baseline']}{more} "
            f"{test['difference']:+.4f} ({low:+.4f} to {high:+.4f}), p = {p_value(test['p_holm'])}"
        )
    if found["others"]:
        said.append(
            f"p: paired Wilcoxon signed-rank tests; Holm-corrected over the metrics above, in the table over the runs, "
            f"on {metric_name(about['valid_metric'])}"
        )
    for row in found["runs"]:
        said += [f"{row['name']}, seed {fail['seed']}, failed: {fail['reason']}" for fail in row["failures"]]
    return said


def p_value(p: float) -> str:
    """A p-value as the tables print it."""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"
