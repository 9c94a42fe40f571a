"""torchvision's VisionTransformer (vit_b_16 and its kin): one class token, a fixed image size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Adapter, RawTokens, image_size, offsize_error, pair


def matches(model: nn.Module) -> TorchvisionAdapter | None:
    """The adapter for torchvision's VisionTransformer, else None."""
    parts = ("conv_proj", "class_token", "_process_input", "encoder")
    if all(hasattr(model, part) for part in parts) and hasattr(model.encoder, "pos_embedding"):
        return TorchvisionAdapter(model)
    return None


class TorchvisionAdapter(Adapter):
    family = "torchvision VisionTransformer"

    def __init__(self, model: nn.Module):
        self.encoder = model.encoder
        super().__init__(model, n_prefix=1, dim=model.hidden_dim, norm=model.encoder.ln, norm_name="encoder.ln")
        self.unused = [model.heads]

    def run(self, pixel_values: Tensor, **inputs) -> RawTokens:
        model, encoder = self.tower, self.encoder
        size, grid = image_size(pixel_values, pair(model.patch_size), self.family)
        if size != pair(model.image_size):
            how = "resize them, or rebuild the model with image_size= and interpolate_embeddings(...) its weights"
            raise offsize_error(self.family, size, pair(model.image_size), how)
        patches = model._process_input(pixel_values)
        tokens = torch.cat((model.class_token.expand(len(patches), -1, -1), patches), 1)
        return RawTokens(encoder.layers(encoder.dropout(tokens + encoder.pos_embedding)), grid)
