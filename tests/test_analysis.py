"""`analyze`: weights against stock models, shares against loops, groups of rows against pandas; what is left can be read."""

from __future__ import annotations

import csv
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_hatllm import run
from recbole_hatllm.analysis import attention, errors, groups, heatmap, prompt, subject, tokens
from recbole_hatllm.analysis.command import analyze
from recbole_hatllm.analysis.pairs import PARTS, CoOccurrence, Distances, parts
from recbole_hatllm.analysis.shares import Shares
from recbole_hatllm.data.prompt import Prompt
from recbole_hatllm.data.titles import TitleTokens
from recbole_hatllm.errors import HatError
from recbole_hatllm.masks import KINDS, attention_mask
from recbole_hatllm.run_folder import read_items, read_ranks, read_result
from tests.conftest import random_sequences, write_dataset
from tests.test_families import FAMILIES, backbone_of, stock

RANDOM = {"backbone": "random-tiny", "dtype": "float64", "train_steps": 2, "eval_step": 2, "train_batch_size": 8,
          "warmup_steps": 1, "show_progress": False}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, str]:
    """Folders of short runs on one small dataset."""
    root = tmp_path_factory.mktemp("analysis")
    write_dataset(root / "data", "own", random_sequences(24, 20))
    keys = {"data_path": str(root / "data")}
    folders = {}
    for name, model, own in (
        ("HatLLM", "HatLLM", {**RANDOM, "n_in": 1, "n_cr": 1}),
        ("BIGRec", "BIGRec", {**RANDOM, "token_pool": False}),
        ("Pop", "Pop", {"show_progress": False}),
        ("fewer", "Pop", {"show_progress": False, "eval_sample": 9}),
    ):
        folders[name] = run(model, "own", config_dict={**keys, **own, "run_dir": str(root / name)})["folder"]
    return {**folders, "root": str(root)}


@pytest.fixture(scope="module")
def hat(runs) -> subject.Subject:
    return subject.open_run(runs["HatLLM"])


def numbers(folder, name):
    """The JSON and the CSV that stand beside a figure, which can be opened."""
    assert matplotlib.image.imread(folder / f"{name}.png").shape[2] in (3, 4)
    assert ElementTree.parse(folder / f"{name}.svg").getroot().tag.endswith("svg")
    return tables(folder, name)


def tables(folder, name):
    content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return content, list(csv.DictReader(file))


# --- Weights


@pytest.mark.versions
@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_are_those_of_the_stock_model(family):
    """Score caps, sliding windows and grouped queries included; and being watched changes no state by a bit."""
    model = stock(family)
    backbone = backbone_of(model)
    ids = torch.arange(1, 15)[None]
    places = torch.arange(14)[None]
    masks = {"or": torch.ones(1, 1, 14, 14, dtype=torch.bool).tril()}
    found = {}
    with torch.no_grad():
        watched = backbone(places, masks, input_ids=ids, watch=found.__setitem__)
        plain = backbone(places, masks, input_ids=ids)
        expected = model(input_ids=ids, position_ids=places, output_attentions=True, use_cache=False).attentions
    assert torch.equal(watched, plain)
    assert sorted(found) == list(range(6)) and len(expected) == 6
    for layer, theirs in enumerate(expected):
        assert (found[layer] - theirs).abs().max() < 1e-5, layer  # eager attention rounds through float32
        assert theirs.std() > 1e-3


def test_rows_sum_to_1_over_what_is_allowed_and_are_0_elsewhere(hat):
    model, kinds = hat.model, hat.model.backbone.kinds
    assert set(kinds) == {"in", "or", "cr"}
    for row in (0, 5, 11):
        read = hat.prompt(row)
        found = {}
        subject.attend(model, read, model.embed(read), found.__setitem__)
        for layer, kind in enumerate(kinds):
            mask = attention_mask(kind, read.span, read.is_last, read.valid)[0]
            weights = found[layer][0]
            assert not weights[~mask.expand_as(weights)].any() and (weights.masked_select(mask) > 0).all()
            assert (weights.sum(-1) - 1).abs().max() < 1e-6


