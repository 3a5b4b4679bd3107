"""The command line in a process of its own, as the README shows it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from recbole_hatllm import schema
from recbole_hatllm.prepare import KEYS as PREPARE_KEYS
from tests.conftest import random_sequences, write_dataset

ROOT = Path(__file__).parents[1]
TINY = ["--backbone=random-tiny", "--dtype=float32", "--train_steps=2", "--eval_step=2", "--train_batch_size=8",
        "--show_progress=false"]  # fmt: skip
HAT = ["--n_in=1", "--n_cr=1"]


def cli(*arguments, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, str(ROOT / "run_hatllm.py"), *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "2", **environment},
    )  # fmt: skip


def run_folder(done) -> Path:
    assert done.returncode == 0, done.stderr + done.stdout
    return Path(re.search(r"run folder: (.+)", done.stdout)[1])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A HatLLM run on MovieLens-100K with the random backbone: real data and titles, seconds."""
    runs = tmp_path_factory.mktemp("runs")
    return run_folder(cli("--model=HatLLM", "--dataset=ml-100k", *TINY, *HAT, f"--runs_dir={runs}"))


def test_hatllm_trains_evaluates_and_recommends(finished):
    result = json.loads((finished / "result.json").read_text())
    assert result["rows"] == {"train": 97171, "valid": 943, "test": 943} and result["candidates"] == 1682
    done = cli("recommend", f"--run={finished}", "--history=Toy Story;Heat;GoldenEye", "--k=10")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 10 and lines[0].lstrip().startswith("1. ") and re.search(r"\(\d{4}\)", lines[0])
    again = cli(f"--resume={finished}")
    assert again.returncode == 0 and f"NDCG@10 {result['test']['ndcg@10']:.4f}" in again.stdout
    by_id = cli("recommend", f"--run={finished}", "--history=1;Heat (1995);2", "--k=10")
    assert by_id.stdout == done.stdout


def test_the_real_smollm2_end_to_end(tmp_path):
    recipe = ROOT / "properties" / "recipe" / "ml-100k.yaml"
    small = ["--head=linear", "--train_steps=2", "--eval_step=2", "--head_init=title", "--readout_norm=none",
             "--train_batch_size=8", "--backbone_layers=2", *HAT]  # fmt: skip
    done = cli(
        "--model=HatLLM", "--dataset=ml-100k", f"--config_files={recipe}", *small, f"--run_dir={tmp_path / 'run'}"
    )
    folder = run_folder(done)
    result = json.loads((folder / "result.json").read_text())
    assert result["backbone"]["name"] == "smollm2-135m" and result["test"]["ndcg@10"] > 0
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 30e6
    said = cli("recommend", f"--run={folder}", "--history=Toy Story;Heat", "--k=3")
    assert said.returncode == 0 and len(said.stdout.strip().splitlines()) == 3


@pytest.mark.parametrize("model", ["SASRec", "GRU4Rec", "BERT4Rec", "BPR", "NeuMF", "Pop"])
def test_recboles_models_rank_the_same_items_for_the_same_rows(model, finished, tmp_path):
    done = cli(f"--model={model}", "--dataset=ml-100k", f"--runs_dir={tmp_path}", "--epochs=1", "--train_batch_size=8192",
               "--show_progress=false")  # fmt: skip
    ours, theirs = (json.loads((f / "result.json").read_text()) for f in (finished, run_folder(done)))
    for key in ("candidates", "protocol", "history_masked"):
        assert ours[key] == theirs[key]
    assert ours["rows"]["test"] == theirs["rows"]["test"]
    import numpy as np

    rows = [np.load(f / "ranks.npz") for f in (finished, run_folder(done))]
    assert dict(zip(rows[0]["user"], rows[0]["target"])) == dict(zip(rows[1]["user"], rows[1]["target"]))
    if model == "Pop":
        assert theirs["test"]["ndcg@10"] == pytest.approx(0.023, abs=0.002)
    if model == "SASRec":
        said = cli("recommend", f"--run={run_folder(done)}", "--history=Toy Story (1995);Heat", "--k=3")
        assert said.returncode == 0 and len(said.stdout.strip().splitlines()) == 3


