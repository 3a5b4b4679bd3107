"""The head that reads titles: closed forms in float64, what is cold stays cold, and catalogues that training never saw."""

from math import exp, inf, log, sqrt

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer

from recbole_hatllm import load, registry, run, text_states, title_head
from recbole_hatllm.config import Config
from recbole_hatllm.errors import ConfigError, DataError
from recbole_hatllm.title_head import UNIT, TitleHead
from tests.conftest import random_sequences, write_dataset
from tests.model_contract import rows

COLD = {3, 7}
COLOURS, THINGS = ("red", "green", "blue", "black"), ("car", "boat", "plane", "train", "house", "tree")
HISTORY = torch.tensor([[1, 2, 1, 0], [4, 3, 0, 0], [5, 6, 8, 9], [2, 2, 2, 2]])
TARGET = torch.tensor([4, 1, 2, 9])


@pytest.fixture
def head():
    """Ten items of width 6, two of them cold; every parameter has some value."""
    torch.manual_seed(0)
    head = TitleHead(10, 6, longest=4, offsets=True, whiten=True, cold_bias=0.7).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2)
    head.set_seen(torch.tensor([item for item in range(1, 10) if item not in COLD]))
    head.whitening.fit(torch.randn(50, 6) * torch.arange(1, 7) + 3)
    head.set_titles(torch.randn(10, 6).double() * torch.arange(1, 7) + 1, floor=0.1)
    return head


def scores_by_hand(head, vector, history):
    """The equations of the docstring, one number at a time; padding left out of nothing but the history."""
    items = [
        [v + (0 if item in {0, *COLD} else o) for v, o in zip(head.vectors[item].tolist(), head.offsets[item].tolist())]
        for item in range(10)
    ]
    rows = []
    white = ((vector - head.whitening.mean) @ head.whitening.map).tolist()
    for h, past in zip(white, history.tolist()):
        past = [item for item in past if item]
        raw = [exp(UNIT * head.recency[age].item()) for age in range(len(past) - 1, -1, -1)]
        content = [sum(w / sum(raw) * items[item][k] for w, item in zip(raw, past)) for k in range(6)]
        query = [
            content[k]
            + sum(content[m] * head.mix[m, k].item() for m in range(6))
            + sum(h[m] * head.readout[m, k].item() for m in range(6)) / sqrt(6)
            for k in range(6)
        ]
        rows.append(
            [
                exp(UNIT * head.scale.item()) * sum(q * e for q, e in zip(query, items[item]))
                + (UNIT * head.again.item() if item in past else 0)
                + (0.7 if item in COLD else 0)
                for item in range(10)
            ]
        )
    return rows


def test_scores_are_those_of_the_equation(head):
    vector = torch.randn(4, 6).double()
    scores = head.eval()(vector, HISTORY)
    assert (scores[:, 0] == -inf).all()
    expected = torch.tensor(scores_by_hand(head, vector, HISTORY), dtype=torch.float64)
    assert (scores[:, 1:] - expected[:, 1:]).abs().max() < 1e-12


