"""Search in a corpus: exact streamed top-k, and two stages with the first one's recall."""

from .binary import BinaryScan
from .evaluate import Quality, ndcg, overlap, retention
from .exact import topk
from .merge import TopK
from .stages import MeanPool, Recall, first_stage_recall, two_stage

__all__ = [
    "BinaryScan",
    "MeanPool",
    "Quality",
    "Recall",
    "TopK",
    "first_stage_recall",
    "ndcg",
    "overlap",
    "retention",
    "topk",
    "two_stage",
]
