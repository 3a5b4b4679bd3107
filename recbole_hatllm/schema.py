"""The keys of this package, read from properties/**/*.yaml: the only place where a key is declared.

The comment above a key says what it means and ends in its type and, after a semicolon, its range:

    # How many layers attend only inside an item (int; >= 0)
    n_in: 4
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from recbole_hatllm.errors import ConfigError

_INSTALLED = Path(__file__).with_name("properties")
PROPERTIES = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "properties"

TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "list": (list, tuple),
    "dict": (dict,),
    "none": (type(None),),
}
_COMPARISONS = {
    ">=": lambda value, bound: value >= bound,
    "<=": lambda value, bound: value <= bound,
    ">": lambda value, bound: value > bound,
    "<": lambda value, bound: value < bound,
}
_DECLARATION = re.compile(r"(?P<meaning>.+)\((?P<types>[a-z ]+)(?:;(?P<range>[^()]*))?\)", re.DOTALL)
_KEY = re.compile(r"([A-Za-z_]\w*)\s*:(?:\s|$)")


class Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number, as people expect, and a date stays text."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The keys of one YAML file.

    Raises:
        ConfigError: the file is missing, is not YAML (with its line), or holds something else than `key: value` lines.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): check the path in --config_files.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file in UTF-8: save it as one.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {yaml_problem(error)}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{path} must hold lines of the form `key: value`, and holds {str(content)[:60]!r}.")
    return content


def number(text: str) -> Any:
    """The number that `text` spells as YAML does, else `text`."""
    try:
        value = yaml.load(text, Loader)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else text


def yaml_problem(error: yaml.YAMLError) -> str:
    """What YAML says of an error, on one line, with the line it stands in."""
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error).replace("\n", " ")
    return f"line {mark.line + 1}, {what}" if mark else what


@dataclass(frozen=True)
class Key:
    """One declared key: `types` of `TYPES`, `range` as written ("" where all values are fine), `default` as YAML
    reads it."""

    name: str
    meaning: str
    types: tuple[str, ...]
    range: str
    default: Any
    file: Path

    @property
    def allowed(self) -> str:
        """Types and range as they stand in the declaration."""
        return " or ".join(self.types) + (f"; {self.range}" if self.range else "")

    def check(self, value: Any) -> Any:
        """The value to use: `value` itself, or the number that a text like "1e-4" spells.

        A range holds for every element of a list.

        Raises:
            ConfigError: wrong type or out of range.
        """
        if isinstance(value, str) and not self._is_type(value):
            value = number(value)
        elements = value if isinstance(value, (list, tuple)) else [value]
        if not self._is_type(value) or not (value is None or all(self._in_range(element) for element in elements)):
            raise ConfigError(f"{self.name} is {value!r}, and must be {self.allowed}.")
        return value

    def _is_type(self, value: Any) -> bool:
        if isinstance(value, bool):  # a bool is an int to Python
            return "bool" in self.types
        if isinstance(value, float) and value != value:
            return False
        return any(isinstance(value, TYPES[name]) for name in self.types)

    def _in_range(self, value: Any) -> bool:
        return all(_holds(part.strip(), value) for part in self.range.split(" and ") if part.strip())


def _holds(rule: str, value: Any) -> bool:
    """Whether `value` keeps one part of a range.

    Raises:
        ValueError: the part is none that the grammar knows.
    """
    if rule.startswith("one of "):
        return str(value) in [choice.strip() for choice in rule.removeprefix("one of ").split(",")]
    bounds = re.fullmatch(r"(\S+) to (\S+)", rule)
    compare = re.fullmatch(r"(>=|<=|>|<)\s*(\S+)", rule)
    if bounds:
        low, high = map(float, bounds.groups())
        return isinstance(value, (int, float)) and low <= value <= high
    if compare:
        return isinstance(value, (int, float)) and _COMPARISONS[compare[1]](value, float(compare[2]))
    raise ValueError(f"no such range: {rule!r}")


def keys_of(*paths: str | Path) -> dict[str, Key]:
    """The keys that YAML files declare; where two declare one key, the later file counts.

    Raises:
        ConfigError: a file cannot be read, or a key has no comment of the fixed form.
    """
    keys: dict[str, Key] = {}
    for path in map(Path, paths):
        defaults = read_yaml(path)
        comment: list[str] = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.startswith("#") and not line.startswith("# ---"):  # a headline belongs to no key
                comment.append(line.lstrip("#").strip())
                continue
            if match := _KEY.match(line):
                keys.pop(match[1], None)  # so that keys stand in the order of the files that count
                keys[match[1]] = _declared(match[1], " ".join(comment), defaults[match[1]], path, number)
            comment = []
    return keys


def _declared(name: str, comment: str, default: Any, path: Path, number: int) -> Key:
    match = _DECLARATION.fullmatch(comment)
    types = tuple(part.strip() for part in match["types"].split(" or ")) if match else ()
    if not match or not set(types) <= TYPES.keys():
        raise ConfigError(f"{path}, line {number}: the comment above {name} must end in (type) or (type; range).")
    key = Key(name, match["meaning"].strip(), types, (match["range"] or "").strip(), default, path)
    try:
        key.check(default)
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"{path}, line {number}, declares {name}: {error}") from error
    return key


def help_text(keys: Mapping[str, Key]) -> str:
    """Every key with its default, meaning, type and range, grouped by the file that declares it; for a terminal."""
    lines: list[str] = []
    file = None
    for key in keys.values():
        if key.file != file:
            file = key.file
            lines += ["", f"{file.relative_to(PROPERTIES) if file.is_relative_to(PROPERTIES) else file}:"]
        default = (
            "" if key.default is None else str(key.default).lower() if isinstance(key.default, bool) else key.default
        )
        lines.append(f"  --{key.name}={default}")
        lines += textwrap.wrap(f"{key.meaning} ({key.allowed})", 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines).lstrip("\n")
