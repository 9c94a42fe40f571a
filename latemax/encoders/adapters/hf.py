"""``transformers`` vision towers: ViT, DeiT, CLIP, SigLIP, SigLIP 2 NaFlex, BEiT, DINOv2 and 3, I-JEPA.

Module names moved between releases (CLIP's vision_model, ViT's attention linears), so everything is found by attribute.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .base import RawTokens, ViewAdapter, image_size, is_norm, pair

PREFIX_TOKENS = ("cls_token", "class_embedding", "distillation_token")
NORMS = ("layernorm", "post_layernorm", "norm")


def matches(model: nn.Module) -> HFAdapter | None:
    """The adapter for a ``transformers`` vision tower in ``model``, else None.

    Raises:
        ValueError: A vision-language model, or a tower without a fixed grid.
    """
    _refuse_vision_language(model)
    tower = _tower(model)
    if tower is None:
        return None
    family = type(model).__name__
    if hasattr(tower.embeddings, "random_masking"):
        raise ValueError(
            f"{family} masks and shuffles its patches at random in every forward, also with mask_ratio=0, so its "
            f"tokens have no grid; load the checkpoint into the plain ViT instead: ViTModel.from_pretrained(name)"
        )
    if getattr(tower.config, "depths", None) is not None:
        raise ValueError(
            f"{family} is a hierarchy that merges patches between stages, not a plain ViT; pass a callable that "
            f"returns ([b, n, dim] tokens, (rows, cols)): PatchEncoder(callable, n_prefix=0)"
        )
    return HFAdapter(model, tower)


def _tower(model: nn.Module) -> Any:
    """The module with the patch embedding: ``model`` or one of its towers.

    Only models with a transformers configuration are searched below the top: any other module may do more in its
    forward than call its child.
    """
    seen = [model]
    for module in seen:
        if not _has_config(module):
            continue
        if _has_patches(module):
            return module
        names = ("vision_model", "vision_tower", getattr(module, "base_model_prefix", ""), "model")
        for child in map(module._modules.get, names):
            if child is not None and child not in seen:
                seen.append(child)
    return None


def _has_config(module: nn.Module) -> bool:
    return hasattr(vars(module).get("config"), "model_type")


def _has_patches(module: nn.Module) -> bool:
    embeddings = module._modules.get("embeddings")
    return embeddings is not None and not {"patch_embeddings", "patch_embedding"}.isdisjoint(embeddings._modules)


def _refuse_vision_language(model: nn.Module) -> None:
    """Raises ValueError where ``model`` has a text side and is no dual encoder (CLIP, SigLIP).

    A retriever's tokens are the language model's states, projected; the tower's own would be a different space.
    """
    if not _has_config(model) or not _takes_text(model) or _is_dual_encoder(model):
        return
    towers = (
        name for name, part in model.named_modules() if name and not _takes_text(part) and _tower(part) is not None
    )
    tower = next(towers, None)
    if tower is None and not _has_patches(model) and not hasattr(model.config, "vision_config"):
        return
    use = f"; for the patches of its vision tower, PatchEncoder(model.{tower})" if tower else ""
    raise ValueError(
        f"model: {type(model).__name__} is a vision-language model: its retrieval tokens come from its language side, "
        f"not from its vision tower. Use Retriever(model, processor) for a late-interaction model{use}"
    )


def _takes_text(model: nn.Module) -> bool:
    """Whether ``model`` or any model of transformers in it reads ``input_ids``."""
    classes: set[Any] = {type(part) for part in model.modules() if _has_config(part)}
    return any(map(_reads_ids, classes))


@functools.cache
def _reads_ids(cls: Any) -> bool:
    return "input_ids" in inspect.signature(cls.forward).parameters


def _is_dual_encoder(model: nn.Module) -> bool:
    return {"text_model", "vision_model"} <= model._modules.keys() and hasattr(type(model), "get_text_features")


class HFAdapter(ViewAdapter):
    """A vision tower of transformers; its forward runs on the view."""

    def __init__(self, model: nn.Module, tower: Any):
        self.model = model
        self.config = tower.config
        self.family = type(model).__name__
        self.patch_size = pair(self.config.patch_size)
        native = getattr(self.config, "image_size", None)
        self.native_size = pair(native) if native is not None else None
        arguments = inspect.signature(type(tower).forward).parameters
        self.is_naflex = "spatial_shapes" in arguments
        # DINOv2 and DINOv3 follow any size on their own; the others want to be asked.
        self.can_interpolate = "interpolate_pos_encoding" in arguments
        replaced, norm_path = _without_head(tower)
        super().__init__(
            tower,
            replaced,
            n_prefix=_count_prefix(tower.embeddings),
            dim=self.config.hidden_size,
            norm_path=norm_path,
        )

    def run(self, pixel_values: Tensor, **inputs: Any) -> RawTokens:
        if self.is_naflex:
            return self._run_naflex(pixel_values, **inputs)
        size, grid = image_size(pixel_values, self.patch_size, self.family)
        if self.can_interpolate and size != self.native_size:
            inputs.setdefault("interpolate_pos_encoding", True)
        return RawTokens(_last_hidden(self.view.module(pixel_values, **inputs)), grid)

    def _run_naflex(
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        **inputs: Any,
    ) -> RawTokens:
        if pixel_attention_mask is None or spatial_shapes is None:
            raise ValueError(
                f"{self.family} takes padded patches: pass pixel_values [b, n, patch*patch*channels], "
                f"pixel_attention_mask [b, n] and spatial_shapes [b, 2], or the whole mapping that "
                f"encoder.preprocess(images) returns"
            )
        grids = [(rows, cols) for rows, cols in torch.as_tensor(spatial_shapes).tolist()]
        output = self.view.module(pixel_values, pixel_attention_mask, spatial_shapes, **inputs)
        return RawTokens(_last_hidden(output), grids, pixel_attention_mask != 0)

    def text_projection(self) -> Callable[[Tensor], Tensor]:
        projection = self.model._modules.get("visual_projection")
        if projection is not None:
            return projection
        if hasattr(self.tower, "head"):
            raise ValueError(
                f"projection='text': {self.family} reaches its text space only through its attention-pooling head, "
                f"which mixes all patches; there is no projection of single patches. Use projection=None, a module or "
                f"an int; Retriever(model, processor) gives the head one patch at a time"
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


def _without_head(tower: nn.Module) -> tuple[dict[str, Any], str | None]:
    """``(attributes to replace in the view, dotted name of the norm of the patch tokens)``."""
    replaced: dict[str, Any] = {}
    norm_path = None
    for name in NORMS:
        module = tower._modules.get(name)
        if module is not None:
            replaced[name] = nn.Identity()
            if is_norm(module):
                norm_path = name
    pooler = tower._modules.get("pooler")
    if pooler is not None:
        replaced["pooler"] = None
        if norm_path is None and is_norm(pooler._modules.get("layernorm")):
            # Mean-pooled BEiT keeps its final norm in the pooler, after the mean.
            norm_path = "pooler.layernorm"
    if hasattr(tower, "use_head"):
        replaced.update(use_head=False, head=None)
    return replaced, norm_path


def _last_hidden(output: Any) -> Tensor:
    return output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
