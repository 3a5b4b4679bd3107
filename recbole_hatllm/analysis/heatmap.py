"""`analyze heatmap`: one user's prompt, token against token: what the mask of a layer leaves open, and where its attention goes."""

from __future__ import annotations

from pathlib import Path

from matplotlib.colors import BoundaryNorm, ListedColormap, PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from recbole_hatllm.analysis.subject import attend, masks_of, open_run, row_of
from recbole_hatllm.analysis.tokens import boundaries, texts
from recbole_hatllm.colours import RED
from recbole_hatllm.errors import ConfigError
from recbole_hatllm.figures import file_name, leave_figure, leave_json, leave_table, style

_PER_TOKEN = 0.085  # inches


def run(run: str, user: str, layer: object = None, head: object = "mean", folder: str | None = None) -> str:
    """A figure a layer, and all weights as numbers.

    Args:
        run: folder of a finished run of an LLM recommender. user: whose last test row. layer: one, several as 0,3 or [0, 3], or
            `all`; by default the first layer of each mask. head: one, from 0, or `mean` over all. folder: of what is left.

    Returns:
        what was left, for the terminal.

    Raises:
        HatError: no such run, user, layer or head.
    """
    subject = open_run(run)
    model, kinds = subject.model, subject.model.backbone.kinds
    layers = wanted_layers(layer, kinds)
    prompt = subject.prompt(row_of(subject.test, user))
    seen = {}

    def watch(number: int, weights: Tensor) -> None:
        if number in layers:
            seen[number] = one_head(weights[0], head).double().cpu()

    attend(model, prompt, model.embed(prompt), watch)
    masks = {kind: mask[0, 0].cpu() for kind, mask in masks_of(prompt, kinds).items()}
    labels, span = texts(model.backbone.tokenizer, prompt), prompt.span[0].tolist()
    out = Path(folder or f"{Path(run)}-heatmap-user-{file_name(user)}")
    about = {"run": str(run), "user": str(user), "head": head, "tokens": labels, "item": span}
    lines = []
    for number in layers:
        kind, name = kinds[number], f"layer-{number}"
        mask, weights = masks[kind].int().tolist(), [[float(f"{w:.6g}") for w in row] for row in seen[number].tolist()]
        leave_json(out, name, {**about, "layer": number, "mask": kind, "allowed": mask, "weights": weights})
        cells = [
            {"query": j, "key": k, "query_token": labels[j], "key_token": labels[k], "query_item": span[j],
             "key_item": span[k], "allowed": mask[j][k], "weight": weights[j][k]}
            for j in range(len(span)) for k in range(j + 1)
        ]  # fmt: skip
        leave_table(out, name, cells)
        with style():
            leave_figure(out, name, figure(masks[kind], seen[number], labels, span, kind))
        lines.append(f"layer {number} {kind.upper().replace('_', '-')}: {name}.png, .svg, .csv, .json")
    return "\n".join([*lines, f"figures and numbers: {out}"])


def wanted_layers(layer: object, kinds: tuple[str, ...]) -> list[int]:
    """The numbers of layers, from 0, without repetition.

    Raises:
        ConfigError: something that is no layer of this model.
    """
    if layer is None:
        return sorted({kind: number for number, kind in reversed([*enumerate(kinds)])}.values())
    if layer == "all":
        return list(range(len(kinds)))
    given = layer if isinstance(layer, list) else str(layer).split(",")
    found = []
    for part in given:
        text = str(part).strip()
        if not text.isdigit() or int(text) >= len(kinds):
            raise ConfigError(f"layer is {layer!r}, and must be from 0 to {len(kinds) - 1}, several as 0,1, or all.")
        found.append(int(text))
    return list(dict.fromkeys(found))


def one_head(weights: Tensor, head: object) -> Tensor:
    """[heads, T, T] -> [T, T], of one head or the mean of all.

    Raises:
        ConfigError: no such head.
    """
    if head == "mean":
        return weights.double().mean(0)
    if not isinstance(head, int) or isinstance(head, bool) or not 0 <= head < len(weights):
        raise ConfigError(f"head is {head!r}, and must be from 0 to {len(weights) - 1}, or mean.")
    return weights[head]


def figure(mask: Tensor, weights: Tensor, labels: list[str], span: list[int], kind: str) -> Figure:
    """Mask beside weights, from the first item on; lines stand between items. Grey cells are closed."""
    first = next(place for place, item in enumerate(span) if item >= 0)
    mask, weights, labels, span = mask[first:, first:], weights[first:, first:], labels[first:], span[first:]
    count = len(labels)
    size = max(2.2, _PER_TOKEN * count)
    picture = Figure(figsize=(2 * size + 1.6, size + 0.5))
    left, right = picture.subplots(1, 2)
    drawn = mask.int().numpy()
    left.imshow(
        drawn, cmap=ListedColormap(["0.88", "#0072B2"]), norm=BoundaryNorm([-0.5, 0.5, 1.5], 2), interpolation="none"
    )
    closed = weights.masked_fill(~mask, float("nan")).numpy()
    colours = right.imshow(closed, cmap=_viridis(), norm=PowerNorm(0.5, vmin=0), interpolation="none")
    picture.colorbar(colours, ax=right, shrink=0.7, label="weight")
    edges = boundaries(span)
    for axis, label in ((left, f"{kind.upper().replace('_', '-')} mask"), (right, "attention")):
        axis.set_xticks(range(count), labels, rotation=90, fontsize=4)
        axis.set_yticks(range(count), labels, fontsize=4)
        axis.tick_params(length=0, pad=1)
        axis.set_xlabel(f"key ({label})")
        axis.spines[["top", "right"]].set_visible(True)
        for edge in edges:
            axis.axhline(edge - 0.5, color=RED, linewidth=0.5)
            axis.axvline(edge - 0.5, color=RED, linewidth=0.5)
    left.set_ylabel("query")
    return picture


def _viridis():
    from matplotlib import colormaps

    return colormaps["viridis"].with_extremes(bad="0.88")
