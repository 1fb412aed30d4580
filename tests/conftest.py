"""Fixtures live in ``fix_*.py``, by subject."""

pytest_plugins = ["tests.fix_broker", "tests.fix_postgresql", "tests.fix_proxy", "tests.fix_stream"]
