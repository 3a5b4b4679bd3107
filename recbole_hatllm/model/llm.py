"""What every LLM recommender does: prompt -> backbone (with its masks) -> readout -> head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import Tensor, nn

from recbole_hatllm import distributed, probe, text_states, weights
from recbole_hatllm.backbone import load_backbone
from recbole_hatllm.data.prompt import TITLES, Prompt, PromptTable
from recbole_hatllm.data.rows import TARGET_LENGTH
from recbole_hatllm.data.titles import PieceEncoder, TitleTokens
from recbole_hatllm.errors import ConfigError, DataError
from recbole_hatllm.files import cache_folder
from recbole_hatllm.head import LinearHead
from recbole_hatllm.lineage import Parent
from recbole_hatllm.masks import attention_mask, branch_mask, describe
from recbole_hatllm.pool import TokenPool
from recbole_hatllm.positions import taught_places
from recbole_hatllm.tfidf import title_vectors
from recbole_hatllm.title_head import TitleHead
from recbole_hatllm.transfer import to_device

WORDS_MIN_DF = 2  # a word of one title alone is near no other title


class LLMRecommender(SequentialRecommender):
    """A HF decoder with LoRA that reads a history of titles and scores all items.

    Subclasses say what is different: `layer_kinds` (the mask of each layer), the prompt, the head or the loss.

    Args:
        config: a `recbole_hatllm.config.Config`.
        dataset: anything with `item_num`, `item_tokens`, `titles` (one string per internal id) and RecBole's `num`.
    """

    is_llm = True
    rows_on_host = True  # training rows are made into prompts there
    input_type = InputType.POINTWISE
    negatives_in_batch = False
    template = TITLES
    always_uses_all_it_trains = True  # in every step
    stored = ("head",)  # the parts that a checkpoint holds beside the adapters

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        if config["head"] != "linear" and not self.template.titles:
            raise ConfigError(
                f"{type(self).__name__} reads no titles: head: {config['head']} is not for it, use head: linear."
            )
        self.config = config
        self.label_smoothing, self.targets = config["label_smoothing"], config["targets"]
        self.item_tokens = dataset.item_tokens
        self.backbone = load_backbone(
            config["backbone"],
            layers=config["backbone_layers"],
            dtype=torch_dtype(config["dtype"], config["device"]),
            load_in_4bit=config["load_in_4bit"],
            device="cpu" if distributed.sharded() else config["device"],  # whole, it may not fit on one GPU
            seed=config["seed"],
            check=lambda n_layers: self.layer_kinds(config, n_layers),  # before gigabytes are read
        )
        self.know_titles(dataset.titles if self.template.titles else None)
        self.backbone.set_schedule(self.layer_kinds(config, self.backbone.n_layers), config["attention"])
        for name, part in self.parts(config, self.n_items, self.backbone.hidden_size).items():
            setattr(self, name, part)
        if isinstance(self.head, TitleHead) and self.head.words:
            self.head.set_words(words_of(dataset.titles))
        self.backbone.add_lora(*lora_options(config))
        if config["gradient_checkpointing"]:
            self.backbone.enable_gradient_checkpointing()
        if config["compile"]:
            self.backbone.compile_layers()
        self.optimisation = {
            "backbone": {"lr": config["learning_rate"], "weight_decay": config["weight_decay"]},
            "head": {"lr": config["head_lr"] or config["learning_rate"], "weight_decay": config["head_weight_decay"]},
        }

    def know_titles(self, titles: Sequence[str] | None) -> None:
        """Makes the prompts' pieces out of all items' titles, by internal id, or without any."""
        encode = PieceEncoder(self.backbone.tokenizer)
        if titles is None:
            self.titles = TitleTokens.none(self.n_items)
        else:
            self.titles = TitleTokens.build(titles, encode, self.config["title_tokens"], cache_folder())
        words = {name: self.config[f"prompt_{name}"] for name in ("nouns", "noun", "verb")}
        span, readout = self.config["item_span"], self.config["readout"]
        self.prompts = PromptTable(self.titles, encode, words, span, readout, self.template)

    def add_items(self, titles: Sequence[str]) -> None:
        """Makes items known that training never saw, behind those there are; for ranking only.

        Args:
            titles: of all items, by internal id, the new ones at the end.

        Raises:
            ConfigError: the head has no vector for an item without a trained one.
        """
        if not isinstance(self.head, TitleHead):
            raise ConfigError(
                f"This {self.config['model']} cannot score items that it was not trained on: HatLLM and BIGRec with --head=title "
                "or --head=title_id can."
            )
        known = self.n_items
        self.know_titles(titles)
        self.n_items = len(titles)
        self.head.add_items(self.title_states(self.titles.rows(known)))
        if self.head.words:
            self.head.set_words(words_of(titles, titles[:known]))

    @classmethod
    def parents(cls, config) -> list[Parent]:
        """Runs that this one needs first (docs/stages.md)."""
        return []

    def inherit(self, folders: dict[str, Path], dataset) -> None:
        """Takes what it needs of its parents, before the first step or after a stop.

        Args:
            folders: finished runs by role. dataset: as for the constructor.

        Raises:
            HatError: a run's weights are damaged or of another shape.
        """

    @staticmethod
    def layer_kinds(config, n_layers: int) -> tuple[str, ...]:
        """The mask kind of each layer, from the first to the last. Plain causal attention unless a model says otherwise."""
        return ("or",) * n_layers

    @staticmethod
    def parts(config, n_items: int, width: int) -> dict[str, nn.Module]:
        """What stands beside the backbone, by the name of its attribute: the head.

        Args:
            n_items: internal ids, padding included. width: size d of the backbone's states.
        """
        dropout, whiten = config["head_dropout"], config["readout_norm"] == "whiten"
        if config["head"] == "linear":
            return {"head": LinearHead(n_items, width, dropout, whiten)}
        longest, offsets = config["MAX_ITEM_LIST_LENGTH"], config["head"] == "title_id"
        ranking = config["cold_bias"], config["title_words"]
        return {"head": TitleHead(n_items, width, longest, offsets, dropout, whiten, *ranking)}

    @classmethod
    def uncounted(cls, config) -> str | None:
        """What `memory` does not count of such a run, and the remedy, in words; None where it counts everything."""
        if trains_titles(config):
            return (
                "the backbone's pass through a batch's titles (title_table: trained): ask it for title_table: refreshed"
            )
        return None

    def embed(self, prompt: Prompt) -> dict[str, Tensor]:
        """What the backbone is given for the tokens of a prompt, by the name of its argument."""
        return {"input_ids": prompt.input_ids}

    def read(
        self, item_seq: Tensor, item_len: Tensor, branches: bool = False, depths: Sequence[int] | None = None
    ) -> Tensor:
        """Hidden states at the readout tokens.

        Args:
            item_seq: [B, L] int64 internal item ids, oldest first. item_len: [B] int64. Best on the host.
            branches: read after every item.
            depths: read behind so many layers each (`Backbone.forward`).

        Returns:
            [B, d], or with branches [B, L, d], meaningless where there is no item; with depths [..., len(depths), d].
        """
        prompt = self.prompts(item_seq.cpu(), item_len.cpu(), branches)
        hidden, readout = self.states(prompt, depths), to_device(prompt.readout, self.device)
        row = torch.arange(len(hidden), device=hidden.device)
        return hidden[row if readout.dim() == 1 else row[:, None], readout]

    def states(self, prompt: Prompt, depths: Sequence[int] | None = None) -> Tensor:
        """Hidden states [B, T, d], with depths [B, T, len(depths), d], of all tokens of a prompt that is on the host; meaningless
        in padding."""
        pool = TokenPool.of(prompt.valid, prompt.shared) if self.config["token_pool"] else None
        prompt, pool = to_device(prompt, self.device), to_device(pool, self.device)
        masks = {
            kind: attention_mask(kind, prompt.span, prompt.is_last, prompt.valid) for kind in set(self.backbone.kinds)
        }
        if prompt.branch is not None:
            apart = branch_mask(prompt.branch, prompt.stem)
            masks = {kind: mask & apart for kind, mask in masks.items()}
        return self.backbone(prompt.position_ids, masks, pool=pool, depths=depths, **self.embed(prompt))

    def pairs(self, interaction, depths: Sequence[int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What training compares: readout vectors [N, d], with depths [N, len(depths), d], and the items [N] that follow, as
        `targets` says, and the histories [N, L] between which they stand, on the model's device."""
        targets, history, places = self.taught(interaction)
        item_seq, item_len = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        if places is None:
            vectors = self.read(item_seq, item_len, depths=depths)
        else:
            read = self.read(item_seq, item_len, True, depths).flatten(0, 1)
            vectors = read.index_select(0, to_device(places, self.device))
        return vectors, to_device(targets, self.device), to_device(history, self.device)

    def taught(self, interaction) -> tuple[Tensor, Tensor, Tensor | None]:
        """What rows teach, on the host: the items [N], what stands before each of them [N, L], and with `targets: all` the
        place [N] of its readout among all of the rows."""
        item_seq, item_len = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        target = interaction[self.POS_ITEM_ID]
        if self.targets == "last":
            return target, item_seq, None
        taught, following = taught_places(item_seq, item_len, target, interaction[TARGET_LENGTH])
        places = taught.flatten().nonzero()[:, 0]
        column = torch.arange(item_seq.shape[1])
        history = item_seq[places // len(column)] * (column <= (places % len(column))[:, None])
        return following[taught], history, places

    def targets_in(self, interaction) -> int:
        """How many targets `calculate_loss` takes the mean over."""
        return len(interaction) if self.targets == "last" else int(interaction[TARGET_LENGTH].sum())

    def by_length(self, interaction):
        """The same rows, shortest prompt first: pieces of a batch then have little padding."""
        return interaction[self.prompts.title_tokens(interaction[self.ITEM_SEQ]).argsort(stable=True)]

    def calculate_loss(self, interaction) -> Tensor:
        """Scalar cross-entropy of the target items over all items."""
        vectors, targets, history = self.pairs(interaction)
        said = {"said": self.titles_said(interaction)} if trains_titles(self.config) else {}
        return self.head.loss(vectors, targets, self.label_smoothing, history=history, **said)

    def warm_start(self, rows, show_progress: bool = False) -> list[str]:
        """What comes before the first step, while the adapters still say nothing: the head's start, as the config says.

        Args:
            rows: all training rows, an Interaction in time order.

        Returns:
            what was done, in words.
        """
        done = []
        init, whitening = self.config["head_init"], self.head.whitening
        self.eval()
        if isinstance(self.head, TitleHead):
            self.head.set_titles(self.title_states(self.titles, show_progress), self.config["title_floor"])
            self.head.set_seen(torch.cat([rows[self.ITEM_SEQ].flatten(), rows[self.POS_ITEM_ID]]).unique())
            done.append(
                f"read {self.n_items - 1:,} titles, {int((~self.head.seen).sum()) - 1:,} of items without interactions"
            )
        elif init == "title":
            self.head.start_from(text_states.table(self.backbone, self.titles, "mean"))
            done.append("started the head from the titles")
        if init != "probe" and whitening is None:
            return done
        count = self.config["probe_rows"] or len(rows)
        read = rows[:] if count >= len(rows) else rows[torch.randperm(len(rows))[:count]]
        size = self.config["micro_batch_size"] or len(rows)
        vectors, targets, history = probe.readouts(self, self.by_length(read), size, show_progress)
        done.append(f"read {len(targets):,} targets in {len(read):,} rows")
        if whitening is not None:
            whitening.fit(vectors)
            done.append("whitened the readout")
        if init == "probe":
            if isinstance(self.head, TitleHead) and len(read) < len(rows):
                # It learns from all histories, and its map of the readout stays at zero.
                targets, history = (part.to(self.device) for part in self.taught(rows[:])[:2])
                vectors = None
            options = (self.config[f"probe_{name}"] for name in ("epochs", "lr", "batch_size"))
            loss = probe.fit(self.head, vectors, targets, history, *options, show_progress)
            done.append(f"probed to loss {loss:.4f}")
        return done

    def title_states(self, titles: TitleTokens, show_progress: bool = False) -> Tensor:
        """What the backbone says of titles, [n, d] float32: with the adapters or without, as `title_table` says."""
        read = text_states.kept_table if self.config["title_table"] == "frozen" else text_states.table
        return read(self.backbone, titles, "mean", show_progress, self.config["title_layers"])

    def titles_said(self, interaction) -> tuple[Tensor, Tensor]:
        """Ids [K] of the items of training rows, and what the backbone with its adapters says of their titles, [K, d],
        differentiable."""
        items = torch.cat([interaction[self.ITEM_SEQ].flatten(), interaction[self.POS_ITEM_ID]]).unique()
        items = items[self.titles.offsets.diff()[items] > 0]
        states = text_states.states(self.backbone, self.titles, items, "mean", self.config["title_layers"])
        return to_device(items, self.device), states

    def before_validation(self) -> None:
        """Reads the titles again, with what the adapters have learned, where `title_table` is not `frozen`."""
        if isinstance(self.head, TitleHead) and self.config["title_table"] != "frozen":
            self.eval()
            self.head.set_titles(self.title_states(self.titles), self.config["title_floor"])

    def full_sort_predict(self, interaction) -> Tensor:
        """[B, n_items] float32; the target item that RecBole's evaluation batches carry is not read.

        Rows go through the backbone `micro_batch_size` at a time, next to rows of their length; not at all while the head makes
        nothing of what they would say.
        """
        item_seq, item_len = interaction[self.ITEM_SEQ].cpu(), interaction[self.ITEM_SEQ_LEN].cpu()
        if isinstance(self.head, TitleHead) and not self.head.reads():
            return self.head(None, to_device(item_seq, self.device)).float()
        order = self.prompts.title_tokens(item_seq).argsort()
        parts = order.split(self.config["micro_batch_size"] or len(order))
        vectors = torch.cat([self.read(item_seq[part], item_len[part]) for part in parts])
        return self.head(vectors[to_device(order.argsort(), self.device)], to_device(item_seq, self.device)).float()

    def predict(self, interaction) -> Tensor:
        """[B] float32: the score of each row's own item."""
        return self.full_sort_predict(interaction).gather(1, interaction[self.ITEM_ID][:, None])[:, 0]

    def parameter_groups(self) -> list[dict]:
        """Optimiser groups: the adapters and the head, each with its learning rate and weight decay."""
        return [
            {"params": [p for p in getattr(self, name).parameters() if p.requires_grad], **options}
            for name, options in self.optimisation.items()
        ]

    def save(self, folder: Path) -> None:
        """Writes PEFT's adapter files, and `<part>.safetensors` of each stored part, which also name the backbone and the items."""
        self.backbone.save_adapter(folder)
        for name in self.stored:
            weights.write(folder / f"{name}.safetensors", getattr(self, name).state_dict(), self.identity())

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote.

        Raises:
            DataError: the files are damaged, or were trained on another backbone or other items; both are named.
        """
        for name in self.stored:
            weights.check_identity(folder / f"{name}.safetensors", self.identity())
        self.backbone.load_adapter(folder)
        for name in self.stored:
            found, part = weights.read(folder / f"{name}.safetensors"), getattr(self, name)
            weights.check_names(part.state_dict(), found)
            part.load_state_dict(found)

    def identity(self) -> dict:
        """What a checkpoint must agree with: the backbone, and the items in their order."""
        return {"backbone": self.backbone.identity, "items": weights.items_identity(self.item_tokens)}

    def __str__(self):
        called = {"backbone": "adapters", "head": f"the head of {self.n_items - 1:,} items", "slots": "the projector"}
        counts = (
            f"{sum(p.numel() for p in group['params']):,} in {called.get(name, f'the {name}')}"
            for name, group in zip(self.optimisation, self.parameter_groups())
        )
        return (
            f"{self.config['model']} on {self.backbone.identity['name']}, {describe(self.backbone.kinds)}\n"
            + f"trainable: {', '.join(counts)}"
        )


def words_of(titles: Sequence[str], among: Sequence[str] | None = None) -> Tensor:
    """The words of titles as `TitleHead.set_words` takes them, those that stand in two titles or more of `among`.

    Raises:
        DataError: there are none.
    """
    try:
        found = title_vectors(titles, WORDS_MIN_DF, among).tocoo()
    except DataError:
        raise DataError("No two titles have a word in common: set title_words to 0.") from None
    places = torch.from_numpy(np.stack([found.row, found.col]).astype("int64"))
    return torch.sparse_coo_tensor(places, torch.from_numpy(found.data).float(), found.shape, check_invariants=True)


def trains_titles(config) -> bool:
    """Whether a step teaches the adapters what to say of titles, too."""
    return config["head"] != "linear" and config["title_table"] == "trained"


def lora_options(config) -> tuple:
    """The arguments of `Backbone.add_lora`, out of the keys named after them."""
    return tuple(config[f"lora_{name}"] for name in ("r", "alpha", "dropout", "targets", "from_layer"))


def torch_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of the backbone's weights; `auto` is bfloat16 where the machine computes in it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return (
        torch.bfloat16
        if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        else torch.float32
    )
