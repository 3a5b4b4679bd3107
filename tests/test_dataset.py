"""Rows, order and items are right for every model, against oracles that share no code with the package."""

from __future__ import annotations

import collections
import itertools
import random
import re

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recbole.data.dataset import SequentialDataset
from recbole.utils import get_trainer, init_seed

from recbole_hatllm import registry
from recbole_hatllm.config import Config
from recbole_hatllm.data.dataset import HatDataset
from recbole_hatllm.data.rows import Rows
from recbole_hatllm.errors import DataError

pytestmark = pytest.mark.versions

HEADER = "user_id:token\titem_id:token\ttimestamp:float"


def write(root, rows, name="data", header=HEADER):
    """An `.inter` file of (user, item, time) rows, in the order given."""
    (root / name).mkdir(parents=True, exist_ok=True)
    lines = [header, *("\t".join(map(str, row)) for row in rows)]
    (root / name / f"{name}.inter").write_text("\n".join(lines) + "\n", encoding="utf-8")


def random_rows(users=40, items=30, seed=0, longest=25):
    """Shuffled rows with many equal times, repeated items, and users of 1 to `longest` interactions."""
    draw = random.Random(seed)
    rows = [
        (f"u{u}", f"i{draw.randrange(items)}", 1_500_000_000 + draw.randrange(20))
        for u in range(users)
        for _ in range(draw.randint(1, longest))
    ]
    draw.shuffle(rows)
    return rows


def build(root, model="SASRec", name="data", **keys):
    """(dataset, training, validation, test loader)."""
    config = Config(model, name, config_dict={"data_path": str(root), "show_progress": False, **keys})
    dataset = registry.create_dataset(config)
    return dataset, *registry.data_loaders(config, dataset)


def rows_of(loader):
    """(user, history, target) of a sequential part, as the files name them."""
    dataset, feat = loader.dataset, loader.dataset.inter_feat
    items, users = dataset.item_tokens, dataset.field2id_token["user_id"]
    return [
        (users[user], [items[i] for i in history[:length]], items[target])
        for user, history, length, target in zip(
            feat["user_id"].tolist(),
            feat["item_id_list"].tolist(),
            feat["item_length"].tolist(),
            feat["item_id"].tolist(),
        )
    ]


def pairs_of(loader):
    """(user, item) of a part of a general model."""
    dataset, feat = loader.dataset, loader.dataset.inter_feat
    users, items = dataset.field2id_token["user_id"], dataset.field2id_token["item_id"]
    return list(zip(users[feat["user_id"].numpy()], items[feat["item_id"].numpy()]))


def sequences_of(rows):
    """Oracle: user -> [(time, line, item)], oldest first, ties by line."""
    sequences = collections.defaultdict(list)
    for line, (user, item, time) in enumerate(rows):
        sequences[user].append((time, line, item))
    return {user: sorted(events) for user, events in sequences.items()}


def oracle(rows, protocol, longest):
    """Oracle: three lists of (user, history events, target event)."""
    parts, windows = ([], [], []), []
    for user, events in sequences_of(rows).items():
        cut = [(user, events[max(0, end - longest) : end], events[end]) for end in range(1, len(events))]
        if protocol == "leave_one_out":
            held = min(2, len(cut) - 1) if cut else 0
            parts[0].extend(cut[: len(cut) - held])
            if held == 2:
                parts[1].append(cut[-2])
            if held:
                parts[2].append(cut[-1])
        elif len(events) <= longest + 1:
            windows.extend(cut[-1:])
        else:
            windows.extend(row for row in cut if len(row[1]) == longest)
    if protocol == "leave_one_out":
        return parts
    windows.sort(key=lambda row: row[2][:2])
    first, second = int(0.8 * len(windows)), int(0.9 * len(windows))
    return windows[:first], windows[first:second], windows[second:]


def named(part):
    return [(user, [item for *_, item in history], item) for user, history, (*_, item) in part]


PROTOCOLS = pytest.mark.parametrize("protocol", ["leave_one_out", "windows"])


@PROTOCOLS
@pytest.mark.parametrize("longest", [1, 5, 10, 50])
def test_rows_are_the_oracles(protocol, longest, tmp_path):
    rows = random_rows(seed=longest)
    write(tmp_path, rows)
    _, *loaders = build(tmp_path, protocol=protocol, MAX_ITEM_LIST_LENGTH=longest)
    for loader, part in zip(loaders, oracle(rows, protocol, longest)):
        assert sorted(rows_of(loader)) == sorted(named(part))
        assert len(loader.dataset) == len(part)


