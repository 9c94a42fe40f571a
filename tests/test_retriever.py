"""Retrievers give the tokens that their own library scores, and know where in the image each token is."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import retriever_models
import torch
from PIL import Image

import latemax
from latemax import Retriever, maxsim
from latemax.encoders.layouts import layout_of

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
if not hasattr(transformers, "NeoMMEForRetrieval"):
    pytest.skip("this transformers has not all of the retrievers", allow_module_level=True)
pytest.importorskip("tokenizers", reason="tokenizers is not installed")
torch.set_num_threads(1)
FAMILIES = retriever_models.FAMILIES
QUERIES = ["a dog on a sofa", "revenue", ""]
SIZES = ((64, 32), (30, 70), (40, 40))
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    row = FAMILIES[request.param]
    if request.param == "NeoMME":
        pytest.importorskip("torchvision", reason="NeoMME's image processor needs torchvision")
    model, processor = row.build()
    return row, Retriever(model, processor), model, processor


def scored(found):
    return [tokens[mask] for tokens, mask in zip(found.tokens, found.mask, strict=True)]


def test_tokens_and_scores_are_the_hosts(family):
    _, retriever, model, processor = family
    images = retriever_models.images(*SIZES)
    pages = retriever.encode_images(images, batch_size=3)
    queries = retriever.encode_queries(QUERIES)
    d, q = (
        retriever_models.host_tokens(model, retriever_models.host_inputs(model, processor, images=images)),
        retriever_models.host_tokens(model, retriever_models.host_inputs(model, processor, texts=QUERIES)),
    )
    for ours, theirs in ((scored(pages), d), (scored(queries), q)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    scores = maxsim(queries.tokens, pages.tokens, queries.mask, pages.mask)
    if hasattr(processor, "score_retrieval"):
        # One page at a time: the host pads with zeros, which may have the maximum.
        theirs = torch.cat([processor.score_retrieval(q, [page]) for page in d], 1)
        torch.testing.assert_close(scores, theirs, rtol=0, atol=1e-4)
    assert pages.space == queries.space == "retrieval"


def test_the_table_of_the_docs_is_fresh(family):
    name = next(name for name, row in FAMILIES.items() if row is family[0])
    *row, difference = retriever_models.cells(name)
    assert f"| {' | '.join(row)} |" in (ROOT / "docs" / "encoders.md").read_text() and float(difference) <= 1e-5


def test_a_token_does_not_depend_on_the_batch(family):
    _, retriever, *_ = family
    images = retriever_models.images(*SIZES)
    whole, single = (retriever.encode_images(images, batch_size=n) for n in (3, 1))
    torch.testing.assert_close(scored(whole), scored(single), rtol=0, atol=1e-5)
    assert torch.equal(whole.is_patch, single.is_patch) and whole.grid == single.grid
    whole, single = (retriever.encode_queries(QUERIES, batch_size=n) for n in (3, 1))
    torch.testing.assert_close(scored(whole), scored(single), rtol=0, atol=1e-5)


def test_patches_are_kept_with_their_places(family):
    row, retriever, *_ = family
    images = retriever_models.images(*SIZES[:2])
    everything = retriever.encode_images(images, batch_size=2)
    patches = retriever.encode_images(images, batch_size=2, keep="patches")
    assert patches.is_patch.equal(patches.mask) and everything.is_patch.sum() < everything.mask.sum()
    for i in range(2):
        at = everything.is_patch[i]
        torch.testing.assert_close(patches.tokens[i][patches.mask[i]], everything.tokens[i][at])
        assert torch.equal(patches.regions[i][patches.mask[i]], everything.regions[i][at])
        assert everything.regions[i][~at].isnan().all() and not everything.regions[i][at].isnan().any()
    grids = patches.grid if isinstance(patches.grid, list) else [patches.grid] * 2
    assert grids[0] == row.grid
    if row.grid is not None:
        rows, cols = row.grid
        corner = patches.regions[0][patches.mask[0]].view(rows, cols, 4)
        torch.testing.assert_close(corner[1, 2], torch.tensor([2 / cols, 1 / rows, 3 / cols, 2 / rows]))
        assert int(patches.mask[0].sum()) == rows * cols


def test_queries_know_the_words_of_their_pieces(family):
    _, retriever, *_ = family
    found = retriever.encode_queries(["a dog: sofa.", "revenue"])
    for i, words in enumerate((["a", "dog:", "sofa."], ["revenue"])):
        assert found.words[i] == words and len(found.pieces[i]) == int(found.mask[i].sum())
        for j, word in enumerate(words):
            mine = [piece for piece, at in zip(found.pieces[i], found.word_of[i].tolist(), strict=False) if at == j]
            assert "".join(mine).replace("Ġ", "") == word
    assert (found.word_of[1] == -1).any()


def mark(box, size=(64, 64)) -> Image.Image:
    """A white image with noise in ``box``, fractions of it."""
    pixels = np.full((size[1], size[0], 3), 255, np.uint8)
    left, top, right, bottom = (round(float(x) * side) for x, side in zip(box, (*size, *size), strict=True))
    noise = np.random.default_rng(1).integers(0, 200, (bottom - top, right - left, 3), dtype=np.uint8)
    pixels[top:bottom, left:right] = noise
    return Image.fromarray(pixels)


@pytest.mark.parametrize("name", ["ColPali", "ColQwen2", "ColModernVBert"])
def test_regions_are_where_the_vision_tower_looks(name, monkeypatch):
    """Noise in one corner changes the image features of the tokens there most, by the host's own order of them."""
    model, processor = FAMILIES[name].build()
    retriever = Retriever(model, processor)
    seen = []
    last = {"ColPali": "multi_modal_projector", "ColQwen2": "visual.merger", "ColModernVBert": "connector"}[name]
    hook = model.vlm.get_submodule(last).register_forward_hook(
        lambda module, args, out: seen.append(out.reshape(-1, out.shape[-1]))
    )
    try:
        box = (0.5, 0.25, 0.75, 0.5)
        blank = retriever.encode_images(mark((0, 0, 0, 0)), keep="patches")
        retriever.encode_images(mark(box), keep="patches")
    finally:
        hook.remove()
    change = (seen[1] - seen[0]).norm(dim=-1)
    regions = blank.regions[0]
    assert len(regions) == len(change)
    overlap = torch.minimum(regions[:, 2:], torch.tensor(box[2:])) - torch.maximum(
        regions[:, :2], torch.tensor(box[:2])
    )
    inside = (overlap > 1e-3).all(-1)
    area = (regions[:, 2] - regions[:, 0]) * (regions[:, 3] - regions[:, 1])
    # Tiles and the view of the whole image by themselves: their cells are of different sizes.
    for size in area.unique():
        change_in, change_out = change[inside & (area == size)], change[~inside & (area == size)]
        assert len(change_in) and change_in.min() > 1.2 * change_out.max(), (size, change_in, change_out)


