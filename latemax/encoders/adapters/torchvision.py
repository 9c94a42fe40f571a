"""torchvision's VisionTransformer (vit_b_16 and its kin): one class token, a fixed image size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Adapter, RawTokens, image_size, offsize_error, pair


def matches(model: nn.Module) -> TorchvisionAdapter | None:
    """The adapter for torchvision's VisionTransformer, else None."""
    owned = {*model._modules, *model._parameters}
    if {"conv_proj", "class_token", "encoder"} <= owned and hasattr(type(model), "_process_input"):
        return TorchvisionAdapter(model)
    return None


class TorchvisionAdapter(Adapter):
    """torchvision's ViT; its parts are called one by one, because its forward ends in the head."""

    family = "torchvision VisionTransformer"
    unused_names = ("heads",)

    def __init__(self, model: Any):
        self.model = model
        super().__init__(model, n_prefix=1, dim=model.hidden_dim, norm_path="encoder.ln")

    def run(self, pixel_values: Tensor, **inputs: Any) -> RawTokens:
        model, encoder = self.model, self.model.encoder
        size, grid = image_size(pixel_values, pair(model.patch_size), self.family)
        if size != pair(model.image_size):
            how = "resize them, or rebuild the model with image_size= and interpolate_embeddings(...) its weights"
            raise offsize_error(self.family, size, pair(model.image_size), how)
        patches = model._process_input(pixel_values)
        tokens = torch.cat((model.class_token.expand(len(patches), -1, -1), patches), 1)
        return RawTokens(encoder.layers(encoder.dropout(tokens + encoder.pos_embedding)), grid)