def test_a_watched_run_reads_as_a_ranking_does_and_a_bare_one_as_the_pretrained_model(hat):
    model, read = hat.model, hat.prompt(3)
    nobody = lambda layer, weights: None  # noqa: E731
    with torch.no_grad():
        for parameter in model.backbone.trainable().values():  # adapters begin at nothing
            parameter.add_(0.01)
        states = subject.attend(model, read, model.embed(read), nobody)
        assert (states[0, read.readout[0]] - model.read(*hat.history(3))[0]).abs().max() < 1e-10
        found: dict[int, torch.Tensor] = {}
        bare = subject.attend(model, read, model.embed(read), found.__setitem__, bare=True)
        with model.backbone.without_adapters():
            model.backbone.set_schedule(("or",) * 4)
            expected = model.states(read)
            model.backbone.set_schedule(("in", "or", "or", "cr"))
        assert (bare - expected).abs().max() < 1e-10 and (bare - states).abs().max() > 1e-3
        assert (found[0][0, 0].tril() > 0).sum() == read.span.shape[1] * (read.span.shape[1] + 1) // 2
        again = subject.attend(model, read, model.embed(read), nobody)
        for parameter in model.backbone.trainable().values():
            parameter.sub_(0.01)
    assert torch.equal(again, states), "the adapters and the schedule are back"


# --- Shares and pairs


@st.composite
def spans(draw):
    """[T] int: items of 1 to 4 tokens, with text before, between and behind them."""
    span = [-1] * draw(st.integers(0, 3))
    for item in range(draw(st.integers(1, 4))):
        span += [item] * draw(st.integers(1, 4)) + [-1] * draw(st.integers(0, 2))
    return span


def kind_of(span, j, k):
    if span[j] < 0 or k > j:
        return None
    if k == j:
        return "self"
    if span[k] < 0:
        return "template"
    return "intra" if span[j] == span[k] else "cross"


def as_prompt(span, readout=None, slots=None):
    span = torch.tensor([span])
    last = (span >= 0) & (torch.cat([span[:, 1:], torch.full((1, 1), -1)], 1) != span)
    place = torch.arange(span.shape[1])[None]
    behind = torch.tensor([span.shape[1] - 1 if readout is None else readout])
    held = None if slots is None else torch.tensor(slots)
    return Prompt(place, place, torch.ones_like(span, dtype=torch.bool), span, last, behind, 0, slots=held)


@settings(max_examples=100, deadline=None)
@given(spans())
def test_parts_are_what_a_loop_over_pairs_says(span):
    found = parts(torch.tensor(span))
    for j in range(len(span)):
        for k in range(len(span)):
            assert [kind for kind in PARTS if found[kind][j, k]] == [kind for kind in [kind_of(span, j, k)] if kind]


@settings(max_examples=40, deadline=None)
@given(st.lists(spans(), min_size=1, max_size=3), st.integers(0, 99))
def test_shares_are_what_loops_over_tokens_say(histories, seed):
    draw = torch.Generator().manual_seed(seed)
    shares, layers, heads = Shares(2), 2, 3
    mass = {(layer, kind): 0.0 for layer in range(layers) for kind in PARTS}
    pairs, queries, behind = dict.fromkeys(PARTS, 0), 0, 0
    slot_mass, to_items, to_last = ([0.0] * layers for _ in range(3))
    for span in histories:
        count = len(span)
        slots = [j for j in range(count) if span[j] >= 0 and (j + 1 == count or span[j + 1] != span[j])]
        readout = int(torch.randint(count, (), generator=draw))
        shares.begin(as_prompt(span, readout, slots))
        first = next(j for j in range(count) if span[j] >= 0)
        queries += sum(item >= 0 for item in span)
        behind += count - first
        for j in range(count):
            for k in range(j + 1):
                if kind := kind_of(span, j, k):
                    pairs[kind] += 1
        for layer in range(layers):
            weights = torch.rand(1, heads, count, count, generator=draw, dtype=torch.float64).tril()
            weights /= weights.sum(-1, keepdim=True)
            shares(layer, weights)
            for head in range(heads):
                for j in range(count):
                    for k in range(j + 1):
                        weight = float(weights[0, head, j, k]) / heads
                        if kind := kind_of(span, j, k):
                            mass[layer, kind] += weight
                        slot_mass[layer] += weight * (j >= first and k in slots)
                        to_items[layer] += weight * (j == readout and span[k] >= 0)
                        to_last[layer] += weight * (j == readout and k in slots)  # slots end their items
    rows = shares.rows("after", ("in", "cr"), True)
    assert [row["layer"] for row in rows] == ["all", 0, 1] and [row["mask"] for row in rows] == ["", "in", "cr"]
    for row in rows:
        of = range(layers) if row["layer"] == "all" else [row["layer"]]
        mean = lambda sums, of=of: sum(sums[layer] for layer in of) / len(of)  # noqa: E731
        for kind in PARTS:
            total = sum(mass[layer, kind] for layer in of) / len(of)
            assert row[f"{kind}_share"] == pytest.approx(total / queries, abs=1e-12)
            assert row[f"{kind}_mean"] == (pytest.approx(total / pairs[kind], abs=1e-12) if pairs[kind] else None)
        assert sum(row[f"{kind}_share"] for kind in PARTS) == pytest.approx(1)
        assert row["slots"] == pytest.approx(mean(slot_mass) / behind, abs=1e-12)
        assert row["readout_items"] == pytest.approx(mean(to_items) / len(histories), abs=1e-12)
        assert row["readout_last"] == row["readout_slots"] == pytest.approx(mean(to_last) / len(histories), abs=1e-12)