@PROTOCOLS
def test_general_models_see_the_same_and_rank_for_the_same_rows(protocol, tmp_path):
    rows = random_rows()
    write(tmp_path, rows)
    dataset, train, valid, test = build(tmp_path, "BPR", protocol=protocol)
    _, *sequential = build(tmp_path, "SASRec", protocol=protocol)
    parts = oracle(rows, protocol, 10)
    events = {(user, event) for user, history, target in parts[0] for event in [*history, target]}
    assert sorted(pairs_of(train)) == sorted((user, item) for user, (*_, item) in events)
    for ours, theirs in zip((valid, test), sequential[1:]):
        assert pairs_of(ours) == [(user, target) for user, _, target in rows_of(theirs)]
        assert set(ours.dataset.inter_feat.columns) == {"user_id", "item_id"}
    # A model that asks for the matrix gets the training interactions, whatever its family.
    counts = collections.Counter(pairs_of(train))
    users, items = dataset.field2id_token["user_id"], dataset.item_tokens
    for loader in (train, sequential[0]):
        matrix = loader.dataset.inter_matrix(form="coo").tocsr().tocoo()
        assert {(users[u], items[i]): n for u, i, n in zip(matrix.row, matrix.col, matrix.data)} == counts


@PROTOCOLS
def test_rows_of_one_batch_of_evaluation(protocol, tmp_path):
    write(tmp_path, random_rows())
    for model in ("SASRec", "BPR"):
        _, _, _, test = build(tmp_path, model, protocol=protocol, eval_batch_size=7)
        seen = []
        for interaction, history, positive_u, positive_i in test:
            assert history is None and positive_u.tolist() == list(range(len(interaction))) and len(interaction) <= 7
            assert positive_i.tolist() == interaction["item_id"].tolist()
            seen += positive_i.tolist()
        assert seen == test.dataset.inter_feat["item_id"].tolist()


