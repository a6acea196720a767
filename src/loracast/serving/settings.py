"""What a server is started with: its address, keys and limits."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from loracast.errors import ConfigError
from loracast.serving.keys import ApiKey

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """The settings of a server. Raises ConfigError where others could reach it without a key."""

    host: str = "127.0.0.1"
    """Address to listen on. Any but a loopback address demands a key."""
    port: int = 8000
    """0 takes a free one."""
    engine: str = "local"
    """What generates: `local`; or vLLM: the URL of a running server (several, separated by commas), or the Python
    executable of an environment with vLLM, to start one there (`vllm`: the Python that runs this command)."""
    keys: tuple[ApiKey, ...] = ()
    """Keys that requests may bear (keys.py); none: whoever reaches the loopback address may do everything."""
    allowed_hosts: tuple[str, ...] = ()
    """Names under which the server may be called besides localhost and addresses (against DNS rebinding)."""
    cors_origins: tuple[str, ...] = ()
    """Origins, such as "https://chat.example.org", whose pages may call the API from a browser; none by default."""
    lora_folder: Path | None = None
    """Folder whose subfolders are the PEFT adapters that /v1/load_lora_adapter may read; without it, none."""
    watched: tuple[Path, ...] = ()
    """Folders whose documents are learned while the server runs, and forgotten when they are gone."""
    max_body_bytes: int = 4 * MIB
    """Longest body of a JSON request."""
    max_upload_bytes: int = 64 * MIB
    """Longest body of an upload (multipart/form-data)."""
    max_stored_bytes: int = 4096 * MIB
    """Most bytes of all uploads together."""
    max_queued_jobs: int = 2500
    """Most documents, images and tasks that wait to be learned; OpenAI's clients attach up to 2,000 files at once."""
    max_tokens: int = 4096
    """Most tokens of an answer that a request may ask for."""
    max_prompt_tokens: int = 8192
    """Longest prompt; the base's window is another limit."""
    max_answers: int = 8
    """Most answers to a prompt (`n`), and most prompts of a completion times `n`."""
    max_adapters: int = 8
    """Most adapters that a request may add up."""
    adapter_memory_bytes: int = 512 * MIB
    """LoRAs that are kept in memory; one that answers stays until its answer is whole."""
    prompt_cache_bytes: int = 256 * MIB
    """Keys and values that are kept of prompts and answers."""
    body_timeout_s: float = 30.0
    """Longest wait for the next piece of a request's body."""
    answer_timeout_s: float = 300.0
    """Longest time for an answer, its wait in the queue included."""
    drain_timeout_s: float = 30.0
    """Time that running answers have to finish after SIGTERM."""
    instance: str = field(default_factory=lambda: secrets.token_hex(16))
    """Told by /health: by it commands know the server that their user started (found.py)."""

    def __post_init__(self) -> None:
        if not self.is_loopback and not self.keys:
            raise ConfigError(
                f"{self.host} can be reached from other machines: set a key (LORACAST_API_KEYS or a file of keys), or "
                "listen on 127.0.0.1"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host == "localhost" or (_is_address(self.host) and ip_address(self.host).is_loopback)

    def allows_host(self, header: str) -> bool:
        """Whether a request with this Host header is meant for this server.

        A page that has its own name resolved to this machine (DNS rebinding) sends that name; an address cannot be
        rebound, so that all addresses are let pass.
        """
        name = header.rpartition(":")[0] if header.rpartition(":")[2].isdigit() else header
        name = name.removeprefix("[").removesuffix("]").lower()
        return _is_address(name) or name in ("localhost", self.host.lower(), *map(str.lower, self.allowed_hosts))


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
