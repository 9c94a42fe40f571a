"""Text that any terminal shows safely."""

from __future__ import annotations


def printable(text: str) -> str:
    """Escapes what a terminal does not show as one character of a line: controls, line ends, lone surrogates."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
