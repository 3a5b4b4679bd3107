"""Runs that need another run: made once, found again, gone on with after a stop, and refused where they do not fit."""

import json
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import load_file

from recbole_hatllm import identity, load, quick_start, resume, run, stages
from recbole_hatllm.compare import compare
from recbole_hatllm.config import Config
from recbole_hatllm.errors import BackboneError, ConfigError, DataError
from recbole_hatllm.model.llara import LLaRA
from recbole_hatllm.search import search
from recbole_hatllm.trainer import Interrupted, StepTrainer
from tests.conftest import random_sequences, write_dataset
from tests.test_trainer import weights_of

SASREC = {"epochs": 3, "train_batch_size": 64}


@pytest.fixture
def keys(tiny_data, tmp_path) -> dict:
    """Keys of LLaRA or E4SRec over a SASRec of three epochs."""
    return {
        "data_path": str(tiny_data), "runs_dir": str(tmp_path / "runs"), "backbone": "random-tiny", "dtype": "float32",
        "train_steps": 4, "eval_step": 2, "train_batch_size": 16, "warmup_steps": 2, "show_progress": False,
        "sasrec_keys": SASREC,
    }  # fmt: skip


@pytest.fixture
def begun(monkeypatch) -> list[str]:
    """The models whose training begins from now on, in their order."""
    models = []
    original = quick_start.run_folder.create

    def create(config):
        models.append(config["model"])
        return original(config)

    monkeypatch.setattr(quick_start.run_folder, "create", create)
    return models


def folders(keys: dict, model: str) -> list[Path]:
    """Run folders of parents and of comparisons, which end in a hash."""
    return [path for path in Path(keys["runs_dir"]).glob(f"{model}-tiny-*") if len(path.name.rsplit("-", 1)[1]) == 12]


def test_a_parent_is_an_ordinary_run_that_is_made_once(keys, begun, capsys):
    first = run("E4SRec", "tiny", config_dict=keys)
    assert begun == ["E4SRec", "SASRec"] and "E4SRec needs SASRec" in capsys.readouterr().out
    second = run("LLaRA", "tiny", config_dict=keys)
    assert begun == ["E4SRec", "SASRec", "LLaRA"]
    (parent,) = first["parents"]
    assert parent == second["parents"][0]
    folder = Path(parent["folder"])
    assert [folder] == folders(keys, "SASRec") and folder.name == parent["id"]
    stored = json.loads((folder / "result.json").read_text())
    assert parent["test"] == stored["test"] and parent["valid"] == stored["valid"]
    assert json.loads((Path(first["folder"]) / "result.json").read_text())["parents"] == first["parents"]
    assert f"SASRec (sasrec), {folder.name}" in (Path(first["folder"]) / "README.md").read_text()

    plain = {key: keys[key] for key in ("data_path", "runs_dir", "show_progress")}
    alone = run("SASRec", "tiny", config_dict={**plain, **SASREC})
    assert alone["test"] == parent["test"]
    theirs, ours = (load_file(Path(path) / "model.safetensors") for path in (alone["folder"], folder))
    assert all(theirs[name].equal(ours[name]) for name in theirs)
    assert load_file(Path(first["folder"]) / "slots.safetensors")["table"].equal(ours["state/item_embedding.weight"])


def test_the_parent_has_the_childs_protocol_and_its_own_keys(keys):
    own = {"protocol": "windows", "mask_history": True, "MAX_ITEM_LIST_LENGTH": 6, "seed": 5, "eval_sample": 20}
    child = run("E4SRec", "tiny", config_dict={**keys, **own, "sasrec_flavour": "SASRecFast", "sasrec_width": 32})
    stored = yaml.safe_load((Path(child["parents"][0]["folder"]) / "config.yaml").read_text())
    assert {key: stored[key] for key in own} == own
    assert (stored["model"], stored["hidden_size"], stored["epochs"]) == ("SASRecFast", 32, 3)
    assert stored["learning_rate"] == 1e-3  # its own default, and not the child's


