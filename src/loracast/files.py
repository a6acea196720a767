"""Files: where loracast keeps them, written whole or not at all, fetched from a hub, and checked against types.

Hidden work folders are each locked by their process; `tidy` deletes those of killed processes.

`LORACAST_HOME` moves what loracast fetches and learns.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import platformdirs

from loracast.errors import ConfigError, LoracastError


def cache_dir(name: str) -> Path:
    """A folder of what can be had again, which may be deleted at any time.

    Args:
        name: `bases`, `encoders` and `converted` hold models that were fetched or converted, `fetched` the data files
            of URLs, `features` those of images and signals, `exports` adapters for servers (not to be deleted while a
            server uses them), and `journals` what is known of learned folders.
    """
    return _user_dir(platformdirs.user_cache_dir, name)


def library_dir() -> Path:
    """The adapters on this machine: what the user made, not a cache."""
    return _user_dir(platformdirs.user_data_dir, "adapters")


def servers_dir() -> Path:
    """What running servers say of themselves, and the log of those in the background; a server that ends takes it away.

    Only its user may look into it: the files hold keys.
    """
    return _user_dir(platformdirs.user_state_dir, "servers")


def _user_dir(of_user: Callable[..., str], name: str) -> Path:
    return Path(os.environ.get("LORACAST_HOME") or of_user("loracast", appauthor=False)) / name


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to a temporary file beside `path`, flush it and rename it: readers see all of it or nothing."""
    write_with(path, lambda temporary: temporary.write_bytes(content))


def write_with(path: Path, write: Callable[[Path], object], *, is_private: bool = False, is_new: bool = False) -> None:
    """Write a file atomically through a function that takes a path: `write` gets that of the temporary file.

    Args:
        is_private: only its user may read it; otherwise whoever the umask allows.
        is_new: raise FileExistsError where the file is there already.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if not is_private:  # mkstemp makes it so
            umask = os.umask(0o077)  # it can only be read by setting it
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
        if is_new:
            os.link(temporary, path)  # unlike a rename, it never replaces a file
        else:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def create_once(path: Path, content: bytes) -> None:
    """Write a file that is not there yet, whole or not at all. Raises FileExistsError where another one is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_with(path, lambda temporary: temporary.write_bytes(content), is_new=True)


def move_unless_there(folder: Path, target: Path) -> None:
    """Move a whole folder to its place; where another process was faster, its folder there is as good and stays."""
    try:
        os.replace(folder, target)
    except OSError:
        if not target.is_dir():
            raise


def bytes_in(folder: Path, pattern: str = "*") -> int:
    """Bytes of all files in a folder and below it whose names match a pattern."""
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def try_lock(path: Path) -> int | None:
    """Lock a file or folder until the descriptor is closed or this process dies; None where another one holds it.

    Also None where the system has no such locks (Windows).
    """
    if os.name != "posix":
        return None
    import fcntl

    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that a rename in it survives a power cut."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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


def value_faults(kind: Callable[..., Any], values: Mapping[str, Any]) -> list[str]:
    """Those of a dataclass's values, by field and as JSON has them, that are not of their fields' types.

    Numbers have to be finite; a field that the dataclass does not have is a fault, and a missing one is none.
    """
    from pydantic import ValidationError

    try:
        _validator(kind).model_validate_json(json.dumps(values))
    except ValidationError as error:
        faults = [(".".join(map(str, one["loc"])), repr(one["input"])[:80], one["msg"]) for one in error.errors()]
        return [f"{name} is {value} ({message})" for name, value, message in faults]
    except (TypeError, ValueError) as error:
        return [str(error)]
    return []


@cache
def _validator(kind: Callable[..., Any]) -> Any:
    """A model of pydantic with the fields of a dataclass, none of them required."""
    from pydantic import ConfigDict, create_model

    config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    hints = get_type_hints(kind, include_extras=True)
    fields: dict[str, Any] = {one.name: (hints[one.name], None) for one in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return create_model(kind.__name__, __config__=config, **fields)


def frozen(value: Any) -> Any:
    """Lists, nested ones too, as tuples; other values as they are."""
    return tuple(map(frozen, value)) if isinstance(value, list) else value


# ---- hidden work folders, each locked by its process

_WORK_PREFIX = ".loracast-"
_MADE = "made"  # the purpose in the name of a folder that is made, but perhaps not yet locked
_GRACE_S = 10.0


@contextmanager
def work_folder(parent: Path, purpose: str) -> Iterator[Path]:
    """A folder of this process alone, deleted afterwards; if the process is killed, `tidy` deletes it."""
    made = Path(tempfile.mkdtemp(dir=parent, prefix=f"{_WORK_PREFIX}{_MADE}-"))
    lock = try_lock(made)
    folder = made.rename(made.with_name(made.name.replace(_MADE, purpose, 1)))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def is_at_work(parent: Path, purpose: str) -> bool:
    """Whether a process has such a work folder, or was killed with one that `tidy` has not deleted yet."""
    return any(parent.glob(f"{_WORK_PREFIX}{purpose}-*"))


@contextmanager
def exclusively(parent: Path, what: str) -> Iterator[None]:
    """Wait until nobody else does the same in this folder, and keep them off meanwhile; on POSIX systems only."""
    parent.mkdir(parents=True, exist_ok=True)
    with open(parent / f"{_WORK_PREFIX}{what}.lock", "w") as file:
        if os.name == "posix":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)  # of this open file, so that threads wait for each other too
        yield


def tidy(parent: Path) -> None:
    """Delete the work folders of killed processes."""
    for folder in parent.glob(f"{_WORK_PREFIX}*-*"):
        with suppress(OSError):  # another process may be tidying too
            is_made = folder.name.startswith(f"{_WORK_PREFIX}{_MADE}-")
            is_new = is_made and time.time() - folder.stat().st_mtime < _GRACE_S
            lock = None if is_new else try_lock(folder)
            if lock is not None:
                try:
                    shutil.rmtree(folder)
                finally:
                    os.close(lock)
