"""LLM recommenders that write: prompt -> the next title, token by token -> the items nearest to what was written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from recbole.model.abstract_recommender import SequentialRecommender
from torch import Tensor, nn
from tqdm import tqdm

from recbole_hatllm import distributed, registry, run_folder, text_states, trained
from recbole_hatllm.data.prompt import PromptTable
from recbole_hatllm.data.response import ResponseTable
from recbole_hatllm.data.titles import PieceEncoder
from recbole_hatllm.errors import ConfigError
from recbole_hatllm.evaluation import target_ranks
from recbole_hatllm.generation import beam_search
from recbole_hatllm.grounding import GAMMAS, Grounding, best_gamma, distances
from recbole_hatllm.layer_schedule import plug_in_kinds
from recbole_hatllm.lineage import Parent, said
from recbole_hatllm.lm_head import load_lm_head
from recbole_hatllm.model.llm import LLMRecommender
from recbole_hatllm.pool import TokenPool
from recbole_hatllm.transfer import to_device


class EitherStrategy(LLMRecommender):
    """A model with the key `strategy`: by embedding it is its own class, by language its `writer`. Its layers are plain unless
    `hatllm_masks`.

    Attributes:
        writer: the class of `TitleWriter` and the model.
    """

    writer: type[LLMRecommender]
    layer_kinds = staticmethod(plug_in_kinds)

    def __new__(cls, config=None, dataset=None):  # a copy is made without
        return super().__new__(cls.writer if config and config["strategy"] == "language" else cls)

    @classmethod
    def parents(cls, config) -> list[Parent]:
        """The model itself may need some, and so may its re-weighting."""
        return [*super().parents(config), *cf_parents(config)]

    @classmethod
    def uncounted(cls, config) -> str | None:
        """Of a writer the search's past, and the logits."""
        if config["strategy"] == "embedding":
            return super().uncounted(config)
        return "the writing of titles (strategy: language): ask it for strategy: embedding, with the same decoder and adapters"


