"""What every family adapter is: how to run a tower up to its final norm, and what its tokens mean."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

Grid = tuple[int, int]


class RawTokens(NamedTuple):
    """Tokens straight from the tower, before its final norm."""

    tokens: Tensor  # [b, n_prefix + n, dim]
    grid: Grid | list[Grid]  # (rows, cols); one per image where a padded batch mixes sizes
    mask: Tensor | None = None  # [b, n] bool, True = real patch; None where nothing is padded


class Adapter:
    """One encoder family.

    `norm` is the norm that belongs on the patch tokens (None where the model has none) and is never run by `run`;
    `tower` is the module LoRA looks for attention in, `unused` the modules below it that `run` bypasses.
    """

    family = "unknown"

    def __init__(self, tower: nn.Module, *, n_prefix: int, dim: int | None, norm: nn.Module | None, norm_name: str):
        self.tower = tower
        self.n_prefix = n_prefix
        self.dim = dim
        self.norm = norm
        self.norm_name = norm_name if norm is not None else "none"
        self.unused: list[nn.Module] = []

    def run(self, pixel_values: Tensor, **inputs) -> RawTokens:
        raise NotImplementedError

    def text_projection(self) -> Callable[[Tensor], Tensor]:
        """The map of patch tokens into the model's text space; ValueError where the model has none."""
        raise ValueError(
            f"projection='text' needs a model with a patch-to-text projection; {self.family} has none. "
            "Pass projection=<nn.Module> or projection=<int> and train it"
        )

    def sync(self) -> None:
        """Follows attributes set on the model since the last call (train/eval, gradient checkpointing)."""


class View:
    """A module's twin that shares every parameter, buffer, child and hook with it, but with some attributes replaced.

    The library's own forward runs on the twin, so heads and poolers can be left out in every library version without
    touching the user's model. Shared are the very dictionaries, so `.to()`, LoRA and assigned parameters reach the
    twin.
    """

    def __init__(self, module: nn.Module, **replaced):
        self.source = module
        self.module = object.__new__(type(module))
        self.replaced = {"_compiled_call_impl": None, **replaced}
        if "forward" in vars(module):
            # A library (accelerate) bound a forward to the original: the twin must run the class's own.
            self.replaced["forward"] = types.MethodType(type(module).forward, self.module)
        self.sync()

    def sync(self) -> None:
        twin = vars(self.module)
        twin.update(vars(self.source))
        twin.update(self.replaced)


class ViewAdapter(Adapter):
    """An adapter whose tower runs as a `View` without its norm, pooler and head."""

    def __init__(self, tower: nn.Module, replaced: dict, **properties):
        super().__init__(tower, **properties)
        self.view = View(tower, **replaced)
        children = dict(tower.named_children())
        kept = (self.norm, None)
        self.unused = [children[name] for name in replaced if children.get(name) not in kept]

    def sync(self) -> None:
        self.view.sync()


def image_size(pixel_values: Tensor, patch_size: Grid, family: str, pads: bool = False) -> tuple[Grid, Grid]:
    """((height, width), (rows, cols)) of an image batch.

    Raises:
        ValueError: not [b, channels, height, width], or a side that is not a multiple of the patch in a model that
            would silently cut the rest off.
    """
    if pixel_values.ndim != 4:
        raise ValueError(
            f"pixel_values must be [b, channels, height, width] for {family}, got {tuple(pixel_values.shape)}"
        )
    size = tuple(pixel_values.shape[-2:])
    if pads:
        return size, tuple(math.ceil(s / p) for s, p in zip(size, patch_size, strict=True))
    if any(s % p or s == 0 for s, p in zip(size, patch_size, strict=True)):
        raise ValueError(
            f"pixel_values must have a height and width that are multiples of the patch {patch_size} for {family}, "
            f"got {size[0]}x{size[1]}; resize them: encoder.preprocess(images, size=(height, width))"
        )
    return size, tuple(s // p for s, p in zip(size, patch_size, strict=True))


def pair(value) -> Grid:
    """`value` as (height, width)."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def is_norm(module) -> bool:
    """Whether `module` is there and does something."""
    return isinstance(module, nn.Module) and not isinstance(module, nn.Identity)


def check_dropping(module: nn.Module | None, family: str) -> None:
    """RuntimeError if a patch-dropout module would drop tokens now."""
    if isinstance(module, nn.Module) and module.training and getattr(module, "prob", 0.0) > 0:
        raise RuntimeError(
            f"{family} drops patch tokens in training mode (patch dropout {module.prob}), so no grid is left; call "
            "encoder.eval(), or build the model with patch dropout 0"
        )


def offsize_error(family: str, got: Grid, want: Grid, how: str) -> ValueError:
    return ValueError(f"pixel_values must be {want[0]}x{want[1]} for this {family}, got {got[0]}x{got[1]}; {how}")


def parameter_like(module: nn.Module) -> Tensor | None:
    """The first floating-point parameter: tells the device and dtype the model works in."""
    return next((p for p in module.parameters() if torch.is_floating_point(p)), None)
