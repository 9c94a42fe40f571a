"""Texts to token ids, the pieces of text they are, and the words that these belong to."""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import Any, NamedTuple

import torch
from torch import Tensor

WORD = re.compile(r"\S+")
# What marks the beginning or the end of a word in the pieces of SentencePiece, byte-level BPE, CLIP and WordPiece.
MARKS = re.compile(r"^(▁|Ġ|##)+|</w>$")


class Tokenized(NamedTuple):
    """A batch of texts as a tower takes them.

    Attributes:
        ids: Int64 ``[b, l]``, padded.
        attention: Int64 ``[b, l]``, for towers that take it; None where the tokenizer gives none.
        kept: Per text, the positions of its pieces: neither padding nor what the tokenizer adds.
        pieces: Per text, the pieces at ``kept``.
        word_of: Per text, the word of each piece; -1 where the text has none.
        words: Per text, its words.
    """

    ids: Tensor
    attention: Tensor | None
    kept: list[list[int]]
    pieces: list[list[str]]
    word_of: list[list[int]]
    words: list[list[str]]


def check_texts(texts: Any, name: str = "texts") -> list[str]:
    """``texts`` as a list.

    Raises:
        TypeError: Neither a string nor an iterable of them.
        ValueError: No text.
    """
    found = [texts] if isinstance(texts, str) else list(texts)
    for i, text in enumerate(found):
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a str or a list of them, got {type(text).__name__} at {i}")
    if not found:
        raise ValueError(f"{name} must hold at least one text, got an empty list")
    return found


def word_spans(text: str) -> list[tuple[int, int]]:
    """Start and end of every word of ``text``."""
    return [match.span() for match in WORD.finditer(text)]


def place(spans: list[tuple[int, int]], text: str, start: int, end: int) -> int:
    """The word that the characters ``start`` to ``end`` belong to: that of the first one that is no space.

    A piece of nothing but space counts to the word after it, which it was cut from.
    """
    visible = next((i for i in range(start, end) if not text[i].isspace()), end)
    word = bisect_right(spans, (visible, len(text))) - 1
    if word >= 0 and visible >= spans[word][1]:
        word += 1
    return min(max(word, 0), len(spans) - 1)


def align(text: str, pieces: list[str]) -> list[tuple[int, int]]:
    """Start and end in ``text`` of pieces in reading order, found by looking for them.

    For tokenizers that keep no offsets. A piece that is not in the text as it is written (an unknown character) is
    placed where the search has got to.
    """
    lowered, at, found = text.lower(), 0, []
    if len(lowered) != len(text):
        lowered = text
    for piece in pieces:
        start = lowered.find(piece.lower(), at) if piece else -1
        if start < 0:
            found.append((at, at))
            continue
        at = start + len(piece)
        found.append((start, at))
    return found


def too_long(index: int, pieces: int, limit: int, text: str) -> ValueError:
    """The error for a text that the model cannot hold."""
    shown = text if len(text) <= 40 else text[:40] + "…"
    return ValueError(
        f"texts[{index}] ({shown!r}) has {pieces} tokens with those that the model adds, and the model holds {limit}; "
        f"shorten it, or pass truncate=True to cut it"
    )


def surface(tokenizer: Any, tokens: list[int]) -> list[str]:
    """The text of each token of a transformers tokenizer by itself, without space around it.

    A token of nothing but space, or of only a part of a character, is shown as the vocabulary writes it.
    """
    found = []
    for token, name in zip(tokens, tokenizer.convert_ids_to_tokens(tokens), strict=True):
        text = tokenizer.decode([token], clean_up_tokenization_spaces=False).strip()
        found.append(text if text and "\ufffd" not in text else MARKS.sub("", name) or name)
    return found


def query_pieces(
    tokenizer: Any, tokens: list[int], empty: list[int], text: str
) -> tuple[list[str], list[int], list[str]]:
    """The pieces of a retriever's query, the word of each (-1 for what the host puts around the text), and the words.

    Args:
        tokenizer: The host's.
        tokens: The scored tokens of the query.
        empty: Those of the empty query: what is in front of and after the text.
        text: The query.
    """
    shorter = min(len(tokens), len(empty))
    first = next((i for i in range(shorter) if tokens[i] != empty[i]), shorter)
    most = shorter - first
    after = next((i for i in range(most) if tokens[-1 - i] != empty[-1 - i]), most)
    last = len(tokens) - after
    pieces, spans = surface(tokenizer, tokens), word_spans(text)
    inside = align(text, pieces[first:last])
    places = [place(spans, text, a, b) for a, b in inside]
    return pieces, [-1] * first + places + [-1] * after, [text[a:b] for a, b in spans]


