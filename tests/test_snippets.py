"""The Python blocks of README.md and docs/ run as they are, page by page, one after the other in one namespace.

A block after the comment ``<!-- not run: reason -->`` is left out, and the test counts those. Models of a hub are
replaced by tiny random ones, and each page gets the names that its blocks take from the reader.
"""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", reason="the pages encode images")
pytest.importorskip("PIL", reason="the pages open images")
pytest.importorskip("pypdfium2", reason="docs/documents.md opens a PDF file")
pytest.importorskip("safetensors", reason="the pages write stores")

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"^(?P<skip><!-- not run: (?P<why>.+?) -->\n)?```python\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL
)
BLOCKS = {page: list(FENCE.finditer(page.read_text())) for page in PAGES}
WITH_BLOCKS = [page for page in PAGES if BLOCKS[page]]
# blocks of all pages that run, and that do not
RUN, NOT_RUN = 23, 2


def tokens(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape, 16, generator=torch.Generator().manual_seed(0)), dim=-1)


def tiny_vit():
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16
    )
    return ViTModel(config, add_pooling_layer=False).eval()


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """The folder, models and names of someone who follows a page."""
    from pdf_files import pdf, words
    from PIL import Image

    import latemax.compat
    from latemax import PatchEncoder

    handles, patch = [], latemax.compat.patch
    monkeypatch.setattr(latemax.compat, "patch", lambda host: handles.append(patch(host)) or handles[-1])
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for name in ("a.jpg", "b.png", "crop.jpg", "page-1.png", "page-2.png", "photo.jpg"):
        Image.effect_noise((60, 40), 90).convert("RGB").save(name)
    Path("report.pdf").write_bytes(
        pdf([words(text) for text in ("total revenue", "costs", "people", "plans", "risks")])
    )
    monkeypatch.setattr(PatchEncoder, "from_pretrained", lambda name, **options: PatchEncoder(tiny_vit(), **options))
    monkeypatch.setattr("latemax.Retriever.from_pretrained", tiny_retriever)
    yield
    for handle in handles:
        handle.undo()


def tiny_retriever(name):
    import retriever_models

    import latemax

    return latemax.Retriever(*retriever_models.FAMILIES["ColQwen2"].build(), model_id=name)


def names_of_the_readme():
    from PIL import Image

    images = [Image.new("RGB", (40, 50), color) for color in ("red", "blue")]
    batches = [(images, torch.nn.functional.normalize(torch.randn(2, 3, 128), dim=-1))]
    return dict(
        query_tokens=tokens(5), page_tokens=tokens(4, 7), names=["a.jpg", "b.png"], tokens_of_photos=[tokens(7)] * 2,
        batches=batches,
    )  # fmt: skip


def names_of_scoring():
    q, d = tokens(3, 5).requires_grad_(), tokens(3, 7).requires_grad_()
    return dict(
        q=q, d=d,
        q_mask=torch.ones(3, 5), d_mask=torch.ones(3, 7), q_flat=tokens(9), d_flat=tokens(12),
        cu_seqlens_q=torch.tensor([0, 4, 9]), cu_seqlens_d=torch.tensor([0, 7, 12]), tokens=tokens(12),
        offsets=torch.tensor([0, 7, 12]), candidates=torch.tensor([[0, 1], [1, 0], [1, -1]]),
        found=torch.tensor([1, 0]), asked=torch.tensor([2, 2]), idf=torch.rand(3, 5),
    )  # fmt: skip


def names_of_the_corpus():
    from latemax import Lemur, PatchStore, StoreWriter, first_stage_recall, topk, two_stage

    with StoreWriter("pages", dtype=torch.float16) as writer:
        for i in range(502):
            if i != 1:
                writer.add(tokens(4).half(), f"page-{i}", meta={"year": 2024})
    return dict(
        StoreWriter=StoreWriter, PatchStore=PatchStore, topk=topk, Lemur=Lemur, two_stage=two_stage,
        first_stage_recall=first_stage_recall, tokens=tokens(256).half(),
        other_tokens=tokens(256).half(), q=tokens(1, 3),
    )  # fmt: skip


def names_of_the_encoders():
    from PIL import Image

    from latemax import PatchEncoder

    return dict(
        PatchEncoder=PatchEncoder, model=tiny_vit(), fresh_model=tiny_vit(), loss_of=lambda tokens: tokens.sum(),
        hub_dino=SimpleNamespace(forward_features=None), images=[Image.new("RGB", (40, 50))],
    )  # fmt: skip


# what a page prints, in part
PRINTED = {"README.md": "a.jpg", "concepts.md": "0.0 -0.5", "documents.md": "report.pdf#page="}
NAMES = {
    "README.md": names_of_the_readme,
    "score.md": names_of_scoring,
    "corpus.md": names_of_the_corpus,
    "encoders.md": names_of_the_encoders,
    "compression.md": lambda: dict(query_tokens=tokens(2, 3), page_tokens=tokens(4, 7)),
    "why-drop-cls.md": lambda: dict(images=["a.jpg", "b.png"], query_tokens=tokens(1, 3)),
}


def run(page):
    namespace = {"torch": torch, **NAMES.get(page.name, dict)()}
    for block in BLOCKS[page]:
        if not block["skip"]:
            line = page.read_text().count("\n", 0, block.start("code"))
            exec(compile("\n" * line + block["code"], str(page), "exec"), namespace)


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(page, reader, capsys):
    run(page)
    printed = capsys.readouterr().out
    assert PRINTED.get(page.name, "") in printed


def test_few_blocks_are_left_out():
    blocks = [block for page in PAGES for block in BLOCKS[page]]
    left_out = [block["why"] for block in blocks if block["skip"]]
    fences = sum(len(re.findall(r"^ *```python", page.read_text(), re.MULTILINE)) for page in PAGES)
    assert len(blocks) == fences and len(blocks) - len(left_out) >= RUN and len(left_out) <= NOT_RUN, left_out
