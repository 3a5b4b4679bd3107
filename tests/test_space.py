"""Search spaces: conditions against Python itself, grids and draws against brute force, RecBole's text format against RecBole."""

import itertools
import math
from collections import Counter
from pathlib import Path

import optuna
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_hatllm import schema
from recbole_hatllm.conditions import parse
from recbole_hatllm.config import Config
from recbole_hatllm.errors import ConfigError
from recbole_hatllm.hyper_file import read_hyper
from recbole_hatllm.proposals import Proposals
from recbole_hatllm.registry import own_models
from recbole_hatllm.space import Dimension, Space, check_space, read_space


def space_of(choices: dict, *conditions: str) -> Space:
    dimensions = {key: Dimension(key, "choice", values) for key, values in choices.items()}
    return Space(dimensions, tuple(parse(text, "here") for text in conditions))


def written(folder: Path, text: str, name: str = "space.yaml") -> str:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return str(file)


# --- conditions

LEAVES = st.sampled_from(["a", "b", "c"]) | st.integers(-3, 9).map(lambda n: f"({n})") | st.just("0.5")
SUMS = st.recursive(
    LEAVES,
    lambda inner: (
        st.builds("({} {} {})".format, inner, st.sampled_from(["+", "-", "*", "/", "//", "%"]), inner)
        | st.builds("(-{})".format, inner)
    ),
    max_leaves=6,
)
SIGNS = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
COMPARISONS = st.builds("{} {} {}".format, SUMS, SIGNS, SUMS) | st.builds(
    "{} {} {} {} {}".format, SUMS, SIGNS, SUMS, SIGNS, SUMS
)
NUMBERS = st.integers(-4, 8) | st.sampled_from([0.25, 1.5, True])


@settings(deadline=None, max_examples=300)
@given(COMPARISONS, st.fixed_dictionaries({"a": NUMBERS, "b": NUMBERS, "c": NUMBERS}))
def test_a_condition_holds_where_python_says_so(text, values):
    try:
        expected = eval(text, {"__builtins__": {}}, dict(values))
    except ArithmeticError:
        expected = False
    assert parse(text, "here").holds(values) is expected


def test_the_keys_of_a_condition_texts_and_what_is_empty():
    condition = parse("n_in + n_cr <= backbone_layers - n_in", "here")
    assert condition.names == ("n_in", "n_cr", "backbone_layers")
    assert condition.holds({"n_in": 9, "n_cr": 9, "backbone_layers": None})
    assert parse("learner == 'adam'", "here").holds({"learner": "adam"})
    assert not parse("learner != 'adam'", "here").holds({"learner": "adam"})


NO_CONDITIONS = [
    "a", "a + 1", "a <", "", "a = 1", "a ** 2 < 9", "a and b", "not a < b", "a < b or a < c", "a in [1, 2]", "a is b", "a == None",
    "a.b < 1", "a[0] < 1", "[a] < 2", "max(a, b) < 3", "__import__('os').system('true') == 0", "(lambda: 1)() < 2", "(a < b) < 1",
    "(b if a else c) < 1", "f'{a}' == 'x'", "a < 1j", "a == b'x'", "a | b < 3", "~a < 3", "(a := 3) < 4", "{} < a", "a < ...",
    "a\x00 < 1", "(" * 3000 + "a" + ")" * 3000 + " < 1", 3, None, ["a < b"], {"a": 1}, True,
]  # fmt: skip


@pytest.mark.parametrize("text", NO_CONDITIONS, ids=lambda text: str(text)[:30])
def test_anything_else_is_refused_in_one_sentence(text):
    with pytest.raises(ConfigError, match=r"^here: the condition .* must be a comparison") as caught:
        parse(text, "here")
    assert "\n" not in str(caught.value).replace(str(text), "")


def test_the_part_that_is_none_is_named():
    with pytest.raises(ConfigError, match=r"brackets, and max\(b, 1\) is none\.$"):
        parse("a + max(b, 1) < 3", "here")


@pytest.mark.parametrize(
    "text, values", [("a < b", {"a": 1, "b": "x"}), ("a + b < 2", {"a": "x", "b": "y"}), ("a < 2", {"a": [1]})]
)
def test_what_cannot_be_computed_is_said_with_the_values(text, values):
    with pytest.raises(
        ConfigError,
        match=rf"condition {text!r} cannot be computed with a={values['a']!r}".replace("[", r"\[").replace("+", r"\+"),
    ):
        parse(text, "here").holds(values)


