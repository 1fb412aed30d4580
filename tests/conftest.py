"""Fixtures live in ``fix_*.py``, by subject."""

import os

from hypothesis import settings

# Where everything must pass, the same examples are tried each time; elsewhere new ones are looked for.
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")

# Those that import others come last, so that assertions in those are rewritten too.
pytest_plugins = [
    "tests.fix_broker",
    "tests.fix_postgresql",
    "tests.fix_proxy",
    "tests.fix_stream",
    "tests.fix_containers",
    "tests.fix_kafka",
]
