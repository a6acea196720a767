"""Writes adapters in the formats of other runtimes, one file a format."""
