"""Any ViT to patch tokens ready for late interaction."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .adapters import find_adapter
from .adapters.base import Grid, RawTokens, parameter_like
from .batching import encode_images
from .loading import load
from .preprocess import Preprocess, preprocess_of
from .tokens import PatchTokens


class PatchEncoder(nn.Module):
    """Wraps a vision transformer and returns its final-normed, projected, L2-normalised patch tokens.

    Class, distillation and register tokens are dropped; no pooler, head or attention pool runs; the grid is checked
    against the number of tokens. The family is found by probing `model`, which is neither copied nor changed.

    Args:
        model: a vision transformer of transformers, timm, torchvision or open_clip (a full CLIP model too); or, with
            `n_prefix`, any module or callable that maps pixel values to [b, n_prefix + n, dim] tokens (or to
            (tokens, (rows, cols)) where patches are not square or the image is padded).
        projection: None keeps the model's width; "text" applies CLIP's own patch-to-text projection; an nn.Module is
            applied to [b, n, dim]; an int makes a fresh, trainable nn.Linear(dim, int, bias=False), as ColPali does
            with 128.
        normalize: L2-normalise every token, computed in float32, returned in the tokens' dtype.
        final_norm: "auto" applies the norm that belongs on the patch tokens, wherever the family keeps it (timm's
            `fc_norm` models and mean-pooled BEiT keep it behind the pool; CLIP applies `post_layernorm` to the class
            token only); None gives the tokens before it; an nn.Module replaces it.
        n_prefix: how many leading tokens are no patches; None asks the model.

    Raises:
        TypeError, ValueError: naming the argument; unknown, convolutional, hierarchical and random-masking models are
            refused with what to do instead.
    """

    def __init__(
        self,
        model,
        *,
        projection: str | int | nn.Module | None = None,
        normalize: bool = True,
        final_norm: str | nn.Module | None = "auto",
        n_prefix: int | None = None,
        preprocess: Preprocess | None = None,
    ):
        super().__init__()
        if final_norm not in ("auto", None) and not isinstance(final_norm, nn.Module):
            raise ValueError(f"final_norm must be 'auto', None or an nn.Module, got {final_norm!r}")
        self.adapter = find_adapter(model, n_prefix)
        # A plain callable is no child module, but a module hidden in one is still found by `adapter`.
        self.model = model
        self.normalize = normalize
        self.final_norm = final_norm if isinstance(final_norm, nn.Module) else None
        self._norm_auto = final_norm == "auto"
        self.projection = self._make_projection(projection)
        # In a tuple, so that a projection that belongs to the model is not registered twice.
        self._text = (self.adapter.text_projection(),) if projection == "text" else ()
        self._preprocess = preprocess

    def _make_projection(self, projection) -> nn.Module | None:
        if projection is None or projection == "text":
            return None
        if isinstance(projection, nn.Module):
            return projection
        if not isinstance(projection, int) or isinstance(projection, bool) or projection < 1:
            raise ValueError(f"projection must be None, 'text', an int >= 1 or an nn.Module, got {projection!r}")
        if self.adapter.dim is None:
            raise ValueError(
                f"projection={projection}: the token width of a {self.adapter.family} is unknown; pass "
                f"nn.Linear(dim, {projection}, bias=False) instead"
            )
        like = parameter_like(self.adapter.tower)
        return nn.Linear(self.adapter.dim, projection, bias=False, device=like.device, dtype=like.dtype)

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, **options) -> PatchEncoder:
        """Loads a model with its own preprocessing, in eval mode; `options` go to `PatchEncoder(...)`.

        Names: "dinov2-small" (real DINOv2 ViT-S/14 weights from a pip wheel, no model hub needed); a folder or hub name
            in
        transformers format; "timm:<model>"; "torchvision:<model>"; "open_clip:<model>/<pretrained tag>".

        Raises:
            ImportError: the library that the name asks for is missing; names the extra to install.
            FileNotFoundError, OSError, RuntimeError: nothing loadable there, or the download failed.
        """
        model, preprocess = load(name_or_path)
        options.setdefault("preprocess", preprocess)
        return cls(model, **options).eval()

    @property
    def family(self) -> str:
        """What `model` was recognised as."""
        return self.adapter.family

    @property
    def n_prefix(self) -> int:
        """How many leading tokens are dropped."""
        return self.adapter.n_prefix

    @property
    def norm_name(self) -> str:
        """Name of the norm applied to the patch tokens: the model's attribute, "custom" or "none"."""
        if self.final_norm is not None:
            return "custom"
        return self.adapter.norm_name if self._norm_auto else "none"

    def forward(self, pixel_values, *, return_prefix: bool = False, **inputs) -> PatchTokens:
        """Pixel values [b, channels, height, width] (or a mapping of the model's inputs, padded patches included) to
        tokens.

        Other image sizes than the model's own work where the model allows them, and are refused with the way out where
        not.

        Args:
            return_prefix: also return class, distillation and register tokens, treated like the patches.
            inputs: passed on to the model.

        Raises:
            ValueError: wrong shape, or the tokens left do not fill the grid.
            RuntimeError: the model would drop tokens at random (patch dropout in training mode).
        """
        if isinstance(pixel_values, Mapping):
            inputs = {**pixel_values, **inputs}
            name = "patches" if "patches" in inputs else "pixel_values"
            if name not in inputs:
                raise ValueError(f"pixel_values: the mapping must hold 'pixel_values', got {sorted(inputs)}")
            pixel_values = inputs.pop(name)
        adapter = self.adapter
        if not torch.compiler.is_compiling():
            adapter.sync()
        raw = adapter.run(pixel_values, **inputs)
        p = adapter.n_prefix
        self._check_grid(raw, p)
        patches = raw.tokens[:, p:]
        mask = raw.mask
        if mask is None:
            mask = torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device)
        tokens = self._finish(patches)
        if raw.mask is not None:
            tokens = tokens.masked_fill(~mask[..., None], 0)
        prefix = self._finish(raw.tokens[:, :p]) if return_prefix else None
        return PatchTokens(tokens, mask, raw.grid, prefix)

    def _check_grid(self, raw: RawTokens, p: int) -> None:
        if raw.tokens.ndim != 3:
            raise ValueError(
                f"{self.family} returned {tuple(raw.tokens.shape)}, not [b, n, dim] tokens: it is no plain ViT; pass a "
                "callable that returns (tokens, (rows, cols)) with n_prefix=0"
            )
        n = raw.tokens.shape[1] - p
        if isinstance(raw.grid, list):
            wrong = [grid for grid in raw.grid if grid[0] * grid[1] > n]
        else:
            wrong = [raw.grid] if raw.grid[0] * raw.grid[1] != n else []
        if wrong:
            rows, cols = wrong[0]
            raise ValueError(
                f"{self.family}: {raw.tokens.shape[1]} tokens less n_prefix={p} leaves {n}, but the grid "
                f"{rows}x{cols} has {rows * cols} patches; the model drops, merges or adds tokens. Set n_prefix=, or "
                f"turn that off"
            )

    def _finish(self, tokens: Tensor) -> Tensor:
        norm = self.final_norm if self.final_norm is not None else (self.adapter.norm if self._norm_auto else None)
        if norm is not None:
            tokens = norm(tokens)
        project = self._text[0] if self._text else self.projection
        if project is not None:
            tokens = project(tokens)
        if self.normalize:
            # The eps of F.normalize: a zero token stays zero.
            length = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True, dtype=_float32_or_more(tokens))
            tokens = (tokens / length.clamp_min(1e-12)).to(tokens.dtype)
        return tokens

    def train(self, mode: bool = True) -> PatchEncoder:
        super().train(mode)
        self.adapter.sync()
        return self

    @property
    def image_transform(self) -> Preprocess:
        """The model's own preprocessing; ValueError where nothing tells it."""
        if self._preprocess is None:
            self._preprocess = preprocess_of(self.adapter)
        return self._preprocess

    def preprocess(self, images, *, size: int | Grid | None = None):
        """Images to pixel values with the model's own size, mean and standard deviation; see `Preprocess`.

        Args:
            images: one image or a list: PIL image, path, array [h, w(, channels)], tensor [channels, h, w].
            size: None follows the model; (height, width) squashes the whole image to exactly that; an int keeps the
                model's resize-and-crop rule at that size.

        Returns:
            float32 [b, 3, height, width]; for NaFlex models the mapping that `forward` takes.
        """
        return self.image_transform(images, size=size)

    @torch.no_grad()
    def encode(
        self,
        images,
        *,
        batch_size: int = 32,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        return_prefix: bool = False,
        size: int | Grid | None = None,
        output_device: torch.device | str | None = None,
    ) -> PatchTokens:
        """Encodes images in batches, without gradients and in eval mode (the mode is put back afterwards).

        Args:
            images: as for `preprocess`; any iterable of them.
            dtype: torch.float16 or torch.bfloat16 runs mixed precision (torch.autocast) and gives the tokens in that
                dtype; None keeps the model's.
            device: moves the encoder there first; None stays where it is.
            progress: a tqdm bar on stderr.
            output_device: where the tokens are gathered; None is the encoder's device, "cpu" spares its memory.

        Returns:
            PatchTokens over all images, in order. Images of different grids (NaFlex) are padded to the longest, and
            `grid` is then a list.
        """
        if device is not None:
            self.to(device)
        return encode_images(self, images, batch_size, dtype, progress, return_prefix, size, output_device)

    def extra_repr(self) -> str:
        return f"family={self.family!r}, n_prefix={self.n_prefix}, norm={self.norm_name!r}, normalize={self.normalize}"


def _float32_or_more(tokens: Tensor) -> torch.dtype:
    return torch.float64 if tokens.dtype == torch.float64 else torch.float32
