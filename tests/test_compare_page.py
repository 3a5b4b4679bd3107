"""The page of a comparison: its numbers against `result.json`, its figures by their geometry, and all of it in a real browser."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import combinations
from math import log
from pathlib import Path

import pytest

from recbole_hatllm import compare_page
from recbole_hatllm.compare import compare
from recbole_hatllm.compare_charts import WIDTH, Axis, bars, costs, curves
from tests.test_compare import keys, made_up  # noqa: F401

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")
NAMES = ["hit@10", "ndcg@10"]


class Parts(HTMLParser):
    """The cells of the table with their `data-value` and text, and every tag with its attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.rows: list[list[list[str]]] = []
        self.tags: list[tuple[str, dict]] = []
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append([dict(attrs).get("data-value"), ""])
            self._cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data):
        if self._cell:
            self.rows[-1][-1][1] += data


def many() -> dict:
    """A summary with two metrics, curves, runs that cost nothing, names that must be escaped and a failure."""
    found = copy.deepcopy(made_up())
    found["comparison"] |= {"metrics": NAMES, "dataset": "<tiny>"}
    found["runs"][0]["name"] = 'A <img src="http://x.invalid/a.png" onerror="document.title=1"> & co'
    found["runs"][2]["failures"][0]["reason"] = "<script>alert(1)</script>"
    for number, row in enumerate(found["runs"]):
        row["metrics"]["hit@10"] = {**row["metrics"]["ndcg@10"], "interval": None}
        if row["metrics"]["ndcg@10"]["mean"] is not None:
            row["metrics"]["hit@10"]["mean"] = (0.3, 0.1, None, 0.2)[number]
        row["trainable_parameters"] = (5000, 100, None, 0)[number]
        row["seconds"] = (61.0, 7.5, None, 700.0)[number]
        if row["seeds"]:
            row["curves"] = [
                {"seed": seed, "steps": [0, 10, 20], "valid": {name: [0.01, 0.02 + seed / 100, 0.03] for name in NAMES}}
                for seed in row["seeds"]
            ]
        else:
            row |= {"peak_memory": None}
    found["others"] = [{**found["others"][0], "baseline": "D", "p_holm": 0.25}]
    return found


def test_the_numbers_are_those_of_the_result(keys):  # noqa: F811
    found = compare(["BPR", "MF"], "tiny", [0, 1], config_dict=keys)
    folder = Path(found["folder"])
    stored = json.loads((folder / "result.json").read_text())
    head, *rows = Parts((folder / "index.html").read_text(encoding="utf-8")).rows
    assert [text for _, text in head][:5] == ["run", "HR@5", "HR@10", "NDCG@5", "NDCG@10"]
    assert len(rows) == len(stored["runs"]) == 6
    tests = {test["baseline"]: test["p_holm"] for test in stored["others"]}
    for row, run in zip(rows, stored["runs"]):
        values = [value for value, _ in row]
        assert values[0] == run["name"]
        for (value, text), metric in zip(row[1:5], run["metrics"].values(), strict=True):
            assert float(value) == metric["mean"]
            assert text == "{:.4f}".format(metric["mean"]) + "{:.4f}-{:.4f}".format(*metric["interval"])
        assert values[5] == ("" if run["name"] not in tests else repr(tests[run["name"]]))
        assert list(map(float, values[6:9])) == [run["trainable_parameters"], run["seconds"], run["peak_memory"]]
        assert values[9] == str(len(run["seeds"]))


def test_the_page_grows_with_the_runs(keys, monkeypatch):  # noqa: F811
    """After every run it says what there is."""
    states, write = [], compare_page.write

    def note(found, folder):
        write(found, folder)
        states.append(re.search(r"<p>(\d of 2 runs finished[^<]*)", (folder / "index.html").read_text())[1])

    monkeypatch.setattr("recbole_hatllm.compare_page.write", note)
    compare(["BPR", "MF"], "tiny", [0], config_dict=keys, floors=False)
    assert [state[:6] for state in states] == ["0 of 2", "1 of 2", "2 of 2"]
    assert "1 still to come" in states[1] and "to come" not in states[2]


def test_titles_and_reasons_are_escaped_and_nothing_is_loaded():
    found = many()
    text = compare_page.page(found)
    parts = Parts(text)
    assert found["runs"][0]["name"] in parts.rows[1][0][1] and parts.rows[1][0][0] == found["runs"][0]["name"]
    assert not [attrs for _, attrs in parts.tags if "src" in attrs or "onerror" in attrs]
    assert [tag for tag, _ in parts.tags].count("script") == 1 and not {"img", "link"} & {tag for tag, _ in parts.tags}
    links = [attrs["href"] for tag, attrs in parts.tags if tag == "a"]
    assert links == ["table.md", "table.csv", "table.tex", "result.json"]
    assert "url(" not in text and "@import" not in text and "default-src 'none'" in text


