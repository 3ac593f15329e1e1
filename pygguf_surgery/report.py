"""Reports on models: how well they predict."""

from __future__ import annotations

from .studies.evaluation import perplexity

__all__ = ["perplexity"]
