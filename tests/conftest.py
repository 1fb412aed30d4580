"""Fixtures live in ``fix_*.py``, by subject."""

# Those that import others come last, so that assertions in those are rewritten too.
pytest_plugins = [
    "tests.fix_broker",
    "tests.fix_postgresql",
    "tests.fix_proxy",
    "tests.fix_stream",
    "tests.fix_containers",
    "tests.fix_kafka",
]
