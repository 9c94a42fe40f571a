"""PatchEncoder's arguments: projections, norms, custom models, refusals, compile, precision."""

from __future__ import annotations

import importlib.util
import pickle

import pytest
import torch
from encoder_models import IMAGE, ROWS, SHIMMED
from torch import nn
from torch.nn import functional as F

from latemax.encoders import PatchEncoder

torch.set_num_threads(1)
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}


def make(name, library="transformers"):
    row = next(row for row in ROWS if (row.name, row.library) == (name, library))
    if row.missing:
        pytest.skip(row.missing)
    return row.make()


def needs(library):
    if not (importlib.util.find_spec(library) and SHIMMED):
        pytest.skip(f"{library} is not installed")


@pytest.mark.parametrize("name", ["CLIP, with projection", "CLIP, full"])
def test_text_projection_of_clip(name):
    model, x = make(name)
    with torch.no_grad():
        plain = PatchEncoder(model, normalize=False)(x).tokens
        out = PatchEncoder(model, projection="text")(x)
        expected = F.normalize(model.visual_projection(plain), dim=-1)
    torch.testing.assert_close(out.tokens, expected)
    assert set(PatchEncoder(model, projection="text").state_dict()) == {f"model.{k}" for k in model.state_dict()}


def test_text_projection_of_the_class_token_is_the_library_s_image_vector():
    model, x = make("CLIP, with projection")
    with torch.no_grad():
        prefix = PatchEncoder(model, projection="text", normalize=False)(x, return_prefix=True).prefix
        torch.testing.assert_close(prefix[:, 0], model(x).image_embeds)


def test_text_projection_of_open_clip():
    model, x = make("VisionTransformer", "open_clip")
    enc = PatchEncoder(model, projection="text", normalize=False)
    with torch.no_grad():
        out = enc(x, return_prefix=True)
        torch.testing.assert_close(out.prefix[:, 0], model.encode_image(x))
        assert out.tokens.shape == (2, 16, 48)
        model.visual.proj.zero_()
        assert (enc(x).tokens == 0).all()


def test_text_projection_of_an_open_clip_timm_trunk():
    model, x = make("TimmModel (timm trunk)", "open_clip")
    with torch.no_grad():
        out = PatchEncoder(model, projection="text", normalize=False)(x, return_prefix=True)
        torch.testing.assert_close(out.prefix[:, 0], model.encode_image(x))


@pytest.mark.parametrize(
    ("name", "library", "why"),
    [
        ("SigLIP", "transformers", "attention-pooling head"),
        ("CLIP, vision only", "transformers", "load CLIPModel or CLIPVisionModelWithProjection"),
        ("DINOv2", "transformers", "Dinov2Model has none"),
        ("VisionTransformer", "torchvision", "has none"),
        ("SigLIP (attention pool)", "timm", "attention pool"),
        ("VisionTransformer", "timm", "has none"),
    ],
)
def test_text_projection_that_is_not_there(name, library, why):
    model, _ = make(name, library)
    with pytest.raises(ValueError, match=f"projection='text'.*{why}"):
        PatchEncoder(model, projection="text")


def test_coca_pools_before_its_projection():
    needs("open_clip")
    from encoder_models import _open_clip_vit

    torch.manual_seed(0)
    model = _open_clip_vit(attentional_pool=True)().eval()
    enc = PatchEncoder(model)
    assert enc.norm_name == "none"
    assert enc(torch.randn(IMAGE)).tokens.shape == (2, 16, 64)
    with pytest.raises(ValueError, match=r"projection='text'.*CoCa"):
        PatchEncoder(model, projection="text")


def test_a_fresh_projection_is_trainable_and_saved():
    model, x = make("DINOv2")
    enc = PatchEncoder(model.to(torch.bfloat16), projection=7)
    assert enc.projection.weight.shape == (7, 32) and enc.projection.weight.dtype == torch.bfloat16
    assert enc.projection.bias is None and "projection.weight" in enc.state_dict()
    enc(x.bfloat16()).tokens.float().square().sum().backward()
    assert enc.projection.weight.grad is not None
    module = nn.Sequential(nn.Linear(32, 9), nn.Tanh())
    assert PatchEncoder(model.float(), projection=module)(x).tokens.shape == (2, 16, 9)


@pytest.mark.parametrize("bad", [0, -1, True, "image", 1.5], ids=str)
def test_bad_projection(bad):
    with pytest.raises(ValueError, match=r"projection must be None, 'text', an int >= 1 or an nn.Module, got"):
        PatchEncoder(make("ViT")[0], projection=bad)


