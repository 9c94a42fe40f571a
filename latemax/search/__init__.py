"""Search in a corpus: exact streamed top-k, and two stages with the first one's recall."""

from .exact import topk
from .merge import TopK
from .stages import MeanPool, Recall, first_stage_recall, two_stage

__all__ = ["MeanPool", "Recall", "TopK", "first_stage_recall", "topk", "two_stage"]
