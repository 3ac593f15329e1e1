"""Reports: how far a result is from its source (compare), what a model, or what a plan makes of one, needs to run
(memory), what fits into a machine (solve), how well models predict texts (perplexity)."""

from __future__ import annotations

from .reports.comparison import Comparison, compare
from .reports.memory import memory
from .reports.solutions import solve
from .studies.evaluation import perplexity

__all__ = ["Comparison", "compare", "memory", "perplexity", "solve"]
