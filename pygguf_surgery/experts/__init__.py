"""Experts: what belongs to them (roles), what they do (calibrate, stats), which to keep (rank), cutting the others
(prune)."""

from .calibrate import calibrate
from .metrics import METRICS
from .rank import Keep, Ranking, rank
from .roles import role_of
from .stats import Stats, open as open_stats

__all__ = ["METRICS", "Keep", "Ranking", "Stats", "calibrate", "open_stats", "rank", "role_of"]
