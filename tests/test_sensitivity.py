"""`analyze sensitivity`: lines of runs that differ in one key alone, with the numbers of the comparison."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import matplotlib.image
import pytest
import yaml

from recbole_hatllm.analysis import sensitivity
from recbole_hatllm.analysis.command import analyze
from recbole_hatllm.compare import compare
from recbole_hatllm.errors import ConfigError
from tests.conftest import random_sequences, write_dataset

GRID = [(0, 1), (1, 1), (2, 1), (1, 0), (1, 2)]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict:
    """A comparison like Figure 5 made small, beside BPR with two sizes and a MF that is like no other."""
    root = tmp_path_factory.mktemp("sensitivity")
    write_dataset(root / "data", "own", random_sequences(24, 20))
    quick = {"backbone": "random-tiny", "dtype": "float32", "train_steps": 2, "eval_step": 2, "train_batch_size": 8}
    runs = [
        {"name": f"{n} IN {m} CR", "model": "HatLLM", "keys": {**quick, "n_in": n, "n_cr": m}}
        for n, m in reversed(GRID)
    ]
    runs[1]["keys"].pop("n_in")  # left to a default, of which the run's own config tells
    runs[1]["name"] = "default"
    runs += [{"name": f"BPR {size}", "model": "BPR", "keys": {"embedding_size": size}} for size in (8, 16)]
    runs += [{"name": "MF", "model": "MF", "keys": {"embedding_size": 8}}]
    suite = {"dataset": "own", "seeds": [0, 1], "keys": {"epochs": 1}, "runs": runs}
    (root / "suite.yaml").write_text(yaml.safe_dump(suite))
    keys = {"data_path": str(root / "data"), "runs_dir": str(root / "runs")}
    found = compare(suite=root / "suite.yaml", config_dict=keys)
    return {"root": root, "found": found, "keys": keys, "suite": str(root / "suite.yaml")}


def row_of(made: dict, name: str) -> dict:
    return next(row for row in made["found"]["runs"] if row["name"] == name)


def test_the_lines_are_those_of_the_comparison(made):
    out = made["root"] / "out"
    said = analyze(["sensitivity"], {"suite": made["suite"], **made["keys"], "folder": str(out)})
    content = json.loads((out / "sensitivity.json").read_text())
    rows = [row for row in content["rows"] if row["metric"] == "ndcg@10"]
    lines: dict[tuple, list] = {}
    for row in rows:
        lines.setdefault((row["key"], row["model"], row["fixed"]), []).append((row["value"], row["run"]))
        own = row_of(made, row["run"])["metrics"]["ndcg@10"]
        assert row["mean"] == own["mean"] and [row["low"], row["high"]] == own["interval"] and row["seeds"] == 2
    assert lines == {
        ("n_in", "HatLLM", "n_cr 1"): [(0, "0 IN 1 CR"), (1, "1 IN 1 CR"), (2, "2 IN 1 CR")],
        ("n_cr", "HatLLM", "n_in 1"): [(1, "1 IN 1 CR"), (2, "1 IN 2 CR")],
        ("embedding_size", "BPR", ""): [(8, "BPR 8"), (16, "BPR 16")],
    }
    assert row_of(made, "default")["seeds"] == [0, 1]  # it has the default n_in, 4, and so is alone
    with (out / "sensitivity.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(content["rows"]) == 4 * len(rows)
    assert float(table[3]["mean"]) == content["rows"][3]["mean"]
    assert matplotlib.image.imread(out / "sensitivity.png").ndim == 3 and (out / "sensitivity.svg").is_file()
    assert content["dataset"] == "own" and content["test_rows"] == 24
    assert "NDCG@10" in said and f"figure and numbers: {out}" in said and "left out" not in said


def test_a_folder_of_a_comparison_does_too_wherever_it_is(made):
    moved = made["root"] / "elsewhere"
    shutil.copytree(made["root"] / "runs", moved)
    (place,) = moved.glob("compare-*")
    found = json.loads((place / "result.json").read_text())
    for row in found["runs"]:
        row["folders"] = [f"gone/{Path(folder).name}" for folder in row["folders"]]
    (place / "result.json").write_text(json.dumps(found))
    said = analyze(["sensitivity"], {"suite": str(place), "metric": "HR@5"})
    assert "HR@5" in said and (moved / f"{place.name}-sensitivity" / "sensitivity.png").is_file()


def test_the_figure_has_a_panel_a_key_and_the_values_on_it(made):
    (place,) = (made["root"] / "runs").glob("compare-*")
    rows = sensitivity.numbers(made["found"], place)
    panels = sensitivity.figure(rows, "hit@10").axes
    assert [panel.get_xlabel() for panel in panels] == ["n_cr", "n_in", "embedding_size"]
    line = next(panel for panel in panels if panel.get_xlabel() == "n_in").lines[0]
    assert line.get_xdata().tolist() == [0, 1, 2]
    names = [f"{n} IN 1 CR" for n in range(3)]
    assert line.get_ydata().tolist() == [row_of(made, name)["metrics"]["hit@10"]["mean"] for name in names]
    words = [
        {**row, "value": {8: "small", 16: None}.get(row["value"])} for row in rows if row["key"] == "embedding_size"
    ]
    (panel,) = sensitivity.figure(words, "hit@10").axes
    assert [text.get_text() for text in panel.get_xticklabels()] == ["small", "null"]
    assert line.get_linestyle() == "-" and panel.lines[0].get_linestyle() == "None"  # texts have no order


def test_long_texts_below_a_figure_do_not_run_into_each_other():
    orders = ("IN-OR-CR", "IN-CR-OR", "OR-IN-CR", "OR-CR-IN", "CR-IN-OR", "CR-OR-IN")
    shared = {"key": "order", "metric": "hit@10", "model": "HatLLM", "fixed": "", "low": 0.1, "high": 0.3, "seeds": 1}
    picture = sensitivity.figure([{**shared, "run": name, "value": name, "mean": 0.2} for name in orders], "hit@10")
    labels = picture.axes[0].get_xticklabels()
    assert [label.get_text() for label in labels] == list(orders)
    assert all(label.get_rotation() == 40 for label in labels)


def test_a_suite_that_was_not_run_names_the_command(made):
    asked = {"suite": "figure5", "dataset": "ml-100k", "seeds": "0,1", "runs_dir": str(made["root"] / "none")}
    with pytest.raises(
        ConfigError, match=r"run `python run_hatllm\.py compare --suite=figure5 --dataset=ml-100k --seeds=0,1 .*`"
    ):
        analyze(["sensitivity"], asked)
    with pytest.raises(ConfigError, match="no suite figure6"):
        analyze(["sensitivity"], {**asked, "suite": "figure6"})


@pytest.mark.parametrize("asked, message", [
    ({"metric": "hr@7"}, r"metric is hit@7.*hit@5, hit@10"),
    ({"seeds": "0"}, r"no runs of this comparison"),
    ({"n_in": 3}, r"no runs of this comparison"),
    ({"n_inn": 3}, r"n_inn.*n_in"),
])  # fmt: skip
def test_what_is_refused(made, asked, message):
    with pytest.raises(ConfigError, match=message):
        analyze(["sensitivity"], {"suite": made["suite"], **made["keys"], **asked})


def test_runs_that_differ_in_nothing_are_no_figure(made):
    keys = {**made["keys"], "epochs": 1}
    found = compare(["BPR", "MF"], "own", [0], config_dict=keys)
    with pytest.raises(ConfigError, match="No key differs"):
        analyze(["sensitivity"], {"suite": found["folder"]})