@pytest.mark.parametrize("protocol", ["windows", "leave_one_out"])
def test_bigrec_under_both_protocols(tmp_path, protocol):
    sequences = random_sequences(40, 20, longest=30)
    write_dataset(tmp_path / "data", "own", sequences)
    done = cli("--model=BIGRec", "--dataset=own", f"--data_path={tmp_path / 'data'}", *TINY, f"--protocol={protocol}",
               f"--runs_dir={tmp_path}")  # fmt: skip
    result = json.loads((run_folder(done) / "result.json").read_text())
    assert result["protocol"] == protocol
    total = sum(result["rows"].values())
    if protocol == "windows":
        assert total == sum(max(1, len(items) - 10) for items in sequences.values())
        assert result["rows"]["train"] == int(0.8 * total) and result["rows"]["valid"] == int(0.9 * total) - int(
            0.8 * total
        )
    else:
        assert total == sum(len(items) - 1 for items in sequences.values()) and result["rows"]["test"] == 40


def test_doctor_names_every_defect():
    done = cli("doctor")
    assert done.returncode == 0, done.stderr
    for word in ("torch", "transformers", "recbole", "anomaly", "numpy", "timestamp"):
        assert word in done.stdout.lower()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["-h"], [], ["recommend", "--help"], ["doctor", "-h"], ["demo", "--help"]]
)
def test_help_lists_every_key(arguments):
    done = cli(*arguments)
    assert done.returncode == 0
    for file in [
        schema.PROPERTIES / "overall.yaml",
        schema.PROPERTIES / "llm.yaml",
        schema.PROPERTIES / "model/HatLLM.yaml",
    ]:
        for key in yaml.safe_load(file.read_text()):
            assert re.search(rf"\b{key}\b", done.stdout), key


@pytest.mark.parametrize("file", sorted(schema.PROPERTIES.rglob("*.yaml")), ids=lambda path: path.name)
def test_every_yaml_of_the_properties_is_taken(file):
    """Each is loaded as the package loads it, or as a user's --config_files."""
    from recbole_hatllm.config import Config

    if file.parent.name == "model":
        Config(file.stem, "ml-100k")
    elif file.parent.name == "dataset":
        Config("HatLLM", file.stem)
    elif file.parent.name == "suite":
        from recbole_hatllm.suite import check, read_suite

        check(read_suite(file, dataset="ml-100k"))
    elif file.parent.name == "search":
        from recbole_hatllm.space import check_space, read_space

        check_space(read_space(file), file.stem, "ml-100k", {})
    else:
        Config("HatLLM", "ml-100k", [str(file)])


def test_config_files_and_the_readmes_commands(tmp_path):
    (tmp_path / "mine.yaml").write_text("n_in: 2\nlearning_rate: 1e-3\n")
    write_dataset(tmp_path / "data", "own", random_sequences(12, 9))
    done = cli("--model=HatLLM", "--dataset=own", f"--data_path={tmp_path / 'data'}", *TINY, "--n_cr=1",
               f"--config_files={tmp_path / 'mine.yaml'}", f"--runs_dir={tmp_path}")  # fmt: skip
    config = yaml.safe_load((run_folder(done) / "config.yaml").read_text())
    assert config["n_in"] == 2 and config["learning_rate"] == 0.001


