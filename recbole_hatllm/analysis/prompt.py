"""`analyze prompt`: what an LLM reads of a user, token by token, and what each mask leaves open; it needs a tokenizer alone."""

from __future__ import annotations

import html
import os
import sys
from pathlib import Path
from typing import Any

from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from recbole_hatllm import registry
from recbole_hatllm.analysis.subject import history, is_llm, masks_of, row_of, test_part
from recbole_hatllm.analysis.tokens import boundaries, texts
from recbole_hatllm.backbone import load_backbone
from recbole_hatllm.colours import BLUE, GREEN, ORANGE, PINK, RED, SKY
from recbole_hatllm.config import Config
from recbole_hatllm.data.prompt import Prompt, PromptTable
from recbole_hatllm.data.titles import PieceEncoder, TitleTokens
from recbole_hatllm.errors import ConfigError, DataError
from recbole_hatllm.figures import file_name, leave_figure, leave_numbers, style
from recbole_hatllm.files import cache_folder, publish
from recbole_hatllm.masks import KINDS, describe
from recbole_hatllm.prompt_size import known_tokenizer
from recbole_hatllm.shapes import depth_of

_COLOURS = (BLUE, RED, GREEN, PINK, ORANGE, SKY)  # neighbours differ


def run(
    dataset: str,
    user: str,
    keys: dict[str, Any],
    model: str = "HatLLM",
    config_files: str = "",
    folder: str | None = None,
) -> str:
    """The prompt of the user's last test row on the terminal, as a page and as numbers, with the masks drawn.

    Args:
        dataset, model, config_files, keys: as of a run. user: as in the files. folder: of what is left.

    Returns:
        the prompt, in colours where the terminal has them.

    Raises:
        HatError: no such dataset, user, key or backbone, or a model that reads no prompts.
    """
    if not is_llm(model):
        raise ConfigError(f"{model} reads no prompts: name an LLM recommender, such as HatLLM.")
    config = Config(model, dataset, [file for file in str(config_files).split(",") if file], keys)
    recommender = registry.model_class(model)
    kinds = recommender.layer_kinds(config, config["backbone_layers"] or depth_of(str(config["backbone"])))
    test = test_part(config)
    row = row_of(test, user)
    tokenizer = known_tokenizer(str(config["backbone"])) or load_backbone(config["backbone"], layers=1).tokenizer
    prompt = prompt_table(config, recommender.template, tokenizer, test)(*history(test, row))
    out = Path(folder or Path(config["runs_dir"]) / f"prompt-{model}-{dataset}-user-{file_name(user)}")
    labels, span = texts(tokenizer, prompt), prompt.span[0].tolist()
    items, length = history(test, row)
    called = names(test)
    titles = [called[item] for item in items[0, : int(length)].tolist()]
    rows = [
        {"place": place, "id": token, "text": label, "item": item if item >= 0 else None,
         "title": titles[item] if item >= 0 else None, "last": int(last), "readout": int(place == int(prompt.readout[0]))}
        for place, (token, label, item, last) in enumerate(
            zip(prompt.input_ids[0].tolist(), labels, span, prompt.is_last[0].tolist())
        )
    ]  # fmt: skip
    about = {
        "model": model,
        "dataset": dataset,
        "user": str(user),
        "backbone": str(config["backbone"]),
        "schedule": describe(kinds),
    }
    leave_numbers(out, "prompt", rows, about)
    masks = {kind: mask[0, 0] for kind, mask in masks_of(prompt, KINDS).items()}
    numbers = [
        {"mask": kind, "layers": layers_of(kind, kinds), "open": int(mask.sum())} for kind, mask in masks.items()
    ]
    leave_numbers(out, "masks", numbers, {**about, "tokens": len(span)})
    with style():
        leave_figure(out, "masks", figure(masks, span, kinds))
    text = page(labels, prompt, titles, f"{model} on {dataset}, user {user}", describe(kinds))
    publish(out / "prompt.html", lambda file: file.write_text(text, encoding="utf-8"))
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    head = f"{len(span)} tokens, {len(titles)} items; {describe(kinds)}"
    return f"{terminal(labels, prompt, colours)}\n{head}\npage, figure and numbers: {out}"


def prompt_table(config, template, tokenizer, test) -> PromptTable:
    """The prompts of a model with this config, as `LLMRecommender.know_titles` makes them."""
    encode = PieceEncoder(tokenizer)
    titles = TitleTokens.none(test.item_num)
    if template.titles:
        titles = TitleTokens.build(test.titles, encode, config["title_tokens"], cache_folder())
    words = {name: config[f"prompt_{name}"] for name in ("nouns", "noun", "verb")}
    return PromptTable(titles, encode, words, config["item_span"], config["readout"], template)


