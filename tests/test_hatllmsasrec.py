"""HatLLMSASRec, the row CR->SASRec of HatLLM's Table 5, against states read one item at a time and eigenvectors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_hatllm import run, weights
from recbole_hatllm.errors import ConfigError
from recbole_hatllm.masks import attention_mask
from recbole_hatllm.model import hatllmsasrec
from recbole_hatllm.model.hatllmsasrec import item_states
from recbole_hatllm.recommend import load
from tests.model_contract import PARENTS, build, known_keys, rows

NAME = "HatLLMSASRec"


def run_it(keys):
    return run(NAME, "tiny", config_dict={k: v for k, v in {**PARENTS, **keys}.items() if k in known_keys(NAME)})


@pytest.mark.versions
@pytest.mark.parametrize("cross_layers", [0, 1, 2])
def test_item_states_are_those_of_every_item_read_alone(tiny, cross_layers):
    llm, _, _ = build("HatLLM", {**tiny, "n_cr": 0})
    llm.eval()
    layer, found = llm.backbone.n_layers - cross_layers, [torch.zeros(llm.backbone.hidden_size)]
    with torch.no_grad():
        for item in range(1, llm.n_items):
            prompt = llm.prompts(torch.tensor([[item]]), torch.tensor([1]))
            kinds = {k: attention_mask(k, prompt.span, prompt.is_last, prompt.valid) for k in set(llm.backbone.kinds)}
            states = llm.backbone(prompt.position_ids, kinds, input_ids=prompt.input_ids, depths=[layer])[0, :, 0]
            (own,) = prompt.is_last[0].nonzero()[:, 0].tolist()  # the title's last token
            found.append(states[own] / states[own].square().mean().sqrt())
    found = torch.stack(found)
    found[1:] -= found[1:].mean(0)
    assert torch.allclose(item_states(llm, cross_layers), found, atol=1e-5)


def test_pca_starts_from_whitened_components_of_the_states(tiny):
    """By the eigenvectors of the states' covariance: components of variance 1, by eigenvalue, up to a sign."""
    llm, _, _ = build("HatLLM", {**tiny, "n_cr": 0, **PARENTS["hatllm_keys"]})
    keys = {**tiny, "item_table": "pca", "hidden_size": 6, "n_cr": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hatllmsasrec, "item_states", lambda *_: item_states(llm.eval(), 1))
        model, _, _ = build(NAME, keys)
    states = item_states(llm.eval(), 1)[1:].double().numpy()
    values, directions = np.linalg.eigh(np.cov(states.T))
    expected = (states @ directions[:, ::-1][:, :6]) / np.sqrt(values[::-1][:6])
    found = model.item_embedding.weight[1:].detach().numpy() / model.scale
    assert np.abs(np.abs((found * expected).sum(0) / 19) - 1).max() < 1e-4
    assert np.abs((found**2).sum(0) / 19 - 1).max() < 1e-4


@pytest.mark.versions
@pytest.mark.parametrize("table", ["projector", "pca"])
def test_a_run_makes_its_hatllm_first_and_says_so(tiny, table):
    result = run_it({**tiny, "item_table": table, "hidden_size": 16, "epochs": 2})
    (parent,) = result["parents"]
    assert parent["role"] == "hatllm" and parent["model"] == "HatLLM" and parent["test"]
    assert "n_cr: 0" in (Path(parent["folder"]) / "config.yaml").read_text()
    again = run_it({**tiny, "item_table": table, "hidden_size": 16, "epochs": 2})
    assert again["parents"] == result["parents"] and again["test"] == result["test"]
    stored = weights.read(Path(result["folder"]) / "model.safetensors")
    assert ("state/item_embedding.states" in stored) == (table == "projector")
    trained = load(result["folder"])
    assert len(trained.recommend(trained.items.titles[1:4], 3)) == 3
    assert json.loads((Path(result["folder"]) / "result.json").read_text())["trainable_parameters"] == sum(
        p.numel() for p in trained.model.parameters()
    )


def test_mapped_states_stay_and_components_move(tiny):
    for table in ("projector", "pca"):
        model, train, _ = build(NAME, {**tiny, "item_table": table, "hidden_size": 16})
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert (before["item_embedding.states" if table == "projector" else "item_embedding.weight"][1:] != 0).any()
        optimiser = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(2):
            optimiser.zero_grad()
            model.calculate_loss(rows(train, 8)).backward()
            optimiser.step()
        moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert ("item_embedding.states" in moved, "item_embedding.map.weight" in moved) == (False, table == "projector")
        assert ("item_embedding.weight" in moved) == (table == "pca")


def test_item_vectors_are_input_and_output(tiny):
    """One set of them: W z stands where SASRec has its table, and scores are products with it."""
    model, _, test = build(NAME, {**tiny, "item_table": "projector", "hidden_size": 16})
    model.eval()
    vectors = model.item_embedding.states @ model.item_embedding.map.weight.T
    assert torch.equal(model.item_embedding.states[0], torch.zeros(model.item_embedding.states.shape[1]))
    assert torch.allclose(model.item_embedding(torch.arange(model.n_items)), vectors, atol=1e-6)
    batch = rows(test, 4)
    with torch.no_grad():
        last = model.forward(batch["item_id_list"], batch["item_length"])  # RecBole's own
        assert torch.allclose(model.full_sort_predict(batch)[:, 1:], (last @ vectors.T)[:, 1:], atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"item_table": "pca", "hidden_size": 64}, "hidden_size is 64, and 20 states of width"),
        ({"n_cr": 9}, "n_cr is 9, and the HatLLM has"),
        ({"hatllm_keys": {"n_cr": 1}}, "hatllm_keys has n_cr, which follows"),
        ({"hatllm_keys": {"n_im": 1}}, "HatLLMSASRec needs HatLLM: .*n_im"),
    ],
)
def test_wrong_keys_are_refused_before_the_hatllm_is_made(tiny, keys, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        run_it({**tiny, "hidden_size": 16, "runs_dir": str(tmp_path / "none"), **keys})
    assert not [*(tmp_path / "none").glob("HatLLM-*")]
