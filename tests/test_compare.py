"""Comparisons of real small runs: complete, stoppable anywhere, honest about failures; statistics against SciPy and by hand."""

import csv
import json
import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from recbole_hatllm import identity, lineage, quick_start, schema
from recbole_hatllm import suite as suites
from recbole_hatllm.compare import compare
from recbole_hatllm.compare_report import latex, markdown, terminal
from recbole_hatllm.config import Config
from recbole_hatllm.data.sources import catalogue
from recbole_hatllm.errors import ConfigError, HatError
from recbole_hatllm.intervals import bootstrap, gains, of_mean
from recbole_hatllm.model.hatllm import HatLLM
from recbole_hatllm.significance import compare_rows, holm
from tests.conftest import hears_ctrl_c, random_sequences, write_dataset
from tests.test_cli import ROOT, cli, refused

FLOORS = ["Pop", "MarkovChain", "TitleTFIDF", "TitleMarkov"]


@pytest.fixture
def keys(tiny, tmp_path) -> dict:
    """Keys for all runs: quick ones on the tiny data."""
    return {"data_path": tiny["data_path"], "runs_dir": str(tmp_path / "runs"), "epochs": 2, "train_batch_size": 64}


@pytest.fixture
def small(keys) -> dict:
    """Arguments of a comparison of two models with two seeds beside the floors: eight runs of a second."""
    return {"models": ["SASRecFast", "BPR"], "dataset": "tiny", "seeds": [0, 1], "config_dict": keys}


@pytest.fixture
def began(monkeypatch) -> list[str]:
    """The models of the runs that are begun from now on, in their order."""
    models = []

    def run(model, *arguments, **keys):
        models.append(model)
        return quick_start.run(model, *arguments, **keys)

    monkeypatch.setattr("recbole_hatllm.compare.run", run)
    return models


def suite_file(folder: Path, **said) -> str:
    file = folder / "suite.yaml"
    runs = [{"name": "SASRec", "model": "SASRecFast"}, {"name": "BPR", "model": "BPR"}]
    file.write_text(yaml.safe_dump({"dataset": "tiny", "seeds": [0], "floors": False, "runs": runs, **said}))
    return str(file)


def lasting(found: dict) -> dict:
    """A summary without what differs between two makings of the same."""
    runs = [
        {**run, "seconds": 0, "peak_memory": 0, "folders": [Path(folder).name for folder in run["folders"]]}
        for run in found["runs"]
    ]
    return {**found, "folder": "", "runs": runs}


# --- Runs


def test_a_comparison_runs_everything_once(small, began, capsys):
    found = compare(**small)
    assert began == [*FLOORS, "SASRecFast", "BPR", "SASRecFast", "BPR"]  # floors know no seed
    assert [run["name"] for run in found["runs"]] == [*FLOORS, "SASRecFast", "BPR"]
    assert [run["seeds"] for run in found["runs"]] == [[0]] * 4 + [[0, 1]] * 2
    folder = Path(found["folder"])
    assert json.loads((folder / "result.json").read_text()) == {k: v for k, v in found.items() if k != "folder"}
    out = capsys.readouterr().out
    assert re.findall(r"^run (\d)/8: ", out, re.M) == [str(n) for n in range(1, 9)]
    assert re.search(r"^run 8/8: BPR, seed 1, about \d+ s left$", out, re.M)
    for row in found["runs"]:
        results = [json.loads((Path(place) / "result.json").read_text()) for place in row["folders"]]
        ranks = np.stack([np.load(Path(place) / "ranks.npz")["rank"] for place in row["folders"]])
        ends = bootstrap(ranks, row["metrics"])
        for name, metric in row["metrics"].items():
            assert metric["mean"] == pytest.approx(np.mean([result["test"][name] for result in results]), abs=1e-6)
            assert metric["interval"] == ends[name]
        assert row["trainable_parameters"] == results[0]["trainable_parameters"]
        assert row["seconds"] == pytest.approx(np.mean([sum(result["seconds"].values()) for result in results]))
        assert row["peak_memory"] == max(result["peak_memory"] for result in results) > 10**7
        for curve, result in zip(row["curves"], (result for result in results if result["curve"]), strict=True):
            assert curve["seed"] == result["seed"] and curve["steps"] == [point["step"] for point in result["curve"]]
            assert curve["valid"]["ndcg@10"] == [point["ndcg@10"] for point in result["curve"]]
        assert len(results) == 1 or results[0]["seed"] != results[1]["seed"]
    assert found["rows"] == 30 and found["candidates"] == 20 and found["history_masked"] is False

    assert compare(**small) == found and len(began) == 8  # nothing is left to do
    assert "8 of them finished before" in capsys.readouterr().out


