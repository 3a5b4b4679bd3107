"""Every LLM recommender that the package has, against the contract."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recbole_hatllm.registry import model_class, own_models
from tests.model_contract import ModelContract

pytestmark = pytest.mark.versions


@pytest.mark.parametrize("name", [name for name in own_models() if getattr(model_class(name), "is_llm", False)])
class TestContract(ModelContract):
    pass


def test_the_model_of_the_documentation_runs(tiny_data, tmp_path):
    """docs/add_a_model.md: its two files in a copy of the package, and its command, with the bias of one item trained."""
    root = Path(__file__).parents[1]
    for part in ("recbole_hatllm", "properties"):
        shutil.copytree(root / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "run_hatllm.py", tmp_path)
    text = (root / "docs" / "add_a_model.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", text, flags=re.DOTALL)
    assert [file for file, _ in blocks] == [
        "recbole_hatllm/model/biasedbigrec.py",
        "properties/model/BiasedBIGRec.yaml",
    ]
    assert sum(content.count("\n") for _, content in blocks) <= 40
    for file, content in blocks:
        (tmp_path / file).write_text(content, encoding="utf-8")
    (command,) = re.findall(r"`python (run_hatllm.py --model=BiasedBIGRec [^`]*)`", text)
    small = [
        f"--data_path={tiny_data}",
        "--backbone=random-tiny",
        "--train_steps=3",
        "--eval_step=3",
        "--show_progress=false",
    ]
    arguments = [*command.replace("ml-100k", "tiny").split(), *small, f"--run_dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["model"] == "BiasedBIGRec" and result["steps"] == 3
