"""Experts: what belongs to them (roles), which to keep (rank), and cutting the others (prune)."""

from .rank import Keep, Ranking, rank
from .roles import role_of

__all__ = ["Keep", "Ranking", "rank", "role_of"]
