"""Names of files as text: printed safely on any terminal, and kept reversibly where text must be UTF-8."""

from __future__ import annotations

import re


def printable(text: str) -> str:
    """Escapes what a terminal does not show as one character of a line: controls, line ends, lone surrogates."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def to_text(path: str) -> str:
    """Returns a path as text that UTF-8 can encode.

    A path that can be encoded stays as it is. In any other, backslashes are doubled and each byte that is not UTF-8
    becomes ``\\xNN``; `to_path` reverses it.
    """
    if is_text(path):
        return path
    return re.sub("[\udc80-\udcff]", lambda byte: f"\\x{ord(byte[0]) - 0xDC00:02x}", path.replace("\\", "\\\\"))


def to_path(text: str) -> str:
    """Returns the path of which `to_text` made ``text`` by escaping."""
    parts = re.split(r"(\\\\|\\x[0-9a-f]{2})", text)
    for i in range(1, len(parts), 2):
        parts[i] = "\\" if parts[i] == "\\\\" else chr(0xDC00 + int(parts[i][2:], 16))
    return "".join(parts)


def is_text(path: str) -> bool:
    """Returns whether UTF-8 can encode a path as it is."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