def test_best_and_second():
    rows = Parts(compare_page.page(many())).rows
    text = compare_page.page(many())
    assert re.findall(r"<b>(0\.\d+)</b>", text) == ["0.3000", "0.1000"]
    assert re.findall(r"<u>(0\.\d+)</u>", text) == ["0.0800", "0.2000"]
    assert rows[3][1] == ["", "failed"] and rows[3][-2:] == [["", "-"], ["0", "0/2"]]


def test_every_figure_of_every_metric_is_there_and_those_of_valid_metric_are_shown():
    tags = [attrs for tag, attrs in Parts(compare_page.page(many())).tags if tag == "figure"]
    assert [(t["data-metric"], t.get("data-cost")) for t in tags] == [
        (name, cost) for name in NAMES for cost in (None, None, "seconds", "trainable_parameters")
    ]
    assert [t["data-metric"] for t in tags if "hidden" not in t] == ["ndcg@10"] * 3
    for state in ("runs", "curves"):  # without any run, and without any curve
        found = many()
        for row in found["runs"]:
            row["curves"] = []
            if state == "runs":
                row |= {"seeds": [], "metrics": {name: dict.fromkeys(("mean", "interval", "paper")) for name in NAMES}}
        assert ("<figure" in compare_page.page(found)) is (state == "curves")


def test_bars_are_as_long_as_their_means():
    drawn = bars(many()["runs"], "hit@10")
    lengths = [float(width) for width in re.findall(r'<rect x="[\d.]+" y="[\d.]+" width="([\d.]+)" height="16"', drawn)]
    assert [length / lengths[0] for length in lengths] == pytest.approx([1, 0.1 / 0.3, 0.2 / 0.3], abs=1e-3)
    low, high, mean = 0.08 - 0.01, 0.08 + 0.02, 0.08
    drawn = bars(many()["runs"], "ndcg@10")
    rects = re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="16"', drawn)
    ends = re.findall(r'd="M([\d.]+) [\d.]+H([\d.]+)M', drawn)[1]
    start, width = map(float, rects[1])
    scale = width / mean
    assert [(float(end) - start) / scale for end in ends] == pytest.approx([low, high], abs=1e-3)
    assert "the paper&#x27;s 0.1250" in drawn and drawn.count("<title>") == 3


def test_curves_have_a_line_for_each_run_and_seed():
    drawn = curves(many()["runs"], "ndcg@10")
    lines = re.findall(r'<title>([^<]*)</title><polyline points="([^"]*)"', drawn)
    assert len(lines) == 6 and lines[2][0] == "B|2, seed 0"
    first, second = ([tuple(map(float, point.split(","))) for point in line.split()] for _, line in lines[:2])
    assert first[0] == second[0] and first[2] == second[2] and second[1][1] < first[1][1]  # higher is further up
    assert first[1][0] - first[0][0] == pytest.approx(first[2][0] - first[1][0], abs=0.2)
    dashes = re.findall(r'stroke="(#\w+)" stroke-width="1\.6"(?: stroke-dasharray="([^"]*)")?/><', drawn)
    assert len(set(dashes)) == 3  # three runs with a result
    slow = many()["runs"]
    slow[0]["curves"][0]["steps"] = [0, 1000, 2000]
    assert "logarithmic" in curves(slow, "ndcg@10") and "logarithmic" not in drawn


def test_costs_stand_on_a_logarithmic_axis_and_nothing_at_its_left():
    drawn = costs(many()["runs"], "hit@10", "trainable_parameters")
    found = [float(x) for x in re.findall(r'translate\(([\d.]+) [\d.]+\)" fill', drawn)]
    assert found[2] < found[1] < found[0] < WIDTH and "D: 0.2000, trainable parameters 0" in drawn
    seconds = costs(many()["runs"], "hit@10", "seconds")
    a, b, d = (float(x) for x in re.findall(r'translate\(([\d.]+) [\d.]+\)" fill', seconds))
    assert (a - b) / (d - a) == pytest.approx(log(61 / 7.5) / log(700 / 61), abs=0.01)


def test_names_do_not_stand_on_each_other_where_costs_crowd():
    row = many()["runs"][0]
    crowd = [{**copy.deepcopy(row), "name": f"row {number:02}"} for number in range(12)]
    for number, one in enumerate(crowd):
        one["metrics"]["hit@10"]["mean"] += 0.0001 * number
    alone = {**copy.deepcopy(row), "name": "alone", "seconds": 1.0}
    alone["metrics"]["hit@10"]["mean"] = 0.1
    drawn = costs([*crowd, alone], "hit@10", "seconds")
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">(row \d\d|alone)<', drawn)
    ends = {"start": (0.0, 1.0), "middle": (-0.5, 0.5), "end": (-1.0, 0.0)}
    boxes = []
    for x, y, anchor, name in found:  # letters of at least 6 pixels, lines of 10
        left, right = (float(x) + 6 * len(name) * share for share in ends[anchor])
        boxes.append((left, right, float(y) - 10, float(y)))
    for one, other in combinations(boxes, 2):
        assert min(one[1], other[1]) <= max(one[0], other[0]) or min(one[3], other[3]) <= max(one[2], other[2])
    assert 2 <= len(boxes) < 13 and "alone" in [name for *_, name in found]
    assert drawn.count("<title>row") == 12  # every run is there, with its name under the mouse


