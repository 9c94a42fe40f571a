"""One small, randomly initialised model per encoder family, with the library's own patch tokens to compare to.

``python -m tests.encoder_models`` (or the file itself) prints the family table as markdown.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

try:
    from . import torchvision_shim
except ImportError:
    import torchvision_shim

SHIMMED = torchvision_shim.install()
IMAGE = (2, 3, 64, 64)
NAFLEX_GRIDS = ((3, 4), (2, 5))


def save_tiny_dinov2(folder: pathlib.Path) -> str:
    """Saves a DINOv2 of 16 patches of 56 pixels and 32 dims with its preprocessor; returns the folder's path."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True, "size": {"shortest_edge": 56}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": 56, "width": 56},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_convert_rgb": True,
        "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


@dataclass(frozen=True)
class Row:
    """``reference(model, inputs)``: what the library itself gives for the patches, before any projection or L2 norm."""

    name: str
    library: str
    build: Callable[[], nn.Module]
    reference: Callable[[nn.Module, Any], Tensor]
    tokens_in: int
    n_prefix: int
    norm: str
    grid: Any = (4, 4)
    inputs: Callable[[], Any] = lambda: torch.randn(IMAGE)

    @property
    def missing(self) -> str | None:
        """Why this row cannot run here, or None."""
        if self.library == "transformers":
            return None if importlib.util.find_spec("transformers") else "transformers is not installed"
        if importlib.util.find_spec(self.library) and SHIMMED:
            return None
        return f"{self.library} is not installed"

    def make(self) -> tuple[nn.Module, Any]:
        """(model in eval mode with every parameter random, so that no norm or scale is an identity; its inputs)."""
        torch.manual_seed(0)
        model = self.build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model, self.inputs()


def poison_heads(model: nn.Module) -> list[str]:
    """Makes every pooler, head, attention pool and projection raise when run; returns their names."""

    def fail(*_):
        raise AssertionError("a head ran")

    ends = ("pooler", "head", "heads", "attn_pool", "head_drop", "visual_projection", "text_model", "classifier")
    names = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ends:
            # A norm inside a pooler is applied to the patches (mean-pooled BEiT); the pooler itself is not.
            module.register_forward_pre_hook(fail)
            names.append(name)
    return names


def image_vector(model: nn.Module, inputs):
    """The pooled image vector, by the library's own way: what runs the heads."""
    if hasattr(model, "get_image_features"):
        return model.get_image_features(pixel_values=inputs)
    if hasattr(model, "encode_image"):
        return model.encode_image(inputs)
    return model(**inputs) if isinstance(inputs, dict) and "pixel_values" in inputs else model(inputs)


def _hf(model: str, config: str, build=None, **options) -> Callable[[], nn.Module]:
    def make():
        import transformers

        shape = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 16,
        }
        shape["intermediate_size"] = 64
        cfg = getattr(transformers, config)(**{**shape, **options})
        return getattr(transformers, model)(cfg, **(build or {}))

    return make


def _hf_two_towers(model: str, config: str, **vision) -> Callable[[], nn.Module]:
    def make():
        import transformers

        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        vision_config = {**shape, "image_size": 64, "patch_size": 16, **vision}
        text_config = {**shape, "vocab_size": 100, "max_position_embeddings": 16}
        cfg = getattr(transformers, config)(text_config=text_config, vision_config=vision_config)
        return getattr(transformers, model)(cfg)

    return make


def _last(n_prefix: int):
    return lambda model, x: model(x).last_hidden_state[:, n_prefix:]


def _clip_tower(model):
    return getattr(model, "vision_model", model)


def _clip(model, x):
    tower = _clip_tower(model)
    return tower.post_layernorm(tower(x).last_hidden_state[:, 1:])


def _beit(model, x):
    return model.pooler.layernorm(model(x).last_hidden_state[:, 1:])


def _siglip2(model, inputs):
    return model.vision_model(**inputs).last_hidden_state if hasattr(model, "text_model") else model(**inputs)[0]


def siglip2_inputs(grids=NAFLEX_GRIDS, patch=16) -> dict[str, Tensor]:
    longest = max(rows * cols for rows, cols in grids)
    mask = torch.stack([torch.arange(longest) < rows * cols for rows, cols in grids]).long()
    values = torch.randn(len(grids), longest, patch * patch * 3)
    return {"pixel_values": values, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor(grids)}


