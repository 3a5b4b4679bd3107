"""One experiment: config -> dataset -> model -> trainer -> result."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from recbole.utils import init_seed

from recbole_hatllm import distributed, measurement, registry, run_folder, sharding, stages, weights
from recbole_hatllm.config import Config
from recbole_hatllm.errors import ConfigError, DataError, HatError
from recbole_hatllm.peak_memory import PeakMemory
from recbole_hatllm.trainer import GivenUp, Interrupted, trainer_class

logger = logging.getLogger(__name__)


def run(
    model: str,
    dataset: str,
    config_file_list: list[str] | None = None,
    config_dict: dict | None = None,
    callback_fn: Callable[[int, float], bool] | None = None,
) -> dict:
    """Trains and evaluates one model and leaves a run folder; processes that a launcher started do so together.

    Args:
        model: any name of `registry.model_names()`, e.g. HatLLM, BIGRec, SASRec, Pop.
        dataset: name of a folder with atomic files, or one that RecBole brings along, e.g. ml-100k.
        config_file_list: YAML files; config_dict: keys that override them. `--help` lists the keys.
        callback_fn: told the number of each validation and its valid_metric; a training that would go on is given up where it
            says True. Numbers count steps of eval_step (0 is before the first), or epochs from 0 where RecBole has a trainer of its
            own for a model. A run that goes on tells all validations that it has made before.

    Returns:
        what `result.json` holds (test and valid metrics, rows, protocol, seconds, versions ...) and `folder`.

    Raises:
        HatError: bad config, data or backbone. Interrupted: Ctrl-C. GivenUp: `callback_fn` wanted it; `resume` goes on.
    """
    config = _config(model, dataset, config_file_list, config_dict)
    folder = distributed.told(lambda: run_folder.create(config))
    try:
        return _execute(config, folder, callback_fn)
    except HatError:
        if distributed.first():
            run_folder.drop_unused(folder)
        raise


def resume(
    folder: str | Path,
    show_progress: bool | None = None,
    callback_fn: Callable[[int, float], bool] | None = None,
) -> dict:
    """Goes on with a run that was stopped, from its last saved state; a finished run is only read.

    Args:
        show_progress: over the key of the run's own config. callback_fn: as in `run`.
    """
    folder = Path(folder)
    stored = run_folder.read_config(folder)
    if result := run_folder.read_result(folder):
        return {**result, "folder": str(folder)}
    if show_progress is not None:
        stored["show_progress"] = show_progress
    return _execute(_config(stored.pop("model"), stored.pop("dataset"), None, stored), folder, callback_fn)


def _config(model, dataset, files, keys) -> Config:
    """The config, with the other processes met at its device."""
    try:
        config = Config(model, dataset, files, keys)
    except ConfigError as error:
        raise distributed.once(error) from None
    distributed.start(config["device"])
    sharding.check(config)
    return config


def _data(config):
    dataset = registry.create_dataset(config)
    return dataset, *registry.data_loaders(config, dataset)


def _execute(config, folder: Path, callback_fn: Callable[[int, float], bool] | None) -> dict:
    with _log_to(folder / "log.txt"):
        trainer_of = trainer_class(config)
        show_progress = config["show_progress"] and distributed.first()
        init_seed(config["seed"], config["reproducibility"])
        began = time.monotonic()
        peak = PeakMemory(config["device"])
        dataset, train, valid, test = distributed.in_turn(lambda: _data(config))
        distributed.told(lambda: stages.check(config, dataset.item_tokens))
        model = distributed.in_turn(lambda: registry.model_class(config["model"])(config, train.dataset))
        before = time.monotonic()
        peak.note()
        parents = _parents(config, folder)  # behind everything that may refuse this run
        peak.begin()  # seconds and memory are this run's own
        began += time.monotonic() - before
        if parents:
            distributed.in_turn(lambda: model.inherit({s.parent.role: s.folder for s in parents}, train.dataset))
        sharding.shard(model, config["device"])
        model = model.to(config["device"])
        logger.info("%s", model)
        if distributed.first():
            run_folder.write_items(folder, dataset.item_tokens, _names(dataset))
        items = weights.items_identity(dataset.item_tokens)
        trainer = trainer_of(config, model, folder, items)
        # Nothing that happened while the data and the model were made may reach the training's random numbers.
        init_seed(config["seed"], config["reproducibility"])
        if hasattr(trainer, "restore"):
            trainer.restore()
        prepared = time.monotonic()
        try:
            _, valid_result = trainer.fit(
                train, valid, verbose=False, show_progress=show_progress, callback_fn=callback_fn
            )
        except (Interrupted, GivenUp):
            logger.info("Stopped; the best so far is kept. Go on with --resume=%s", folder)
            raise
        trained = time.monotonic()
        if trainer.best() is None:  # nothing was trained or validated: the model as it is
            trainer._save_checkpoint(0)
        trainer.choose(valid)
        found, ranks = measurement.measure(trainer, test, show_progress)
        result = {
            "model": config["model"],
            "dataset": config["dataset"],
            **found,
            "valid": dict(valid_result) if valid_result else None,
            "rows": {name: len(part.dataset) for name, part in (("train", train), ("valid", valid), ("test", test))},
            "steps": getattr(trainer, "step", None),
            "best_step": getattr(trainer, "best_step", None),
            "curve": getattr(trainer, "history", []),
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "backbone": model.backbone.identity if getattr(model, "is_llm", False) else None,
            "parents": [stage.record() for stage in parents],
            "seed": config["seed"],
            "device": str(config["device"]),
            "processes": distributed.world(),
            "seconds": {
                "prepare": round(prepared - began, 2),
                "train": round(getattr(trainer, "seconds", trained - prepared), 2),
                "test": round(time.monotonic() - trained, 2),
            },
            "peak_memory": peak.note(),
            "versions": run_folder.versions(),
        }
        measurement.leave_written(folder, model, test, ranks)
        if distributed.first():
            run_folder.finish(folder, trainer.best(), ranks, result)
        distributed.barrier()
        logger.info("%s", measurement.summary(result))
        logger.info("run folder: %s", folder)
    return {**result, "folder": str(folder)}


def _parents(config, folder: Path) -> list[stages.Stage]:
    """The runs that this one needs, made first where they are not there."""
    try:
        return stages.make(config, run, resume)
    except Interrupted:
        logger.info("%s needs that run: --resume=%s goes on with both.", config["model"], folder)
        raise


def _names(dataset) -> list[str]:
    """What people call the items: titles, or ids where there are none (an LLM recommender has stopped before)."""
    try:
        return dataset.titles
    except DataError:
        return dataset.item_tokens


@contextmanager
def _log_to(file: Path):
    """Sends the log of one run to its folder and to the terminal, whatever ran before in the process.

    Of several processes the first alone logs.
    """
    if not distributed.first():
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    terminal, kept = logging.StreamHandler(sys.stdout), logging.FileHandler(file, encoding="utf-8")
    terminal.setFormatter(logging.Formatter("%(message)s"))
    kept.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    before, level = root.handlers, root.level
    root.handlers = [terminal, kept]
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        kept.close()
        root.handlers = before
        root.setLevel(level)
