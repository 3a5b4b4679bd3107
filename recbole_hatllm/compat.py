"""What RecBole 1.2.1 needs on today's stack: one function per defect, with its cause and how to see that it is gone.

`mend()` runs when `recbole_hatllm` is imported and costs nothing: a defect is mended in the moment that RecBole's
module is imported, by us or by anybody else. No file of RecBole is changed and nothing outside RecBole behaves
differently, apart from names that NumPy and SciPy have dropped and that are put back.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import logging
import re
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_SINE = "recbole.model.sequential_recommender.sine"


def _in_source(module: str, text: str) -> bool:
    """Whether the installed RecBole's file of `module` still has the lines that are the defect."""
    spec = importlib.util.find_spec(module)
    return spec is not None and text in Path(spec.origin).read_text(encoding="utf-8")


def _with(module: types.ModuleType, **replaced) -> types.ModuleType:
    """`module` with some names replaced, to be given to one importer of it."""
    view = types.ModuleType(module.__name__)
    vars(view).update(replaced, __getattr__=lambda name: getattr(module, name))
    return view


def numpy_names(configurator, load: Callable[[], None]) -> None:
    """RecBole reads np.float, np.str and the like, which its Config makes from np.float_: NumPy 2 has none of them.

    Gone when `Config.compatibility_settings` no longer names `np.float_`.
    """
    load()
    import numpy as np

    kinds = {"bool": np.bool_, "int": np.int_, "float": np.float64, "complex": np.complex128, "object": np.object_,
             "str": np.str_, "long": np.int_, "unicode": np.str_}  # fmt: skip
    for name, kind in kinds.items():
        if name not in vars(np):
            setattr(np, name, kind)

    def compatibility_settings(self):
        """The names are there since RecBole's Config was imported."""

    configurator.Config.compatibility_settings = compatibility_settings


def checkpoint_reading(module, load: Callable[[], None]) -> None:
    """torch >= 2.6 reads tensors only, but RecBole's checkpoints carry its Config: reading one back fails.

    Only these modules see a `torch.load` that reads whole objects; they read files that RecBole wrote itself. Being
    pickles, such files must come from somebody you trust. Gone when RecBole passes `weights_only`.
    """
    load()
    import torch

    def load_own_file(file, *args, **kwargs):
        return torch.load(file, *args, **{"weights_only": False, **kwargs})

    module.torch = _with(torch, load=load_own_file)


def anomaly_mode(sine, load: Callable[[], None]) -> None:
    """sine.py switches autograd's anomaly mode on for the whole process: every model trains far slower.

    The mode becomes again what it was before that import; where the import came before ours, it is switched off.
    Gone when `torch.is_anomaly_enabled()` is False after `import recbole.model.sequential_recommender`.
    """
    import torch

    asked_for = torch.is_anomaly_enabled() and not hasattr(sine, "SINE")
    check_nan = torch.is_anomaly_check_nan_enabled()
    load()
    torch.autograd.set_detect_anomaly(asked_for, check_nan)


def log_files(logger_module, load: Callable[[], None]) -> None:
    """`init_logger` calls `logging.basicConfig` without force: a second model logs into the first one's file.

    The handlers of the last call are replaced by those of the new one; handlers of others stay. Gone when two
    `init_logger` calls leave two files with content.
    """
    load()
    ours: list[logging.Handler] = []

    def configure(level, handlers):
        root = logging.getLogger()
        for handler in ours:
            root.removeHandler(handler)
            if isinstance(handler, logging.FileHandler):
                handler.close()
        ours[:] = handlers
        for handler in handlers:
            root.addHandler(handler)
        root.setLevel(level)

    logger_module.logging = _with(logging, basicConfig=configure)


