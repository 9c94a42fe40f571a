"""A text's tokens are the library's own hidden states, norm and projection at its word pieces."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from encoder_models import SHIMMED
from PIL import Image
from retriever_models import SHAPE, VISION, shaken, tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from latemax import PatchEncoder, Retriever, TextEncoder, maxsim
from latemax.encoders.pieces import align, place, word_spans

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("tokenizers", reason="tokenizers is not installed")
torch.set_num_threads(1)
TESTS = Path(__file__).parent
PREPARED = f"import sys; sys.path.insert(0, {str(TESTS)!r}); import torchvision_shim; torchvision_shim.install()\n"
LIMIT = 16
TEXTS = ["a Dog on a sofa", "revenue", "the region, of each"]


class Row(NamedTuple):
    """``reference(model, tokenizer, text)``: the library's own vectors of the pieces of one text, not normalised."""

    library: str
    build: Callable[[], tuple[nn.Module, Any]]
    reference: Callable[[Any, Any, str], Tensor]


def words(template: str, **options: Any) -> Any:
    """The tokenizer of retriever_models with a start and an end token where ``template`` has them."""
    from tokenizers import processors

    found = tokenizer()
    ids = [(name, found.convert_tokens_to_ids(name)) for name in ("<bos>", "<eos>")]
    found.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    for name, value in options.items():
        setattr(found, name, value)
    return found


def hf(model: str, config: str, tokens: Any, **options: Any) -> tuple[nn.Module, Any]:
    text = {**SHAPE, "vocab_size": 400, "max_position_embeddings": LIMIT, "bos_token_id": 1, "eos_token_id": 2}
    made = getattr(transformers, config)(text_config=text, vision_config=VISION, **options)
    torch.manual_seed(0)
    return shaken(getattr(transformers, model)(made)), tokens


def clip() -> tuple[nn.Module, Any]:
    return hf("CLIPModel", "CLIPConfig", words("<bos> $A <eos>"), projection_dim=24)


def clip_reference(model: Any, tokens: Any, text: str) -> Tensor:
    return model.text_projection(model.text_model(**tokens(text, return_tensors="pt")).last_hidden_state[0, 1:-1])


def siglip_reference(model: Any, tokens: Any, text: str) -> Tensor:
    inputs = tokens(text, padding="max_length", max_length=LIMIT, return_tensors="pt")
    hidden = model.text_model.head(model.text_model(**inputs).last_hidden_state[0])
    return hidden[inputs["input_ids"][0] > 2]


def siglip() -> tuple[nn.Module, Any]:
    return hf("SiglipModel", "SiglipConfig", words("$A <eos>", model_input_names=["input_ids"]))


def siglip2() -> tuple[nn.Module, Any]:
    names = ["input_ids", "attention_mask"]
    return hf("Siglip2Model", "Siglip2Config", words("$A <eos>", model_input_names=names, padding_side="left"))


def open_clip(kind: str) -> Callable[[], tuple[nn.Module, Any]]:
    def build() -> tuple[nn.Module, Any]:
        from open_clip import SimpleTokenizer, model

        vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 8}
        text = {"context_length": LIMIT, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2}
        torch.manual_seed(0)
        return shaken(getattr(model, kind)(24, vision, text)), SimpleTokenizer(context_length=LIMIT)

    return build


def open_clip_reference(model: Any, tokens: Any, text: str) -> Tensor:
    tower = getattr(model, "text", model)
    ids = tokens([text])
    if tower is model:
        out = model.forward_intermediates(text=ids, text_indices=1, normalize_intermediates=True)
    else:
        out = tower.forward_intermediates(ids, indices=1, normalize_intermediates=True, output_fmt="NLC")
    return (out["text_intermediates"][-1] @ tower.text_projection)[0, 1 : int(ids.argmax())]


def open_clip_hf() -> tuple[nn.Module, Any]:
    from open_clip.hf_model import HFTextEncoder
    from open_clip.tokenizer import HFTokenizer
    from transformers import BertConfig

    model, _ = open_clip("CustomTextCLIP")()
    config = BertConfig(**SHAPE, vocab_size=400, max_position_embeddings=LIMIT, pad_token_id=0)
    model.text = HFTextEncoder("", 24, config=config, pooler_type="mean_pooler", proj_type="mlp")
    wrapper = HFTokenizer.__new__(HFTokenizer)
    wrapper.tokenizer, wrapper.context_length, wrapper.clean_fn = words("<bos> $A <eos>"), LIMIT, str.strip
    wrapper.strip_sep_token, wrapper.tokenizer_mode = False, ""
    return shaken(model), wrapper


