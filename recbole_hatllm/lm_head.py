"""From hidden states to the next token: the LM head that a pretrained decoder comes with, frozen."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from recbole_hatllm.backbone import Backbone
from recbole_hatllm.errors import BackboneError
from recbole_hatllm.files import cache_folder
from recbole_hatllm.pretrained import cut, locate, quiet

PIECE = 2**26  # logits that the loss computes at once: 256 MiB in float32
# What families do to logits beside the product and a soft cap.
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "logits_scale", "output_multiplier_scale")


class LMHead(nn.Module):
    """logits = cap tanh((W h + b) / cap), with a cap and a bias only where the family has them.

    Args:
        weight: [vocabulary, d], frozen; the token embeddings themselves where the model ties them. bias: [vocabulary] or None.
        cap: of the logits, or None.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None, cap: float | None = None):
        super().__init__()
        self.weight, self.bias, self.cap = weight, bias, cap

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., d] -> [..., vocabulary], at least float32, computed in the type of the weights."""
        logits = F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        if self.cap is not None:
            logits = self.cap * (logits / self.cap).tanh()
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def loss(self, hidden: Tensor, token: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy of tokens [N] int64 after states [N, d]; never more than `PIECE` logits exist at once."""
        rows = max(1, PIECE // len(self.weight))
        if len(token) <= rows:
            return self._sum(hidden, token, label_smoothing) / len(token)
        pieces = zip(hidden.split(rows), token.split(rows))
        return sum(checkpoint(self._sum, *piece, label_smoothing, use_reentrant=False) for piece in pieces) / len(token)

    def _sum(self, hidden: Tensor, token: Tensor, label_smoothing: float) -> Tensor:
        return F.cross_entropy(self(hidden), token, label_smoothing=label_smoothing, reduction="sum")


def load_lm_head(backbone: Backbone, name: str) -> LMHead:
    """The LM head of a backbone that was loaded as `name`.

    Raises:
        BackboneError: the family does more to its logits than is done here, or the files hold no LM head.
    """
    config = backbone.base.config.get_text_config()
    if scaled := [key for key in _SCALES if getattr(config, key, None) not in (None, 1, 1.0)]:
        raise BackboneError(
            f"{config.model_type} scales its logits ({scaled[0]}), which is not supported: use strategy: embedding, or "
            "another family, such as llama, qwen3 or mistral."
        )
    cap = getattr(config, "final_logit_softcapping", None)
    embeddings = backbone.base.get_input_embeddings().weight
    if config.tie_word_embeddings or name == "random-tiny":
        return LMHead(embeddings, cap=cap)
    folder, source = locate(name, embeddings.dtype, cache_folder())
    revision = source["revision"] if folder == source["name"] else None
    with torch.random.fork_rng(devices=[]), quiet():
        try:
            whole = AutoConfig.from_pretrained(folder, revision=revision)
            cut(whole.get_text_config(), 1, name)  # one layer, as only what stands behind it is wanted
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, config=whole, revision=revision, output_loading_info=True
            )
        except Exception as error:  # transformers, its parsers and the hub client each have error classes of their own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BackboneError(
                f"The LM head of {name} could not be loaded ({reason}): use strategy: embedding."
            ) from error
    head = model.get_output_embeddings()
    if head is None or info["missing_keys"]:
        raise BackboneError(
            f"The files of {name} hold no LM head, which strategy: language needs: take the model's own safetensors in place of "
            "a .gguf file or a copy without it, or use strategy: embedding."
        )
    head = head.requires_grad_(False).to(embeddings.device, embeddings.dtype)
    return LMHead(head.weight, getattr(head, "bias", None), cap)
