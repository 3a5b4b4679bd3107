"""RecBole's Config with this package's keys: what is unknown or out of range is an error before any work begins.

Priority, from low to high: RecBole's own properties, our overall.yaml, llm.yaml (LLM recommenders), model/<Model>.yaml,
dataset/<name>.yaml, the user's files, the user's dict. The command line is read by `parse_overrides`, not here.
"""

from __future__ import annotations

import copy
import os
import re
import sys
from collections.abc import Iterable
from logging import getLogger
from pathlib import Path
from typing import Any

import yaml
from recbole import config as recbole_config
from recbole.utils import ModelType
from recbole.utils.argument_list import dataset_arguments, evaluation_arguments, general_arguments, training_arguments

from recbole_hatllm import registry, schema
from recbole_hatllm.data.sources import catalogue
from recbole_hatllm.errors import ConfigError

_RECBOLE = Path(recbole_config.__file__).parents[1]
_READ = re.compile(r"""config(?:\[|\.get\()["'](\w+)["']""")


class Config(recbole_config.Config):
    """All keys of one run; `config[key]` is None for a key that nobody set, `unread` are those given that only other
    models read.

    Args:
        model: a name of `registry.model_names()` or a class. dataset: the name of a folder with atomic files. Either
            may stand in the files or the dict instead.
        config_file_list: YAML files. config_dict: keys that override them, with plain values.

    Raises:
        ConfigError: an unknown model, dataset or key (the nearest known ones are named), a value out of range, a
            file that is missing or no YAML.
    """

    def __init__(self, model=None, dataset=None, config_file_list=None, config_dict=None):
        try:
            super().__init__(model, dataset, config_file_list, config_dict)
        except (ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
            raise ConfigError(f"RecBole refuses these keys: {str(error).strip() or type(error).__name__}") from error

    # --- What the user says

    def _init_parameters_category(self):
        super()._init_parameters_category()
        # RecBole adds a dataset's keys to these lists, which belong to the whole process.
        self.parameters = {category: list(keys) for category, keys in self.parameters.items()}

    def _load_config_files(self, file_list):
        keys: dict[str, Any] = {}
        for file in file_list or []:
            keys.update(schema.read_yaml(file))
        return keys

    def _load_variable_config_dict(self, config_dict):
        return {key: _plain(key, value) for key, value in (config_dict or {}).items()}

    def _load_cmd_line(self):
        return {}

    def _get_model_and_dataset(self, model, dataset):
        model = model or self.external_config_dict.get("model")
        dataset = dataset or self.external_config_dict.get("dataset")
        for name, value in (("model", model), ("dataset", dataset)):
            if not value:
                raise ConfigError(f"No {name} is named: pass it as the {name} argument or by --{name}=NAME.")
        model_class = registry.model_class(model) if isinstance(model, str) else model
        return super()._get_model_and_dataset(model_class, str(dataset))

    # --- Merging

    def _load_internal_config_dict(self, model, model_class, dataset):
        super()._load_internal_config_dict(model, model_class, dataset)
        layers = ["overall.yaml", "llm.yaml", f"model/{model}.yaml", _dataset_layer(dataset)]
        if not getattr(model_class, "is_llm", False):
            layers.remove("llm.yaml")
        files = [schema.PROPERTIES / layer for layer in layers if (schema.PROPERTIES / layer).is_file()]
        for file in files:
            self.internal_config_dict.update(schema.read_yaml(file))
        self.keys = schema.keys_of(*files)

    def _get_final_config_dict(self):
        self._check_external()
        final = copy.deepcopy(super()._get_final_config_dict())
        final.update(model=self.model, dataset=self.dataset)
        self._settle(final)
        self._check_protocol(final)
        visible = final.keys() - {"MODEL_TYPE"}
        if "gpu_id" not in self.external_config_dict:
            visible -= {"gpu_id"}
        self._resolved = copy.deepcopy({key: final[key] for key in sorted(visible)})
        return final

    def _check_external(self) -> None:
        external = self.external_config_dict
        arguments = (general_arguments, training_arguments, evaluation_arguments, dataset_arguments)
        own = {"model", "dataset", *self.internal_config_dict, *(key for keys in arguments for key in keys)}
        if foreign := [key for key in external if key not in own]:
            foreign = [key for key in foreign if key not in _keys_read_by(self.model_class)]
        declared = _declared_keys() if foreign else set()
        self.unread = foreign
        for key in foreign:
            if key not in declared:
                raise ConfigError(f"There is no key {key!r}{registry.nearest(key, own | declared)}")
            getLogger(__name__).warning("%s does not read the key %s, which other models have.", self.model, key)
        for key in external.keys() & self.keys.keys():
            external[key] = self.keys[key].check(external[key])
        for key in external.keys() - self.keys.keys():
            default = self.internal_config_dict.get(key)
            if _is_number(default) and not (_is_number(external[key]) or external[key] is None):
                raise ConfigError(f"{key} is {external[key]!r}, and must be a number such as {default}.")

    def _settle(self, final: dict[str, Any]) -> None:
        """Values that follow from others, unless the user gave them."""
        external = self.external_config_dict
        if "load_col" not in external:
            fields = [final["USER_ID_FIELD"], final["ITEM_ID_FIELD"], final["TIME_FIELD"]]
            final["load_col"] = {**(final["load_col"] or {}), "inter": fields}
        if "train_neg_sample_args" not in external and self._needs_no_negatives(final):
            final["train_neg_sample_args"] = None

    def _needs_no_negatives(self, final: dict[str, Any]) -> bool:
        """RecBole gives one uniform negative a row, as a row of its own where the model is pointwise; a model that takes
        every row for a positive one would learn it. RecBole refuses it for loss_type CE, and lets Pop count it."""
        if final["MODEL_TYPE"] == ModelType.TRADITIONAL or not getattr(self.model_class, "negatives_in_batch", True):
            return True
        by_loss = not hasattr(self.model_class, "input_type") and final.get("loss_type") == "CE"
        return by_loss and final["MODEL_TYPE"] == ModelType.SEQUENTIAL

    def _check_protocol(self, final: dict[str, Any]) -> None:
        from recbole.evaluator import metric_types

        if final["eval_args"] != self.keys["eval_args"].default or final.get("benchmark_filename"):
            raise ConfigError(
                "eval_args and benchmark_filename cannot be changed, so that all models rank the same items for the "
                "same rows: choose --protocol=leave_one_out or --protocol=windows."
            )
        if final["MODEL_TYPE"] not in (ModelType.SEQUENTIAL, ModelType.GENERAL, ModelType.TRADITIONAL):
            kind = final["MODEL_TYPE"].name.lower()
            raise ConfigError(f"{self.model} is a {kind} model; only sequential and general models are run here.")
        metrics = [final["metrics"]] if isinstance(final["metrics"], str) else final["metrics"]
        for metric in metrics:
            if str(metric).lower() not in metric_types:
                raise ConfigError(f"There is no metric {metric!r}{registry.nearest(metric, metric_types)}")
        cuts = [final["topk"]] if isinstance(final["topk"], int) else final["topk"]
        measured = [f"{metric}@{cut}" for metric in metrics for cut in cuts]
        if final["valid_metric"].lower() not in [name.lower() for name in measured]:
            raise ConfigError(
                f"valid_metric is {final['valid_metric']}, which metrics and topk do not measure: it must be one of "
                f"{', '.join(measured)}."
            )

    def _set_default_parameters(self):
        root = Path(self.final_config_dict["data_path"])
        super()._set_default_parameters()
        folder = root / self.dataset
        if self.dataset != catalogue.BUNDLED or folder.is_dir():
            self.final_config_dict["data_path"] = str(folder)
        if not folder.is_dir() and self.dataset not in catalogue.names():
            raise ConfigError(
                f"There is no dataset {self.dataset!r} in {root}{registry.nearest(self.dataset, _datasets(root))} "
                "Another folder is named with --data_path=DIR, and data of your own becomes one by `prepare`."
            )

    def _init_device(self):
        """The GPU where there is one and `use_gpu` holds; CUDA_VISIBLE_DEVICES stays unless `gpu_id` is given."""
        import torch

        final = self.final_config_dict
        gpu_id = self.external_config_dict.get("gpu_id")
        wanted = final["use_gpu"] and gpu_id != ""
        if wanted and gpu_id is not None:
            ids = gpu_id if isinstance(gpu_id, (list, tuple)) else [gpu_id]
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, ids))
        final["device"] = torch.device("cuda" if wanted and torch.cuda.is_available() else "cpu")
        final["single_spec"], final["local_rank"] = True, 0

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, plain and fit for YAML; `Config(config_dict=resolved)` is this config again.

        Values are those before RecBole derives others from them.
        """
        return copy.deepcopy(self._resolved)


def parse_overrides(argv: Iterable[str]) -> dict[str, Any]:
    """`--key=value` arguments as a dict; a value is read as YAML writes numbers, true/false, lists and dicts.

    Raises:
        ConfigError: an argument of another form, a key given twice, or a list or dict that is no YAML.
    """
    keys: dict[str, Any] = {}
    for argument in argv:
        match = re.fullmatch(r"--([A-Za-z_][\w-]*)=(.*)", argument, flags=re.DOTALL)
        if not match:
            raise ConfigError(f"{argument!r} is not understood: keys are written as --key=value.")
        name, text = match.groups()
        value = _scalar(name, text)
        if name in keys and keys[name] != value:
            raise ConfigError(f"--{name} is given twice, as {keys[name]!r} and {value!r}: leave one out.")
        keys[name] = value
    return keys


def _scalar(name: str, text: str) -> Any:
    if name in ("model", "dataset", "config_files", "history", "user"):  # names stay as they are written, 001 too
        return text
    flow = text.lstrip()[:1] in ("[", "{", '"', "'")
    try:
        value = yaml.load(text, schema.Loader)
    except yaml.YAMLError as error:
        if flow:
            raise ConfigError(f"--{name}={text} is not valid YAML: {schema.yaml_problem(error)}.") from error
        return text
    # `a: b` or `- a` would be block YAML; on a command line it is text.
    return value if flow or not isinstance(value, (dict, list)) else text


def _plain(key: str, value: Any) -> Any:
    """A copy of `value` that YAML can hold: tuples become lists, paths text, numbers of NumPy Python's."""
    if value is None or (isinstance(value, (bool, int, float, str)) and type(value).__module__ == "builtins"):
        return value
    if isinstance(value, dict):
        return {name: _plain(key, part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(key, part) for part in value]
    if isinstance(value, Path):
        return str(value)
    if callable(getattr(value, "item", None)):
        return value.item()
    raise ConfigError(
        f"{key} is {value!r}, and must be a plain value: a number, a text, true or false, a list or a dict."
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _declared_keys() -> set[str]:
    """The keys of all models and datasets, ours and RecBole's."""
    ours = [schema.PROPERTIES / "overall.yaml", schema.PROPERTIES / "llm.yaml", *schema.PROPERTIES.glob("[md]*/*.yaml")]
    keys = set().union(*map(schema.read_yaml, ours))
    for file in _RECBOLE.glob("properties/[moq]*/*.yaml"):
        keys |= set(re.findall(r"^(\w+):", file.read_text(encoding="utf-8"), flags=re.MULTILINE))
    return keys


def _keys_read_by(model_class: type) -> set[str]:
    """Keys that RecBole's common code, or the file of the model, reads without declaring them in a YAML file."""
    files = [file for file in _RECBOLE.rglob("*.py") if not file.parent.name.endswith("_recommender")]
    if file := getattr(sys.modules.get(model_class.__module__), "__file__", None):  # a notebook has none
        files.append(Path(file))
    return {key for file in files for key in _READ.findall(file.read_text(encoding="utf-8"))}


def _datasets(root: Path) -> list[str]:
    folders = [path.name for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    return sorted({*catalogue.names(), *folders})


def _dataset_layer(dataset: str) -> str:
    """The file in properties/ for a dataset; the releases of a category share one."""
    own = f"dataset/{dataset}.yaml"
    return own if (schema.PROPERTIES / own).is_file() else f"dataset/{catalogue.stem(dataset)}.yaml"