def open_clip_hf_reference(model: Any, tokens: Any, text: str) -> Tensor:
    ids = tokens([text])
    mask = (ids != 0).long()
    hidden = model.text.proj(model.text.transformer(input_ids=ids, attention_mask=mask).last_hidden_state)
    return hidden[0, 1 : int(mask.sum()) - 1]


ROWS = {
    "CLIP": Row("transformers", clip, clip_reference),
    "SigLIP": Row("transformers", siglip, siglip_reference),
    "SigLIP 2": Row("transformers", siglip2, siglip_reference),
    "open_clip CLIP": Row("open_clip", open_clip("CLIP"), open_clip_reference),
    "open_clip CustomTextCLIP": Row("open_clip", open_clip("CustomTextCLIP"), open_clip_reference),
    "open_clip with a text model of transformers": Row("open_clip", open_clip_hf, open_clip_hf_reference),
}


@pytest.fixture(scope="module", params=ROWS)
def case(request):
    row = ROWS[request.param]
    if row.library == "open_clip" and not (SHIMMED and importlib.util.find_spec("open_clip")):
        pytest.skip("open_clip is not installed")
    model, tokens = row.build()
    return row, model, tokens, TextEncoder(model, tokens)


def test_tokens_are_the_librarys_own(case):
    row, model, tokens, encoder = case
    found = encoder.encode(TEXTS)
    for i, text in enumerate(TEXTS):
        with torch.no_grad():
            expected = F.normalize(row.reference(model, tokens, text), dim=-1)
        assert int(found.mask[i].sum()) == len(expected) == len(found.pieces[i])
        torch.testing.assert_close(found.tokens[i][found.mask[i]], expected, rtol=0, atol=1e-5)
    assert found.tokens.dtype == torch.float32 and found.space == "text"
    assert (found.tokens[~found.mask] == 0).all() and (found.word_of[~found.mask] == -1).all()


def test_pieces_make_up_the_words(case):
    *_, encoder = case
    found = encoder.encode(TEXTS)
    for i, text in enumerate(TEXTS):
        assert found.words[i] == text.split()
        for j, word in enumerate(found.words[i]):
            mine = [piece for piece, at in zip(found.pieces[i], found.word_of[i].tolist(), strict=False) if at == j]
            assert "".join(mine).replace("Ġ", "") == word


def test_a_text_does_not_depend_on_the_batch(case):
    *_, encoder = case
    whole, single = encoder.encode(TEXTS), encoder.encode(TEXTS, batch_size=1)
    torch.testing.assert_close(whole.tokens, single.tokens, rtol=0, atol=1e-5)
    assert torch.equal(whole.word_of, single.word_of) and whole.pieces == single.pieces
    assert torch.equal(encoder.encode(TEXTS[1]).tokens[0], single.tokens[1, : int(single.mask[1].sum())])


def test_an_empty_text_scores_nothing(case):
    *_, encoder = case
    for texts in ([""], ["", "dog"]):
        found = encoder.encode(texts)
        assert not found.mask[0].any() and found.pieces[0] == [] and found.tokens.shape[1] >= 1
        assert (
            maxsim(found.tokens, torch.randn(2, 5, 24 if found.tokens.shape[-1] == 24 else 32), found.mask)[0]
            .eq(0)
            .all()
        )


def test_long_texts_are_refused_or_cut_as_asked(case, capfd):
    *_, encoder = case
    long = "revenue dog sofa " * 20
    with pytest.raises(
        ValueError, match=rf"texts\[2\] \('revenue dog .*has \d+ tokens .* the model holds {LIMIT}; .*truncate=True"
    ):
        encoder.encode(["a", "dog", long], batch_size=1)
    cut = encoder.encode(["a", long], truncate=True)
    assert LIMIT - 2 <= int(cut.mask[1].sum()) < LIMIT
    if "CLIP" in encoder.family and "Siglip" not in encoder.family:
        # A causal tower's first pieces do not know what was cut.
        short = encoder.encode("revenue dog")
        n = int(short.mask.sum()) if encoder.family != "open_clip CustomTextCLIP (bert)" else 0
        torch.testing.assert_close(cut.tokens[1, :n], short.tokens[0, :n], rtol=0, atol=1e-5)
    assert tuple(capfd.readouterr()) == ("", "")


