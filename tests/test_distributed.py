"""Two processes do what one does: the same weights, ranks and metrics, each row counted once, one run folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from recbole_hatllm import registry, resume, run
from recbole_hatllm.config import Config

LLM = {
    "backbone": "random-tiny", "dtype": "float32", "n_in": 1, "n_cr": 1, "lora_dropout": 0.0, "head_dropout": 0.0,
    "learning_rate": 0.01, "warmup_steps": 2, "eval_step": 6, "train_steps": 14, "stopping_step": 10,
    "train_batch_size": 25, "micro_batch_size": 3,
}  # fmt: skip
SASREC = {
    "hidden_dropout_prob": 0.0,
    "attn_dropout_prob": 0.0,
    "train_batch_size": 8,
    "train_steps": 12,
    "eval_step": 6,
}
PLAIN = {"epochs": 2, "eval_step": 1, "train_batch_size": 40}
# 29 rows are tested, so that the processes' shares differ.
RUNS = {
    "last": ("HatLLM", {**LLM, "eval_sample": 29}),
    "all": ("HatLLM", {**LLM, "train_batch_size": 8, "targets": "all", "head_init": "probe", "readout_norm": "whiten"}),
    "titles": (
        "HatLLM",
        {
            **LLM,
            "train_batch_size": 8,
            "targets": "all",
            "head": "title_id",
            "head_init": "probe",
            "readout_norm": "whiten",
            "title_table": "refreshed",
        },
    ),
    "written": (
        "BIGRec",
        {
            **{key: value for key, value in LLM.items() if key not in ("n_in", "n_cr", "head_dropout")},
            "eval_sample": 29,
            "strategy": "language",
            "max_new_tokens": 5,
            "num_beams": 2,
            "grounding_weight": "popularity",
        },
    ),
    "vectors": (
        "LiteLLM4Rec",
        {
            **{key: value for key, value in LLM.items() if key not in ("n_in", "n_cr")},
            "item_llm": "lora_joint",
            "learning_rate": 0.003,
        },
    ),
    "sequence": ("SASRecFast", SASREC),
    "pairs": ("BPR", {**PLAIN, "eval_sample": 29, "eval_batch_size": 8}),
    "pointwise": ("MF", PLAIN),
    "counted": ("Pop", {"metrics": ["Hit", "NDCG", "ItemCoverage"], "eval_sample": 29}),
    "chain": ("MarkovChain", {}),
    "masked": ("TitleMarkov", {"mask_history": True, "eval_sample": 29}),
}
DROPOUT = {**LLM, "lora_dropout": 0.2, "head_dropout": 0.1}
SEVERAL = """
import json, sys, torch
torch.set_num_threads(1)
from recbole_hatllm import run
for model, keys in json.loads(sys.argv[1]):
    run(model, "tiny", config_dict=keys)
"""
SLOW = """
import sys, time, torch
torch.set_num_threads(1)
from recbole_hatllm import cli, trainer
step = trainer.StepTrainer._step
def slow(self, *args):
    if self.step == 8:
        print("at step 8", flush=True)
        time.sleep(3)
    return step(self, *args)
trainer.StepTrainer._step = slow
sys.exit(cli.main(sys.argv[1:]))
"""


DATA_PARALLEL = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]


def launch(*arguments, flags=DATA_PARALLEL, **options) -> subprocess.Popen:
    """`accelerate launch` with two processes on the CPU; the default port may be another's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *flags, f"--main_process_port={port}", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finished(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher then ends its processes
        raise
    return process.returncode, out, err


def stopped_by_ctrl_c(folder: Path, script: Path, keys: dict, **options) -> None:
    """Starts a run of HatLLM in `folder` and presses Ctrl-C in its step 8."""
    script.write_text(SLOW)
    arguments = [f"--{key}={value}" for key, value in {**keys, "run_dir": folder}.items()]
    process = launch(str(script), "--model=HatLLM", "--dataset=tiny", *arguments, **options)
    for line in process.stdout:
        if "at step 8" in line:
            time.sleep(1)
            process.send_signal(signal.SIGINT)
            break
    _, out, err = finished(process)
    assert out.count(f"--resume={folder}") == 1, err
    assert (folder / "state.safetensors").is_file() and not (folder / "result.json").exists()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def keys(tiny_data, root):
    def of(name: str, processes: int) -> tuple[str, dict]:
        model, own = RUNS.get(name, ("HatLLM", DROPOUT))
        place = {"data_path": str(tiny_data), "run_dir": str(root / f"{name}-{processes}"), "show_progress": False}
        return model, {**place, **own}

    return of


@pytest.fixture(scope="module")
def output(keys, root) -> str:
    """What two processes print in all `RUNS`."""
    script = root / "several.py"
    script.write_text(SEVERAL)
    code, out, err = finished(launch(str(script), json.dumps([keys(name, 2) for name in (*RUNS, "dropout")])))
    assert code == 0, err
    return out


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{file.name}:{key}": t for file in folder.glob("*.safetensors") for key, t in load_file(file).items()}