def counted_metrics(collector, load: Callable[[], None]) -> None:
    """`Collector.get_data_struct` calls `.cpu()` on counts: ItemCoverage, AveragePopularity and others crash.

    What is no tensor is set aside meanwhile. Gone when those metrics come out of an evaluation.
    """
    load()
    import torch

    original = collector.Collector.get_data_struct

    def get_data_struct(self):
        held = self.data_struct._data_dict
        plain = {name: value for name, value in held.items() if not isinstance(value, torch.Tensor)}
        for name in plain:
            del held[name]
        struct = original(self)
        held.update(plain)
        struct._data_dict.update(plain)
        return struct

    get_data_struct.mended = True
    collector.Collector.get_data_struct = get_data_struct


def sparse_updates(recbole, load: Callable[[], None]) -> None:
    """LightGCN, NGCF, NCL, SpectralCF and GCMC fill a matrix by `dok_matrix._update`, which SciPy 1.13 removed.

    Gone when those models are built on SciPy >= 1.13.
    """
    load()
    from scipy.sparse import dok_matrix

    if not hasattr(dok_matrix, "_update"):
        dok_matrix._update = lambda self, entries: self._dict.update(entries)


def popularity_counts(pop, load: Callable[[], None]) -> None:
    """Pop adds one to an item for each batch it occurs in, however often: its counts depend on the batch size.

    The missing occurrences are added first. Gone when Pop's `item_cnt` is the number of interactions after an epoch.
    """
    load()
    original = pop.Pop.calculate_loss

    def calculate_loss(self, interaction):
        items, times = interaction[self.ITEM_ID].unique(return_counts=True)
        self.item_cnt[items, 0] += times - 1
        return original(self, interaction)

    calculate_loss.mended = True
    pop.Pop.calculate_loss = calculate_loss


@dataclass(frozen=True)
class Defect:
    """One thing that is wrong in RecBole 1.2.1, with or without today's stack.

    Args:
        name, what: for the reader. found: whether the installed versions have it, mended or not. mended: whether it is.
        mend: called as `mend(module, load)` when one of `modules` is imported; `load()` then runs the module. A
            defect without it is solved by a class of this package, which `mended` looks at.
    """

    name: str
    what: str
    found: Callable[[], bool]
    mended: Callable[[], bool]
    modules: tuple[str, ...] = ()
    mend: Callable[[types.ModuleType, Callable[[], None]], None] | None = None


def _newer(package: str, version: tuple[int, int]) -> bool:
    from importlib.metadata import version as installed

    return tuple(int(part) for part in re.findall(r"\d+", installed(package))[:2]) >= version


def _module(name: str) -> types.ModuleType:
    return importlib.import_module(name)


def _overrides(module: str, cls: str, method: str) -> bool:
    return method in vars(getattr(_module(f"recbole_hatllm.{module}"), cls))


_CONFIGURATOR = "recbole.config.configurator"
_POP = "recbole.model.general_recommender.pop"
_TRAINER = "recbole.trainer.trainer"
_READERS = (
    _TRAINER,
    "recbole.model.sequential_recommender.s3rec",
    *(f"recbole.model.general_recommender.{name}" for name in ("neumf", "convncf", "nais", "ract")),
)

