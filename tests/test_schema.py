"""Keys are declared in YAML comments; every declaration is read, and values are held to it."""

import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from recbole_hatllm import schema
from recbole_hatllm.errors import ConfigError

FILES = [
    path for path in sorted(schema.PROPERTIES.rglob("*.yaml")) if path.parent.name in ("properties", "model", "dataset")
]


def declare(tmp_path, text):
    file = tmp_path / "keys.yaml"
    file.write_text(text, encoding="utf-8")
    return schema.keys_of(file)


def key(types, range="", default=None, name="k"):
    return schema.Key(name, "meaning", tuple(types.split(" or ")), range, default, schema.PROPERTIES / "overall.yaml")


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_every_key_of_the_package_is_declared(file):
    keys = schema.keys_of(file)
    assert keys.keys() == (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).keys()
    for declared in keys.values():
        assert declared.meaning and declared.meaning[0] != "-" and declared.check(declared.default) == declared.default


def test_a_declaration_is_read(tmp_path):
    keys = declare(
        tmp_path,
        "# A head line of the file\n\n# --- Section\n"
        "# How many layers (of any kind),\n# told on two lines (int or none; >= 0 and < 9)\n"
        "n_in: 4\n# Free (str)\nword: a  # a comment behind\n# Nested (dict)\nargs:\n  inner: 1\n  other: [2]\n",
    )
    assert list(keys) == ["n_in", "word", "args"]
    n_in = keys["n_in"]
    assert (n_in.name, n_in.types, n_in.range, n_in.default) == ("n_in", ("int", "none"), ">= 0 and < 9", 4)
    assert n_in.meaning == "How many layers (of any kind), told on two lines"
    assert keys["args"].default == {"inner": 1, "other": [2]}


@pytest.mark.parametrize(
    "text",
    [
        "n_in: 4\n",
        "# without a type\nn_in: 4\n",
        "# of a type that is none (integer)\nn_in: 4\n",
        "# too far away (int)\n\nn_in: 4\n",
        "# the default breaks it (int; >= 5)\nn_in: 4\n",
        "# no such range (int; around 4)\nn_in: 4\n",
        "# --- Headline (int)\nn_in: 4\n",
    ],
)
def test_a_key_without_a_good_declaration_is_refused(text, tmp_path):
    with pytest.raises(ConfigError, match=r"keys\.yaml, line \d+.*n_in"):
        declare(tmp_path, text)


GOOD = [
    ("int", "", 3),
    ("float", "", 3),
    ("float", "> 0", 1e-9),
    ("int or none", ">= 1", None),
    ("int or none", ">= 1", 1),
    ("bool", "", False),
    ("str", "one of a, b c", "b c"),
    ("str", "", ""),
    ("list", ">= 1", [1, 2]),
    ("list or str", "", "x"),
    ("float", "0 to 1", 1),
    ("float", "0 to 1", 0.0),
    ("float", ">= 0 and < 1", 0.99),
    ("int", "< 5", -7),
    ("dict", "", {"a": 1}),
    ("int", "one of 1, 2", 2),
    ("int", "<= 2", 2),
]
BAD = [
    ("int", "", 3.0),
    ("int", "", True),
    ("int", "", "three"),
    ("float", "", "fast"),
    ("float", "", None),
    ("float", "", float("nan")),
    ("bool", "", 1),
    ("bool", "", "true"),
    ("str", "", 1),
    ("str", "one of a, b", "A"),
    ("str", "one of a, b", "titel"),
    ("list", ">= 1", [1, 0]),
    ("list", "", "x"),
    ("float", "0 to 1", 1.1),
    ("float", ">= 0 and < 1", 1),
    ("int or none", ">= 1", 0),
    ("int", "one of 1, 2", 3),
    ("list", "> 0", ["a"]),
    ("dict", "", [1]),
    ("str", "", None),
]


@pytest.mark.parametrize("types, range, value", GOOD, ids=str)
def test_good_values_pass(types, range, value):
    assert key(types, range).check(value) is value