@pytest.mark.parametrize("at_once", [1, 256])
def test_words_in_common_count_in_a_ranking_alone(head, monkeypatch, at_once):
    """Cosines a number at a time; item 6 has no word, and neither has the history of the second row."""
    monkeypatch.setattr(title_head, "ROWS", at_once)
    words = torch.rand(10, 7, dtype=torch.float64) * (torch.rand(10, 7) < 0.6)
    words[[0, 3, 4, 6]] = 0
    words = torch.nn.functional.normalize(words, dim=1)
    vector = torch.randn(4, 6).double()
    before, loss = head.eval()(vector, HISTORY), head.loss(vector, TARGET, history=HISTORY)
    head.set_words(words.to_sparse())
    assert torch.equal(head(vector, HISTORY), before)  # no weight
    head.words = 3.0
    more = (head(vector, HISTORY) - before)[:, 1:]
    for row, past in enumerate(HISTORY.tolist()):
        past = [item for item in past if item]
        raw = [exp(UNIT * head.recency[age].item()) for age in range(len(past) - 1, -1, -1)]
        together = [sum(w * words[item, k].item() for w, item in zip(raw, past)) for k in range(7)]
        size = sqrt(sum(x * x for x in together))
        for item in range(1, 10):
            shared = sum(x * y for x, y in zip(together, words[item].tolist())) / size if size else 0
            assert abs(more[row, item - 1].item() - 3 * shared) < 1e-12
    assert (more[1] == 0).all() and (more[:, 5] == 0).all() and more[0].abs().max() > 0.1
    assert torch.equal(head.loss(vector, TARGET, history=HISTORY), loss)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_is_minus_log_softmax_over_what_training_sees(head, smoothing):
    vector = torch.randn(4, 6).double()
    expected = 0.0
    for row, target in zip(scores_by_hand(head, vector, HISTORY), TARGET.tolist()):
        warm = {item: row[item] for item in range(1, 10) if item not in COLD}
        total = log(sum(map(exp, warm.values())))
        expected -= (1 - smoothing) * (warm[target] - total)
        expected -= smoothing * sum(score - total for score in warm.values()) / len(warm)
    assert head.eval().loss(vector, TARGET, smoothing, history=HISTORY).item() == pytest.approx(expected / 4, abs=1e-12)


def test_pieces_change_neither_loss_nor_gradients(head, monkeypatch):
    vector = torch.randn(4, 6).double()

    def gradients():
        head.zero_grad()
        given = vector.clone().requires_grad_()
        loss = head.loss(given, TARGET, 0.1, history=HISTORY)
        loss.backward()
        return [loss.detach(), given.grad, *(p.grad.clone() for p in head.parameters())]

    whole = gradients()
    monkeypatch.setattr("recbole_hatllm.head.PIECE", 3 * 7)  # three rows of the seven warm items, and one more
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(whole, gradients()))
    assert all(gradient.abs().sum() > 0 for gradient in whole)


def test_offsets_of_cold_items_stay_what_they_are(head):
    before = head.offsets.detach().clone()
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1, weight_decay=0.0)
    head.loss(torch.randn(4, 6).double(), TARGET, history=HISTORY).backward()
    optimizer.step()
    moved = (head.offsets.detach() != before).any(1)
    assert {item for item in range(10) if not moved[item]} == {0, *COLD}


def test_untrained_it_ranks_by_the_likeness_of_titles():
    torch.manual_seed(1)
    head = TitleHead(50, 8, longest=3).eval()
    said = torch.randn(50, 8) * 5 + 2
    said[33] = said[12]
    head.set_titles(said, floor=0.1)
    with torch.no_grad():
        scores = head(torch.randn(1, 8), torch.tensor([[12, 0, 0]]))
    assert scores.argmax() == 33 and torch.allclose(head.vectors[1:].norm(dim=1), torch.ones(49), atol=1e-5)
    cosine = head.vectors @ head.vectors[12]
    others = [item for item in range(1, 50) if item != 12]
    assert torch.allclose(scores[0, others], 10 * cosine[others], atol=1e-5)
    assert scores[0, 12] == pytest.approx(0, abs=1e-5)  # its own title, less what a repetition costs


def test_added_items_score_as_cold_ones_of_their_title_do(head):
    said = torch.randn(10, 6).double()
    head.set_titles(said, floor=0.1)
    vector = torch.randn(4, 6).double()
    before = head.eval()(vector, HISTORY)
    head.add_items(said[[7, 3]])
    after = head(vector, HISTORY)
    assert torch.allclose(after[:, :10], before, atol=1e-12)
    assert torch.allclose(after[[0, 2, 3]][:, [10, 11]], before[[0, 2, 3]][:, [7, 3]], atol=1e-12)


def test_without_a_map_of_the_readout_nothing_needs_to_be_read(head):
    vector = torch.randn(4, 6).double()
    assert head.eval().reads() and not torch.equal(head(None, HISTORY), head(vector, HISTORY))
    with torch.no_grad():
        head.readout.zero_()
    assert not head.reads() and torch.equal(head(None, HISTORY), head(vector, HISTORY))


