"""latemax: MaxSim late interaction for images.

from latemax import maxsim
scores = maxsim(query_tokens, page_tokens)  # [n_q, l_q, dim] x [n_d, l_d, dim] -> [n_q, n_d]
"""

from __future__ import annotations

from latemax import reference
from latemax.api import explain, maxsim, maxsim_pairs, maxsim_varlen, rerank, warmup
from latemax.module import MaxSim
from latemax.ops.select import Choice

__version__ = "0.1.0"
__all__ = [
    "Choice",
    "LoRA",
    "MaxSim",
    "PatchEncoder",
    "PatchTokens",
    "add_lora",
    "explain",
    "maxsim",
    "maxsim_pairs",
    "maxsim_varlen",
    "reference",
    "rerank",
    "warmup",
]
_ENCODERS = ("LoRA", "PatchEncoder", "PatchTokens", "add_lora")


def __getattr__(name: str):
    # the encoder is loaded when first asked for: scoring needs none of it
    if name in _ENCODERS:
        from latemax import encoders

        return getattr(encoders, name)
    raise AttributeError(f"module 'latemax' has no attribute {name!r}")
