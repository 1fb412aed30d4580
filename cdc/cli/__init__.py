"""The command line: the only place that knows which shipper, broker and store belong together."""

from cdc.cli.app import main

__all__ = ["main"]
