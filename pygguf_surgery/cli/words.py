"""Numbers, tables and JSON as they are printed."""

from __future__ import annotations

import json
import sys
from typing import Any

from ..base.words import printable

PROGRAM = "gguf-surgery"


def say(text: str) -> None:
    """One line for a person, on stderr."""
    print(f"{PROGRAM}: {printable(' '.join(text.split()))}", file=sys.stderr)


def explain(text: str) -> None:
    """Lines for a person, on stderr, to be copied as they are."""
    print(printable(text), file=sys.stderr)


def show(text: str) -> None:
    """Lines for a person, on stdout."""
    print(printable(text))


def print_json(data: Any) -> None:
    json.dump(data, sys.stdout, allow_nan=False)
    print()
