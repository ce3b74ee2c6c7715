"""The model's calculator: arithmetic, and how often a string occurs in another. It never runs code."""

from __future__ import annotations

import ast
import math
import operator
import re
import warnings
from collections.abc import Callable
from typing import Final

MAX_CHARS: Final = 1000
MAX_DEPTH: Final = 100  # nested operations; a sum of 100 numbers counts as one
MAX_BITS: Final = 1024  # bits of an integer, in every intermediate result too
THOUSANDS: Final = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")

Number = int | float

UNARY: Final[dict[type[ast.unaryop], Callable[[Number], Number]]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
BINARY: Final[dict[type[ast.operator], Callable[[Number, Number], Number]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class _Refused(ValueError):
    """The expression is not arithmetic, or too large."""


def calculate(expression: str) -> str | None:
    """Return the value of `1 + 2 * (3 - 4) ** 2`, `1,000 / 8` or `'strawberry'.count('r')`, as Python prints it.

    Returns None for anything else: other names and calls, numbers out of bounds, a division by zero. Always fast.
    """
    if len(expression) > MAX_CHARS:
        return None
    if "'" not in expression and '"' not in expression:
        expression = THOUSANDS.sub("", expression)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the parser warns about what the model wrote
            tree = ast.parse(expression.strip(), mode="eval")
        return str(_value(tree.body, MAX_DEPTH))
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr, depth: int) -> Number:
    if depth == 0:
        raise _Refused
    match node:
        case ast.Constant(value=int() | float() as value) if type(value) is not bool:
            return _bounded(value)
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in UNARY:
            return UNARY[type(sign)](_value(operand, depth - 1))
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left, depth - 1), _value(right, depth - 1))
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in BINARY:
            return _bounded(BINARY[type(sign)](_value(left, depth - 1), _value(right, depth - 1)))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
            args=[ast.Constant(value=str() as part)],
            keywords=[],
        ):
            return text.count(part)
    raise _Refused


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, int) and isinstance(exponent, int) and exponent > 0:
        if (abs(base).bit_length() - 1) * exponent > MAX_BITS:  # exact for powers of two
            raise _Refused
        return _bounded(base**exponent)
    if base < 0 and not float(exponent).is_integer():
        raise _Refused  # a complex number
    return _bounded(base**exponent)


def _bounded(value: Number) -> Number:
    if not math.isfinite(value) if isinstance(value, float) else value.bit_length() > MAX_BITS:
        raise _Refused
    return value
