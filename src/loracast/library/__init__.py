"""The library: adapters on disk by name and version, with search, sync and remote copies. It knows no question."""
