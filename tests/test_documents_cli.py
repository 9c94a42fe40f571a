"""Pages of PDF files as images: ``PdfPages``, and ``latemax index`` with PDF files among its paths."""

import json
import os
import random
import subprocess
import sys
import weakref

import pytest
import torch
from pdf_files import box, pdf, words

from latemax import PatchEncoder, PatchStore, cli
from latemax.cli import files
from latemax.encoders import PdfPages
from latemax.encoders.records import picture_of

pypdfium2 = pytest.importorskip("pypdfium2", reason="PDF files are read with pypdfium2")
pytest.importorskip("PIL", reason="pages are Pillow images")
pytest.importorskip("safetensors", reason="stores are written with safetensors")

RED, BLUE = "1 0 0", "0 0 1"


class Tokens(torch.nn.Module):
    """The mean colours of the 4 x 4 parts of an image, which say where a page is red and where it is blue."""

    def forward(self, pixels):
        return torch.nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(2).transpose(1, 2), (4, 4)


@pytest.fixture
def indexed(tmp_path, monkeypatch, capsys):
    """Runs ``latemax index --json`` with an encoder of colours; returns (status, summary, stderr)."""

    def preprocess(image):
        data = torch.frombuffer(bytearray(image.resize((16, 16), 0).tobytes()), dtype=torch.uint8)
        return data.view(16, 16, 3).permute(2, 0, 1) / 255

    encoder = PatchEncoder(Tokens(), n_prefix=0, preprocess=preprocess, normalize=False)
    monkeypatch.setattr(PatchEncoder, "from_pretrained", classmethod(lambda cls, name, **options: encoder))

    def run(*paths, options=()):
        argv = ["index", *map(str, paths), "--model", "timm:colours", "-o", str(tmp_path / "store"), "--json", *options]
        status = cli.main(argv)
        said = capsys.readouterr()
        return status, json.loads(said.out) if said.out else None, said.err

    return run


@pytest.fixture
def report(tmp_path):
    """A red page, an empty page, and a page with a blue lower half."""
    path = tmp_path / "report.pdf"
    path.write_bytes(pdf([box(RED, 0, 0, 600, 800), "", box(BLUE, 0, 0, 600, 400)]))
    return path


class TestPdfPages:
    def test_pages_are_images(self, report):
        with PdfPages(report) as pages:
            assert len(pages) == 3 and [page.size for page in pages] == [(1200, 1600)] * 3
            assert pages[0].mode == "RGB" and pages[0].getpixel((600, 800)) == (255, 0, 0)
            assert pages[-1].getpixel((600, 700)) == (255, 255, 255) and pages[-1].getpixel((600, 900)) == (0, 0, 255)
            with pytest.raises(IndexError, match="page 3 of 3"):
                pages[3]
        with PdfPages(report, pixels=40) as pages:
            assert pages[1].size == (30, 40)

    @pytest.mark.parametrize("size", [(1, 14400), (0, 0), (-5, -5), (1e-5, 1e-5), (2, 1e30)])
    def test_no_page_size_is_too_much(self, size, tmp_path):
        (tmp_path / "odd.pdf").write_bytes(pdf([words("odd")], size))
        with PdfPages(tmp_path / "odd.pdf") as pages:
            assert max(pages[0].size) == 1600

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            pytest.param(pdf([words("secret")], encrypted=True), "encrypted: needs a password", id="encrypted"),
            pytest.param(pdf([]), "a PDF without pages", id="no-page"),
            pytest.param(pdf([words("cut")])[:300], "not a readable PDF: damaged, or no PDF", id="cut"),
            pytest.param(b"", "not a readable PDF", id="empty"),
            pytest.param(random.Random(0).randbytes(3000), "not a readable PDF", id="noise"),
        ],
    )
    def test_what_cannot_be_read_says_why(self, data, reason, tmp_path):
        (tmp_path / "bad.pdf").write_bytes(data)
        with pytest.raises(ValueError, match=f"^{reason}"):
            PdfPages(tmp_path / "bad.pdf")

    def test_wrong_arguments(self, report, tmp_path):
        with pytest.raises(FileNotFoundError):
            PdfPages(tmp_path / "nowhere.pdf")
        with pytest.raises(ValueError, match="pixels must be an int >= 1, got 0"):
            PdfPages(report, pixels=0)


