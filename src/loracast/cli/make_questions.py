"""`loracast make-questions`: questions and answers about any files, to train and measure on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from loracast.cli import options
from loracast.cli.output import print_json, progress_bar, say


def make_questions(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILES", help="Documents: text, Markdown, HTML, PDF, DOCX.", exists=True)
    ],
    out: Annotated[Path, typer.Option(help="JSONL file; what is in it stays and is not made again.")],
    rules: Annotated[bool, typer.Option("--rules", help="By rule: gaps in sentences, no model needed.")] = False,
    endpoint: Annotated[
        str | None,
        typer.Option(help="OpenAI-compatible endpoint whose model writes, such as http://localhost:8000/v1."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Name of the endpoint's model.")] = None,
    api_key_env: Annotated[
        str, typer.Option(help="Environment variable with the endpoint's key, if it needs one.")
    ] = "OPENAI_API_KEY",
    per_passage: Annotated[int, typer.Option(min=1, help="Most questions about a passage, of each level.")] = 5,
    levels: Annotated[int, typer.Option(min=1, max=2, help="2: harder questions after the plain ones.")] = 2,
    passage_tokens: Annotated[int, typer.Option(min=64, help="Longest passage.")] = 384,
    seed: Annotated[int, typer.Option(help="Seed of rule-made questions.")] = 0,
    base: options.Base = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Write questions with answers about files: by a base, by the model of an endpoint, or by rule.

    Questions that the passage does not answer, or that need no passage, are left out. Stopped and started again, it goes on.
    """
    from loracast.base.chat import encode_with_offsets
    from loracast.base.load import load_base, load_tokenizer
    from loracast.data.questions.make import MakeConfig, passages_of
    from loracast.data.questions.make import make_questions as make
    from loracast.data.questions.writers import BaseWriter, EndpointWriter, Writer
    from loracast.documents import read_document, split_text
    from loracast.errors import ConfigError

    config = MakeConfig(per_passage, levels, seed)
    if rules and endpoint:
        raise ConfigError("give --rules or --endpoint, not both")
    if (endpoint is None) != (model is None):
        raise ConfigError("--endpoint and --model go together")
    writer: Writer | None = None
    if endpoint and model:
        writer = EndpointWriter(endpoint, model, os.environ.get(api_key_env))
        tokenizer = load_tokenizer(base)
    elif rules:
        tokenizer = load_tokenizer(base)
    else:
        loaded = load_base(base, device=device, say=say)
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