@given(st.lists(st.integers(0, 6), min_size=1, max_size=80), st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_parts_of_any_table(users, longest):
    rows = Rows(np.array(users), longest)
    counts = collections.Counter(users)
    train, valid, test = rows.leave_one_out()
    assert sorted(itertools.chain(train, valid, test)) == np.flatnonzero(rows.before > 0).tolist()
    assert len(test) == sum(n >= 3 for n in counts.values()) and len(valid) == sum(n >= 4 for n in counts.values())
    parts = rows.windows()
    windows = np.concatenate(parts)
    assert len(windows) == sum((n > 1) if n <= longest + 1 else n - longest for n in counts.values())
    assert [len(part) for part in parts[:2]] == [
        int(0.8 * len(windows)),
        int(0.9 * len(windows)) - int(0.8 * len(windows)),
    ]
    assert (np.diff(rows.order[windows]) > 0).all()  # no target of training is later than any of the test
    expected = {line for end in parts[0] for line in rows.order[end - rows.length[end] : end + 1]}
    assert rows.interactions(parts[0]).tolist() == sorted(expected)


# --- MovieLens-100K


@pytest.fixture(scope="module")
def movielens():
    """user -> items, oldest first, read by pandas alone."""
    path = Config("BPR", "ml-100k")["data_path"]
    table = pd.read_csv(f"{path}/ml-100k.inter", sep="\t", dtype=str)
    table.columns = [column.split(":")[0] for column in table.columns]
    table["timestamp"] = table["timestamp"].astype("int64")
    return table.sort_values("timestamp", kind="stable").groupby("user_id")["item_id"].agg(list).to_dict()


@pytest.mark.parametrize("model", ["SASRec", "BPR", "HatLLM"])
def test_movielens_has_the_right_last_items(model, movielens):
    dataset, train, valid, test = build("dataset", model, "ml-100k")
    assert dataset.item_num == 1683 and dataset.user_num == 944
    last = pairs_of(test)
    assert len(last) == 943 and dict(last) == {user: items[-1] for user, items in movielens.items()}
    assert dict(pairs_of(valid)) == {user: items[-2] for user, items in movielens.items()}
    if model == "BPR":
        pairs = [(user, item) for user, items in movielens.items() for item in items[:-2]]
        assert sorted(pairs_of(train)) == sorted(pairs)
    else:
        by_user = {user: history for user, history, _ in rows_of(test)}
        assert by_user == {user: items[-11:-1] for user, items in movielens.items()}
        assert len(train.dataset) == 100_000 - 3 * 943


def test_leave_one_out_is_recboles(tmp_path):
    """On a file in time order, where RecBole is right too; users have four interactions or more."""
    rows = sorted(random_rows(), key=lambda row: row[2])
    counts = collections.Counter(user for user, *_ in rows)
    rows = [row for row in rows if counts[row[0]] >= 4]
    write(tmp_path, [(user, item, 60 * line) for line, (user, item, _) in enumerate(rows)])
    _, *ours = build(tmp_path)
    config = Config("SASRec", "data", config_dict={"data_path": str(tmp_path)})
    for part, loader in zip(SequentialDataset(config).build(), ours):
        feat, tokens = part.inter_feat, part.field2id_token
        theirs = [
            (tokens["user_id"][u], [tokens["item_id"][i] for i in history[:length]], tokens["item_id"][target])
            for u, history, length, target in zip(
                feat["user_id"].tolist(),
                feat["item_id_list"].tolist(),
                feat["item_length"].tolist(),
                feat["item_id"].tolist(),
            )
        ]
        assert sorted(theirs) == sorted(rows_of(loader))
    from recbole.data.dataset import Dataset

    _, train, _, _ = build(tmp_path, "BPR")
    feat = (part := Dataset(Config("BPR", "data", config_dict={"data_path": str(tmp_path)})).build()[0]).inter_feat
    tokens = part.field2id_token
    assert sorted(zip(tokens["user_id"][feat["user_id"]], tokens["item_id"][feat["item_id"]])) == sorted(
        pairs_of(train)
    )


# --- Items and columns


def test_candidates_are_the_items_of_the_inter_file(tmp_path):
    write(tmp_path, random_rows())
    used = sorted({item for _, item, _ in random_rows()})
    lines = ["item_id:token\tkind:token", *(f"{item}\tk{item}" for item in [*used[3:], "never", "taken"])]
    (tmp_path / "data" / "data.item").write_text("\n".join(lines) + "\n")
    load = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "kind"]}
    for model, keys in (("SASRec", {}), ("BPR", {}), ("SASRec", {"load_col": load})):
        dataset, *_ = build(tmp_path, model, **keys)
        assert sorted(dataset.item_tokens[1:]) == used and dataset.item_num == len(used) + 1
        assert dataset.item_tokens[0] == "[PAD]" and all(type(token) is str for token in dataset.item_tokens)
    assert dataset.item_feat["kind"].shape == (len(used) + 1,) and len(dataset.inter_feat) == len(random_rows())


def test_no_list_that_nobody_reads(tmp_path):
    write(tmp_path, random_rows())
    _, train, _, test = build(tmp_path)
    expected = ["user_id", "item_id", "timestamp", "item_length", "item_id_list"]
    assert train.dataset.inter_feat.columns == test.dataset.inter_feat.columns == expected
    assert (
        train.dataset.inter_feat["item_id_list"].shape[1] == 10 and train.dataset.item_id_list_field == "item_id_list"
    )


def test_building_twice_gives_the_same(tmp_path):
    write(tmp_path, random_rows())
    dataset, train, _, test = build(tmp_path)
    again = dataset.build()
    for first, second in ((train.dataset, again[0]), (test.dataset, again[2])):
        assert all(torch.equal(first.inter_feat[name], second.inter_feat[name]) for name in first.inter_feat)
    assert len(dataset.inter_feat) == len(random_rows())  # the interactions themselves stay at hand


def test_duplicates_are_dropped_by_time_and_line(tmp_path):
    write(tmp_path, rows := random_rows(longest=40))
    for keep in ("first", "last"):
        dataset, *_ = build(tmp_path, "BPR", rm_dup_inter=keep)
        expected = {}
        for user, events in sequences_of(rows).items():
            for *_, item in events if keep == "last" else events[::-1]:
                expected.pop((user, item), None)
                expected[user, item] = None
        sequence = collections.defaultdict(list)
        for user, item in expected:
            sequence[user].append(item)
        if keep == "first":
            sequence = {user: items[::-1] for user, items in sequence.items()}
        found = collections.defaultdict(list)
        users, items = dataset.field2id_token["user_id"], dataset.item_tokens
        for u, i in zip(dataset.inter_feat["user_id"].tolist(), dataset.inter_feat["item_id"].tolist()):
            found[users[u]].append(items[i])
        assert found == dict(sequence)


