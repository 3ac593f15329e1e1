"""Which tests run, and what hypothesis draws for them.

By default, and under CI, it draws the same examples in every run. PGS_HYPOTHESIS_PROFILE=dev draws others each time, as
--hypothesis-seed does by its number; PGS_HYPOTHESIS_PROFILE=nightly draws thousands.
"""

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("support")

# A shell's job in the background has Ctrl-C ignored, and so would the processes of tests that send it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_common = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.register_profile("ci", max_examples=60, derandomize=True, **_common)
settings.register_profile("dev", max_examples=40, **_common)
settings.register_profile("nightly", max_examples=5000, **_common)


def pytest_configure(config):
    seeded = config.getoption("--hypothesis-seed") is not None
    settings.load_profile(os.environ.get("PGS_HYPOTHESIS_PROFILE") or ("dev" if seeded else "ci"))


def pytest_collection_modifyitems(config, items):
    """`parity` and `campaign` tests run only when asked for with -m."""
    asked = config.getoption("-m")
    for marker in ("parity", "campaign"):
        if marker not in asked:
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(pytest.mark.skip(reason=f"only with -m {marker}"))
