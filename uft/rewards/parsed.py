"""Checkers that parse what a model wrote: expressions, arithmetic, JSON. They judge in the child process.

No text is ever evaluated: arithmetic is a walk over a syntax tree with bounded fractions, mathematics is read by a
grammar of LaTeX, never by Python's.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from importlib import import_module
from itertools import accumulate
from typing import Any, ClassVar

from uft.data.rows import Row
from uft.rewards.base import Checker, Figures, Unjudged, answer_of, answered, fact, stated
from uft.rewards.text import last_number

LONGEST_EXPRESSION = 1_000
"""Characters of an expression that are looked at; no answer needs more."""
DEEPEST = 40
"""Brackets within each other in an expression; a grammar needs very long for many."""


# --- Mathematics, by math-verify: https://github.com/huggingface/Math-Verify

_MARKED = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_SAYS = re.compile(r"(?:answer|result)(?:\s+is)?\s*:?\s*(\S.*)", re.IGNORECASE)
_WORDS = re.compile(r"(?<!\\)\b(?:[A-Za-z]{3,}|[A-Za-z]{2}\s[A-Za-z]{2})")  # of a sentence, no command of LaTeX
_PLAIN = re.compile(r"-?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?")


def expression(text: str) -> str:
    """The final answer of a text: its last box, what follows `####`, the last formula, or :func:`last_line`, of a
    sentence the last number."""
    _, marked, after = text.rpartition("####")
    if (start := text.rfind("\\boxed{")) >= 0:
        found = _braced(text[start + len("\\boxed{") :])
    elif marked:
        found = after
    elif formulas := _MARKED.findall(stated(text)):
        found = "".join(formulas[-1])
    else:
        found = last_line(text)
        if _WORDS.search(found) and (number := last_number(found)) is not None:
            found = f"{number:f}"
    return found.strip().removesuffix("%").removesuffix("\\")[:LONGEST_EXPRESSION]


def last_line(text: str) -> str:
    """The last line of a text from "answer" on, or all of it, without a full stop."""
    last = (stated(text).splitlines() or [""])[-1]
    return str((_SAYS.findall(last) or [last])[-1]).strip().rstrip(".")


def _braced(text: str) -> str:
    """The text up to the brace that closes one opened before it; all of it where none does."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if not depth:
            return text[:place]
    return text


def _number(text: str, **ignored: object) -> Any:
    """In the place of sympy's reader of strings, which evaluates them as Python: numbers, and nothing else."""
    import sympy

    if not re.fullmatch(r"\d+(?:\.\d*)?|\.\d+", text, re.ASCII):
        raise sympy.SympifyError(text)
    return sympy.Integer(int(text)) if text.isdigit() else sympy.Float(text)


@lru_cache(maxsize=256)
def _parsed(text: str) -> list[Any]:
    """The parsed forms of a LaTeX expression by math-verify; none where it is no expression."""
    from math_verify import LatexExtractionConfig, parse

    found: list[Any] = parse(
        f"$\\boxed{{{text}}}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None
    )
    return found


@dataclass(frozen=True)
class Math(Checker):
    """`exact_match`: the stated expression equals the answer, symbolically; `answered`: the reply states one."""

    figures: ClassVar[tuple[str, ...]] = ("exact_match", "answered")
    packages: ClassVar[tuple[str, ...]] = ("math_verify",)
    isolated: ClassVar[bool] = True

    def prepare(self) -> None:
        super().prepare()
        import_module("sympy.physics.units")  # simplify imports it when it first meets one; it reads its own strings
        vars(import_module("sympy.parsing.sympy_parser"))["parse_expr"] = _number

    def judge(self, row: Row, reply: str) -> Figures:
        right, said = expression(answer_of(row)), expression(reply)
        if _PLAIN.fullmatch(right) and _PLAIN.fullmatch(said):
            values = [Fraction(text.replace(",", "")) for text in (right, said)]
            return {"exact_match": float(values[0] == values[1]), "answered": 1.0}
        expected = _parsed(right)
        if not expected:
            raise Unjudged("the row's answer is no expression")
        from math_verify import verify

        deep = max(accumulate((letter in "([{") - (letter in ")]}") for letter in said), default=0) > DEEPEST
        found = [] if deep else _parsed(said)
        equal = bool(found) and verify(expected, found, timeout_seconds=None)
        return {"exact_match": float(equal), "answered": float(bool(found))}


