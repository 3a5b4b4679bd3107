"""The LM head that a folder brings along, against HF's own logits."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from recbole_hatllm.backbone import load_backbone
from recbole_hatllm.errors import BackboneError
from recbole_hatllm.lm_head import load_lm_head
from recbole_hatllm.pretrained import random_tiny
from tests.test_families import FAMILIES, masks_of

pytestmark = pytest.mark.versions


def folder_of(family, folder, tie, base_alone=False, **options):
    """A random model of the family and a tokenizer, written as HF writes them."""
    config = AutoConfig.for_model(family, **{**FAMILIES[family], "vocab_size": 384, **options}, tie_word_embeddings=tie)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    (model.base_model if base_alone else model).save_pretrained(folder)
    random_tiny(1, 0, torch.float32, None)[1].save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("family", "tie"), [("llama", True), ("llama", False), ("qwen2", False), ("gemma2", True), ("gpt_neox", False)]
)
def test_logits_are_hfs(family, tie, tmp_path):
    model = folder_of(family, tmp_path, tie)
    backbone = load_backbone(str(tmp_path))
    before = torch.get_rng_state()
    head = load_lm_head(backbone, str(tmp_path))
    assert torch.equal(torch.get_rng_state(), before) and not any(p.requires_grad for p in head.parameters())
    ids = torch.randint(1, 384, (2, 5), generator=torch.Generator().manual_seed(0))
    valid = torch.ones_like(ids).bool()
    masks = masks_of(torch.full_like(ids, -1), ~valid, valid, ["or"])
    with torch.no_grad():
        found = head(backbone(torch.arange(5).expand(2, -1), masks, input_ids=ids))
        expected = model(input_ids=ids).logits
    assert (found - expected).abs().max() < 1e-5 and expected.std() > 1e-3
    assert (head.weight is backbone.base.get_input_embeddings().weight) == tie


def test_a_cut_backbone_has_the_whole_models_head(tmp_path):
    model = folder_of("llama", tmp_path, tie=False)
    head = load_lm_head(load_backbone(str(tmp_path), layers=2), str(tmp_path))
    assert torch.equal(head.weight, model.lm_head.weight)


def test_files_without_a_head_are_refused(tmp_path):
    folder_of("llama", tmp_path, tie=False, base_alone=True)
    with pytest.raises(BackboneError, match="hold no LM head"):
        load_lm_head(load_backbone(str(tmp_path)), str(tmp_path))


def test_a_family_that_scales_its_logits_is_refused(tmp_path):
    folder_of("llama", tmp_path, tie=True)
    backbone = load_backbone(str(tmp_path))
    backbone.base.config.logit_scale = 0.0625
    with pytest.raises(BackboneError, match="llama scales its logits"):
        load_lm_head(backbone, str(tmp_path))
