"""Log shipping you can choose, trust and see through."""

__version__ = "0.1.0"
