"""Training in steps: repeatable, killable at any moment, and honest when it goes wrong."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from recbole_hatllm import load, resume, run
from recbole_hatllm.errors import DataError, HatError
from recbole_hatllm.trainer import StepTrainer

WEIGHTS = ("adapter_model.safetensors", "head.safetensors")


def weights_of(folder) -> dict[str, torch.Tensor]:
    return {f"{name}:{key}": t for name in WEIGHTS for key, t in load_file(Path(folder) / name).items()}


def same_outcome(one: dict, other: dict) -> None:
    """Bit-equal weights, metrics, curve and ranks."""
    a, b = weights_of(one["folder"]), weights_of(other["folder"])
    assert a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)
    for key in ("test", "valid", "best_step", "steps"):
        assert one[key] == other[key]
    assert [{**e, "seconds": 0} for e in one["curve"]] == [{**e, "seconds": 0} for e in other["curve"]]
    ranks = [np.load(Path(r["folder"]) / "ranks.npz") for r in (one, other)]
    assert (ranks[0]["rank"] == ranks[1]["rank"]).all()


@pytest.fixture(scope="module")
def plain(tiny_data, tmp_path_factory):
    """Keys with dropout on (so that random numbers matter) and a run of them that nothing disturbed."""
    keys = {
        "data_path": str(tiny_data), "runs_dir": str(tmp_path_factory.mktemp("runs")), "backbone": "random-tiny",
        "dtype": "float32", "n_in": 1, "n_cr": 1, "train_steps": 14, "eval_step": 4, "stopping_step": 10,
        "train_batch_size": 16, "warmup_steps": 2, "learning_rate": 0.01, "lora_dropout": 0.2, "head_dropout": 0.1,
        "show_progress": False,
    }  # fmt: skip
    torch.set_num_threads(1)
    return keys, run("HatLLM", "tiny", config_dict=keys)


def test_same_seed_same_numbers_whatever_ran_before(plain):
    keys, first = plain
    torch.rand(1000), np.random.rand(1000)
    run("Pop", "tiny", config_dict={key: keys[key] for key in ("data_path", "runs_dir")})
    same_outcome(first, run("HatLLM", "tiny", config_dict=keys))
    other = run("HatLLM", "tiny", config_dict={**keys, "seed": 7})
    assert not weights_of(other["folder"])["head.safetensors:weight"].equal(
        weights_of(first["folder"])["head.safetensors:weight"]
    )


def test_workers_change_nothing(plain):
    keys, first = plain
    same_outcome(first, run("HatLLM", "tiny", config_dict={**keys, "worker": 2}))


def test_micro_batches_change_nothing_but_rounding(plain):
    keys, _ = plain
    keys = {**keys, "lora_dropout": 0.0, "head_dropout": 0.0}
    whole = run("HatLLM", "tiny", config_dict={**keys, "micro_batch_size": 16})
    pieces = run("HatLLM", "tiny", config_dict={**keys, "micro_batch_size": 5})
    a, b = weights_of(whole["folder"]), weights_of(pieces["folder"])
    assert max((a[key] - b[key]).abs().max().item() for key in a) < 1e-4


KILLER = """
import os, signal, sys, torch
torch.set_num_threads(1)
from recbole_hatllm import run, trainer, weights
where, at = sys.argv[2], int(sys.argv[3])
count = 0
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def counted(original):
    def wrapper(*args, **kwargs):
        global count
        count += 1
        if count == at and where == "write":
            args[1].write_bytes(b"half a file")  # killed while a checkpoint is written
            die()
        result = original(*args, **kwargs)
        if count == at:
            die()
        return result
    return wrapper
if where == "step":
    trainer.StepTrainer._step = counted(trainer.StepTrainer._step)
else:
    weights.save_file = counted(weights.save_file)
