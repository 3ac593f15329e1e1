"""Importance matrices of llama-imatrix: files (read, write) and tools (merge, convert, slice, coverage)."""

from .files import CHUNK_SIZE, POLICIES, Entry, Imatrix, open, write
from .tools import convert, coverage, merge, slice

__all__ = ["CHUNK_SIZE", "POLICIES", "Entry", "Imatrix", "convert", "coverage", "merge", "open", "slice", "write"]