def test_the_distance_within_a_title_is_a_third_of_its_length():
    """(n + 1) / 3 for the pairs of n tokens; across two neighbours of n tokens, n."""
    for size in (2, 5, 16):
        distances = Distances()
        distances.add(as_prompt([-1] * 3 + [0] * size + [1] * size))
        assert distances.means() == {"intra": pytest.approx((size + 1) / 3), "cross": pytest.approx(size)}
        assert distances.count == {"intra": size * (size - 1), "cross": size * size}
    distances = Distances()
    distances.add(as_prompt([-1, 0, -1, -1, 1]))
    assert distances.means() == {"intra": None, "cross": 3}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=2, max_size=6), st.data())
def test_co_occurrence_is_what_a_loop_over_titles_says(titles, data):
    count = len(titles)
    history = data.draw(st.lists(st.integers(1, count), min_size=1, max_size=4))
    offsets = torch.tensor([0, 0, *map(len, titles)]).cumsum(0)
    found = CoOccurrence(TitleTokens(torch.tensor([token for title in titles for token in title]), offsets))
    found.add(torch.tensor(history))
    flat = [(slot, item, token) for slot, item in enumerate(history) for token in titles[item - 1]]
    expected = {"intra": [], "cross": []}
    for j, (slot, item, token) in enumerate(flat):
        for other_slot, other_item, other in flat[:j]:
            others = [titles[i - 1] for i in range(1, count + 1) if i not in (item, other_item)]
            both = sum(token in title and other in title for title in others)
            expected["intra" if slot == other_slot else "cross"].append(both)
    for kind, counts in expected.items():
        means = found.means()[kind]
        assert means["titles"] == (pytest.approx(np.mean(counts)) if counts else None)
        assert means["share"] == (pytest.approx(np.mean([c > 0 for c in counts])) if counts else None)


def test_attention_of_a_run_before_and_after_and_against_another(runs, tmp_path):
    said = attention.run(runs["HatLLM"], runs["BIGRec"], rows=7, folder=str(tmp_path / "out"))
    content, rows = numbers(tmp_path / "out", "attention")
    assert content["test_rows"] == 7 and [row["state"] for row in content["rows"]] == [
        state for state in ("before", "after", "against") for _ in range(5)
    ]
    assert len(rows) == 15 and float(rows[6]["cross_share"]) == content["rows"][6]["cross_share"] == 0, "IN layers"
    assert (
        content["rows"][6]["mask"] == "in" and content["rows"][9]["mask"] == "cr" and content["rows"][1]["mask"] == "or"
    )
    assert content["rows"][9]["intra_share"] == 0 and content["rows"][1]["cross_share"] > 0
    for row in content["rows"]:
        assert sum(row[f"{part}_share"] for part in PARTS) == pytest.approx(1, abs=1e-6)
        assert row["slots"] is None
    pairs, lines = tables(tmp_path / "out", "pairs")
    assert [row["pairs"] for row in lines] == ["intra", "cross"] and pairs["rows"][0]["number"] > 0
    assert all(word in said for word in ("before", "after", "against", "intra", "distance"))