def test_what_the_child_changes_for_itself_is_the_same_parent_and_a_seed_is_another(keys):
    def parent(**own):
        config = Config("LLaRA", "tiny", None, {**keys, **own})
        return stages.lineage.config_of(stages.lineage.parents(config)[0], config)

    def mark(**own):
        return identity.digest(parent(**own), "data")

    same = [
        {"learning_rate": 1e-3},
        {"backbone_layers": 2},
        {"hatllm_masks": True},
        {"targets": "all"},
        {"runs_dir": "other"},
    ]
    other = [
        {"seed": 1},
        {"protocol": "windows"},
        {"sasrec_width": 32},
        {"sasrec_keys": {"epochs": 4}},
        {"mask_history": True},
    ]
    assert {mark(**own) for own in same} == {mark()}
    assert len({mark(), *(mark(**own) for own in other)}) == 1 + len(other)


def test_a_childs_identity_has_its_parents_in_it(keys, tmp_path):
    def mark(**own):
        return identity.digest(Config("E4SRec", "tiny", None, {**keys, **own}), "data")

    assert mark() == mark() != mark(sasrec_keys={"epochs": 4})
    for name, text in (("one", "1"), ("again", "1"), ("two", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(text)
    one, again, two = (mark(pretrained=str(tmp_path / name)) for name in ("one", "again", "two"))
    assert one == again != two and one != mark()  # by content, not by place


# --- Stops


def test_ctrl_c_in_the_parent_goes_on_where_it_was(keys, begun, monkeypatch, tmp_path, capsys):
    whole = run("E4SRec", "tiny", config_dict={**keys, "runs_dir": str(tmp_path / "whole")})
    original, steps = StepTrainer._step, []

    def counted(self, *arguments):
        steps.append((self.config["model"], self.step))
        if self.config["model"] == "SASRec" and self.step == 7 and not begun.count("again"):
            raise Interrupted
        return original(self, *arguments)

    monkeypatch.setattr(StepTrainer, "_step", counted)
    child = tmp_path / "child"
    with pytest.raises(KeyboardInterrupt):
        run("E4SRec", "tiny", config_dict={**keys, "run_dir": str(child)})
    assert f"--resume={child}" in capsys.readouterr().out and not (child / "result.json").exists()
    begun.append("again")
    steps.clear()
    result = resume(child)
    assert steps[0] == ("SASRec", 4)  # the last validated state, and not the first step
    assert begun[begun.index("again") :] == ["again"]  # no new run
    a, b = weights_of(whole["folder"]), weights_of(child)
    assert all(a[name].equal(b[name]) for name in a) and result["test"] == whole["test"]


KILLER = """
import json, os, signal, sys, torch
torch.set_num_threads(1)
from recbole_hatllm import run, trainer
original = trainer.StepTrainer._step
def step(self, *arguments):
    if self.config["model"] == "LLaRA" and self.step == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *arguments)
trainer.StepTrainer._step = step
run("LLaRA", "tiny", config_dict=json.loads(sys.argv[1]))
"""


def test_killed_in_the_child_the_parent_stays_and_the_curriculum_goes_on(keys, begun, tmp_path, monkeypatch):
    keys = {**keys, "train_steps": 14, "eval_step": 4, "stopping_step": 9, "micro_batch_size": 6, "learning_rate": 0.01}
    undisturbed = run("LLaRA", "tiny", config_dict=keys)
    folder = tmp_path / "run"
    killed = subprocess.run(
        [sys.executable, "-c", KILLER, json.dumps({**keys, "run_dir": str(folder)})], capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    began = len(begun)
    told = []
    original = LLaRA.reached
    monkeypatch.setattr(LLaRA, "reached", lambda self, done: told.append(done) or original(self, done))
    result = resume(folder)
    assert len(begun) == began and told[0] == 8 / 14
    a, b = weights_of(undisturbed["folder"]), weights_of(folder)
    assert all(a[name].equal(b[name]) for name in a) and result["test"] == undisturbed["test"]
    assert result["curve"][-1]["loss"] == undisturbed["curve"][-1]["loss"]
    slots = [load_file(Path(path) / "slots.safetensors") for path in (undisturbed["folder"], folder)]
    assert all(slots[0][name].equal(slots[1][name]) for name in slots[0])


def test_a_finished_child_needs_no_parent(keys, tmp_path):
    child = run("E4SRec", "tiny", config_dict=keys)
    history = load(child["folder"]).items.titles[1:4]
    before = load(child["folder"]).recommend(history, 3)
    shutil.rmtree(child["parents"][0]["folder"])
    assert load(child["folder"]).recommend(history, 3) == before


# --- Shared


def test_a_comparison_and_its_parents_are_one_set_of_runs(keys, begun):
    keys = {
        key: value
        for key, value in keys.items()
        if key not in ("train_steps", "eval_step", "train_batch_size", "warmup_steps")
    }
    llm = {"train_steps": 4, "eval_step": 2, "train_batch_size": 16}
    runs = [
        {"name": "SASRec", "model": "SASRec", "keys": SASREC},
        {"name": "E4SRec", "model": "E4SRec", "keys": {**llm, "backbone": "random-tiny", "sasrec_keys": SASREC}},
        {"name": "LLaRA", "model": "LLaRA", "keys": {**llm, "backbone": "random-tiny", "sasrec_keys": SASREC}},
    ]
    place = {"data_path": keys["data_path"], "runs_dir": keys["runs_dir"]}
    file = Path(keys["runs_dir"]).parent / "suite.yaml"
    file.write_text(yaml.safe_dump({"dataset": "tiny", "seeds": [0], "floors": False, "runs": runs}))
    found = compare(suite=str(file), config_dict=place)
    assert begun == ["SASRec", "E4SRec", "LLaRA"] and len(folders(keys, "SASRec")) == 1
    assert not [one for one in found["runs"] if one.get("reason")]


def test_trials_share_a_parent(keys, begun, tmp_path):
    space = tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump({"learning_rate": {"choice": [1e-3, 1e-4]}}))
    own = {key: value for key, value in keys.items() if key != "learning_rate"}
    found = search("E4SRec", "tiny", space, config_dict=own, study=tmp_path / "study")
    assert begun.count("E4SRec") == 2 and begun.count("SASRec") == 1
    assert all(trial["state"] == "complete" for trial in found["trials"])


def test_another_process_that_makes_the_same_run_is_waited_for(tmp_path):
    folder, said, done = tmp_path / "runs" / "SASRec-tiny-0", [], []
    folder.parent.mkdir()
    other = FileLock(folder.with_name(f".{folder.name}.lock"))

    def wait():
        with stages._alone(folder, said.append):
            done.append(True)

    with other:
        waiting = threading.Thread(target=wait)
        waiting.start()
        for _ in range(100):
            if said:
                break
            threading.Event().wait(0.05)
        assert said == ["is being made by another process, which is waited for"] and not done
    waiting.join(10)
    assert done and not list(folder.parent.iterdir())


# --- A run that the user names


@pytest.fixture(scope="module")
def own_run(tiny_data, tmp_path_factory) -> dict:
    keys = {"data_path": str(tiny_data), "runs_dir": str(tmp_path_factory.mktemp("runs")), "show_progress": False}
    torch.set_num_threads(1)
    return run("SASRecFast", "tiny", config_dict={**keys, "epochs": 1, "hidden_size": 16})


def test_a_run_that_the_user_has_is_taken(keys, own_run, begun):
    own = {**keys, "pretrained": own_run["folder"], "sasrec_flavour": "SASRecFast", "sasrec_width": 16}
    child = run("LLaRA", "tiny", config_dict=own)
    assert begun == ["LLaRA"] and child["parents"][0]["folder"] == own_run["folder"]
    table = load_file(Path(own_run["folder"]) / "model.safetensors")["state/item_embedding.weight"]
    assert load_file(Path(child["folder"]) / "slots.safetensors")["table"].equal(table)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({}, r"pretrained is \S+, a run of SASRecFast: E4SRec needs one of SASRec"),
        ({"sasrec_flavour": "SASRecFast"}, r"whose hidden_size is 16, and sasrec_width asks for 64"),
        ({"sasrec_flavour": "SASRecFast", "sasrec_width": 16, "protocol": "windows"},
         r"trained with protocol leave_one_out, and this run has windows: set --protocol=leave_one_out"),
        ({"pretrained": "nowhere"}, r"nowhere is not a run folder"),
    ],
)  # fmt: skip
def test_a_run_that_does_not_fit_is_refused_in_one_sentence(keys, own_run, begun, wrong, message):
    with pytest.raises(ConfigError, match=message):
        run("E4SRec", "tiny", config_dict={**keys, "pretrained": own_run["folder"], **wrong})
    assert begun == ["E4SRec"] and not list(Path(keys["runs_dir"]).iterdir())


