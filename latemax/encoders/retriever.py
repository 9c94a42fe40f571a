"""Late-interaction retrievers as users have them: images and queries to the tokens that the host library scores."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor, nn

from .batching import check_batch, gather, steps
from .hosts import HOSTS, Encoded, Host, Pair, vision_tower
from .images import load_image
from .layouts import WHOLE, Layout, cells
from .loading import load_retriever, pretrained
from .modes import eval_mode
from .pieces import check_texts, query_pieces
from .pixels import as_list
from .quiet import quiet
from .text_encoder import join_texts
from .tokens import PatchTokens, TextTokens

KEEP = ("all", "patches")


class Retriever(nn.Module):
    """A model that encodes images and queries into one space, token by token, exactly as its own library does.

    Args:
        model: ``ColPaliForRetrieval``, ``ColQwen2ForRetrieval``, ``ColModernVBertForRetrieval`` or
            ``NeoMMEForRetrieval`` of transformers; a ``MultiVectorEncoder`` of sentence-transformers; a whole CLIP,
            SigLIP or SigLIP 2 model of transformers; or a model of open_clip.
        processor: The model's processor; None for a ``MultiVectorEncoder``; of open_clip its tokenizer.
        model_id: The model's name, kept with the tokens and recorded by stores; None takes the name that transformers
            loaded it by.

    Raises:
        TypeError: ``model`` or ``processor`` is of no usable kind.
        ValueError: A model that is not a known retriever.

    Example:
        >>> retriever = Retriever.from_pretrained("vidore/colqwen2-v1.0-hf")
        >>> pages = retriever.encode_images(["page-1.png", "page-2.png"], keep="patches")
        >>> queries = retriever.encode_queries(["revenue by region"])
        >>> scores = latemax.maxsim(queries.tokens, pages.tokens, queries.mask, pages.mask)
    """

    def __init__(self, model: nn.Module, processor: Any = None, *, model_id: str | None = None):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        self.model = model
        self.model_id = model_id or getattr(model, "name_or_path", "") or None
        self.host: Host | Pair
        kind = next((host for host in HOSTS if host.matches(model)), None)
        if kind is not None:
            self.host = kind(model, processor)
        elif Pair.matches(model):
            self.host = Pair(model, processor, self.model_id)
        else:
            raise ValueError(
                f"model: {type(model).__name__} is no retriever known here: ...ForRetrieval of transformers (ColPali, "
                f"ColQwen2, ColModernVBert, NeoMME), MultiVectorEncoder of sentence-transformers, CLIP, SigLIP, "
                f"SigLIP 2 or open_clip. For the patches of a plain vision model use PatchEncoder"
            )

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **options: Any) -> Retriever:
        """Loads a retriever with its processor, in eval mode.

        Args:
            name_or_path: A folder or hub name of transformers or sentence-transformers;
                "open_clip:<model>/<pretrained tag>".
            **options: Passed on to ``Retriever(...)``.

        Raises:
            ImportError: The library that the model asks for is missing; names the extra to install.
            ValueError: No such name, no retriever, or weights that the files lack.
            OSError: Nothing loadable there, or the hub cannot be reached and its files are not in the cache.
        """
        return pretrained(cls, load_retriever, name_or_path, options)

    @property
    def family(self) -> str:
        """What ``model`` was recognised as."""
        return self.host.family

    @property
    def space(self) -> str:
        """What the tokens may be compared with, within one model: "text" for CLIP and its kind, which share it with
        ``TextEncoder`` and ``PatchEncoder(projection="text")``; else "retrieval"."""
        return "text" if isinstance(self.host, Pair) else "retrieval"

    @property
    def vision_tower(self) -> nn.Module:
        """The part of the model that ``add_lora`` adapts."""
        return self.host.patches.adapter.tower if isinstance(self.host, Pair) else vision_tower(self.model)

    def encode_images(
        self,
        images: Any,
        batch_size: int = 8,
        *,
        keep: str = "all",
        device: torch.device | str | None = None,
        progress: bool = False,
        output_device: torch.device | str | None = None,
    ) -> PatchTokens:
        """Encodes images as the host's documents, without gradients and in eval mode.

        Args:
            images: One image or a list, as for ``PatchEncoder.encode``; turned upright first.
            batch_size: Images per forward.
            keep: "all" gives every token that the host scores; "patches" leaves out the text and special tokens of the
                image side.
            device: Moves the model there first; None stays where it is.
            progress: Shows a tqdm bar on stderr, and what the host library has to say.
            output_device: Where the tokens are gathered; None is the model's device.

        Returns:
            ``PatchTokens`` with ``is_patch`` and ``regions``. ``grid`` is that of each image's patches, row-major; None
            in it for an image whose patches are several grids (tiles), which only ``regions`` places.

        Raises:
            ValueError: No image, a bad ``keep``, or an image side whose layout is not known here.
        """
        if keep not in KEEP:
            raise ValueError(f"keep must be one of {KEEP}, got {keep!r}")
        images = as_list(images)
        if not images:
            raise ValueError("images must hold at least one image, got none")
        check_batch(batch_size)
        if device is not None:
            self.to(device)
        host = self.host
        if isinstance(host, Pair):
            with quiet(progress):
                out = host.patches.encode(images, batch_size=batch_size, progress=progress, output_device=output_device)
            return self._named(_with_regions(out))
        gathered: list[Tensor | None] = []
        grids: list[Any] = []
        with torch.no_grad(), eval_mode(self), quiet(progress):
            for start in steps(len(images), batch_size, progress, "image"):
                chunk = images[start : start + batch_size]
                loaded = [load_image(image, f"images[{start + i}]") for i, image in enumerate(chunk)]
                encoded = host.images(loaded)
                layouts = host.layouts(encoded, loaded)
                parts = _packed(encoded, layouts, keep)
                gathered = gather(gathered, parts, start, len(images), output_device or parts[0].device)
                grids += [layout.grid for layout in layouts]
        tokens, mask, is_patch, regions = gathered
        assert tokens is not None and mask is not None and is_patch is not None and regions is not None
        same = grids[0] is not None and all(grid == grids[0] for grid in grids)
        out = PatchTokens(tokens, mask, grids[0] if same else grids)
        out.is_patch = is_patch
        out.regions = regions.masked_fill(~is_patch[..., None], math.nan)
        out.crop = torch.tensor([WHOLE] * len(images))
        return self._named(out)

    def encode_queries(
        self,
        texts: str | list[str],
        batch_size: int = 32,
        *,
        truncate: bool = False,
        device: torch.device | str | None = None,
        progress: bool = False,
        output_device: torch.device | str | None = None,
    ) -> TextTokens:
        """Encodes texts as the host's queries: with its prefix, its augmentation tokens and its limits.

        Args:
            texts: One text or a list.
            batch_size: Texts per forward.
            truncate: For CLIP and its kind: cut texts that are longer than the model holds, instead of refusing them.
            device, progress, output_device: As in ``encode_images``.

        Returns:
            ``TextTokens`` of every token that the host scores; ``word_of`` is -1 for those that are not part
            of the text.

        Raises:
            TypeError: A text that is not a string.
            ValueError: No text, or one that is too long.
        """
        texts = check_texts(texts)
        check_batch(batch_size)
        if device is not None:
            self.to(device)
        host = self.host
        if isinstance(host, Pair):
            found = host.texts.encode(
                texts, batch_size, truncate=truncate, progress=progress, output_device=output_device
            )
            return self._named(found)
        with torch.no_grad(), eval_mode(self), quiet(progress):
            empty = host.query_ids("")
            parts = []
            for start in steps(len(texts), batch_size, progress, "text"):
                chunk = texts[start : start + batch_size]
                parts.append(_text_tokens(host, host.queries(chunk), chunk, empty))
        return self._named(join_texts(parts, output_device))

    def _named(self, out: Any) -> Any:
        out.model_id, out.space = self.model_id, self.space
        return out

    def extra_repr(self) -> str:
        return f"family={self.family!r}, model_id={self.model_id!r}"


def _first(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the kept tokens of every row, in order and padded, and the mask of those: both ``[b, n]``."""
    n = max(1, int(keep.sum(1).max()))
    order = torch.sort((~keep).to(torch.uint8), dim=1, stable=True).indices[:, :n]
    return order, keep.gather(1, order)


