"""Experts: what they do with a text (calibrate), which to keep (rank), which to merge (group), making up for a cut
(repair)."""

from __future__ import annotations

from .architecture.names import role_of
from .files.repair import open_repair
from .files.stats import Stats, open_stats
from .plan_data.choices import Groups, Keep
from .studies import metrics
from .studies.calibration import calibrate
from .studies.ranking import Ranking
from .studies.ream import group
from .studies.repairs import repair
from .studies.scoring import rank

METRICS = tuple(metrics.METRICS)  # what rank(by=) takes, beside files

__all__ = [
    "METRICS",
    "Groups",
    "Keep",
    "Ranking",
    "Stats",
    "calibrate",
    "group",
    "open_repair",
    "open_stats",
    "rank",
    "repair",
    "role_of",
]