def test_a_run_on_other_items_is_refused(keys, own_run, tmp_path):
    write_dataset(tmp_path / "data", "tiny", random_sequences(30, 19))
    own = {**keys, "data_path": str(tmp_path / "data"), "sasrec_flavour": "SASRecFast", "sasrec_width": 16}
    with pytest.raises(DataError, match=r"trained on other items .*'count': 20.*'count': 19"):
        run("E4SRec", "tiny", config_dict={**own, "pretrained": own_run["folder"]})


def test_an_unfinished_run_is_refused(keys, own_run, tmp_path):
    folder = Path(shutil.copytree(own_run["folder"], tmp_path / "half"))
    (folder / "result.json").unlink()
    with pytest.raises(
        ConfigError, match=rf"pretrained is {folder}, which is not finished: go on with it by --resume={folder}"
    ):
        run("E4SRec", "tiny", config_dict={**keys, "pretrained": str(folder)})


# --- Before long work


@pytest.mark.parametrize(
    "model, wrong, error, message",
    [
        (
            "E4SRec",
            {"sasrec_keys": {"epoch": 3}},
            ConfigError,
            r"E4SRec needs SASRec: There is no key 'epoch': did you mean epochs",
        ),
        ("E4SRec", {"lora_targets": ["absent"]}, BackboneError, r"lora_targets names 'absent'"),
        ("LLaRA", {"hatllm_masks": True, "n_in": 4, "n_cr": 2}, ConfigError, r"n_in = 4 and n_cr = 2"),
        (
            "SLMRec",
            {"distill_blocks": 3},
            ConfigError,
            r"distill_blocks is 3, and the student has 4 layers and its teacher 4",
        ),
        (
            "SLMRec",
            {"teacher_keys": {"lora_rr": 3}},
            ConfigError,
            r"SLMRec needs its teacher, SLMRec: .*lora_rr.*lora_r",
        ),
        ("E4SRec", {"sasrec_keys": {"hidden_size": 8}}, ConfigError, r"sasrec_keys has hidden_size, which follows"),
        ("LLaRA", {"sasrec_keys": {"protocol": "windows"}}, ConfigError, r"sasrec_keys has protocol, which follows"),
        (
            "SLMRec",
            {"teacher_keys": {"backbone_layers": 8}},
            ConfigError,
            r"teacher_keys has backbone_layers, which follows",
        ),
        ("SLMRec", {"pretrained_teacher": "nowhere"}, ConfigError, r"nowhere is not a run folder"),
    ],
)
def test_no_parent_is_made_for_a_run_that_cannot_be(keys, begun, model, wrong, error, message):
    with pytest.raises(error, match=message):
        run(model, "tiny", config_dict={**keys, **wrong})
    assert begun in ([model], []) and not list(Path(keys["runs_dir"]).glob("*"))


