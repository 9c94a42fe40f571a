"""Where a document's image is: what ``latemax index`` records of its file, and the image opened again from that."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .images import load_image
from .pdf import PdfPages

if TYPE_CHECKING:
    from PIL.Image import Image


def record(real: str, page: int | None, size: int, mtime_ns: int) -> dict[str, Any]:
    """Returns the metadata of a document: its file, and the state in which that was read.

    Args:
        real: path of the file without symbolic links.
        page: page of a PDF, counted from 1; None is an image file.
        size: of the file in bytes.
        mtime_ns: time of its last change in nanoseconds.
    """
    found: dict[str, Any] = {"file": to_text(real), "bytes": size, "mtime_ns": mtime_ns}
    if not is_text(real):
        found["escaped"] = True
    return found if page is None else {**found, "page": page}


def file_of(meta: Mapping[str, Any]) -> str | None:
    """Returns the real path of a document's file, or None if its metadata has no record of one."""
    file = meta.get("file")
    if not isinstance(file, str):
        return None
    return to_path(file) if meta.get("escaped") else file


def page_of(meta: Mapping[str, Any]) -> int | None:
    """Returns the page of its PDF that a document is, counted from 1; None of an image file."""
    page = meta.get("page")
    return page if isinstance(page, int) and page > 0 else None


def picture_of(meta: Mapping[str, Any]) -> Image:
    """Opens the image of a document, upright and RGB, from the file that its metadata records.

    Raises:
        ImportError: Pillow is missing, or pypdfium2 of a page of a PDF.
        OSError: the file is gone or cannot be read.
        ValueError: no record of a file, a file that changed since, or one that is no readable image.
    """
    file, page = file_of(meta), page_of(meta)
    if file is None:
        raise ValueError("the store has no record of its file")
    status = os.stat(file)
    if (status.st_size, status.st_mtime_ns) != (meta.get("bytes"), meta.get("mtime_ns")):
        raise ValueError("the file changed since it was indexed")
    if page is None:
        return load_image(file)
    with PdfPages(file) as pages:
        return pages[page - 1]


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
