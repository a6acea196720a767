"""Plugin of vLLM: requests name an adapter of the library as their model, which is exported and loaded on first use.

vLLM finds it by its entry point (group `vllm.general_plugins`) and calls `register` in each of its processes. It
needs --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True; `VLLM_PLUGINS`, where it is set, must list `loracast`.
"""

from __future__ import annotations

import asyncio

from loracast.export.deploy import resolve
from loracast.paths import exports_dir, library_dir


def register() -> None:
    """Add the resolver to vLLM's registry."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    class LibraryResolver(LoRAResolver):
        """Adapters of the user's library: `loracast:NAME`, or `NAME@HASH`."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            folder = await asyncio.to_thread(resolve, lora_name, library_dir(), exports_dir())
            if folder is None:
                return None
            sha = folder.name.rpartition("@")[2]
            number = int(sha, 16) + 1  # vLLM 0.32 gives LoRAs of resolvers numbers of its own
            return LoRARequest(lora_name=folder.name, lora_int_id=number, lora_path=str(folder))

    LoRAResolverRegistry.register_resolver("loracast", LibraryResolver())
