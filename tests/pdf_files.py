"""Small PDF files, written by hand: pages of text or of any content, whole, encrypted or damaged."""

from collections.abc import Sequence


def words(text: str, x: int = 40, y: int = 400, size: int = 60) -> str:
    """Content of a page: text in Helvetica."""
    return f"BT /F1 {size} Tf {x} {y} Td ({text}) Tj ET"


def box(color: str, left: float, bottom: float, width: float, height: float) -> str:
    """Content of a page: a filled rectangle; color is three numbers in 0..1."""
    return f"{color} rg {left} {bottom} {width} {height} re f"


def pdf(pages: Sequence[str], size: tuple[float, float] = (600, 800), *, encrypted: bool = False) -> bytes:
    """A PDF of these contents of pages; encrypted: with keys that no password fits."""
    catalog, font = "<< /Type /Catalog /Pages 2 0 R >>", "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
    objects, kids = [catalog, "", font], []
    for content in pages:
        objects.append(f"<< /Length {len(content)} >>\nstream\n{content}\nendstream")
        kids.append(f"{len(objects) + 1} 0 R")
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {size[0]} {size[1]}] /Contents {len(objects)} 0 R "
            f"/Resources << /Font << /F1 3 0 R >> >> >>"
        )
    objects[1] = f"<< /Type /Pages /Count {len(kids)} /Kids [{' '.join(kids)}] >>"
    out, places = "%PDF-1.4\n", []
    for number, text in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n{text}\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    secret = f"/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <{'a1' * 32}> /U <{'b2' * 32}> >> /ID [<01> <01>]"
    trailer = f"<< /Size {len(objects) + 1} /Root 1 0 R {secret if encrypted else ''} >>"
    start = len(out)
    out += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer\n{trailer}\nstartxref\n{start}\n%%EOF\n"
    return out.encode("latin-1")
