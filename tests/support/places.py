"""Where things lie: the checkout that these tests are from, and files that are not in it."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Measurements and a trained model that some tests use when they are there: PGS_SHARED, or ../shared beside the
# checkout.
SHARED = Path(os.environ.get("PGS_SHARED", ROOT.parent / "shared"))
