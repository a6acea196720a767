"""Where loracast keeps what it fetches and what it learns. `LORACAST_HOME` moves both."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def bases_dir() -> Path:
    """Converted bases; may be deleted at any time and is fetched again."""
    return _cache_dir() / "bases"


def encoders_dir() -> Path:
    """Text encoders; may be deleted at any time and is fetched again."""
    return _cache_dir() / "encoders"


def features_dir() -> Path:
    """Features of images and signals for training and evaluation; may be deleted at any time and are computed again."""
    return _cache_dir() / "features"


def fetched_dir() -> Path:
    """Copies of data files that URLs name; may be deleted at any time and are fetched again."""
    return _cache_dir() / "fetched"


def journals_dir() -> Path:
    """Journals of learned folders; may be deleted at any time, and the folders are learned anew."""
    return _cache_dir() / "journals"


def converted_dir() -> Path:
    """Published hypernetworks in loracast's form; may be deleted at any time and are converted again."""
    return _cache_dir() / "converted"


def exports_dir() -> Path:
    """Adapters exported for servers; may be deleted while no server uses them, and are written again."""
    return _cache_dir() / "exports"


def _cache_dir() -> Path:
    home = os.environ.get("LORACAST_HOME")
    return Path(home) if home else Path(platformdirs.user_cache_dir("loracast", appauthor=False))


def library_dir() -> Path:
    """The adapters on this machine: what the user made, not a cache."""
    home = os.environ.get("LORACAST_HOME")
    return (Path(home) if home else Path(platformdirs.user_data_dir("loracast", appauthor=False))) / "adapters"


def servers_dir() -> Path:
    """What running servers say of themselves, and the log of those in the background; a server that ends takes it away.

    Only its user may look into it: the files hold keys.
    """
    home = os.environ.get("LORACAST_HOME")
    return (Path(home) if home else Path(platformdirs.user_state_dir("loracast", appauthor=False))) / "servers"
