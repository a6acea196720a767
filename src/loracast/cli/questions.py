"""`loracast make-questions`: questions and answers about any files, to train and measure on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loracast.cli import options
from loracast.cli.commands import config_from
from loracast.cli.output import print_json, progress_bar, say

if TYPE_CHECKING:
    from loracast.data.questions.make import MakeConfig


@config_from("loracast.data.questions.make")
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
    from loracast.data.questions.make import make_questions as make
    from loracast.data.questions.make import passages_of
    from loracast.data.questions.writers import BaseWriter, EndpointWriter, Writer
    from loracast.documents import read_document, split_text
    from loracast.errors import ConfigError

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
