"""`timm` vision transformers: VisionTransformer, distilled, registers, EVA, SigLIP, BEiT, NaFlexViT and their kin."""

from __future__ import annotations

from torch import Tensor, nn

from .base import RawTokens, ViewAdapter, check_dropping, image_size, is_norm, offsize_error, pair


def matches(model: nn.Module) -> TimmAdapter | None:
    """The adapter for a timm model with a patch grid and a known prefix, else None. ValueError for hierarchies."""
    if not (callable(getattr(model, "forward_features", None)) and hasattr(model, "pretrained_cfg")):
        return None
    family = type(model).__name__
    if not isinstance(getattr(model, "num_prefix_tokens", None), int) or not hasattr(model, "blocks"):
        raise ValueError(
            f"timm {family} is not a plain ViT (no num_prefix_tokens): convolutional and hierarchical models have no "
            f"single patch grid; pass a callable that returns ([b, n, dim] tokens, (rows, cols)): "
            f"PatchEncoder(callable, n_prefix=0)"
        )
    return TimmAdapter(model)


class TimmAdapter(ViewAdapter):
    def __init__(self, model: nn.Module):
        self.model = model
        self.family = f"timm {type(model).__name__}"
        self.embeds = getattr(model, "patch_embed", None) or model.embeds
        self.is_naflex = not hasattr(model, "patch_embed")
        norm, norm_name = getattr(model, "norm", None), "norm"
        if not is_norm(norm):
            # Average-pooled models keep the final norm after the pool: forward_features leaves their tokens un-normed.
            norm, norm_name = getattr(model, "fc_norm", None), "fc_norm"
        super().__init__(
            model,
            {"norm": nn.Identity(), "fc_norm": nn.Identity(), "attn_pool": None, "head": nn.Identity()},
            n_prefix=model.num_prefix_tokens,
            dim=model.embed_dim,
            norm=norm if is_norm(norm) else None,
            norm_name=norm_name,
        )

    def run(self, pixel_values: Tensor, patch_coord=None, patch_valid=None, **inputs) -> RawTokens:
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

    def _run_naflex(self, patches, patch_coord, patch_valid, **inputs) -> RawTokens:
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

    def text_projection(self):
        if getattr(self.model, "attn_pool", None) is not None:
            raise ValueError(
                f"projection='text': {self.family} reaches its text space only through its attention pool, which "
                f"mixes all patches; there is no projection of single patches. Use projection=None, a module or an int"
            )
        head = getattr(self.model, "head", None)
        # CLIP towers carry the projection as their head; a classifier has the same shape, so the name decides.
        if isinstance(head, nn.Linear) and "clip" in str(self.model.pretrained_cfg.get("architecture", "")).lower():
            return head
        return super().text_projection()
