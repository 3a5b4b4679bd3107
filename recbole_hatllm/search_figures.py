"""What a study teaches of its keys, as figures with their numbers: which matter (importance), and where each is good (slice)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from recbole_hatllm.colours import BLUE, ORANGE
from recbole_hatllm.figures import leave_figure, leave_numbers, style, text_axis
from recbole_hatllm.run_folder import metric_name
from recbole_hatllm.space import Dimension, Space

_COLUMNS = 4  # panels of the slice figure in a row


def draw(study: optuna.Study, space: Space, found: dict[str, Any], seed: int, folder: Path) -> list[str]:
    """Leaves `importance` and `slice` in `folder`, each as .png, .svg, .csv and .json, in place of those of before.

    Args:
        found: what `study.json` holds. seed: of the forest behind the importances.

    Returns:
        the names of the figures: none with fewer than two finished trials, no importance where all came to the same. A key with one
        choice is in none.
    """
    about, trials = found["search"], study.get_trials(deepcopy=False)
    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    varied = {key: dimension for key, dimension in space.dimensions.items() if len(dimension.values) > 1}
    if len(finished) < 2 or not varied:
        return []
    metric = f"valid {metric_name(about['valid_metric'])}"
    of = {name: about[name] for name in ("model", "dataset", "protocol", "sampler", "pruner")}
    of |= {"metric": metric, "finished_trials": len(finished)}
    drawn = ["slice"]
    points = slices(trials, Space(varied), found["best"], about["valid_metric"])
    leave_numbers(folder, "slice", points, of)
    with style():
        leave_figure(folder, "slice", slice_figure(points, varied, metric))
        if shares := importances(study, [*varied], seed):
            drawn.insert(0, "importance")
            leave_numbers(folder, "importance", shares, {**of, "by": "fANOVA (Optuna)"})
            leave_figure(folder, "importance", importance_figure(shares, metric, len(finished)))
    return drawn


def importances(study: optuna.Study, keys: list[str], seed: int) -> list[dict]:
    """Of each key, the largest first: `importance`, its share of what fANOVA's forest explains by one key alone; together 1.

    Empty where the finished trials do not differ in their value.
    """
    if len({trial.value for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))}) < 2:
        return []
    found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=seed), params=keys)
    return [{"key": key, "importance": float(share)} for key, share in found.items()]


def slices(trials: list[FrozenTrial], space: Space, best: int, metric: str) -> list[dict]:
    """One line a key and trial: key, trial, state (best, complete or pruned), the key's value and `metric` in validation.

    A pruned trial has the best that it had come to.
    """
    found = []
    for key in space.dimensions:
        for trial in trials:
            if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
                state = "best" if trial.number == best else trial.state.name.lower()
                value = space.values(trial.params)[key]
                measured = trial.user_attrs["outcome"]["valid"][metric]
                found.append({"key": key, "trial": trial.number, "state": state, "value": value, "metric": measured})
    return found


def importance_figure(shares: list[dict], metric: str, finished: int) -> Figure:
    """A bar a key, the largest on top, its share written behind it."""
    picture = Figure(figsize=(4.2, 0.75 + 0.24 * len(shares)))
    axis = picture.subplots()
    rows = shares[::-1]
    axis.barh(range(len(rows)), [row["importance"] for row in rows], color=BLUE, height=0.6)
    for place, row in enumerate(rows):
        axis.annotate(
            f"{row['importance']:.2f}", (row["importance"], place), (3, 0), textcoords="offset points", va="center"
        )
    axis.set_yticks(range(len(rows)), [row["key"] for row in rows])
    axis.set_xlim(0, 1.12)
    axis.set_xticks(np.linspace(0, 1, 6))
    axis.set_xlabel(f"importance for {metric} (fANOVA, {finished} trials)")
    return picture


def slice_figure(points: list[dict], dimensions: dict[str, Dimension], metric: str) -> Figure:
    """A panel a key, all on one scale: its values across, the metric upwards, a marker a trial."""
    columns = min(_COLUMNS, len(dimensions))
    lines = -(-len(dimensions) // columns)
    picture = Figure(figsize=(max(0.5 + 1.75 * columns, 3.2), 0.35 + 2.0 * lines))
    panels = picture.subplots(lines, columns, sharey=True, squeeze=False)
    for panel in panels.flat[len(dimensions) :]:
        panel.remove()
    marks = {
        "pruned": {"marker": "x", "color": "0.45", "s": 18, "linewidths": 0.9, "label": "pruned, its best so far"},
        "complete": {"marker": "o", "color": BLUE, "s": 18, "alpha": 0.8, "linewidths": 0, "label": "finished"},
        "best": {"marker": "D", "color": ORANGE, "s": 30, "edgecolors": "black", "linewidths": 0.6, "label": "best"},
    }
    for (key, dimension), panel in zip(dimensions.items(), panels.flat):
        own = [point for point in points if point["key"] == key]
        for state, look in marks.items():
            chosen = [point for point in own if point["state"] == state]
            if chosen:
                places = [_place(dimension, point["value"]) for point in chosen]
                panel.scatter(places, [point["metric"] for point in chosen], **look)
        _scale(panel, dimension)
        panel.set_xlabel(key)
    for line in panels:
        line[0].set_ylabel(metric)
    handles = dict(zip(*reversed(panels[0, 0].get_legend_handles_labels())))
    picture.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=3, handletextpad=0.2)
    return picture


def _place(dimension: Dimension, value: Any) -> float:
    return dimension.values.index(value) if dimension.kind == "choice" else value


def _scale(panel: Axes, dimension: Dimension) -> None:
    if dimension.kind == "loguniform":
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter("{x:g}")  # its own writes formulas
        panel.xaxis.set_minor_formatter("")
        panel.set_xlim(dimension.values[0] / 1.3, dimension.values[1] * 1.3)
    elif dimension.kind in ("uniform", "int"):
        low, high = dimension.values[:2]
        panel.set_xlim(low - 0.07 * (high - low), high + 0.07 * (high - low))
        panel.xaxis.set_major_locator(MaxNLocator(4, integer=dimension.kind == "int"))
    else:
        labels = [f"{value:g}" if isinstance(value, float) else str(value) for value in dimension.values]
        text_axis(panel, labels)
