"""RecBole's trainers, writing into a run folder; the plain one counted in optimiser steps and resumable at any of them."""

from __future__ import annotations

import math
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from recbole.trainer import Trainer
from recbole.trainer import trainer as recbole_trainer
from recbole.trainer.trainer import TraditionalTrainer
from recbole.utils import ModelType, early_stopping, get_trainer
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from recbole_hatllm import checkpoint, distributed, unseen_users, weights
from recbole_hatllm.errors import HatError
from recbole_hatllm.evaluation import RankCollector
from recbole_hatllm.files import publish
from recbole_hatllm.run_folder import metric_row


class Interrupted(KeyboardInterrupt):
    """Ctrl-C was pressed; the state of that moment and the best weights so far are in the run folder."""


class GivenUp(Exception):
    """Whoever listened to the validations has heard enough; what there is stands in the run folder, as after Ctrl-C."""


class RunTrainer:
    """Over any RecBole trainer: exact ranks, and weights of the best validation kept in `folder/best-<step>`.

    Of several processes the first alone writes.

    Args:
        config, model: as RecBole's trainers take them.
        folder: the run folder.
        items: `weights.items_identity` of the data.
    """

    def __init__(self, config, model, folder: Path, items: dict):
        self.folder, self.items = folder, items
        # RecBole writes TensorBoard's files into the working directory, with the run's time as their only name.
        silent = SimpleNamespace(add_scalar=lambda *_: None)
        writer = lambda _: SummaryWriter(folder / "tensorboard") if distributed.first() else silent  # noqa: E731
        config["checkpoint_dir"] = str(folder)
        with mock.patch.object(recbole_trainer, "get_tensorboard", writer):
            super().__init__(config, model)
        self.eval_collector = RankCollector(config)

    def _build_optimizer(self, **kwargs):
        """Over what is trained only: a frozen backbone has no optimiser state."""
        groups = getattr(self.model, "parameter_groups", None)
        params = groups() if groups else [p for p in self.model.parameters() if p.requires_grad]
        # RecVAE trains its two halves in turn and says which; a model that counts has nothing to train.
        kwargs.setdefault("params", params or [nn.Parameter(torch.zeros(1))])
        return super()._build_optimizer(**kwargs)

    def fit(self, *data, callback_fn=None, **options):
        """RecBole's; GivenUp where `callback_fn`, told epoch and score of each validation, says True."""

        def tell(epoch: int, score: float) -> None:
            if callback_fn(epoch, score):
                raise GivenUp

        return super().fit(*data, callback_fn=callback_fn and tell, **options)

    def best(self) -> Path | None:
        """The folder of the best weights so far."""
        found = sorted(self.folder.glob("best-*"), key=lambda path: int(path.name.split("-")[1]))
        return found[-1] if found else None

    def _save_checkpoint(self, epoch, verbose=True, **kwargs):
        """Writes the weights into `best-<epoch>`."""

        def write(temporary: Path) -> None:
            temporary.mkdir()
            weights.save_model(self.model, temporary, self.items)

        if distributed.first():
            publish(self.folder / f"best-{epoch}", write)

    def choose(self, valid_data) -> None:
        """Lets a model that has something to choose on validation once its best weights are known do so, and keeps it with them."""
        if not hasattr(self.model, "choose"):
            return
        self._load_best()
        if done := self.model.choose(valid_data):
            self.logger.info(done)
            self._save_checkpoint(self.best().name.split("-")[1])

    def _load_best(self, folder=None) -> None:
        distributed.barrier()  # the first process may still be writing them
        if source := folder or self.best():
            weights.load_model(self.model, Path(source), self.items)

    def evaluate(self, eval_data, load_best_model=True, model_file=None, show_progress=False):
        """RecBole's evaluation; `model_file` is a folder of weights, by default the best of this run."""
        if load_best_model or model_file:
            self._load_best(model_file)
        else:
            distributed.barrier()
        if hasattr(self.model, "written"):
            self.model.written = []
        unseen_users.fill(self.model, eval_data.dataset)
        distributed.align(self.model)
        self.eval_collector.rows = len(eval_data.dataset)
        return super().evaluate(eval_data, load_best_model=False, show_progress=show_progress)


