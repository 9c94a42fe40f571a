"""The images of ``latemax index``, files and pages of PDF files: which there are, and how they are opened."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from latemax.encoders.images import load_image
from latemax.encoders.pdf import PdfPages
from latemax.encoders.records import file_of, page_of, record, to_text

if TYPE_CHECKING:
    from PIL.Image import Image

PDF = ".pdf"
# between the path of a PDF and a number, as PDF viewers take it
PAGE = "#page="
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", PDF, ".png", ".tif", ".tiff", ".webp")


class Place(NamedTuple):
    """What an image is known by.

    Attributes:
        real: path of its file without symbolic links, the same for every spelling.
        page: page of a PDF, counted from 1; None is an image file.
    """

    real: str
    page: int | None


class ImageFile(NamedTuple):
    """An image file, or a page of a PDF file.

    Attributes:
        path: of the file as it was given or found.
        place: what the image is known by.
        size: of the file in bytes.
        mtime_ns: time of the file's last change in nanoseconds.
    """

    path: str
    place: Place
    size: int
    mtime_ns: int

    @property
    def name(self) -> str:
        """The path, of a page with ``#page=N``; the id of the document before escaping."""
        return self.path if self.place.page is None else f"{self.path}{PAGE}{self.place.page}"

    @property
    def id(self) -> str:
        """The id of the document."""
        return to_text(self.name)

    def meta(self) -> dict[str, Any]:
        """Returns the metadata of its document, by which the next run knows it."""
        return record(*self.place, self.size, self.mtime_ns)


class Found(NamedTuple):
    """The images to index, and the paths that are left out with the reason of each."""

    images: list[ImageFile]
    left_out: dict[str, str]


def find_images(paths: Sequence[str]) -> Found:
    """Lists images, each once: files as given, those below each folder in sorted order, PDF files page by page.

    A path that is no readable file or folder is left out with the reason, as is a PDF that cannot be opened.

    Raises:
        ImportError: there is a PDF, and pypdfium2 is missing.
    """
    images: dict[Place, ImageFile] = {}
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
            # its first page is there if and only if all are
            if Place(real, None) in images or Place(real, 1) in images:
                continue
            pages: Iterable[int | None] = (None,)
            if path.lower().endswith(PDF):
                try:
                    with PdfPages(path) as pdf:
                        pages = range(1, len(pdf) + 1)
                except (OSError, ValueError) as error:
                    left_out[path] = reason_of(error)
                    continue
            for page in pages:
                place = Place(real, page)
                images[place] = ImageFile(path, place, status.st_size, status.st_mtime_ns)
    return Found(list(images.values()), left_out)


def _below(folder: str, left_out: dict[str, str]) -> list[str]:
    def unreadable(error: OSError) -> None:
        left_out[os.fspath(error.filename)] = reason_of(error)

    inside = os.walk(folder, onerror=unreadable)
    found = (os.path.join(at, name) for at, _, names in inside for name in names)
    return sorted(path for path in found if path.lower().endswith(SUFFIXES))


class Opener:
    """Opens images; a PDF stays open until an image of another file is asked for."""

    def __init__(self) -> None:
        self._path = ""
        self._pages: PdfPages | None = None

    def open(self, image: ImageFile) -> Image:
        """Returns the image, upright and RGB.

        Raises:
            Exception: a damaged file can raise anything: struct.error, KeyError, OverflowError, MemoryError, …
        """
        page = image.place.page
        if self._pages is not None and (page is None or self._path != image.path):
            self.close()
        if page is None:
            return load_image(image.path)
        if self._pages is None:
            self._path, self._pages = image.path, PdfPages(image.path)
        return self._pages[page - 1]

    def close(self) -> None:
        """Closes the PDF."""
        if self._pages is not None:
            self._pages.close()
        self._pages = None


def open_image(name: str) -> Image:
    """Opens an image file, or a page of a PDF file by the name that `index` gives it, ``report.pdf#page=3``.

    Returns:
        The image, upright and RGB.

    Raises:
        ImportError: a PDF, and pypdfium2 is missing.
        FileNotFoundError: no such file.
        ValueError: no readable image; a PDF that cannot be read, has no such page, or is named without a page.
    """
    path, mark, page = name.rpartition(PAGE)
    if not mark or os.path.exists(name):
        path, page = name, ""
    if not path.lower().endswith(PDF):
        return load_image(name, "--image")
    if not os.path.exists(path):
        raise FileNotFoundError(f"--image {path}: no such file")
    try:
        with PdfPages(path) as pages:
            if not (page.isdecimal() and 1 <= int(page) <= len(pages)):
                raise ValueError(f"name a page of it, #page=1 to #page={len(pages)}")
            return pages[int(page) - 1]
    except ValueError as error:
        raise ValueError(f"--image {name}: {error}") from error


def reason_of(error: Exception) -> str:
    """Returns one line that says why a file could not be used."""
    if isinstance(error, FileNotFoundError):
        return "no such file or folder"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


def place_of(id: str, meta: dict[str, Any]) -> Place:
    """Returns the place of a document's image; of a document without record, that of its id."""
    return Place(file_of(meta) or os.path.realpath(id), page_of(meta))


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
