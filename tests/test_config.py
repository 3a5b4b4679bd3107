"""What the user says, what follows from it, and what is refused before any work."""

import os
import sys

import numpy as np
import pytest
import torch
import yaml
from recbole.utils import ModelType

from recbole_hatllm import registry, schema
from recbole_hatllm.config import Config, parse_overrides
from recbole_hatllm.errors import ConfigError


def bpr(dataset="ml-100k", files=None, **keys):
    return Config("BPR", dataset, files, keys)


def test_the_protocol_is_the_same_for_all_families():
    kinds = {
        "HatLLM": ModelType.SEQUENTIAL,
        "SASRec": ModelType.SEQUENTIAL,
        "BPR": ModelType.GENERAL,
        "Pop": ModelType.TRADITIONAL,
    }
    for model, kind in kinds.items():
        config = Config(model, "ml-100k")
        assert config["MODEL_TYPE"] == kind
        assert config["eval_args"] == {
            "split": {"LS": "valid_and_test"},
            "group_by": "user",
            "order": "TO",
            "mode": {"valid": "full", "test": "full"},
        }
        assert (config["metrics"], config["topk"], config["valid_metric"]) == (["Hit", "NDCG"], [5, 10], "NDCG@10")
        assert config["load_col"] == {"inter": ["user_id", "item_id", "timestamp"]}
        assert (config["seed"], config["reproducibility"], config["MAX_ITEM_LIST_LENGTH"]) == (2026, True, 10)
        assert config["protocol"] == "leave_one_out" and config["normalize_all"] is False


def test_priority_runs_from_recbole_to_the_dict(tmp_path):
    (tmp_path / "one.yaml").write_text("seed: 1\nlearning_rate: 1e-2\nn_cr: 0\nlora_r: 3\n")
    (tmp_path / "two.yaml").write_text("learning_rate: 2e-2\nn_cr: 1\n")
    config = Config("HatLLM", "ml-100k", [tmp_path / "one.yaml", str(tmp_path / "two.yaml")], {"n_cr": 3})
    assert (config["seed"], config["learning_rate"], config["n_cr"], config["lora_r"]) == (1, 2e-2, 3, 3)
    assert config["n_in"] == 4  # model/HatLLM.yaml
    assert config["lora_alpha"] == 16  # llm.yaml
    assert config["title_field"] == "movie_title" and config["prompt_noun"] == "movie"  # dataset/ml-100k.yaml
    assert config["NEG_PREFIX"] == "neg_"  # RecBole's own


def test_llm_keys_are_for_llm_recommenders():
    assert Config("BIGRec", "ml-100k")["backbone"] == "smollm2-135m"
    assert bpr()["backbone"] is None
    assert bpr()["train_batch_size"] == 2048 and bpr()["embedding_size"] == 64  # RecBole's own values stay


def test_keys_of_the_data_follow_the_field_names():
    assert bpr(USER_ID_FIELD="u", TIME_FIELD="when")["load_col"] == {"inter": ["u", "item_id", "when"]}
    given = {"inter": ["user_id", "item_id", "rating", "timestamp"]}
    assert bpr(load_col=given)["load_col"] == given


def test_sasrec_and_its_like_need_no_more_keys():
    assert Config("SASRec", "ml-100k")["train_neg_sample_args"]["distribution"] == "none"
    assert Config("SASRec", "ml-100k", config_dict={"loss_type": "BPR"})["train_neg_sample_args"]["sample_num"] == 1
    assert bpr()["train_neg_sample_args"]["distribution"] == "uniform"


UNKNOWN = [
    ("n_inn", "n_in"),
    ("learning-rate", "learning_rate"),
    ("Epochs", "epochs"),
    ("embeding_size", "embedding_size"),
]


@pytest.mark.parametrize("key, near", UNKNOWN)
def test_an_unknown_key_names_the_nearest(key, near, tmp_path):
    with pytest.raises(ConfigError, match=f"{key}.*{near}"):
        Config("HatLLM", "ml-100k", config_dict={key: 1})
    (tmp_path / "f.yaml").write_text(f"{key}: 1\n")
    with pytest.raises(ConfigError, match=f"{key}.*{near}"):
        Config("HatLLM", "ml-100k", [tmp_path / "f.yaml"])


def test_keys_that_recbole_reads_without_declaring_are_known():
    assert bpr(tail_ratio=0.2)["tail_ratio"] == 0.2


