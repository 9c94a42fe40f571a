"""`transformers` vision towers: ViT, DeiT, CLIP, SigLIP, SigLIP 2 NaFlex, BEiT, DINOv2 (registers too), DINOv3, I-JEPA
...

Module names moved between releases (CLIP's vision_model, ViT's attention linears), so everything is found by attribute.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from .base import RawTokens, ViewAdapter, image_size, is_norm, pair

PREFIX_TOKENS = ("cls_token", "class_embedding", "distillation_token")
NORMS = ("layernorm", "post_layernorm", "norm")


def matches(model: nn.Module) -> HFAdapter | None:
    """The adapter for a `transformers` vision tower in `model`, else None. ValueError for towers without a fixed "
    "grid."""
    tower = _tower(model)
    if tower is None:
        return None
    family = type(model).__name__
    config = getattr(tower, "config", None)
    if hasattr(tower.embeddings, "random_masking"):
        raise ValueError(
            f"{family} masks and shuffles its patches at random in every forward, also with mask_ratio=0, so its "
            f"tokens have no grid; load the checkpoint into the plain ViT instead: ViTModel.from_pretrained(name)"
        )
    if getattr(config, "depths", None) is not None:
        raise ValueError(
            f"{family} is a hierarchy that merges patches between stages, not a plain ViT; pass a callable that "
            f"returns ([b, n, dim] tokens, (rows, cols)): PatchEncoder(callable, n_prefix=0)"
        )
    return HFAdapter(model, tower)


def _tower(model: nn.Module) -> nn.Module | None:
    seen = [model]
    if callable(getattr(model, "get_base_model", None)):
        # PEFT puts its wrapper around the library's model.
        seen.append(model.get_base_model())
    for module in seen:
        if _has_patches(module):
            return module
        names = ("vision_model", "vision_tower", getattr(module, "base_model_prefix", ""), "model")
        for name in filter(None, names):
            child = getattr(module, name, None)
            if isinstance(child, nn.Module) and child not in seen:
                seen.append(child)
    return None


def _has_patches(module: nn.Module) -> bool:
    embeddings = getattr(module, "embeddings", None)
    return hasattr(embeddings, "patch_embeddings") or hasattr(embeddings, "patch_embedding")


class HFAdapter(ViewAdapter):
    def __init__(self, model: nn.Module, tower: nn.Module):
        self.model = model
        self.config = tower.config
        self.family = type(model).__name__
        embeddings = tower.embeddings
        self.patch_size = pair(self.config.patch_size)
        native = getattr(self.config, "image_size", None)
        self.native_size = pair(native) if native is not None else None
        arguments = inspect.signature(type(tower).forward).parameters
        self.is_naflex = "spatial_shapes" in arguments
        # DINOv2 and DINOv3 follow any size on their own; the others want to be asked.
        self.can_interpolate = "interpolate_pos_encoding" in arguments
        replaced, norm, norm_name = _without_head(tower)
        super().__init__(
            tower,
            replaced,
            n_prefix=_count_prefix(embeddings),
            dim=self.config.hidden_size,
            norm=norm,
            norm_name=norm_name,
        )

    def run(self, pixel_values: Tensor, **inputs) -> RawTokens:
        if self.is_naflex:
            return self._run_naflex(pixel_values, **inputs)
        size, grid = image_size(pixel_values, self.patch_size, self.family)
        if self.can_interpolate and size != self.native_size:
            inputs.setdefault("interpolate_pos_encoding", True)
        return RawTokens(_last_hidden(self.view.module(pixel_values, **inputs)), grid)

    def _run_naflex(self, pixel_values, pixel_attention_mask=None, spatial_shapes=None, **inputs) -> RawTokens:
        if pixel_attention_mask is None or spatial_shapes is None:
            raise ValueError(
                f"{self.family} takes padded patches: pass pixel_values [b, n, patch*patch*channels], "
                f"pixel_attention_mask [b, n] and spatial_shapes [b, 2], or the whole mapping that "
                f"encoder.preprocess(images) returns"
            )
        grids = [tuple(shape) for shape in torch.as_tensor(spatial_shapes).tolist()]
        output = self.view.module(pixel_values, pixel_attention_mask, spatial_shapes, **inputs)
        return RawTokens(_last_hidden(output), grids, pixel_attention_mask != 0)

    def text_projection(self):
        projection = getattr(self.model, "visual_projection", None)
        if projection is not None:
            return projection
        if hasattr(self.tower, "head"):
            raise ValueError(
                f"projection='text': {self.family} reaches its text space only through its attention-pooling head, "
                f"which mixes all patches; there is no projection of single patches. Use projection=None, a module or "
                f"an int"
            )
        if hasattr(self.tower, "post_layernorm"):
            raise ValueError(
                f"projection='text': {self.family} was loaded without its projection; load CLIPModel or "
                "CLIPVisionModelWithProjection instead"
            )
        return super().text_projection()


def _count_prefix(embeddings: nn.Module) -> int:
    n_prefix = sum(isinstance(getattr(embeddings, name, None), Tensor) for name in PREFIX_TOKENS)
    registers = getattr(embeddings, "register_tokens", None)
    return n_prefix + (registers.shape[1] if isinstance(registers, Tensor) else 0)


def _without_head(tower: nn.Module) -> tuple[dict, nn.Module | None, str]:
    """(attributes to replace in the view, the norm of the patch tokens, its name)."""
    replaced: dict = {}
    norm, norm_name = None, ""
    for name in NORMS:
        if isinstance(getattr(tower, name, None), nn.Module):
            replaced[name] = nn.Identity()
            if is_norm(getattr(tower, name)):
                norm, norm_name = getattr(tower, name), name
    pooler = getattr(tower, "pooler", None)
    if isinstance(pooler, nn.Module):
        replaced["pooler"] = None
        if norm is None and is_norm(getattr(pooler, "layernorm", None)):
            # Mean-pooled BEiT keeps its final norm in the pooler, after the mean.
            norm, norm_name = pooler.layernorm, "pooler.layernorm"
    if hasattr(tower, "use_head"):
        replaced.update(use_head=False, head=None)
    return replaced, norm, norm_name


def _last_hidden(output) -> Tensor:
    return output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
