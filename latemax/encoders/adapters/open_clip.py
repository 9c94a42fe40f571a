"""open_clip image towers: its own VisionTransformer, and timm trunks (SigLIP, EVA, PE ...) behind its TimmModel."""

from __future__ import annotations

from torch import Tensor, nn

from . import timm
from .base import Adapter, RawTokens, ViewAdapter, check_dropping, image_size, offsize_error, pair


def matches(model: nn.Module) -> Adapter | None:
    """The adapter for an open_clip model or its `.visual` tower, else None. ValueError for ResNet towers."""
    visual = model.visual if isinstance(getattr(model, "visual", None), nn.Module) else model
    if hasattr(visual, "trunk") and hasattr(visual, "head"):
        adapter = timm.matches(visual.trunk)
        return TrunkAdapter(visual) if adapter is not None else None
    if hasattr(visual, "conv1") and hasattr(visual, "ln_post") and hasattr(visual, "class_embedding"):
        return OpenClipAdapter(visual)
    if visual is not model and hasattr(visual, "attnpool"):
        raise ValueError("this open_clip tower is a ResNet: it has no patch tokens; use a ViT tower, e.g. ViT-B-32")
    return None


class OpenClipAdapter(ViewAdapter):
    family = "open_clip VisionTransformer"

    def __init__(self, visual: nn.Module):
        self.visual = visual
        self.has_pool = getattr(visual, "attn_pool", None) is not None
        replaced = {"ln_post": nn.Identity(), "attn_pool": None, "proj": None}
        # With "none" the tower's forward returns every token, class token first; older releases ask a boolean instead.
        replaced.update(pool_type="none", global_average_pool=False, final_ln_after_pool=False, output_tokens=False)
        super().__init__(
            visual,
            replaced,
            n_prefix=1,
            dim=visual.class_embedding.shape[-1],
            # CoCa's ln_post belongs to the pooled queries behind attn_pool.
            norm=None if self.has_pool else visual.ln_post,
            norm_name="ln_post",
        )

    def run(self, pixel_values: Tensor, **inputs) -> RawTokens:
        check_dropping(getattr(self.visual, "patch_dropout", None), self.family)
        size, grid = image_size(pixel_values, pair(self.visual.patch_size), self.family)
        if size != pair(self.visual.image_size):
            how = "resize them, or create the model with force_image_size="
            raise offsize_error(self.family, size, pair(self.visual.image_size), how)
        return RawTokens(self.view.module(pixel_values), grid)

    def text_projection(self):
        if self.has_pool or self.visual.proj is None:
            raise ValueError(
                "projection='text': this open_clip tower pools with attention before its projection (CoCa), so there "
                "is no projection of single patches. Use projection=None, a module or an int"
            )
        return ParameterProjection(self.visual, "proj")


class TrunkAdapter(timm.TimmAdapter):
    def __init__(self, visual: nn.Module):
        super().__init__(visual.trunk)
        self.family = f"open_clip {self.family}"
        self.visual = visual

    def text_projection(self):
        head = self.visual.head
        if getattr(self.model, "attn_pool", None) is None and "pool" not in dict(head.named_children()) and len(head):
            return head
        return super().text_projection()


class ParameterProjection:
    """tokens [..., dim] @ module.<name> [dim, out]; looks the parameter up at every call, so `.to()` and loading are "
    "seen."""

    def __init__(self, module: nn.Module, name: str):
        self.module, self.name = module, name

    def __call__(self, tokens: Tensor) -> Tensor:
        return tokens @ getattr(self.module, self.name)
