"""The image files of ``latemax index``: which there are, and what they and their documents have in common."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from latemax.cli.terminal import is_text, to_path, to_text

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class ImageFile(NamedTuple):
    """An image file.

    Attributes:
        path: as it was given or found; the id of its document.
        real: without symbolic links, the same for every spelling of ``path``.
        size: in bytes.
        mtime_ns: time of the last change in nanoseconds.
    """

    path: str
    real: str
    size: int
    mtime_ns: int

    def meta(self) -> dict[str, Any]:
        """Returns the metadata of its document, by which the next run knows it."""
        found = {"file": to_text(self.real), "bytes": self.size, "mtime_ns": self.mtime_ns}
        return found if is_text(self.real) else {**found, "escaped": True}


class Found(NamedTuple):
    """The images to index, and the paths that are left out with the reason of each."""

    images: list[ImageFile]
    left_out: dict[str, str]


def find_images(paths: Sequence[str]) -> Found:
    """Lists image files, each once: files as given, and those below each folder in sorted order.

    A path that is no readable file or folder is left out with the reason.
    """
    images: dict[str, ImageFile] = {}
    left_out: dict[str, str] = {}
    for given in paths:
        for path in _below(given, left_out) if os.path.isdir(given) else [given]:
            try:
                status = os.stat(path)
            except OSError as error:
                left_out[path] = reason_of(error)
                continue
            if not stat.S_ISREG(status.st_mode):
                left_out[path] = "not a regular file"
                continue
            real = os.path.realpath(path)
            images.setdefault(real, ImageFile(path, real, status.st_size, status.st_mtime_ns))
    return Found(list(images.values()), left_out)


def _below(folder: str, left_out: dict[str, str]) -> list[str]:
    def unreadable(error: OSError) -> None:
        left_out[os.fspath(error.filename)] = reason_of(error)

    inside = os.walk(folder, onerror=unreadable)
    found = (os.path.join(at, name) for at, _, names in inside for name in names)
    return sorted(path for path in found if path.lower().endswith(SUFFIXES))


def reason_of(error: Exception) -> str:
    """Returns one line that says why a file could not be used."""
    if isinstance(error, FileNotFoundError):
        return "no such file or folder"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


def real_path(id: str, meta: dict[str, Any]) -> str:
    """Returns the real path of a document's image; of a document without record, that of its id."""
    file = meta.get("file")
    if not isinstance(file, str):
        return os.path.realpath(id)
    return to_path(file) if meta.get("escaped") else file


def is_gone(real: str, folders: Iterable[str]) -> bool:
    """Returns whether a file was deleted, if it is one of ``folders`` or below one; unreachable is not deleted."""
    if not any(real == folder or real.startswith(os.path.join(folder, "")) for folder in folders):
        return False
    try:
        os.stat(real)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False
