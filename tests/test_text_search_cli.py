"""``latemax index`` and ``latemax search --text`` with models that have a text side."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from latemax import PatchStore, StoreWriter, cli, maxsim

pytest.importorskip("transformers", reason="the models are those of transformers")
pytest.importorskip("safetensors", reason="stores are written with safetensors")
retriever_models = pytest.importorskip("retriever_models")
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i, photo in enumerate(retriever_models.images((60, 40), (50, 50), (40, 60))):
        photo.save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP with its tokenizer."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    words = retriever_models.tokenizer()
    text = {**retriever_models.SHAPE, "vocab_size": 400, "max_position_embeddings": 16, "eos_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config=retriever_models.VISION, projection_dim=24)
    folder = tmp_path_factory.mktemp("clip")
    retriever_models.shaken(CLIPModel(config)).save_pretrained(folder)
    size = {"shortest_edge": 32}, {"height": 32, "width": 32}
    CLIPProcessor(CLIPImageProcessor(size=size[0], crop_size=size[1]), words).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def colpali(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colpali")
    for part in retriever_models.colpali():
        part.save_pretrained(folder)
    return str(folder)


def run(capsys, *argv, status=0):
    assert cli.main([str(x) for x in argv]) == status
    said = capsys.readouterr()
    return json.loads(said.out) if not status else said.err


@pytest.mark.parametrize("kind", ["clip", "colpali"])
def test_words_find_images(kind, photos, tmp_path, capsys, request):
    from latemax import Retriever

    model, out = request.getfixturevalue(kind), tmp_path / "out.html"
    done = run(capsys, "index", photos, "--model", model, "-o", tmp_path / "store", "--dtype", "float32", "--json")
    assert done["indexed"] == 3
    store, retriever = PatchStore(tmp_path / "store"), Retriever.from_pretrained(model)
    assert store.meta == {"model": model, "size": None, "model_id": model, "space": retriever.space}
    assert (store.model_id, store.space) == (retriever.model_id, retriever.space)
    argv = ["search", tmp_path / "store", "--text", "a dog on a sofa", "--html", out, "--patches", "--json"]
    found = run(capsys, *argv)
    assert found["query"] == "a dog on a sofa"
    # the scores of the host's own tokens
    pages = retriever.encode_images([photos / f"{i}.png" for i in range(3)])
    queries = retriever.encode_queries(["a dog on a sofa"])
    expected = maxsim(queries.tokens, pages.tokens, queries.mask, pages.mask)[0]
    scores = torch.tensor([row["score"] for row in sorted(found["results"][0], key=lambda row: row["index"])])
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4 * queries.mask.sum().item())
    page = out.read_text(encoding="utf-8")
    assert all(f"<bdi>{word}</bdi>" in page for word in ("whole query", "a", "dog", "on", "sofa"))
    assert ("other tokens" in page) == (kind == "colpali") and page.count("data:image/jpeg") == 3
    if kind == "clip":
        assert store.grid(0) == (4, 4) and store.regions(0) is None
    else:
        # the text tokens of the image side are scored and have no place
        places = store.regions(0)
        assert store.grid(0) is None and int((~places.isnan().any(1)).sum()) == 16 < len(places)
        torch.testing.assert_close(places[:1], torch.tensor([[0, 0, 0.25, 0.25]]))
        boxes = [patch["box"] for patch in found["results"][0][0]["patches"]]
        assert any(box is not None for box in boxes)


def test_an_image_query_of_the_same_model(clip, photos, tmp_path, capsys):
    run(capsys, "index", photos, "--model", clip, "-o", tmp_path / "store", "--json", "--size", 64)
    found = run(capsys, "search", tmp_path / "store", "--image", photos / "1.png", "--html", tmp_path / "o", "--json")
    assert found["results"][0][0]["id"].endswith("1.png")
    assert PatchStore(tmp_path / "store").grid(0) == (8, 8)
    assert "Picture of the query" in (tmp_path / "o").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_the_pages_are_commands(page):
    from latemax.cli.main import _parser

    blocks = re.findall(r"^```(?:sh)?\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    commands = re.findall(r"^latemax (.*)$", "".join(blocks).replace("\\\n", " "), re.MULTILINE)
    for command in commands:
        _parser().parse_args(shlex.split(command, comments=True))
    assert commands or page.name != "documents.md"


def test_an_adapter_of_the_space_of_text(clip, photos, tmp_path, capsys):
    """Images through the adapted tower, texts through the model's own."""
    from latemax import PatchEncoder, TextEncoder, add_lora

    torch.manual_seed(0)
    encoder = PatchEncoder.from_pretrained(clip, projection="text")
    lora = add_lora(encoder, rank=2)
    for parameter in lora.parameters():
        torch.nn.init.normal_(parameter)
    lora.save(tmp_path / "lora.safetensors")
    options = ["--adapter", tmp_path / "lora.safetensors", "--dtype", "float32", "--json"]
    run(capsys, "index", photos, "--model", clip, "-o", tmp_path / "store", *options)
    assert PatchStore(tmp_path / "store").space == "text"
    found = run(capsys, "search", tmp_path / "store", "--text", "a dog", "--json")["results"][0]
    with torch.no_grad():
        pages = encoder.encode([photos / f"{i}.png" for i in range(3)])
    expected = maxsim(TextEncoder.from_pretrained(clip).encode(["a dog"]).tokens[0], pages.tokens)
    scores = torch.tensor([row["score"] for row in sorted(found, key=lambda row: row["index"])])
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)


