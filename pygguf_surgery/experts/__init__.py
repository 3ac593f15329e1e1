"""Experts: what belongs to them (roles), what they do (calibrate, stats), which to keep (rank), cutting the others
(prune), merging them (ream, merge), making up for them (repair)."""

from .calibrate import calibrate
from .metrics import METRICS
from .rank import Keep, Ranking, rank
from .ream import Groups, group
from .repair import repair
from .repair_file import open as open_repair
from .roles import role_of
from .stats import Stats, open as open_stats

__all__ = ["METRICS", "Groups", "Keep", "Ranking", "Stats", "calibrate", "group", "open_repair", "open_stats", "rank", "repair", "role_of"]