def test_what_llaras_behaviour_tokens_get(runs, tmp_path):
    keys = {
        **RANDOM,
        "dtype": "float32",
        "data_path": f"{runs['root']}/data",
        "sasrec_keys": {"epochs": 1},
        "runs_dir": str(tmp_path),
    }
    folder = run("LLaRA", "own", config_dict={**keys, "run_dir": str(tmp_path / "llara")})["folder"]
    said = attention.run(folder, rows=3, folder=str(tmp_path / "out"))
    rows = tables(tmp_path / "out", "attention")[0]["rows"]
    llara = subject.open_run(folder)
    given = whole = from_readout = 0.0
    for row in attention.sample(24, 3).tolist():
        read = llara.prompt(row)
        span, slots, found = read.span[0].tolist(), set(read.slots.tolist()), {}
        subject.attend(llara.model, read, llara.model.embed(read), found.__setitem__)
        assert len(slots) == len(set(span) - {-1})
        weights = found[2][0].mean(0)
        for j in range(span.index(0), len(span)):
            whole += 1
            given += sum(float(weights[j, k]) for k in slots)
        from_readout += sum(float(weights[len(span) - 1, k]) for k in slots) / 3
    after = next(row for row in rows if row["state"] == "after" and row["layer"] == 2)
    assert after["slots"] == pytest.approx(given / whole, rel=1e-5)
    assert after["readout_slots"] == pytest.approx(from_readout, rel=1e-5)
    before = next(row for row in rows if row["state"] == "before" and row["layer"] == "all")
    assert 0 < before["slots"] < 1 and f"slots, before: {before['slots']:.2%}" in said


def test_all_rows_are_looked_at_where_there_are_fewer():
    assert attention.sample(5, 9).tolist() == [0, 1, 2, 3, 4]
    drawn = attention.sample(1000, 20)
    assert len(set(drawn.tolist())) == 20 and (np.diff(drawn) > 0).all() and (drawn == attention.sample(1000, 20)).all()


# --- Heat maps


def test_the_heatmap_shows_the_masks_and_the_weights(runs, hat, tmp_path):
    heatmap.run(runs["HatLLM"], "u7", folder=str(tmp_path))
    row = subject.row_of(hat.test, "u7")
    read = hat.prompt(row)
    seen = {}
    subject.attend(hat.model, read, hat.model.embed(read), seen.__setitem__)
    assert sorted(file.name for file in tmp_path.glob("*.png")) == ["layer-0.png", "layer-1.png", "layer-3.png"]
    for layer, kind in ((0, "in"), (1, "or"), (3, "cr")):
        content, cells = numbers(tmp_path, f"layer-{layer}")
        assert content["mask"] == kind and content["item"] == read.span[0].tolist()
        mask = attention_mask(kind, read.span, read.is_last, read.valid)[0, 0]
        assert content["allowed"] == mask.int().tolist()
        weights = torch.tensor(content["weights"], dtype=torch.float64)
        assert (weights - seen[layer][0].mean(0)).abs().max() < 1e-6 and not weights[~mask].any()
        assert len(cells) == len(mask) * (len(mask) + 1) // 2
        cell = cells[-3]
        assert float(cell["weight"]) == weights[int(cell["query"]), int(cell["key"])]


def test_one_head_and_chosen_layers(runs, hat, tmp_path):
    heatmap.run(runs["HatLLM"], "u7", layer="2,0", head=1, folder=str(tmp_path))
    read = hat.prompt(subject.row_of(hat.test, "u7"))
    seen = {}
    subject.attend(hat.model, read, hat.model.embed(read), seen.__setitem__)
    assert sorted(file.name for file in tmp_path.glob("*.png")) == ["layer-0.png", "layer-2.png"]
    weights = torch.tensor(tables(tmp_path, "layer-2")[0]["weights"], dtype=torch.float64)
    assert (weights - seen[2][0, 1]).abs().max() < 1e-6
    assert heatmap.wanted_layers("all", ("in", "or")) == [0, 1] and heatmap.wanted_layers(1, ("in", "or")) == [1]


# --- The prompt


class Tokens(HTMLParser):
    """Classes and text of every token of the page."""

    def __init__(self):
        super().__init__()
        self.found: list[list[str]] = []
        self.inside = False

    def handle_starttag(self, tag, attrs):
        if tag == "span":
            self.inside = True
            self.found.append([dict(attrs)["class"], ""])

    def handle_endtag(self, tag):
        self.inside &= tag != "span"

    def handle_data(self, data):
        if self.inside:
            self.found[-1][1] += data


