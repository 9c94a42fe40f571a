"""Conditions on documents: a small language, parsed here and handed to sqlite with every key and value bound.

    condition  = and { OR and }          and = not { AND not }          not = { NOT } test
    test       = operand [ comparison operand | [NOT] LIKE operand | [NOT] BETWEEN operand AND operand
                         | [NOT] IN ( operand {, operand} ) | IS [NOT] NULL ]
    operand    = ( condition ) | ? | number | 'text' | NULL | TRUE | FALSE | key | "key"

``id`` is the document's id, every other key one of its metadata; an absent key is NULL. There are no functions and no
queries to begin with, so that none has to be kept out; sqlite's authorizer refuses them once more.
"""

from __future__ import annotations

import json
import math
import operator
import re
import sqlite3
from typing import Any

import numpy as np

TOKEN = re.compile(
    r"""\s*(?:
    (?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))
    |(?P<text>'(?:[^']|'')*')
    |(?P<quoted>"(?:[^"]|"")*")
    |(?P<word>[^\W\d]\w*)
    |(?P<sign><=|>=|<>|!=|==|[=<>(),?])
    )""",
    re.VERBOSE,
)
WORDS = {"AND", "OR", "NOT", "IN", "LIKE", "BETWEEN", "IS", "NULL", "TRUE", "FALSE"}
COMPARISONS = {"=", "==", "!=", "<>", "<", "<=", ">", ">="}
# A key that json_extract can be given in quotes, whatever the version of sqlite; others go through `_key`.
SIMPLE_KEY = re.compile(r'[^"\\\x00-\x1f]+')
# Within sqlite's own limits: depth of an expression 1000, bound values 32766.
MAX_DEPTH, MAX_TERMS, MAX_VALUES = 50, 400, 30000
# Instructions of sqlite's machine for the whole query: so many, and so many a document.
STEPS, STEPS_PER_DOCUMENT = 10_000_000, 20_000
FUNCTIONS = {"json_extract", "latemax_key", "like"}


def translate(condition: str, values: tuple) -> tuple[str, list[Any]]:
    """SQL for the condition, and what to bind to it.

    Raises:
        TypeError, ValueError: what is wrong with the condition, and where.
    """
    if not isinstance(condition, str):
        raise TypeError(f"condition must be a string, got {type(condition).__name__}")
    return _Parser(condition, [_value(value) for value in values]).whole()


def _value(value: object) -> int | float | str | None:
    if value is None:
        return None
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (int, np.integer, np.bool_)):
        number = int(value) if isinstance(value, np.bool_) else operator.index(value)
        if not -(1 << 63) <= number < 1 << 63:
            raise ValueError(f"values must fit into 64 bits, got {number}")
        return int(number)
    if isinstance(value, (float, np.floating)):
        if math.isnan(value):
            raise ValueError("values must be numbers, strings or None; NaN compares with nothing")
        return float(value)
    raise TypeError(f"values must be numbers, strings or None, got {type(value).__name__}")