@pytest.mark.parametrize("bad", ["none", 1, True, "layernorm"], ids=str)
def test_bad_final_norm(bad):
    with pytest.raises(ValueError, match=r"final_norm must be 'auto', None or an nn.Module, got"):
        PatchEncoder(make("ViT")[0], final_norm=bad)


def test_own_final_norm():
    model, x = make("ViT")
    norm = nn.LayerNorm(32, elementwise_affine=False)
    with torch.no_grad():
        raw = PatchEncoder(model, normalize=False, final_norm=None)(x).tokens
        enc = PatchEncoder(model, normalize=False, final_norm=norm)
        torch.testing.assert_close(enc(x).tokens, norm(raw))
    assert enc.norm_name == "custom"


def test_length_is_computed_in_float32():
    class Huge(nn.Module):
        def forward(self, x):
            return torch.full((len(x), 16, 32), 300.0, dtype=torch.float16)

    # 32 * 300**2 is beyond float16's 65504.
    tokens = PatchEncoder(Huge(), n_prefix=0)(torch.zeros(IMAGE)).tokens
    assert tokens.dtype == torch.float16
    torch.testing.assert_close(tokens, torch.full_like(tokens, 32**-0.5))
    zero = PatchEncoder(lambda x: torch.zeros(2, 16, 4, dtype=torch.float64), n_prefix=0)(torch.zeros(IMAGE)).tokens
    assert (zero == 0).all() and zero.dtype == torch.float64


def test_a_wrong_prefix_count_fails_the_grid_check():
    model, x = make("ViT")
    with pytest.raises(ValueError, match="17 tokens less n_prefix=2 leaves 15, but the grid 4x4 has 16 patches"):
        PatchEncoder(model, n_prefix=2)(x)
    assert PatchEncoder(model, n_prefix=1)(x).tokens.shape == (2, 16, 32)


@pytest.mark.parametrize("bad", [-1, 1.0, True, "1"], ids=str)
def test_bad_n_prefix(bad):
    with pytest.raises(ValueError, match="n_prefix must be an int >= 0 or None, got"):
        PatchEncoder(nn.Identity(), n_prefix=bad)


