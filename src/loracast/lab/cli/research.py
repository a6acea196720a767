"""`loracast plan` and `make-questions`: what a training would take, and questions to train and measure on."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loracast.cli import options
from loracast.cli.commands import config_from
from loracast.cli.terminal import print_json, printable, progress_bar, say
from loracast.lab.cli.train import Change

if TYPE_CHECKING:
    from loracast.lab.data.questions import MakeConfig
    from loracast.lab.training.document_source import DataConfig


def plan(
    *,
    choice: options.BaseName,
    recipe: Annotated[Path | None, "Training recipe, a TOML file; the defaults of `train doc` without one."] = None,
    change: Change = None,
    gpu: Annotated[str | None, "A GPU by its name, such as 'RTX 4090', or by its memory, such as 24GB."] = None,
    as_json: options.Json = False,
) -> None:
    """Say what training Doc-to-LoRA for a base takes: parameters, memory, tokens and hours, and the command.

    Needs config.json and the tokenizer of the base; no weights are loaded.
    """
    import torch

    from loracast.base.embedded import DEFAULT_BASE
    from loracast.base.footprint import fastest_dtype, free_memory, has_fast_bf16
    from loracast.base.load import fastest_device, load_tokenizer, template_text
    from loracast.lab.training.plan import MEASURE_S, UTILISATION, Machine, Planner, gpus, read_base_config

    config, tokenizer = read_base_config(choice.base), load_tokenizer(choice.base)
    if template := template_text(choice.chat_template):
        tokenizer.chat_template = template
    cards = gpus(gpu) if gpu else []
    device = choice.device or fastest_device()
    kind = "cuda" if cards else torch.device(device).type
    dtype = torch.bfloat16 if cards else fastest_dtype(device)
    planner = Planner(config, tokenizer, recipe, change or (), Machine(kind, dtype, bool(cards) or has_fast_bf16(kind)))
    made = planner.plan()
    available = cards[0].memory_gb * 1e9 if cards else free_memory(device)
    fits = None if available is None else made.memory.total <= available
    if cards:
        speeds = {card.name: card.tflops * 1e12 * UTILISATION for card in cards}
        how = f"{UTILISATION:.0%} (assumed) of the card's stated bf16 throughput"
    else:
        speeds = {f"this machine ({device})": planner.measured_flops_per_s(device)}
        how = f"measured for {MEASURE_S:g} s on one block of the base"
    facts: dict[str, Any] = {
        "base": choice.base or DEFAULT_BASE,
        "model_type": config.model_type,
        **asdict(made),
        "dtype": str(dtype).removeprefix("torch."),
        "total_bytes": made.memory.total,
        "available_bytes": available,
        "fits": fits,
        "remedies": planner.remedies(available) if available is not None and not fits else [],
        "hours": {name: made.hours(speed) for name, speed in speeds.items()},
        "command": _command(choice, recipe, change or (), planner.recipe.data),
    }
    if as_json:
        print_json(facts)
    else:
        print(printable(_as_text(facts, how)))


def _command(choice: options.BaseName, recipe: Path | None, change: Sequence[str], data: DataConfig) -> str:
    """The command that trains as planned; FILE stands for the files that the recipe needs."""
    given = [("--base", choice.base), ("--chat-template", choice.chat_template), ("--device", choice.device)]
    parts = ["loracast", "train", "doc", *([str(recipe)] if recipe else [])]
    parts += [part for option, value in given if value for part in (option, value)]
    parts += [part for one in change for part in ("--set", one)]
    files = ["--texts FILE"] * (data.needle_share > 0 or data.diluted_share > 0)
    files += ["--documents FILE"] * (data.document_share > 0)
    return " ".join([shlex.join([*parts, "--out", "runs/mine"]), *files])


def _as_text(facts: dict[str, Any], how: str) -> str:
    """The plan as text for people."""
    memory, steps = facts["memory"], facts["steps"]
    parts = {
        f"the base in {facts['dtype']}": memory["base"],
        "the hypernetwork with AdamW's state, in float32": memory["hypernetwork"],
        "gradients and activations of the largest step": memory["step"],
        "the allocator's, and CUDA's own on a GPU": memory["overhead"],
    }
    lines = [
        f"base          {facts['base']}: {facts['model_type']}, {facts['base_parameters'] / 1e6:,.1f} M parameters",
        f"hypernetwork  {facts['hypernetwork_parameters'] / 1e6:,.1f} M parameters",
        f"a step        {facts['context_tokens']:,.0f} tokens of documents, {facts['row_tokens']:,.0f} of questions, "
        f"{facts['flops'] / 1e12:,.2f} TFLOP",
        f"memory        {facts['total_bytes'] / 1e9:,.1f} GB at the peak:",
        *(f"  {n_bytes / 1e9:10,.1f} GB  {name}" for name, n_bytes in parts.items() if n_bytes),
    ]
    if facts["fits"] is not None:
        verb = "fits" if facts["fits"] else "does NOT fit"
        lines.append(f"              {verb} into {facts['available_bytes'] / 1e9:,.1f} GB")
    lines += [f"              {remedy}" for remedy in facts["remedies"]]
    lines.append(f"time          for {steps:,} steps, by {how}:")
    lines += [f"  {h:10,.1f} h   {name}, {3600 * h / steps:,.2f} s a step" for name, h in facts["hours"].items()]
    return "\n".join([*lines, f"command       {facts['command']}"])


@config_from("loracast.lab.data.questions")
def make_questions(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Documents: text, Markdown, HTML, PDF, DOCX.", exists=True)
    ],
    *,
    out: Annotated[Path, "JSONL file; the questions in it stay and are not made again."],
    rules: Annotated[bool, "Make questions by rule: gaps in sentences; no model is needed."] = False,
    endpoint: Annotated[
        str | None, "OpenAI-compatible endpoint whose model writes, such as http://localhost:8000/v1."
    ] = None,
    model: Annotated[str | None, "Name of the endpoint's model."] = None,
    api_key_env: Annotated[str, "Environment variable with the endpoint's key, if it needs one."] = "OPENAI_API_KEY",
    config: MakeConfig,
    passage_tokens: Annotated[int, typer.Option(min=64, help="Maximum tokens of a passage.")] = 384,
    choice: options.BaseChoice,
    as_json: options.Json = False,
) -> None:
    """Generate questions and answers about files: with a base, with an endpoint's model, or by rule.

    Questions that the passage does not answer, or that can be answered without it, are left out. A run that
    was stopped is resumed by the same command.
    """
    from loracast.base.chat import encode_with_offsets
    from loracast.base.load import load_base, load_tokenizer
    from loracast.documents import read_document, split_text
    from loracast.errors import ConfigError
    from loracast.lab.data.questions import BaseWriter, EndpointWriter, Writer, passages_of
    from loracast.lab.data.questions import make_questions as make

    if rules and endpoint:
        raise ConfigError("give --rules or --endpoint, not both")
    if (endpoint is None) != (model is None):
        raise ConfigError("--endpoint and --model go together")
    writer: Writer | None = None
    if rules or endpoint:
        tokenizer = load_tokenizer(choice.base)
        if endpoint and model:
            writer = EndpointWriter(endpoint, model, os.environ.get(api_key_env))
    else:
        loaded = load_base(choice.base, **choice.how, say=say)
        writer, tokenizer = BaseWriter(loaded), loaded.tokenizer

    def split(text: str) -> list[str]:
        chunks = split_text(text, lambda part: encode_with_offsets(tokenizer, part), max_tokens=passage_tokens)
        return [chunk.text for chunk in chunks]

    passages = [passage for file in files for passage in passages_of(read_document(file), split)]
    with progress_bar("passages") as progress:
        tally = make(passages, out, writer, config, progress)
    if as_json:
        print_json({"out": str(out), "passages": len(passages), **vars(tally)})
    else:
        say(
            f"{tally.kept} questions about {len(passages)} passages are in {out}; left out: {tally.repeated} repeated, "
            f"{tally.not_answerable} not answerable, {tally.known_anyway} known without the passage"
        )
