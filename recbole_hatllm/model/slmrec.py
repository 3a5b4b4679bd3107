"""SLMRec: Xu et al., "SLMRec: Distilling Large Language Models into Small for Sequential Recommendation" (arXiv 2405.17890).

E4SRec's prompt, read by the first few layers of an LLM, that learn from a frozen teacher of more layers.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_hatllm import run_folder
from recbole_hatllm.config import Config
from recbole_hatllm.data.prompt import SLOTS
from recbole_hatllm.errors import ConfigError, DataError
from recbole_hatllm.item_slots import ItemSlots, frozen_table
from recbole_hatllm.lineage import Parent, said
from recbole_hatllm.model.slots import SlotRecommender
from recbole_hatllm.shapes import depth_of
from recbole_hatllm.table_head import TableHead

# The teacher reads the same prompts by the same decoder as its student, and computes as it does unless its own keys say otherwise.
_THE_STUDENTS = ("backbone", "readout", "sasrec_flavour", "sasrec_width", "sasrec_keys", "pretrained")
_AS_THE_STUDENT = ("dtype", "load_in_4bit", "attention", "token_pool", "gradient_checkpointing", "compile", "micro_batch_size",
                   "lora_targets", "targets", "stride")  # fmt: skip


class SLMRec(SlotRecommender):
    """scores = E (W h) with the frozen item vectors E of a SASRec, that the prompt has too; without `teacher_layers` that is all.

    With a teacher, both are cut into B blocks of layers, and of the states h_k at the readout behind the k-th block

        L = CE + distill_cos (1 - mean_k cos(h_k, t_k)) + distill_norm mean_k |h_k - t_k|^2 + distill_blocks_ce mean_{k<B} CE_k

    where t_k are the teacher's states and CE_k that of a head of its own on h_k; with `distill_distance: plain` the distance is
    not squared.
    """

    template = SLOTS

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.distils = config["teacher_layers"] is not None
        self.teacher: tuple[SLMRec, ...] = ()  # a tuple hides it: it is no part of what is trained, moved or saved
        if self.distils:
            self.optimisation["blocks"] = dict(self.optimisation["head"])

    @classmethod
    def parts(cls, config, n_items: int, width: int) -> dict[str, nn.Module]:
        """Head and slots on one table; while there is a teacher a head for each block but the last."""
        table = frozen_table(n_items, config["sasrec_width"])
        whiten = config["readout_norm"] == "whiten"
        parts = {
            "head": TableHead(table, width, config["head_dropout"], whiten),
            "slots": ItemSlots(table, cls.projector(config["sasrec_width"], width)),
        }
        if config["teacher_layers"] is not None:
            heads = (TableHead(table, width, config["head_dropout"]) for _ in range(config["distill_blocks"] - 1))
            parts["blocks"] = nn.ModuleList(heads)
        return parts

    @classmethod
    def parents(cls, config) -> list[Parent]:
        """The SASRec, and the teacher: an SLMRec of more layers without a teacher."""
        found = super().parents(config)
        if config["teacher_layers"] is None:
            return found
        whole = depth_of(str(config["backbone"]))
        layers = min(config["teacher_layers"], whole)
        if config["pretrained_teacher"] is None:
            _check_blocks(config["distill_blocks"], config["backbone_layers"] or whole, layers)
        fixed = {
            "backbone_layers": layers,
            "teacher_layers": None,
            **{key: config.resolved()[key] for key in _THE_STUDENTS},
        }
        keys = {key: config.resolved()[key] for key in _AS_THE_STUDENT} | said(config, "teacher_keys", fixed) | fixed
        must = {key: (config[key], key) for key in ("backbone", "readout")} | {"teacher_layers": (None, "distilling")}
        return [*found, Parent("teacher", cls.__name__, keys, "pretrained_teacher", config["pretrained_teacher"], must)]

    def inherit(self, folders: dict[str, Path], dataset) -> None:
        """The item vectors, and the teacher as a whole."""
        super().inherit(folders, dataset)
        if not self.distils:
            return
        stored = run_folder.read_config(folders["teacher"])
        teacher = type(self)(Config(stored.pop("model"), stored.pop("dataset"), config_dict=stored), dataset)
        _check_blocks(self.config["distill_blocks"], self.backbone.n_layers, teacher.backbone.n_layers)
        if teacher.backbone.hidden_size != self.backbone.hidden_size:
            raise DataError(
                f"The teacher in {folders['teacher']} has states of size {teacher.backbone.hidden_size}, and this run's are of "
                f"{self.backbone.hidden_size}: name one on the same backbone."
            )
        teacher.load(folders["teacher"])
        teacher.targets = self.targets
        self.teacher = (teacher.to(self.config["device"]).eval().requires_grad_(False),)

    def calculate_loss(self, interaction) -> Tensor:
        """Scalar."""
        if not self.teacher:
            return super().calculate_loss(interaction)
        with torch.no_grad():
            theirs = self.teacher[0].pairs(interaction, self.teacher[0].depths(self.config["distill_blocks"]))[0]
        own, targets, _ = self.pairs(interaction, self.depths(self.config["distill_blocks"]))
        apart = self.block_losses(own, targets)
        loss = self.head.loss(own[:, -1], targets, self.label_smoothing)
        cosine, distance = block_distances(own, theirs, self.config["distill_distance"] == "squared")
        loss = loss + self.config["distill_cos"] * (1 - cosine) + self.config["distill_norm"] * distance
        return loss + self.config["distill_blocks_ce"] * apart

    def depths(self, blocks: int) -> list[int]:
        """How many layers end each of so many blocks."""
        return [self.backbone.n_layers * block // blocks for block in range(1, blocks + 1)]

    def block_losses(self, states: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of the blocks' own heads on states [N, B, d]; 0 for one block."""
        losses = [head.loss(states[:, k], targets, self.label_smoothing) for k, head in enumerate(self.blocks)]
        return torch.stack(losses).mean() if losses else states.new_zeros((), dtype=torch.float32)


def block_distances(student: Tensor, teacher: Tensor, squared: bool = True) -> tuple[Tensor, Tensor]:
    """Means over rows and blocks of cosine and distance, squared or not, of states [N, B, d] of any float type, in float32."""
    student, teacher = student.float(), teacher.float()
    apart = (student - teacher).square().sum(-1) if squared else torch.linalg.vector_norm(student - teacher, dim=-1)
    return F.cosine_similarity(student, teacher, dim=-1).mean(), apart.mean()


def _check_blocks(blocks: int, student: int, teacher: int) -> None:
    if student % blocks or teacher % blocks:
        raise ConfigError(
            f"distill_blocks is {blocks}, and the student has {student} layers and its teacher {teacher}: it must divide both."
        )
