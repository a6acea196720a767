"""The library: adapters on disk by name and version, with search, sync, remote copies and routing."""
