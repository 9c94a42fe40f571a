"""Evidence from MaxSim: which tokens hold the maximum, by how much, and where in the image.

Every function returns data; ``latemax.viz`` draws it.
"""

from latemax.analysis._groups import own_pairs, token_groups
from latemax.analysis.grounding import GroundingMap, convert_axes, from_colpali, grounding_map, to_colpali
from latemax.analysis.norms import TokenNorms, token_norms
from latemax.analysis.share import ArgmaxShare, SimilarityDistribution, argmax_share, similarity_distribution
from latemax.analysis.simulate import ClsSimulation, simulate_cls_dominance

__all__ = [
    "ArgmaxShare",
    "ClsSimulation",
    "GroundingMap",
    "SimilarityDistribution",
    "TokenNorms",
    "argmax_share",
    "convert_axes",
    "from_colpali",
    "grounding_map",
    "own_pairs",
    "similarity_distribution",
    "simulate_cls_dominance",
    "to_colpali",
    "token_groups",
    "token_norms",
]