def test_a_ranking_reads_prompts_only_where_that_matters(keys):
    model = load(run("HatLLM", "colder", config_dict={**keys, "train_steps": 0, "probe_rows": 5})["folder"]).model
    _, _, test = build_on(model)
    batch = rows(test, 6)
    with torch.no_grad():
        vectors = model.read(batch["item_id_list"], batch["item_length"])
        expected = model.head(vectors, batch["item_id_list"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "read", None)
            assert torch.equal(model.full_sort_predict(batch), expected)
        model.head.readout.normal_()
        assert torch.allclose(model.full_sort_predict(batch), model.head(vectors, batch["item_id_list"]), atol=1e-5)


def test_what_titles_say_by_now_replaces_what_they_said(head):
    """Some titles read again: the loss is that of a head which has them in its table, with gradients for these states alone."""
    items, said = torch.tensor([2, 4, 7]), torch.randn(3, 6).double().requires_grad_()
    head.eval()
    vector = torch.randn(4, 6).double()
    assert torch.autograd.gradcheck(lambda x: head.loss(vector, TARGET, history=HISTORY, said=(items, x)), said)
    loss = head.loss(vector, TARGET, history=HISTORY, said=(items, said))
    assert not torch.equal(loss, head.loss(vector, TARGET, history=HISTORY))
    head.vectors[items] = head.title_vectors(said).detach()
    assert torch.allclose(loss, head.loss(vector, TARGET, history=HISTORY), atol=1e-12)


def test_items_whose_sight_is_restored_are_scored_with_their_offsets(head):
    """The lists made of `seen` follow it: a state that is copied in place, as a resumed run does, too."""
    vector = torch.randn(4, 6).double()
    head.loss(vector, TARGET, history=HISTORY)
    head.seen.copy_(torch.arange(10) > 0)
    all_seen = head.eval().loss(vector, torch.tensor([3, 7, 3, 7]), history=HISTORY)
    assert all_seen.isfinite() and head._warm_items()[0].tolist() == list(range(1, 10))


# --- In a run


def build_on(model):
    """The loaders of a loaded model's data."""
    return registry.data_loaders(model.config, registry.create_dataset(model.config))


def sequences_with_cold_items():
    sequences = random_sequences(30, 18)
    sequences["u3"].append(18)
    sequences["u4"].append(19)
    return sequences


@pytest.fixture
def keys(tmp_path, tiny):
    """A run on data with two items that only test rows have."""
    write_dataset(tmp_path, "colder", sequences_with_cold_items())
    return {**tiny, "data_path": str(tmp_path), "head": "title_id", "head_init": "probe", "readout_norm": "whiten"}


def with_words(root):
    """The same data with titles that have words in common."""
    names = [f"the {a} {b}" for a in COLOURS for b in THINGS]
    write_dataset(root / "words", "colder", sequences_with_cold_items(), names)
    return root / "words"


@pytest.mark.parametrize("targets", ["last", "all"])
def test_a_run_with_offsets_knows_what_is_cold_and_loads_as_it_was(keys, targets):
    result = run("HatLLM", "colder", config_dict={**keys, "targets": targets})
    trained = load(result["folder"])
    cold = {trained.items.item_tokens[item] for item in (~trained.model.head.seen).nonzero()[1:, 0].tolist()}
    assert cold == {"i18", "i19"}
    assert (trained.model.head.offsets[~trained.model.head.seen] == 0).all()
    assert trained.model.head.offsets.abs().sum() > 0 and result["test_parts"]["cold"]["rows"] == 2
    first = [(r.item, r.score) for r in trained.recommend(["i1", "i2"], 5)]
    assert first == [(r.item, r.score) for r in load(result["folder"]).recommend(["i1", "i2"], 5)]


def test_with_some_rows_read_it_learns_from_all_histories_and_from_no_readout(keys):
    some, all_of_them = (
        run("HatLLM", "colder", config_dict={**keys, "probe_rows": rows, "train_steps": 0}) for rows in (40, None)
    )
    partly, wholly = (load(result["folder"]).model.head for result in (some, all_of_them))
    assert (partly.readout == 0).all() and (wholly.readout != 0).any()
    moved = partly.offsets.abs().sum(1) > 0
    assert moved.tolist() == partly.seen.tolist()  # a row that is not read has taught its items, too


def test_the_table_is_kept_and_a_damaged_copy_is_made_again(keys, tmp_path, monkeypatch):
    monkeypatch.setenv("RECBOLE_HATLLM_CACHE", str(tmp_path / "cache"))
    short = {**keys, "train_steps": 0, "probe_epochs": 1}
    first = run("HatLLM", "colder", config_dict=short)
    (file,) = (tmp_path / "cache").glob("states-*")
    whole = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(text_states, "table", lambda *_, **__: pytest.fail("read again"))
        assert run("HatLLM", "colder", config_dict=short)["test"] == first["test"]
    file.write_bytes(whole[: len(whole) // 2])
    assert run("HatLLM", "colder", config_dict=short)["test"] == first["test"] and file.read_bytes() == whole


@pytest.mark.parametrize("table", ["frozen", "refreshed", "trained"])
def test_a_refreshed_table_is_what_the_adapters_say(keys, table):
    """A learning rate that changes the adapters at once, and the last step's weights, not the best ones."""
    keys |= {"title_table": table, "learning_rate": 0.1, "train_steps": 4, "eval_step": 2, "stopping_step": 9}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recbole_hatllm.trainer.early_stopping", lambda score, *_, **__: (score, 0, False, True))
        model = load(run("HatLLM", "colder", config_dict=keys)["folder"]).model
    with model.backbone.without_adapters():
        bare = text_states.table(model.backbone, model.titles, "mean")
    adapted = text_states.table(model.backbone, model.titles, "mean")
    assert (adapted - bare).abs().max() > 0.01
    far = {
        name: (model.head.title_vectors(said)[1:] - model.head.vectors[1:]).abs().max()
        for name, said in (("frozen", bare), ("adapted", adapted))
    }
    assert far.pop("frozen" if table == "frozen" else "adapted") < 1e-5 < 1e-3 < max(far.values())


@pytest.mark.parametrize("table", ["refreshed", "trained"])
def test_titles_teach_the_adapters_where_they_are_trained(keys, table):
    """The readout's map is zero, so that adapters learn by titles or not at all; a step reads those of its rows and no others."""
    keys |= {"title_table": table, "title_layers": 1, "head_init": "random", "lora_dropout": 0.0}
    config = Config("HatLLM", "colder", config_dict=keys)
    train, _, _ = registry.data_loaders(config, registry.create_dataset(config))
    model = registry.model_class("HatLLM")(config, train.dataset)
    model.warm_start(train.dataset.inter_feat)
    adapters = [p for p in model.backbone.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in adapters:
            parameter.normal_(std=0.1)
    batch = rows(train, 3)
    loss = model.calculate_loss(batch)
    loss.backward()
    moved = sum(p.grad.abs().sum() for p in adapters if p.grad is not None)
    assert (moved > 0) == (table == "trained")
    items = torch.cat([batch["item_id_list"].flatten(), batch["item_id"]]).unique()[1:]
    if table == "trained":
        now = model.head.title_vectors(text_states.table(model.backbone, model.titles, "mean", layers=1))
        assert (now[items] - model.head.vectors[items]).abs().max() > 1e-3 and len(items) < len(now) - 1
        model.head.vectors[items] = now[items]
    vectors, targets, history = model.pairs(batch)
    assert torch.allclose(loss, model.head.loss(vectors, targets, history=history), atol=1e-5)


def test_words_are_those_of_the_titles_and_need_no_checkpoint(keys, tmp_path):
    """What a weight adds is TitleTFIDF's cosine, with the head's weights of age; a loaded run counts the words again."""
    with pytest.raises(DataError, match="set title_words to 0"):
        run("HatLLM", "colder", config_dict={**keys, "title_words": 2.5})
    keys["data_path"] = str(with_words(tmp_path))
    model = load(run("HatLLM", "colder", config_dict={**keys, "title_words": 2.5})["folder"]).model
    _, _, test = build_on(model)
    batch = rows(test, 6)
    with torch.no_grad():
        scores = model.full_sort_predict(batch)
        model.head.words = 0.0
        added = (scores - model.full_sort_predict(batch))[:, 1:].numpy()
        weights = model.head.weights(batch["item_id_list"]).numpy()
    titles = test.dataset.titles
    terms = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2).fit(titles[1:]).transform(titles).toarray()
    for row, (past, weight) in enumerate(zip(batch["item_id_list"].numpy(), weights)):
        together = weight @ terms[past]
        expected = 2.5 * terms @ together / max(np.linalg.norm(together), 1e-12)
        assert np.abs(added[row] - expected[1:]).max() < 1e-5
    assert np.abs(added).max() > 0.1


@pytest.mark.parametrize("words", [0.0, 4.0])
def test_recommends_out_of_a_catalogue_that_training_never_saw(keys, tmp_path, capsys, words):
    from recbole_hatllm.cli import main

    if words:
        keys["data_path"] = str(with_words(tmp_path))
    folder = run("HatLLM", "colder", config_dict={**keys, "learning_rate": 0.05, "title_words": words})["folder"]
    trained = load(folder)
    at = trained.find("i19")
    cold = {r.item: r.score for r in trained.recommend(["i1", "i2"], 19)}["i19"]
    file = tmp_path / "new.item"
    title = trained.items.titles[at]
    file.write_text(f"item_id:token\ttitle:token_seq\nn1\t{title}\nn2\tA film of tomorrow\ni2\tHeat\n")
    trained.offer(file)
    found = {r.item: r for r in trained.recommend(["i1", "n2"], 3)}
    assert found.keys() == {"n1", "n2", "i2"} and found["n2"].title == "A film of tomorrow"
    # An item with the title of a cold one has its score, whatever the adapters have learned meanwhile.
    assert {r.item: r.score for r in trained.recommend(["i1", "i2"], 3)}["n1"] == pytest.approx(cold, abs=1e-4)
    with pytest.raises(ConfigError, match="k is 4, and must be from 1 to the 3 items"):
        trained.recommend(["i1"], 4)
    assert main(["recommend", f"--run={folder}", "--history=i1", f"--items={file}", "--k=2"]) == 0
    assert "[item " in capsys.readouterr().out


def test_a_catalogue_that_cannot_be_scored_ends_in_one_sentence(keys, tmp_path, tiny):
    file = tmp_path / "new.item"
    linear = load(run("HatLLM", "colder", config_dict={**keys, "head": "linear", "train_steps": 0})["folder"])
    file.write_text("item_id:token\ttitle:token_seq\nn1\tA film of tomorrow\n")
    with pytest.raises(ConfigError, match=r"HatLLM cannot score items that it was not trained on.*--head=title"):
        linear.offer(file)
    for content, problem in (
        ("title:token_seq\titem_id:token\n", "the first must be item_id:token"),
        ("item_id:token\ttitle:token_seq\n", "holds no items"),
        ("item_id:token\ttitle:token_seq\nn1\tA\nn1\tB\n", "the item n1 twice"),
        ("item_id:token\ttitle:token_seq\nn1\t\n", "1 of 1 items have no title"),
    ):
        file.write_text(content)
        with pytest.raises(DataError, match=problem):
            linear.offer(file)
    with pytest.raises(DataError, match="does not exist"):
        linear.offer(tmp_path / "none.item")


def test_more_title_layers_than_there_are_end_in_one_sentence(keys):
    with pytest.raises(ConfigError, match=r"title_layers is 99, and random-tiny has \d layers"):
        run("HatLLM", "colder", config_dict={**keys, "title_layers": 99})