def test_the_readme_shows_commands_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"python run_hatllm\.py (\w+)?", text)
    from recbole_hatllm.cli import COMMANDS

    assert commands and {name for name in commands if name} <= COMMANDS.keys()
    assert text.index("make run") < text.index("make test") < text.index("pip install")
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^make (\w+)", text, flags=re.M)):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
    of_commands = {"key", "model", "dataset", "config_files", "resume", "run", "history", "k", *PREPARE_KEYS}
    of_commands |= {"models", "seeds"}
    flags = set(re.findall(r"--(\w+)=", text)) - of_commands
    declared = schema.keys_of(*schema.PROPERTIES.glob("*.yaml"), *schema.PROPERTIES.glob("model/*.yaml"))
    known_to_recbole = {"epochs", "data_path"}
    assert flags <= declared.keys() | known_to_recbole, flags - declared.keys()


def refused(*arguments, cwd=ROOT) -> str:
    """The one sentence that a bad command ends in."""
    done = cli(*arguments, cwd=cwd)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()[-1:]
    assert line.startswith("error: ")
    return line


BAD_KEYS = [
    (["--model=HatLM"], r"HatLM.*HatLLM"),
    (["--model=HatLLM", "--dataset=ml-100x"], r"ml-100x.*ml-100k"),
    (["--model=HatLLM", "--n_inn=3"], r"n_inn.*n_in"),
    (["--model=HatLLM", "--backbone=random-tiny", "--n_in=3", "--n_cr=2"], r"n_in.*3.*n_cr.*2.*4"),
    (["--model=HatLLM", "--train_steps=-5"], r"train_steps.*-5"),
    (["--model=HatLLM", "--n_in=-1"], r"n_in.*-1"),
    (["--model=HatLLM", "--lora_r=0"], r"lora_r.*0"),
    (["--model=HatLLM", "--dtype=float12"], r"dtype.*float12"),
    (["--model=HatLLM", "--item_span=titel"], r"item_span.*titel"),
    (["--model=HatLLM", "--learning_rate=fast"], r"learning_rate.*fast"),
    (["--model=HatLLM", "--config_files=absent.yaml"], r"absent\.yaml"),
    (["--model=HatLLM", "n_in=3"], r"n_in=3"),
    (["--dataset=ml-100k"], r"--model"),
    (["recommand"], r"recommand"),
    (["--resume=nowhere"], r"nowhere is not a run folder"),
    (["recommend", "--run=nowhere", "--history=Heat"], r"nowhere is not a run folder"),
    (["--model=HatLLM", "--backbone=absent.gguf"], r"absent\.gguf"),
    (["--model=HatLLM", "--backbone=random-tiny", "--backbone_layers=9"], r"9.*4|4.*9"),
    (["--model=HatLLM", "--backbone=random-tiny", "--lora_targets=[nothing]", *HAT], r"nothing"),
    (["--model=HatLLM", "--backbone=random-tiny", "--load_in_4bit=true", *HAT], r"load_in_4bit"),
]


@pytest.mark.parametrize("arguments, message", BAD_KEYS, ids=[" ".join(a) for a, _ in BAD_KEYS])
def test_bad_keys_end_in_one_sentence(arguments, message, tmp_path):
    if arguments[0].startswith("--") and not any(a.startswith(("--dataset", "--resume")) for a in arguments):
        arguments = [*arguments, "--dataset=ml-100k"]
    if arguments[0].startswith("--model"):
        arguments = [*arguments, f"--runs_dir={tmp_path}"]
    assert re.search(message, refused(*arguments))


def test_malformed_yaml_is_named_with_its_line(tmp_path):
    (tmp_path / "bad.yaml").write_text("n_in: 3\norder: [IN\nn_cr: 1\n")
    assert re.search(
        r"bad\.yaml.*line [23]",
        refused("--model=HatLLM", "--dataset=ml-100k", f"--config_files={tmp_path / 'bad.yaml'}"),
    )


def test_unknown_items_and_empty_histories(finished):
    assert re.search(
        r"'Toy Storry'.*Toy Story \(1995\)", refused("recommend", f"--run={finished}", "--history=Toy Storry")
    )
    assert "empty" in refused("recommend", f"--run={finished}", "--history= ; ")
    assert "5000" in refused("recommend", f"--run={finished}", "--history=Heat", "--k=5000")