def test_gradients_reach_the_tower(case):
    _, model, _, encoder = case
    encoder(["dog"]).tokens.sum().backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", ["CLIP", "open_clip CLIP"])
def test_texts_share_the_space_of_patches(name):
    row = ROWS[name]
    if row.library == "open_clip" and not (SHIMMED and importlib.util.find_spec("open_clip")):
        pytest.skip("open_clip is not installed")
    model, tokens = row.build()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8))
    retriever = Retriever(model, tokens, model_id="m")
    pages, queries = retriever.encode_images([image]), retriever.encode_queries(TEXTS)
    patches = PatchEncoder(model, projection="text").encode([image])
    torch.testing.assert_close(pages.tokens, patches.tokens)
    torch.testing.assert_close(queries.tokens, TextEncoder(model, tokens).encode(TEXTS).tokens)
    assert pages.space == queries.space == patches.space == "text" and pages.model_id == queries.model_id == "m"
    assert pages.is_patch.all() and pages.grid == (4, 4)
    # CLIP crops the middle of the image: its patches do not cover the top of this one.
    torch.testing.assert_close(
        pages.regions[0, 0], torch.tensor([0, 4 / 48, 1 / 4, 4 / 48 + 10 / 48]), atol=0.02, rtol=0
    )


@pytest.mark.parametrize("name", ["SigLIP", "SigLIP 2"])
def test_a_patch_of_siglip_is_pooled_alone(name):
    """What the model's own pooling head gives for an image of that one patch."""
    model, tokens = ROWS[name].build()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    pages = Retriever(model, tokens).encode_images([image])
    hidden = PatchEncoder(model, normalize=False).encode([image])
    with torch.no_grad():
        expected = [F.normalize(model.vision_model.head(token.view(1, 1, -1))[0], dim=0) for token in hidden.tokens[0]]
    torch.testing.assert_close(pages.tokens[0], torch.stack(expected), rtol=0, atol=1e-5)


def test_from_pretrained(tmp_path, capfd):
    model, tokens = clip()
    model.save_pretrained(tmp_path)
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPProcessor(images, tokens).save_pretrained(tmp_path)
    capfd.readouterr()
    # A process of its own: a library sets up its logging when it is imported.
    program = f"import latemax; latemax.TextEncoder.from_pretrained({str(tmp_path)!r}).encode(['dog'])"
    program = f"from latemax.encoders.quiet import quiet\nwith quiet(): {program}"
    done = subprocess.run([sys.executable, "-c", PREPARED + program], capture_output=True, text=True, cwd=TESTS.parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    found = TextEncoder.from_pretrained(tmp_path).encode(TEXTS)
    pair = Retriever.from_pretrained(tmp_path).encode_queries(TEXTS)
    torch.testing.assert_close(found.tokens, TextEncoder(model, tokens).encode(TEXTS).tokens)
    torch.testing.assert_close(pair.tokens, found.tokens)
    assert found.model_id == pair.model_id == str(tmp_path)
    assert tuple(capfd.readouterr()) == ("", "")


def test_bad_arguments():
    model, tokens = clip()
    encoder = TextEncoder(model, tokens)
    for texts, error, message in (
        ([], ValueError, "texts must hold at least one text"),
        (["a", 3], TypeError, "texts must be a str or a list of them, got int at 1"),
    ):
        with pytest.raises(error, match=message):
            encoder.encode(texts)
    with pytest.raises(ValueError, match="batch_size must be an int >= 1, got 0"):
        encoder.encode("a", batch_size=0)
    with pytest.raises(ValueError, match=r"projection must be 'auto', None or an nn.Module, got 'text'"):
        TextEncoder(model, tokens, projection="text")
    with pytest.raises(ValueError, match="this CLIPTextModel was loaded without"):
        TextEncoder(model.text_model, tokens)
    assert TextEncoder(model.text_model, tokens, projection=None).encode("dog").space == "hidden"
    with pytest.raises(ValueError, match="Linear has no text tower known here"):
        TextEncoder(nn.Linear(2, 2), tokens)
    with pytest.raises(TypeError, match="tokenizer must be one of transformers for CLIPModel, got str"):
        TextEncoder(model, "clip")


def test_pieces_are_placed_in_the_text_as_it_is_written():
    text = "  a Café\nnaïve  ☃!"
    spans = word_spans(text)
    found = align(text, ["a", "caf", "é", "na", "ïve", "?", "!"])
    assert [place(spans, text, a, b) for a, b in found] == [0, 1, 1, 2, 2, 3, 3]
    assert place([], "", 0, 0) == -1
