"""`analyze errors`: where two runs disagree on the same test rows, by group and row by row. Any two models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from recbole_hatllm import run_folder
from recbole_hatllm.analysis.groups import groups, properties
from recbole_hatllm.analysis.subject import paired, test_part
from recbole_hatllm.colours import BLUE, RED
from recbole_hatllm.config import Config
from recbole_hatllm.errors import ConfigError, DataError
from recbole_hatllm.figures import leave_figure, leave_numbers, style
from recbole_hatllm.intervals import gains, is_measured, of_mean
from recbole_hatllm.run_folder import aligned, metric_name


def run(run: str, against: str, top: int = 50, metric: str | None = None, folder: str | None = None) -> str:
    """HR and NDCG of both runs and their paired difference by group, and the rows with the largest disagreement.

    Args:
        run, against: folders of finished runs on the same rows. top: how many rows are listed. metric: what the figure shows; by
            default what training chose by. folder: of what is left.

    Returns:
        a table for the terminal.

    Raises:
        HatError: no such run or metric, other rows, or data that is no longer theirs.
    """
    if not isinstance(top, int) or isinstance(top, bool) or top < 1:
        raise ConfigError(f"top is {top!r}, and must be a whole number, at least 1.")
    ours, theirs = Path(run), Path(against)
    first, second = paired(ours, theirs)
    stored = run_folder.read_config(ours)
    metric = str(metric or stored["valid_metric"]).lower().replace("hr@", "hit@")
    names = [name for name in run_folder.read_result(ours)["test"] if is_measured(name)]
    if metric not in names:
        raise ConfigError(f"metric is {metric}, and must be one of {', '.join(names)}, which {ours} measures.")
    test = test_part(Config(stored.pop("model"), stored.pop("dataset"), config_dict=stored))
    tokens, titles = run_folder.read_items(ours)
    _same_rows(test, first, ours)
    found = by_group(groups(test, titles), first["rank"], second["rank"], names)
    out = Path(folder or f"{ours}-errors")
    about = {"run": str(run), "against": str(against), "test_rows": len(first["rank"])}
    leave_numbers(out, "groups", found, about)
    listed = largest(test, titles, first, second, top)
    leave_numbers(out, "rows", listed, about)
    with style():
        leave_figure(out, "groups", figure(found, metric, _label(ours), _label(theirs)))
        leave_figure(
            out, "ranks", rank_figure(first["rank"], second["rank"], len(tokens) - 1, _label(ours), _label(theirs))
        )
    leave_numbers(out, "ranks", _ranks(first, second), about)
    return f"{table(found, metric)}\n{_example(listed)}figures and numbers: {out}"


def _label(folder: Path) -> str:
    return folder.resolve().name


def _same_rows(test, ranks: dict[str, np.ndarray], folder: Path) -> None:
    for field, name in ((test.uid_field, "user"), (test.iid_field, "target")):
        if not np.array_equal(test.id2token(field, test.rows[field].numpy()).astype(str), ranks[name]):
            raise DataError(
                f"The test rows of {test.dataset_name} are no longer those of {folder}: bring the data back "
                "as it was, or train again."
            )


def by_group(
    chosen: dict[tuple[str, str], np.ndarray], ours: np.ndarray, theirs: np.ndarray, names: list[str]
) -> list[dict]:
    """One line a group and metric.

    Args:
        chosen: [R] bool by (kind, group). ours, theirs: [R] int64 ranks from 1. names: of metrics, hit@k or ndcg@k.

    Returns:
        kind, group, rows, metric, run and against (means), their difference, and low and high of its 95 % bootstrap interval.
    """
    found = []
    for (kind, group), rows in chosen.items():
        for name in names:
            first, second = gains(ours[rows], name), gains(theirs[rows], name)
            low, high = of_mean(first - second)
            found.append({
                "kind": kind, "group": group, "rows": int(rows.sum()), "metric": name, "run": float(first.mean()),
                "against": float(second.mean()), "difference": float((first - second).mean()), "low": low, "high": high,
            })  # fmt: skip
    return found


def largest(
    test, titles: list[str], ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], top: int
) -> list[dict]:
    """The `top` rows in which 1 / log2(rank + 1), what an uncut NDCG would give, differs most; the first rows of equal ones."""
    difference = 1 / np.log2(ours["rank"] + 1) - 1 / np.log2(theirs["rank"] + 1)
    found = properties(test, titles)
    targets = test.rows[test.iid_field].tolist()
    listed = []
    for row in np.argsort(-np.abs(difference), kind="stable")[:top].tolist():
        past = test.rows[[row]]
        items = past[test.history_field][0, : int(past[test.item_list_length_field][0])].tolist()
        listed.append({
            "row": row, "user": str(ours["user"][row]), "target": str(ours["target"][row]), "title": titles[targets[row]],
            "rank_run": int(ours["rank"][row]), "rank_against": int(theirs["rank"][row]), "difference": float(difference[row]),
            **{name: int(values[row]) for name, values in found.items()}, "history": " | ".join(titles[item] for item in items),
        })  # fmt: skip
    return listed


def _ranks(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> list[dict]:
    columns = (first["user"].tolist(), first["target"].tolist(), first["rank"].tolist(), second["rank"].tolist())
    return [dict(zip(("user", "target", "rank_run", "rank_against"), row)) for row in zip(*columns)]


def table(found: list[dict], metric: str) -> str:
    """The groups by one metric, for the terminal."""
    lines = [[metric_name(metric), "rows", "run", "against", "difference", "95 % interval"]]
    for row in found:
        if row["metric"] == metric:
            interval = f"{row['low']:+.4f} to {row['high']:+.4f}"
            name = _name(row)
            lines.append(
                [
                    name,
                    str(row["rows"]),
                    f"{row['run']:.4f}",
                    f"{row['against']:.4f}",
                    f"{row['difference']:+.4f}",
                    interval,
                ]
            )
    return aligned(lines)


def _name(row: dict) -> str:
    return row["group"] if row["kind"] in ("all", "day") else f"{row['kind']}: {row['group']}"


def _example(listed: list[dict]) -> str:
    lines = [
        f"  rank {row['rank_run']} and {row['rank_against']}: {row['title']}  [user {row['user']}]"
        for row in listed[:5]
    ]
    return "largest disagreement:\n" + "\n".join(lines) + "\n"


def figure(found: list[dict], metric: str, ours: str, theirs: str) -> Figure:
    """The difference of a metric by group with its interval; a filled circle where the interval leaves out 0."""
    rows = [row for row in found if row["metric"] == metric][::-1]
    picture = Figure(figsize=(6.3, 0.7 + 0.2 * len(rows)))
    axis = picture.subplots()
    for place, row in enumerate(rows):
        sure = row["low"] > 0 or row["high"] < 0
        colour = "0.45" if not sure else BLUE if row["difference"] > 0 else RED
        marker = "o" if not sure else "^" if row["difference"] > 0 else "v"
        axis.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=1.2)
        axis.plot(
            row["difference"],
            place,
            marker=marker,
            color=colour,
            markerfacecolor=colour if sure else "white",
            markersize=5,
        )
    axis.axvline(0, color="0.3", linewidth=0.6)
    for place in range(1, len(rows)):
        if rows[place]["kind"] != rows[place - 1]["kind"]:
            axis.axhline(place - 0.5, color="0.85", linewidth=0.6)
    names = [f"{_name(row)}  ({row['rows']})" for row in rows]
    axis.set_yticks(range(len(rows)), names)
    axis.set_xlabel(f"{metric_name(metric)}: {ours} minus\n{theirs}")
    return picture


def rank_figure(ours: np.ndarray, theirs: np.ndarray, items: int, name: str, other: str) -> Figure:
    """How many rows have which ranks in both runs, both axes logarithmic; the line is where they agree."""
    picture = Figure(figsize=(4.1, 3.4))
    axis = picture.subplots()
    edges = np.unique(np.geomspace(1, items + 1, 25).round())
    counts = np.histogram2d(ours, theirs, [edges, edges])[0]
    drawn = axis.pcolormesh(edges, edges, np.where(counts == 0, np.nan, counts), cmap="viridis")
    axis.plot([1, items], [1, items], color=RED, linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_aspect("equal")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter("{x:g}")  # the logarithmic one writes formulas
    axis.set_xlabel(f"rank by {other}")
    axis.set_ylabel(f"rank by {name}")
    picture.colorbar(drawn, ax=axis, label="test rows")
    return picture
