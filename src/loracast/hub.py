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
        source: a folder, OWNER/NAME of a repository, or OWNER/NAME/FOLDER for a folder in one.
        files: which files of the repository, or of the folder in it and the folders below, are fetched.
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

    owner, _, rest = str(source).partition("/")
    name, _, inside = rest.partition("/")
    repository = f"{owner}/{name}" if inside else str(source)
    patterns = [f"{inside}/*{file}" for file in files] if inside else list(files)
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns)) / inside
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as failure:
        raise error(
            needs_access(failure, repository)
            or f"no {what} at {str(source)!r}: give a folder with {' and '.join(files[:2])}, or a hub repository "
            f"that this machine can reach ({str(failure).splitlines()[0]})"
        ) from failure


def needs_access(failure: BaseException | None, repository: str) -> str | None:
    """What to do where the hub refused a repository to this user, by any cause of a failure; None for other causes."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    while failure is not None:
        response = getattr(failure, "response", None)
        if isinstance(failure, HfHubHTTPError) and response is not None and response.status_code in (401, 403):
            return (
                f"the hub does not give {repository!r} to this user: accept its terms at {constants.ENDPOINT}/"
                f"{repository}, and set HF_TOKEN to a token of yours (or run `hf auth login`)"
            )
        failure = failure.__cause__ or failure.__context__
    return None


def check_revision(source: str | Path, revision: str | None) -> None:
    """Raise ConfigError for a revision of a local folder, which has none."""
    if revision is not None and Path(source).is_dir():
        raise ConfigError(
            f"{source} is a folder, which has no revision {revision!r}: give a hub repository, or no revision"
        )