# --- Countdown: reach a target with given numbers, each used once.

_BITS = 512
_SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-", "·": "*"})
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: Fraction.__add__,
    ast.Sub: Fraction.__sub__,
    ast.Mult: Fraction.__mul__,
    ast.Div: Fraction.__truediv__,
}


def arithmetic(text: str) -> tuple[Fraction, Counter[int]]:
    """(value, the whole numbers used) of sums, differences, products and quotients of whole numbers.

    Raises ValueError for anything else, and where a value is beyond _BITS bits.
    """
    used: Counter[int] = Counter()

    def walk(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used[node.value] += 1
            value = Fraction(node.value)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            value = walk(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
        elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            value = _OPERATORS[type(node.op)](walk(node.left), walk(node.right))
        else:
            raise ValueError(f"{type(node).__name__} is no arithmetic")
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > _BITS:
            raise ValueError("the numbers get too large")
        return value

    try:
        return walk(ast.parse(text.strip(), mode="eval").body), used
    except (SyntaxError, ZeroDivisionError, RecursionError, MemoryError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Countdown(Checker):
    """`exact_match`: the expression reaches the target and uses every number once; `answered`: it is arithmetic.

    The expression stands in answer tags or is the last line; what follows `=` is left aside. Columns as those of
    Jiayi-Pan/Countdown-Tasks-3to4.
    """

    figures: ClassVar[tuple[str, ...]] = ("exact_match", "answered")
    columns: ClassVar[tuple[str, ...]] = ("numbers", "nums", "target")
    isolated: ClassVar[bool] = True

    def judge(self, row: Row, reply: str) -> Figures:
        try:
            numbers = Counter(map(Fraction, fact(row, "numbers", "nums")))
            target = Fraction(fact(row, "target"))
        except (TypeError, ValueError, ArithmeticError) as error:
            raise Unjudged("the row's numbers or its target are no numbers") from error
        text = last_line(reply)[:LONGEST_EXPRESSION].partition("=")[0].translate(_SIGNS)
        try:
            value, used = arithmetic(text)
        except ValueError:
            return {"exact_match": 0.0, "answered": 0.0}
        return {"exact_match": float(value == target and used == numbers), "answered": 1.0}


# --- JSON by a schema.

_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class JsonSchema(Checker):
    """`valid`: the reply is JSON that the row's schema allows; `parsed`: it is JSON. A fenced block counts alone."""

    figures: ClassVar[tuple[str, ...]] = ("valid", "parsed")
    columns: ClassVar[tuple[str, ...]] = ("schema",)
    packages: ClassVar[tuple[str, ...]] = ("jsonschema",)
    isolated: ClassVar[bool] = True

    def judge(self, row: Row, reply: str) -> Figures:
        from jsonschema import SchemaError
        from jsonschema.validators import validator_for
        from referencing import Registry

        schema = fact(row, "schema")
        if not isinstance(schema, dict):
            raise Unjudged("the row's schema is no object")
        validator = validator_for(schema)
        try:
            validator.check_schema(schema)
        except SchemaError as error:
            raise Unjudged(f"the row's schema is none: {error.message}") from error
        reply = answered(reply)
        fenced = _FENCE.findall(reply)
        try:
            value = json.loads(fenced[-1] if fenced else reply)
        except (ValueError, RecursionError):
            return {"valid": 0.0, "parsed": 0.0}
        # a registry of its own: nothing that a schema refers to is fetched
        return {"valid": float(validator(schema, registry=Registry()).is_valid(value)), "parsed": 1.0}