def test_the_prompt_token_by_token(runs, hat, tmp_path):
    keys = {"data_path": f"{runs['root']}/data", "backbone": "random-tiny", "n_in": 1, "n_cr": 1}
    said = prompt.run("own", "u7", keys, folder=str(tmp_path))
    read = hat.prompt(subject.row_of(hat.test, "u7"))
    content, rows = tables(tmp_path, "prompt")
    assert [int(row["id"]) for row in rows] == read.input_ids[0].tolist()
    assert [int(row["item"] or -1) for row in rows] == read.span[0].tolist()
    assert [int(row["last"]) for row in rows] == read.is_last[0].int().tolist()
    assert [int(row["readout"]) for row in rows].index(1) == int(read.readout[0])
    items = hat.history(subject.row_of(hat.test, "u7"))[0][0]
    titles = [hat.items.titles[item] for item in items.tolist() if item]
    assert list(dict.fromkeys(row["title"] for row in rows if row["title"])) == list(dict.fromkeys(titles))
    page = Tokens()
    page.feed((tmp_path / "prompt.html").read_text(encoding="utf-8"))
    assert [text for _, text in page.found] == [row["text"] for row in rows]
    assert [" i " in f" {classes} " for classes, _ in page.found] == [row["item"] != "" for row in rows]
    opened = [part.replace("|", "") for part in re.findall(r"⟨\d+:(.*?)⟩", said.replace("\n", ""))]
    assert opened == [tokens.visible(title) for title in titles] and said.count("◄") == 1
    masks, lines = numbers(tmp_path, "masks")
    expected = {kind: int(attention_mask(kind, read.span, read.is_last, read.valid).sum()) for kind in KINDS}
    assert {line["mask"]: int(line["open"]) for line in lines} == expected and masks["tokens"] == len(rows)
    assert content["schedule"] == "layers 0 IN | 1-2 OR | 3 CR" and "layers 0 IN | 1-2 OR | 3 CR" in said


def test_the_terminals_colours_change_no_text():
    read = as_prompt([-1, 0, 0, -1, 1, -1])
    labels = ["see↵", "a", "·b", ",", "c", "↵"]
    plain, coloured = (prompt.terminal(labels, read, colours) for colours in (False, True))
    assert plain == "see↵\n⟨0:a|·b⟩|,|⟨1:c⟩|↵\n◄"
    bare = re.sub(r"\x1b\[[\d;]*m", "", coloured)
    assert bare.rstrip("\n") == "see↵\na|·b|,|c|↵"
    assert re.search(r"\x1b\[38;2;0;114;178;4m·b", coloured) and re.search(r"\x1b\[2;7m↵", coloured)


def test_slots_are_shown_as_items(runs, tmp_path):
    prompt.run(
        "own",
        "u7",
        {"data_path": f"{runs['root']}/data", "backbone": "random-tiny"},
        model="E4SRec",
        folder=str(tmp_path),
    )
    rows = tables(tmp_path, "prompt")[1]
    assert {row["text"] for row in rows if row["item"]} == {tokens.SLOT}


# --- Where two runs disagree


def test_groups_are_what_pandas_says(runs, hat):
    table = pd.read_csv(f"{runs['root']}/data/own/own.inter", sep="\t").set_axis(["user", "item", "time"], axis=1)
    ranks = read_ranks(runs["HatLLM"])
    training = table.groupby("user").head(-2)
    taken, counts = training["user"].value_counts(), training["item"].value_counts()
    titles = dict(zip(*read_items(runs["HatLLM"])))
    expected = pd.DataFrame({
        "user_history": [taken.get(user, 0) for user in ranks["user"]],
        "target_count": [counts.get(item, 0) for item in ranks["target"]],
        "title_words": [len(titles[item].split()) for item in ranks["target"]],
    })  # fmt: skip
    found = groups.properties(hat.test, hat.items.titles)
    for name in expected:
        assert found[name].tolist() == expected[name].tolist()
    all_counts = np.array([counts.get(item, 0) for item in hat.items.item_tokens[1:]])
    edge = np.sort(all_counts)[::-1][round(0.2 * len(all_counts)) - 1]
    chosen = {key[0]: {} for key in groups.groups(hat.test, hat.items.titles)}
    for (kind, name), rows in groups.groups(hat.test, hat.items.titles).items():
        chosen[kind][name] = rows
    by_target = chosen["target"]
    (head,) = (rows for name, rows in by_target.items() if name.startswith("head"))
    assert head.tolist() == (expected["target_count"] >= edge).tolist()
    for kind in ("user history", "target", "title words", "day"):
        assert (sum(rows.astype(int) for rows in chosen[kind].values()) == 1).all(), kind
    assert all(rows.any() for kind in chosen.values() for rows in kind.values())


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40))
@settings(max_examples=80, deadline=None)
def test_quarters_cover_all_rows_in_order(values):
    values = np.array(values)
    found = groups.quarters(values)
    assert 1 <= len(found) <= 4 and (sum(rows.astype(int) for rows in found.values()) == 1).all()
    highest = -1
    for name, rows in found.items():
        low, high = int(name.split("-")[0]), int(name.split("-")[-1])
        assert low == values[rows].min() > highest and high == values[rows].max()
        highest = high


