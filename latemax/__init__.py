"""latemax: MaxSim late interaction for images.

from latemax import maxsim
scores = maxsim(query_tokens, page_tokens)  # [n_q, l_q, dim] x [n_d, l_d, dim] -> [n_q, n_d]
"""

from __future__ import annotations

import importlib

from latemax import reference
from latemax.api import explain, maxsim, maxsim_pairs, maxsim_varlen, rerank, smooth_maxsim
from latemax.bounds import maxsim_bounds
from latemax.module import MaxSim
from latemax.ops.dispatch import Choice
from latemax.quantized import QuantizedTokens, quantize
from latemax.warm import warmup

__version__ = "0.1.0"
__all__ = [
    "BinaryScan",
    "Choice",
    "Lemur",
    "LoRA",
    "MaxSim",
    "MeanPool",
    "Muvera",
    "PatchEncoder",
    "PatchStore",
    "PatchTokens",
    "QuantizedTokens",
    "Retriever",
    "RowPool",
    "StoreError",
    "StoreWriter",
    "TextEncoder",
    "TextTokens",
    "TopK",
    "add_lora",
    "explain",
    "first_stage_recall",
    "maxsim",
    "maxsim_bounds",
    "maxsim_pairs",
    "maxsim_varlen",
    "merge_stores",
    "quantize",
    "reference",
    "rerank",
    "smooth_maxsim",
    "topk",
    "two_stage",
    "warmup",
]
# loaded when first asked for: scoring needs none of it
_LATER = {
    "encoders": ("LoRA", "PatchEncoder", "PatchTokens", "Retriever", "TextEncoder", "TextTokens", "add_lora"),
    "store": ("PatchStore", "StoreError", "StoreWriter", "merge_stores"),
    "search": (
        "BinaryScan",
        "Lemur",
        "MeanPool",
        "Muvera",
        "RowPool",
        "TopK",
        "first_stage_recall",
        "topk",
        "two_stage",
    ),
}
_MODULES = ("analysis", "compat", "ray", "viz")


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"latemax.{name}")
    for module, names in _LATER.items():
        if name in names:
            return getattr(importlib.import_module(f"latemax.{module}"), name)
    raise AttributeError(f"module 'latemax' has no attribute {name!r}")