def test_other_suites_find_the_same_runs(small, began, keys, tmp_path):
    compare(**small)
    del began[:]
    runs = [{"name": "mine", "model": "BPR"}, {"name": "smaller", "model": "BPR", "keys": {"embedding_size": 8}}]
    compare(suite=suite_file(tmp_path, runs=runs, seeds=[1, 2]), config_dict=keys)
    assert began == ["BPR"] * 3  # mine with seed 1 is there


def test_changed_keys_and_data_run_again_and_places_do_not(small, began, tiny_data, tmp_path):
    small = {**small, "models": ["BPR"], "seeds": [0]}
    compare(**small)
    del began[:]
    change = lambda **keys: {**small, "config_dict": {**small["config_dict"], **keys}}  # noqa: E731
    compare(**change(use_gpu=False, show_progress=False))
    assert began == []
    compare(**change(epochs=3))
    assert began == ["BPR"]  # floors take only the protocol from the keys for all
    del began[:]
    compare(**change(mask_history=True))
    assert began == [*FLOORS, "BPR"]
    del began[:]
    for name in ("inter", "item"):
        text = (tiny_data / "tiny" / f"tiny.{name}").read_text(encoding="utf-8")
        (tmp_path / "copy" / "tiny").mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / "tiny" / f"tiny.{name}").write_text(text, encoding="utf-8")
    compare(**change(data_path=str(tmp_path / "copy")))
    assert began == []
    with (tmp_path / "copy" / "tiny" / "tiny.inter").open("a", encoding="utf-8") as file:
        file.write("u0\ti1\t1100000000\n")
    compare(**change(data_path=str(tmp_path / "copy")))
    assert began == [*FLOORS, "BPR"]


def test_the_code_of_a_run_is_part_of_what_it_is(tiny, monkeypatch):
    base = {"data_path": tiny["data_path"]}
    configs = {model: Config(model, "tiny", config_dict=base) for model in ("SASRecFast", "Pop")}

    def digests():
        identity._code.cache_clear()
        return {model: identity.digest(config, "data") for model, config in configs.items()}

    before, read = digests(), Path.read_text
    for file, changed in [
        ("sasrecfast", {"SASRecFast"}), ("evaluation", {"SASRecFast", "Pop"}), ("rows", {"SASRecFast", "Pop"}),
        ("compare_report", set()), ("cli", set()),
    ]:  # fmt: skip
        with monkeypatch.context() as patch:
            more = lambda path, *a, file=file, **k: read(path, *a, **k) + ("\n# changed" if path.stem == file else "")  # noqa: E731
            patch.setattr(Path, "read_text", more)
            now = digests()
        assert {model for model in now if now[model] != before[model]} == changed, file
    identity._code.cache_clear()


KILLS = {
    "before a run": "place = 'recbole_hatllm.compare.run'",
    "inside a run": "place = 'recbole_hatllm.trainer.StepTrainer._save_state'",
    "before the result": "place = 'recbole_hatllm.quick_start.measurement.leave_written'",
    "before the table": "place = 'recbole_hatllm.compare_report.write'",
}
DIE = """
import os, signal, sys, json
from unittest import mock
from pkgutil import resolve_name
import torch
from recbole_hatllm.compare import compare
{place}
arguments, turn = json.loads(sys.argv[1]), int(sys.argv[2])
owner, _, name = place.rpartition('.')
real, calls = getattr(resolve_name(owner), name), []
def die(*a, **k):
    calls.append(0)
    if name == '_save_state':
        real(*a, **k)
    if len(calls) == turn:
        os.kill(os.getpid(), signal.SIGKILL)
    return None if name == '_save_state' else real(*a, **k)
torch.set_num_threads(1)
with mock.patch(place, die):
    compare(**arguments)
"""