def test_a_key_of_another_model_is_said(caplog):
    Config("BIGRec", "ml-100k", config_dict={"history_decay": 0.5})
    assert "BIGRec does not read the key history_decay" in caplog.text
    caplog.clear()
    Config("HatLLM", "ml-100k", config_dict={"n_in": 2, "epochs": 3, "hidden_size": 4})
    assert "n_in" not in caplog.text and "HatLLM does not read the key hidden_size" in caplog.text


@pytest.mark.parametrize(
    "keys, match",
    [
        ({"seed": -1}, "seed.*-1"),
        ({"protocol": "loo"}, "protocol.*loo.*leave_one_out"),
        ({"topk": [0]}, r"topk.*\[0\]"),
        ({"MAX_ITEM_LIST_LENGTH": 0}, "MAX_ITEM_LIST_LENGTH.*0"),
        ({"missing_title": "no"}, "missing_title.*error, id"),
        ({"metrics": ["NDGC"]}, "NDGC.*ndcg"),
        ({"valid_metric": "NDCG@20"}, "NDCG@20.*NDCG@10"),
        ({"eval_args": {"split": {"RS": [8, 1, 1]}}}, "protocol"),
        ({"benchmark_filename": ["a", "b", "c"]}, "protocol"),
        ({"seed": object()}, "seed.*plain value"),
        ({"train_steps": "many"}, "train_steps.*many"),
    ],
    ids=str,
)
def test_bad_values_are_refused(keys, match):
    with pytest.raises(ConfigError, match=match):
        bpr(**keys)


@pytest.mark.parametrize(
    "model, match",
    [
        ("HatLM", "HatLM.*HatLLM"),
        ("sasrec", "sasrec.*SASRec"),
        ("Foo", "There is no model 'Foo'[.]"),
        ("DeepFM", "context-aware"),
        ("KGAT", "knowledge-aware"),
        ("LightGBM", "decision-tree"),
        ("KSR", "KSR.*SASRec"),
        (None, "--model"),
    ],
)
def test_unknown_and_refused_models(model, match):
    with pytest.raises(ConfigError, match=match):
        Config(model, "ml-100k")


def test_model_names_and_classes():
    names = registry.model_names()
    assert {"HatLLM", "BIGRec", "SASRec", "BPR", "Pop", "LightGCN"} <= set(names)
    assert not {"DeepFM", "KGAT", "KSR", "LLMRecommender", "TokenMixer"} & set(names) and len(set(names)) == len(names)
    assert names[: len(registry.own_models())] == registry.own_models()
    from recbole.model.sequential_recommender import SASRec

    assert registry.model_class("SASRec") is SASRec


def test_a_model_class_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from recbole.model.general_recommender import BPR\n\n\nclass Mine(BPR):\n"
        "    def __init__(self, config, dataset):\n        self.width = config['my_width']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import mine

    config = Config(mine.Mine, "ml-100k", config_dict={"my_width": 3})
    assert config["model"] == "Mine" and config["my_width"] == 3
    with pytest.raises(ConfigError, match="my_height"):
        Config(mine.Mine, "ml-100k", config_dict={"my_height": 3})


def test_datasets_are_found(tmp_path):
    assert bpr()["data_path"].endswith("dataset_example/ml-100k") and os.path.isdir(bpr()["data_path"])
    (tmp_path / "ml-100k").mkdir()
    (tmp_path / "books").mkdir()
    assert bpr(data_path=str(tmp_path))["data_path"] == str(tmp_path / "ml-100k")
    assert bpr("books", data_path=str(tmp_path))["data_path"] == str(tmp_path / "books")
    with pytest.raises(ConfigError, match=f"'boks' in {tmp_path}.*books.*--data_path"):
        bpr("boks", data_path=str(tmp_path))
    with pytest.raises(ConfigError, match="absent"):
        bpr("ml-100", data_path=str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="--dataset"):
        Config("BPR")


def test_missing_and_malformed_files(tmp_path):
    with pytest.raises(ConfigError, match="absent"):
        bpr(files=["absent.yaml"])
    (tmp_path / "bad.yaml").write_text("seed: 3\norder: [IN\nn_cr: 1\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml.*line [23]"):
        bpr(files=[tmp_path / "bad.yaml"])


def test_the_command_line_is_never_read(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--seed=5", "--nonsense", "--state=os.getcwd()"])
    assert bpr()["seed"] == 2026


def test_what_the_user_passes_is_not_changed():
    given = {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 2}, "topk": [3, 10]}
    kept = yaml.safe_dump(given)
    bpr(**given)
    assert yaml.safe_dump(given) == kept
    from recbole.utils.argument_list import dataset_arguments

    assert len(dataset_arguments) == len(set(dataset_arguments)) and "title_field" not in dataset_arguments


