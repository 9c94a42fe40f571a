"""Queries as encoders return them, and the check that a store holds tokens of the same space."""

from __future__ import annotations

from typing import Any

from latemax.store import PatchStore


def unwrapped(q: Any, q_mask: Any, corpus: Any) -> tuple[Any, Any]:
    """``(q, q_mask)``, where q may be what an encoder returned: ``TextTokens`` or ``PatchTokens``.

    Raises:
        ValueError: a q_mask next to encoded tokens, which have their own; or a store of another model or space.
    """
    # by its fields: scoring imports no encoder
    if getattr(q, "_fields", ())[:2] != ("tokens", "mask"):
        return q, q_mask
    if q_mask is not None:
        raise ValueError("q_mask must be None with encoded tokens, which have a mask of their own")
    if isinstance(corpus, PatchStore):
        ours, theirs = (q.model_id, q.space), (corpus.model_id, corpus.space)
        if any(None not in pair and pair[0] != pair[1] for pair in zip(ours, theirs, strict=True)):
            raise ValueError(
                f"q must be of the space of {corpus.path}: {_named(*theirs)}; got {_named(*ours)}: encode it with the "
                f"store's model"
            )
    return q.tokens, q.mask


def _named(model_id: str | None, space: str | None) -> str:
    return f"the space {space or 'unknown'!r} of the model {model_id or 'unknown'!r}"