@pytest.mark.parametrize(
    "where, turn", [("before a run", 3), ("inside a run", 5), ("before the result", 4), ("before the table", 4)]
)
def test_a_killed_comparison_goes_on_to_the_same_table(small, keys, tmp_path, began, where, turn):
    small["config_dict"] = {**keys, "hidden_size": 10, "n_heads": 3, "embedding_size": 8}  # SASRecFast fails
    small["models"] = ["BPR", "SASRecFast", "MF"]
    whole = compare(**{**small, "config_dict": {**small["config_dict"], "runs_dir": str(tmp_path / "whole")}})
    del began[:]
    code = DIE.format(place=KILLS[where])
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(small), str(turn)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == -9, done.stderr
    begun = {file.parent for file in (tmp_path / "runs").glob("*/config.yaml")}
    assert any(not (folder / "result.json").is_file() for folder in begun) == (
        where in ("inside a run", "before the result")
    )
    found = compare(**small)
    assert lasting(found) == lasting(whole)
    assert found["runs"][5]["failures"]
    assert len(began) == 10 - len(begun)  # finished runs are read, a begun one is gone on with
    for name in ("table.md", "table.tex"):
        texts = [
            re.sub(r"\d+ s [|&]|[\d.]+ [MG]B [|&]", "", (Path(f["folder"]) / name).read_text()) for f in (found, whole)
        ]
        assert texts[0] == texts[1]


def test_a_failed_run_is_a_row_and_is_tried_again(small, keys, monkeypatch, capsys):
    def run(model, *arguments, config_dict):
        if model == "BPR" and config_dict["seed"] == 1:
            raise RuntimeError("CUDA out of memory.\nTried")
        if model == "SASRecFast":
            raise HatError("Nothing\nworks.")
        return quick_start.run(model, *arguments, config_dict=config_dict)

    with monkeypatch.context() as patch:
        patch.setattr("recbole_hatllm.compare.run", run)
        found = compare(**small)
    fast, bpr = found["runs"][-2:]
    assert fast["failures"] == [{"seed": seed, "reason": "Nothing works."} for seed in (0, 1)] and fast["seeds"] == []
    assert bpr["failures"] == [{"seed": 1, "reason": "RuntimeError: CUDA out of memory."}] and bpr["seeds"] == [0]
    for form in (terminal, markdown, latex):
        assert "SASRecFast, seed 0, failed: Nothing works." in form(found)
    assert re.search(r"^SASRecFast +failed.* 0/2$", terminal(found), re.M)
    assert re.search(r"^BPR .* 1/2$", terminal(found), re.M)
    assert "failed: Nothing works." in capsys.readouterr().out
    assert not any(run["failures"] for run in compare(**small)["runs"])


def test_a_comparison_of_failures_alone_ends_in_one_sentence(keys, tmp_path, monkeypatch):
    def run(*_, **__):
        raise HatError("Nothing works.")

    monkeypatch.setattr("recbole_hatllm.compare.run", run)
    with pytest.raises(HatError, match=r"No run of suite came to an end: Nothing works\."):
        compare(suite=suite_file(tmp_path), config_dict=keys)


def test_runs_of_other_rows_are_not_compared(keys, tmp_path, monkeypatch):
    write_dataset(tmp_path / "other", "tiny", random_sequences(29, 20, seed=1))

    def run(model, *arguments, config_dict):
        other = {"data_path": str(tmp_path / "other")} if model == "BPR" else {}
        return quick_start.run(model, *arguments, config_dict={**config_dict, **other})

    monkeypatch.setattr("recbole_hatllm.compare.run", run)
    found = compare(suite=suite_file(tmp_path), config_dict=keys)
    (failure,) = found["runs"][1]["failures"]
    assert re.search(r"other.*SASRec, seed 0 \(29 rows.*30.*cannot be paired", failure["reason"])
    assert found["runs"][1]["metrics"]["hit@10"]["mean"] is None and found["best"] == []


