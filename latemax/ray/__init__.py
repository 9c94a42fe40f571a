"""Many machines by Ray (``pip install "latemax[ray]"``): images encoded into a store, and search over stores.

Files must be under the same paths on every machine: a shared folder. torch.distributed is for training and torchrun
jobs, `latemax.distributed`.
"""

from .encoding import encode
from .searching import Searcher

__all__ = ["Searcher", "encode"]
