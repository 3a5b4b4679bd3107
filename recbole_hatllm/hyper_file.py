"""Search spaces in RecBole's own text format, one key a line, as its `run_hyper.py` takes them:

learning_rate loguniform -8,0            e to the power of -8 to 0
embedding_size choice [64,96,128]
dropout_prob uniform 0.1,0.5
n_layers quniform 1,4,1                  steps of 1
mlp_hidden_size choice ['[64,64]','[128]']
"""

from __future__ import annotations

import ast
import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from pathlib import Path
from typing import Any

from recbole_hatllm.errors import ConfigError

SUFFIXES = (".hyper", ".test")  # RecBole's own file is called hyper.test
_FORMS = {
    "choice": "a list such as [64,128]",
    "uniform": "low,high",
    "quniform": "low,high,step with step > 0",
    "loguniform": "low,high, the exponents of e",
}


def read_hyper(file: str | Path) -> dict[str, tuple[str, dict[str, list]]]:
    """Where each key stands, and what the YAML format would say of it, `{kind: values}`.

    Raises:
        ConfigError: a line that is none of the format, or a key that stands twice; with file and line.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}): name a text file in UTF-8 by --space=FILE.") from error
    found: dict[str, tuple[str, dict[str, list]]] = {}
    for number, line in enumerate(lines, 1):
        where = f"{file}, line {number}"
        parts = line.split(None, 2)
        if not parts or parts[0].startswith("#"):
            continue
        if len(parts) < 3 or parts[1] not in _FORMS:
            raise ConfigError(
                f"{where}: `{line.strip()}` must be a key, one of {', '.join(_FORMS)}, and its values, as in "
                "`learning_rate loguniform -8,0`."
            )
        key, kind, text = parts
        if key in found:
            raise ConfigError(f"{where}: {key} stands there twice: leave one line out.")
        try:
            found[key] = (f"{where}: {key}", _choice(text) if kind == "choice" else _range(kind, text))
        except (ValueError, SyntaxError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
            raise ConfigError(
                f"{where}: the values of {key} are {text.strip()}, and must be {_FORMS[kind]}."
            ) from error
    return found


def _choice(text: str) -> dict[str, list]:
    values = ast.literal_eval(text.strip())
    if not isinstance(values, (list, tuple)):
        raise TypeError("no list")
    return {"choice": [_spelled(value) for value in values]}


def _spelled(value: Any) -> Any:
    """What a config of RecBole makes of a choice: a text that spells a value is that value, as in '[64,64]'."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return {"true": True, "false": False}.get(value.lower(), value)
    return list(value) if isinstance(value, tuple) else value


def _range(kind: str, text: str) -> dict[str, list]:
    numbers = [Decimal(part.strip()) for part in text.split(",")]
    if len(numbers) != (3 if kind == "quniform" else 2) or not all(number.is_finite() for number in numbers):
        raise ValueError("not so many numbers")
    if kind == "loguniform":
        return {kind: [math.exp(number) for number in numbers]}
    if kind == "uniform":
        return {kind: [float(number) for number in numbers]}
    low, high, step = numbers
    if step <= 0:
        raise ValueError("no step")
    # hyperopt rounds a draw to a multiple of the step; these are the first and the last that it can come to.
    half = Decimal("0.5")
    ends = [
        (low / step + half).to_integral_value(ROUND_FLOOR) * step,
        (high / step - half).to_integral_value(ROUND_CEILING) * step,
    ]
    values = [*ends, step]
    if all(value == int(value) for value in values):  # hyperopt gives 2.0, which no key of whole numbers takes
        return {"int": [int(value) for value in values]}
    return {"uniform": [float(value) for value in values]}
