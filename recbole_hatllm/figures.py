"""What an analysis leaves: a figure as PNG and SVG, and its numbers beside it as CSV and JSON."""

from __future__ import annotations

import csv
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recbole_hatllm.files import publish

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # titles have dollars in them
    "svg.fonttype": "none",
    "svg.hashsalt": "recbole_hatllm",
    "savefig.dpi": 160,
}


def file_name(user: str) -> str:
    """A user's id as part of a file's name."""
    return re.sub(r"[^\w.-]", "_", str(user))


@contextmanager
def style():
    """matplotlib's settings of all figures; it is loaded here, and without a screen."""
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a title may be in any script
        yield


def leave_figure(folder: Path, name: str, figure) -> None:
    """`name`.png and `name`.svg."""
    publish(folder / f"{name}.png", partial(figure.savefig, format="png"))
    publish(folder / f"{name}.svg", partial(figure.savefig, format="svg", metadata={"Date": None}))


def leave_numbers(folder: Path, name: str, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """`name`.csv with the rows, and `name`.json with what they are of, and the rows; None is an empty cell."""
    leave_table(folder, name, rows)
    leave_json(folder, name, {**about, "rows": [*rows]})


def leave_table(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """`name`.csv; the first row names the columns."""

    def write(file: Path) -> None:
        with file.open("w", encoding="utf-8", newline="") as out:
            table = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(rows)

    publish(folder / f"{name}.csv", write)


def leave_json(folder: Path, name: str, content: Mapping[str, Any]) -> None:
    """`name`.json, one line for each entry of a list."""
    parts = []
    for key, value in content.items():
        text = json.dumps(value, ensure_ascii=False, default=str)
        if isinstance(value, list) and value and isinstance(value[0], (dict, list)):
            text = "[\n " + ",\n ".join(json.dumps(entry, ensure_ascii=False, default=str) for entry in value) + "\n]"
        parts.append(f"{json.dumps(key)}: {text}")
    publish(
        folder / f"{name}.json", lambda file: file.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    )


def text_axis(panel: Axes, texts: Sequence[str]) -> None:
    """Texts at 0, 1, 2, ... below a panel, slanted where they would run into each other."""
    steep = sum(map(len, texts)) > 20
    panel.set_xticks(range(len(texts)), texts, rotation=40 if steep else 0, ha="right" if steep else "center")
    panel.set_xlim(-0.5, len(texts) - 0.5)