def _packed(encoded: Encoded, layouts: list[Layout], keep: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, mask, is_patch and regions of the kept tokens, moved to the front."""
    scored = encoded.mask.cpu()
    is_patch = torch.zeros_like(scored)
    regions = torch.zeros(*scored.shape, 4)
    for i, layout in enumerate(layouts):
        is_patch[i, scored[i]] = layout.is_patch
        regions[i, scored[i]] = layout.regions
    order, mask = _first(is_patch if keep == "patches" else scored)
    at = order.to(encoded.tokens.device)
    tokens = encoded.tokens.gather(1, at[..., None].expand(-1, -1, encoded.tokens.shape[-1]))
    tokens = tokens.masked_fill(~mask.to(tokens.device)[..., None], 0)
    boxes = regions.gather(1, order[..., None].expand(-1, -1, 4))
    return tokens, mask, is_patch.gather(1, order) & mask, boxes


def _text_tokens(host: Host, encoded: Encoded, texts: list[str], empty: list[int]) -> TextTokens:
    order, mask = _first(encoded.mask)
    tokens = encoded.tokens.gather(1, order[..., None].expand(-1, -1, encoded.tokens.shape[-1]))
    found = [
        query_pieces(host.tokenizer, ids[kept].tolist(), empty, text)
        for ids, kept, text in zip(encoded.ids, encoded.mask, texts, strict=True)
    ]
    n = order.shape[1]
    word_of = torch.tensor([[*places, *[-1] * (n - len(places))] for _, places, _ in found], device=mask.device)
    out = TextTokens(tokens.masked_fill(~mask[..., None], 0), mask, [pieces for pieces, _, _ in found], word_of)
    out.words = [words for _, _, words in found]
    return out


def _with_regions(out: PatchTokens) -> PatchTokens:
    """The tokens of a ``PatchEncoder``, all of which are patches, with their places."""
    out.is_patch = out.mask
    if out.crop is None:
        return out
    grids = out.grid if isinstance(out.grid, list) else [out.grid] * len(out.tokens)
    out.regions = torch.full((*out.mask.shape, 4), math.nan, device=out.mask.device)
    for i, (grid, box) in enumerate(zip(grids, out.crop.tolist(), strict=True)):
        out.regions[i, out.mask[i]] = cells(grid, tuple(box)).to(out.mask.device)
    return out
