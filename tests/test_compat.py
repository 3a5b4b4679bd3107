"""Each mending of RecBole: the defect shows where the mending is left out, and does not where it is not.

`python tests/test_compat.py` is the other half of this file: it runs every check with all mendings and with all but
its own, each in a process of its own, and prints the outcomes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
import types
from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.versions

ROOT = Path(__file__).parents[1]
NAMES = [
    "numpy names",
    "checkpoints",
    "anomaly mode",
    "log files",
    "metrics of counts",
    "sparse matrices",
    "float32 timestamps",
    "SASRec's defaults",
    "Pop's counts",
    "Pop's negatives",
    "CUDA_VISIBLE_DEVICES",
]


# --- One check a defect: it fails on the bare stack. `ours` says which of the two Configs and datasets to take.


def stock_config(model="BPR", **keys):
    from recbole.config import Config

    return Config(model, "ml-100k", config_dict=keys)


def check_numpy_names(ours):
    import numpy as np

    assert stock_config()["model"] == "BPR" and np.zeros(1, dtype=np.float).dtype == np.float64


def check_checkpoints(ours):
    import torch
    from recbole.trainer import Trainer

    torch.save(
        {
            "config": stock_config(),
            "epoch": 4,
            "cur_step": 0,
            "best_valid_score": 0.1,
            "state_dict": {},
            "optimizer": {},
        },
        "best.pth",
        pickle_protocol=4,
    )
    loaded = SimpleNamespace(load_state_dict=lambda state: None, load_other_parameter=lambda values: None)
    trainer = SimpleNamespace(
        device="cpu", model=loaded, optimizer=loaded, config=stock_config(), logger=SimpleNamespace(info=print)
    )
    Trainer.resume_checkpoint(trainer, "best.pth")
    assert trainer.start_epoch == 5
    try:
        torch.load("best.pth")
    except Exception:
        return
    assert tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6), "torch.load was loosened for the whole process"


def check_anomaly_mode(ours):
    import torch
    from recbole.model.sequential_recommender.sasrec import SASRec

    assert SASRec and not torch.is_anomaly_enabled()


def check_log_files(ours):
    import logging

    from recbole.utils import init_logger

    kept = logging.StreamHandler()
    if ours:  # with a handler there already, RecBole's would not be added at all
        logging.getLogger().addHandler(kept)
    for model in ("BPR", "Pop"):
        init_logger(stock_config(model))
        logging.getLogger().info("this is %s", model)
    assert not ours or kept in logging.getLogger().handlers
    for model in ("BPR", "Pop"):
        (file,) = Path("log", model).glob("*.log")
        assert file.read_text().strip().endswith(f"this is {model}")


def check_metrics_of_counts(ours):
    import torch
    from recbole.evaluator import Collector, Evaluator

    config = stock_config(metrics=["ItemCoverage", "AveragePopularity"], topk=[1], valid_metric="ItemCoverage@1")
    collector = Collector(config)
    train = SimpleNamespace(dataset=SimpleNamespace(num=lambda field: 5, item_counter={1: 3, 2: 5}))
    collector.data_collect(train)
    for _ in range(2):  # an evaluation must leave the counts in place for the next one
        collector.data_struct.update_tensor("rec.items", torch.tensor([[1], [2]]))
        result = Evaluator(config).evaluate(collector.get_data_struct())
        assert result == {"itemcoverage@1": 0.4, "averagepopularity@1": 4.0}


def check_sparse_matrices(ours):
    import numpy as np
    from recbole.model.general_recommender.lightgcn import LightGCN
    from scipy.sparse import coo_matrix

    matrix = coo_matrix((np.ones(2, dtype=np.float32), ([1, 2], [2, 1])), shape=(3, 3))
    dataset = SimpleNamespace(num=lambda field: 3, inter_matrix=lambda form: matrix)
    assert LightGCN(stock_config("LightGCN"), dataset).norm_adj_matrix.to_dense().count_nonzero() == 4


def check_float32_timestamps(ours):
    from recbole.data import create_dataset as recboles

    from recbole_hatllm.config import Config
    from recbole_hatllm.registry import create_dataset

    Path("close").mkdir()
    rows = [f"u\t{item}\t{1_000_000_000 + second}" for item, second in (("c", 2), ("b", 1), ("d", 3), ("a", 0))]
    Path("close/close.inter").write_text("\n".join(["user_id:token\titem_id:token\ttimestamp:float", *rows, ""]))
    config = Config("SASRec", "close", config_dict={"data_path": "."})
    dataset = (create_dataset if ours else recboles)(config)
    test = dataset.build()[2]
    assert dataset.id2token("item_id", test.inter_feat["item_id"].numpy()).tolist() == ["d"]


def check_sasrecs_defaults(ours):
    from recbole_hatllm.config import Config

    config = Config("SASRec", "ml-100k") if ours else stock_config("SASRec")
    assert config["train_neg_sample_args"]["distribution"] == "none"


def check_pops_counts(ours):
    import torch
    from recbole.model.general_recommender.pop import Pop

    model = Pop(stock_config("Pop"), SimpleNamespace(num=lambda field: 4))
    for items in ([1, 1, 2], [1, 3, 3]):
        model.calculate_loss({"item_id": torch.tensor(items)})
    assert model.item_cnt[:, 0].tolist() == [0, 3, 1, 2] and model.max_cnt == 3


def check_pops_negatives(ours):
    from recbole_hatllm.config import Config

    config = Config("Pop", "ml-100k") if ours else stock_config("Pop")
    assert config["train_neg_sample_args"]["distribution"] == "none"


def check_cuda_visible_devices(ours):
    from recbole_hatllm.config import Config

    os.environ["CUDA_VISIBLE_DEVICES"] = "3"
    assert (Config("BPR", "ml-100k") if ours else stock_config()) and os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def check_for(name):
    return globals()["check_" + name.lower().replace("'", "").replace(" ", "_")]


def outcome(name: str, left_out: bool) -> str:
    """'' where the check passes in a forked process, otherwise the last line of its traceback."""
    read, write = os.pipe()
    if os.fork() == 0:
        said = ""
        try:
            package = types.ModuleType("recbole_hatllm")  # the package without the mending at its import
            package.__path__ = [str(ROOT / "recbole_hatllm")]
            sys.modules["recbole_hatllm"] = package
            from recbole_hatllm import compat

            compat.DEFECTS = tuple(d for d in compat.DEFECTS if not (left_out and d.name == name))
            compat.mend()
            os.chdir(tempfile.mkdtemp(dir=sys.argv[1]))
            sys.argv = sys.argv[:1]  # RecBole's own Config reads it
            sys.stdout = sys.stderr
            check_for(name)(not left_out)
        except BaseException:
            said = traceback.format_exc().strip().splitlines()[-1] or "failed"
        os.write(write, said.encode()[:60_000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.wait()
    return said


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    command = [sys.executable, __file__, str(tmp_path_factory.mktemp("compat"))]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- Tests


def test_every_defect_is_checked():
    from recbole_hatllm import compat

    assert [defect.name for defect in compat.DEFECTS] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_defect_shows_only_without_its_mending(name, outcomes):
    from recbole_hatllm import compat

    (defect,) = (d for d in compat.DEFECTS if d.name == name)
    with_all, without = outcomes[name]
    assert with_all == ""
    assert bool(without) == defect.found(), without
    assert defect.mended()


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_anomaly_mode_of_the_user_stays():
    code = (
        "import torch; torch.autograd.set_detect_anomaly(True); import recbole_hatllm\n"
        "from recbole.model.sequential_recommender import SASRec; print(torch.is_anomaly_enabled())"
    )
    assert python(code) == "True"


def test_anomaly_mode_is_off_where_recboles_models_came_first():
    code = (
        "import recbole.model.sequential_recommender, torch; before = torch.is_anomaly_enabled()\n"
        "import recbole_hatllm; print(before, torch.is_anomaly_enabled())"
    )
    assert python(code) == "True False"


def test_the_import_brings_nothing_heavy():
    heavy = ("torch", "numpy", "recbole", "ray", "thop", "plotly", "transformers")
    assert python(f"import sys, recbole_hatllm; print([name for name in {heavy} if name in sys.modules])") == "[]"


def test_mending_twice_changes_nothing():
    code = (
        "import sys, recbole_hatllm.compat as c; n = len(sys.meta_path); c.mend(); print(len(sys.meta_path) == n)\n"
        "from recbole.evaluator import Collector; f = Collector.get_data_struct\n"
        "c.mend(); print(Collector.get_data_struct is f)"
    )
    assert python(code) == "True\nTrue"


if __name__ == "__main__":
    import pandas  # noqa: F401  # what RecBole imports, once for all forked processes
    import scipy.sparse  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    print(json.dumps({name: [outcome(name, left_out=False), outcome(name, left_out=True)] for name in NAMES}))