def test_the_command_stops_at_ctrl_c_and_goes_on(keys, tmp_path):
    command = ["compare", f"--suite={suite_file(tmp_path)}", *(f"--{key}={value}" for key, value in keys.items())]
    code = (
        "import signal, sys\nfrom recbole_hatllm import cli, compare\nfirst = compare.run\n"
        "def run(model, *a, **k):\n    if model == 'BPR': signal.raise_signal(signal.SIGINT)\n"
        "    return first(model, *a, **k)\n"
        "compare.run = run\nsys.exit(cli.main(sys.argv[1:]))"
    )
    started = [sys.executable, "-c", code, *command]
    done = subprocess.run(started, capture_output=True, text=True, cwd=ROOT, preexec_fn=hears_ctrl_c)
    assert done.returncode == 130 and "the same command goes on" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr
    done = cli(*command)
    assert done.returncode == 0, done.stderr
    assert (
        "1 of them finished before" in done.stdout
        and "run 2/2: BPR, seed 0" in done.stdout
        and "run 1/2" not in done.stdout
    )
    (folder,) = (tmp_path / "runs").glob("compare-suite-tiny-*")
    assert f"tables: {folder}/table.md" in done.stdout


def test_the_command_takes_models_and_seeds(keys, tmp_path):
    options = [f"--{key}={value}" for key, value in keys.items()]
    done = cli("compare", "--models=BPR,MF", "--dataset=tiny", "--seeds=3,4", "--method=MF", "--floors=false", *options,
               f"--folder={tmp_path / 'here'}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "here" / "result.json").read_text())
    assert [(run["name"], run["seeds"]) for run in found["runs"]] == [("BPR", [3, 4]), ("MF", [3, 4])]
    assert {test["method"] for test in found["best"]} == {"MF"} == {test["method"] for test in found["others"]}
    assert "--models" in refused("compare", "--dataset=tiny", "--seeds=0", *options)
    assert "seeds" in refused("compare", "--models=BPR", "--dataset=tiny", *options)
    assert "holds another" in refused("compare", "--models=BPR", "--dataset=tiny", "--seeds=3", *options,
                                      f"--folder={tmp_path / 'here'}")  # fmt: skip


# --- Suites

BAD_SUITES = [
    ({"runs": [{"name": "a", "model": "SASReck"}]}, r"a: There is no model 'SASReck'.*SASRec"),
    ({"runs": [{"name": "a", "model": "BPR"}, {"name": "a", "model": "MF"}]}, r"two runs named a"),
    ({"runs": []}, r"no runs"),
    ({"runs": ["BPR"]}, r"'BPR' names no model"),
    ({"runs": [{"name": "a", "model": "BPR", "key": {}}]}, r"'key': did you mean keys\?"),
    ({"runs": [{"name": "a", "model": "BPR", "keys": {"embeding_size": 8}}]}, r"embeding_size.*embedding_size"),
    ({"runs": [{"name": "a", "model": "BPR", "keys": {"n_in": 1}}]}, r"a: BPR does not read the key n_in"),
    ({"runs": [{"name": "a", "model": "LLaRA", "keys": {"sasrec_keys": {"n_layer": 1}}}]}, r"a: LLaRA needs .*n_layer"),
    ({"runs": [{"name": "a", "model": "HatLLMSASRec", "keys": {"hatllm_keys": {"n_cr": 1}}}]}, r"a: hatllm_keys has n_cr"),
    ({"runs": [{"name": "a", "model": "BPR", "keys": {"learning_rate": "fast"}}]}, r"learning_rate is 'fast'"),
    ({"runs": [{"name": "a", "model": "BPR", "keys": {"protocol": "windows"}}]}, r"a sets protocol to 'windows'.*whole suite"),
    ({"runs": [{"name": "a", "model": "BPR", "keys": {"mask_history": True}}]}, r"a sets mask_history to True"),
    ({"runs": [{"name": "a", "model": "BPR", "keys": {"eval_sample": 9}}]}, r"a sets eval_sample to 9"),
    ({"runs": [{"name": "a", "model": "BPR", "keys": {"user_inter_num_interval": "[9,inf)"}}]}, r"a sets user_inter_num"),
    ({"runs": [{"name": "a", "model": "BPR", "keys": {"MAX_ITEM_LIST_LENGTH": 5}}]}, r"a sets MAX_ITEM_LIST_LENGTH to 5"),
    ({"runs": [{"name": "a", "model": "BPR", "keys": {"topk": [3]}}]}, r"a.*(topk|valid_metric)"),
    ({"runs": [{"name": "a", "model": "BPR", "keys": {"seed": 3}}]}, r"a sets seed to 3.*by seeds"),
    ({"runs": [{"name": "a", "model": "BPR", "keys": {"run_dir": "here"}}]}, r"a sets run_dir"),
    ({"runs": [{"name": "a", "model": "BPR", "config_files": ["absent.yaml"]}]}, r"absent\.yaml cannot be read"),
    ({"runs": [{"name": "a", "model": "BPR", "paper": {"hr@7": 0.1}}]}, r"paper has HR@7.*HR@5, HR@10"),
    ({"runs": [{"name": "a", "model": "BPR", "paper": {"hr@5": "high"}}]}, r"'high' for hr@5"),
    ({"seeds": []}, r"no seeds"),
    ({"seeds": [0, 0]}, r"seed 0 twice"),
    ({"seeds": [0.5]}, r"\[0\.5\].*whole numbers"),
    ({"seeds": [-1]}, r"seed is -1"),
    ({"dataset": None}, r"no dataset"),
    ({"dataset": "tinny"}, r"tinny.*tiny"),
    ({"method": "SASRek"}, r"'SASRek' is none of the runs: did you mean SASRec\?"),
    ({"floors": "no floors"}, r"floors is 'no floors'"),
    ({"keys": {"epoch": 3}}, r"epoch.*epochs"),
    ({"keys": {"n_in": 3}}, r"No run of suite reads the key n_in"),
    ({"keys": [3]}, r"keys are \[3\]"),
    ({"sedes": [3]}, r"'sedes': did you mean seeds\?"),
]  # fmt: skip


@pytest.mark.parametrize("said, message", BAD_SUITES, ids=[str(said)[1:90] for said, _ in BAD_SUITES])
def test_a_bad_suite_is_refused_before_any_run(keys, tmp_path, said, message):
    with pytest.raises(ConfigError, match=message) as error:
        compare(suite=suite_file(tmp_path, **said), config_dict=keys)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_missing_and_broken_suites(keys, tmp_path):
    (tmp_path / "broken.yaml").write_text("runs: [BPR\nseeds: [0]\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml is not valid YAML: line 2"):
        compare(suite=tmp_path / "broken.yaml", config_dict=keys)
    with pytest.raises(ConfigError, match=r"no suite tabel3.*floors"):
        compare(suite="tabel3", config_dict=keys)
    with pytest.raises(ConfigError, match="one of the two"):
        compare(["BPR"], suite="floors", config_dict=keys)


def test_the_strongest_key_wins(keys, tmp_path, monkeypatch):
    (tmp_path / "best.yaml").write_text("embedding_size: 8\nlearning_rate: 0.5\nprotocol: leave_one_out\nseed: 9\n")
    runs = [{"name": "a", "model": "BPR", "keys": {"learning_rate": 0.25, "epochs": 5}, "config_files": ["best.yaml"]}]
    seen = []
    monkeypatch.setattr(
        "recbole_hatllm.compare.run",
        lambda *a, config_dict: (seen.append(config_dict), quick_start.run(*a, config_dict=config_dict))[1],
    )
    suite = suite_file(tmp_path, runs=runs, keys={"epochs": 7, "embedding_size": 4, "weight_decay": 0.125})
    compare(suite=suite, config_dict={**keys, "epochs": 1})
    (used,) = seen
    wanted = {"embedding_size": 8, "learning_rate": 0.25, "epochs": 1, "weight_decay": 0.125, "seed": 0}
    assert wanted.items() <= used.items()


@pytest.mark.parametrize("file", sorted(schema.PROPERTIES.glob("suite/*.yaml")), ids=lambda path: path.stem)
def test_shipped_suites_pass_their_checks(file, tmp_path):
    """Nothing is downloaded, nothing is run."""
    own = schema.read_yaml(file).get("dataset", "ml-100k")
    (tmp_path / own).mkdir()
    suite = suites.read_suite(file.stem, dataset=own, keys={"data_path": str(tmp_path)})
    configs = suites.check(suite)
    assert configs.keys() == {entry.name for entry in suite.entries} >= set(FLOORS)
    suites.check_paper(suite, ["hit@5", "hit@10", "ndcg@5", "ndcg@10"])
    assert suite.prepare or own in catalogue.names()  # else nobody knows where it comes from


def test_the_papers_figures_are_those_of_the_dataset():
    """Cells of the paper's tables, read off it apart from the files."""
    paper = lambda name, dataset: {e.name: e.paper for e in suites.read_suite(name, dataset=dataset).entries}  # noqa: E731
    games, beauty, clothing = (paper("table3", f"amazon-{name}") for name in ("games", "beauty", "clothing"))
    assert games["HatLLM"] == {"hit@5": 0.0374, "ndcg@5": 0.0275, "hit@10": 0.0514, "ndcg@10": 0.0320}
    assert beauty["LLaRA"] == {"hit@10": 0.0368, "ndcg@10": 0.0213} and clothing["DROS"]["ndcg@10"] == 0.0071
    assert paper("table4", None)["BIGRec, 8B"] == {"hit@10": 0.0494, "ndcg@10": 0.0304}
    assert paper("table4", "amazon-clothing")["SLMRec, 1B"] == {"hit@10": 0.0112, "ndcg@10": 0.0053}
    for dataset in ("amazon-beauty", "ml-100k"):  # of which the table says nothing
        assert not any(paper("table4", dataset).values())
    assert paper("table4", None)["HatLLM, 3B"].items() <= games["HatLLM"].items()


def test_the_papers_suites_hold_its_models_and_the_whole_grid(tmp_path):
    ours = {"SASRecBCE", "DROS", "LiteLLM4Rec", "E4SRec", "SLMRec", "BIGRec", "LLaRA", "HatLLM"}
    for name in ("table3", "table3-small"):
        assert {entry.model for entry in suites.read_suite(name).entries} == ours | set(FLOORS), name
    grid = suites.read_suite("figure5", keys={"data_path": str(tmp_path)}, floors=False)
    values = {(config["n_in"], config["n_cr"]) for config in suites.check(grid).values()}
    assert values == {(n, 2) for n in (1, 4, 8, 12, 16)} | {(4, n) for n in (1, 2, 3, 4, 5)}


@pytest.mark.parametrize("name, layers, few, last", [("table5", 28, 4, 2), ("table5-small", 4, 1, 2)])
def test_the_ablation_of_layer_kinds_has_the_papers_rows(tmp_path, name, layers, few, last):
    """Layer by layer, from what the paper calls them; what the two rows of CR->SASRec share is the row without CR."""
    suite = suites.read_suite(name, dataset="ml-100k", keys={"data_path": str(tmp_path)}, floors=False)
    configs, rest = suites.check(suite), layers - few - last
    kinds = {
        row: " ".join(f"{len(list(same))} {kind}" for kind, same in groupby(HatLLM.layer_kinds(config, layers)))
        for row, config in configs.items()
        if config["model"] == "HatLLM"
    }
    assert kinds == {
        "HatLLM": f"{few} in {rest} or {last} cr",
        "w/o IN": f"{few + rest} or {last} cr",
        "w/o OR": f"{few + rest} in {last} cr",
        "w/o CR": f"{few} in {rest + last} or",
        "CR->CR-pre": f"{few} in {rest} or {last} cr_pre",
        "IN-CR-OR": f"{few} in {last} cr {rest} or",
        "OR-IN-CR": f"{rest} or {few} in {last} cr",
        "OR-CR-IN": f"{rest} or {last} cr {few} in",
        "CR-IN-OR": f"{last} cr {few} in {rest} or",
        "CR-OR-IN": f"{last} cr {rest} or {few} in",
    }
    for table in ("projector", "PCA"):
        child = configs[f"CR->SASRec, {table}"]
        (parent,) = lineage.parents(child)
        assert child["item_table"] == table.lower() and child["n_cr"] == last
        assert lineage.config_of(parent, child).resolved() == configs["w/o CR"].resolved()


def test_a_papers_figures_hold_for_the_datasets_that_it_names(tmp_path):
    runs = lambda paper: [{"model": "BPR", "paper": paper}]  # noqa: E731

    def read(paper, dataset=None):
        return suites.read_suite(suite_file(tmp_path, runs=runs(paper)), dataset=dataset).entries[0].paper

    assert read({"hr@10": 0.5}) == {"hit@10": 0.5} and read({"hr@10": 0.5}, "other") == {}
    both = {"tiny": {"hr@10": 0.5}, "other": {"ndcg@5": 0.25}}
    assert read(both) == {"hit@10": 0.5} and read(both, "other") == {"ndcg@5": 0.25} and read(both, "third") == {}
    with pytest.raises(ConfigError, match=r"0\.1 for hr@5 beside datasets"):
        read({**both, "hr@5": 0.1})


def test_a_suite_says_how_its_dataset_is_made(tmp_path):
    made = {"data_path": str(tmp_path)}
    with pytest.raises(
        ConfigError, match=r"small needs amazon-toys-10core.*run `.*prepare amazon-toys`, then `.*--k_core=10`"
    ):
        compare(suite="table3-small", config_dict=made)
    suites.check(suites.read_suite("table3-small", dataset="ml-100k", keys=made))  # of another dataset it says nothing
    with pytest.raises(ConfigError, match=r"prepare is 'make it'.*list of commands"):
        compare(suite=suite_file(tmp_path, prepare="make it"), config_dict=made)


# --- Statistics


def test_gains_are_the_metrics_row_by_row():
    ranks = np.array([[1, 3, 11, 2], [2, 4, 1, 99]])
    assert gains(ranks[0], "hit@3").tolist() == [1, 1, 0, 1]
    expected = [(1 + 1 / np.log2(3)) / 2, (1 / np.log2(4) + 1 / np.log2(5)) / 2, 0.5, 1 / np.log2(3) / 2]
    assert gains(ranks, "ndcg@10").tolist() == pytest.approx(expected)


def test_intervals_over_seeds_resample_rows_with_all_their_seeds():
    draw = np.random.default_rng(3)
    ranks = np.stack([draw.geometric(0.1, 400), draw.geometric(0.05, 400)])
    per_row = gains(ranks, "ndcg@10")
    expected = np.quantile([per_row[draw.integers(0, 400, 400)].mean() for _ in range(3000)], [0.025, 0.975])
    assert bootstrap(ranks, ["ndcg@10"])["ndcg@10"] == pytest.approx(expected, abs=0.006)
    assert of_mean(per_row) == pytest.approx(expected, abs=0.006)
    assert bootstrap(ranks[:1], ["ndcg@10", "hit@5"]) == bootstrap(ranks[0], ["ndcg@10", "hit@5"])


def test_a_pair_of_models_against_scipy():
    draw = np.random.default_rng(0)
    ours, theirs = draw.random(200).round(1), draw.random(200).round(1) * 0.9
    found = compare_rows(ours, theirs)
    moved = ours != theirs
    assert found["p"] == pytest.approx(stats.wilcoxon(ours[moved], theirs[moved]).pvalue)
    assert found["difference"] == pytest.approx(ours.mean() - theirs.mean())
    assert found["improvement"] == pytest.approx(100 * (ours.mean() / theirs.mean() - 1))
    boot = stats.bootstrap((ours - theirs,), np.mean, method="percentile", rng=np.random.default_rng(1))
    assert found["interval"] == pytest.approx(boot.confidence_interval, abs=0.01)
    back = compare_rows(theirs, ours)
    assert back["p"] == pytest.approx(found["p"]) and back["difference"] == -found["difference"]


def test_by_hand_six_wins_of_six():
    """All 2^6 signs are equally likely: two of them are as far out."""
    found = compare_rows(np.arange(1, 7) / 10, np.zeros(6))
    assert found["p"] == pytest.approx(2 / 64) and found["improvement"] is None


def test_equal_models_do_not_differ():
    same = np.array([0.5, 0, 1])
    assert compare_rows(same, same) == {"difference": 0, "interval": [0, 0], "improvement": 0, "p": 1}


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1, 1] and holm([]) == [] and holm([0.2]) == [0.2]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_as_the_step_down_does(p):
    for level in (0.01, 0.05, 0.3):
        rejected, left = set(), sorted(range(len(p)), key=lambda i: p[i])
        while left and p[left[0]] * len(left) <= level:
            rejected.add(left.pop(0))
        assert {i for i, corrected in enumerate(holm(p)) if corrected <= level} == rejected


