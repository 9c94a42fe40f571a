"""A ragged corpus of patch tokens on disk, and its conversions. Does not depend on scoring."""

from .arrow import from_arrow, to_arrow
from .files import StoreError
from .merge import merge_stores
from .packed import Packed
from .qdrant import from_qdrant, to_qdrant
from .reader import PatchStore
from .upgrade import upgrade
from .writer import StoreWriter

__all__ = [
    "Packed",
    "PatchStore",
    "StoreError",
    "StoreWriter",
    "from_arrow",
    "from_qdrant",
    "merge_stores",
    "to_arrow",
    "to_qdrant",
    "upgrade",
]