# --- grids and draws

CHOICES = st.lists(st.integers(0, 12), min_size=1, max_size=4, unique=True)


@settings(deadline=None, max_examples=60)
@given(CHOICES, CHOICES, CHOICES, st.lists(COMPARISONS, max_size=2), st.integers(1, 30) | st.none())
def test_a_grid_is_what_brute_force_leaves(a, b, c, conditions, trials):
    space = space_of({"a": a, "b": b, "c": c}, *conditions)
    expected = []
    for values in itertools.product(a, b, c):
        names = dict(zip("abc", values))
        with_value = True
        for text in conditions:
            try:
                with_value = with_value and eval(text, {"__builtins__": {}}, names)
            except ArithmeticError:
                with_value = False
        if with_value:
            expected.append(names)
    if not expected:
        with pytest.raises(ConfigError, match="No combination of the grid keeps `"):
            Proposals(space, {"seed": 1}, "grid", trials)
        return
    proposals = Proposals(space, {"seed": 1}, "grid", trials)
    study = optuna.create_study()
    proposals.enqueue(study, at_first=True)
    queued = [trial.system_attrs["fixed_params"] for trial in study.get_trials()]
    assert proposals.total == len(queued) == min(trials or 1000, len(expected))
    assert sorted(map(str, queued)) == sorted(map(str, expected)) if len(queued) == len(expected) else True
    assert all(params in expected for params in queued) and len({str(params) for params in queued}) == len(queued)


def test_draws_by_lot_are_even_over_what_the_conditions_leave():
    space = space_of({"a": [1, 2, 3, 4], "b": [1, 2, 3, 4]}, "a < b")
    proposals = Proposals(space, {"seed": 5}, "random", None)
    counts = Counter(tuple(proposals._draw(None, number).values()) for number in range(1200))
    assert set(counts) == {(a, b) for a in range(1, 5) for b in range(a + 1, 5)}
    assert all(abs(count - 200) < 4 * math.sqrt(200 * 5 / 6) for count in counts.values())  # four standard deviations


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_each_trial_is_queued_once_with_values_that_keep_the_conditions(sampler):
    ranges = {
        "x": Dimension("x", "uniform", [0, 1]),
        "n": Dimension("n", "int", [1, 9, 2]),
        "s": Dimension("s", "uniform", [0, 1, 0.25]),
    }
    space = Space(ranges, (parse("x + s <= n / 10", "here"),))
    proposals = Proposals(space, {"seed": 3}, sampler, None)
    study = optuna.create_study(direction="maximize")
    for number in range(25):  # TPE begins to learn behind the tenth
        proposals.enqueue(study)
        proposals.enqueue(study)  # a worker died before it took the trial
        trial = study.ask()
        for dimension in ranges.values():
            dimension.suggest(trial)
        x, n, s = (trial.params[key] for key in "xns")
        assert (
            trial.number == number
            and x + s <= n / 10
            and 0 <= x <= 1
            and n in (1, 3, 5, 7, 9)
            and s in (0, 0.25, 0.5, 0.75, 1)
        )
        study.tell(trial, x)
    assert len(study.trials) == 25


def test_without_conditions_draws_are_optunas_own():
    space = Space({"x": Dimension("x", "loguniform", [1e-4, 1e-1])})
    params = Proposals(space, {"seed": 3}, "random", None)._draw(None, 4)
    import random

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=random.Random("3 4 x").getrandbits(32)))
    assert params["x"] == study.ask().suggest_float("x", 1e-4, 1e-1, log=True)


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_draws_end_where_nothing_keeps_the_conditions(sampler, monkeypatch):
    monkeypatch.setattr("recbole_hatllm.proposals._BY_LOT", 50)
    space = space_of({"a": [1, 2], "b": [1, 2]}, "a + b > 4", "a == b")
    with pytest.raises(ConfigError, match=r"^None of 50 draws .*`a \+ b > 4` and `a == b`: change"):
        Proposals(space, {"seed": 1}, sampler, None)


# --- with a config


