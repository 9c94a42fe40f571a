"""Texts to one vector per word piece, in the space of a ``PatchEncoder`` with ``projection="text"``."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from .adapters.base import parameter_like
from .batching import check_batch, steps
from .loading import load_text, pretrained
from .modes import eval_mode
from .pieces import Tokenized, check_texts
from .quiet import quiet
from .text_towers import find_text_tower
from .tokens import TextTokens, l2_normalize


class TextEncoder(nn.Module):
    """Wraps the text tower of CLIP, SigLIP, SigLIP 2 or open_clip and returns a vector for each word piece.

    Start, end and padding tokens are dropped. The tokens are the tower's hidden states after its final norm, through
    the map that the model trained for its pooled token: the space of ``PatchEncoder(model, projection="text")``.

    Args:
        model: A CLIP, SigLIP or SigLIP 2 model of transformers, whole or its text side; or a model of open_clip.
        tokenizer: Its tokenizer: of transformers, or ``open_clip.get_tokenizer(...)``.
        projection: "auto" applies the model's own map into the space it shares with images; None keeps the hidden
            states; an ``nn.Module`` is applied to ``[b, n, dim]`` instead.
        normalize: L2-normalise every token, computed in float32, returned in the tokens' dtype.
        model_id: The model's name, kept with the tokens; None takes the name that transformers loaded it by.

    Raises:
        TypeError: ``model`` or ``tokenizer`` is of no usable kind.
        ValueError: No known text tower; no projection of its own with "auto"; a bad argument.

    Example:
        >>> encoder = TextEncoder.from_pretrained("openai/clip-vit-base-patch16")
        >>> found = encoder.encode(["a dog on a sofa"])
        >>> found.pieces[0], found.tokens.shape
        (['a', 'dog', 'on', 'a', 'sofa'], torch.Size([1, 5, 512]))
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        projection: str | nn.Module | None = "auto",
        normalize: bool = True,
        model_id: str | None = None,
    ):
        super().__init__()
        if projection not in ("auto", None) and not isinstance(projection, nn.Module):
            raise ValueError(f"projection must be 'auto', None or an nn.Module, got {projection!r}")
        self.tower = find_text_tower(model)
        self.model = model
        self.tokenizer = tokenizer
        self._tokenize = self.tower.tokenize_with(tokenizer)
        self.normalize = normalize
        self.projection = projection if isinstance(projection, nn.Module) else None
        self._auto = projection == "auto"
        if self._auto and self.tower.projection() is None:
            raise ValueError(
                f"projection='auto' needs a model with a projection of its text, and this {self.tower.family} was "
                "loaded without: load CLIPModel or CLIPTextModelWithProjection, or pass projection=None or a module"
            )
        self.model_id = model_id or getattr(model, "name_or_path", "") or None

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **options: Any) -> TextEncoder:
        """Loads a model with its tokenizer, in eval mode.

        Args:
            name_or_path: A folder or hub name in transformers format; "open_clip:<model>/<pretrained tag>".
            **options: Passed on to ``TextEncoder(...)``.

        Raises:
            ImportError: The library that the name asks for is missing; names the extra to install.
            ValueError: No such name, or no text tower in the model.
            OSError: Nothing loadable there, or the hub cannot be reached and its files are not in the cache.
        """
        return pretrained(cls, load_text, name_or_path, options)

    @property
    def family(self) -> str:
        """What ``model`` was recognised as."""
        return self.tower.family

    @property
    def max_length(self) -> int:
        """Tokens that the model holds, with those that its tokenizer adds."""
        return self.tower.limit

    @property
    def space(self) -> str:
        """What the tokens may be compared with: "text", the space shared with images; "hidden", or "module"."""
        return "text" if self._auto else "hidden" if self.projection is None else "module"

    def forward(self, texts: str | list[str], *, truncate: bool = False) -> TextTokens:
        """Texts to tokens in one batch, with gradients: what a training loop calls.

        Args:
            texts: One text or a list.
            truncate: Cut texts that are longer than the model holds, instead of refusing them.

        Raises:
            TypeError, ValueError: As ``encode``.
        """
        return self._run(self._tokenize(check_texts(texts), truncate, 0))

    def _run(self, found: Tokenized) -> TextTokens:
        self.tower.sync()
        like = parameter_like(self.tower.module)
        device = like.device if like is not None else found.ids.device
        attention = None if found.attention is None else found.attention.to(device)
        hidden = self.tower.run(found.ids.to(device), attention)
        longest = max(1, *map(len, found.kept))
        index = torch.tensor([row + [0] * (longest - len(row)) for row in found.kept], device=device)
        mask = torch.tensor([[j < len(row) for j in range(longest)] for row in found.kept], device=device)
        tokens = self._finish(hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1])))
        word_of = torch.tensor([row + [-1] * (longest - len(row)) for row in found.word_of], device=device)
        out = TextTokens(tokens.masked_fill(~mask[..., None], 0), mask, found.pieces, word_of)
        out.words, out.model_id, out.space = found.words, self.model_id, self.space
        return out

    def _finish(self, tokens: Tensor) -> Tensor:
        project = self.tower.projection() if self._auto else self.projection
        if project is not None:
            tokens = project(tokens)
        return l2_normalize(tokens) if self.normalize else tokens

    def encode(
        self,
        texts: str | list[str],
        batch_size: int = 32,
        *,
        truncate: bool = False,
        device: torch.device | str | None = None,
        progress: bool = False,
        output_device: torch.device | str | None = None,
    ) -> TextTokens:
        """Encodes texts in batches, without gradients and in eval mode; a text's tokens do not depend on the batch.

        Args:
            texts: One text or a list. An empty text has no token: its mask is False, and it scores 0 everywhere.
            batch_size: Texts per forward.
            truncate: Cut texts that are longer than the model holds, instead of refusing them.
            device: Moves the encoder there first; None stays where it is.
            progress: Shows a tqdm bar on stderr, and what the host library has to say.
            output_device: Where the tokens are gathered; None is the encoder's device.

        Raises:
            TypeError: A text that is not a string.
            ValueError: No text, or one that is longer than the model holds, named with its number of tokens.
        """
        texts = check_texts(texts)
        check_batch(batch_size)
        if device is not None:
            self.to(device)
        with torch.no_grad(), eval_mode(self), quiet(progress):
            # All texts first: one that is too long ends the call before any work.
            starts = range(0, len(texts), batch_size)
            batches = [self._tokenize(texts[start : start + batch_size], truncate, start) for start in starts]
            found = [
                self._run(batches[start // batch_size]) for start in steps(len(texts), batch_size, progress, "text")
            ]
        return join_texts(found, output_device)


def join_texts(parts: list[TextTokens], device: torch.device | str | None = None) -> TextTokens:
    """Batches as one, padded to the longest."""
    longest = max(part.tokens.shape[1] for part in parts)

    def pad(tensors: list[Tensor], value: float) -> Tensor:
        padded = [torch.cat([t, t.new_full((len(t), longest - t.shape[1], *t.shape[2:]), value)], 1) for t in tensors]
        return torch.cat(padded).to(device or tensors[0].device)

    out = TextTokens(
        pad([part.tokens for part in parts], 0),
        pad([part.mask for part in parts], False),
        [row for part in parts for row in part.pieces],
        pad([part.word_of for part in parts], -1),
    )
    out.words = [row for part in parts for row in part.words]
    out.model_id, out.space = parts[0].model_id, parts[0].space
    return out