def test_ticks_are_round_and_inside():
    assert Axis(0, 0.1, 0, 100).ticks() == pytest.approx([0, 0.02, 0.04, 0.06, 0.08, 0.1])
    assert Axis(1, 5000, 0, 100, log=True).ticks() == [1, 10, 100, 1000]
    assert Axis(0, 2000, 0, 100, log=True, shift=1.0).ticks() == [0, 1, 10, 100, 1000]
    assert Axis(2, 9, 0, 100, log=True).at(2) == 0 and Axis(2, 9, 0, 100, log=True).at(9) == 100
    assert Axis(5, 5, 0, 100).at(5) == 50  # one value alone stands in the middle


# --- In a browser


def rendered(page: str, folder: Path, script: str) -> tuple[str, str]:
    """The DOM behind `script`, and what the browser says."""
    page = page.replace("</body>", f"<script>{script}</script></body>")
    (folder / "index.html").write_text(page, encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += [
        "--enable-logging=stderr",
        "--virtual-time-budget=2000",
        "--dump-dom",
        f"file://{folder / 'index.html'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


WATCH = """
document.body.dataset.loaded = performance.getEntriesByType("resource").length;
const press = (name) => [...document.querySelectorAll("thead button")].find((b) => b.textContent === name).click();
"""


def order(dom: str) -> list[str]:
    return [row[0][0][0] for row in Parts(dom).rows[1:]]


@browser
@pytest.mark.parametrize("presses, expected", [
    ([], "ABCD"), (["HR@10"], "ADBC"), (["HR@10"] * 2, "BDAC"), (["time"], "BADC"), (["time", "parameters"], "DBAC"),
    (["run"], "ABCD"), (["run"] * 2, "DCBA"), (["memory"], "ABDC"), (["p against A_1 & co"], "DABC"),
])  # fmt: skip
def test_a_click_sorts_the_table(tmp_path, presses, expected):
    """What has no figure is last, whichever way; a second click turns the order."""
    dom, said = rendered(compare_page.page(many()), tmp_path, WATCH + "".join(f"press({name!r});" for name in presses))
    assert "".join(order(dom)) == expected
    assert "CONSOLE" not in said, said
    assert 'data-loaded="0"' in dom and "<title>&lt;tiny&gt;" in dom
    sorts = [attrs["aria-sort"] for tag, attrs in Parts(dom).tags if tag == "th" and "aria-sort" in attrs]
    assert len(sorts) == bool(presses)


@browser
def test_a_console_error_and_a_load_from_elsewhere_would_be_seen(tmp_path):
    broken = compare_page.page(many()).replace("<main>", '<main><img src="http://x.invalid/a.png">')
    _, said = rendered(broken, tmp_path, "missing();")
    assert "CONSOLE" in said and "Content Security Policy" in said and "missing is not defined" in said


@browser
def test_the_chosen_metric_and_cost_are_shown(tmp_path):
    script = """
    const pick = (id, value) => { const s = document.getElementById(id); s.value = value; s.dispatchEvent(new Event("change")); };
    pick("metric", "hit@10"); pick("cost", "trainable_parameters");
    """
    dom, said = rendered(compare_page.page(many()), tmp_path, script)
    shown = [a for tag, a in Parts(dom).tags if tag == "figure" and "hidden" not in a]
    assert [(a["data-metric"], a.get("data-cost")) for a in shown] == [
        ("hit@10", None), ("hit@10", None), ("hit@10", "trainable_parameters"),
    ]  # fmt: skip
    assert "CONSOLE" not in said


@browser
def test_the_keyboard_reaches_everything(tmp_path):
    """All that can be pressed can be focused, in the order of the page; the page is no wider than the screen."""
    script = """
    const all = [...document.querySelectorAll("a, button, select, [tabindex]")];
    const seen = all.filter((e) => (e.focus(), document.activeElement === e));
    document.body.dataset.seen = seen.map((e) => e.tagName[0]).join("");
    document.body.dataset.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
    """
    dom, _ = rendered(compare_page.page(many()), tmp_path, script)
    (found,) = (attrs for tag, attrs in Parts(dom).tags if tag == "body")
    assert found["data-seen"] == "AAAAD" + "B" * 8 + "SS" and found["data-wide"] == "0"