class Plain(nn.Module):
    """A ViT of nobody's making: two prefix tokens, 16-pixel patches."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 16, 16)
        self.prefix = nn.Parameter(torch.ones(1, 2, 8))

    def forward(self, x):
        return torch.cat((self.prefix.expand(len(x), -1, -1), self.patch(x).flatten(2).mT), 1)


def test_any_module_and_callable():
    torch.manual_seed(0)
    model, x = Plain(), torch.randn(2, 3, 48, 80)
    out = PatchEncoder(model, n_prefix=2, normalize=False)(x, return_prefix=True)
    assert out.grid == (3, 5) and (out.prefix == 1).all()
    torch.testing.assert_close(out.tokens, model(x)[:, 2:])
    feature_map = PatchEncoder(lambda x: (model.patch(x).flatten(2).mT, (3, 5)), n_prefix=0, normalize=False)
    torch.testing.assert_close(feature_map(x).tokens, out.tokens)
    assert list(PatchEncoder(model, n_prefix=2).parameters())


def test_custom_models_that_do_not_fit():
    x = torch.randn(2, 3, 48, 80)
    with pytest.raises(ValueError, match=r"no square patch tiles a 48x80 image.*return \(tokens, \(rows, cols\)\)"):
        PatchEncoder(Plain(), n_prefix=1)(x)
    with pytest.raises(ValueError, match=r"must return tokens \[b, n_prefix \+ n, dim\], got \(2, 8, 3, 5\)"):
        PatchEncoder(Plain().patch, n_prefix=0)(x)
    with pytest.raises(ValueError, match="leaves 15, but the grid 3x4 has 12 patches"):
        PatchEncoder(lambda x: (torch.zeros(2, 15, 8), (3, 4)), n_prefix=0)(x)
    with pytest.raises(ValueError, match=r"the token width of a Plain is unknown; pass nn.Linear"):
        PatchEncoder(Plain(), n_prefix=2, projection=4)
    with pytest.raises(ValueError, match=r"no encoder family known here. Pass n_prefix="):
        PatchEncoder(Plain())
    with pytest.raises(TypeError, match=r"model must be an nn.Module or a callable, got str"):
        PatchEncoder("facebook/dinov2-small")
    with pytest.raises(ValueError, match="the mapping must hold 'pixel_values', got"):
        PatchEncoder(Plain(), n_prefix=2)({"images": x})


def test_random_masking_is_refused():
    model = transformers.ViTMAEModel(transformers.ViTMAEConfig(**SMALL, image_size=64, patch_size=16, mask_ratio=0.0))
    with pytest.raises(ValueError, match=r"ViTMAEModel masks and shuffles .* ViTModel.from_pretrained"):
        PatchEncoder(model)


def test_convolutions_and_hierarchies_of_transformers_are_refused():
    swin = transformers.SwinModel(
        transformers.SwinConfig(
            image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4
        )
    )
    with pytest.raises(ValueError, match="SwinModel is a hierarchy that merges patches"):
        PatchEncoder(swin)
    resnet = transformers.ResNetModel(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    )
    with pytest.raises(
        ValueError, match=r"ResNetModel is no encoder family known here.*a convolutional model can return"
    ):
        PatchEncoder(resnet)
    text = transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=20))
    with pytest.raises(ValueError, match="BertModel is no encoder family"):
        PatchEncoder(text)


@pytest.mark.parametrize("name", ["resnet10t", "swin_tiny_patch4_window7_224", "convnext_atto"])
def test_convolutions_and_hierarchies_of_timm_are_refused(name):
    needs("timm")
    import timm

    with pytest.raises(ValueError, match=r"is not a plain ViT .*pass a callable"):
        PatchEncoder(timm.create_model(name))


def test_resnets_of_torchvision_and_open_clip_are_refused():
    needs("open_clip")
    from open_clip.model import CLIP
    from torchvision.models import resnet18

    with pytest.raises(ValueError, match="ResNet is no encoder family known here"):
        PatchEncoder(resnet18())
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 4, "layers": 1}
    clip = CLIP(48, {"image_size": 64, "layers": (1, 1, 1, 1), "width": 16}, text)
    with pytest.raises(ValueError, match=r"this open_clip tower is a ResNet.*use a ViT tower"):
        PatchEncoder(clip)


def test_classifiers_are_unwrapped():
    config = transformers.ViTConfig(**SMALL, image_size=64, patch_size=16)
    model = transformers.ViTForImageClassification(config).eval()
    x = torch.randn(IMAGE)
    with torch.no_grad():
        out = PatchEncoder(model, normalize=False)(x)
        torch.testing.assert_close(out.tokens, model.vit(x).last_hidden_state[:, 1:])


COMPILED = [
    ("ViT", "transformers"),
    ("CLIP, full", "transformers"),
    ("DINOv2 with registers", "transformers"),
    ("VisionTransformer", "timm"),
    ("VisionTransformer", "torchvision"),
    ("VisionTransformer", "open_clip"),
]


@pytest.mark.parametrize(("name", "library"), COMPILED, ids=lambda value: value)
def test_compile(name, library):
    model, x = make(name, library)
    enc = PatchEncoder(model)
    # aot_eager traces and functionalises as inductor does, without needing a C++ compiler.
    compiled = torch.compile(enc, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = enc(x)
        out = compiled(x)
    torch.testing.assert_close(out.tokens, expected.tokens)
    assert tuple(out.grid) == expected.grid
    torch._dynamo.reset()


def test_a_compiled_model_is_refused():
    with pytest.raises(ValueError, match=r"compile the encoder: torch.compile\(PatchEncoder\(model\)\)"):
        PatchEncoder(torch.compile(make("ViT")[0], backend="eager"))


def test_autocast_and_half_models():
    model, x = make("DINOv2")
    enc = PatchEncoder(model)
    with torch.no_grad():
        exact = enc(x).tokens
        with torch.autocast("cpu", torch.bfloat16):
            mixed = enc(x).tokens
        half = PatchEncoder(model.to(torch.bfloat16))(x.bfloat16()).tokens
    assert half.dtype == torch.bfloat16
    for other in (mixed, half):
        assert F.cosine_similarity(other.float(), exact, dim=-1).min() > 0.99


def test_pickle_round_trip():
    model, x = make("SigLIP")
    enc = PatchEncoder(model, projection=5)
    twin = pickle.loads(pickle.dumps(enc))
    with torch.no_grad():
        assert torch.equal(twin(x).tokens, enc(x).tokens)


def test_repr_tells_what_was_found():
    text = repr(PatchEncoder(make("DINOv2 with registers")[0]))
    assert "family='Dinov2WithRegistersModel', n_prefix=5, norm='layernorm', normalize=True" in text