# --- Tables


def made_up() -> dict:
    """A summary of three runs with round numbers."""

    def row(name, mean, paper=None, **more):
        interval = None if mean is None else [mean - 0.01, mean + 0.02]
        metrics = {"ndcg@10": {"mean": mean, "interval": interval, "by_seed": [], "paper": paper}}
        return {"name": name, "model": "M", "seeds": [0, 1], "asked": 2, "metrics": metrics, "trainable_parameters": 1234567,
                "seconds": 61.0, "peak_memory": 1_340_000_000, "curves": [], "folders": [], "failures": [], **more}  # fmt: skip

    test = {"metric": "ndcg@10", "method": "A_1 & co", "baseline": "B|2", "difference": 0.02, "interval": [0.01, 0.03],
            "improvement": 25.0, "p": 0.01, "p_holm": 0.0201}  # fmt: skip
    failed = row("C", None, seeds=[], failures=[{"seed": 1, "reason": "50 % of_it, lost."}])
    return {
        "comparison": {"dataset": "tiny", "metrics": ["ndcg@10"], "valid_metric": "ndcg@10", "method": None},
        "protocol": "windows", "candidates": 20, "history_masked": True, "rows": 30,
        "runs": [row("A_1 & co", 0.1, 0.125), row("B|2", 0.08), failed, row("D", 0.05)], "best": [test], "others": [test],
    }  # fmt: skip


