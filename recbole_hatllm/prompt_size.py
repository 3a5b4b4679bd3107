"""How many items a dataset has and how many tokens its longest prompt, before any backbone is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from recbole_hatllm import registry
from recbole_hatllm.data.titles import PieceEncoder, TitleTokens
from recbole_hatllm.errors import ConfigError
from recbole_hatllm.files import cache_folder
from recbole_hatllm.pretrained import local_tokenizer, quiet, random_tiny

TOKENS_A_WORD = 1.4  # of titles, by the tokenizers of Llama-3 and SmolLM2


@dataclass(frozen=True)
class PromptSize:
    """Tokens of the longest training prompt, how many of them all prompts begin with, and in words how both are known."""

    tokens: int
    shared: int
    known: str


def prompt_size(config, items: int | None = None, tokens: int | None = None) -> tuple[int, PromptSize]:
    """The number of items and the size of a prompt: as given, the rest from the dataset.

    Raises:
        ConfigError: the model is no LLM recommender; something is not given, and the dataset's files are not here.
        DataError: they are broken.
    """
    template = llm_class(config).template
    wrapping = template.wrappings[config["item_span"]]
    tokenizer = known_tokenizer(str(config["backbone"]))
    encode = PieceEncoder(tokenizer) if tokenizer else _words
    words = {"nouns": config["prompt_nouns"], "noun": config["prompt_noun"], "verb": config["prompt_verb"]}
    head, tail = (len(encode(text)) for text in template.text.format(**words, items="{items}").split(" {items}"))
    # One token for the quote before the first title, one for what some tokenizers begin a text with.
    shared = head + bool(wrapping.start or wrapping.open) + template.bos
    if items and tokens:
        return items, PromptSize(tokens, min(shared, tokens // 2), "given")
    dataset = _dataset(config)
    items = items or dataset.item_num - 1
    if tokens:
        return items, PromptSize(tokens, min(shared, tokens // 2), "given")
    opening, between, end = (
        sum(len(encode(text)) for text, _ in parts) for parts in (wrapping.open, wrapping.between, wrapping.end)
    )
    if not template.titles:
        titles = torch.zeros(dataset.item_num, dtype=torch.int64)
    elif tokenizer:
        titles = TitleTokens.build(dataset.titles, encode, config["title_tokens"], cache_folder()).offsets.diff()
    else:
        titles = torch.tensor([min(len(encode(title)), config["title_tokens"]) for title in dataset.titles])
    titles = titles + opening + len(encode(wrapping.close)) + template.slots
    titles[0] = 0  # padding
    rows = dataset.build()[0].inter_feat
    history, length = dataset.iid_field + config["LIST_SUFFIX"], dataset.item_list_length_field
    longest = 0
    for start in range(0, len(rows), 8192):
        part = rows[start : start + 8192]
        endings = part[length] if config["targets"] == "all" else 1
        counts = titles[part[history]].sum(1) + between * (part[length] - 1) + endings * (end + tail)
        longest = max(longest, int(counts.max()))
    known = "by the backbone's tokenizer" if tokenizer else f"words x {TOKENS_A_WORD}, its tokenizer is not here"
    return items, PromptSize(shared + longest, shared, f"the longest of {len(rows):,} training rows, {known}")


def llm_class(config) -> type:
    """The class of the model of `config`.

    Raises:
        ConfigError: it is no LLM recommender.
    """
    model_class = registry.model_class(config["model"])
    if not getattr(model_class, "is_llm", False):
        raise ConfigError(f"{config['model']} has no backbone: memory is for LLM recommenders, such as HatLLM.")
    return model_class


def _dataset(config):
    name = config["dataset"]
    if not Path(config["data_path"], f"{name}.inter").is_file():
        raise ConfigError(
            f"The files of {name} are not in {config['data_path']}: make them by run_hatllm.py prepare {name}, or say "
            "--items=NUMBER and --tokens=NUMBER, the number of items and the tokens of a prompt."
        )
    return registry.create_dataset(config)


def _words(text: str) -> range:
    return range(math.ceil(TOKENS_A_WORD * len(text.split())))


def known_tokenizer(name: str):
    """The backbone's tokenizer where it is on this machine, else None."""
    if name == "random-tiny":
        return random_tiny(1, 0, torch.float32, None)[1]
    if name == "smollm2-135m":
        return local_tokenizer(cache_folder())
    path = Path(name).expanduser()
    hub, _, revision = name.partition("@")
    try:
        with quiet():
            if path.suffix == ".gguf":
                return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            if path.is_dir():
                return AutoTokenizer.from_pretrained(path)
            return AutoTokenizer.from_pretrained(hub, revision=revision or None, local_files_only=True)
    except Exception:  # whatever keeps a tokenizer from being read, words can be counted
        return None
