"""open_clip image towers: its own VisionTransformer, and timm trunks (SigLIP, EVA, PE ...) in its TimmModel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from . import timm
from .base import Adapter, RawTokens, ViewAdapter, check_dropping, image_size, offsize_error, pair


def matches(model: nn.Module) -> Adapter | None:
    """The adapter for an open_clip model or its ``.visual`` tower, else None.

    Raises:
        ValueError: A ResNet tower.
    """
    visual = model._modules.get("visual") or model
    parts = visual._modules
    trunk = parts.get("trunk")
    if trunk is not None and "head" in parts:
        return TrunkAdapter(visual) if timm.matches(trunk) is not None else None
    if "conv1" in parts and "ln_post" in parts and "class_embedding" in visual._parameters:
        return OpenClipAdapter(visual)
    if visual is not model and "attnpool" in parts:
        raise ValueError("this open_clip tower is a ResNet: it has no patch tokens; use a ViT tower, e.g. ViT-B-32")
    return None


class OpenClipAdapter(ViewAdapter):
    """open_clip's own VisionTransformer."""

    family = "open_clip VisionTransformer"

    def __init__(self, visual: Any):
        self.visual = visual
        self.has_pool = getattr(visual, "attn_pool", None) is not None
        replaced: dict[str, Any] = {"ln_post": nn.Identity(), "attn_pool": None, "proj": None}
        # With "none" the tower's forward returns every token, class token first; older releases ask a boolean instead.
        replaced.update(pool_type="none", global_average_pool=False, final_ln_after_pool=False, output_tokens=False)
        super().__init__(
            visual,
            replaced,
            n_prefix=1,
            dim=visual.class_embedding.shape[-1],
            # CoCa's ln_post belongs to the pooled queries that attn_pool makes.
            norm_path=None if self.has_pool else "ln_post",
        )

    def run(self, pixel_values: Tensor, **inputs: Any) -> RawTokens:
        check_dropping(getattr(self.visual, "patch_dropout", None), self.family)
        size, grid = image_size(pixel_values, pair(self.visual.patch_size), self.family)
        if size != pair(self.visual.image_size):
            how = "resize them, or create the model with force_image_size="
            raise offsize_error(self.family, size, pair(self.visual.image_size), how)
        return RawTokens(self.view.module(pixel_values), grid)

    def text_projection(self) -> Callable[[Tensor], Tensor]:
        if self.has_pool or self.visual.proj is None:
            raise ValueError(
                "projection='text': this open_clip tower pools with attention before its projection (CoCa), so there "
                "is no projection of single patches. Use projection=None, a module or an int"
            )
        return lambda tokens: tokens @ self.visual.proj


class TrunkAdapter(timm.TimmAdapter):
    """A timm trunk in open_clip's TimmModel."""

    def __init__(self, visual: Any):
        self.visual = visual
        super().__init__(visual.trunk)
        self.family = f"open_clip {self.family}"

    def text_projection(self) -> Callable[[Tensor], Tensor]:
        head = self.visual.head
        if getattr(self.model, "attn_pool", None) is None and "pool" not in head._modules and len(head):
            return head
        return super().text_projection()
