"""Casts documents with Ray Data: actors that hold base and hypernetwork, on this machine or on a cluster.

Ray hands out the documents in small blocks and takes back a line of the report for each. An actor that dies is started
again and its block is repeated, in which what has its folder already is not cast again. Only the document that kills it
again and again fails.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, fields
from typing import Any

from loracast.cast.bulk import FolderCaster, Found, Line
from loracast.cast.bulk_run import read_report
from loracast.errors import ConfigError, LoracastError, PackageError
from loracast.library.store import file_system, write

LOCAL = "local"
"""In place of a cluster's address: Ray is started on this machine and ends with the command."""
PARQUET = "report.parquet"
_BLOCK = 32  # documents: a killed actor repeats as many at most, and the last actors to finish wait for as few
_DEATHS = 3
_STORE_BYTES = 100_000_000  # of Ray on this machine: nothing but URLs and lines goes through it


def cast_with_ray(
    address: str, load: Callable[[], FolderCaster], *, actors: int | None = None
) -> Callable[[Sequence[Found]], Iterator[Line]]:
    """What casts documents with Ray, as `cast_all` takes it.

    Args:
        address: of a cluster, as `ray.init` takes it; or `LOCAL`.
        load: loads the models in each actor; it has to be picklable.
        actors: how many; one for each GPU if the cluster has some, else for each CPU, if None.

    Raises:
        PackageError: Ray is not installed. ConfigError: no cluster answers at the address.
    """
    ray = _import_ray()

    def cast(todo: Sequence[Found]) -> Iterator[Line]:
        with redirect_stdout(sys.stderr):  # Ray says there what has died
            try:
                _start(ray, address, actors)
                yield from _lines(ray, todo, load, actors)
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None)
                reason = cause if isinstance(cause, LoracastError) else str(error).strip().rsplit("\n", 1)[-1]
                raise LoracastError(f"Ray gave up: {reason}") from error
            finally:
                ray.shutdown()

    return cast


def write_parquet(out: str) -> None:
    """Write the report once more, as a table in Parquet."""
    from io import BytesIO

    import pyarrow
    import pyarrow.parquet

    kinds = {"rank": pyarrow.int32(), "n_chunks": pyarrow.int64(), "n_tokens": pyarrow.int64()}
    kinds |= dict.fromkeys(("lost", "seconds"), pyarrow.float64()) | {"is_final": pyarrow.bool_()}
    schema = pyarrow.schema([(field.name, kinds.get(field.name, pyarrow.string())) for field in fields(Line)])
    table = pyarrow.Table.from_pylist([asdict(line) for line in read_report(out).values()], schema)
    content = BytesIO()
    pyarrow.parquet.write_table(table, content)
    with file_system(out) as (fs, root):
        write(fs, f"{root}/{PARQUET}", content.getvalue())


def _import_ray() -> Any:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # it would send statistics to its makers
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what matters comes as an exception
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise PackageError("--ray needs Ray Data: pip install 'loracast[ray]'") from error
    for handler in logging.getLogger("ray.data").handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.CRITICAL)
    return ray


def _start(ray: Any, address: str, actors: int | None) -> None:
    quietly = {"logging_level": "error", "log_to_driver": False}
    if address == LOCAL:
        own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        ray.init("local", num_cpus=actors or own, include_dashboard=False, object_store_memory=_STORE_BYTES, **quietly)
        return
    try:
        ray.init(address, **quietly)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"no Ray cluster answers at {address!r} ({error}): give its address, or {LOCAL}") from error


class _Attempts:
    """Counts how often something was begun and not ended; it outlives the actors that begin it."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def begin(self, what: str) -> int:
        self._counts[what] += 1
        return self._counts[what]

    def end(self, what: str) -> None:
        del self._counts[what]


class _Actor:
    """Holds the models, and casts blocks of documents."""

    def __init__(self, load: Callable[[], FolderCaster], attempts: Any):
        """
        Args:
            attempts: handle of `_Attempts`.
        """
        self._cast, self._attempts = load(), attempts

    def __call__(self, block: dict[str, Any]) -> dict[str, list[str]]:
        found = [Found(**json.loads(text)) for text in block["document"]]
        cast = self._cast if self._begin(f"block {found[0].url}") == 1 else self._announced
        return {"line": [json.dumps(asdict(cast(one))) for one in found]}

    def _announced(self, found: Found) -> Line:
        """Cast a document of a block in which an actor has died: the document that kills is begun and never ends."""
        if self._begin(found.url) >= _DEATHS:  # it died once more, unannounced
            error = f"the process that cast it died {_DEATHS} times, of too little memory or of the document"
            return Line(found.url, found.name, found.stamp, self._cast.casting.id, error=error)
        line = self._cast(found)
        self._attempts.end.remote(found.url)
        return line

    def _begin(self, what: str) -> int:
        import ray

        return ray.get(self._attempts.begin.remote(what))


def _lines(ray: Any, todo: Sequence[Found], load: Callable[[], FolderCaster], actors: int | None) -> Iterator[Line]:
    """The lines of documents, in any order."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    has = ray.cluster_resources()
    each = {"num_cpus": 1, "num_gpus": 1} if has.get("GPU") else {"num_cpus": 1}
    size = actors or max(1, int(has.get("GPU") or has.get("CPU", 1)))
    attempts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Attempts).remote()
    documents = [{"document": json.dumps(asdict(one))} for one in todo]
    lines = ray.data.from_items(documents, override_num_blocks=-(-len(todo) // _BLOCK)).map_batches(
        _Actor,
        fn_constructor_args=[load, attempts],
        batch_size=None,  # a whole block
        compute=ray.data.ActorPoolStrategy(size=size),
        **each,
    )
    for batch in lines.iter_batches(batch_size=None):
        for text in batch["line"]:
            yield Line(**json.loads(text))