@pytest.mark.parametrize(
    "keys, layers",
    [
        ({"backbone": "random-tiny"}, 4),
        ({"backbone": "smollm2-135m"}, 30),
        ({"backbone": "someone/Llama-3.2-1B"}, 16),
        ({"backbone": "smollm2-135m", "backbone_layers": 7}, 7),
    ],
)
def test_an_empty_backbone_layers_is_what_the_backbone_has(keys, layers):
    space = read_space(schema.PROPERTIES / "search" / "HatLLM.yaml")
    config = check_space(space, "HatLLM", "ml-100k", keys)
    n_in, n_cr = (space.dimensions[key].values for key in ("n_in", "n_cr"))
    expected = 4 * sum(i + c <= layers for i in n_in for c in n_cr)
    assert Proposals(space, config, None, None).total == expected
    assert (expected == 100) == (layers >= 21)


def test_a_searched_backbone_has_its_own_layers():
    space = space_of({"backbone": ["random-tiny", "x/Llama-3.2-1B"], "n_in": [4, 16]}, "n_in + n_cr <= backbone_layers")
    config = Config("HatLLM", "ml-100k", config_dict={"n_cr": 0})
    allowed = [
        (b, n)
        for b in ("random-tiny", "x/Llama-3.2-1B")
        for n in (4, 16)
        if space.allows({"backbone": b, "n_in": n}, config)
    ]
    assert allowed == [("random-tiny", 4), ("x/Llama-3.2-1B", 4), ("x/Llama-3.2-1B", 16)]


@pytest.mark.parametrize(
    "conditions, message",
    [
        (
            ["embeding_size < 9"],
            r"'embeding_size < 9' names embeding_size, which is no key of BPR: did you mean embedding_size",
        ),
        (["n_in < 9"], r"names n_in, which is no key of BPR"),
        (["learner < embedding_size"], r"cannot be computed with learner='adam', embedding_size=4"),
        ("embedding_size < 9", r"conditions is 'embedding_size < 9', and must be a list"),
        ([3], r"the condition 3 must be a comparison"),
    ],
)
def test_a_bad_condition_of_a_file_is_refused(tmp_path, conditions, message):
    text = yaml.safe_dump({"embedding_size": {"choice": [4, 8]}, "conditions": conditions})
    with pytest.raises(ConfigError, match=message):
        check_space(read_space(written(tmp_path, text)), "BPR", "ml-100k", {})


def test_steps_are_written_as_people_write_them():
    rate = Dimension("x", "uniform", [0.0, 1.0, 0.1])
    assert [rate.value(0.1 * n) for n in range(11)] == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert Dimension("x", "uniform", [0.0, 1.0]).value(0.1 * 3) == 0.1 * 3


def test_conditions_alone_search_nothing(tmp_path):
    with pytest.raises(ConfigError, match="searches nothing"):
        read_space(written(tmp_path, "conditions: [a < b]"))


@pytest.mark.parametrize("model", own_models())
def test_every_model_has_a_space_that_it_can_read(model):
    space = read_space(schema.PROPERTIES / "search" / f"{model}.yaml")
    config = check_space(space, model, "ml-100k", {})
    assert Proposals(space, config, "grid", None).total > 1


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"uniform": [0, 1, 0.3]}, "whole steps"),
        ({"uniform": [0, 1, 0]}, "whole steps"),
        ({"loguniform": [1, 2, 0.5]}, r"\[low, high\] with 0 < low < high"),
        ({"uniform": [0, float("inf")]}, "low < high"),
    ],
)
def test_ranges_that_are_none(tmp_path, spec, message):
    with pytest.raises(ConfigError, match=message):
        read_space(written(tmp_path, yaml.safe_dump({"x": spec})))


# --- RecBole's text format

HYPER = """\
# around the defaults

learning_rate loguniform -8,0
embedding_size choice [64,96,128]
dropout_prob uniform 0.1,0.5
weight quniform 0,1,0.1
n_layers quniform 1, 4, 1
mlp_hidden_size choice ['[64,64]', '[128]']
loss_type choice ['BPR', 'CE', 'true']
"""


def test_recboles_lines_are_the_same_space(tmp_path):
    space = read_space(written(tmp_path, HYPER, "hyper.test"))
    assert {key: (dimension.kind, dimension.values) for key, dimension in space.dimensions.items()} == {
        "learning_rate": ("loguniform", [math.exp(-8), 1.0]),
        "embedding_size": ("choice", [64, 96, 128]),
        "dropout_prob": ("uniform", [0.1, 0.5]),
        "weight": ("uniform", [0.0, 1.0, 0.1]),
        "n_layers": ("int", [1, 4, 1]),
        "mlp_hidden_size": ("choice", [[64, 64], [128]]),
        "loss_type": ("choice", ["BPR", "CE", True]),
    }
    assert space.conditions == ()


