"""Pages of PDF files as Pillow images, rendered by pypdfium2 one at a time."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


class PdfPages(Sequence["Image"]):
    """The pages of a PDF file as RGB images, each rendered when it is asked for.

    Nothing of a page is kept, so the memory does not grow with the number of pages. One thread at a time: PDFium is not
    thread-safe.

    Args:
        path: the file; it stays open until `close` or the end of a ``with`` block.
        pixels: longer side of the images. 1600 is 145 dpi on A4, twice what the largest page encoders look at.

    Raises:
        ImportError: pypdfium2 is missing; names the extra to install.
        OSError: the file cannot be opened.
        ValueError: encrypted, damaged, or without pages.

    Example:
        >>> with PdfPages("report.pdf") as pages:
        ...     tokens = [encoder.encode(page).tokens for page in pages]
    """

    def __init__(self, path: str | os.PathLike[str], *, pixels: int = 1600):
        pdfium = _pypdfium2()
        if isinstance(pixels, bool) or not isinstance(pixels, int) or pixels < 1:
            raise ValueError(f"pixels must be an int >= 1, got {pixels!r}")
        self.path, self.pixels = os.fspath(path), pixels
        # says why a file cannot be opened, which PDFium does not
        open(path, "rb").close()
        self._document = _opened(pdfium, os.fsencode(path))

    def __len__(self) -> int:
        return len(self._document)

    def __getitem__(self, i: int) -> Image:  # type: ignore[override]
        """Renders page i, counted from 0.

        Raises:
            IndexError: no such page.
            ValueError: a damaged page.
        """
        index, n = operator.index(i), len(self)
        if not -n <= index < n:
            raise IndexError(f"page {index} of {n}")
        index %= n
        pdfium = _pypdfium2()
        try:
            page = self._document[index]
            try:
                # may exceed pixels by the rounding up of a side
                bitmap = page.render(scale=self.pixels / max(page.get_size()))
                image = bitmap.to_pil().convert("RGB")
                bitmap.close()
            finally:
                page.close()
        # ZeroDivisionError: a page without an area
        except (pdfium.PdfiumError, ZeroDivisionError) as error:
            raise ValueError(f"page {index + 1} is damaged: {error}") from error
        return image

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        self._document.close()

    def __enter__(self) -> PdfPages:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _opened(pdfium: Any, path: bytes) -> Any:
    """A ``PdfDocument``; its own constructor expands "~", and reports no pages as the error of the call before."""
    raw = pdfium.raw
    document = raw.FPDF_LoadDocument(path + b"\0", None)
    if not document:
        error = raw.FPDF_GetLastError()
        if error == raw.FPDF_ERR_PASSWORD:
            raise ValueError("encrypted: needs a password")
        reasons = {raw.FPDF_ERR_FORMAT: "damaged, or no PDF", raw.FPDF_ERR_SECURITY: "unknown encryption"}
        raise ValueError(f"not a readable PDF: {reasons.get(error, f'PDFium error {error}')}")
    if raw.FPDF_GetPageCount(document) < 1:
        raw.FPDF_CloseDocument(document)
        raise ValueError("a PDF without pages")
    return pdfium.PdfDocument(document)


def _pypdfium2() -> Any:
    try:
        import pypdfium2
    except ImportError as error:
        raise ImportError('reading PDF files needs pypdfium2: pip install "latemax[docs]"') from error
    return pypdfium2
