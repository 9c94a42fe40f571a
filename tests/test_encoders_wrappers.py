"""Wrapped models and replaced modules: the right tokens, or a refusal that says what to do."""

from __future__ import annotations

import pytest
import torch
from encoder_models import ROWS
from torch import Tensor, nn
from torch.nn import functional as F

from latemax.encoders import PatchEncoder

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
torch.set_num_threads(1)


def model_of(name: str, library: str) -> tuple[nn.Module, Tensor]:
    row = next(row for row in ROWS if (row.name, row.library) == (name, library))
    if row.missing:
        pytest.skip(row.missing)
    return row.make()


def tokens(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return PatchEncoder(model)(x).tokens


class PassOn(nn.Module):
    """Only calls the module inside, and answers every attribute lookup with that module's."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)

    def __getattr__(self, name: str):
        inner = self._modules["inner"]
        return inner if name == "inner" else getattr(inner, name)


class NoLookups(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, pixel_values):
        return self.inner(pixel_values=pixel_values)


class Scaled(PassOn):
    def forward(self, x):
        return self.inner(2 * x)


class Extra(PassOn):
    def forward(self, x):
        return self.inner(x, output_hidden_states=True)


class Unpacked(PassOn):
    def forward(self, x):
        return self.inner(x)[0]


class Twice(PassOn):
    def forward(self, x):
        self.inner(x)
        return self.inner(x)


class Properties(nn.Module):
    """Lookups by properties, which win over the attributes of an instance."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.ones(1))

    config = property(lambda self: self.inner.config)
    embeddings = property(lambda self: self.inner.embeddings)
    layernorm = property(lambda self: self.inner.layernorm)

    def forward(self, x):
        return self.inner(x * self.scale)


FAMILIES = [
    ("ViT", "transformers"),
    ("BEiT, mean-pooled, relative positions", "transformers"),
    ("CLIP, with projection", "transformers"),
    ("SigLIP", "transformers"),
    ("VisionTransformer", "timm"),
    ("VisionTransformer, average-pooled", "timm"),
    ("VisionTransformer", "torchvision"),
    ("VisionTransformer", "open_clip"),
]


@pytest.mark.parametrize(("name", "library"), FAMILIES)
@pytest.mark.parametrize("wrap", [PassOn, NoLookups, nn.Sequential, lambda m: PassOn(nn.Sequential(PassOn(m)))])
def test_wrappers_that_only_call_the_model_are_unwrapped(name, library, wrap):
    model, x = model_of(name, library)
    if wrap is NoLookups and library != "transformers":
        # Other libraries call the argument x.
        pytest.skip("takes its input by position")
    wrapped = wrap(model)
    torch.testing.assert_close(tokens(wrapped, x), tokens(model, x), rtol=0, atol=0)
    assert PatchEncoder(wrapped).model is wrapped


@pytest.mark.parametrize(("name", "library"), FAMILIES)
@pytest.mark.parametrize("wrap", [Scaled, Extra, Unpacked, Twice])
def test_wrappers_with_a_forward_of_their_own_are_refused(name, library, wrap):
    model, _ = model_of(name, library)
    with pytest.raises(ValueError, match=rf"{wrap.__name__} wraps another module.*PatchEncoder\(model.inner\)"):
        PatchEncoder(wrap(model))
    chain = wrap(PassOn(model))
    with pytest.raises(ValueError, match=r"PatchEncoder\(model.inner.inner\)"):
        PatchEncoder(chain)


def test_lookups_by_property_are_refused():
    model, _ = model_of("ViT", "transformers")
    with pytest.raises(ValueError, match="Properties is no encoder family known here"):
        PatchEncoder(Properties(model))


def test_a_hook_on_a_wrapper_is_not_dropped():
    model, _ = model_of("ViT", "transformers")
    wrapped = PassOn(model)
    wrapped.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    with pytest.raises(ValueError, match="PassOn wraps another module"):
        PatchEncoder(wrapped)


def test_the_forward_of_a_wrapper_runs_where_n_prefix_is_given():
    model, x = model_of("ViT", "transformers")
    out = PatchEncoder(Scaled(model), n_prefix=1)(x).tokens
    torch.testing.assert_close(out, tokens(model, 2 * x))


@pytest.mark.parametrize(("name", "library"), FAMILIES)
def test_parallel_and_compiled_models_are_refused(name, library):
    model, _ = model_of(name, library)
    with pytest.raises(ValueError, match=r"DataParallel wraps another module.*PatchEncoder\(model.module\)"):
        PatchEncoder(nn.DataParallel(model))
    with pytest.raises(ValueError, match=r"torch.compile\(PatchEncoder\(model\)\)"):
        PatchEncoder(torch.compile(model, backend="eager"))


class FullyShardedLike(nn.Module):
    """FSDP 1: lookups are answered by the module inside, whose parameters are only whole within its own forward."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self._fsdp_wrapped_module = inner

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["_fsdp_wrapped_module"], name)

    def forward(self, *args, **kwargs):
        return self._modules["_fsdp_wrapped_module"](*args, **kwargs)


class FabricLike(nn.Module):
    """Lightning Fabric: calls a strategy's module under a precision, and keeps the original next to it."""

    def __init__(self, inner: nn.Module, strategy: nn.Module):
        super().__init__()
        self._forward_module = strategy
        self._original_module = inner

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["_original_module"], name)

    def forward(self, *args, **kwargs):
        return self._forward_module(*[arg.bfloat16() for arg in args], **kwargs)


