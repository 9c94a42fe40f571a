"""Text towers, one class a family: hidden states after the final norm, and the map to the text space."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .adapters.base import View
from .pieces import HFTokenizer, OpenClipTokenizer, Tokenized

Tokenize = Callable[[list[str], bool, int], Tokenized]
Project = Callable[[Tensor], Tensor]


class TextTower:
    """One text tower.

    Attributes:
        family: What it is called in messages.
        module: Its module, whose parameters say device and dtype.
        limit: Tokens that it holds, with those that the tokenizer adds.
    """

    family: str
    module: nn.Module
    limit: int

    def tokenize_with(self, tokenizer: Any) -> Tokenize:
        """The function from texts, whether to cut them, and the number of the first of them, to ``Tokenized``."""
        raise NotImplementedError

    def run(self, ids: Tensor, attention: Tensor | None) -> Tensor:
        """Hidden states after the final norm, ``[b, l, dim]``."""
        raise NotImplementedError

    def projection(self) -> Project | None:
        """The model's own map into the space it shares with images, looked up now; None where it has none."""
        raise NotImplementedError

    def sync(self) -> None:
        """Follows attributes set on the model since the last call."""


class HFText(TextTower):
    """CLIP, SigLIP and SigLIP 2 of transformers; ``model`` is the pair or its text side."""

    def __init__(self, model: Any):
        self.model = model
        self.module = model if _has_text(model) else model._modules["text_model"]
        self.family = type(model).__name__
        self.limit = self.module.config.max_position_embeddings  # type: ignore[union-attr, assignment]

    @staticmethod
    def matches(model: Any) -> bool:
        return _has_text(model) or ("text_model" in model._modules and _has_text(model._modules["text_model"]))

    def tokenize_with(self, tokenizer: Any) -> Tokenize:
        if not callable(getattr(tokenizer, "convert_ids_to_tokens", None)):
            raise TypeError(f"tokenizer must be one of transformers for {self.family}, got {type(tokenizer).__name__}")
        # SigLIP attends to its padding, which it was trained with.
        return HFTokenizer(tokenizer, self.limit, pads="head" in self.module._modules)

    def run(self, ids: Tensor, attention: Tensor | None) -> Tensor:
        return self.module(input_ids=ids, attention_mask=attention).last_hidden_state

    def projection(self) -> Project | None:
        return self.model._modules.get("text_projection") or self.module._modules.get("head")


class OpenClipText(TextTower):
    """open_clip's own text transformer: in the model (CLIP), or as its ``text`` (CustomTextCLIP)."""

    def __init__(self, model: Any):
        own = "ln_final" in model._modules
        self.module: Any = model if own else model._modules["text"]
        self.family = f"open_clip {type(model).__name__}"
        self.limit = self.module.context_length
        if getattr(self.module, "cls_emb", None) is not None:
            raise ValueError(
                f"model: the text tower of this {self.family} reaches its text space through a class token of its own "
                f"(CoCa), so there is no projection of single word pieces"
            )
        # With "none" the tower's own forward returns every token.
        pool = {"text_pool_type": "none"} if "visual" in self.module._modules else {"pool_type": "none"}
        self.view = View(self.module, text_projection=None, output_tokens=False, **pool)
        self.calls = "encode_text" if "visual" in self.module._modules else "forward"

    @staticmethod
    def matches(model: Any) -> bool:
        tower = model if "ln_final" in model._modules else model._modules.get("text")
        return tower is not None and {"token_embedding", "transformer", "ln_final"} <= tower._modules.keys()

    def tokenize_with(self, tokenizer: Any) -> Tokenize:
        return OpenClipTokenizer(tokenizer, self.limit)

    def run(self, ids: Tensor, attention: Tensor | None) -> Tensor:
        return getattr(self.view.module, self.calls)(ids)

    def projection(self) -> Project | None:
        matrix = self.module.text_projection
        if matrix is None or isinstance(matrix, nn.Module):
            return matrix
        return lambda tokens: tokens @ matrix

    def sync(self) -> None:
        self.view.sync()


class OpenClipHFText(TextTower):
    """A text model of transformers in open_clip's ``HFTextEncoder``."""

    def __init__(self, model: Any):
        self.module: Any = model._modules["text"]
        self.family = f"open_clip {type(model).__name__} ({self.module.config.model_type})"
        self.limit = self.module.context_length

    @staticmethod
    def matches(model: Any) -> bool:
        text = model._modules.get("text")
        return text is not None and {"transformer", "pooler", "proj"} <= text._modules.keys()

    def tokenize_with(self, tokenizer: Any) -> Tokenize:
        return OpenClipTokenizer(tokenizer, self.limit)

    def run(self, ids: Tensor, attention: Tensor | None) -> Tensor:
        real = (ids != self.module.config.pad_token_id).long()
        return self.module.transformer(input_ids=ids, attention_mask=real).last_hidden_state

    def projection(self) -> Project | None:
        return self.module.proj


FAMILIES: tuple[Any, ...] = (HFText, OpenClipText, OpenClipHFText)


def find_text_tower(model: Any) -> TextTower:
    """The text tower of ``model``.

    Raises:
        TypeError: No module.
        ValueError: No text tower that is known here.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    for family in FAMILIES:
        if family.matches(model):
            return family(model)
    raise ValueError(
        f"model: {type(model).__name__} has no text tower known here: CLIP, SigLIP or SigLIP 2 of transformers, "
        f"or a model of open_clip. For a late-interaction model (ColPali, ColQwen2, ...) use Retriever"
    )


def _has_text(module: nn.Module) -> bool:
    """Whether ``module`` is a text tower of CLIP or SigLIP in transformers."""
    embeddings = module._modules.get("embeddings")
    known = embeddings is not None and {"token_embedding", "position_embedding"} <= embeddings._modules.keys()
    return known and "final_layer_norm" in module._modules