def test_another_space_is_refused_with_both_names(photos, clip, tmp_path, capsys):
    with StoreWriter(tmp_path / "store", meta={"model": "some/vit", "size": None, "space": "patches"}) as writer:
        writer.add(torch.ones(2, 4, dtype=torch.float16), "a")
    said = run(capsys, "search", tmp_path / "store", "--text", "a dog", status=1)
    assert "holds tokens of the space 'patches' of some/vit, and --text makes tokens of the space 'text'" in said
    with StoreWriter(tmp_path / "plain") as writer:
        writer.add(torch.ones(2, 4), "a")
    assert "pass --tokens instead of --text" in run(capsys, "search", tmp_path / "plain", "--text", "a", status=1)


def test_a_store_without_a_space_keeps_its_patches(clip, photos, tmp_path, capsys):
    """As before spaces were recorded: plain patch tokens of 32 features, not the 24 of the space of text."""
    StoreWriter(tmp_path / "store", dtype=torch.float16, meta={"model": clip, "size": None}).close()
    run(capsys, "index", photos, "--model", clip, "-o", tmp_path / "store", "--json")
    store = PatchStore(tmp_path / "store")
    assert store.dim == 32 and "space" not in store.meta
    found = run(capsys, "search", tmp_path / "store", "--image", photos / "1.png", "--json")
    assert found["results"][0][0]["id"].endswith("1.png")
    said = run(capsys, "search", tmp_path / "store", "--text", "a dog", status=1)
    assert "holds tokens of the space 'patches'" in said


@pytest.mark.parametrize("text", ["", "  "])
def test_a_text_without_a_word(text, tmp_path, capsys):
    with StoreWriter(tmp_path / "store") as writer:
        writer.add(torch.ones(2, 4), "a")
    said = run(capsys, "search", tmp_path / "store", "--text", text, status=1)
    assert said.splitlines()[-1] == f"latemax search: --text must have a word, got {text!r}"


def test_a_retriever_takes_no_size(colpali, photos, tmp_path, capsys):
    said = run(
        capsys, "index", photos, "--model", colpali, "-o", tmp_path / "store", "--size", 64, "--json", status=1
    )  # fmt: skip
    assert said.splitlines()[-1].endswith("chooses the size of its images itself")
