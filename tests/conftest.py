"""Hypothesis profiles: dev (default), ci, nightly; chosen by PGS_HYPOTHESIS_PROFILE."""
import os

from hypothesis import HealthCheck, settings

_common = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.register_profile("dev", max_examples=40, **_common)
settings.register_profile("ci", max_examples=60, derandomize=True, **_common)
settings.register_profile("nightly", max_examples=5000, **_common)
settings.load_profile(os.environ.get("PGS_HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


def pytest_collection_modifyitems(config, items):
    """`parity` and `campaign` tests run only when asked for with -m."""
    import pytest

    asked = config.getoption("-m")
    for marker in ("parity", "campaign"):
        if marker not in asked:
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(pytest.mark.skip(reason=f"only with -m {marker}"))
