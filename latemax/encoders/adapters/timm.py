"""``timm`` vision transformers: VisionTransformer, distilled, registers, EVA, SigLIP, BEiT, NaFlexViT and their kin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .base import RawTokens, ViewAdapter, check_dropping, image_size, is_norm, offsize_error, pair


def matches(model: nn.Module) -> TimmAdapter | None:
    """The adapter for a timm model with a patch grid and a known prefix, else None.

    A model built by its class, without ``timm.create_model``, has no ``pretrained_cfg`` and is recognised all the same.

    Raises:
        ValueError: A hierarchy, or a convolutional model of timm.
    """
    if not callable(getattr(type(model), "forward_features", None)):
        return None
    parts = model._modules
    if (
        isinstance(getattr(model, "num_prefix_tokens", None), int)
        and "blocks" in parts
        and ("patch_embed" in parts or "embeds" in parts)
    ):
        return TimmAdapter(model)
    if hasattr(model, "pretrained_cfg"):
        raise ValueError(
            f"timm {type(model).__name__} is not a plain ViT (no num_prefix_tokens): convolutional and hierarchical "
            f"models have no single patch grid; pass a callable that returns ([b, n, dim] tokens, (rows, cols)): "
            f"PatchEncoder(callable, n_prefix=0)"
        )
    return None


class TimmAdapter(ViewAdapter):
    """A plain ViT of timm; ``forward_features`` runs on the view."""

    def __init__(self, model: Any):
        self.model = model
        self.family = f"timm {type(model).__name__}"
        # Average-pooled models keep the final norm after the pool: forward_features leaves their tokens un-normed.
        norm_path = next((name for name in ("norm", "fc_norm") if is_norm(model._modules.get(name))), None)
        super().__init__(
            model,
            {"norm": nn.Identity(), "fc_norm": nn.Identity(), "attn_pool": None, "head": nn.Identity()},
            n_prefix=model.num_prefix_tokens,
            dim=model.embed_dim,
            norm_path=norm_path,
        )

    @property
    def embeds(self) -> Any:
        """The patch embedding: ``patch_embed``, or ``embeds`` in NaFlexViT."""
        return self.model.embeds if self.is_naflex else self.model.patch_embed

    @property
    def is_naflex(self) -> bool:
        """Whether the model takes padded patches."""
        return "patch_embed" not in self.model._modules

    def run(
        self,
        pixel_values: Tensor,
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        **inputs: Any,
    ) -> RawTokens:
        check_dropping(getattr(self.model, "patch_drop", None), self.family)
        if patch_coord is not None:
            return self._run_naflex(pixel_values, patch_coord, patch_valid, **inputs)
        embeds = self.embeds
        pads = bool(getattr(embeds, "dynamic_img_pad", False))
        size, grid = image_size(pixel_values, pair(embeds.patch_size), self.family, pads)
        native = getattr(embeds, "img_size", None)
        if getattr(embeds, "strict_img_size", False) and native is not None and size != pair(native):
            how = "build it with dynamic_img_size=True, or call model.set_input_size(img_size=...)"
            raise offsize_error(self.family, size, pair(native), how)
        return RawTokens(self.view.module.forward_features(pixel_values, **inputs), grid)

    def _run_naflex(self, patches: Tensor, patch_coord: Tensor, patch_valid: Tensor | None, **inputs: Any) -> RawTokens:
        if not self.is_naflex or patch_valid is None:
            raise ValueError(
                f"{self.family}: patch_coord [b, n, 2] and patch_valid [b, n] go together, and only NaFlexViT takes "
                f"them"
            )
        output = self.view.module.forward_features(patches, patch_coord=patch_coord, patch_valid=patch_valid, **inputs)
        valid = patch_valid != 0
        # Padded coordinates are zero in timm's collator but nothing promises it.
        last = patch_coord.masked_fill(~valid[..., None], 0).amax(1)
        grids = [(row + 1, col + 1) for row, col in last.tolist()]
        return RawTokens(output["patches"], grids, valid)

    def text_projection(self) -> Callable[[Tensor], Tensor]:
        if getattr(self.model, "attn_pool", None) is not None:
            raise ValueError(
                f"projection='text': {self.family} reaches its text space only through its attention pool, which "
                f"mixes all patches; there is no projection of single patches. Use projection=None, a module or an int"
            )
        head = getattr(self.model, "head", None)
        config = getattr(self.model, "pretrained_cfg", None) or {}
        # CLIP towers carry the projection as their head; a classifier has the same shape, so the name decides.
        if isinstance(head, nn.Linear) and "clip" in str(config.get("architecture", "")).lower():
            return head
        return super().text_projection()