def test_each_page_is_a_document(indexed, report, tmp_path):
    (tmp_path / "scans").mkdir()
    with PdfPages(report, pixels=64) as pages:
        pages[2].save(tmp_path / "scans" / "a.png")
    (tmp_path / "scans" / "b.PDF").write_bytes(pdf([words("b")]))
    status, done, _ = indexed(report, tmp_path / "scans", options=["--batch-size", "3"])
    assert status == 0 and done["indexed"] == done["documents"] == 5 and not done["left_out"]
    store = PatchStore(tmp_path / "store")
    scans = tmp_path / "scans"
    assert store.ids == [*(f"{report}#page={n}" for n in (1, 2, 3)), f"{scans}/a.png", f"{scans}/b.PDF#page=1"]
    assert store.grid(2) == (4, 4) and store[0].tolist() == [[1, 0, 0]] * 16
    assert store[2].tolist() == [[1, 1, 1]] * 8 + [[0, 0, 1]] * 8
    # the source of thumbnails
    meta = store.document_meta(2)
    assert meta["page"] == 3 and meta["file"] == os.path.realpath(report)
    assert picture_of(meta).getpixel((600, 900)) == (0, 0, 255) and picture_of(store.document_meta(3)).size == (48, 64)
    status, done, _ = indexed(report, tmp_path / "scans")
    assert (status, done["indexed"], done["already"]) == (0, 0, 5)


def test_a_changed_pdf_is_encoded_again_and_pages_it_lost_are_pruned(indexed, report, tmp_path):
    indexed(report)
    report.write_bytes(pdf([box(BLUE, 0, 0, 600, 800), ""]))
    status, done, _ = indexed(report)
    assert (status, done["replaced"], done["deleted"], done["documents"]) == (0, 2, 1, 3)
    assert PatchStore(tmp_path / "store")[0].tolist() == [[0, 0, 1]] * 16
    _, done, _ = indexed(report, options=["--prune"])
    assert (done["already"], done["removed"], done["documents"]) == (2, 1, 2)
    # unreadable now: the earlier tokens stay; deleted: pruned
    report.write_bytes(b"")
    status, done, said = indexed(tmp_path, options=["--prune"])
    assert status == 1 and done["documents"] == 2 and f"left out: {report}: not a readable PDF" in said
    report.unlink()
    status, done, _ = indexed(report, options=["--prune"])
    assert (status, done["removed"], done["documents"]) == (0, 2, 0)


def test_pages_of_a_pdf_that_changed_are_not_shown(indexed, report, tmp_path):
    indexed(report)
    meta = PatchStore(tmp_path / "store").document_meta(0)
    report.write_bytes(pdf([""]))
    with pytest.raises(ValueError, match="the file changed since it was indexed"):
        picture_of(meta)
    with pytest.raises(ValueError, match="no record of its file"):
        picture_of({})


def test_bad_files_are_named_and_left_out(indexed, report, tmp_path):
    broken = pdf([words("one"), words("two"), words("three")]).replace(b"/Type /Page /Parent 2 0 R", b"/Type 7", 1)
    bad = {"cut": pdf([""])[:200], "empty": b"", "encrypted": pdf([""], encrypted=True), "no-page": pdf([])}
    (tmp_path / "bad").mkdir()
    for name, data in bad.items():
        (tmp_path / "bad" / f"{name}.pdf").write_bytes(data)
    lying = tmp_path / "bad" / "lying.pdf"
    lying.write_bytes(broken.replace(b"/Count 3", b"/Count 4"))
    status, done, said = indexed(tmp_path / "bad", report)
    left_out = {os.path.basename(entry["path"]): entry["reason"] for entry in done["left_out"]}
    assert status == 3 and left_out.keys() >= {*(f"{name}.pdf" for name in bad), "lying.pdf#page=4"}
    assert left_out["encrypted.pdf"] == "encrypted: needs a password"
    assert left_out["no-page.pdf"] == "a PDF without pages"
    assert left_out["lying.pdf#page=4"].startswith("page 4 is damaged")
    assert said.count("latemax index: left out: ") == len(left_out)
    assert done["indexed"] == done["documents"] == 3 + 4 - len(left_out.keys() - {f"{name}.pdf" for name in bad})
    # nothing else: no image
    status, _, said = indexed(tmp_path / "bad" / "no-page.pdf")
    assert status == 1 and "left out" in said and said.splitlines()[-1].startswith("latemax index: no image (.bmp")


