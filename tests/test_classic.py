"""Models without an LLM: they rank what the formulas say, and all-position training teaches what one row an item teaches."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recbole.model.sequential_recommender.sasrec import SASRec
from torch.nn import functional as F

from recbole_hatllm import load, registry, run, unseen_users
from recbole_hatllm.config import Config
from recbole_hatllm.data.rows import Rows
from recbole_hatllm.model.sequential import draw_negatives
from recbole_hatllm.positions import taught_places
from tests.conftest import random_sequences, write_dataset

POSITIONAL = ["SASRecFast", "SASRecBCE", "DROS"]
COUNTED = ["MarkovChain", "TitleTFIDF", "TitleMarkov"]
CLASSIC = [*POSITIONAL, *COUNTED, "MF"]

pytestmark = pytest.mark.versions


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """60 users who come one after the other, so that the last ones are in the test windows only."""
    root = tmp_path_factory.mktemp("classic")
    file = write_dataset(root, "own", random_sequences(60, 25, longest=30, seed=3)) / "own.inter"
    header, *lines = file.read_text().splitlines()
    shifted = [header]
    for user, item, time in (line.split("\t") for line in lines):
        shifted.append(f"{user}\t{item}\t{int(time) + 600 * int(user[1:])}")
    file.write_text("\n".join(shifted) + "\n")
    return root


def build(name, data, **keys):
    """A model, and its training and test loader."""
    config = Config(name, "own", config_dict={"data_path": str(data), "show_progress": False, **keys})
    torch.manual_seed(0)
    train, _, test = registry.data_loaders(config, registry.create_dataset(config))
    return registry.model_class(name)(config, train.dataset), train, test


# --- Rows that teach several items


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=90), st.integers(1, 12), st.integers(1, 12))
def test_covering_rows_teach_every_item_once(users, longest, stride):
    stride = min(stride, longest)
    rows = Rows(np.array(users), longest)
    ends, taught = rows.covering(rows.leave_one_out()[0], stride)
    found = collections.Counter()
    for end, count in zip(ends.tolist(), taught.tolist()):
        assert count <= rows.length[end]  # there is a history before each item taught
        for place in range(end - count + 1, end + 1):
            assert rows.before[place] - (rows.before[end] - rows.length[end]) >= min(
                longest - stride + 1, rows.before[place]
            )
            found[place] += 1
    assert found == collections.Counter(rows.leave_one_out()[0].tolist())
    assert (np.diff(rows.order[ends]) > 0).all()


def test_taught_places_by_hand():
    taught, following = taught_places(
        torch.tensor([[3, 4, 5, 0], [7, 0, 0, 0]]), torch.tensor([3, 1]), torch.tensor([6, 8]), torch.tensor([2, 1])
    )
    assert taught.tolist() == [[False, True, True, False], [True, False, False, False]]
    assert following[taught].tolist() == [5, 6, 8]


@pytest.mark.parametrize("protocol", ["leave_one_out", "windows"])
@pytest.mark.parametrize("stride", [None, 1, 4])
def test_an_epoch_teaches_each_training_interaction_once(data, protocol, stride):
    model, train, _ = build("SASRecFast", data, protocol=protocol, stride=stride, train_batch_size=7)
    taught = collections.Counter()
    for batch in train.batches(epoch=0):
        place, following = taught_places(
            batch["item_id_list"], batch["item_length"], batch["item_id"], batch["target_length"]
        )
        assert model.targets_in(batch) == place.sum()
        for row, column in place.nonzero().tolist():
            taught[batch["user_id"][row].item(), following[row, column].item()] += 1
    seen, first = train.dataset.seen, set()
    expected = collections.Counter()
    for user, item in zip(seen["user_id"].tolist(), seen["item_id"].tolist()):
        if user in first:
            expected[user, item] += 1
        first.add(user)
    assert taught == expected
    assert sorted(train.dataset.taught_items().tolist()) == sorted(item for (_, item) in expected.elements())


@pytest.mark.parametrize("name", POSITIONAL)
def test_a_state_is_what_the_row_that_ends_there_gives(name, data):
    """In value and in gradient: all places of a row at once, or one row a place."""
    dropout = ("hidden_dropout_prob", "attn_dropout_prob") if name == "SASRecFast" else ("dropout_prob",)
    model, train, _ = build(name, data, targets="all", **dict.fromkeys(dropout, 0.0))
    model = model.double()
    rows = train.dataset.inter_feat[:6]
    items, length = rows["item_id_list"], rows["item_length"]
    taught, following = taught_places(items, length, rows["item_id"], rows["target_length"])

    def gradients(states):
        model.zero_grad()
        F.cross_entropy(model.scores(states)[:, 1:], following[taught] - 1).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    together = model.states(items)[taught]
    alone = []
    for row, place in taught.nonzero().tolist():
        prefix = torch.zeros_like(items[row : row + 1])
        prefix[0, : place + 1] = items[row, : place + 1]
        alone.append(model.states(prefix)[0, place])
    alone = torch.stack(alone)
    assert (together - alone).abs().max() < 1e-12
    for a, b in zip(gradients(together), gradients(alone)):
        assert (a - b).abs().max() < 1e-10


def test_fast_sasrec_is_recboles_sasrec(data):
    """Same weights, same scores; with one target a row, the same loss too."""
    keys = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}
    fast, train, test = build("SASRecFast", data, **keys, targets="last")
    theirs, _, _ = build("SASRec", data, **keys)
    assert type(theirs) is SASRec
    theirs.load_state_dict(fast.state_dict())
    batch = train.dataset.inter_feat[:32]
    assert torch.allclose(fast.calculate_loss(batch), theirs.calculate_loss(batch), atol=1e-6)
    rows = test.dataset.inter_feat[:]
    ours = fast.full_sort_predict(rows)
    assert torch.allclose(ours[:, 1:], theirs.full_sort_predict(rows)[:, 1:], atol=1e-6)
    assert (ours[:, 0] == -torch.inf).all()


# --- Single models


def test_negatives_are_uniform_over_what_the_row_does_not_hold():
    torch.manual_seed(0)
    known = torch.tensor([[1, 2, 0], [5, 5, 4]]).repeat_interleave(4000, 0)
    drawn = draw_negatives(known, 6)
    for half, allowed in ((drawn[:4000], [3, 4, 5]), (drawn[4000:], [1, 2, 3])):
        counts = torch.bincount(half, minlength=6)
        assert counts[allowed].sum() == 4000
        assert all(abs(counts[item].item() / 4000 - 1 / 3) < 0.04 for item in allowed)


def test_dros_without_its_term_is_sasrec_bce(data):
    dros, train, _ = build("DROS", data, dro_weight=0.0, dropout_prob=0.0)
    plain, _, _ = build("SASRecBCE", data, dropout_prob=0.0)
    plain.load_state_dict({k: v for k, v in dros.state_dict().items() if k != "nominal"})
    batch = train.dataset.inter_feat[:20]
    losses = []
    for model in (dros, plain):
        torch.manual_seed(1)
        losses.append(model.calculate_loss(batch))
    assert torch.allclose(*losses, atol=1e-6)


@pytest.mark.parametrize("targets", ["last", "all"])
def test_dros_weights_count_training_targets_only(data, targets):
    model, train, _ = build("DROS", data, protocol="windows", targets=targets)
    counts = torch.ones(model.n_items - 1, dtype=torch.float64)
    for batch in train.batches(epoch=0):
        if targets == "last":
            items = batch["item_id"]
        else:
            place, following = taught_places(
                batch["item_id_list"], batch["item_length"], batch["item_id"], batch["target_length"]
            )
            items = following[place]
        for item in items.tolist():
            counts[item - 1] += 1
    assert torch.allclose(model.nominal.double(), (counts / counts.sum()) ** 0.05, atol=1e-6)


@pytest.mark.parametrize("base_loss", ["bce", "bpr", "mse"])
def test_dros_ranks_by_the_score_itself(data, base_loss):
    model, train, test = build("DROS", data, base_loss=base_loss)
    model.calculate_loss(train.dataset.inter_feat[:9]).backward()
    model.eval()
    rows = test.dataset.inter_feat[:5]
    last = model.states(rows["item_id_list"])[torch.arange(5), rows["item_length"] - 1]
    assert torch.allclose(model.full_sort_predict(rows)[:, 1:], model.output(last)[:, 1:], atol=1e-6)


@pytest.mark.parametrize("keys", [{}, {"history_decay": 0.8, "gaps": 2, "smoothing": 0.0, "popularity_weight": 0.0}])
def test_the_chain_is_counted_right(data, keys):
    model, _, test = build("MarkovChain", data, **keys)
    model.warm_start(None)
    config, n = model, model.n_items - 1
    sequences = collections.defaultdict(list)
    for user, item in zip(model.seen["user_id"].tolist(), model.seen["item_id"].tolist()):
        sequences[user].append(item)
    counts = np.zeros((n + 1, n + 1))
    for sequence in sequences.values():
        for index, item in enumerate(sequence):
            for gap in range(1, config.gaps + 1):
                if index + gap < len(sequence):
                    counts[item, sequence[index + gap]] += config.gap_decay ** (gap - 1)
    chain = counts[1:, 1:] + config.smoothing
    chain = np.divide(
        chain, chain.sum(1, keepdims=True), out=np.zeros_like(chain), where=chain.sum(1, keepdims=True) > 0
    )
    if config.smoothing:
        assert np.allclose(chain.sum(1), 1)
        assert np.allclose((model.transitions.toarray()[1:, 1:] + model.evenly[1:, None]).sum(1), 1)
    popularity = np.bincount(model.seen["item_id"].numpy(), minlength=n + 1)[1:]
    popularity = popularity / popularity.sum()
    rows = test.dataset.inter_feat[:]
    scores = model.full_sort_predict(rows)
    for row, (items, length) in enumerate(zip(rows["item_id_list"].tolist(), rows["item_length"].tolist())):
        weights = [config.history_decay ** (length - 1 - place) for place in range(length)]
        mixed = sum(w * chain[item - 1] for w, item in zip(weights, items)) / sum(weights)
        expected = (1 - config.popularity_weight) * mixed + config.popularity_weight * popularity
        assert np.allclose(scores[row, 1:].numpy(), expected, atol=1e-6)
    assert (scores[:, 0] == -torch.inf).all()


def test_mf_learns_pairs(data):
    model, train, _ = build("MF", data, embedding_size=16)
    batch = next(iter(train.batches(epoch=0)))
    assert set(batch["label"].tolist()) == {0.0, 1.0}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        loss = model.calculate_loss(batch)
        loss.backward()
        optimizer.step()
    assert loss < 0.3
    scores = model.full_sort_predict(batch)
    assert torch.allclose(scores.gather(1, batch["item_id"][:, None])[:, 0], model.predict(batch), atol=1e-5)
    assert (scores[:, 0] == -torch.inf).all()


# --- Users that training never saw


@pytest.mark.parametrize("name", ["MF", "BPR", "NeuMF", "FPMC"])
def test_unseen_users_get_the_mean_vector(name, data):
    model, train, _ = build(name, data, protocol="windows")
    part = train.dataset
    seen = part.seen["user_id"].unique()
    unseen = [user for user in range(1, part.user_num) if user not in seen.tolist()]
    assert unseen, "the windows protocol leaves users out"
    tables = unseen_users.user_tables(model, part.user_num)
    before = [table.weight.clone() for table in tables]
    assert tables
    unseen_users.fill(model, part)
    for table, was in zip(tables, before):
        assert torch.equal(table.weight[seen], was[seen])
        assert torch.allclose(table.weight[unseen], was[seen].mean(0).expand(len(unseen), -1), atol=1e-6)


def test_a_run_says_how_many_rows_are_of_unseen_users(data, tmp_path):
    keys = {
        "data_path": str(data),
        "runs_dir": str(tmp_path),
        "protocol": "windows",
        "epochs": 1,
        "show_progress": False,
    }
    result = run("MF", "own", config_dict=keys)
    _, train, test = build("MF", data, protocol="windows")
    seen = set(train.dataset.seen["user_id"].tolist())
    expected = sum(user not in seen for user in test.dataset.inter_feat["user_id"].tolist())
    assert result["unseen_users"] == {"rows": expected, "mean_vector": True}
    table = load(result["folder"]).model.user_embedding.weight
    trained = torch.tensor(sorted(seen))
    unseen = [user for user in range(1, len(table)) if user not in seen]
    assert torch.allclose(table[unseen], table[trained].mean(0).expand(len(unseen), -1), atol=1e-6)
    assert run("SASRecFast", "own", config_dict=keys)["unseen_users"] == {"rows": expected, "mean_vector": False}


# --- The sample of evaluation rows


def test_the_sample_is_the_same_for_every_model_and_seed(data):
    parts = [build(name, data, eval_sample=10, seed=seed)[2].dataset.inter_feat
             for name, seed in (("SASRec", 1), ("BPR", 2), ("SASRecFast", 3))]  # fmt: skip
    for part in parts:
        assert len(part) == 10 and part["user_id"].tolist() == parts[0]["user_id"].tolist()
    whole = build("SASRec", data)[2].dataset.inter_feat
    assert len(whole) == 60 and set(parts[0]["user_id"].tolist()) < set(whole["user_id"].tolist())
    assert len(build("SASRec", data, eval_sample=1000)[2].dataset) == 60


# --- Whole runs


@pytest.mark.parametrize("name", CLASSIC)
def test_a_run_repeats_loads_and_ranks_the_same(name, data, tmp_path):
    keys = {"data_path": str(data), "runs_dir": str(tmp_path), "show_progress": False}
    keys |= {} if name in COUNTED else {"epochs": 2}
    first, second = (run(name, "own", config_dict=keys) for _ in range(2))
    assert first["test"] == second["test"] and first["valid"]
    trained = load(first["folder"])
    assert trained.result["rows"]["test"] == 60
    config = trained.config
    test = registry.data_loaders(config, registry.create_dataset(config))[2]
    with torch.no_grad():
        scores = trained.model.full_sort_predict(test.dataset.inter_feat[:])
    ranks = np.load(f"{first['folder']}/ranks.npz")["rank"]
    target = test.dataset.inter_feat["item_id"]
    own = scores.gather(1, target[:, None])
    earlier = torch.arange(scores.shape[1]) < target[:, None]
    assert ((scores > own) | ((scores == own) & earlier)).sum(1).add(1).tolist() == ranks.tolist()
