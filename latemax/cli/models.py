"""The model of ``latemax index`` and ``latemax search``: images and texts to tokens of one space."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from latemax.cli.files import reason_of
from latemax.encoders import LoRA, PatchEncoder, PatchTokens, Retriever, TextEncoder, TextTokens, hub
from latemax.encoders.hosts import Pair
from latemax.encoders.loading import LOADERS, LOCAL_NAMES
from latemax.encoders.quiet import quiet

if TYPE_CHECKING:
    from PIL.Image import Image

# spaces that texts share with images; see Retriever.space
WITH_TEXT = ("text", "retrieval")


class Encoded(NamedTuple):
    """The document of an image.

    Attributes:
        tokens: [l, dim].
        grid: (rows, cols) of the tokens, or None.
        regions: [l, 4], the place of each token where they are no grid, or None.
        crop: the part of the image that the grid covers, or None.
    """

    tokens: Tensor
    grid: tuple[int, int] | None
    regions: Tensor | None
    crop: list[float] | None


class Model:
    """An encoder of images, and of texts if it has a text side.

    Args:
        name: of the model.
        encoder: it.
        device: where it encodes; None is the CPU.

    Attributes:
        name, device: as given. space: of the tokens; see ``Retriever.space`` and ``PatchEncoder.space``.
    """

    def __init__(self, name: str, encoder: PatchEncoder | Retriever, device: str | None):
        self.name, self.device, self.space = name, device, encoder.space
        self.retriever = encoder if isinstance(encoder, Retriever) else None
        # a pair's own patch encoder takes a size
        self.patches: PatchEncoder | None = encoder if isinstance(encoder, PatchEncoder) else None
        if self.retriever is not None and isinstance(self.retriever.host, Pair):
            self.patches = self.retriever.host.patches

    def images(self, images: list[Any], size: int | None) -> list[Encoded]:
        """Encodes images, paths or Pillow images, in one batch; the tokens are on the CPU.

        Args:
            images: any number.
            size: in pixels; None is the model's own.

        Raises:
            ValueError: a size, of a retriever that chooses it itself; or what the encoder raises.
        """
        if self.patches is not None:
            out = self.patches.encode(
                images, batch_size=len(images), device=self.device, size=size, output_device="cpu"
            )
            return _documents(out)
        assert self.retriever is not None
        if size is not None:
            raise ValueError(f"--size: {self.name} chooses the size of its images itself")
        return _documents(self.retriever.encode_images(images, len(images), device=self.device, output_device="cpu"))

    def why_not(self, image: Image, size: int | None) -> str:
        """Returns why an image cannot be made the model's pixel values, or ""."""
        try:
            if self.patches is not None:
                self.patches.preprocess([image], size=size)
            else:
                self.images([image], size)
        except Exception as error:
            # a retriever also runs the model, whose failures are no fault of the image
            if self.patches is None and not isinstance(error, ValueError):
                raise
            return reason_of(error)
        return ""

    def text(self, text: str) -> TextTokens:
        """Encodes one text as a query; the tokens are on the CPU.

        Raises:
            ValueError: the model has no text side, or the text is too long.
        """
        if self.retriever is not None:
            return self.retriever.encode_queries([text], device=self.device, output_device="cpu")
        if self.space != "text":
            raise ValueError(f"{self.name} makes tokens of the space {self.space!r}, which no text shares")
        return TextEncoder.from_pretrained(self.name).encode([text], device=self.device, output_device="cpu")


def load_model(name: str, adapter: str | None, space: str | None, device: str | None) -> Model:
    """Loads a model.

    Args:
        name: a folder or hub name.
        adapter: a LoRA file for it; the projection that was trained with it is loaded too.
        space: of the tokens; None takes the space that images share with text where the model has a text side.
        device: as in `Model`.

    Raises:
        ImportError, OSError, ValueError: as ``PatchEncoder.from_pretrained`` and ``Retriever.from_pretrained``; or
            a model of another space.
    """
    encoder: PatchEncoder | Retriever
    where = "" if os.path.exists(name) else " (what is not in the cache is downloaded first, which may take minutes)"
    print(f"latemax: loading {name}{where}", file=sys.stderr, flush=True)
    with quiet(loads="transformers"):
        if adapter is not None:
            encoder = PatchEncoder.from_pretrained(name, **LoRA.encoder_options(adapter))
            LoRA.from_file(adapter, encoder)
            encoder.requires_grad_(False).eval()
        elif space in WITH_TEXT or (space is None and has_text(name)):
            encoder = Retriever.from_pretrained(name)
        else:
            encoder = PatchEncoder.from_pretrained(name)
    if space not in (None, encoder.space):
        raise ValueError(f"{name} makes tokens of the space {encoder.space!r}, the store holds those of {space!r}")
    return Model(name, encoder, device)


def has_text(name: str) -> bool:
    """Returns whether a model encodes texts too, by its configuration."""
    library, _, rest = name.partition(":")
    if not os.path.exists(name) and (name in LOCAL_NAMES or (rest and library in LOADERS)):
        return library == "open_clip"
    if hub.find(name, "modules.json") is not None:
        return True
    path = hub.find(name, "config.json")
    config = {} if path is None else hub.read_json(path)
    retrieval = any(one.endswith("ForRetrieval") for one in config.get("architectures") or ())
    return retrieval or {"text_config", "vision_config"} <= config.keys()


def _documents(out: PatchTokens) -> list[Encoded]:
    grids = out.grid if isinstance(out.grid, list) else [out.grid] * len(out.tokens)
    crops = [None] * len(grids) if out.crop is None else [[round(x, 6) for x in box] for box in out.crop.tolist()]
    found = []
    for i, (grid, crop) in enumerate(zip(grids, crops, strict=True)):
        mask = out.mask[i]
        tokens = out.tokens[i][mask]
        regions = None if out.regions is None else out.regions[i][mask.cpu()]
        # text tokens and tiles are no grid
        if grid is not None and grid[0] * grid[1] == len(tokens):
            regions = None
        elif regions is not None:
            grid = None
        found.append(Encoded(tokens, grid, regions, crop))
    return found
