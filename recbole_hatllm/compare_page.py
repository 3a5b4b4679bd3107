"""One page of a comparison: its table, sortable, and its figures; a single file that loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from recbole_hatllm.compare_charts import COSTS, bars, costs, curves, swatch
from recbole_hatllm.compare_report import notes, p_value, place, seeds
from recbole_hatllm.files import publish
from recbole_hatllm.run_folder import duration, metric_name, size

# A browser holds the page to it: no script, style, font or picture but its own.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def write(found: dict, folder: Path) -> None:
    """`index.html` of what `compare_report.summary` found."""
    publish(folder / "index.html", lambda file: file.write_text(page(found), encoding="utf-8"))


def page(found: dict) -> str:
    """The page as HTML."""
    about = found["comparison"]
    title = f"{about['dataset']}: {_listed([row['name'] for row in found['runs']])}"
    beside = ("table.md", "table.csv", "table.tex", "result.json")
    return "\n".join([
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        f"<title>{escape(title)}</title><style>{_own('compare_page.css')}</style></head><body>",
        f"<header><h1>{escape(about['dataset'])}</h1>",
        f"<p>{escape(_state(found))}</p>",
        '<p class="quiet">The same as ' + ", ".join(f'<a href="{name}">{name}</a>' for name in beside) + "</p></header>",
        "<main>",
        _table(found),
        '<p class="said" role="status"></p>',
        '<p class="quiet"><b>bold</b> best, <u>underlined</u> second; below a mean its interval</p>',
        "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes(found)) + "</ul>",
        _figures(found),
        "</main>",
        f"<script>{_own('compare_page.js')}</script></body></html>",
        "",
    ])  # fmt: skip


def _own(name: str) -> str:
    return files("recbole_hatllm").joinpath(name).read_text(encoding="utf-8")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _state(found: dict) -> str:
    """How many runs there are, and what became of them."""
    asked = sum(row["asked"] for row in found["runs"])
    done, failed = (sum(len(row[part]) for row in found["runs"]) for part in ("seeds", "failures"))
    said = [f"{done} of {asked} runs finished"]
    if failed:
        said.append(f"{failed} failed")
    if waiting := asked - done - failed:
        said.append(f"{waiting} still to come (load the page again to see them)")
    return ", ".join(said)


def _table(found: dict) -> str:
    names = found["comparison"]["metrics"]
    method = found["others"][0]["method"] if found["others"] else "the best"
    head = [("run", "ascending"), *((metric_name(name), "descending") for name in names)]
    head += [(f"p against {method}", "ascending"), ("parameters", "ascending"), ("time", "ascending")]
    head += [("memory", "ascending"), ("seeds", "descending")]
    lines = "".join(
        f'<th scope="col" data-first="{first}"><button type="button">{escape(name)}</button></th>'
        for name, first in head
    )
    body = "\n".join(_row(found, number, row) for number, row in enumerate(found["runs"]))
    return (
        '<div class="wide" role="region" aria-label="table" tabindex="0"><table>'
        f"<thead><tr>{lines}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _row(found: dict, number: int, row: dict) -> str:
    tests = {test["baseline"]: test["p_holm"] for test in found["others"]}
    cells = [f'<th scope="row" data-value="{escape(row["name"])}">{swatch(number)}{escape(row["name"])}</th>']
    for name in found["comparison"]["metrics"]:
        metric, rank = row["metrics"][name], place(found, row, name)
        if rank is None:
            shown = "failed" if row["failures"] else "-"
        else:
            shown = f"{metric['mean']:.4f}"
            shown = {0: f"<b>{shown}</b>", 1: f"<u>{shown}</u>"}.get(rank, shown)
        if metric["interval"]:
            shown += "<small>{:.4f}-{:.4f}</small>".format(*metric["interval"])
        if metric["paper"] is not None:
            shown += f"<small>paper {metric['paper']:.4f}</small>"
        cells.append(_cell(metric["mean"], shown))
    p = tests.get(row["name"])
    cells.append(_cell(p, "-" if p is None else p_value(p)))
    parameters, seconds, most = (row[part] for part in ("trainable_parameters", "seconds", "peak_memory"))
    cells.append(_cell(parameters, "-" if parameters is None else f"{parameters:,}"))
    cells.append(_cell(seconds, "-" if seconds is None else duration(seconds)))
    cells.append(_cell(most, size(most)))
    cells.append(_cell(len(row["seeds"]), seeds(row)))
    return f"<tr>{''.join(cells)}</tr>"


def _cell(value: float | None, shown: str) -> str:
    """`data-value` is the number as `result.json` has it, by which the table is sorted."""
    return f'<td data-value="{"" if value is None else repr(value)}">{shown}</td>'


def _figures(found: dict) -> str:
    """The figures of every metric and cost, of which those of the valid_metric are shown until another one is chosen."""
    names, rows, first = found["comparison"]["metrics"], found["runs"], found["comparison"]["valid_metric"]
    if not any(row["seeds"] for row in rows):
        return ""
    figures = []
    for name in names:
        kinds = [(None, "In validation while training", curves(rows, name)), (None, "In the test", bars(rows, name))]
        kinds += [(cost, f"In the test over {about}", costs(rows, name, cost)) for cost, about in COSTS.items()]
        for cost, caption, drawn in kinds:
            if drawn:
                at = f' data-cost="{cost}"' if cost else ""
                hidden = "" if name == first and cost in (None, "seconds") else " hidden"
                figures.append(
                    f'<figure data-metric="{escape(name)}"{at}{hidden}>'
                    f"<figcaption>{escape(metric_name(name))}: {caption[0].lower()}{caption[1:]}</figcaption>{drawn}</figure>"
                )
    return "\n".join([
        "<h2>Figures</h2>",
        '<p class="choose">' + _select("metric", {name: metric_name(name) for name in names}, first)
        + _select("cost", COSTS, "seconds") + "</p>",
        '<div class="charts">', *figures, "</div>",
    ])  # fmt: skip


def _select(name: str, choices: dict[str, str], chosen: str) -> str:
    options = "".join(
        f'<option value="{escape(value)}"{" selected" if value == chosen else ""}>{escape(shown)}</option>'
        for value, shown in choices.items()
    )
    return f'<label>{name} <select id="{name}" autocomplete="off">{options}</select></label>'