DEFECTS = (
    Defect(
        "numpy names",
        "NumPy 2 has no np.float_, without which RecBole makes no Config",
        lambda: _newer("numpy", (2, 0)) and _in_source(_CONFIGURATOR, "np.float_"),
        lambda: not _module(_CONFIGURATOR).Config.compatibility_settings.__code__.co_names,
        (_CONFIGURATOR,),
        numpy_names,
    ),
    Defect(
        "checkpoints",
        "torch >= 2.6 refuses RecBole's own checkpoint when the best model is read back or a run resumed",
        lambda: (
            _newer("torch", (2, 6)) and _in_source(_TRAINER, "torch.load(checkpoint_file, map_location=self.device)")
        ),
        lambda: _module(_TRAINER).torch.load is not _module("torch").load,
        _READERS,
        checkpoint_reading,
    ),
    Defect(
        "anomaly mode",
        "importing any of RecBole's sequential models switches autograd's anomaly mode on for the process",
        lambda: _in_source(_SINE, "torch.autograd.set_detect_anomaly(True)"),
        lambda: _module(_SINE) and not _module("torch").is_anomaly_enabled(),
        (_SINE,),
        anomaly_mode,
    ),
    Defect(
        "log files",
        "a second model in one process logs into the first one's file",
        lambda: _in_source("recbole.utils.logger", "logging.basicConfig(level=level, handlers=[sh, fh])"),
        lambda: _module("recbole.utils.logger").logging is not logging,
        ("recbole.utils.logger",),
        log_files,
    ),
    Defect(
        "metrics of counts",
        "ItemCoverage, AveragePopularity, GiniIndex, ShannonEntropy and TailPercentage crash",
        lambda: _in_source("recbole.evaluator.collector", "self.data_struct._data_dict[key].cpu()"),
        lambda: hasattr(_module("recbole.evaluator.collector").Collector.get_data_struct, "mended"),
        ("recbole.evaluator.collector",),
        counted_metrics,
    ),
    Defect(
        "sparse matrices",
        "SciPy >= 1.13 has no dok_matrix._update, which LightGCN and others call",
        lambda: _newer("scipy", (1, 13)) and _in_source("recbole.model.general_recommender.lightgcn", "A._update("),
        lambda: _module("recbole") and hasattr(_module("scipy.sparse").dok_matrix, "_update"),
        ("recbole",),
        sparse_updates,
    ),
    Defect(
        "float32 timestamps",
        "RecBole sorts by timestamps of 64 s steps: 149 of 943 users of ml-100k get a wrong test item",
        lambda: _in_source("recbole.data.dataset.dataset", "torch.FloatTensor(value)"),
        lambda: _overrides("data.dataset", "HatDataset", "_load_inter_feat"),
    ),
    Defect(
        "SASRec's defaults",
        "RecBole's Config refuses SASRec, and every model with loss_type CE, without train_neg_sample_args: none",
        lambda: _in_source(_CONFIGURATOR, "when the loss_type is CE."),
        lambda: _overrides("config", "Config", "_settle"),
    ),
    Defect(
        "Pop's counts",
        "Pop counts an item once a batch, so that its ranking depends on the batch size",
        lambda: _in_source(_POP, "self.item_cnt[item, :] + 1"),
        lambda: hasattr(_module(_POP).Pop.calculate_loss, "mended"),
        (_POP,),
        popularity_counts,
    ),
    Defect(
        "Pop's negatives",
        "RecBole's Config gives Pop one random item for each interaction, which it counts too",
        lambda: _in_source(_POP, "input_type = InputType.POINTWISE"),
        lambda: _overrides("config", "Config", "_settle"),
    ),
    Defect(
        "CUDA_VISIBLE_DEVICES",
        "RecBole's Config overwrites it with gpu_id, whose default is 0",
        lambda: _in_source(_CONFIGURATOR, 'os.environ["CUDA_VISIBLE_DEVICES"] = gpu_id'),
        lambda: _overrides("config", "Config", "_init_device"),
    ),
)


class _Mender(importlib.abc.MetaPathFinder):
    """Leaves finding a module to the others and puts our functions around its loading."""

    def find_spec(self, name, path=None, target=None):
        mendings = [defect.mend for defect in DEFECTS if name in defect.modules]
        if not mendings:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: _mend_module(module, mendings, lambda: execute(module))
        return spec


def _mend_module(module: types.ModuleType, mendings: list, load: Callable[[], None]) -> None:
    """Each mending wraps the loading of the one before, so that the module is run once."""
    for mend_one in mendings:
        load = lambda mend_one=mend_one, load=load: mend_one(module, load)  # noqa: E731
    load()


def mend() -> None:
    """Mends all `DEFECTS` that need it: at once in modules that are imported already, otherwise on their import."""
    if any(isinstance(finder, _Mender) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Mender())
    for defect in DEFECTS:
        for name in defect.modules:
            if name in sys.modules:
                defect.mend(sys.modules[name], lambda: None)
