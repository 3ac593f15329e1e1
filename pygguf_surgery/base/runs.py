"""Neighbouring numbers as runs."""

from __future__ import annotations

from collections.abc import Sequence


def merge_adjacent(indices: Sequence[int]) -> list[tuple[int, int]]:
    """(first, count) of each run of consecutive indices, in order."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and runs[-1][0] + runs[-1][1] == i:
            runs[-1][1] += 1
        else:
            runs.append([i, 1])
    return [(first, count) for first, count in runs]