def distance(one: Path, other: Path) -> float:
    """The largest difference of two runs' weights."""
    a, b = weights_of(one), weights_of(other)
    assert a.keys() == b.keys() and a
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a if a[name].numel())


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_do_what_one_does(name, keys, output, root):
    torch.set_num_threads(1)
    model, own = keys(name, 1)
    alone = run(model, "tiny", config_dict=own)
    folder = root / f"{name}-2"
    together = json.loads((folder / "result.json").read_text())
    assert (alone["processes"], together["processes"]) == (1, 2)
    for part in ("valid", "test"):
        assert together[part] == pytest.approx(alone[part], abs=1e-4)
    for key in ("rows", "test_parts", "history_masked", "steps", "best_step", "trainable_parameters"):
        assert together[key] == alone[key]
    for one, two in zip(alone["curve"], together["curve"], strict=True):
        assert two == pytest.approx({**one, "seconds": two["seconds"]}, abs=1e-4)
    assert distance(root / f"{name}-1", folder) < 1e-5
    one, two = (np.load(root / f"{name}-{n}" / "ranks.npz") for n in (1, 2))
    for column in ("user", "target", "rank"):
        assert (one[column] == two[column]).all()
    if name == "written":
        one, two = ((root / f"{name}-{n}" / "written.jsonl").read_text() for n in (1, 2))
        assert one == two and one.count("\n") == 29
    assert {path.name for path in folder.iterdir()} == {path.name for path in (root / f"{name}-1").iterdir()}
    assert output.count(f"run folder: {folder}\n") == 1
    assert (folder / "log.txt").read_text().count("run folder:") == 1


@pytest.mark.parametrize("name", ["last", "all", "sequence", "pairs"])
def test_these_runs_have_batches_of_fewer_rows_than_processes(name, keys):
    model, own = keys(name, 1)
    config = Config(model, "tiny", config_dict=own)
    train = registry.data_loaders(config, registry.create_dataset(config))[0]
    assert [len(batch) for batch in train.batches(0)][-1] == 1


def test_parents_are_made_together(tiny_data, tmp_path):
    """SASRec, teacher and student as in one process; and a curriculum in which a process may have nothing to add."""
    own = {key: value for key, value in LLM.items() if key not in ("n_in", "n_cr")}
    own |= {
        "data_path": str(tiny_data),
        "show_progress": False,
        "sasrec_flavour": "SASRecFast",
        "sasrec_keys": SASREC,
        "sasrec_width": 16,
    }
    distilled = {
        **own,
        "distill_blocks": 2,
        "teacher_keys": {**{key: own[key] for key in LLM if key in own and key != "backbone"}, "train_steps": 6},
    }
    place = {"runs_dir": str(tmp_path / "together"), "run_dir": str(tmp_path / "together" / "student")}
    behaviour = {**own, **place, "run_dir": str(tmp_path / "together" / "llara"), "train_steps": 30}
    script = tmp_path / "several.py"
    script.write_text(SEVERAL)
    code, out, err = finished(
        launch(str(script), json.dumps([("SLMRec", {**distilled, **place}), ("LLaRA", behaviour)]))
    )
    assert code == 0, err
    torch.set_num_threads(1)
    alone = run("SLMRec", "tiny", config_dict={**distilled, "runs_dir": str(tmp_path / "alone")})
    together = json.loads((tmp_path / "together" / "student" / "result.json").read_text())
    assert (together["processes"], alone["processes"]) == (2, 1)
    assert [parent["id"] for parent in together["parents"]] == [parent["id"] for parent in alone["parents"]]
    for one, two in zip([*alone["parents"], alone], [*together["parents"], together]):
        assert distance(Path(one["folder"]), Path(two.get("folder", tmp_path / "together" / "student"))) < 1e-5
    assert out.count("is made first") == 2 and out.count("SASRecFast-tiny") > 2
    curve = json.loads((tmp_path / "together" / "llara" / "result.json").read_text())["curve"]
    assert curve[-1]["loss"] < curve[0]["loss"]


def test_ctrl_c_and_resume_end_as_if_never_stopped(keys, output, root, tmp_path):
    _, own = keys("dropout", 2)
    folder = tmp_path / "run"
    stopped_by_ctrl_c(folder, tmp_path / "slow.py", own)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))

    code, out, err = finished(launch("run_hatllm.py", f"--resume={folder}", cwd=Path(__file__).parents[1]))
    assert code == 0, err
    assert out.count("run folder:") == 1
    assert distance(root / "dropout-2", folder) == 0

    assert resume(copy)["steps"] == 14  # in one process; it drops other units


@pytest.mark.parametrize("wrong", [["--model=S3Rec"], ["search", "--model=MF"]], ids=["trainer", "search"])
def test_an_error_is_said_once_and_ends_all(wrong, tmp_path, tiny_data):
    flags = ["--dataset=tiny", f"--data_path={tiny_data}", f"--runs_dir={tmp_path / 'runs'}"]
    code, _, err = finished(launch("run_hatllm.py", *wrong, *flags, cwd=Path(__file__).parents[1]))
    assert code != 0 and err.count("error: ") == 1 and "in one process: start it without a launcher" in err, err
    assert not any((tmp_path / "runs").glob("*"))