def names(test) -> list[str]:
    """What people call the items, by internal id: titles, or ids where the data has no titles."""
    try:
        return test.titles
    except DataError:
        return test.item_tokens


def layers_of(kind: str, kinds: tuple[str, ...]) -> str:
    """The layers, from 0, that have a mask."""
    return " ".join(str(layer) for layer, other in enumerate(kinds) if other == kind)


def terminal(labels: list[str], prompt: Prompt, colours: bool) -> str:
    """The prompt with a bar between tokens; items in colours, their last token underlined, or else as ⟨0:Heat⟩."""
    span, last, readout = prompt.span[0].tolist(), prompt.is_last[0].tolist(), int(prompt.readout[0])
    parts = []
    for place, (label, item) in enumerate(zip(labels, span)):
        text = label.replace("↵", "↵\n")
        begins = place > 0 and not labels[place - 1].endswith("↵")
        bar = "|" if begins else ""
        if colours:
            codes = (
                ["2"] if item < 0 else ["38;2;" + ";".join(str(int(_colour(item)[i : i + 2], 16)) for i in (1, 3, 5))]
            )
            codes += ["4"] * last[place] + ["7"] * (place == readout)
            parts.append(f"\x1b[2m{bar}\x1b[0m\x1b[{';'.join(codes)}m{text}\x1b[0m")
        else:
            opens = f"⟨{item}:" if item >= 0 and (place == 0 or span[place - 1] != item) else ""
            closes = "⟩" if last[place] else ""
            parts.append(f"{bar}{opens}{text}{closes}" + "◄" * (place == readout))
    return "".join(parts).rstrip("\n")


def _colour(item: int) -> str:
    return _COLOURS[item % len(_COLOURS)]


def page(labels: list[str], prompt: Prompt, titles: list[str], heading: str, schedule: str) -> str:
    """A page that shows the prompt, with what a token is where the mouse stands, and the figure of the masks."""
    span, last, readout = prompt.span[0].tolist(), prompt.is_last[0].tolist(), int(prompt.readout[0])
    tokens = []
    for place, (label, token) in enumerate(zip(labels, prompt.input_ids[0].tolist())):
        item = span[place]
        about = f"token {place}, id {token}" + (f", item {item}: {titles[item]}" if item >= 0 else "")
        about += ", last of its item" * last[place] + ", readout" * (place == readout)
        classes = " ".join(
            [
                "t",
                *(["i", f"c{item % len(_COLOURS)}"] * (item >= 0)),
                *["last"] * last[place],
                *["readout"] * (place == readout),
            ]
        )
        tokens.append(
            f'<span class="{classes}" title="{html.escape(about)}">{html.escape(label)}</span>'
            + "<br>" * label.count("↵")
        )
    colours = "\n".join(f".c{n} {{ border-color: {c}; background: {c}30; }}" for n, c in enumerate(_COLOURS))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(heading)}</title><style>
body {{ font: 15px/2 ui-monospace, monospace; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; background: #fff; }}
.t {{ padding: 2px 0; border-bottom: 3px solid transparent; outline: 1px dotted #bbb; }}
.last {{ font-weight: bold; border-bottom-style: double; border-bottom-width: 5px; }}
.readout {{ outline: 2px solid #000; }}
{colours}
img {{ max-width: 100%; }}
</style></head><body>
<h1>{html.escape(heading)}</h1>
<p>{html.escape(schedule)}. Coloured: the tokens of an item, its last one bold; boxed in black: the readout.</p>
<p>{"".join(tokens)}</p>
<img src="masks.svg" alt="What each mask leaves open">
</body></html>
"""


def figure(masks: dict[str, Tensor], span: list[int], kinds: tuple[str, ...]) -> Figure:
    """Every mask as a square, queries down and keys across, from the first item on; blue is open, lines stand around items."""
    picture = Figure(figsize=(2.0 * len(masks), 2.2))
    first = next(place for place, item in enumerate(span) if item >= 0)
    frame = (first - 0.5, len(span) - 0.5, len(span) - 0.5, first - 0.5)
    for axis, (kind, mask) in zip(picture.subplots(1, len(masks)), masks.items()):
        drawn = mask[first:, first:].int().numpy()
        axis.imshow(drawn, cmap=ListedColormap(["0.88", BLUE]), vmin=0, vmax=1, interpolation="none", extent=frame)
        for edge in boundaries(span):
            if edge > first:
                axis.axhline(edge - 0.5, color=RED, linewidth=0.3)
                axis.axvline(edge - 0.5, color=RED, linewidth=0.3)
        used = layers_of(kind, kinds).split()
        where = f"{len(used)} of {len(kinds)} layers" if used else "no layer"
        axis.set_xlabel(f"{kind.upper().replace('_', '-')}: {where}")
        axis.tick_params(labelsize=6)
    return picture