@pytest.mark.parametrize(
    "text, value",
    [
        ("4", 4),
        ("1e-4", 1e-4),
        ("true", True),
        ("False", False),
        ("", None),
        ("[1, 2]", [1, 2]),
        ("{a: 1}", {"a": 1}),
        ("'5'", "5"),
        ("/a=b", "/a=b"),
        ("os.getcwd()", "os.getcwd()"),
        ("[]", []),
        ("a: b", "a: b"),
        ("- a", "- a"),
        ("@x", "@x"),
        ("*x", "*x"),
        ("0,1", "0,1"),
        ("a b", "a b"),
        ("2020-01-01", "2020-01-01"),
        ("SASRec", "SASRec"),
        ("None", "None"),
        ("1+1", "1+1"),
        ("%a", "%a"),
    ],
)
def test_overrides_are_read_as_yaml_and_never_run(text, value):
    assert parse_overrides([f"--key={text}"]) == {"key": value}


@pytest.mark.parametrize(
    "argv, match",
    [
        (["--key"], "--key=value"),
        (["key=1"], "key=1.*--key=value"),
        (["--key", "1"], "--key"),
        (["-k=1"], "-k=1"),
        (["--=1"], "--=1"),
        (["--a=1", "--a=2"], "--a is given twice, as 1 and 2"),
        (["--a=[1,"], r"--a=\[1,.*YAML"),
        (["--a={b"], r"--a=\{b.*YAML"),
    ],
)
def test_bad_overrides_are_refused(argv, match):
    with pytest.raises(ConfigError, match=match):
        parse_overrides(argv)


def test_overrides_reach_the_config():
    config = Config(
        "HatLLM",
        "ml-100k",
        config_dict=parse_overrides(["--learning_rate=1e-3", "--runs_dir=/a=b", "--lora_targets=[q]"]),
    )
    assert (config["learning_rate"], config["runs_dir"], config["lora_targets"]) == (1e-3, "/a=b", ["q"])
    assert Config("HatLLM", "ml-100k", config_dict={"learning_rate": "1e-3"})["learning_rate"] == 1e-3


@pytest.mark.parametrize("model", ["HatLLM", "SASRec", "BPR", "Pop", "BERT4Rec", "MultiVAE"])
def test_resolved_rebuilds_the_config(model, tmp_path):
    files = tmp_path / "f.yaml"
    files.write_text("topk: [1, 10]\n")
    keys = {
        "seed": np.int64(7),
        "protocol": "windows",
        "runs_dir": tmp_path / "runs",
        "data_path": str(tmp_path),
        "metrics": ("NDCG",),
    }
    config = Config(model, "ml-100k", [files], keys)
    resolved = yaml.safe_load(yaml.safe_dump(config.resolved()))
    assert resolved == config.resolved() and resolved["model"] == model and resolved["dataset"] == "ml-100k"
    assert "site-packages" not in str(resolved) and "gpu_id" not in resolved
    assert (resolved["seed"], resolved["topk"], resolved["data_path"]) == (7, [1, 10], str(tmp_path))
    for again in (Config(config_dict=resolved), Config(model, "ml-100k", config_dict=resolved)):
        assert again.final_config_dict == config.final_config_dict and again.resolved() == resolved
    config["seed"] = 8
    config.resolved()["topk"].append(3)
    assert config.resolved() == resolved


def test_the_device_and_the_users_environment(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert bpr()["device"].type == "cuda" and os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    for keys in ({"use_gpu": False}, {"gpu_id": ""}):
        assert bpr(**keys)["device"].type == "cpu" and os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    assert bpr(gpu_id=1)["device"].type == "cuda" and os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert bpr(gpu_id="0,2").resolved()["gpu_id"] == "0,2" and os.environ["CUDA_VISIBLE_DEVICES"] == "0,2"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bpr()["device"].type == "cpu"


@pytest.mark.parametrize("name", ["HatLLM", "BIGRec"])
def test_every_key_of_the_properties_has_its_declared_default(name):
    config = Config(name, "ml-100k")
    for key, declared in schema.keys_of(
        schema.PROPERTIES / "llm.yaml",
        schema.PROPERTIES / "model" / f"{name}.yaml",
        schema.PROPERTIES / "dataset" / "ml-100k.yaml",
    ).items():
        assert config[key] == declared.default, key
