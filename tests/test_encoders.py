"""Every encoder family: right tokens, right prefix, right grid, right norm, no head, and the library's own values."""

from __future__ import annotations

import copy

import pytest
import torch
from encoder_models import (
    NAFLEX_GRIDS,
    ROWS,
    compare,
    image_vector,
    poison_heads,
    siglip2_inputs,
    table,
    timm_naflex_inputs,
)
from torch import nn

from latemax.encoders import PatchEncoder

torch.set_num_threads(1)


def row_id(row):
    return f"{row.library}-{row.name.replace(', ', '-').replace(' ', '_')}"


def named(name, library):
    return next(row for row in ROWS if row.name == name and row.library == library)


@pytest.fixture(params=ROWS, ids=row_id)
def row(request):
    if request.param.missing:
        pytest.skip(request.param.missing)
    return request.param


def need(name, library):
    row = named(name, library)
    if row.missing:
        pytest.skip(row.missing)
    return row


def test_tokens_are_the_librarys_patch_tokens(row):
    out, diff = compare(row)
    assert diff <= 1e-5
    assert out.tokens.isfinite().all()
    assert out.tokens.std() > 1e-3
    assert out.tokens.shape[1] + row.n_prefix == row.tokens_in
    assert out.grid == row.grid
    assert out.mask.dtype == torch.bool and out.mask.shape == out.tokens.shape[:2]
    assert out.prefix is None


def test_prefix_and_norm_are_found(row):
    model, inputs = row.make()
    enc = PatchEncoder(model, normalize=False)
    assert (enc.n_prefix, enc.norm_name) == (row.n_prefix, row.norm)
    bare = PatchEncoder(model, normalize=False, final_norm=None)
    assert bare.norm_name == "none"
    with torch.no_grad():
        out, raw = enc(inputs, return_prefix=True), bare(inputs, return_prefix=True)
        assert out.prefix.shape == (2, row.n_prefix, out.tokens.shape[2])
        assert not torch.allclose(out.tokens, raw.tokens, atol=1e-3)
        torch.testing.assert_close(enc.adapter.norm(raw.tokens)[out.mask], out.tokens[out.mask], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(enc.adapter.norm(raw.prefix), out.prefix, atol=1e-5, rtol=1e-5)


def test_no_head_or_pooler_runs(row):
    model, inputs = row.make()
    with torch.no_grad():
        clean = PatchEncoder(model)(inputs).tokens
        if poison_heads(model):
            # The poison works: the library's own way to an image vector trips over it.
            with pytest.raises(AssertionError, match="a head ran"):
                image_vector(model, inputs)
        assert torch.equal(PatchEncoder(model)(inputs).tokens, clean)


def test_the_model_is_left_as_it_was(row):
    model, inputs = row.make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    children = {name: id(module) for name, module in model.named_modules()}
    enc = PatchEncoder(model)
    with torch.no_grad():
        enc(inputs)
    assert {name: id(module) for name, module in model.named_modules()} == children
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert set(enc.state_dict()) == {f"model.{k}" for k in before}


def test_tokens_have_unit_length_and_padding_is_zero(row):
    model, inputs = row.make()
    with torch.no_grad():
        out = PatchEncoder(model)(inputs)
    length = out.tokens.norm(dim=-1)
    torch.testing.assert_close(length[out.mask], torch.ones_like(length[out.mask]))
    assert (out.tokens[~out.mask] == 0).all()


def test_a_copy_is_independent(row):
    model, inputs = row.make()
    enc = PatchEncoder(model)
    twin = copy.deepcopy(enc)
    with torch.no_grad():
        expected = enc(inputs).tokens
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(enc(inputs).tokens, expected)
        assert not torch.allclose(twin(inputs).tokens, expected, atol=1e-3)


def test_gradients_reach_the_patch_embedding(row):
    model, inputs = row.make()
    PatchEncoder(model, normalize=False)(inputs).tokens.square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if "patch_embed" in n or "conv" in n or "embeds.proj" in n}
    assert grads and any(g is not None and g.abs().sum() > 0 for g in grads.values())


HF_FIXED = [row for row in ROWS if row.library == "transformers" and not isinstance(row.grid, list)]


@pytest.mark.parametrize("row", HF_FIXED, ids=row_id)
def test_transformers_models_take_other_sizes(row):
    if row.missing:
        pytest.skip(row.missing)
    model, _ = row.make()
    with torch.no_grad():
        out = PatchEncoder(model)(torch.randn(1, 3, 48, 80))
    assert out.grid == (3, 5) and out.tokens.shape[:2] == (1, 15)