class _Parser:
    def __init__(self, condition: str, values: list[Any]):
        self.condition, self.values, self.bound = condition, values, []
        self.used = self.depth = self.terms = 0
        self.tokens: list[tuple[str, str, int]] = []
        at, end = 0, len(condition.rstrip())
        while at < end:
            found = TOKEN.match(condition, at)
            if found is None:
                self._refuse(at + len(condition[at:]) - len(condition[at:].lstrip()))
            kind = found.lastgroup or ""
            text = found[kind]
            if kind == "word" and text.upper() in WORDS:
                kind, text = "sign", text.upper()
            self.tokens.append((kind, text, found.start(kind)))
            at = found.end()
        self.tokens.append(("end", "", end))
        self.at = 0

    def _refuse(self, position: int, why: str = "") -> None:
        rest = self.condition[position : position + 20]
        raise ValueError(
            why
            or f"condition must be comparisons of id, keys and values with AND, OR, NOT, IN, LIKE, BETWEEN, IS NULL; "
            f"got {rest!r} at {position} of {self.condition!r}"
        )

    def _is(self, *texts: str) -> bool:
        kind, text, _ = self.tokens[self.at]
        return kind == "sign" and text in texts

    def _take(self, *texts: str) -> str | None:
        if not self._is(*texts):
            return None
        self.at += 1
        return self.tokens[self.at - 1][1]

    def _need(self, text: str) -> None:
        if not self._take(text):
            self._refuse(self.tokens[self.at][2])

    def whole(self) -> tuple[str, list[Any]]:
        sql = self._or()
        kind, _, position = self.tokens[self.at]
        if kind != "end":
            self._refuse(position)
        if self.used != len(self.values):
            raise ValueError(f"values must be one for each ? of the condition, {self.used}; got {len(self.values)}")
        if len(self.bound) > MAX_VALUES:
            raise ValueError(f"condition must bind at most {MAX_VALUES} keys and values, got {len(self.bound)}")
        return sql, self.bound

    def _or(self) -> str:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError(f"condition must nest at most {MAX_DEPTH} parentheses and NOTs")
        parts = [self._and()]
        while self._take("OR"):
            parts.append(self._and())
        self.depth -= 1
        return " OR ".join(parts)

    def _and(self) -> str:
        parts = [self._not()]
        while self._take("AND"):
            parts.append(self._not())
        return " AND ".join(parts)

    def _not(self) -> str:
        if self._take("NOT"):
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise ValueError(f"condition must nest at most {MAX_DEPTH} parentheses and NOTs")
            inner = self._not()
            self.depth -= 1
            return f"NOT ({inner})"
        return self._test()

    def _test(self) -> str:
        self.terms += 1
        if self.terms > MAX_TERMS:
            raise ValueError(f"condition must have at most {MAX_TERMS} terms")
        left = self._operand()
        if sign := self._take(*COMPARISONS):
            return f"{left} {sign} {self._operand()}"
        if self._take("IS"):
            negated = self._take("NOT")
            self._need("NULL")
            return f"{left} IS {'NOT ' if negated else ''}NULL"
        negated = "NOT " if self._take("NOT") else ""
        if self._take("LIKE"):
            return f"{left} {negated}LIKE {self._operand()}"
        if self._take("BETWEEN"):
            low = self._operand()
            self._need("AND")
            return f"{left} {negated}BETWEEN {low} AND {self._operand()}"
        if self._take("IN"):
            self._need("(")
            items = [self._operand()]
            while self._take(","):
                items.append(self._operand())
            self._need(")")
            return f"{left} {negated}IN ({', '.join(items)})"
        if negated:
            self._refuse(self.tokens[self.at][2])
        return left

    def _operand(self) -> str:
        kind, text, position = self.tokens[self.at]
        if self._take("("):
            inner = self._or()
            self._need(")")
            return f"({inner})"
        self.at += 1
        if kind == "sign" and text == "?":
            if self.used == len(self.values):
                raise ValueError(f"values must be one for each ? of the condition; got {len(self.values)}")
            self.used += 1
            return self._bind(self.values[self.used - 1])
        if kind == "sign" and text in ("NULL", "TRUE", "FALSE"):
            return self._bind({"NULL": None, "TRUE": 1, "FALSE": 0}[text])
        if kind == "number":
            whole = text.lstrip("+-").isdigit() and -(1 << 63) <= int(text) < 1 << 63
            return self._bind(int(text) if whole else float(text))
        if kind == "text":
            return self._bind(text[1:-1].replace("''", "'"))
        if kind == "word":
            return self._key(text)
        if kind == "quoted":
            return self._key(text[1:-1].replace('""', '"'))
        self._refuse(position)
        raise AssertionError("not reached")

    def _bind(self, value: object) -> str:
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"condition and values must be text that UTF-8 can write: {error}") from error
        self.bound.append(value)
        return "?"

    def _key(self, key: str) -> str:
        if key == "id":
            return "id"
        if SIMPLE_KEY.fullmatch(key):
            path = '$."' + key + '"'
            return f"json_extract(meta, {self._bind(path)})"
        return f"latemax_key(meta, {self._bind(key)})"


def _key(meta: str | None, key: str) -> int | float | str | None:
    """As json_extract, of a key that its paths cannot write."""
    value = None if meta is None else json.loads(meta).get(key)
    if isinstance(value, int):
        return int(value) if -(1 << 63) <= value < 1 << 63 else float(value)
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")) if isinstance(value, (list, dict)) else value


def _authorize(action: int, first: str | None, second: str | None, _database: str | None, _source: str | None) -> int:
    allowed = (
        action == sqlite3.SQLITE_SELECT
        or (action == sqlite3.SQLITE_READ and first == "documents")
        or (action == sqlite3.SQLITE_FUNCTION and second in FUNCTIONS)
    )
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def run(db: sqlite3.Connection, sql: str, values: tuple, documents: int) -> list[int]:
    """The first column of a query whose condition `translate` made.

    Raises:
        ValueError: sqlite refuses it, or it takes too many steps.
        StoreError: the catalogue is damaged.
    """
    steps, every = STEPS + STEPS_PER_DOCUMENT * documents, 10_000
    calls = 0

    def count() -> bool:
        nonlocal calls
        calls += 1
        return calls * every > steps

    db.create_function("latemax_key", 2, _key, deterministic=True)
    db.set_authorizer(_authorize)
    db.set_progress_handler(count, every)
    try:
        return [seq for (seq,) in db.execute(sql, values)]
    except sqlite3.OperationalError as error:
        if any(sign in str(error) for sign in ("JSON", "I/O", "UTF-8", "user-defined")):
            raise
        if calls * every > steps:
            raise ValueError(f"condition must take fewer than {steps} steps of sqlite") from error
        raise ValueError(f"condition must be one that sqlite takes: {error}") from error
