"""Plots of what ``latemax.analysis`` returns, and a page of what a search found; matplotlib is imported when needed."""

from latemax.viz.grounding import plot_correspondence, plot_grounding, plot_ranking, position_colors
from latemax.viz.norms import plot_norm_maps, plot_token_norms
from latemax.viz.quality import plot_quality
from latemax.viz.search import search_page
from latemax.viz.share import plot_argmax_share, plot_similarity_distribution
from latemax.viz.simulation import plot_dropping, plot_simulation, plot_simulation_panels

__all__ = [
    "plot_argmax_share",
    "plot_correspondence",
    "plot_dropping",
    "plot_grounding",
    "plot_norm_maps",
    "plot_quality",
    "plot_ranking",
    "plot_similarity_distribution",
    "plot_simulation",
    "plot_simulation_panels",
    "plot_token_norms",
    "position_colors",
    "search_page",
]
