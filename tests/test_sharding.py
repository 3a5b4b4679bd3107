"""accelerate's FSDP: two processes with half of the frozen decoder each do what one with all of it does."""

from __future__ import annotations

import copy
import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from recbole_hatllm import distributed, resume, run, sharding
from recbole_hatllm.backbone import load_backbone
from recbole_hatllm.errors import ConfigError
from recbole_hatllm.pool import TokenPool
from tests.test_cli import ROOT
from tests.test_distributed import LLM, distance, finished, launch, stopped_by_ctrl_c
from tests.test_families import FAMILIES, KINDS, LORA, backbone_of, batch, masks_of, stock

# The file of docs/scaling.md, as `accelerate config` would write it, defaults left out.
FSDP = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
num_machines: 1
num_processes: 2
fsdp_config:
  fsdp_version: 2
  fsdp_reshard_after_forward: true
"""
# 13 and 12 rows a step make 5 and 4 micro-batches, 29 rows are tested, in batches of 5; a batch of 1 row leaves a share empty.
SHORT = {**LLM, "train_steps": 8, "eval_step": 4}
RUNS = {
    "last": {
        **SHORT, "eval_sample": 29, "eval_batch_size": 5, "gradient_checkpointing": True, "head_init": "title",
        "clip_grad_norm": {"max_norm": 0.05},
    },
    "all": {**SHORT, "train_batch_size": 8, "targets": "all", "head_init": "probe", "readout_norm": "whiten"},
}  # fmt: skip
DROPOUT = {**LLM, "lora_dropout": 0.2, "head_dropout": 0.1}
SEVERAL = """
import json, sys, torch
torch.set_num_threads(1)
from recbole_hatllm import run, sharding
shard, models = sharding.shard, []
def kept(model, device):
    models.append(model)
    shard(model, device)
sharding.shard = kept
for keys in json.loads(sys.argv[1]):
    run("HatLLM", "tiny", config_dict=keys)
    layers = models.pop().backbone.base.layers
    held = {True: 0, False: 0}  # bytes by whether they are trained
    for p in layers.parameters():
        held[p.requires_grad] += (p if p.requires_grad else p.to_local()).nbytes
    sys.stdout.write(f"{held[False]} frozen bytes, {held[True]} trained, ")  # one write: the other process writes too
    sys.stdout.flush()
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    (root / "fsdp.yaml").write_text(FSDP)
    return root


@pytest.fixture(scope="module")
def fsdp(root) -> list[str]:
    return [f"--config_file={root / 'fsdp.yaml'}"]


@pytest.fixture(scope="module")
def keys(tiny_data, root):
    """A backbone in a folder: transformers reads it otherwise where accelerate says FSDP."""
    made = load_backbone("random-tiny")
    made.base.save_pretrained(root / "backbone")
    made.tokenizer.save_pretrained(root / "backbone")
    place = {"data_path": str(tiny_data), "backbone": str(root / "backbone"), "show_progress": False}
    return lambda name, n: {**RUNS.get(name, DROPOUT), **place, "run_dir": str(root / f"{name}-{n}")}


@pytest.fixture(scope="module")
def output(keys, root, fsdp) -> str:
    """What two processes print in all `RUNS`."""
    script = root / "several.py"
    script.write_text(SEVERAL)
    runs = json.dumps([keys(name, 2) for name in (*RUNS, "dropout")])
    code, out, err = finished(launch(str(script), runs, flags=fsdp))
    assert code == 0, err
    return out


@pytest.mark.versions  # transformers 4 leaves weights empty where accelerate says FSDP
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_do_what_one_does(name, keys, output, root):
    torch.set_num_threads(1)
    alone = run("HatLLM", "tiny", config_dict=keys(name, 1))
    folder = root / f"{name}-2"
    together = json.loads((folder / "result.json").read_text())
    assert (alone["processes"], together["processes"]) == (1, 2)
    for part in ("valid", "test"):
        assert together[part] == pytest.approx(alone[part], abs=1e-4)
    for one, two in zip(alone["curve"], together["curve"], strict=True):
        assert two == pytest.approx({**one, "seconds": two["seconds"]}, abs=1e-4)
    assert distance(root / f"{name}-1", folder) < 1e-5
    one, two = (np.load(root / f"{name}-{n}" / "ranks.npz") for n in (1, 2))
    for column in ("user", "target", "rank"):
        assert (one[column] == two[column]).all()
    assert {path.name for path in folder.iterdir()} == {path.name for path in (root / f"{name}-1").iterdir()}