class HFTokenizer:
    """A tokenizer of transformers.

    Args:
        tokenizer: It.
        limit: Tokens that the tower holds.
        pads: Whether the tower wants every text padded to ``limit``.
    """

    def __init__(self, tokenizer: Any, limit: int, pads: bool):
        self.tokenizer, self.limit, self.pads = tokenizer, limit, pads

    def __call__(self, texts: list[str], truncate: bool, first: int = 0) -> Tokenized:
        fast = bool(getattr(self.tokenizer, "is_fast", False))
        # "longest" with truncation off would warn of what is checked below.
        encoded = self.tokenizer(
            texts,
            padding="max_length" if self.pads else "longest",
            truncation=truncate,
            max_length=self.limit if self.pads or truncate else None,
            return_attention_mask=True,
            return_special_tokens_mask=True,
            return_offsets_mapping=fast,
            verbose=False,
        )
        for i, mask in enumerate(encoded["attention_mask"]):
            if sum(mask) > self.limit:
                raise too_long(first + i, sum(mask), self.limit, texts[i])
        kept, pieces, word_of, words = [], [], [], []
        for i, text in enumerate(texts):
            special, mask = encoded["special_tokens_mask"][i], encoded["attention_mask"][i]
            at = [j for j, real in enumerate(mask) if real and not special[j]]
            bare = surface(self.tokenizer, [encoded["input_ids"][i][j] for j in at])
            spans = [tuple(encoded["offset_mapping"][i][j]) for j in at] if fast else align(text, bare)
            chars = word_spans(text)
            kept.append(at)
            pieces.append([text[a:b].strip() or piece for (a, b), piece in zip(spans, bare, strict=True)])
            word_of.append([place(chars, text, a, b) for a, b in spans])
            words.append([text[a:b] for a, b in chars])
        given = "attention_mask" in self.tokenizer.model_input_names
        attention = torch.tensor(encoded["attention_mask"]) if given else None
        return Tokenized(torch.tensor(encoded["input_ids"]), attention, kept, pieces, word_of, words)


class OpenClipTokenizer:
    """open_clip's own byte-pair tokenizer, and its wrapper of a transformers tokenizer.

    Args:
        tokenizer: A ``SimpleTokenizer``, ``HFTokenizer`` or ``SigLipTokenizer`` of open_clip.
        limit: Tokens that the tower holds.
    """

    def __init__(self, tokenizer: Any, limit: int):
        self.tokenizer, self.limit = tokenizer, limit
        if getattr(tokenizer, "reduction_fn", None) is not None or getattr(tokenizer, "tokenizer_mode", None):
            raise ValueError(
                "tokenizer: it drops or rearranges tokens (reduction_mask or tokenizer_mode), so they have no place in "
                "the text; build it without"
            )
        self.inner: Any = getattr(tokenizer, "tokenizer", None)

    def __call__(self, texts: list[str], truncate: bool, first: int = 0) -> Tokenized:
        kept, pieces, word_of, words = [], [], [], []
        ids = self.tokenizer(texts, context_length=self.limit)
        for i, text in enumerate(texts):
            start, bare, total = self._bare(text)
            if total > self.limit and not truncate:
                raise too_long(first + i, total, self.limit, text)
            bare = bare[: self.limit - (total - len(bare))]
            chars = word_spans(text)
            spans = align(text, bare)
            kept.append(list(range(start, start + len(bare))))
            pieces.append([text[a:b] or piece for (a, b), piece in zip(spans, bare, strict=True)])
            word_of.append([place(chars, text, a, b) for a, b in spans])
            words.append([text[a:b] for a, b in chars])
        return Tokenized(ids, None, kept, pieces, word_of, words)

    def _bare(self, text: str) -> tuple[int, list[str], int]:
        """Position of the first piece, the pieces, and how many tokens the text has with those that are added."""
        if self.inner is None:
            found = self.tokenizer.encode(text)
            decoded = [self.tokenizer.decode([token]).strip() for token in found]
            return 1, decoded, len(found) + 2
        cleaned = self.tokenizer.clean_fn(text) if hasattr(self.tokenizer, "clean_fn") else text
        encoded = self.inner([cleaned], return_special_tokens_mask=True, verbose=False)
        special = encoded["special_tokens_mask"][0]
        at = [j for j, added in enumerate(special) if not added]
        bare = surface(self.inner, [encoded["input_ids"][0][j] for j in at])
        return (at[0] if at else 0), bare, len(special)
