"""`evaluate`: a finished run measured again by other keys is the run that had these keys from the start."""

import json
from pathlib import Path

import pytest

from recbole_hatllm import run
from recbole_hatllm.cli import main
from recbole_hatllm.errors import ConfigError, DataError
from recbole_hatllm.measurement import evaluate
from recbole_hatllm.run_folder import read_ranks
from tests.conftest import random_sequences, write_dataset


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["HatLLM", "SASRecFast", "BPR", "MarkovChain"])
def test_it_is_what_a_run_with_these_keys_measures(tiny, name):
    """With one validation the keys decide nothing but the test."""
    own = tiny if name == "HatLLM" else {key: tiny[key] for key in ("data_path", "runs_dir", "show_progress")}
    own = {**own, **({"train_steps": 3, "eval_step": 3} if name == "HatLLM" else {"epochs": 1})}
    kept, masked = (run(name, "tiny", config_dict={**own, "mask_history": mask, "topk": [3, 7], "valid_metric": "NDCG@7"})
                    for mask in (False, True))  # fmt: skip
    before = files(kept["folder"])
    found = evaluate(kept["folder"], {"mask_history": True})
    for part in ("test", "test_interval", "test_parts", "rows", "history_masked"):
        assert found[part] == masked[part], part
    assert kept["test"] != masked["test"] and found["valid"] == kept["valid"]
    assert (read_ranks(found["folder"])["rank"] == read_ranks(masked["folder"])["rank"]).all()
    assert files(kept["folder"]) == before
    assert json.loads((Path(found["folder"]) / "result.json").read_text())["evaluated"]["keys"] == {
        "mask_history": True
    }
    sample = evaluate(kept["folder"], {"eval_sample": 9})
    assert sample["rows"]["test"] == 9 == len(read_ranks(sample["folder"])["rank"])


def test_the_command_tells_and_leaves_what_analyze_reads(tiny, capsys):
    folder = run("HatLLM", "tiny", config_dict=tiny)["folder"]
    assert main(["evaluate", f"--run={folder}", "--mask_history=true"]) == 0
    said = capsys.readouterr().out
    assert "test, history masked: HR@5" in said and f"{folder}-mask_history-true" in said and "same day" in said
    assert main(["evaluate", f"--run={folder}", "--mask_history=true", f"--folder={folder}-mine"]) == 0
    again = ["analyze", "errors", f"--run={folder}-mask_history-true", f"--against={folder}-mine"]
    assert main(again) == 0
    assert main(["evaluate", f"--run={folder}", "--learning_rate=1"]) == 2
    assert "evaluate cannot change learning_rate" in capsys.readouterr().err


def test_what_cannot_be_measured_is_said(tiny, tmp_path):
    folder = run("SASRecFast", "tiny", config_dict={**{k: tiny[k] for k in ("data_path", "runs_dir")}, "epochs": 1})[
        "folder"
    ]
    with pytest.raises(ConfigError, match="is not a run folder"):
        evaluate(tmp_path, {})
    write_dataset(tmp_path / "other", "tiny", random_sequences(9, 12))
    with pytest.raises(DataError, match="items"):
        evaluate(folder, {"data_path": str(tmp_path / "other")})
    write_dataset(tmp_path / "more", "tiny", random_sequences(31, 20))
    with pytest.raises(DataError, match=r"was trained on|items"):
        evaluate(folder, {"data_path": str(tmp_path / "more")})
    assert not [path for path in Path(folder).parent.iterdir() if path.name.startswith(f"{Path(folder).name}-")]