def test_each_process_holds_half_of_the_frozen_layers(output, keys):
    layers = load_backbone("random-tiny").base.layers
    frozen = sum(p.nbytes for p in layers.parameters())
    trained = 4 * 3584
    assert output.count(f"{frozen // 2} frozen bytes, {trained} trained, ") == 2 * (len(RUNS) + 1)
    assert (
        output.count(f"FSDP: {frozen / 2e6:.1f} of the {frozen / 1e6:.1f} MB of the decoder's layers") == len(RUNS) + 1
    )


def test_ctrl_c_and_resume_end_as_if_never_stopped(keys, output, root, fsdp, tmp_path):
    folder = tmp_path / "run"
    stopped_by_ctrl_c(folder, tmp_path / "slow.py", keys("dropout", 2), flags=fsdp)
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    code, _, err = finished(launch("run_hatllm.py", f"--resume={folder}", flags=fsdp, cwd=ROOT))
    assert code == 0, err
    assert distance(root / "dropout-2", folder) == 0
    assert resume(copied)["steps"] == 14  # in one process, with the whole backbone


@contextmanager
def process(monkeypatch, place: int = 0, places: int = 1):
    """This process as one that accelerate started for FSDP."""
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "_LAUNCHED", True)
        patch.setattr(distributed, "rank", lambda: place)
        patch.setattr(distributed, "world", lambda: places)
        patch.setenv("RANK", str(place))
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        yield patch


@pytest.fixture
def group():
    """The process group of one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.versions
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_the_same_in_shares(family, checkpointing, group, monkeypatch):
    """Hidden states and gradients, bit by bit, where a layer's weights come and go."""
    whole = backbone_of(stock(family))
    whole.set_schedule(KINDS)
    whole.add_lora(2, 4, 0.0, LORA.get(family))
    for name, parameter in whole.trainable().items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    shared = copy.deepcopy(whole)
    with process(monkeypatch):
        sharding.shard(SimpleNamespace(is_llm=True, backbone=shared), torch.device("cpu"))
    ids, positions, span, is_last, valid = batch()
    hidden = []
    for backbone in (whole, shared):
        if checkpointing:
            backbone.enable_gradient_checkpointing()
        backbone.train()
        hidden.append(backbone(positions, masks_of(span, is_last, valid), input_ids=ids, pool=TokenPool.of(valid, 0)))
        hidden[-1].square().mean().backward()
    assert hidden[1].equal(hidden[0])
    for name, parameter in whole.trainable().items():
        assert shared.get_parameter(name).grad.equal(parameter.grad) and parameter.grad.any()
    kinds = {type(p).__name__ for name, p in shared.named_parameters() if ".layers." in name and not p.requires_grad}
    assert kinds == {"DTensor"}


@pytest.mark.parametrize(
    "setting, value, remedy",
    [
        ("FSDP_VERSION", "1", "set fsdp_version: 2"),
        ("FSDP_RESHARD_AFTER_FORWARD", "false", "set fsdp_reshard_after_forward: true"),
        ("FSDP_OFFLOAD_PARAMS", "true", "leave it out"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "--gradient_checkpointing=true"),
        (None, "load_in_4bit", "load_in_4bit is true, and FSDP"),
        (None, "compile", "compile is true, and FSDP"),
    ],
)
def test_other_settings_are_refused_in_a_sentence(setting, value, remedy, monkeypatch):
    with process(monkeypatch) as patch, pytest.raises(ConfigError, match=remedy):
        if setting:
            patch.setenv(setting, value)
        sharding.check({key: key == value for key in ("load_in_4bit", "compile")})


@given(st.integers(0, 40), st.integers(1, 7))
def test_shares_are_of_one_size_and_hold_each_row(rows, places):
    with pytest.MonkeyPatch.context() as monkeypatch:
        shares = []
        for place in range(places):
            with process(monkeypatch, place, places):
                shares.append(distributed.share_of(rows))
    assert len({len(share) for share in shares}) == 1
    assert np.stack(shares, 1).flatten()[:rows].tolist() == list(range(rows))


def test_the_docs_show_this_config():
    assert FSDP.strip() in (ROOT / "docs" / "scaling.md").read_text()
