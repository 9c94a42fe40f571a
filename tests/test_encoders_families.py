"""Vision-language models are refused with the name of their tower; timm models are known without create_model."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from encoder_models import SHIMMED
from torch import Tensor, nn
from torch.nn import functional as F

from latemax.encoders import PatchEncoder

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
torch.set_num_threads(1)
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
VISION = {**TINY, "image_size": 32, "patch_size": 8}
TEXT = {**TINY, "vocab_size": 99, "max_position_embeddings": 16}


def tokens(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return PatchEncoder(model)(x).tokens


def build(model: str, config: str, **options) -> nn.Module:
    return getattr(transformers, model)(getattr(transformers, config)(**options))


def siglip(**options) -> dict:
    return {"model_type": "siglip_vision_model", **VISION, **options}


def gemma(**options) -> dict:
    return {"model_type": "gemma", **TEXT, "num_key_value_heads": 1, "head_dim": 16, **options}


PALIGEMMA = {"vision_config": siglip(projection_dim=32), "text_config": gemma(), "projection_dim": 32}
VISION_LANGUAGE = {
    "PaliGemma": (
        functools.partial(build, "PaliGemmaForConditionalGeneration", "PaliGemmaConfig", **PALIGEMMA),
        r"PatchEncoder\(model\.model\.vision_tower\)",
    ),
    "ColPali": (
        functools.partial(
            build, "ColPaliForRetrieval", "ColPaliConfig", vlm_config={"model_type": "paligemma", **PALIGEMMA}
        ),
        r"PatchEncoder\(model\.vlm\.(model\.)?vision_tower\)",
    ),
    "Llava": (
        functools.partial(
            build,
            "LlavaForConditionalGeneration",
            "LlavaConfig",
            vision_config={"model_type": "clip_vision_model", **VISION},
            text_config={"model_type": "llama", **TEXT},
        ),
        r"PatchEncoder\(model\.model\.vision_tower\)",
    ),
    "Qwen2-VL": (
        functools.partial(
            build,
            "Qwen2VLForConditionalGeneration",
            "Qwen2VLConfig",
            text_config={**TEXT, "num_key_value_heads": 2, "rope_parameters": {"mrope_section": [2, 3, 3]}},
            vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2},
        ),
        "its retrieval tokens come from its language side",
    ),
    "BLIP captioner": (
        functools.partial(
            build, "BlipForConditionalGeneration", "BlipConfig", vision_config=VISION, text_config={**TEXT}
        ),
        r"PatchEncoder\(model\.vision_model\)",
    ),
    "ViLT": (
        functools.partial(build, "ViltModel", "ViltConfig", **VISION, vocab_size=99),
        "its retrieval tokens come from its language side",
    ),
}


@pytest.mark.parametrize("name", VISION_LANGUAGE)
def test_vision_language_models_are_refused_and_their_tower_is_not(name):
    make, hint = VISION_LANGUAGE[name]
    model = make().eval()
    pattern = rf"{type(model).__name__} is a vision-language model: .*Retriever.*"
    with pytest.raises(ValueError, match=pattern) as caught:
        PatchEncoder(model)
    message = str(caught.value)
    assert re.search(hint, message)
    if "PatchEncoder(" in message:
        path = message.rpartition("PatchEncoder(model.")[2].rstrip(")")
        assert PatchEncoder(model.get_submodule(path))(torch.zeros(1, 3, 32, 32)).tokens.shape == (1, 16, 32)


def test_text_models_are_no_vision_language_models():
    with pytest.raises(ValueError, match="BertModel is no encoder family known here"):
        PatchEncoder(build("BertModel", "BertConfig", **TEXT))


def test_classifiers_of_dual_encoders_are_accepted():
    model = build("SiglipForImageClassification", "SiglipConfig", vision_config=VISION, text_config=TEXT).eval()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(tokens(model, x), tokens(model.vision_model, x))


class TestTimm:
    @pytest.fixture(autouse=True)
    def _needs_timm(self):
        if not SHIMMED:
            pytest.skip("torchvision cannot be imported")
        pytest.importorskip("timm", reason="timm is not installed")

    def test_a_model_built_by_its_class(self):
        from timm.models.vision_transformer import VisionTransformer

        class Subclass(VisionTransformer):
            pass

        options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
        for cls in (VisionTransformer, Subclass):
            torch.manual_seed(0)
            model = cls(**options).eval()
            x = torch.randn(1, 3, 32, 32)
            enc = PatchEncoder(model)
            assert enc.family == f"timm {cls.__name__}" and enc.norm_name == "norm"
            with torch.no_grad():
                expected = F.normalize(model.forward_features(x)[:, 1:], dim=-1)
            torch.testing.assert_close(enc(x).tokens, expected)
            with pytest.raises(ValueError, match="does not tell its image size, mean and std"):
                _ = enc.image_transform

    def test_a_hierarchy_built_by_its_class_is_unknown(self):
        from timm.models.swin_transformer import SwinTransformer

        with pytest.raises(ValueError, match="is no encoder family known here"):
            PatchEncoder(SwinTransformer(img_size=32, patch_size=2, embed_dim=8, depths=(1,), num_heads=(1,)))

    def test_transformers_timm_wrapper(self):
        pretrained = {"input_size": (3, 160, 160), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 1.0}
        config = transformers.TimmWrapperConfig(architecture="test_vit", pretrained_cfg=pretrained)
        model = transformers.TimmWrapperModel(config).eval()
        x = torch.randn(1, 3, 160, 160)
        enc = PatchEncoder(model)
        with torch.no_grad():
            expected = F.normalize(model(x).last_hidden_state[:, 1:], dim=-1)
        torch.testing.assert_close(enc(x).tokens, expected)
        assert enc.image_transform.rule.mean == (0.1, 0.2, 0.3)