class StepTrainer(RunTrainer, Trainer):
    """One data flow for every model with RecBole's plain trainer: optimiser steps, a validation every so many.

    With `train_steps` set, it and `eval_step` count optimiser steps; otherwise `epochs` and `eval_step` count epochs, as
    in RecBole. After each validation the state is written; `restore` goes on from it to the same weights that a run never
    stopped would have.

    Several processes train a batch together, each its share of the rows. What only counts needs all rows and is done in
    each process.
    """

    def __init__(self, config, model, folder, items):
        super().__init__(config, model, folder, items)
        self.base_lr = [group["lr"] for group in self.optimizer.param_groups]
        self.step = 0
        self.history: list[dict] = []  # one entry a validation: step, loss, seconds, metrics
        self.losses = [0.0, 0]  # sum and count since the last validation
        self.best_step = 0
        self.seconds = 0.0
        self.stopped = False
        together = config["MODEL_TYPE"] != ModelType.TRADITIONAL
        self.place, self.places = (distributed.rank(), distributed.world()) if together else (0, 1)
        self.loss_of = model.calculate_loss
        self.rows_on_host = getattr(model, "rows_on_host", False)
        self.total = 0  # steps that are planned

    def fit(self, train_data, valid_data=None, verbose=True, saved=True, show_progress=False, callback_fn=None):
        """Trains to the last step, or until `stopping_step` validations brought nothing better.

        Args:
            callback_fn: as in `quick_start.run`.

        Returns:
            best validation score and result, as RecBole does.

        Raises:
            HatError: the loss is not a number. Interrupted: Ctrl-C. GivenUp: `callback_fn` wanted it.
        """
        self.eval_collector.data_collect(train_data)
        per_epoch = len(train_data)
        if self.config["train_steps"] is not None:
            total, every = self.config["train_steps"], self.config["eval_step"]
        else:
            epochs = 1 if self.config["MODEL_TYPE"] == ModelType.TRADITIONAL else self.config["epochs"]
            total, every = epochs * per_epoch, max(self.config["eval_step"], 1) * per_epoch
        self.total = total
        if self.step == 0 and not self.history:
            self._warm_start(train_data, valid_data, show_progress)
        for validation in self.history:
            self._tell(callback_fn, validation, every)
        if self.places > 1:
            distributed.align(self.model)
            self.loss_of = distributed.data_parallel(self.model)
        bar = tqdm(
            total=total, initial=self.step, desc="train", unit="step", disable=not (show_progress and total), ncols=100
        )
        rows, began, spent = 0, time.monotonic(), self.seconds
        unread = None  # the last step's loss, read behind the next step: reading it at once, a GPU would run dry
        with Interrupt() as interrupt, bar:
            while self.step < total and not self.stopped:
                epoch, offset = divmod(self.step, per_epoch)
                for batch in train_data.batches(epoch, offset):
                    loss = self._step(batch, self._lr_factor(self.step, total))
                    self._read(unread, bar)
                    self.step += 1
                    unread = loss
                    rows += len(batch)
                    self.seconds = spent + time.monotonic() - began
                    bar.set_description_str(f"train, {rows / (time.monotonic() - began):.0f} rows/s", refresh=False)
                    bar.update()
                    due = valid_data is not None and (self.step % every == 0 or self.step == total)
                    asked = distributed.mean(interrupt.asked)
                    if due or asked or self.step == total:
                        self._read(loss, bar)
                        unread = None
                    if due:
                        self._validate(valid_data, show_progress)
                        self.seconds = spent + time.monotonic() - began
                        self._save_state()
                    if asked:
                        self._save_state()
                        raise Interrupted
                    if due:
                        self._tell(callback_fn, self.history[-1], every)
                    if self.stopped or self.step == total:
                        break
        return self.best_valid_score, self.best_valid_result

    def _tell(self, callback_fn, validation: dict, every: int) -> None:
        """Tells whoever listens of an entry of `history`, and gives up if they say so and there is more to train."""
        number = -(-validation["step"] // every)
        enough = callback_fn and callback_fn(number, validation[self.valid_metric])
        if enough and self.step < self.total and not self.stopped:
            raise GivenUp

    def _read(self, loss, bar: tqdm) -> None:
        """Takes note of the loss of the step `self.step`, if there is one.

        Raises:
            HatError: it is not a number.
        """
        if loss is None:
            return
        loss = distributed.mean(loss.item())
        if not math.isfinite(loss):
            raise distributed.once(
                HatError(
                    f"The loss is {loss} at step {self.step} with learning_rate {self.learning_rate}: lower it, or use "
                    f"dtype: float32. The best weights so far are in {self.folder}."
                )
            )
        self.losses = [self.losses[0] + loss, self.losses[1] + 1]
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        self.tensorboard.add_scalar("train/loss", loss, self.step)

    def _warm_start(self, train_data, valid_data, show_progress: bool) -> None:
        """Whatever a model does before its first step counts as step 0, with a validation and a state of its own."""
        began = time.monotonic()
        warm_start = getattr(self.model, "warm_start", None)
        if done := warm_start(train_data.dataset.inter_feat, show_progress) if warm_start else []:
            self.logger.info(", ".join(done))
            self.seconds = time.monotonic() - began
            if valid_data is not None:
                self._validate(valid_data, show_progress)
            self._save_state()

    def _step(self, batch, factor: float) -> Tensor:
        """One optimiser step on the rows of `batch`, in pieces of `micro_batch_size`; the mean loss of this process's rows,
        on the device and not waited for."""
        self.model.train()
        for group, lr in zip(self.optimizer.param_groups, self.base_lr):
            group["lr"] = lr * factor
        self.optimizer.zero_grad()
        if self.places > 1:
            distributed.draw_from(self.config["seed"], self.step)
        pieces, losses = distributed.evened(self._pieces(batch), (batch[:1], 0.0)), []
        reached = getattr(self.model, "reached", None)
        for number, (piece, share) in enumerate(pieces, 1):
            if reached:
                reached((self.step + (number - 1) / len(pieces)) / self.total)
            with distributed.gradients_meet(self.loss_of, now=number == len(pieces)):
                loss = self.loss_of(piece if self.rows_on_host else piece.to(self.device))
                loss = sum(loss) if isinstance(loss, tuple) else loss
                loss = loss * share
                losses.append(loss.detach())
                loss.backward()
        if self.clip_grad_norm:
            clip_grad_norm_(
                [p for group in self.optimizer.param_groups for p in group["params"]], **self.clip_grad_norm
            )
        self.optimizer.step()
        return torch.stack(losses).sum()

    def _pieces(self, batch) -> list[tuple]:
        """The rows of `batch` that are this process's, `micro_batch_size` at a time, each piece with its share of the loss:
        losses times shares, added up here and averaged over processes, are the mean over the targets of `batch`."""
        count = getattr(self.model, "targets_in", len)
        batch = self.model.by_length(batch) if hasattr(self.model, "by_length") else batch
        size, mean_targets = self.config["micro_batch_size"] or len(batch), count(batch) / self.places
        own = batch[self.place :: self.places]
        pieces = [own[start : start + size] for start in range(0, len(own), size)]
        return [(piece, count(piece) / mean_targets) for piece in pieces]

    def _lr_factor(self, step: int, total: int) -> float:
        """Share of the full learning rate in `step` (from 0): linear warm-up, then constant, linear or cosine to zero."""
        warmup = self.config["warmup_steps"]
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(total - warmup, 1)
        return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[
            self.config["lr_decay"]
        ]

    def _validate(self, valid_data, show_progress: bool) -> None:
        if self.step and hasattr(self.model, "before_validation"):
            self.model.before_validation()
        score, result = self._valid_epoch(valid_data, show_progress=show_progress)
        result = {name: float(value) for name, value in result.items()}
        loss = self.losses[0] / self.losses[1] if self.losses[1] else None
        self.losses = [0.0, 0]
        self.best_valid_score, self.cur_step, self.stopped, better = early_stopping(
            score, self.best_valid_score, self.cur_step, max_step=self.stopping_step, bigger=self.valid_metric_bigger
        )
        self.history.append({"step": self.step, "loss": loss, "seconds": round(self.seconds, 1), **result})
        self.logger.info(
            f"step {self.step}: "
            + (f"train loss {loss:.4f}, " if loss is not None else "")
            + f"valid {metric_row(result)}"
            + (" (best)" if better else "")
        )
        for name, value in result.items():
            self.tensorboard.add_scalar(f"valid/{name}", value, self.step)
        if better:
            self._save_checkpoint(self.step)
            self.best_step, self.best_valid_result = self.step, result

    _PROGRESS = (
        "step", "best_step", "best_valid_score", "best_valid_result", "cur_step", "history", "losses", "seconds", "stopped",
    )  # fmt: skip

    def _save_state(self) -> None:
        """The order matters for a kill: new best weights, then the state that names them, then the old ones go."""
        if not distributed.first():
            return
        checkpoint.save(self.folder, self.model, self.optimizer, {name: getattr(self, name) for name in self._PROGRESS})
        self._drop_old_best()

    def restore(self) -> None:
        """Goes back to the last state written, if there is one; best weights that came after it are made again."""
        if (self.folder / checkpoint.FILE).is_file():
            for name, value in checkpoint.restore(self.folder, self.model, self.optimizer).items():
                setattr(self, name, value)
        distributed.barrier()
        self._drop_old_best()

    def _drop_old_best(self) -> None:
        for folder in self.folder.glob("best-*") if distributed.first() else ():
            if folder.name != f"best-{self.best_step}":
                shutil.rmtree(folder)


class Interrupt:
    """Turns the first Ctrl-C into `asked`, to be honoured between two steps; a second one interrupts at once.

    Not so where there are several processes: each may hear one Ctrl-C twice, from the terminal and from the launcher.
    """

    def __enter__(self):
        self.asked = False
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, *_):
        self.asked = True
        if distributed.world() == 1:
            signal.signal(signal.SIGINT, self._before)

    def __exit__(self, *_):
        if self._main:
            signal.signal(signal.SIGINT, self._before)


def trainer_class(config) -> type[Trainer]:
    """RecBole's trainer for the model, writing into a run folder; in steps where it is RecBole's plain one."""
    base = get_trainer(config["MODEL_TYPE"], config["model"])
    if base in (Trainer, TraditionalTrainer):
        return StepTrainer
    distributed.alone(f"{config['model']}, which RecBole trains in a way of its own,")
    return type(f"Run{base.__name__}", (RunTrainer, base), {})