@pytest.mark.parametrize("types, range, value", BAD, ids=str)
def test_bad_values_are_named_with_what_is_allowed(types, range, value):
    with pytest.raises(ConfigError) as error:
        key(types, range, name="the_key").check(value)
    assert "the_key" in str(error.value) and repr(value) in str(error.value) and types in str(error.value)
    assert range in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text, number", [("1e-4", 1e-4), ("5", 5), ("1E3", 1e3), (".5", 0.5), ("-1.5e+2", -150.0)])
def test_a_number_that_came_as_text_is_a_number(text, number):
    assert key("float").check(text) == number
    assert key("str").check(text) == text


@given(st.floats(allow_nan=False), st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_ranges_agree_with_python(value, a, b):
    rules = {
        f"{a} to {b}": a <= value <= b,
        f">= {a}": value >= a,
        f"> {a}": value > a,
        f"<= {b}": value <= b,
        f"> {a} and < {b}": a < value < b,
    }
    for rule, holds in rules.items():
        try:
            key("float", rule).check(value)
            assert holds, rule
        except ConfigError:
            assert not holds, rule


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-4", 1e-4),
        ("1e5", 1e5),
        (".5e-3", 5e-4),
        ("1.5", 1.5),
        ("7", 7),
        ("-2E+3", -2000.0),
        ("0x1e4", 484),
        ("1e", "1e"),
        ("e5", "e5"),
        ("2020-01-01", "2020-01-01"),
        ("true", True),
        ("", None),
        ("~", None),
        ("[1e-3, a]", [1e-3, "a"]),
    ],
)
def test_yaml_reads_what_people_write(text, value):
    assert yaml.load(text, schema.Loader) == value


def test_yaml_makes_no_objects():
    with pytest.raises(yaml.YAMLError):
        yaml.load("!!python/object/apply:os.getcwd []", schema.Loader)


@pytest.mark.parametrize(
    "text, match",
    [
        ("a: [1\nb: 2\n", r"bad\.yaml.*line [12]"),
        ("- a\n- b\n", r"bad\.yaml.*key: value"),
        ("1: a\n", r"bad\.yaml.*key: value"),
        ("just text", r"bad\.yaml.*just text"),
        ("a: b: c\n", r"bad\.yaml.*line 1"),
        ("a: 1\n\tb: 2\n", r"bad\.yaml.*line 2"),
    ],
)
def test_a_bad_yaml_file_is_named_with_its_line(text, match, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=match) as error:
        schema.read_yaml(tmp_path / "bad.yaml")
    assert "\n" not in str(error.value)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        schema.read_yaml(tmp_path / "absent.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigError, match=r"bytes\.yaml.*UTF-8"):
        schema.read_yaml(tmp_path / "bytes.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert schema.read_yaml(tmp_path / "empty.yaml") == {}


def test_the_later_file_counts(tmp_path):
    for name, value in (("a", 1), ("b", 2)):
        (tmp_path / f"{name}.yaml").write_text(f"# Meaning (int)\nk: {value}\n# Other (int)\n{name}: 0\n")
    keys = schema.keys_of(tmp_path / "a.yaml", tmp_path / "b.yaml")
    assert keys["k"].default == 2 and keys["k"].file.name == "b.yaml" and list(keys) == ["a", "k", "b"]


def test_help_shows_every_key_once_with_default_meaning_and_range():
    files = [
        schema.PROPERTIES / "overall.yaml",
        schema.PROPERTIES / "llm.yaml",
        *schema.PROPERTIES.glob("model/*.yaml"),
    ]
    keys = schema.keys_of(*files)
    text = schema.help_text(keys)
    for name, declared in keys.items():
        assert len(re.findall(rf"^  --{name}=", text, flags=re.MULTILINE)) == 1
        assert declared.allowed.split()[0] in text
    assert "--protocol=leave_one_out" in text and "--show_progress=true" in text and "--run_dir=\n" in text
    assert max(map(len, text.splitlines())) <= 110
    for file in files:
        assert text.count(f"{file.relative_to(schema.PROPERTIES)}:\n") <= 1