# --- Loaders


def epoch(loader, number, start=0):
    return [{name: batch[name] for name in batch} for batch in loader.batches(number, start)]


def same(first, second):
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(first, second)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("loaders")
    write(root, random_rows())
    return root


MODELS = {
    "HatLLM": {},
    "BPR": {"train_neg_sample_args": {"distribution": "popularity", "sample_num": 2}},
    "MultiVAE": {},
    "SASRec": {"loss_type": "BPR"},
    "BERT4Rec": {},
}


@pytest.mark.parametrize("model", MODELS)
def test_a_batch_depends_on_seed_epoch_and_place_alone(model, folder):
    keys = {"train_batch_size": 16, **MODELS[model]}
    train = build(folder, model, **keys)[1]
    first = epoch(train, 0)
    assert len(first) == len(train) > 2
    np.random.rand(100), random.random(), torch.rand(5)
    assert same(first, epoch(train, 0)) and same(first[2:], epoch(train, 0, start=2))
    assert not same(first, epoch(train, 1))
    assert not same(first, epoch(build(folder, model, seed=1, **keys)[1], 0))
    assert same(first, epoch(build(folder, model, **keys)[1], 0))
    states = np.random.get_state()[1].tolist(), random.getstate(), torch.get_rng_state().tolist()
    epoch(train, 5)
    assert states == (np.random.get_state()[1].tolist(), random.getstate(), torch.get_rng_state().tolist())


def test_workers_change_nothing(folder):
    keys = {"train_batch_size": 64, "loss_type": "BPR"}
    alone, shared = (build(folder, "SASRec", worker=workers, **keys)[1] for workers in (0, 2))
    assert same(epoch(alone, 3, 1), epoch(shared, 3, 1))


def test_iterating_goes_from_epoch_to_epoch(folder):
    train = build(folder, train_batch_size=16)[1]
    batches = [[{name: batch[name] for name in batch} for batch in train] for _ in range(2)]
    assert same(batches[0], epoch(train, 0)) and same(batches[1], epoch(train, 1))
    train.set_epoch(1)
    assert same([{name: batch[name] for name in batch} for batch in train], batches[1])


@pytest.mark.parametrize("model", ["SASRec", "BPR"])
def test_an_epoch_holds_every_row_once(model, folder):
    train = build(folder, model, train_batch_size=16)[1]
    for number in (0, 1):
        seen = torch.cat([torch.stack([batch["user_id"], batch["item_id"]], 1) for batch in train.batches(number)])
        rows = torch.stack([train.dataset.inter_feat["user_id"], train.dataset.inter_feat["item_id"]], 1)
        assert sorted(seen.tolist()) == sorted(rows.tolist()) and seen.tolist() != rows.tolist()
    plain = build(folder, model, train_batch_size=16, shuffle=False)[1]
    assert torch.cat([batch["item_id"] for batch in plain.batches(0)]).equal(plain.dataset.inter_feat["item_id"])


def test_negatives_are_items_that_were_not_taken(folder):
    dataset, train, _, _ = build(folder, "BPR", train_batch_size=64)
    taken = set(zip(train.dataset.inter_feat["user_id"].tolist(), train.dataset.inter_feat["item_id"].tolist()))
    for batch in train.batches(0):
        drawn = set(zip(batch["user_id"].tolist(), batch["neg_item_id"].tolist()))
        assert not drawn & taken and batch["neg_item_id"].min() >= 1 and batch["neg_item_id"].max() < dataset.item_num


# --- Training and evaluating RecBole's models on it


def trained(model, dataset, root, **keys):
    """Test metrics by RecBole's own trainer, its checkpoint written and read back."""
    config = Config(
        model, dataset, config_dict={"epochs": 1, "show_progress": False, "checkpoint_dir": str(root / "saved"), **keys}
    )
    init_seed(config["seed"], config["reproducibility"])
    train, valid, test = registry.data_loaders(config, registry.create_dataset(config))
    net = registry.model_class(model)(config, train.dataset).to(config["device"])
    trainer = get_trainer(config["MODEL_TYPE"], model)(config, net)
    trainer.fit(train, valid, verbose=False)
    return trainer.evaluate(test)


