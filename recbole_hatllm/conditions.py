"""Conditions of a search space: comparisons over keys, such as `n_in + n_cr <= backbone_layers`.

A condition is read as a syntax tree and computed here, node by node; nothing of it is ever run as Python.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recbole_hatllm.errors import ConfigError

_ARITHMETIC = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip
_SIGNS = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_COMPARISONS = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}  # fmt: skip
_GRAMMAR = "a comparison (< <= > >= == !=) of keys, numbers and texts, with + - * / // % and brackets"


@dataclass(frozen=True)
class Condition:
    """One condition: its `text`, the `names` of the keys in it, in their order, and the `tree` that is computed."""

    text: str
    names: tuple[str, ...]
    tree: ast.Compare

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether the values of the keys keep the condition.

        One with an empty key (None) holds, as there is nothing to compare; one without a value (a division by zero) does not.

        Raises:
            ConfigError: a list, a dict, or a text where a number is needed.
        """
        if any(values[name] is None for name in self.names):
            return True
        try:
            left = _value(self.tree.left, values)
            for kind, node in zip(self.tree.ops, self.tree.comparators):
                right = _value(node, values)
                if not _COMPARISONS[type(kind)](left, right):
                    return False
                left = right
        except ArithmeticError:
            return False
        except TypeError as error:
            given = ", ".join(f"{name}={values[name]!r}" for name in self.names)
            raise ConfigError(
                f"The condition {self.text!r} cannot be computed with {given} ({error}): compare numbers with numbers and "
                "texts with texts."
            ) from error
        return True


def parse(text: Any, where: str) -> Condition:
    """Reads a condition; `where` it stands begins the sentence about a bad one.

    Raises:
        ConfigError: anything but a comparison over arithmetic of keys, numbers and texts.
    """
    try:
        tree = ast.parse(text, mode="eval").body if isinstance(text, str) else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = None
    bad: ast.AST | None = tree
    if isinstance(tree, ast.Compare):
        kinds = [kind for kind in tree.ops if type(kind) not in _COMPARISONS]
        bad = tree if kinds else next(filter(None, map(_foreign, [tree.left, *tree.comparators])), None)
    if tree is None or bad:
        what = f", and {ast.unparse(bad)} is none" if bad not in (None, tree) else ""
        raise ConfigError(f"{where}: the condition {text!r} must be {_GRAMMAR}{what}.")
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    names.sort(key=lambda node: (node.lineno, node.col_offset))
    return Condition(text, tuple(dict.fromkeys(node.id for node in names)), tree)


def _foreign(node: ast.expr) -> ast.expr | None:
    """The first part that the grammar does not know."""
    if isinstance(node, ast.Name) or (isinstance(node, ast.Constant) and type(node.value) in (int, float, bool, str)):
        return None
    if isinstance(node, ast.UnaryOp) and type(node.op) in _SIGNS:
        return _foreign(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        return _foreign(node.left) or _foreign(node.right)
    return node


def _value(node: ast.expr, values: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.UnaryOp):
        return _SIGNS[type(node.op)](_number(node.operand, values))
    if isinstance(node, ast.BinOp):
        return _ARITHMETIC[type(node.op)](_number(node.left, values), _number(node.right, values))
    value = values[node.id] if isinstance(node, ast.Name) else node.value
    if not isinstance(value, (int, float, str)):
        raise TypeError(f"{value!r} is no number and no text")
    return value


def _number(node: ast.expr, values: Mapping[str, Any]) -> int | float:
    value = _value(node, values)
    if isinstance(value, str):
        raise TypeError(f"{value!r} is no number")
    return value