@pytest.mark.parametrize("row", [row for row in ROWS if not isinstance(row.grid, list)], ids=row_id)
def test_a_size_that_is_no_multiple_of_the_patch_is_refused(row):
    if row.missing:
        pytest.skip(row.missing)
    model, _ = row.make()
    with pytest.raises(ValueError, match=r"pixel_values must have a height and width that are multiples .* got 50x70"):
        PatchEncoder(model)(torch.randn(1, 3, 50, 70))


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 16, 768), (1, 1, 3, 64, 64)], ids=str)
def test_pixels_of_the_wrong_rank_are_refused(shape):
    model, _ = need("ViT", "transformers").make()
    with pytest.raises(ValueError, match=r"pixel_values must be \[b, channels, height, width\]"):
        PatchEncoder(model)(torch.randn(shape))


@pytest.mark.parametrize(
    ("name", "library", "hint"),
    [
        ("VisionTransformer", "timm", "dynamic_img_size=True"),
        ("VisionTransformer", "torchvision", "interpolate_embeddings"),
        ("VisionTransformer", "open_clip", "force_image_size"),
    ],
)
def test_models_of_one_size_say_how_to_change_it(name, library, hint):
    model, _ = need(name, library).make()
    with pytest.raises(ValueError, match=f"must be 64x64 .* got 48x80.*{hint}"):
        PatchEncoder(model)(torch.randn(1, 3, 48, 80))


def test_timm_dynamic_sizes_and_padding():
    need("VisionTransformer", "timm")
    import timm

    shape = {"img_size": 64, "embed_dim": 32, "depth": 1, "num_heads": 4}
    dynamic = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **shape).eval()
    assert PatchEncoder(dynamic)(torch.randn(1, 3, 48, 80)).grid == (3, 5)
    padding = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, dynamic_img_pad=True, **shape).eval()
    out = PatchEncoder(padding)(torch.randn(1, 3, 50, 70))
    assert out.grid == (4, 5) and out.tokens.shape[1] == 20
    model = timm.create_model("vit_tiny_patch16_224", **shape).eval()
    enc = PatchEncoder(model)
    model.set_input_size(img_size=(48, 80))
    assert enc(torch.randn(1, 3, 48, 80)).grid == (3, 5)


def test_patch_dropout_is_refused_in_training_only():
    need("VisionTransformer", "timm")
    import timm

    shape = {"img_size": 64, "embed_dim": 32, "depth": 1, "num_heads": 4}
    enc = PatchEncoder(timm.create_model("vit_tiny_patch16_224", patch_drop_rate=0.5, **shape))
    with pytest.raises(RuntimeError, match=r"drops patch tokens in training mode \(patch dropout 0.5\).*encoder.eval"):
        enc.train()(torch.randn(1, 3, 64, 64))
    assert enc.eval()(torch.randn(1, 3, 64, 64)).grid == (4, 4)


NAFLEX = [
    ("SigLIP 2 NaFlex", "transformers", siglip2_inputs),
    ("NaFlexVit, padded patches", "timm", timm_naflex_inputs),
]


@pytest.mark.parametrize(("name", "library", "make"), NAFLEX, ids=["siglip2", "timm"])
def test_naflex_padding_never_reaches_real_patches(name, library, make):
    model, inputs = need(name, library).make()
    enc = PatchEncoder(model)
    key = "patches" if "patches" in inputs else "pixel_values"
    with torch.no_grad():
        out = enc(inputs)
        poisoned = inputs[key].clone()
        poisoned[~out.mask] = 100.0
        again = enc({**inputs, key: poisoned})
    assert out.mask.sum(1).tolist() == [rows * cols for rows, cols in NAFLEX_GRIDS]
    torch.testing.assert_close(again.tokens[out.mask], out.tokens[out.mask], atol=1e-6, rtol=1e-5)
    assert (again.tokens[~out.mask] == 0).all()


def test_naflex_without_its_masks_is_refused():
    model, inputs = need("SigLIP 2 NaFlex", "transformers").make()
    with pytest.raises(ValueError, match=r"takes padded patches: pass pixel_values .* pixel_attention_mask"):
        PatchEncoder(model)(inputs["pixel_values"])


def test_training_mode_and_checkpointing_follow_the_model():
    model, inputs = need("ViT", "transformers").make()
    enc = PatchEncoder(model)
    view = enc.adapter.view.module
    model.train()
    enc(inputs)
    assert view.training
    enc.eval()
    assert not view.training and not model.training
    model.pooler = nn.Identity()
    enc(inputs)
    assert view.pooler is None


def test_a_library_forward_bound_to_the_model_is_bypassed():
    model, inputs = need("ViT", "transformers").make()
    with torch.no_grad():
        expected = PatchEncoder(model)(inputs).tokens
        model.forward = model.forward
        assert torch.equal(PatchEncoder(model)(inputs).tokens, expected)


def test_the_table_has_a_row_per_family():
    lines = table().splitlines()
    assert len(lines) == len(ROWS) + 2
