"""Talks with a vLLM server: its models, runtime LoRAs, streamed completions, log-probabilities of a prompt."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loracast.errors import BaseModelError, ConfigError, LoracastError
from loracast.serving.client import Client, NoServer, Refused
from loracast.serving.request import EngineFailed

_BAD_REQUEST, _NOT_FOUND = 400, 404


class VllmClient(Client):
    """A vLLM server. Raises EngineFailed where it does not answer or fails, and Refused for what it refuses."""

    def __init__(self, url: str, key: str = ""):
        """Raises ConfigError where the server takes no LoRAs while it runs."""
        super().__init__(url.rstrip("/").removesuffix("/v1"), key)
        with self._reached():
            models = self.get("/v1/models")["data"]
        bases = [model for model in models if not model.get("parent")]
        if not bases:
            raise ConfigError(f"the server at {self.url} serves no base model")
        self.base: str = bases[0]["id"]
        """The name of the base there."""
        self.window: int = bases[0]["max_model_len"]
        """Tokens that fit into a request there."""
        self.loaded: dict[str, str] = {model["id"]: model["root"] for model in models if model.get("parent")}
        """LoRAs that the server had when the client was made, with their paths."""
        try:
            self.load("", Path())
        except Refused as error:
            if error.status == _NOT_FOUND:
                raise ConfigError(
                    f"the server at {self.url} takes no LoRAs while it runs: start vLLM with --enable-lora and "
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
                ) from error

    def load(self, name: str, folder: Path) -> None:
        """Load a LoRA in PEFT's format under a name."""
        self._tell("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder) if name else ""})

    def unload(self, name: str) -> None:
        self._tell("/v1/unload_lora_adapter", {"lora_name": name})

    def completion(self, body: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The events of a streamed completion, with token ids; closing the generator ends it on the server."""
        more = {
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        with self._reached():
            yield from self.stream("/v1/completions", {**body, **more})

    def prompt_logprobs(self, prompt: Sequence[int]) -> list[float]:
        """The log-probability that the base gives each token of a prompt but the first, after those before it."""
        body = {"model": self.base, "prompt": list(prompt), "max_tokens": 1, "prompt_logprobs": 0}
        with self._reached():
            places = self.post("/v1/completions", body)["choices"][0]["prompt_logprobs"]
        return [place[str(token)]["logprob"] for token, place in zip(prompt[1:], places[1:], strict=True)]

    def _tell(self, path: str, body: Mapping[str, Any]) -> None:
        """Post what is answered with text."""
        with self._reached(), self._post(path, body) as response:
            response.read()

    @contextmanager
    def _reached(self) -> Generator[None, None, None]:
        try:
            yield
        except NoServer as error:
            why = error.__cause__
            raise EngineFailed(
                f"the vLLM server at {self.url} does not answer ({str(why) or type(why).__name__})"
            ) from error


def as_loracast_error(error: Refused) -> LoracastError:
    """The error that a request gets for what the server refused."""
    if error.status == _BAD_REQUEST:
        return BaseModelError(f"the vLLM server refuses this: {error}")
    return EngineFailed(f"the vLLM server failed: {error}")