@pytest.mark.parametrize(
    "model", ["Pop", "BPR", "NeuMF", "LightGCN", "ItemKNN", "EASE", "MultiVAE", "SASRec", "GRU4Rec", "BERT4Rec"]
)
@PROTOCOLS
def test_models_of_recbole_train_and_evaluate(model, protocol, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # RecBole's trainer writes TensorBoard files into the working directory
    result = trained(model, "data", tmp_path, data_path=str(folder), protocol=protocol)
    assert set(result) == {"hit@5", "hit@10", "ndcg@5", "ndcg@10"} and 0 <= result["ndcg@10"] <= result["hit@10"] <= 1


def test_pop_on_movielens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert trained("Pop", "ml-100k", tmp_path)["ndcg@10"] == pytest.approx(0.023, abs=0.002)


# --- Broken files

GOOD = [("u", "a", 1), ("u", "b", 2), ("u", "c", 3), ("u", "d", 4)]


def refused(root, **keys):
    with pytest.raises(DataError) as error:
        build(root, **keys)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "rows, header, match",
    [
        (
            GOOD,
            "user_id:token\titem_id:token\twhen:float",
            r"data\.inter, line 1, needs a column timestamp:float.*when:float",
        ),
        (
            GOOD,
            "user_id:token\titem_id\ttimestamp:float",
            r"data\.inter, line 1: the column 'item_id' must be.*item_id:token",
        ),
        (GOOD, "user_id:token\titem_id:word\ttimestamp:float", r"data\.inter, line 1: the column 'item_id:word'"),
        (GOOD, "user_id:token\titem_id:token\ttimestamp:token", r"data\.inter, line 1, needs a column timestamp:float"),
        ([], HEADER, r"data\.inter is empty"),
        ([], "", r"data\.inter is empty"),
        ([*GOOD, ("u", "e", "yesterday")], HEADER, r"data\.inter, line 6: the timestamp 'yesterday' is no number"),
        ([("u", "e", ""), *GOOD], HEADER, r"data\.inter, line 2, has no timestamp"),
        ([*GOOD, ("u", "e", "nan")], HEADER, r"data\.inter, line 6, has no timestamp"),
        ([*GOOD, ("u", "", 5)], HEADER, r"data\.inter, line 6, has no item_id"),
        ([*GOOD, ("NA", "e", 5)], HEADER, r"data\.inter, line 6, has no user_id.*NA"),
        ([*GOOD, ("u", "e", 5, 6)], HEADER, r"data\.inter, line 6, has 4 columns and the header 3"),
        ([*GOOD, ("u", "e")], HEADER, r"data\.inter, line 6, has 2 columns and the header 3"),
        ([('"u', "e", 5), *GOOD], HEADER, r"data\.inter cannot be read.*quote"),
        ([('"u', "e", 5), *GOOD[:3], ("u", 'd"', 4)], HEADER, r"data\.inter .*quote"),
    ],
)
def test_broken_lines_are_named(rows, header, match, tmp_path):
    write(tmp_path, rows, header=header)
    assert re.search(match, refused(tmp_path))


def test_missing_folder_file_and_rows(tmp_path):
    write(tmp_path, GOOD[:2])
    assert re.search("no validation rows|no test rows", refused(tmp_path))
    (tmp_path / "data" / "data.inter").unlink()
    assert "data.inter does not exist" in refused(tmp_path)
    with pytest.raises(DataError, match=r"ml-100k\.inter does not exist"):
        HatDataset({**Config("BPR", "ml-100k").final_config_dict, "data_path": str(tmp_path / "ml-100k")})


def test_bytes_that_are_no_text(tmp_path):
    write(tmp_path, GOOD)
    with (tmp_path / "data" / "data.inter").open("ab") as file:
        file.write(b"u\t\xff\xfe\t5\n")
    assert "data.inter cannot be read" in refused(tmp_path)


def test_other_names_and_windows_line_ends(tmp_path):
    write(tmp_path, GOOD, header="who:token\twhat:token\twhen:float")
    file = tmp_path / "data" / "data.inter"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    dataset, *_ = build(tmp_path, USER_ID_FIELD="who", ITEM_ID_FIELD="what", TIME_FIELD="when")
    assert sorted(dataset.item_tokens[1:]) == ["a", "b", "c", "d"]