class TitleWriter(LLMRecommender):
    """BIGRec's language strategy, for any LLM recommender that it stands before in the order of classes.

    Trained is the LM loss of the target's title behind the prompt, by LoRA alone. A ranking lets beam search write a title, and
    ranks all items by the distance of their title's vector to that of what was written. Under layers with masks of their own
    the tokens of a response are template tokens, F = 0, as the paper's equations have no other word for them: IN, OR and CR layers
    let them see the whole prompt and the response before them, and only `cr_query_scope: all` of an item its last token alone.

    Attributes:
        written: while it is a list, each ranking adds the token ids that were written, [B, max_new_tokens] int64.
    """

    def __init__(self, config, dataset):
        refuse(config)
        super().__init__(config, dataset)
        self._cf: tuple[nn.Module, ...] = ()  # a tuple hides it: it is no part of what is trained, moved or saved
        self.encode = PieceEncoder(self.backbone.tokenizer)
        self.responses = ResponseTable(self.titles, self.encode, config["target_quotes"])
        self.lm_head = load_lm_head(self.backbone, config["backbone"])
        del self.optimisation["head"]
        self.item_titles = dataset.titles
        self.beginning = PromptTable.beginning(self.backbone.tokenizer)
        self.texts = text_states.behind(self.beginning, self.titles)
        # By its tokens, as the LLM would write them: a title that was cut is known by what is left. Of equal ones the first counts.
        texts = self.titles.ids.split(self.titles.offsets.diff().tolist())
        self.known = {tuple(text.tolist()): item for item, text in reversed(list(enumerate(texts))) if len(text)}
        self._items: Tensor | None = None
        self.written: list[Tensor] | None = None

    @classmethod
    def parts(cls, config, n_items: int, width: int) -> dict[str, nn.Module]:
        """Distances to scores, in place of a head that is trained."""
        head = Grounding(n_items, config["grounding_weight"], config["grounding_gamma"])
        return {**super().parts(config, n_items, width), "head": head}

    def inherit(self, folders: dict[str, Path], dataset) -> None:
        """The model whose scores move the distances, where there is one."""
        super().inherit(folders, dataset)
        if "cf" in folders:
            self._be_moved_by(folders["cf"])

    # --- Training

    def calculate_loss(self, interaction) -> Tensor:
        """Scalar mean cross-entropy of the tokens of the targets' responses, the end included."""
        prompt = self.prompts(interaction[self.ITEM_SEQ].cpu(), interaction[self.ITEM_SEQ_LEN].cpu())
        prompt, places, tokens = self.responses.behind(prompt, interaction[self.POS_ITEM_ID].cpu())
        places, tokens = to_device(places, self.device), to_device(tokens, self.device)
        states = self.states(prompt).flatten(0, 1).index_select(0, places)
        return self.lm_head.loss(states, tokens, self.label_smoothing)

    def targets_in(self, interaction) -> int:
        """How many tokens `calculate_loss` takes the mean over."""
        return int(self.responses.length[interaction[self.POS_ITEM_ID].cpu()].sum())

    def warm_start(self, rows, show_progress: bool = False) -> list[str]:
        """Counts the items' popularity, where it is asked for."""
        if self.head.weight == "popularity":
            self.head.count(rows[self.POS_ITEM_ID])
        return []

    def train(self, mode: bool = True):
        """A table of items that the adapters had a part in is made again after training."""
        if mode and self.config["ground_with_lora"]:
            self._items = None
        return super().train(mode)

    def load(self, folder) -> None:
        """Reads what `save` wrote; of a finished run, also the run whose scores move the distances."""
        super().load(folder)
        if self.head.weight == "cf" and not self._cf:
            for stage in (run_folder.read_result(folder) or {}).get("parents", []):
                if stage["role"] == "cf":
                    self._be_moved_by(stage["folder"])
        if self.config["ground_with_lora"]:
            self._items = None

    def _be_moved_by(self, folder: str | Path) -> None:
        self._cf = (trained.load_model(folder)[1].requires_grad_(False),)

    # --- Ranking

    @torch.no_grad()
    def write(self, item_seq: Tensor, item_len: Tensor) -> Tensor:
        """[B, L], [B] histories -> [B, max_new_tokens] int64 on the host: the token ids written, `responses.end` behind the end.

        Rows go through the backbone `micro_batch_size` at a time, next to rows of their length.
        """
        item_seq, item_len = item_seq.cpu(), item_len.cpu()
        order = self.prompts.title_tokens(item_seq).argsort()
        parts = order.split(self.config["micro_batch_size"] or len(order))
        quiet = len(parts) == 1 or not (self.config["show_progress"] and distributed.first())
        written = []
        for part in tqdm(parts, desc="write", unit="batch", disable=quiet, ncols=100, leave=False):
            prompt = self.prompts(item_seq[part], item_len[part])
            pool = TokenPool.of(prompt.valid, prompt.shared) if self.config["token_pool"] else None
            prompt = to_device(prompt, self.device)
            tokens, _ = beam_search(
                self.backbone,
                self.lm_head,
                prompt,
                self.responses.end,
                self.config["num_beams"],
                self.config["max_new_tokens"],
                to_device(pool, self.device),
                self.embed(prompt),
            )
            written.append(tokens.cpu())
        return torch.cat(written)[order.argsort()]

    @torch.no_grad()
    def distances(self, interaction) -> Tensor:
        """[B, n_items] float32: how far every item's title is from what is written for each row."""
        tokens = self.write(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        if self.written is not None:
            self.written.append(tokens)
        ids = [tuple(self._read(self.responses.text(row))) for row in tokens.tolist()]
        items = self.item_vectors()
        # A title that is known, or was written for another row, has its vector already: the same one, to the bit.
        new = {text: None for text in ids if text not in self.known}
        end = [] if self.beginning else [self.responses.end]  # what is read in place of nothing
        vectors = self._vectors(text_states.flat([[*self.beginning, *text] or end for text in new]))
        place = {text: place for place, text in enumerate(new, len(items))}
        rows = [self.known[text] if text in self.known else place[text] for text in ids]
        return distances(torch.cat([items, vectors])[torch.tensor(rows, device=items.device)], items)

    def full_sort_predict(self, interaction) -> Tensor:
        """[B, n_items] float32; the target item that RecBole's evaluation batches carry is not read."""
        return self.head(self.distances(interaction), self._cf_scores(interaction))

    def item_vectors(self) -> Tensor:
        """[n_items, d]: the last token's state of each title, read alone; computed at the first ranking that asks for it."""
        if self._items is None:
            show = self.config["show_progress"] and distributed.first()
            kept = None if self.config["ground_with_lora"] else text_states.kept_table
            self._items = (kept or text_states.table)(self.backbone, self.texts, show_progress=show)
        return self._items

    def _vectors(self, texts) -> Tensor:
        if self.config["ground_with_lora"]:
            return text_states.table(self.backbone, texts)
        with self.backbone.without_adapters():
            return text_states.table(self.backbone, texts)

    def _read(self, text: str) -> list[int]:
        return self.encode(text)[: self.config["title_tokens"]] if text else []

    def _cf_scores(self, interaction) -> Tensor | None:
        with torch.no_grad():
            return self._cf[0].full_sort_predict(interaction).view(-1, self.n_items) if self._cf else None

    # --- After training

    @torch.no_grad()
    def choose(self, valid_data) -> str | None:
        """The exponent of the re-weighting with the highest NDCG on the validation rows, at the cut of `valid_metric`.

        Args:
            valid_data: a loader; of several processes each has its share of the rows.

        Returns:
            what was chosen, in words; None where nothing is to be chosen.
        """
        if self.head.weight == "none" or self.config["grounding_gamma"] is not None:
            return None
        self.eval()
        gammas, found = GAMMAS[self.head.weight], []
        for interaction, masked, _, target in valid_data:
            interaction, target = interaction.to(self.device), target.to(self.device)
            distance, cf = self.distances(interaction), self._cf_scores(interaction)
            ranks = []
            for gamma in gammas:
                scores = self.head(distance, cf, gamma)
                if masked is not None:
                    scores[masked] = -torch.inf
                ranks.append(target_ranks(scores, target))
            found.append(torch.stack(ranks, 1).cpu())
        ranks = distributed.gather_rows({"ranks": torch.cat(found)}, len(valid_data.dataset))["ranks"]
        cut = int(self.config["valid_metric"].rpartition("@")[2])
        gamma, best, without = best_gamma(gammas, ranks, cut)
        self.head.gamma.fill_(gamma)
        return f"gamma {gamma:g}: valid NDCG@{cut} {best:.4f}, and {without:.4f} without re-weighting by {self.head.weight}"

    def told(self, rows, written: Tensor, ranks: dict) -> Iterator[dict]:
        """What was written for each row: user, history, target, written text, and the target's rank.

        Args:
            rows: an Interaction. written: [rows, max_new_tokens] int64. ranks: arrays `user` and `rank` of the rows.
        """
        titles = self.item_titles
        for row, tokens in enumerate(written.tolist()):
            history = rows[self.ITEM_SEQ][row][: int(rows[self.ITEM_SEQ_LEN][row])].tolist()
            yield {
                "user": str(ranks["user"][row]),
                "history": [titles[item] for item in history],
                "target": titles[int(rows[self.ITEM_ID][row])],
                "written": self.responses.text(tokens),
                "rank": int(ranks["rank"][row]),
            }

    def __str__(self):
        return f"{super().__str__()}; writes titles, of {self.n_items - 1:,} items the nearest first"


def refuse(config) -> None:
    """What the language strategy cannot do, before any weight is read.

    Raises:
        ConfigError: names the key and the remedy.
    """
    if config["head"] != "linear":
        raise ConfigError(f"head is {config['head']}, and strategy: language has none: leave it out.")
    if config["targets"] != "last":
        raise ConfigError("targets is all, and strategy: language teaches one title a row: set targets to last.")
    if config["pretrained_cf"] and config["grounding_weight"] != "cf":
        raise ConfigError(
            f"pretrained_cf is {config['pretrained_cf']}, and grounding_weight: {config['grounding_weight']} does not read it: "
            "leave it out, or set grounding_weight to cf."
        )
    if config["compile"]:
        raise ConfigError(
            "compile is true, and strategy: language was never run on compiled layers: set compile to false."
        )
    if distributed.sharded():
        raise distributed.once(
            ConfigError(
                "strategy: language writes titles of different lengths in each process, which FSDP's processes cannot: leave "
                "FSDP out, or use strategy: embedding."
            )
        )


def cf_parents(config) -> list[Parent]:
    """The sequential model whose scores move the distances, where `grounding_weight` asks for it.

    Raises:
        ConfigError: `cf_model` is no such model.
    """
    if config["strategy"] != "language" or config["grounding_weight"] != "cf":
        return []
    model = registry.model_class(config["cf_model"])
    if not issubclass(model, SequentialRecommender) or getattr(model, "is_llm", False):
        raise ConfigError(
            f"cf_model is {config['cf_model']}, and must be a sequential model without an LLM, which scores by a history alone, "
            "such as SASRec."
        )
    return [Parent("cf", config["cf_model"], said(config, "cf_keys", []), "pretrained_cf", config["pretrained_cf"])]
