"""Experts: what belongs to them (roles), what they do (calibrate, stats), which to keep (rank), cutting the others
(prune), making up for them (repair)."""

from .calibrate import calibrate
from .metrics import METRICS
from .rank import Keep, Ranking, rank
from .repair import repair
from .repair_file import open as open_repair
from .roles import role_of
from .stats import Stats, open as open_stats

__all__ = ["METRICS", "Keep", "Ranking", "Stats", "calibrate", "open_repair", "open_stats", "rank", "repair", "role_of"]