import json
run("HatLLM", "tiny", config_dict=json.loads(sys.argv[1]))
"""


@pytest.mark.parametrize(
    "where, at", [("step", 1), ("step", 7), ("step", 13), ("write", 1), ("write", 2), ("write", 3), ("write", 5)]
)
def test_killed_and_resumed_it_ends_as_if_never_killed(plain, tmp_path, where, at):
    keys, undisturbed = plain
    folder = tmp_path / "run"
    arguments = [json.dumps({**keys, "run_dir": str(folder)}), where, str(at)]
    killed = subprocess.run([sys.executable, "-c", KILLER, *arguments], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (folder / "result.json").exists()
    same_outcome(undisturbed, resume(folder))
    assert not list(folder.glob("best-*")) and not list(folder.glob("state*"))


def test_ctrl_c_keeps_the_best_so_far_and_the_very_step(plain, tmp_path):
    keys, undisturbed = plain
    folder = tmp_path / "run"
    code = (
        "import sys\nfrom recbole_hatllm import trainer\n"
        "step = trainer.StepTrainer._step\n"
        "def slow(self, *args):\n"
        "    if self.step == 6: print('at step 6', flush=True); __import__('time').sleep(2)\n"
        "    return step(self, *args)\n"
        "trainer.StepTrainer._step = slow\n"
        "import torch; torch.set_num_threads(1)\n"
        "from recbole_hatllm.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    flags = [f"--{key}={value}" for key, value in {**keys, "run_dir": folder}.items()]
    child = subprocess.Popen(
        [sys.executable, "-c", code, "--model=HatLLM", "--dataset=tiny", *flags], stdout=subprocess.PIPE, text=True
    )
    lines = []
    for line in child.stdout:
        lines.append(line)
        if "at step 6" in line:
            time.sleep(0.3)
            child.send_signal(signal.SIGINT)
    assert child.wait(60) == 130
    assert f"--resume={folder}" in "".join(lines)
    assert len(list(folder.glob("best-4/head.safetensors"))) == 1
    state = json.loads(_note(folder / "state.safetensors"))["progress"]
    assert state["step"] == 7
    same_outcome(undisturbed, resume(folder))


def _note(file: Path) -> str:
    from safetensors import safe_open

    with safe_open(file, "pt") as content:
        return content.metadata()["note"]


def test_a_loss_that_is_not_a_number_stops_with_the_best_kept(plain, tmp_path, monkeypatch):
    keys, _ = plain
    original = StepTrainer._step

    def poisoned(self, batch, factor):
        if self.step == 6:
            with torch.no_grad():
                self.model.head.weight[3] = torch.nan
        return original(self, batch, factor)

    monkeypatch.setattr(StepTrainer, "_step", poisoned)
    with pytest.raises(HatError, match=r"loss is nan at step 7 with learning_rate 0\.01.*best weights so far"):
        run("HatLLM", "tiny", config_dict={**keys, "run_dir": str(tmp_path / "run")})
    assert (tmp_path / "run" / "best-4" / "head.safetensors").is_file()


def test_patience_ends_training(plain):
    keys, _ = plain
    result = run("HatLLM", "tiny", config_dict={**keys, "learning_rate": 0.3, "eval_step": 2, "train_steps": 100,
                                               "stopping_step": 1, "valid_metric": "NDCG@5"})  # fmt: skip
    curve = [entry["ndcg@5"] for entry in result["curve"]]
    assert result["steps"] < 100 and result["steps"] == result["curve"][-1]["step"]
    assert curve[-1] < max(curve) and result["valid"]["ndcg@5"] == max(curve)


@pytest.mark.parametrize(
    "decay, shares", [("constant", [1, 1, 1]), ("linear", [1, 0.5, 0.1]), ("cosine", [1, 0.5, 0.0245])]
)
def test_learning_rates_rise_and_fall(decay, shares):
    trainer = StepTrainer.__new__(StepTrainer)
    trainer.config = {"warmup_steps": 4, "lr_decay": decay}
    factors = [trainer._lr_factor(step, 14) for step in range(14)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert [factors[4], factors[9], factors[13]] == pytest.approx(shares, abs=1e-3)


def test_untrained_is_the_model_as_it_is(plain):
    keys, _ = plain
    result = run("HatLLM", "tiny", config_dict={**keys, "train_steps": 0})
    assert result["steps"] == 0 and result["curve"] == []
    assert not any(t.any() for key, t in weights_of(result["folder"]).items() if "lora_B" in key)


class TestRunFolder:
    def test_it_holds_what_the_contract_says(self, plain):
        _, result = plain
        folder = Path(result["folder"])
        names = {path.name for path in folder.iterdir()}
        assert names == {
            *WEIGHTS, "adapter_config.json", "config.yaml", "items.tsv", "result.json", "ranks.npz", "README.md",
            "log.txt", "tensorboard",
        }  # fmt: skip
        stored = json.loads((folder / "result.json").read_text())
        for key in (
            "test",
            "test_parts",
            "valid",
            "rows",
            "candidates",
            "protocol",
            "history_masked",
            "seconds",
            "versions",
            "parents",
        ):
            assert key in stored
        assert stored["rows"].keys() == {"train", "valid", "test"} and stored["candidates"] == 20
        assert yaml.safe_load((folder / "config.yaml").read_text())["n_in"] == 1
        ranks = np.load(folder / "ranks.npz", allow_pickle=False)
        assert len(ranks["rank"]) == stored["rows"]["test"] == len(ranks["user"]) == len(ranks["target"])
        assert np.mean(ranks["rank"] <= 5) == pytest.approx(stored["test"]["hit@5"], abs=1e-5)
        assert ranks["user"][0].startswith("u") and ranks["target"][0].startswith("i")

    def test_a_finished_run_is_only_read(self, plain):
        _, result = plain
        assert resume(result["folder"])["test"] == result["test"]

    @pytest.mark.parametrize("name", WEIGHTS)
    def test_a_truncated_checkpoint_is_named(self, plain, tmp_path, name):
        folder = self.copy(plain, tmp_path)
        (folder / name).write_bytes((folder / name).read_bytes()[:-100])
        with pytest.raises(DataError, match=name):
            load(folder)

    def test_a_foreign_backbone_is_named_with_ours(self, plain, tmp_path):
        folder = self.copy(plain, tmp_path)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        (folder / "config.yaml").write_text(yaml.safe_dump({**config, "backbone_layers": 2}))
        with pytest.raises(DataError, match=r"trained with backbone .*'layers': 4.* this run has .*'layers': 2"):
            load(folder)

    def test_other_items_or_another_order_are_named(self, plain, tmp_path):
        folder = self.copy(plain, tmp_path)
        lines = (folder / "items.tsv").read_text(encoding="utf-8").splitlines()
        one, two = lines[2].split("\t"), lines[3].split("\t")
        lines[2:4] = ["\t".join([one[0], *two[1:]]), "\t".join([two[0], *one[1:]])]
        (folder / "items.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        with pytest.raises(DataError, match=r"trained with items .*'count': 20.* this run has .*'count': 20"):
            load(folder)
        (folder / "items.tsv").write_text("\n".join(lines[:-3]) + "\n", encoding="utf-8")
        with pytest.raises(DataError, match=r"'count': 20.*'count': 17"):
            load(folder)

    @staticmethod
    def copy(plain, tmp_path) -> Path:
        import shutil

        return Path(shutil.copytree(plain[1]["folder"], tmp_path / "copy"))


def test_a_full_disk_is_one_sentence_and_loses_nothing(plain, tmp_path, monkeypatch):
    import errno

    from recbole_hatllm import weights

    keys, undisturbed = plain
    original, calls = weights.save_file, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(weights, "save_file", full)
    folder = tmp_path / "run"
    with pytest.raises(DataError, match=r"No space left on device.*free some disk space"):
        run("HatLLM", "tiny", config_dict={**keys, "run_dir": str(folder)})
    monkeypatch.undo()
    same_outcome(undisturbed, resume(folder))
