"""`analyze attention`: how much attention stays inside items and how much goes across, before and after fine-tuning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from recbole_hatllm.analysis.pairs import CoOccurrence, Distances
from recbole_hatllm.analysis.shares import Shares
from recbole_hatllm.analysis.subject import Subject, attend, must_be_llm, open_run, paired
from recbole_hatllm.colours import BLUE, RED
from recbole_hatllm.errors import ConfigError
from recbole_hatllm.figures import leave_figure, leave_numbers, style
from recbole_hatllm.run_folder import aligned

_SAMPLE_SEED = 42  # not the run's: all runs are looked at on the same rows
_LOOK = {"intra": (BLUE, "o", "within items"), "cross": (RED, "s", "across items")}
_STATES = {"before": ("//", ":", "none"), "after": ("", "-", None), "against": ("..", "--", "white")}


def run(run: str, against: str | None = None, rows: int = 200, folder: str | None = None) -> str:
    """Shares and mean weights of pairs of tokens, by layer, on test rows; with the distances and co-occurrences of the pairs.

    `before` is the bare backbone with plain causal attention on the run's own prompts (slots hold what the run puts there),
    `after` the run, `against` another run on the same rows.

    Args:
        run, against: folders of finished runs of LLM recommenders. rows: how many test rows, drawn once and for all; one is read at
            a time, so memory is that of one layer's weights of one prompt. folder: of what is left.

    Returns:
        a table for the terminal.

    Raises:
        HatError: no such run, other rows, or `rows` is no number from 1.
    """
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
        raise ConfigError(f"rows is {rows!r}, and must be a whole number, at least 1.")
    if against is not None:
        paired(must_be_llm(run), must_be_llm(against))
    subject = open_run(run)
    chosen = sample(len(subject.test.rows), rows)
    found = measure(subject, chosen, {"before": True, "after": False})
    pairs = pair_statistics(subject, chosen)
    del subject
    if against is not None:
        found += measure(open_run(against), chosen, {"against": False})
    out = Path(folder or f"{Path(run)}-attention")
    about = {"run": str(run), "against": against, "test_rows": len(chosen), "pairs": pairs}
    leave_numbers(out, "attention", found, about)
    leave_numbers(out, "pairs", [{"pairs": kind, **values} for kind, values in pairs.items()], {"run": str(run)})
    with style():
        leave_figure(out, "attention", figure(found))
    return f"{table(found, pairs)}\n{len(chosen)} test rows; figure and numbers: {out}"


def sample(total: int, rows: int) -> np.ndarray:
    """At most `rows` of the numbers below `total`, drawn and then in order; the same ones each time."""
    return np.sort(np.random.default_rng(_SAMPLE_SEED).permutation(total)[:rows])


def measure(subject: Subject, rows: np.ndarray, states: dict[str, bool]) -> list[dict]:
    """The lines of `Shares.rows` for each state, which is true for the bare backbone."""
    model = subject.model
    shares = {state: Shares(model.backbone.n_layers) for state in states}
    slots = False
    quiet = not subject.config["show_progress"]
    for row in tqdm(rows.tolist(), desc="read", unit="prompt", ncols=100, leave=False, disable=quiet):
        prompt = subject.prompt(row)
        inputs = model.embed(prompt)
        slots = prompt.slots is not None
        for state, without in states.items():
            shares[state].begin(prompt)
            attend(model, prompt, inputs, shares[state], without)
    found = []
    for state, without in states.items():
        kinds = ("or",) * model.backbone.n_layers if without else model.backbone.kinds
        found += shares[state].rows(state, kinds, slots)
    return found


def pair_statistics(subject: Subject, rows: np.ndarray) -> dict[str, dict]:
    """Of the pairs within items and across: their number, mean distance in tokens, and how often other titles have both tokens."""
    distances = Distances()
    together = (
        CoOccurrence(subject.model.titles) if len(subject.model.titles.ids) and subject.model.template.titles else None
    )
    for row in rows.tolist():
        items, length = subject.history(row)
        distances.add(subject.model.prompts(items, length))
        if together:
            together.add(items[0, : int(length)])
    nothing = {"titles": None, "share": None}
    return {
        kind: {
            "number": distances.count[kind],
            "distance": distance,
            **{f"together_{name}": value for name, value in (together.means()[kind] if together else nothing).items()},
        }
        for kind, distance in distances.means().items()
    }


def table(found: list[dict], pairs: dict[str, dict]) -> str:
    """Shares and mean weights over all layers, and the pairs, for the terminal."""
    lines = [["attention of item tokens", *("intra", "cross", "self", "template"), "intra, mean", "cross, mean"]]
    whole = [row for row in found if row["layer"] == "all"]
    for row in whole:
        shares = [f"{row[f'{part}_share']:.4f}" for part in lines[0][1:5]]
        means = ["-" if row[key] is None else f"{row[key]:.6f}" for key in ("intra_mean", "cross_mean")]
        lines.append([row["state"], *shares, *means])
    parts = [aligned(lines)]
    parts += [
        f"slots, {row['state']}: {row['slots']:.2%} of the attention of all tokens from the first item on"
        for row in whole
        if row["slots"] is not None
    ]
    second = [["pairs of item tokens", "number", "distance", "together in other titles", "share with any"]]
    for kind, values in pairs.items():
        numbers = ["-" if values[key] is None else f"{values[key]:.2f}" for key in [*values][1:]]
        second.append([kind, f"{values['number']:,}", *numbers])
    return "\n\n".join(["\n".join(parts), aligned(second)])


def figure(found: list[dict]) -> Figure:
    """Above, over all layers: total share and mean weight; below, the same layer by layer."""
    states = list(dict.fromkeys(row["state"] for row in found))
    picture = Figure(figsize=(6.3, 4.4))
    axes = picture.subplots(2, 2)
    for column, (measure, label) in enumerate((("share", "share of attention"), ("mean", "mean weight"))):
        above, below = axes[0, column], axes[1, column]
        for index, state in enumerate(states):
            hatch, line, fill = _STATES[state]
            rows = [row for row in found if row["state"] == state]
            for place, (kind, (colour, marker, name)) in enumerate(_LOOK.items()):
                whole, *layers = (row[f"{kind}_{measure}"] for row in rows)
                where = place + (index - (len(states) - 1) / 2) * 0.8 / len(states)
                bar = above.bar(
                    where,
                    whole or 0,
                    0.74 / len(states),
                    color="white" if hatch else colour,
                    edgecolor=colour,
                    hatch=hatch,
                )
                above.bar_label(bar, ["-" if whole is None else f"{whole:.2g}"], fontsize=6, padding=1)
                below.plot(
                    range(len(layers)), layers, color=colour, linestyle=line, marker=marker, markersize=3.5, linewidth=1,
                    markerfacecolor=fill or colour, label=f"{name}, {state}",
                )  # fmt: skip
        above.set_xticks(range(len(_LOOK)), [name for _, _, name in _LOOK.values()])
        above.set_ylabel(label)
        above.set_xlabel("all layers")
        below.set_ylabel(label)
        below.set_xlabel("layer")
        below.xaxis.get_major_locator().set_params(integer=True)
        above.margins(y=0.12)
        above.set_ylim(0, None)
        below.set_ylim(0, None)
    picture.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(states), fontsize=7)
    return picture
