"""LLMs that read item vectors of a SASRec - E4SRec, LLaRA, SLMRec - against what their papers' formulas give by hand."""

import gc
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch.nn import functional as F

from recbole_hatllm import head, run, stages
from recbole_hatllm.backbone import load_backbone
from recbole_hatllm.config import Config
from recbole_hatllm.data.prompt import SLOTS, TITLES_AND_SLOTS, PromptTable
from recbole_hatllm.data.titles import PieceEncoder, TitleTokens
from recbole_hatllm.errors import ConfigError
from recbole_hatllm.live import Live
from recbole_hatllm.masks import branch_mask, schedule
from recbole_hatllm.memory import Memory
from recbole_hatllm.model.llara import LLaRA
from recbole_hatllm.model.slmrec import block_distances
from recbole_hatllm.prompt_size import prompt_size
from recbole_hatllm.table_head import TableHead
from tests.conftest import random_sequences, write_dataset
from tests.model_contract import PARENTS, build, known_keys, rows
from tests.test_prompt import NAMES, WORDS, histories

pytestmark = pytest.mark.versions

MODELS = ["E4SRec", "LLaRA", "SLMRec"]
ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
    "that appropriately completes the request.\n\n### Instruction:\n"
)
BEFORE_IDS = f"{ALPACA}Given the user's purchase history, predict next possible item to be purchased.\n\n### Input:\n"
AFTER_IDS = "\n### Response:\n"


# --- Prompts


@pytest.fixture(scope="module")
def encode():
    return PieceEncoder(load_backbone("random-tiny").tokenizer)


@pytest.fixture(scope="module")
def tables(encode):
    titles = TitleTokens.build(NAMES, encode, 48, None)
    none = TitleTokens.none(len(NAMES))
    behind = {span: PromptTable(titles, encode, WORDS, span, template=TITLES_AND_SLOTS) for span in ("title", "quoted")}
    return {**behind, "alone": PromptTable(none, encode, {}, "title", template=SLOTS)}


def oracle(encode, history, form):
    """Token ids (None for a slot), span and the slots' items of one history, built token by token."""
    if form == "alone":
        parts = [(BEFORE_IDS, -1), *((k, k) for k in range(len(history))), (AFTER_IDS, -1)]
    else:
        start = (
            f"{ALPACA}Given a list of movies the user has watched before, please recommend a new movie that the user likes to "
            "the user.\n\n### Input:\nThe user has watched the following movies before:"
        )
        opening = ' "' if form == "title" else ""
        parts = [(start + opening, -1)]
        for k, item in enumerate(history):
            if k:
                parts.append((', "' if form == "title" else ",", -1))
            parts += [(' "', k)] * (form == "quoted") + [(NAMES[item], k), ('"', k), (k, k)]
        parts.append(("\n \n\n### Response:\n", -1))
    ids, span = [], []
    for text, owner in parts:
        piece = encode(text) if isinstance(text, str) else [None]
        ids += piece
        span += [owner] * len(piece)
    return ids, span


def batch_of(lists):
    lengths = torch.tensor([len(history) for history in lists])
    sequences = torch.zeros(len(lists), 10, dtype=torch.int64)
    for row, history in zip(sequences, lists):
        row[: len(history)] = torch.tensor(history)
    return sequences, lengths


