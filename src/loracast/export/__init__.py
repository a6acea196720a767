"""Adapters for other runtimes, one file a format. Nothing in a runtime has to be installed to export for it."""