# --- Three stages


def test_a_teacher_is_made_between_sasrec_and_student(keys, begun):
    own = {**keys, "sasrec_width": 16, "teacher_keys": {"train_steps": 3, "eval_step": 3, "learning_rate": 0.01}}
    result = run("SLMRec", "tiny", config_dict=own)
    assert begun == ["SLMRec", "SASRec", "SLMRec"]
    assert [parent["role"] for parent in result["parents"]] == ["sasrec", "teacher"]
    teacher = Path(result["parents"][1]["folder"])
    stored = yaml.safe_load((teacher / "config.yaml").read_text())
    assert stored["teacher_layers"] is None and stored["backbone_layers"] == 4 and stored["train_steps"] == 3
    assert json.loads((teacher / "result.json").read_text())["parents"] == result["parents"][:1]
    run("SLMRec", "tiny", config_dict={**own, "distill_cos": 0.5, "learning_rate": 1e-4, "train_steps": 2})
    assert begun == ["SLMRec", "SASRec", "SLMRec", "SLMRec"]  # the teacher is another one's too
    named = {**own, "pretrained_teacher": str(teacher), "distill_blocks": 2}
    assert run("SLMRec", "tiny", config_dict=named)["parents"][1]["id"] == teacher.name
    with pytest.raises(ConfigError, match="teacher_layers is 8"):
        run("SLMRec", "tiny", config_dict={**own, "pretrained_teacher": result["folder"]})