def timm_naflex_inputs(grids=NAFLEX_GRIDS, patch=16) -> dict[str, Tensor]:
    longest = max(rows * cols for rows, cols in grids)
    coord = torch.zeros(len(grids), longest, 2, dtype=torch.long)
    for i, (rows, cols) in enumerate(grids):
        coord[i, : rows * cols] = torch.cartesian_prod(torch.arange(rows), torch.arange(cols))
    valid = torch.stack([torch.arange(longest) < rows * cols for rows, cols in grids])
    return {
        "patches": torch.randn(len(grids), longest, patch * patch * 3),
        "patch_coord": coord,
        "patch_valid": valid,
    }


def _timm(name: str, **options) -> Callable[[], nn.Module]:
    def make():
        import timm

        shape = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 4}
        return timm.create_model(name, **{**shape, **options})

    return make


def _intermediates(model, x):
    return model.forward_intermediates(x, indices=1, norm=True, output_fmt="NLC", intermediates_only=True)[-1]


def _fc_norm(model, x):
    return model.fc_norm(_intermediates(model, x))


def _timm_naflex(model, inputs):
    tokens = model.forward_features(inputs["patches"], inputs["patch_coord"], inputs["patch_valid"])["patches"]
    return model.fc_norm(tokens[:, model.num_prefix_tokens :])


def _torchvision() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(64, 16, 2, 4, 32, 64, num_classes=5)


def _torchvision_tokens(model, x):
    seen = []
    hook = model.encoder.register_forward_hook(lambda module, args, output: seen.append(output))
    model(x)
    hook.remove()
    return seen[0][:, 1:]


def _open_clip_vit(**options) -> Callable[[], nn.Module]:
    def make():
        from open_clip.model import CLIP

        vision = {"image_size": 64, "patch_size": 16, "width": 64, "layers": 2, "head_width": 16, **options}
        text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 4, "layers": 1}
        return CLIP(48, vision, text)

    return make


def _open_clip_tokens(model, x):
    output = model.visual.forward_intermediates(x, indices=1, normalize_intermediates=True, output_fmt="NLC")
    return output["image_intermediates"][-1]


def _open_clip_trunk() -> nn.Module:
    from open_clip.model import CLIP

    vision = {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 4, "layers": 1}
    return CLIP(48, vision, text)