def test_the_difference_of_each_group_is_that_of_its_rows(runs, tmp_path):
    said = errors.run(runs["HatLLM"], runs["Pop"], top=6, folder=str(tmp_path))
    content, lines = numbers(tmp_path, "groups")
    ours, theirs = (read_ranks(runs[name]) for name in ("HatLLM", "Pop"))
    whole = {row["metric"]: row for row in content["rows"] if row["kind"] == "all"}
    for name, value in read_result(runs["HatLLM"])["test"].items():
        assert whole[name]["run"] == pytest.approx(value, abs=1e-6)
        assert whole[name]["against"] == pytest.approx(read_result(runs["Pop"])["test"][name], abs=1e-6)
        assert whole[name]["low"] <= whole[name]["difference"] <= whole[name]["high"]
    for row in content["rows"]:
        assert row["difference"] == pytest.approx(row["run"] - row["against"], abs=1e-12)
    assert len(lines) == len(content["rows"])
    (by_hand,) = errors.by_group(
        {("a", "b"): np.array([True, False, True, True])}, np.array([1, 1, 3, 99]), np.array([2, 1, 99, 2]), ["ndcg@10"]
    )
    assert by_hand["rows"] == 3 and by_hand["run"] == pytest.approx((1 + 0.5) / 3)
    assert by_hand["against"] == pytest.approx(2 / np.log2(3) / 3)
    _, listed = tables(tmp_path, "rows")
    gaps = pd.Series(1 / np.log2(ours["rank"] + 1) - 1 / np.log2(theirs["rank"] + 1))
    expected = gaps.abs().sort_values(ascending=False, kind="stable").index[:6]
    assert [int(row["row"]) for row in listed] == expected.tolist()
    titles = dict(zip(*read_items(runs["HatLLM"])))
    for row in listed:
        at = int(row["row"])
        assert (row["user"], row["target"], row["title"]) == (
            ours["user"][at],
            ours["target"][at],
            titles[ours["target"][at]],
        )
        assert (int(row["rank_run"]), int(row["rank_against"])) == (ours["rank"][at], theirs["rank"][at])
    _, ranked = numbers(tmp_path, "ranks")
    assert [int(row["rank_against"]) for row in ranked] == theirs["rank"].tolist()
    assert "NDCG@10" in said and listed[0]["title"] in said


def test_the_history_of_a_listed_row_is_what_its_user_took_before(runs, tmp_path):
    errors.run(runs["Pop"], runs["BIGRec"], top=3, folder=str(tmp_path))
    table = pd.read_csv(f"{runs['root']}/data/own/own.inter", sep="\t").set_axis(["user", "item", "time"], axis=1)
    titles = dict(zip(*read_items(runs["Pop"])))
    for row in tables(tmp_path, "rows")[1]:
        taken = table[table["user"] == row["user"]]["item"].tolist()[:-1][-10:]
        assert row["history"] == " | ".join(titles[item] for item in taken)


# --- Where it goes


def test_by_default_it_stands_beside_the_run_whatever_the_users_id(tmp_path):
    names = {"u1": "a/b", "u2": "c"}
    sequences = {names.get(user, user): items for user, items in random_sequences(8, 9).items()}
    write_dataset(tmp_path / "data", "own", sequences)
    keys = {**RANDOM, "data_path": str(tmp_path / "data"), "run_dir": str(tmp_path / "one")}
    run("BIGRec", "own", config_dict=keys)
    heatmap.run(str(tmp_path / "one"), "a/b", layer=0)
    prompt.run("own", "a/b", {**keys, "runs_dir": str(tmp_path), "run_dir": None}, model="BIGRec")
    attention.run(str(tmp_path / "one"), rows=1)
    errors.run(str(tmp_path / "one"), str(tmp_path / "one"))
    made = {file.name for file in tmp_path.iterdir()} - {"data", "one"}
    assert made == {"one-heatmap-user-a_b", "prompt-BIGRec-own-user-a_b", "one-attention", "one-errors"}
    rows = tables(tmp_path / "one-errors", "groups")[0]["rows"]
    assert all(row["difference"] == row["low"] == row["high"] == 0 for row in rows)


