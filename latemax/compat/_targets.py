"""What ``patch`` replaces: for every host the functions that score, and where it defines them."""

from __future__ import annotations

from typing import NamedTuple


class Target(NamedTuple):
    """A function of the host and its replacement in ``latemax.compat.<host>``."""

    module: str
    name: str  # a function, or Class.method; a static method without self
    ours: str
    method: bool = False  # called with self, which the replacement does not take; else it takes self like the host
    attributes: tuple[str, ...] = ()  # of self, passed by name


class Host(NamedTuple):
    distribution: str
    targets: tuple[Target, ...]


def _same(module: str, *names: str) -> tuple[Target, ...]:
    return tuple(Target(module, name, name) for name in names)


_PROCESSORS = (
    ("colpali", "ColPaliProcessor"),
    ("colqwen2", "ColQwen2Processor"),
    ("colmodernvbert", "ColModernVBertProcessor"),
)
# The import name of a host is the name of its module here.
HOSTS: dict[str, Host] = {
    "colpali_engine": Host(
        "colpali-engine",
        (
            *_same("colpali_engine.utils.maxsim", "maxsim_inbatch", "maxsim_kd"),
            *(
                Target("colpali_engine.loss.late_interaction_losses", f"{loss}.forward", "explicit_negatives_loss")
                for loss in ("ColbertNegativeCELoss", "ColbertPairwiseNegativeCELoss")
            ),
            Target("colpali_engine.loss.late_interaction_losses", "ColbertModule._inbatch_scores", "inbatch_scores"),
            Target(
                "colpali_engine.utils.processing_utils",
                "BaseVisualRetrieverProcessor.score_multi_vector",
                "score_multi_vector",
            ),
        ),
    ),
    "transformers": Host(
        "transformers",
        tuple(
            Target(
                f"transformers.models.{name}.processing_{name}",
                f"{processor}.score_retrieval",
                "score_retrieval",
                method=True,
            )
            for name, processor in _PROCESSORS
        ),
    ),
    "sentence_transformers": Host(
        "sentence-transformers",
        (
            *_same(
                "sentence_transformers.util.similarity",
                "maxsim",
                "maxsim_pairwise",
                "mean_maxsim",
                "mean_maxsim_pairwise",
            ),
            *_same(
                "sentence_transformers.multi_vector_encoder.scoring.colbert",
                "colbert_scores",
                "colbert_scores_pairwise",
                "colbert_kd_scores",
                "mean_colbert_scores",
                "mean_colbert_scores_pairwise",
                "mean_colbert_kd_scores",
            ),
        ),
    ),
    "pylate": Host(
        "pylate",
        (
            *_same("pylate.scores.colbert", "colbert_scores", "colbert_scores_pairwise", "colbert_kd_scores"),
            Target("pylate.scores.colbert", "ColBERTScores.__call__", "colbert_group_scores", method=True),
            Target("pylate.scores.xtr", "XTRScores._score", "xtr_group_scores", True, ("k", "document_chunk_size")),
            *_same("pylate.rank.rank", "rerank"),
        ),
    ),
    "mteb": Host("mteb", _same("mteb.similarity_functions", "max_sim", "pairwise_max_sim")),
    "qdrant_client": Host(
        "qdrant-client", _same("qdrant_client.local.multi_distances", "calculate_multi_distance_core")
    ),
    "vllm": Host("vllm", _same("vllm.v1.pool.late_interaction", "compute_maxsim_score_batched")),
}