def test_sharded_and_fabric_models_are_refused():
    model, _ = model_of("ViT", "transformers")
    with pytest.raises(ValueError, match=r"PatchEncoder\(model._fsdp_wrapped_module\)"):
        PatchEncoder(FullyShardedLike(model))
    with pytest.raises(ValueError, match=r"FabricLike wraps another module"):
        PatchEncoder(FabricLike(model, model))
    with pytest.raises(ValueError, match=r"FabricLike wraps another module"):
        PatchEncoder(FabricLike(model, NoLookups(model)))


class BaseTuner(nn.Module):
    """PEFT's class of this name, which is how its tuners are known."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model.forward(*args, **kwargs)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["model"], name)


class LoraLike(BaseTuner):
    pass


class TaskTuner(BaseTuner):
    def forward(self, *args, task_ids=None, **kwargs):
        return self.model(*args, **kwargs)


class Config:
    peft_type = "PROMPT_TUNING"

    def __init__(self, is_prompt_learning: bool):
        self.is_prompt_learning = is_prompt_learning


class PeftLike(nn.Module):
    def __init__(self, tuner: nn.Module, prompts: bool = False):
        super().__init__()
        self.base_model = tuner
        self.config = tuner.config
        self.peft_config = {"default": Config(prompts)}

    def get_base_model(self):
        return self.base_model.model

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["base_model"], name)

    def forward(self, *args, **kwargs):
        return self.get_base_model()(*args, **kwargs)


def test_peft_models_are_unwrapped_unless_their_forward_differs():
    model, x = model_of("ViT", "transformers")
    for wrapped in (PeftLike(LoraLike(model)), LoraLike(model)):
        assert torch.equal(tokens(wrapped, x), tokens(model, x))
    with pytest.raises(ValueError, match="PEFT's TaskTuner runs a forward of its own"):
        PatchEncoder(PeftLike(TaskTuner(model)))
    with pytest.raises(ValueError, match="PEFT's PROMPT_TUNING adds tokens to the input"):
        PatchEncoder(PeftLike(LoraLike(model), prompts=True))


def test_peft_itself():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, x = model_of("ViT", "transformers")
    config = peft.LoraConfig(
        target_modules=["q_proj", "v_proj"], init_lora_weights=False, modules_to_save=["layernorm"]
    )
    wrapped = peft.get_peft_model(model, config).eval()
    nn.init.normal_(wrapped.base_model.model.layernorm.modules_to_save["default"].weight)
    with torch.no_grad():
        expected = F.normalize(wrapped(x).last_hidden_state[:, 1:], dim=-1)
    for each in (wrapped, wrapped.base_model):
        torch.testing.assert_close(tokens(each, x), expected)


def random_norm() -> nn.LayerNorm:
    norm = nn.LayerNorm(32)
    nn.init.normal_(norm.weight)
    return norm


def set_norm(tower: nn.Module, path: str) -> None:
    owner, _, name = path.rpartition(".")
    old = tower.get_submodule(path)
    norm = nn.LayerNorm(old.weight.shape[0]).eval()
    nn.init.normal_(norm.weight)
    setattr(tower.get_submodule(owner), name, norm)


@pytest.mark.parametrize(("name", "library"), FAMILIES)
def test_a_replaced_norm_is_followed(name, library):
    model, x = model_of(name, library)
    enc = PatchEncoder(model)
    before = enc(x).tokens
    set_norm(enc.adapter.tower, enc.norm_name)
    with torch.no_grad():
        after = enc(x).tokens
    assert (after - before).abs().max() > 0.01
    torch.testing.assert_close(after, tokens(model, x), rtol=0, atol=0)


def test_a_replaced_norm_is_followed_by_a_compiled_encoder():
    model, x = model_of("ViT", "transformers")
    compiled = torch.compile(PatchEncoder(model), backend="aot_eager")
    with torch.no_grad():
        compiled(x)
        model.layernorm = random_norm()
        torch.testing.assert_close(compiled(x).tokens, tokens(model, x))
    torch._dynamo.reset()


def test_a_replaced_text_projection_is_followed():
    model, x = model_of("CLIP, with projection", "transformers")
    enc = PatchEncoder(model, projection="text")
    model.visual_projection = nn.Linear(32, 24, bias=False)
    with torch.no_grad():
        expected = PatchEncoder(model, projection="text")(x).tokens
        assert torch.equal(enc(x).tokens, expected)


def test_a_replaced_tower_and_model_are_followed():
    model, x = model_of("CLIP, full", "transformers")
    other = model_of("CLIP, full", "transformers")[0]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    enc = PatchEncoder(model)
    model.vision_model = other.vision_model
    assert torch.equal(enc(x).tokens, tokens(other, x))
    enc.model = model_of("ViT", "transformers")[0]
    assert torch.equal(enc(x).tokens, tokens(enc.model, x)) and enc.family == "ViTModel"


def test_torchvision_s_replaced_encoder_is_followed():
    model, x = model_of("VisionTransformer", "torchvision")
    enc = PatchEncoder(model)
    other = model_of("VisionTransformer", "torchvision")[0]
    with torch.no_grad():
        for parameter in other.encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.encoder = other.encoder
    # Within rounding: without gradients torch multiplies in another order here.
    torch.testing.assert_close(enc(x).tokens, tokens(model, x))