@pytest.mark.parametrize("form", ["title", "quoted", "alone"])
@settings(max_examples=40, deadline=None)
@given(lists=histories)
def test_prompts_with_slots_equal_the_oracle(tables, encode, form, lists):
    prompt = tables[form](*batch_of(lists))
    width = prompt.valid.shape[1]
    slots = dict(zip(prompt.slots.tolist(), prompt.slot_items.tolist()))
    for row, history in enumerate(lists):
        ids, span = oracle(encode, history, form)
        n = len(ids)
        assert prompt.valid[row].tolist() == [True] * n + [False] * (width - n)
        at = [i for i, token in enumerate(ids) if token is None]
        own = {place - row * width: item for place, item in slots.items() if place // width == row}
        assert own == dict(zip(at, history))
        assert [t for t, token in zip(prompt.input_ids[row, :n].tolist(), ids) if token is not None] == [
            token for token in ids if token is not None
        ]
        assert prompt.position_ids[row, :n].tolist() == list(range(n))
        assert prompt.span[row, :n].tolist() == span
        assert prompt.is_last[row].nonzero()[:, 0].tolist() == at  # the behaviour token stands for its item
        assert prompt.readout[row] == n - 1


@pytest.mark.parametrize("form", ["title", "quoted", "alone"])
@settings(max_examples=30, deadline=None)
@given(lists=histories)
def test_a_branch_with_slots_is_the_prompt_that_ends_there(tables, form, lists):
    sequences, lengths = batch_of(lists)
    whole = tables[form](sequences, lengths, branches=True)
    sees = branch_mask(whole.branch, whole.stem)[:, 0].tril()
    items = (
        torch.zeros(whole.valid.numel(), dtype=torch.int64)
        .index_copy(0, whole.slots, whole.slot_items)
        .view_as(whole.valid)
    )
    for row, history in enumerate(lists):
        for k in range(len(history)):
            alone = tables[form](sequences[row : row + 1], torch.tensor([k + 1]))
            columns = sees[row, (whole.branch[row] == k).nonzero()[-1, 0]].nonzero()[:, 0]
            for part in ("input_ids", "position_ids", "span", "is_last"):
                assert getattr(whole, part)[row][columns].tolist() == getattr(alone, part)[0].tolist(), (part, k)
            assert items[row][columns].nonzero()[:, 0].tolist() == alone.slots.tolist()
            assert items[row][columns][alone.slots].tolist() == alone.slot_items.tolist() == history[: k + 1]


def test_the_llm_without_titles_gets_no_start_token(encode):
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_backbone("random-tiny").tokenizer
    bos = tokenizer.convert_ids_to_tokens(0)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    table = PromptTable(TitleTokens.none(len(NAMES)), PieceEncoder(tokenizer), {}, template=SLOTS)
    ids = table(torch.tensor([[2]]), torch.tensor([1])).input_ids[0].tolist()
    assert ids[: len(encode(BEFORE_IDS))] == encode(BEFORE_IDS)


# --- What the backbone reads


def by_hand(model, sequence: list[int], depths=()) -> list[torch.Tensor]:
    """States of the HF decoder, called with embeddings put together token by token: after all layers, or behind `depths`."""
    encode = PieceEncoder(model.backbone.tokenizer)
    words = model.backbone.base.get_input_embeddings().weight
    layer = model.slots.projector
    vectors = [layer.weight @ model.slots.table[item] + layer.bias for item in sequence]
    read = torch.cat([words[encode(BEFORE_IDS)], torch.stack(vectors), words[encode(AFTER_IDS)]])[None]
    mask = torch.full((read.shape[1], read.shape[1]), -1e30).triu(1)[None, None]
    output = model.backbone.model(
        inputs_embeds=read,
        use_cache=False,
        output_hidden_states=True,
        hat_masks=dict.fromkeys(model.backbone.kinds, mask),
    )
    states = [output.hidden_states[depth][0, -1] for depth in depths]
    return states or [output.last_hidden_state[0, -1]]


def a_history(interaction, row: int) -> list[int]:
    return interaction["item_id_list"][row][: interaction["item_length"][row]].tolist()


@pytest.mark.parametrize("name", ["E4SRec", "SLMRec"])
@pytest.mark.parametrize("pool", [True, False])
def test_scores_equal_those_put_together_by_hand(tiny, name, pool):
    model, _, test = build(name, {**tiny, "token_pool": pool})
    model.eval()
    batch = rows(test, 4)
    with torch.no_grad():
        scores = model.full_sort_predict(batch)
        for row in range(4):
            (state,) = by_hand(model, a_history(batch, row))
            by_head = {
                "E4SRec": lambda h: model.head.weight @ h,
                "SLMRec": lambda h: model.slots.table @ (model.head.projection.weight @ h),
            }
            assert torch.allclose(scores[row, 1:], by_head[name](state)[1:], atol=1e-5)  # neither has a bias
    assert not [key for key in model.head.state_dict() if "bias" in key]


def test_behaviour_tokens_stand_behind_the_titles_and_nothing_else_changes(tiny):
    model, train, _ = build("LLaRA", tiny)
    batch = rows(train, 5)
    prompt = model.prompts(batch["item_id_list"], batch["item_length"])
    model.eval()
    read = model.embed(prompt)["inputs_embeds"].flatten(0, 1)
    first, second = model.slots.projector[0], model.slots.projector[2]
    for place, item in zip(prompt.slots.tolist(), prompt.slot_items.tolist()):
        inner = first.weight @ model.slots.table[item] + first.bias
        gelu = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        assert torch.allclose(read[place], second.weight @ gelu + second.bias, atol=1e-5)
    others = torch.ones(len(read), dtype=torch.bool).index_fill(0, prompt.slots, False)
    assert read[others].equal(model.backbone.embed(prompt.input_ids).flatten(0, 1)[others])
    assert len(prompt.slots) == batch["item_length"].sum()


@pytest.mark.parametrize("name", MODELS)
def test_only_what_is_trained_moves_and_it_is_counted(name, tiny):
    model, train, _ = build(name, tiny)
    table, tokens = model.slots.table.clone(), model.backbone.base.get_input_embeddings().weight.clone()
    optimizer = torch.optim.AdamW(model.parameter_groups(), weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.calculate_loss(rows(train, 8)).backward()
        optimizer.step()
    assert model.slots.table.equal(table) and model.slots.table.grad is None and table[1:].abs().sum() > 0
    assert model.backbone.base.get_input_embeddings().weight.equal(tokens)
    n, d = 20, 32
    width = 128 if name == "SLMRec" else 64
    lora = {"LLaRA": 8, "E4SRec": 16, "SLMRec": 16}[name] * 4
    attention = (32 + 32) * 2 + (32 + 16) * 2  # q, o; k, v of two heads of eight
    adapters = lora * ((32 + 64) * 3 + (attention if name == "LLaRA" else 0))
    projector = (width * d + d) + (d * d + d if name == "LLaRA" else 0)
    heads = {"SLMRec": width * d}.get(name, (n + 1) * d)
    expected = [f"{adapters:,} in adapters", f"{heads:,} in the head of 20 items", f"{projector:,} in the projector"]
    if name == "SLMRec":
        expected.append(f"{3 * width * d:,} in the blocks")
    assert f"trainable: {', '.join(expected)}; frozen: 20 item vectors of SASRec, {width} wide" in str(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == adapters + heads + projector + (3 * width * d if name == "SLMRec" else 0)
    grouped = [p for group in model.parameter_groups() for p in group["params"]]
    assert len({id(p) for p in grouped}) == len(grouped) and sum(p.numel() for p in grouped) == trained


@pytest.mark.parametrize("name", MODELS)
def test_every_item_as_a_target_equals_rows_of_their_own(name, tiny):
    keys = {
        **tiny,
        "targets": "all",
        "lora_dropout": 0.0,
        "teacher_keys": {**PARENTS["teacher_keys"], "lora_dropout": 0.0},
    }
    model, train, _ = build(name, keys)
    batch = train.dataset.inter_feat[:3]
    together, targets, _ = model.pairs(batch)
    alone = []
    for items, length in zip(batch["item_id_list"], batch["item_length"].tolist()):
        alone += [model.read(items[None], torch.tensor([end + 1]))[0] for end in range(length)]
    assert len(targets) == model.targets_in(batch) == len(alone)
    assert (together - torch.stack(alone)).abs().max() < 1e-5
    assert model.calculate_loss(batch).isfinite()


@pytest.mark.parametrize("name", MODELS)
def test_the_warm_start_reads_slots_too(name, tiny):
    own = {**tiny, **PARENTS, "head_init": "probe", "readout_norm": "whiten", "probe_epochs": 1, "targets": "all"}
    result = run(name, "tiny", config_dict={k: v for k, v in own.items() if k in known_keys(name)})
    assert result["curve"][0]["step"] == 0


@pytest.mark.parametrize("wrong", [("E4SRec", "head_init", "title"), ("SLMRec", "head_init", "title"),
                                   ("LLaRA", "item_span", "segment")])  # fmt: skip
def test_what_makes_no_sense_is_refused(tiny, wrong):
    name, key, value = wrong
    with pytest.raises(ConfigError, match=rf"{key} is '{value}', and must be str; one of"):
        Config(name, "tiny", config_dict={"data_path": tiny["data_path"], key: value})


def test_items_without_titles_are_enough_without_titles_in_the_prompt(tiny, tmp_path):
    folder = write_dataset(tmp_path / "data", "tiny", random_sequences(30, 20))
    (folder / "tiny.item").unlink()
    own = {**tiny, **PARENTS, "data_path": str(tmp_path / "data")}
    assert run("E4SRec", "tiny", config_dict={k: v for k, v in own.items() if k in known_keys("E4SRec")})["test"]


# --- LLaRA's curriculum


def test_at_the_start_no_slot_is_filled_and_at_the_end_every_one(tiny):
    model, train, _ = build("LLaRA", tiny)
    batch = rows(train, 6)
    prompt = model.prompts(batch["item_id_list"], batch["item_length"])
    at = prompt.slots

    def slots():
        return model.embed(prompt)["inputs_embeds"].flatten(0, 1)[at]

    model.train()
    filled = model.slots(prompt.slot_items)
    for done, expected in ((0.0, model.placeholder.expand_as(filled)), (1.0, filled)):
        model.reached(done)
        assert all(torch.allclose(slots(), expected) for _ in range(50)), done
    model.reached(0.0)
    model.eval()
    assert torch.allclose(slots(), filled)  # hybrid in validation and test, whatever the share


def test_on_text_only_batches_the_projector_stays(tiny):
    model, train, _ = build("LLaRA", tiny)
    projector = [p.clone() for p in model.slots.projector.parameters()]
    placeholder = model.placeholder.clone()
    optimizer = torch.optim.AdamW(model.parameter_groups(), lr=0.1, weight_decay=0.1)
    for done in (1.0, 0.0, 0.0):  # with moments from a hybrid batch behind it
        before = [p.clone() for p in model.slots.projector.parameters()]
        model.train()
        model.reached(done)
        optimizer.zero_grad()
        model.calculate_loss(rows(train, 8)).backward()
        optimizer.step()
        after = list(model.slots.projector.parameters())
        assert all((a.grad is None) == (done == 0) for a in after)
        assert all(torch.equal(a, b) == (done == 0) for a, b in zip(after, before))
    assert not any(torch.equal(a, b) for a, b in zip(model.slots.projector.parameters(), projector))
    assert model.placeholder.equal(placeholder) and placeholder.std() > 0


@pytest.mark.parametrize("done", [0.1, 0.5, 0.8])
def test_a_micro_batch_is_hybrid_with_the_share_that_is_done(tiny, done):
    model, _, _ = build("LLaRA", tiny)
    model.train()
    model.reached(done)
    torch.manual_seed(3)
    draws = 2000
    hybrid = sum(not torch.equal(model.slot_vectors(torch.tensor([5]))[0], model.placeholder) for _ in range(draws))
    assert abs(hybrid / draws - done) < 5 * math.sqrt(done * (1 - done) / draws)


def test_the_trainer_counts_micro_batches(tiny, monkeypatch):
    told = []
    monkeypatch.setattr(LLaRA, "reached", lambda self, done: told.append(done))
    keys = {**tiny, **PARENTS, "train_batch_size": 12, "micro_batch_size": 4, "train_steps": 5}
    run("LLaRA", "tiny", config_dict={k: v for k, v in keys.items() if k in known_keys("LLaRA")})
    assert told == pytest.approx([tau / 15 for tau in range(15)])


def test_hatllms_schedule_in_llara(tiny):
    plain, _, _ = build("LLaRA", tiny)
    masked, _, test = build("LLaRA", {**tiny, "hatllm_masks": True, "n_in": 1, "n_cr": 2, "cross_mask": "cr_pre"})
    assert plain.backbone.kinds == ("or",) * 4
    assert masked.backbone.kinds == schedule(4, 1, 2, cross_mask="cr_pre")
    masked.load_state_dict(plain.state_dict())
    batch = rows(test, 4)
    with torch.no_grad():
        one, other = (model.eval().full_sort_predict(batch)[:, 1:] for model in (plain, masked))
    assert not torch.allclose(one, other, atol=1e-4)


# --- SLMRec


def test_states_behind_layers_are_the_decoders_own(tiny):
    model, _, test = build("SLMRec", tiny)
    batch = rows(test, 3)
    model.eval()
    with torch.no_grad():
        states = model.read(batch["item_id_list"], batch["item_length"], depths=[1, 3, 4])
        last = model.read(batch["item_id_list"], batch["item_length"])
        for row in range(3):
            for mine, theirs in zip(states[row], by_hand(model, a_history(batch, row), depths=[1, 3, 4])):
                assert torch.allclose(mine, theirs, atol=1e-5)
    assert states[:, 2].equal(last)  # behind the final norm


@pytest.mark.parametrize("distance, power", [("squared", 2), ("plain", 1)])
def test_the_loss_is_the_papers(tiny, distance, power):
    keys = {**tiny, "distill_cos": 0.7, "distill_norm": 0.2, "distill_blocks_ce": 0.3, "distill_blocks": 2, "lora_dropout": 0.0,
            "head_dropout": 0.0, "distill_distance": distance}  # fmt: skip
    model, train, _ = build("SLMRec", keys)
    (teacher,) = model.teacher
    torch.manual_seed(1)
    for parameter in model.backbone.trainable().values():  # a student that is not its teacher
        torch.nn.init.normal_(parameter, std=0.2)
    batch = rows(train, 5)
    model.train()
    found = model.calculate_loss(batch).item()

    table = model.slots.table[1:].detach().double().numpy()
    weight = [m.detach().double().numpy() for m in (model.blocks[0].projection.weight, model.head.projection.weight)]
    cosines, norms, first, last = [], [], [], []
    for row in range(5):
        h, t = (
            [state.detach().double().numpy() for state in by_hand(side, a_history(batch, row), depths=[2, 4])]
            for side in (model, teacher)
        )
        for a, b in zip(h, t):
            cosines.append(a @ b / math.sqrt((a @ a) * (b @ b)))
            norms.append(math.sqrt(((a - b) ** 2).sum()) ** power)
        target = int(batch["item_id"][row]) - 1
        for matrix, state, losses in zip(weight, h, (first, last)):
            scores = table @ (matrix @ state)
            losses.append(np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[target])
    expected = np.mean(last) + 0.7 * (1 - np.mean(cosines)) + 0.2 * np.mean(norms) + 0.3 * np.mean(first)
    assert found == pytest.approx(expected, rel=1e-5) and np.mean(norms) > 1e-3


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(tiny):
    model, train, _ = build("SLMRec", {**tiny, "distill_blocks_ce": 0.0, "lora_dropout": 0.0})
    (teacher,) = model.teacher
    model.backbone.load_state_dict(teacher.backbone.state_dict())
    model.slots.load_state_dict(teacher.slots.state_dict())
    batch = rows(train, 6)
    depths = model.depths(4)
    assert depths == [1, 2, 3, 4]
    cosine, distance = block_distances(model.pairs(batch, depths)[0], teacher.pairs(batch, depths)[0])
    assert cosine.item() == pytest.approx(1, abs=1e-6) and distance.item() == pytest.approx(0, abs=1e-8)
    vectors, targets, _ = model.pairs(batch)
    assert model.calculate_loss(batch).item() == pytest.approx(model.head.loss(vectors, targets).item(), abs=1e-5)


def test_the_teacher_is_neither_trained_nor_saved_nor_noisy(tiny):
    model, train, _ = build(
        "SLMRec", {**tiny, "lora_dropout": 0.5, "teacher_keys": {**PARENTS["teacher_keys"], "lora_dropout": 0.5}}
    )
    (teacher,) = model.teacher
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameter_groups(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()
        model.calculate_loss(rows(train, 8)).backward()
        optimizer.step()
    assert not teacher.training and not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert all(before[name].equal(tensor) for name, tensor in teacher.state_dict().items())
    assert not [name for name in model.state_dict() if "teacher" in name]
    assert teacher.pairs(rows(train, 4))[0].equal(teacher.pairs(rows(train, 4))[0])


def test_a_student_has_the_first_layers_only(tiny):
    model, _, _ = build("SLMRec", {**tiny, "backbone_layers": 2, "distill_blocks": 2})
    assert len(model.backbone.layers) == 2 and len(model.teacher[0].backbone.layers) == 4
    assert model.depths(2) == [1, 2] and model.teacher[0].depths(2) == [2, 4]
    whole = load_backbone("random-tiny", seed=2026)
    cut = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): p
        for name, p in model.backbone.named_parameters()
    }
    for name, parameter in whole.named_parameters():
        assert (name in cut) == ("layers.2." not in name and "layers.3." not in name), name
        assert name not in cut or cut[name].equal(parameter)


def test_no_teacher_where_none_is_wanted(tiny):
    model, train, _ = build("SLMRec", {**tiny, "teacher_layers": None})
    assert not model.teacher and not hasattr(model, "blocks")
    vectors, targets, _ = model.eval().pairs(rows(train, 8))
    assert model.calculate_loss(rows(train, 8)).item() == pytest.approx(
        model.head.loss(vectors, targets).item(), abs=1e-6
    )


@pytest.mark.parametrize("piece", [head.PIECE, 40])
def test_a_head_on_a_table_is_linear_with_the_product_as_its_weights(monkeypatch, piece):
    """Scores, loss and gradient against a matrix E W that is there as a whole, in float64; in pieces too."""
    monkeypatch.setattr(head, "PIECE", piece)
    torch.manual_seed(0)
    table = torch.nn.Parameter(torch.randn(11, 6, dtype=torch.float64), requires_grad=False)
    scored = TableHead(table, 8).double()
    vectors, targets = torch.randn(7, 8, dtype=torch.float64), torch.randint(1, 11, (7,))
    weight = (table @ scored.projection.weight).detach().requires_grad_()
    loss = F.cross_entropy((vectors @ weight.T)[:, 1:], targets - 1)
    loss.backward()
    ours = scored.loss(vectors, targets)
    ours.backward()
    assert ours.item() == pytest.approx(loss.item(), abs=1e-12)
    assert torch.allclose(scored.projection.weight.grad, table.T @ weight.grad, atol=1e-12) and table.grad is None
    scores = scored(vectors)
    assert torch.allclose(scores[:, 1:], (vectors @ weight.T)[:, 1:]) and (scores[:, 0] == -torch.inf).all()


# --- Memory


@pytest.mark.parametrize("name", MODELS)
def test_memory_counts_what_the_model_has_and_a_step_holds(name, tiny):
    keys = {**tiny, **PARENTS, "micro_batch_size": 8, "attention": "eager"}
    model, train, _ = build(name, keys)
    config = Config(name, "tiny", config_dict={k: v for k, v in keys.items() if k in known_keys(name)})
    items, prompt = prompt_size(config)
    estimate = Memory(config, items, prompt)
    sizes = {
        key: sum(p.numel() * 4 for p in group["params"])
        for key, group in zip(model.optimisation, model.parameter_groups())
    }
    called = {"backbone": "adapters", "slots": "projector", "blocks": "heads of blocks"}
    for key, size in sizes.items():
        part = called.get(key, key)
        assert estimate.resident[part] == estimate.resident[f"{part}: gradients"] == size
    assert estimate.resident["frozen item vectors"] == model.slots.table.numel() * 4
    if name == "SLMRec":
        frozen = sum(p.numel() * 4 for n, p in model.teacher[0].backbone.named_parameters() if "lora" not in n)
        assert estimate.resident["frozen weights of the teacher"] == frozen
    data = train.dataset.inter_feat
    longest = model.prompts(data["item_id_list"], data["item_length"]).input_ids.shape[1]
    assert longest <= prompt.tokens <= longest + 2
    model.train()
    batch = data[model.prompts.title_tokens(data["item_id_list"]).argsort(descending=True)[:8]]
    model.calculate_loss(batch).backward()
    gc.collect()
    with Live() as live:
        model.calculate_loss(batch).backward()
    assert estimate.step(8) == pytest.approx(live.peak, rel=0.15)


def test_parents_are_declared_by_the_models_that_need_them(tiny):
    for name in (*MODELS, "HatLLM", "SASRec"):
        config = Config(name, "tiny", config_dict={"data_path": tiny["data_path"]})
        roles = [parent.role for parent in stages.lineage.parents(config)]
        assert roles == {"SLMRec": ["sasrec", "teacher"], "HatLLM": [], "SASRec": []}.get(name, ["sasrec"])
