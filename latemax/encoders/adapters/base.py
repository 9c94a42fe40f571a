"""What every family adapter is: how to run a tower up to its final norm, and what its tokens mean."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Grid = tuple[int, int]


class RawTokens(NamedTuple):
    """Tokens straight from the tower, before its final norm.

    Attributes:
        tokens: ``[b, n_prefix + n, dim]``.
        grid: ``(rows, cols)``, or one per image where a padded batch mixes sizes.
        mask: Bool ``[b, n]``, True = real patch; None where nothing is padded.
    """

    tokens: Tensor
    grid: Grid | list[Grid]
    mask: Tensor | None = None


class Adapter:
    """One encoder family.

    Every part of the model that users or libraries replace (norm, projection, head, the tower itself) is looked up by
    name when it is used, so a replaced module is followed.

    Attributes:
        tower: The module that makes the patch tokens; LoRA looks for attention in it.
        n_prefix: How many leading tokens are not patches.
        dim: Width of the tokens; None where it is unknown.
        norm_path: Dotted name below ``tower`` of the norm that belongs on the patch tokens, which ``run`` leaves out;
            None where the model has none.
        unused_names: Children of ``tower`` that ``run`` bypasses.
    """

    family = "unknown"
    unused_names: tuple[str, ...] = ()

    def __init__(self, tower: nn.Module, *, n_prefix: int, dim: int | None, norm_path: str | None = None):
        self.tower = tower
        self.n_prefix = n_prefix
        self.dim = dim
        self.norm_path = norm_path

    def run(self, pixel_values: Tensor, **inputs: Any) -> RawTokens:
        """Runs the tower without its final norm, pooler and head."""
        raise NotImplementedError

    @property
    def norm(self) -> nn.Module | None:
        """The norm of the patch tokens as it is now."""
        if self.norm_path is None:
            return None
        module = self.tower
        for name in self.norm_path.split("."):
            module = getattr(module, name)
        return module

    @property
    def norm_name(self) -> str:
        """The norm's dotted name in the tower, "none" where the model has none."""
        return self.norm_path or "none"

    @property
    def unused(self) -> list[nn.Module]:
        """Modules below ``tower`` that ``run`` bypasses."""
        children = (self.tower._modules.get(name) for name in self.unused_names)
        return [child for child in children if child is not None]

    def text_projection(self) -> Callable[[Tensor], Tensor]:
        """The model's map of patch tokens into its text space, looked up now.

        Raises:
            ValueError: The model has none.
        """
        raise ValueError(
            f"projection='text' needs a model with a patch-to-text projection; {self.family} has none. "
            "Pass projection=<nn.Module> or projection=<int> and train it"
        )

    def sync(self) -> None:
        """Follows attributes set on the model since the last call (train/eval, gradient checkpointing)."""


class View:
    """A module's twin that shares every parameter, buffer, child and hook with it, but with some attributes replaced.

    The library's own forward runs on the twin, so heads and poolers can be left out in every library version without
    touching the user's model. The dictionaries themselves are shared, so ``.to()``, LoRA and assigned parameters reach
    the twin.
    """

    def __init__(self, module: nn.Module, **replaced: Any):
        self.source = module
        self.module: Any = object.__new__(type(module))
        self.replaced = {"_compiled_call_impl": None, **replaced}
        if "forward" in vars(module):
            # A library (accelerate) bound a forward to the original: the twin must run the class's own.
            self.replaced["forward"] = types.MethodType(type(module).forward, self.module)
        self.sync()

    def sync(self) -> None:
        """Copies the source's attributes, the replaced ones excepted.

        One ``dict.update``: between two, another thread's forward would see the source's pooling or head.
        """
        vars(self.module).update({**vars(self.source), **self.replaced})


class ViewAdapter(Adapter):
    """An adapter whose tower runs as a ``View`` without its norm, pooler and head."""

    def __init__(self, tower: nn.Module, replaced: dict[str, Any], **properties: Any):
        super().__init__(tower, **properties)
        self.view = View(tower, **replaced)
        # The norm is left out of the view, but used afterwards.
        self.unused_names = tuple(name for name in replaced if name != self.norm_path)

    def sync(self) -> None:
        self.view.sync()


def image_size(pixel_values: Tensor, patch_size: Grid, family: str, pads: bool = False) -> tuple[Grid, Grid]:
    """``((height, width), (rows, cols))`` of an image batch.

    Raises:
        ValueError: Not ``[b, channels, height, width]``, or a side that is not a multiple of the patch in a model that
            would silently cut the rest off.
    """
    if pixel_values.ndim != 4:
        raise ValueError(
            f"pixel_values must be [b, channels, height, width] for {family}, got {tuple(pixel_values.shape)}"
        )
    height, width = pixel_values.shape[-2:]
    if pads:
        return (height, width), (math.ceil(height / patch_size[0]), math.ceil(width / patch_size[1]))
    if height % patch_size[0] or width % patch_size[1] or not height or not width:
        raise ValueError(
            f"pixel_values must have a height and width that are multiples of the patch {patch_size} for {family}, "
            f"got {height}x{width}; resize them: encoder.preprocess(images, size=(height, width))"
        )
    return (height, width), (height // patch_size[0], width // patch_size[1])


def pair(value: Any) -> Grid:
    """``value`` as ``(height, width)``."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def is_norm(module: object) -> bool:
    """Whether ``module`` is there and does something."""
    return isinstance(module, nn.Module) and not isinstance(module, nn.Identity)


def check_dropping(module: object, family: str) -> None:
    """Raises RuntimeError if a patch-dropout module would drop tokens now."""
    if isinstance(module, nn.Module) and module.training and getattr(module, "prob", 0.0) > 0:
        raise RuntimeError(
            f"{family} drops patch tokens in training mode (patch dropout {module.prob}), so no grid is left; call "
            "encoder.eval(), or build the model with patch dropout 0"
        )


def offsize_error(family: str, got: Grid, want: Grid, how: str) -> ValueError:
    """The error for a model of one image size."""
    return ValueError(f"pixel_values must be {want[0]}x{want[1]} for this {family}, got {got[0]}x{got[1]}; {how}")


def parameter_like(module: nn.Module) -> Tensor | None:
    """The first floating-point parameter, whose device and dtype are what the model works in."""
    return next((p for p in module.parameters() if torch.is_floating_point(p)), None)
