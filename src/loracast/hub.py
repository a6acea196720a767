"""Artefacts in a local folder or a repository of the Hugging Face hub, found in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loracast.errors import ConfigError, LoracastError


def folder_of(
    source: str | Path, files: Sequence[str], what: str, error: type[LoracastError], revision: str | None = None
) -> Path:
    """The folder itself, or one with the files of a hub repository, fetched unless they are in the hub's cache.

    Args:
        files: which files of a repository are fetched.
        what: what is looked for, for the message.
        error: raised where there is neither a folder nor such a repository.
        revision: branch, tag or commit of the repository; its main branch if None.

    Raises:
        ConfigError: a revision of a folder is wanted.
    """
    check_revision(source, revision)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=list(files)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as failure:
        raise error(
            f"no {what} at {str(source)!r}: give a folder with {' and '.join(files)}, or a hub repository that this "
            f"machine can reach ({str(failure).splitlines()[0]})"
        ) from failure


def check_revision(source: str | Path, revision: str | None) -> None:
    """Raise ConfigError for a revision of a local folder, which has none."""
    if revision is not None and Path(source).is_dir():
        raise ConfigError(
            f"{source} is a folder, which has no revision {revision!r}: give a hub repository, or leave it"
        )
