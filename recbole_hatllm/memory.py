"""The memory that training and ranking need, before anything is downloaded or built.

The run's own modules are made on the meta device, and one micro-batch goes through them forward and backward there: what is
alive at each moment is counted, not put into a formula for each family of decoders. GB are 10^9 bytes.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import nn

from recbole_hatllm import lineage
from recbole_hatllm.backbone import Backbone
from recbole_hatllm.errors import BackboneError, ConfigError
from recbole_hatllm.evaluation import target_ranks
from recbole_hatllm.live import Live, kernels, on_meta
from recbole_hatllm.masks import attention_mask, branch_mask
from recbole_hatllm.model.llm import lora_options, torch_dtype
from recbole_hatllm.pool import TokenPool
from recbole_hatllm.prompt_size import PromptSize, llm_class
from recbole_hatllm.shapes import skeleton

MOMENTS = {"adam": 2, "adamw": 2, "sgd": 0, "adagrad": 1, "rmsprop": 1}
# nf4 with double quantisation: 4 bits a weight, 8 bits a block of 64, 32 bits each 256 blocks.
BYTES_IN_4_BITS = 1 / 2 + 1 / 64 + 4 / (64 * 256)

# A CPU's allocator keeps fragments of blocks below 32 MiB: a share of what is at work, and the matrix library's own buffers.
FRAGMENTS, BUFFERS = 0.6, 40_000_000  # measured with glibc, benchmarks/memory.py


@dataclass(frozen=True)
class Use:
    """Bytes that rows take in the decoder: `kept` between forward and backward, `peak` at any moment; `scores`, the attention
    scores among what is kept."""

    kept: float
    peak: float
    scores: float

    def between(self, other: Use, share: float) -> Use:
        """The point at `share` of the way to `other`, beyond it where share > 1."""
        mix = lambda name: getattr(self, name) * (1 - share) + getattr(other, name) * share  # noqa: E731
        return Use(mix("kept"), mix("peak"), mix("scores"))


class Memory:
    """What a run of `config` needs.

    Args:
        config: of an LLM recommender. items: how many the dataset has. prompt: tokens of its prompts.

    Raises:
        ConfigError: the model is no LLM recommender. BackboneError: the shape of the backbone is not known, or it cannot be
            given masks.
    """

    @on_meta()
    def __init__(self, config, items: int, prompt: PromptSize):
        self.config, self.items, self.prompt = config, items, prompt
        model_class = llm_class(config)
        if what := model_class.uncounted(config):
            raise ConfigError(f"memory does not count {what}.")
        self.gpu = torch.device(config["device"]).type == "cuda" or config["load_in_4bit"]
        by_machine = torch.bfloat16 if config["load_in_4bit"] else torch_dtype("auto", config["device"])
        self.dtype = by_machine if config["dtype"] == "auto" else torch_dtype(config["dtype"], config["device"])

        self.slots = model_class.template.slots
        self.backbone = self._decoder(config["backbone_layers"])
        linear = self._in_4_bits(self.backbone)
        self.parameters = sum(p.numel() for p in self.backbone.parameters())
        self.in_4_bits = sum(weight.numel() for weight in linear)
        # A layer's weights are unpacked for the moment of its product.
        self.unpacked = max((weight.numel() for weight in linear), default=0) * self.dtype.itemsize
        text = self.backbone.base.config.get_text_config()
        self.heads = text.num_attention_heads
        self.kinds = model_class.layer_kinds(config, self.backbone.n_layers)
        self.attention = self._attend(config["attention"])
        with torch.device("meta"):
            self.backbone.add_lora(*lora_options(config))
            self.parts = model_class.parts(config, items + 1, text.hidden_size)
        self.head = self.parts["head"]
        beside = (p for part in self.parts.values() for p in part.parameters() if p.requires_grad)
        for parameter in (*self.backbone.trainable().values(), *beside):
            parameter.grad = torch.empty_like(parameter)  # they are there from the second micro-batch on
        self.micro = min(config["micro_batch_size"] or config["train_batch_size"], config["train_batch_size"])
        self.targets = config["MAX_ITEM_LIST_LENGTH"] if config["targets"] == "all" else 1
        sizes = (2, max(4, self.micro))
        self.teacher = self._teacher()
        self._taught = [self._decode(rows, False, self.teacher) if self.teacher else Use(0, 0, 0) for rows in sizes]
        self._plain = [self._decode(rows, True) for rows in sizes]
        self.backbone.enable_gradient_checkpointing()
        self._checkpointed = [self._decode(rows, True) for rows in sizes]
        self._ranked = [self._decode(rows, False) for rows in sizes]
        self._sizes = sizes

    def _decoder(self, layers: int | None) -> Backbone:
        """The first layers of the backbone, on the meta device."""
        model = skeleton(str(self.config["backbone"]), layers, self.dtype)
        text = model.config.get_text_config()
        identity = {"name": str(self.config["backbone"]), "model_type": text.model_type}
        identity |= {"layers": text.num_hidden_layers, "hidden_size": text.hidden_size}
        return Backbone(model, None, identity)

    def _in_4_bits(self, backbone: Backbone) -> list[nn.Parameter]:
        linear = [m.weight for m in backbone.modules() if isinstance(m, nn.Linear)]
        return linear if self.config["load_in_4bit"] else []

    def _teacher(self) -> Backbone | None:
        """The decoder of a frozen teacher, if the model has one."""
        for parent in lineage.parents(self.config):
            if parent.role == "teacher":
                teacher = self._decoder(parent.keys["backbone_layers"])
                teacher.set_schedule(teacher.kinds, self.attention)
                return teacher
        return None

    def _attend(self, attention: str) -> str:
        """Sets the kernel that the run will take, and names it."""
        if attention == "auto":
            fastest = "sdpa" if self.gpu else "plain"
            try:
                self.backbone.set_schedule(self.kinds, fastest)
                return fastest
            except BackboneError:  # not exact for this family
                attention = "eager"
        self.backbone.set_schedule(self.kinds, attention)
        return attention

    def _decode(self, rows: int, training: bool, backbone: Backbone | None = None) -> Use:
        """Counts what a decoder, by default the run's own, holds for `rows` prompts."""
        backbone = backbone or self.backbone
        tokens, shared = self.prompt.tokens, self.prompt.shared if self.config["token_pool"] else 0
        own = tokens - shared
        ids = torch.zeros(rows, tokens, dtype=torch.int64, device="meta")
        real = torch.ones(rows, tokens, dtype=torch.bool, device="meta")
        pool = TokenPool(shared, rows, tokens, ids[:, shared:].flatten(), ids) if self.config["token_pool"] else None
        backbone.train(training)
        with kernels(self.gpu), Live() as live, nullcontext() if training else torch.no_grad():
            masks = {kind: attention_mask(kind, ids, real, real) for kind in set(backbone.kinds)}
            if self.targets > 1:
                apart = branch_mask(ids, ids)
                masks = {kind: mask & apart for kind, mask in masks.items()}
            read: dict = {"input_ids": ids}
            if self.slots:  # a gradient goes through them to the projector
                width = (rows, tokens, backbone.hidden_size)
                read = {"inputs_embeds": torch.empty(width, dtype=self.dtype, device="meta", requires_grad=training)}
            hidden = backbone(ids, masks, pool=pool, **read)
            vectors = hidden[:, : self.targets].clone()
            del masks, hidden, read
            kept = live.now
            scores = live.held(lambda s: s[-1:] == (tokens,) and s.numel() == self.heads * rows * own * tokens)
            if training:
                vectors.backward(torch.empty_like(vectors))
        return Use(kept, live.peak, scores)

    def decoder(self, rows: int, checkpointing: bool | None = None) -> Use:
        """What the decoder holds for a training micro-batch of `rows`, as the key `gradient_checkpointing` says or not."""
        checkpointing = self.config["gradient_checkpointing"] if checkpointing is None else checkpointing
        few, many = self._checkpointed if checkpointing else self._plain
        return few.between(many, (rows - self._sizes[0]) / (self._sizes[1] - self._sizes[0]))

    @cache  # noqa: B019
    def loss(self, rows: int) -> int:
        """Bytes at the peak of the loss over the items, forward and backward, for a micro-batch of `rows`."""
        vectors = torch.empty(rows * self.targets, self.backbone.hidden_size, device="meta", requires_grad=True)
        target, history = self._answers(len(vectors))
        with kernels(self.gpu), Live() as live:
            self.head.train().loss(vectors, target, self.config["label_smoothing"], history=history).backward()
        return live.peak

    def _answers(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Targets and histories of so many readouts."""
        target = torch.zeros(rows, dtype=torch.int64, device="meta")
        return target, target[:, None].expand(-1, self.config["MAX_ITEM_LIST_LENGTH"])

    @cached_property
    def resident(self) -> dict[str, int]:
        """Bytes that are there all the time, item by item."""
        moments, learner = MOMENTS[self.config["learner"]], self.config["learner"]
        kind = str(self.dtype).removeprefix("torch.")
        parts = {"frozen weights in 4 bits, with their scales": int(self.in_4_bits * BYTES_IN_4_BITS)}
        parts[f"frozen weights in {kind}"] = (self.parameters - self.in_4_bits) * self.dtype.itemsize
        if self.teacher:
            in_4_bits = sum(weight.numel() for weight in self._in_4_bits(self.teacher))
            whole = sum(p.numel() for p in self.teacher.parameters())
            parts["frozen weights of the teacher"] = int(
                in_4_bits * BYTES_IN_4_BITS + (whole - in_4_bits) * self.dtype.itemsize
            )
        tables = {id(p): p for part in self.parts.values() for p in part.parameters() if not p.requires_grad}
        parts["frozen item vectors"] = sum(p.numel() * p.itemsize for p in tables.values())
        called = {"slots": "projector", "blocks": "heads of blocks"}
        beside = {called.get(name, name): part.parameters() for name, part in self.parts.items()}
        for name, parameters in {"adapters": self.backbone.trainable().values(), **beside}.items():
            size = sum(p.numel() * p.itemsize for p in parameters if p.requires_grad)
            parts[name] = size
            parts[f"{name}: gradients"] = size
            parts[f"{name}: moments of {learner}"] = moments * size
        parts["head"] += sum(buffer.numel() * buffer.itemsize for buffer in self.head.buffers())
        return {name: size for name, size in parts.items() if size}

    def step(self, rows: int, checkpointing: bool | None = None) -> int:
        """Bytes of the tensors at the peak of a training step with micro-batches of `rows`, beside `resident`."""
        use = self.decoder(rows, checkpointing)
        # At the end of the decoder's forward pass comes the loss; the optimiser's own step holds two copies of a tensor.
        update = 2 * max(p.numel() * p.itemsize for p in self.head.parameters() if p.requires_grad)
        few, many = self._taught  # a teacher reads the rows first
        teacher = few.between(many, (rows - self._sizes[0]) / (self._sizes[1] - self._sizes[0])).peak
        return int(max(teacher, use.kept + self.loss(rows), use.peak + self.unpacked, update))

    def fragments(self, at_work: int) -> int:
        """Bytes that the allocator of a CPU holds beside tensors of `at_work` bytes that come and go; 0 for a GPU."""
        return 0 if self.gpu else int(FRAGMENTS * at_work) + BUFFERS

    def training(self, rows: int, checkpointing: bool | None = None) -> int:
        """Bytes at the peak of training with micro-batches of `rows`."""
        at_work = self.step(rows, checkpointing)
        return sum(self.resident.values()) + at_work + self.fragments(at_work)

    @cached_property
    def scores(self) -> int:
        """Bytes at the peak of scoring all items for one evaluation batch, and of counting its ranks."""
        vectors = torch.empty(self.config["eval_batch_size"], self.backbone.hidden_size, device="meta")
        with torch.no_grad(), Live() as live:
            target, history = self._answers(len(vectors))
            target_ranks(self.head.eval()(vectors, history), target)
        return live.peak

    def ranking(self, rows: int) -> int:
        """Bytes at the peak of a validation, beside the optimiser's state, with `rows` prompts at once in the decoder."""
        few, many = self._ranked
        use = few.between(many, (rows - self._sizes[0]) / (self._sizes[1] - self._sizes[0]))
        at_work = int(max(use.peak + self.unpacked, self.scores))
        return sum(self.resident.values()) + at_work + self.fragments(at_work)

    def largest(self, budget: float, checkpointing: bool | None = None) -> int:
        """The largest micro_batch_size, up to 1024, whose training and ranking stay within `budget` bytes; 0 for none."""
        fits = lambda rows: max(self.training(rows, checkpointing), self.ranking(rows)) <= budget  # noqa: E731
        low, high = 0, 1025
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low
