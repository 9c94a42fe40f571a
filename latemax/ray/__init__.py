"""Many machines by Ray (``pip install "latemax[ray]"``): images encoded into a store, and search over stores.

Files must be under the same paths on every machine, in a shared folder. For training and torchrun jobs, use
`latemax.distributed`.
"""

from .encoding import encode
from .searching import Searcher

__all__ = ["Searcher", "encode"]
