"""The version of the package: a literal, so that setup.cfg reads it without importing anything."""

__version__ = "0.1.0"