def test_random_damage_ends_no_run(indexed, report, tmp_path):
    generator, whole = random.Random(0), report.read_bytes()
    for number in range(60):
        data = bytearray(whole)
        for _ in range(generator.choice((1, 10, 40))):
            data[generator.randrange(len(data))] = generator.randrange(256)
        (tmp_path / f"damaged-{number}.pdf").write_bytes(data)
    status, done, said = indexed(tmp_path)
    assert status == 3 and done["documents"] >= 3
    assert f"{report}#page=1" in PatchStore(tmp_path / "store").ids
    assert said.count("latemax index: left out: ") == len(done["left_out"])
    assert len(said.splitlines()) == 1 + len(done["left_out"]) and said.startswith("latemax: loading ")


def test_a_long_pdf_is_streamed(indexed, tmp_path, monkeypatch):
    """One file is opened twice, to count and to render, and never more than a batch of its pages is in memory."""
    n, alive, most, opened = 120, [], [], []

    class Counted(PdfPages):
        def __init__(self, path):
            opened.append(path)
            super().__init__(path, pixels=16)

        def __getitem__(self, i):
            image = super().__getitem__(i)
            alive[:] = [ref for ref in alive if ref() is not None]
            alive.append(weakref.ref(image))
            most.append(len(alive))
            return image

    monkeypatch.setattr(files, "PdfPages", Counted)
    (tmp_path / "long.pdf").write_bytes(pdf([words(str(i)) for i in range(n)]))
    status, done, _ = indexed(tmp_path / "long.pdf", options=["--batch-size", "8"])
    assert (status, done["indexed"]) == (0, n) and len(opened) == 2
    # the batch before is let go when the next has been encoded
    assert max(most) <= 16


def test_names_of_any_bytes(indexed, report, tmp_path):
    odd = os.fsencode(tmp_path) + b"/~latin \xe9 #1.pdf"
    os.rename(report, odd)
    status, _, _ = indexed(os.fsdecode(odd))
    store = PatchStore(tmp_path / "store")
    assert status == 0 and store.ids[2].endswith("/~latin \\xe9 #1.pdf#page=3")
    assert picture_of(store.document_meta(0)).getpixel((0, 0)) == (255, 0, 0)
    assert indexed(os.fsdecode(odd))[1]["already"] == 3


def test_a_page_is_a_query(indexed, report, tmp_path, capsys):
    indexed(report)

    def search(name):
        status = cli.main(["search", str(tmp_path / "store"), "--image", f"{report}{name}", "--normalize", "--json"])
        said = capsys.readouterr()
        return json.loads(said.out) if status == 0 else said.err

    for page in (1, 3):
        found = search(f"#page={page}")
        assert found["query"] == f"{report}#page={page}" and found["results"][0][0]["id"].endswith(f"#page={page}")
    for name in ("", "#page=0", "#page=4", "#page=-1", "#page=x"):
        assert search(name) == f"latemax search: --image {report}{name}: name a page of it, #page=1 to #page=3\n"
    assert search(".pdf#page=1") == f"latemax search: --image {report}.pdf: no such file\n"
    report.write_bytes(pdf([""], encrypted=True))
    assert search("#page=1") == f"latemax search: --image {report}#page=1: encrypted: needs a password\n"


def test_without_pypdfium2_the_extra_is_named(indexed, report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    status, _, said = indexed(report)
    assert status == 1 and said == 'latemax index: reading PDF files needs pypdfium2: pip install "latemax[docs]"\n'
    assert not (tmp_path / "store").exists()


def test_pypdfium2_is_loaded_only_for_a_pdf(tmp_path):
    program = (
        "import sys, latemax.cli.index, latemax.cli.search; "
        "latemax.cli.index.find_images([sys.argv[1]]); assert 'pypdfium2' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)


def test_the_remaining_time_is_said_if_it_is_long(capsys):
    from latemax.cli.index import say_how_long

    for images, each in ((10, 0.1), (500, 0.1), (1000, 1.0), (10_000, 2.0)):
        say_how_long(images, each)
    said = capsys.readouterr().err
    assert said.count("\n") == 3 and "500 more images, about 50 s" in said and "about 17 min" in said
    assert "about 5.6 h at the rate of the first batch" in said