T, TV, OC, HF = "timm", "torchvision", "open_clip", "transformers"
ROWS = (
    Row("ViT", HF, _hf("ViTModel", "ViTConfig"), _last(1), 17, 1, "layernorm"),
    Row("DeiT (distilled)", HF, _hf("DeiTModel", "DeiTConfig"), _last(2), 18, 2, "layernorm"),
    Row("CLIP, vision only", HF, _hf("CLIPVisionModel", "CLIPVisionConfig"), _clip, 17, 1, "post_layernorm"),
    Row(
        "CLIP, with projection",
        HF,
        _hf("CLIPVisionModelWithProjection", "CLIPVisionConfig", projection_dim=24),
        _clip,
        17,
        1,
        "post_layernorm",
    ),
    Row("CLIP, full", HF, _hf_two_towers("CLIPModel", "CLIPConfig"), _clip, 17, 1, "post_layernorm"),
    Row("SigLIP", HF, _hf("SiglipVisionModel", "SiglipVisionConfig"), _last(0), 16, 0, "post_layernorm"),
    Row(
        "SigLIP, full",
        HF,
        _hf_two_towers("SiglipModel", "SiglipConfig"),
        lambda model, x: model.vision_model(x).last_hidden_state,
        16,
        0,
        "post_layernorm",
    ),
    Row(
        "SigLIP 2 NaFlex",
        HF,
        _hf("Siglip2VisionModel", "Siglip2VisionConfig", num_patches=16),
        _siglip2,
        12,
        0,
        "post_layernorm",
        list(NAFLEX_GRIDS),
        siglip2_inputs,
    ),
    Row("BEiT", HF, _hf("BeitModel", "BeitConfig", use_mean_pooling=False), _last(1), 17, 1, "layernorm"),
    Row(
        "BEiT, mean-pooled, relative positions",
        HF,
        _hf("BeitModel", "BeitConfig", use_mean_pooling=True, use_relative_position_bias=True),
        _beit,
        17,
        1,
        "pooler.layernorm",
    ),
    Row("DINOv2", HF, _hf("Dinov2Model", "Dinov2Config", mlp_ratio=2), _last(1), 17, 1, "layernorm"),
    Row(
        "DINOv2 with registers",
        HF,
        _hf("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", mlp_ratio=2, num_register_tokens=4),
        _last(5),
        21,
        5,
        "layernorm",
    ),
    Row("DINOv3", HF, _hf("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=4), _last(5), 21, 5, "norm"),
    Row("I-JEPA", HF, _hf("IJepaModel", "IJepaConfig"), _last(0), 16, 0, "layernorm"),
    Row("VisionTransformer", T, _timm("vit_tiny_patch16_224"), _intermediates, 17, 1, "norm"),
    Row(
        "VisionTransformer, average-pooled",
        T,
        _timm("vit_tiny_patch16_224", global_pool="avg"),
        _fc_norm,
        17,
        1,
        "fc_norm",
    ),
    Row("VisionTransformerDistilled", T, _timm("deit_tiny_distilled_patch16_224"), _intermediates, 18, 2, "norm"),
    Row(
        "VisionTransformer, registers (DINOv2)",
        T,
        _timm("vit_small_patch14_reg4_dinov2", patch_size=16),
        _intermediates,
        21,
        5,
        "norm",
    ),
    Row("Eva (EVA-02)", T, _timm("eva02_tiny_patch14_224", patch_size=16), _fc_norm, 17, 1, "fc_norm"),
    Row("Eva (DINOv3)", T, _timm("vit_small_patch16_dinov3"), _intermediates, 21, 5, "norm"),
    Row("SigLIP (attention pool)", T, _timm("vit_base_patch16_siglip_224"), _intermediates, 16, 0, "norm"),
    Row("Beit", T, _timm("beit_base_patch16_224"), _fc_norm, 17, 1, "fc_norm"),
    Row("NaFlexVit, images", T, _timm("naflexvit_base_patch16_gap"), _fc_norm, 20, 4, "fc_norm"),
    Row(
        "NaFlexVit, padded patches",
        T,
        _timm("naflexvit_base_patch16_gap"),
        _timm_naflex,
        16,
        4,
        "fc_norm",
        list(NAFLEX_GRIDS),
        timm_naflex_inputs,
    ),
    Row("VisionTransformer", TV, _torchvision, _torchvision_tokens, 17, 1, "encoder.ln"),
    Row("VisionTransformer", OC, _open_clip_vit(), _open_clip_tokens, 17, 1, "ln_post"),
    Row(
        "VisionTransformer, norm after the pool",
        OC,
        _open_clip_vit(final_ln_after_pool=True, pool_type="avg"),
        _open_clip_tokens,
        17,
        1,
        "ln_post",
    ),
    Row(
        "TimmModel (timm trunk)",
        OC,
        _open_clip_trunk,
        lambda model, x: _intermediates(model.visual.trunk, x),
        101,
        1,
        "norm",
        (10, 10),
        lambda: torch.randn(2, 3, 160, 160),
    ),
)


def grid_text(grid) -> str:
    return ", ".join(grid_text(one) for one in grid) if isinstance(grid, list) else f"{grid[0]}x{grid[1]}"


def compare(row: Row) -> tuple[Any, float]:
    """(PatchTokens without L2 norm, largest absolute difference from the library's patch tokens at real patches)."""
    from latemax.encoders import PatchEncoder

    model, inputs = row.make()
    with torch.no_grad():
        out = PatchEncoder(model, normalize=False)(inputs)
        expected = row.reference(model, inputs)
    return out, float((out.tokens - expected)[out.mask].abs().max())


def table() -> str:
    """The family table as markdown, every figure computed now; rows whose library is missing say so."""
    lines = ["| library | family | tokens in | prefix dropped | grid | norm | max abs diff to the library |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in ROWS:
        if row.missing:
            lines.append(f"| {row.library} | {row.name} | | | | | {row.missing} |")
            continue
        out, diff = compare(row)
        n = out.tokens.shape[1]
        cells = (row.library, row.name, n + row.n_prefix, row.n_prefix, grid_text(out.grid), row.norm, f"{diff:.1e}")
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
