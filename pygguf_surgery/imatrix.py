"""Importance matrices: read, write, merge, slice, convert them, and see what they cover."""

from __future__ import annotations

from .files.imatrix import CHUNK_SIZE, POLICIES, Entry, Imatrix, write
from .files.imatrix import open_imatrix as open
from .files.imatrix_tools import convert, coverage, merge
from .files.imatrix_tools import slice_experts as slice

__all__ = ["CHUNK_SIZE", "POLICIES", "Entry", "Imatrix", "convert", "coverage", "merge", "open", "slice", "write"]