# --- What is refused


REFUSED = [
    ((["attention"], {"run": "Pop"}), r"is a run of Pop, which is no LLM recommender"),
    ((["heatmap"], {"run": "Pop", "user": "u1"}), r"no LLM recommender"),
    ((["heatmap"], {"run": "HatLLM", "user": "u77"}), r"no user 'u77' in own.*u7"),
    ((["heatmap"], {"run": "HatLLM", "user": "[PAD]"}), r"no user '\[PAD\]'"),
    ((["heatmap"], {"run": "HatLLM", "user": "u1", "layer": 4}), r"layer is 4, and must be from 0 to 3"),
    ((["heatmap"], {"run": "HatLLM", "user": "u1", "layer": "deep"}), r"layer is 'deep'"),
    ((["heatmap"], {"run": "HatLLM", "user": "u1", "head": 99}), r"head is 99, and must be from 0 to"),
    ((["heatmap"], {"run": "HatLLM"}), r"--user"),
    ((["attention"], {"run": "HatLLM", "rows": 0}), r"rows is 0"),
    ((["attention"], {"run": "HatLLM", "against": "Pop"}), r"Pop.*no LLM recommender"),
    ((["attention"], {"run": "nowhere"}), r"nowhere is not a run folder"),
    ((["attention"], {"run": "HatLLM", "row": 3}), r"does not take row: did you mean rows"),
    ((["errors"], {"run": "Pop", "against": "fewer"}), r"The 24 test rows of .* are not the 9 of"),
    ((["errors"], {"run": "Pop"}), r"--against"),
    ((["errors"], {"run": "Pop", "against": "BIGRec", "top": "all"}), r"top is 'all'"),
    ((["errors"], {"run": "Pop", "against": "BIGRec", "metric": "mrr@10"}), r"metric is mrr@10.*ndcg@10"),
    (
        (["prompt"], {"dataset": "own", "user": "u77", "backbone": "random-tiny", "n_in": 1, "n_cr": 1}),
        r"no user 'u77'",
    ),
    ((["prompt"], {"dataset": "own", "user": "u7", "model": "Pop"}), r"Pop reads no prompts"),
    ((["prompt"], {"dataset": "own", "user": "u7", "n_inn": 1}), r"n_inn.*n_in"),
    ((["prompt"], {"user": "u7"}), r"--dataset"),
    ((["figure"], {}), r"prompt, heatmap, attention, errors, sensitivity, and figure"),
    (([], {}), r"nothing is given"),
]


@pytest.mark.parametrize("arguments, message", REFUSED, ids=[f"{a[0]} {a[1]}" for a, _ in REFUSED])
def test_bad_input_ends_in_one_sentence(arguments, message, runs, tmp_path, monkeypatch):
    names, keys = arguments
    keys = {key: runs.get(value, value) if key in ("run", "against") else value for key, value in keys.items()}
    if "dataset" in keys:
        keys["data_path"] = f"{runs['root']}/data"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HatError, match=message) as refused:
        analyze(names, keys)
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


def test_data_that_has_changed_is_refused(runs, monkeypatch):
    ranks = read_ranks(runs["Pop"])
    test = SimpleNamespace(
        uid_field="u", iid_field="i", rows={"u": torch.tensor([0]), "i": torch.tensor([0])}, dataset_name="own",
        id2token=lambda field, ids: np.array(["another"]),
    )  # fmt: skip
    with pytest.raises(HatError, match=r"no longer those of"):
        errors._same_rows(test, ranks, runs["Pop"])


def test_the_command_line_takes_it(runs, tmp_path, capsys):
    from recbole_hatllm.cli import main

    assert (
        main(["analyze", "errors", f"--run={runs['Pop']}", f"--against={runs['BIGRec']}", f"--folder={tmp_path}"]) == 0
    )
    assert "largest disagreement" in capsys.readouterr().out
    assert main(["analyze", "heatmap", f"--run={runs['BIGRec']}", "--user=007"]) == 2
    assert "no user '007'" in capsys.readouterr().err