DECIMALS = st.decimals(-6, 6, places=2)


@st.composite
def hyper_lines(draw):
    kind = draw(st.sampled_from(["uniform", "quniform", "loguniform", "choice"]))
    if kind == "choice":
        values = draw(
            st.lists(st.integers(0, 99) | st.sampled_from(["CE", "[4,4]", "(8,)"]), min_size=1, max_size=4, unique=True)
        )
        return f"x choice {values}"
    low, high = sorted([draw(DECIMALS), draw(DECIMALS)])
    step = draw(st.sampled_from(["0.1", "0.25", "1", "0.5"]))
    return f"x {kind} {low},{high + 1}" + (f",{step}" if kind == "quniform" else "")


@settings(deadline=None, max_examples=60)
@given(hyper_lines())
def test_recboles_own_parser_says_the_same(tmp_path_factory, line):
    pytest.importorskip("hyperopt")
    import numpy as np
    from hyperopt.pyll.stochastic import sample
    from recbole.config.configurator import Config as RecBoleConfig
    from recbole.trainer.hyper_tuning import HyperTuning

    file = written(tmp_path_factory.mktemp("hyper"), line, "x.hyper")
    theirs = HyperTuning._build_space_from_file(file)["x"]
    ((_, spec),) = read_hyper(file).values()
    ((kind, values),) = spec.items()
    drawn = [sample(theirs, rng=np.random.default_rng(seed)) for seed in range(60)]
    if kind == "choice":
        converted = [RecBoleConfig._convert_config_dict(None, {"x": value})["x"] for value in drawn]
        found = {str(list(value) if isinstance(value, tuple) else value) for value in converted}
        assert found == set(map(str, values))
        return
    low, high, *step = values
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in drawn)
    if step:  # hyperopt's rule, at values as near to its bounds as draws come
        bounds = [float(part) for part in line.split()[2].split(",")]
        ends = [np.round(bound / step[0]) * step[0] for bound in (bounds[0] + 1e-7, bounds[1] - 1e-7)]
        assert np.allclose([low, high], ends)
        assert all(abs((value - low) / step[0] - round((value - low) / step[0])) < 1e-6 for value in drawn)
    else:
        spread, ends = (np.log(drawn), np.log([low, high])) if kind == "loguniform" else (drawn, [low, high])
        width = ends[1] - ends[0]
        assert min(spread) < ends[0] + 0.2 * width and max(spread) > ends[1] - 0.2 * width


@pytest.mark.parametrize(
    "line, message",
    [
        ("learning_rate loguniform", r"x\.hyper, line 2: `learning_rate loguniform` must be a key"),
        ("learning_rate normal 0,1", r"line 2: .* one of choice, uniform, quniform, loguniform"),
        ("learning_rate uniform 0", r"line 2: the values of learning_rate are 0, and must be low,high\."),
        ("learning_rate uniform 0,1,2", r"line 2: .* must be low,high\."),
        ("learning_rate uniform low,high", r"line 2: .* must be low,high\."),
        ("learning_rate uniform 0,inf", r"line 2: .* must be low,high\."),
        ("learning_rate quniform 0,1,0", r"line 2: .* step > 0"),
        ("learning_rate loguniform 0,9999", r"line 2: .* exponents of e"),
        ("learning_rate choice 64", r"line 2: .* a list such as"),
        ("learning_rate choice [64", r"line 2: .* a list such as"),
        ("learning_rate choice __import__('os').listdir('.')", r"line 2: .* a list such as"),
        ("learning_rate uniform 1,0", r"x\.hyper, line 2: learning_rate: uniform is \[1\.0, 0\.0\]"),
        ("learning_rate choice [64,64]", r"line 2: learning_rate: the choices are \[64, 64\]"),
        ("embedding_size choice [32]", r"line 2: embedding_size stands there twice"),
    ],
)
def test_a_bad_line_is_named_with_its_file(tmp_path, line, message):
    with pytest.raises(ConfigError, match=message):
        read_space(written(tmp_path, f"embedding_size choice [64]\n{line}\n", "x.hyper"))


def test_a_hyper_file_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match="searches nothing"):
        read_space(written(tmp_path, "# nothing\n", "x.hyper"))
    (tmp_path / "y.hyper").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_space(tmp_path / "y.hyper")
