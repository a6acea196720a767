"""`loracast eval needle | facts | latency | memory`: documents that are made for the purpose."""

from __future__ import annotations

from typing import Annotated

import typer

from loracast.cli import options
from loracast.cli.eval_common import (
    Budget,
    ChunkTokens,
    Out,
    Route,
    Seed,
    Split,
    Systems,
    Texts,
    numbers,
    show,
    split_of,
    systems_of,
)
from loracast.cli.output import progress_bar
from loracast.cli.session import open_model
from loracast.documents.chunks import DEFAULT_CHUNK_TOKENS
from loracast.library.routing import DEFAULT_ROUTE
from loracast.lora.quantize import DEFAULT_STORAGE


def needle(
    out: Out,
    texts: Texts = None,
    lengths: Annotated[str, typer.Option(help="Tokens of a document, with commas.")] = "256,1024,4096,8192,32768",
    samples: Annotated[int, typer.Option(help="Documents of each length.", min=1)] = 400,
    samples_long: Annotated[int, typer.Option(help="The same, past 8192 tokens.", min=1)] = 100,
    samples_window: Annotated[int, typer.Option(help="Of them, put into the window from 4096 tokens on.", min=1)] = 50,
    depths: Annotated[str, typer.Option(help="uniform, or depths from 0 to 1 with commas.")] = "uniform",
    kind: Annotated[str, typer.Option(help="Kind of value (number4, word, person ...), or any.")] = "number4",
    route: Route = DEFAULT_ROUTE,
    chunk_tokens: ChunkTokens = DEFAULT_CHUNK_TOKENS,
    storage: options.StorageOption = DEFAULT_STORAGE,
    systems: Systems = "all",
    split: Split = "test",
    seed: Seed = 0,
    hypernetwork: options.Hypernetwork = None,
    base: options.Base = None,
    device: options.Device = None,
    budget_s: Budget = None,
    as_json: options.Json = False,
) -> None:
    """A sentence with a value, hidden at any depth of a document, asked for in wordings that no training has seen."""
    from loracast.evaluation.needle import NeedleConfig, evaluate_needle

    config = NeedleConfig(
        texts=tuple(texts or ()),
        lengths=numbers(lengths, int),
        samples=samples,
        samples_long=samples_long,
        samples_window=samples_window,
        depths=() if depths == "uniform" else numbers(depths, float),
        kind=None if kind == "any" else kind,
        route=route,
        chunk_tokens=chunk_tokens,
        storage=storage,
        baselines=systems_of(systems),
        split=split_of(split),
        seed=seed,
        budget_s=budget_s,
    )
    model = open_model(base, hypernetwork, None, device)
    with progress_bar("documents") as progress:
        report = evaluate_needle(model, config, out, progress)
    show(report, out, as_json)


def facts(
    out: Out,
    facts: Annotated[str, typer.Option(help="Facts on a sheet, with commas.")] = "5,20",
    sheets: Annotated[int, typer.Option(help="Sheets of each size; all their questions are asked.", min=1)] = 50,
    route: Route = DEFAULT_ROUTE,
    chunk_tokens: ChunkTokens = DEFAULT_CHUNK_TOKENS,
    storage: options.StorageOption = DEFAULT_STORAGE,
    systems: Systems = "all",
    split: Split = "test",
    seed: Seed = 0,
    hypernetwork: options.Hypernetwork = None,
    base: options.Base = None,
    device: options.Device = None,
    budget_s: Budget = None,
    as_json: options.Json = False,
) -> None:
    """Sheets of facts about invented entities, every fact asked for in wordings that no training has seen."""
    from loracast.evaluation.facts import FactsConfig, evaluate_facts

    config = FactsConfig(
        facts=numbers(facts, int),
        sheets=sheets,
        route=route,
        chunk_tokens=chunk_tokens,
        storage=storage,
        baselines=systems_of(systems),
        split=split_of(split),
        seed=seed,
        budget_s=budget_s,
    )
    model = open_model(base, hypernetwork, None, device)
    with progress_bar("sheets") as progress:
        report = evaluate_facts(model, config, out, progress)
    show(report, out, as_json)


def latency(
    out: Out,
    texts: Texts = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the document.", min=64)] = 8192,
    repetitions: Annotated[int, typer.Option(help="Questions, each asked of every rival in turn.", min=1)] = 20,
    route: Route = DEFAULT_ROUTE,
    seed: Seed = 0,
    hypernetwork: options.Hypernetwork = None,
    base: options.Base = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Time to the first token: the bare base, an adapter, and the same document in the window."""
    from loracast.evaluation.cost import LatencyConfig, evaluate_latency

    config = LatencyConfig(tuple(texts or ()), tokens, repetitions, route, seed)
    model = open_model(base, hypernetwork, None, device)
    with progress_bar("questions") as progress:
        report = evaluate_latency(model, config, out, progress)
    show(report, out, as_json)


def memory(
    out: Out,
    texts: Texts = None,
    lengths: Annotated[str, typer.Option(help="Tokens of a document, with commas.")] = "8192,32768,131072",
    chunk_tokens: ChunkTokens = DEFAULT_CHUNK_TOKENS,
    seed: Seed = 0,
    hypernetwork: options.Hypernetwork = None,
    base: options.Base = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Memory and time of learning a document, beside the encoder's own time; a fresh process for each length."""
    from loracast.evaluation.cost import MemoryConfig, evaluate_memory

    config = MemoryConfig(tuple(texts or ()), numbers(lengths, int), chunk_tokens, seed)
    model = open_model(base, hypernetwork, None, device)
    with progress_bar("documents") as progress:
        report = evaluate_memory(model, base, hypernetwork, config, out, progress)
    show(report, out, as_json)
