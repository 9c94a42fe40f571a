"""Search in a corpus: exact streamed top-k, and two stages with the first one's recall."""

from .binary import BinaryScan
from .evaluate import Quality, ndcg, overlap, retention
from .exact import topk
from .first import FirstStage
from .lemur import Lemur
from .merge import TopK
from .muvera import Muvera
from .pooled import MeanPool, RowPool
from .stages import Recall, first_stage_recall, two_stage

__all__ = [
    "BinaryScan",
    "FirstStage",
    "Lemur",
    "MeanPool",
    "Muvera",
    "Quality",
    "Recall",
    "RowPool",
    "TopK",
    "first_stage_recall",
    "ndcg",
    "overlap",
    "retention",
    "topk",
    "two_stage",
]