def test_markdown():
    lines = markdown(made_up()).splitlines()
    assert lines[0] == "| test | NDCG@10 | p against A_1 & co | parameters | time | memory | seeds |"
    assert lines[2] == "| A_1 & co | **0.1000** (0.0900-0.1200) [paper 0.1250] | - | 1,234,567 | 61 s | 1.3 GB | 2 |"
    assert lines[3] == "| B\\|2 | <u>0.0800</u> (0.0700-0.1000) | 0.020 | 1,234,567 | 61 s | 1.3 GB | 2 |"
    assert lines[4] == "| C | failed | - | - | - | - | 0/2 |" and lines[5].startswith("| D | 0.0500 (")
    text = "\n".join(lines)
    assert "tiny, windows, history masked: 30 test rows, 20 candidates" in text
    assert "NDCG@10: A_1 & co against B|2 +25.0 %, +0.0200 (+0.0100 to +0.0300), p = 0.020" in text
    assert "C, seed 1, failed: 50 % of_it, lost." in text


def test_latex():
    lines = [line for line in latex(made_up()).splitlines() if not line.startswith("%")]
    assert lines[0] == r"\begin{tabular}{lrrrrrr}" and lines[-1] == r"\end{tabular}"
    cell = r"A\_1 \& co & \textbf{0.1000} {\scriptsize (0.0900--0.1200)} [paper 0.1250] & - & 1,234,567 & 61 s & 1.3 GB & 2 \\"
    assert cell in lines
    assert (
        r"B|2 & \underline{0.0800} {\scriptsize (0.0700--0.1000)} & 0.020 & 1,234,567 & 61 s & 1.3 GB & 2 \\" in lines
    )
    assert all(len(re.findall(r"(?<!\\)&", line)) == 6 for line in lines if line.endswith(r"\\"))