def test_lora_reaches_the_vision_tower_alone(family):
    _, retriever, model, _ = family
    images = retriever_models.images(SIZES[0])
    before = retriever.encode_images(images).tokens
    lora = latemax.add_lora(retriever, rank=2)
    try:
        tower = (type(model).__name__ == "NeoMMEForRetrieval" and "model.layers") or "vlm.vis"
        assert lora.sites and all(site.startswith(tower) and "head" not in site for site in lora.sites)
        assert torch.equal(retriever.encode_images(images).tokens, before)
        with torch.no_grad():
            for name, parameter in lora.named_parameters():
                if name.endswith(".b"):
                    parameter.fill_(0.3)
        assert not torch.allclose(retriever.encode_images(images).tokens, before, atol=1e-3)
    finally:
        lora.remove()


def test_an_unknown_layout_is_refused():
    model, processor = FAMILIES["ColPali"].build()
    ids = torch.tensor([processor.image_token_id] * 15)
    with pytest.raises(ValueError, match="image 0 has 15 image tokens, but its square layout has 9"):
        layout_of(processor, ids, {}, 0, (32, 32))
    with pytest.raises(ValueError, match=r"keep must be one of \('all', 'patches'\), got 'text'"):
        Retriever(model, processor).encode_images(retriever_models.images(SIZES[0]), keep="text")
    with pytest.raises(TypeError, match="processor must be that of ColPaliForRetrieval"):
        Retriever(model, processor.tokenizer)
    with pytest.raises(ValueError, match="Linear is no retriever known here"):
        Retriever(torch.nn.Linear(2, 2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("colpali")
    model, processor = FAMILIES["ColPali"].build()
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def test_from_pretrained_is_silent_and_named(folder, capfd):
    from transformers import AutoProcessor

    model, _ = FAMILIES["ColPali"].build()
    # The saved one may resize by torchvision instead of Pillow.
    processor = AutoProcessor.from_pretrained(folder)
    capfd.readouterr()
    retriever = Retriever.from_pretrained(folder)
    images = retriever_models.images(*SIZES[:2])
    found, own = retriever.encode_images(images), Retriever(model, processor).encode_images(images)
    torch.testing.assert_close(found.tokens, own.tokens, rtol=0, atol=1e-5)
    assert found.model_id == retriever.encode_queries(["dog"]).model_id == str(folder)
    assert tuple(capfd.readouterr()) == ("", "")


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds an adapter of colpali-engine, no model; .* end in -hf"):
        Retriever.from_pretrained(tmp_path)


def test_weights_that_are_missing_are_named(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("embedding_proj_layer.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks 1 weights of ColPaliForRetrieval \(first: embedding_proj_layer.weight"
    ):
        Retriever.from_pretrained(tmp_path)


@pytest.mark.skipif(not importlib.util.find_spec("sentence_transformers"), reason="sentence-transformers is missing")
def test_a_multi_vector_encoder_gives_its_own_tokens(folder, tmp_path, capfd):
    from sentence_transformers import MultiVectorEncoder

    theirs = MultiVectorEncoder(str(folder), device="cpu")
    theirs.save_pretrained(str(tmp_path))
    capfd.readouterr()
    retriever = Retriever.from_pretrained(tmp_path)
    images = retriever_models.images(*SIZES[:2])
    pages, queries = retriever.encode_images(images), retriever.encode_queries(QUERIES)
    assert tuple(capfd.readouterr()) == ("", "")
    torch.testing.assert_close(scored(pages), [t.clone() for t in theirs.encode_document(images)], rtol=0, atol=1e-5)
    torch.testing.assert_close(scored(queries), [t.clone() for t in theirs.encode_query(QUERIES)], rtol=0, atol=1e-5)
    scores = maxsim(queries.tokens, pages.tokens, queries.mask, pages.mask)
    theirs_scores = theirs.similarity(scored(queries), scored(pages))
    torch.testing.assert_close(scores, theirs_scores, rtol=0, atol=1e-4)
    assert pages.grid == (4, 4) and int(pages.is_patch[0].sum()) == 16
    assert queries.word_of[0].max() == 4
    lora = latemax.add_lora(retriever)
    assert lora.sites and all(".vision_tower." in site for site in lora.sites)
    lora.remove()
    with pytest.raises(ValueError, match="processor must be None with a MultiVectorEncoder"):
        Retriever(theirs, theirs.processor)