def test_csv_and_terminal(tmp_path):
    from recbole_hatllm.compare_report import write

    write(made_up(), tmp_path)
    with (tmp_path / "table.csv").open(newline="") as file:
        first, second, third, _ = csv.DictReader(file)
    assert first["name"] == "A_1 & co" and first["history"] == "masked" and first["rows"] == "30"
    wanted = {"mean": 0.1, "low": 0.09, "high": 0.12, "paper": 0.125}
    assert {part: float(first[f"NDCG@10 {part}"]) for part in wanted} == pytest.approx(wanted)
    assert second["p Holm"] == "0.0201" and second["NDCG@10 paper"] == "" and third["failure"] == "50 % of_it, lost."
    assert third["NDCG@10 mean"] == "" and first["trainable parameters"] == "1234567"
    assert first["peak memory"] == "1340000000"
    shown = terminal(made_up()).splitlines()
    assert "0.1000* 0.0900-0.1200 [paper 0.1250]" in shown[1] and "0.0800' 0.0700-0.1000" in shown[2]


def test_runs_that_tie_share_their_place():
    found = made_up()
    found["runs"][1]["metrics"]["ndcg@10"]["mean"] = 0.1
    assert markdown(found).count("**0.1000**") == 2 and "<u>" not in markdown(found)
